"""What `fxprune.compile` returns of a model whose own forward is Python that no graph holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxprune.annotations import annotate_graph, report_of
from fxprune.calibration.calls import Reading, calls_of
from fxprune.compiled import CompiledModule
from fxprune.errors import GraphError
from fxprune.report import LayerReport, PruneReport


class CompiledParts(nn.Module):
    """A model with compiled children; call it as the model is called. `.report` is on all of it.

    Attributes:
        model: a copy of the user's model, of the user's class, in which the parts are `CompiledModule`s.
        paths: of the parts in the model, in the order in which they are called.
        meta: where fxprune notes down what it knows.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], whole: PruneReport) -> None:
        super().__init__()
        self.model = model
        self.paths = tuple(paths)
        self.meta: dict[str, Any] = {}
        self.set_whole(whole)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    @property
    def parts(self) -> dict[str, CompiledModule]:
        """The compiled children by their path in the model, in the order in which they are called."""
        return {path: self.model.get_submodule(path) for path in self.paths}  # type: ignore[misc]

    @property
    def report(self) -> PruneReport:
        """What was done to each layer of the whole model, under the layer's name there.

        Raises:
            GraphError: a part has been replaced by something that carries no report.
        """
        whole = report_of(self)
        assert whole is not None
        layers: list[LayerReport] = []
        notes = list(whole.notes)
        for path, part in self.parts.items():
            if not isinstance(part, CompiledModule):
                raise GraphError(
                    f"part {path!r} is a {type(part).__name__}, which carries no report: fxprune.compile did not put it there"
                )
            report = part.report
            layers += [replace(layer, name=_name(part, path, layer.name)) for layer in report.layers]
            notes += [f"{path}: {note}" for note in report.notes]
        return replace(whole, layers=(*layers, *whole.layers), notes=tuple(notes))

    def set_whole(self, report: PruneReport) -> None:
        """Set what the report says of the whole, and of the layers that are in no part."""
        annotate_graph(self, report=report)

    def state_around(self) -> dict[str, Tensor]:
        """The model's state dict without the parts': the tensors themselves, by their names in the model."""
        state = self.model.state_dict()
        around = {n: t for n, t in state.items() if not any(n.startswith(f"{path}.") for path in self.paths)}
        return {name: tensor for name, tensor in around.items() if isinstance(tensor, Tensor)}

    def inputs_of(self, path: str, batch: Any) -> list[dict[str, Any]]:
        """The inputs that reach a part when a batch goes through the model: for each of its calls, by name.

        Args:
            path: of the part.
            batch: as a calibration loader gives it.

        Raises:
            GraphError: there is no such part.
            CalibrationError: the model fails on the batch.
        """
        if path not in self.paths:
            raise GraphError(f"there is no part {path!r}; there are: {', '.join(self.paths)}")
        reading = Reading.of(self.model, batch)
        calls = calls_of(lambda: reading.run(self.model, batch), {path: self.model.get_submodule(path)})[path]
        return [call.inputs for call in calls if call.inputs is not None]


def _name(part: CompiledModule, path: str, name: str) -> str:
    """A layer's name in the whole model; the only module of a part that is one layer has the part's."""
    calls = part.graph.find_nodes(op="call_module")
    return path if name == "0" and [str(n.target) for n in calls] == ["0"] else f"{path}.{name}"
