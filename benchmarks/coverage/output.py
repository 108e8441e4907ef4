"""Writes the coverage table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.coverage.row import OK, Row
from benchmarks.machine import machine

PACKAGES = """
torch torchvision onnxruntime timm ultralytics segmentation_models_pytorch facenet-pytorch torchcrepe rapidocr
rapidocr_onnxruntime
""".split()
HEADINGS = {
    "compile": "compile",
    "export": "export",
    "diff": "diff",
    "save": "save",
    "load": "load",
    "exclude": "exclude *",
}


def write_markdown(path: Path, rows: Sequence[Row], pattern: str, method: str, *, of: int | None = None) -> None:
    """The counts by zoo, what fails and why, and every network; `of` how many there are, where not all have been run."""
    installed = [row for row in rows if row.is_installed]
    minutes = sum(row.seconds for row in rows) / 60
    lines = [
        "# Coverage",
        "",
        f"Networks of several zoos, each taken through every stage: compiled to {pattern} (`{method}`, a few noise images), "
        "exported and compared in onnxruntime, compared with the model by `fxprune.diff`, saved, loaded, and compiled again "
        'with `exclude=("*",)`, which has to give exactly the model\'s outputs. Weights are random, but for '
        "the packages that ship some.",
        "",
        *(
            [f"**{len(rows)} of {of} networks so far**; the command below runs the others.", ""]
            if of and of > len(rows)
            else []
        ),
        f"`python -m benchmarks.coverage`, {minutes:.0f} minutes on one core of {machine()}. Versions: {_versions()}.",
        "",
        "*Of possible* is the share pruned of those weights that an output depends on and that the pattern could hold: layers "
        "whose input channels are a multiple of M, matrices of attention and recurrent layers, bare parameters that something "
        "is multiplied by. *Of all* counts every parameter of two or more dimensions, whether an output depends on it or not. "
        "*Unread* is the share of all that no output depends on, such as heads for training and unused stages of an encoder: "
        "the compiled model does without them.",
        "",
        "| zoo | networks | through all stages | " + " | ".join(HEADINGS.values()) + " | of possible: least, median |",
        "|---|---|---|" + "---|" * (len(HEADINGS) + 1),
    ]
    zoos = list(dict.fromkeys(row.zoo for row in rows))
    for zoo in zoos:
        own = [row for row in installed if row.zoo == zoo]
        if not own:
            lines.append(f"| {zoo} | 0 | not installed |" + " |" * (len(HEADINGS) + 1))
            continue
        counts = [sum(getattr(row, stage) in (OK, "-") for row in own) for stage in HEADINGS]
        possible = sorted(row.of_possible for row in own if row.of_possible is not None)
        spread = f"{possible[0]:.1%}, {possible[len(possible) // 2]:.1%}" if possible else ""
        cells = [zoo, str(len(own)), f"{sum(row.is_through for row in own)}", *map(str, counts), spread]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [row for row in installed if not row.is_through]
    if failed:
        lines += ["", "## What fails", "", "| network | stage | why |", "|---|---|---|"]
        for row in failed:
            lines += [f"| {row.zoo}/{row.model} | {stage} | {_cell(why)} |" for stage, why in row.failed.items() if why]
            if row.note and not row.compile:
                lines.append(f"| {row.zoo}/{row.model} | | {_cell(row.note)} |")
    for zoo in zoos:
        own = [row for row in installed if row.zoo == zoo]
        if own:
            lines += [
                "",
                f"## {zoo}",
                "",
                "| network | M parameters | way in | stages | of possible | of all | unread | the rest | s |",
            ]
            lines += ["|---|---|---|---|---|---|---|---|---|", *map(_line, own)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(row: Row) -> str:
    stages = "all" if row.is_through else f"not {', '.join(row.failed)}"
    shares = ["" if share is None else f"{share:.1%}" for share in (row.of_possible, row.of_all)]
    rest = "; ".join(part for part in (row.rest, row.note) if part)
    unread = f"{row.unread:.1%}" if row.unread else ""
    cells = [row.model, f"{row.millions:.1f}", row.way, stages, *shares, unread, _cell(rest), f"{row.seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    names = (
        "torch",
        "torchvision",
        "timm",
        "ultralytics",
        "segmentation_models_pytorch",
        "facenet-pytorch",
        "torchcrepe",
        "onnxruntime",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
