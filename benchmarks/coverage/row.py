"""A row of the coverage table: what became of one model at every stage."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("compile", "export", "diff", "save", "load", "exclude")
OK = "ok"


@dataclass
class Row:
    """What became of one model.

    A stage holds "ok", the first line of what went wrong, "-" where the stage does not apply, or "" where it was not reached.

    Attributes:
        zoo: where the model is from.
        model: its name.
        millions: of parameters.
        way: how the model came in: "torch.fx", "example values", "torch.export", "parts", ... or "".
        compile: fxprune.compile, and a run of what it gives.
        export: fxprune.export_onnx, with its comparison in onnxruntime; of a model in parts that of every part.
        diff: fxprune.diff as text.
        save: fxprune.save.
        load: fxprune.load, and the same outputs.
        exclude: whether `exclude=("*",)` gives exactly the model's outputs.
        of_possible: share pruned of those weights that an output depends on and that the pattern could hold, see
            `stages.possible`.
        of_all: share of all weights that was pruned.
        unread: share of all weights that no output depends on.
        rest: why the others that the pattern could hold were not.
        seconds: for all of it.
        note: warnings of the intake, a time limit, and so on.
    """

    zoo: str
    model: str
    millions: float = 0.0
    way: str = ""
    compile: str = ""
    export: str = ""
    diff: str = ""
    save: str = ""
    load: str = ""
    exclude: str = ""
    of_possible: float | None = None
    of_all: float | None = None
    unread: float | None = None
    rest: str = ""
    seconds: float = 0.0
    note: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the model's package is there."""
        return not self.note.startswith("not installed")

    @property
    def failed(self) -> dict[str, str]:
        """What went wrong, by stage."""
        return {stage: value for stage in STAGES if (value := getattr(self, stage)) not in (OK, "-")}

    @property
    def is_through(self) -> bool:
        """Whether all stages went well."""
        return not self.failed
