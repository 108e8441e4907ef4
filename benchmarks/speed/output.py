"""speed.csv as Markdown, each bar with its figure, and as pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed.layer_statistics import LEAN, OURS, UNFOLD
from benchmarks.speed.rows import Row
from benchmarks.speed.whole_compile import DEFAULT, DENSE, HOOKS
from benchmarks.speed.wide import SPILLED
from fxprune.files import atomic
from fxprune.plots.style import figure, label_ends, save_figure

TITLES = {
    "statistics": "Statistics of ResNet-18's 3x3 stride-1 layers",
    "compile": "Whole compilation",
    "growth: images": "Growth with calibration images (ResNet-20)",
    "growth: channels": "Growth with channels (3x3 layer at 14x14)",
    "growth: depth": "Growth with depth",
    "resnet50": "ResNet-50, random weights",
    "wide": "Compilations in dense passes over the same images, CPU seconds",
    "spilled": "A set larger than memory",
}
PASSES = {"resnet50, 128 images 224x224": 6, "resnet18, 512 images 224x224": 4}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "s": lambda r: _seconds(r),
    "x first": lambda r: _number(r.over_first, ".2f"),
    "GFLOP": lambda r: _number(r.gflop, ".1f"),
    "GFLOP/s": lambda r: _number(r.gflop / r.seconds if r.gflop else None, ".0f"),
    "GB": lambda r: _number(r.gbyte, ".2f"),
    "extra MiB": lambda r: _number(r.extra_mib, ".1f"),
    "of it result": lambda r: _number(r.result_mib, ".1f"),
    "difference": lambda r: _number(r.difference, ".1e"),
    "stream": lambda r: _number(r.stream, ".1f"),
    "statistics": lambda r: _number(r.statistics, ".1f"),
    "solve": lambda r: _number(r.solve, ".1f"),
    "other": lambda r: _number(r.other, ".1f"),
    "layer error": lambda r: _number(r.error, ".4f"),
    "KL": lambda r: _number(r.kl, ".5f"),
    "agreement %": lambda r: _number(r.agreement, ".1f"),
    "live MiB": lambda r: _number(r.live_mib, ".0f"),
    "peak MiB": lambda r: _number(r.rss_mib, ".0f"),
    "load": lambda r: _number(r.load, ".1f"),
}
COLORS = {OURS: "#0072B2", DEFAULT: "#0072B2", UNFOLD: "#D55E00", LEAN: "#E69F00", "sparsegpt": "#009E73",
          HOOKS: "#D55E00", DENSE: "#7F7F7F", "exact_obs": "#CC79A7"}  # fmt: skip


def write_markdown(path: Path, rows: Sequence[Row], command: str) -> None:
    """Write what was measured section by section, with columns that nobody filled left out."""
    lines = [
        "# Speed and memory", "", f"Made by `{command}`; see `--help` for its sections. Seconds are the median of the "
        "repeats (least to most); ways that are compared ran in turn, and `x first` is the median of the quotients of one "
        "round, against the first way of each case. GFLOP and GB are counted, not measured: operations of the products "
        "(a multiply-add is two), and float32 bytes with each operand read or written once a step. `extra` is what torch's "
        "allocator held at most beyond the input. `load` is the machine's as the section began: where it is above the "
        "number of cores, other programs ran too and seconds are too long, while quotients hold.", "",
    ]  # fmt: skip
    for machine in sorted({row.machine for row in rows}):
        sections = dict.fromkeys(row.section for row in rows if row.machine == machine)
        lines += [f"Machine ({'; '.join(sections)}): {machine}.", ""]
    on_gpu = "cuda" in command
    lines += ["## Bars", "", *(f"- {bar}" for bar in bars(rows, on_gpu=on_gpu)), ""]
    for section, title in TITLES.items():
        chosen = [row for row in rows if row.section == section]
        if on_gpu and section not in ("statistics", "resnet50"):
            continue
        if not chosen:
            lines += [f"## {title}", "", "Not measured yet: an open figure.", ""]
            continue
        columns = {name: cell for name, cell in COLUMNS.items() if any(cell(row) for row in chosen)}
        lines += [f"## {title}", "", f"| case | way | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
        for row in chosen:
            lines.append(f"| {row.case} | {row.method} | {' | '.join(cell(row) for cell in columns.values())} |")
        lines.append("")
    with atomic(path) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def bars(rows: Sequence[Row], *, on_gpu: bool = False) -> list[str]:
    """Each bar that the rows can say something about, with the figure; those of the statistics are set for two CPU cores."""
    said = []
    for case, ways in _cases(rows, "statistics"):
        if OURS in ways and UNFOLD in ways:
            ours, unfold = ways[OURS], ways[UNFOLD]
            result, difference, faster = _known(ours.result_mib), _known(ours.difference), _known(unfold.over_first)
            ours_mib, unfold_mib = _known(ours.extra_mib), _known(unfold.extra_mib)
            beyond = (unfold_mib - result) / (ours_mib - result)
            said.append(
                f"{case}: time 1/{faster:.1f} of unfold + matmul's (bar 1/4), extra memory 1/{beyond:.1f} (bar 1/5) beyond "
                f"the result, which both must hold, and 1/{unfold_mib / ours_mib:.1f} with it, difference {difference:.0e} "
                f"(bar 1e-5): "
                + ("the bars are set for a CPU" if on_gpu else _met(faster >= 4 and beyond >= 5 and difference <= 1e-5))
            )
    for case, ways in _cases(rows, "compile"):
        if DEFAULT in ways and "exact_obs" in ways:
            ours, exact = ways[DEFAULT], ways["exact_obs"]
            error, exact_error = _known(ours.error), _known(exact.error)
            said.append(
                f"{case}: default takes 1/{exact.seconds / ours.seconds:.1f} of exact_obs's time (bar 1/5), layer error "
                f"{error:.4f} against {exact_error:.4f}: {_met(exact.seconds >= 5 * ours.seconds and error < exact_error)}"
            )
        if DEFAULT in ways and DENSE in ways:
            ours, dense = ways[DEFAULT], ways[DENSE]
            beside = (ours.seconds - _known(ours.solve)) / dense.seconds
            note = "" if ours.images == 1024 else "; the bar is set for 1024 images"
            said.append(
                f"{case}: default, which runs {ours.images_used or ours.images} of the images, less its solver is "
                f"{beside:.1f} dense passes over all of them (bar 3{note}): {_met(beside <= 3)}"
            )
    for row in rows:
        if row.section == "resnet50" and row.rss_mib and "GPU" not in row.case:
            peak = row.rss_mib / 1024
            said.append(f"{row.case}: peak {peak:.2f} GiB (bar 8), {row.seconds:.0f} s: {_met(peak <= 8)}")
        elif row.section == "resnet50":
            said.append(f"{row.case}: {row.seconds:.1f} s (bar 30): {_met(row.seconds <= 30)}")
    for row in rows:
        passes = next((bar for start, bar in PASSES.items() if row.case.startswith(start)), None)
        if row.section == "wide" and row.method == DEFAULT and passes is not None:
            share = _known(row.over_first)
            said.append(f"{row.case}: {share:.1f} dense passes in CPU seconds (bar {passes}): {_met(share <= passes)}")
        elif row.section == "spilled" and row.method == SPILLED:
            share = _known(row.over_first)
            said.append(f"{row.case}: {row.method} takes {share:.2f} of the time (bar 1.3): {_met(share <= 1.3)}")
    return said or ["None of the sections with a bar has been run."]


def write_plots(stem: Path, rows: Sequence[Row]) -> None:
    """Write <stem>_statistics.png, <stem>_compile.png and <stem>_growth.png, as far as there are rows."""
    statistics = _cases(rows, "statistics", OURS)
    if statistics:
        _bars(stem.with_name(f"{stem.name}_statistics"), statistics, (OURS, LEAN, UNFOLD))
    compiled = _cases(rows, "compile", DEFAULT)
    if compiled:
        _bars(stem.with_name(f"{stem.name}_compile"), compiled, (DENSE, DEFAULT, "sparsegpt", HOOKS, "exact_obs"))
    sections = [s for s in TITLES if s.startswith("growth") and any(row.section == s for row in rows)]
    if sections:
        with figure(3.0 * len(sections), width=6.6) as picture:
            for axes, section in zip(picture.subplots(len(sections), 1, squeeze=False)[:, 0], sections, strict=True):
                chosen = [row for row in rows if row.section == section]
                cases = list(dict.fromkeys(row.case for row in chosen))
                ends = []
                for method in dict.fromkeys(row.method for row in chosen if row.method != LEAN):
                    places = [(cases.index(r.case), r.seconds) for r in chosen if r.method == method]
                    axes.plot(*zip(*places, strict=True), marker="o", color=COLORS[method])
                    ends.append((*places[-1], method, COLORS[method]))
                axes.set_title(TITLES[section])
                axes.set_xticks(range(len(cases)), [case.split(",")[0].split()[0] for case in cases])
                axes.set_ylabel("seconds")
                axes.set_ylim(bottom=0)
                axes.margins(x=0.05)
                label_ends(axes, ends, size=10)
            save_figure(picture, stem.with_name(f"{stem.name}_growth"), ("png",))


def _bars(stem: Path, cases: Sequence[tuple[str, dict[str, Row]]], order: Sequence[str]) -> None:
    """Seconds, one group of bars a case, all from 0."""
    lines = [(case, ways[method]) for case, ways in cases for method in order if method in ways]
    with figure(0.9 + 0.3 * len(lines), width=7.2) as picture:
        axes = picture.add_subplot()
        for place, (_, row) in enumerate(lines):
            axes.barh(place, row.seconds, color=COLORS[row.method])
            axes.annotate(
                f"{row.seconds:.3g} s", (row.seconds, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        names = [f"{case.split(' (')[0]}: {row.method}" if len(cases) > 1 else row.method for case, row in lines]
        axes.set_yticks(range(len(lines)), names, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("seconds")
        save_figure(picture, stem, ("png",))


def _cases(rows: Sequence[Row], section: str, needed: str | None = None) -> list[tuple[str, dict[str, Row]]]:
    """The rows of a section by case and way, in their order; those with a needed way only."""
    chosen = [row for row in rows if row.section == section and not math.isnan(row.seconds)]
    found = [(case, {r.method: r for r in group}) for case, group in itertools.groupby(chosen, key=lambda r: r.case)]
    return [(case, ways) for case, ways in found if needed is None or needed in ways]


def _known(value: float | None) -> float:
    """A figure that its section always has."""
    assert value is not None
    return value


def _met(good: bool) -> str:
    return "met." if good else "NOT met."


def _seconds(row: Row) -> str:
    if math.isnan(row.seconds):
        return "open"
    text = f"{row.seconds:.3g}"
    return text if row.repeats == 1 else f"{text} ({row.seconds_min:.3g} to {row.seconds_max:.3g})"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)
