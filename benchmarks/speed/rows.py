"""The lines of speed.csv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.measure import Times


@dataclass(frozen=True)
class Row:
    """One computation. None: not measured, or without meaning there.

    Attributes:
        section: "statistics", "compile", "growth", "resnet50", "wide" or "spilled".
        case: layer, model or size.
        method: which of the ways that are compared.
        seconds: median over the repeats; least and most beside it.
        over_first: median of the quotients, round by round, of this time over that of the case's first method.
        gflop: 10^9 floating-point operations that the method takes (a multiply-add is two).
        gbyte: 10^9 bytes that its steps read and write at the least, each operand once a step.
        result_mib: MiB of the result alone.
        extra_mib: most MiB held beyond the input, result included.
        difference: largest |H - H64|_ij / sqrt(H64_ii H64_jj) from the float64 reference.
        stream: seconds of the stages of a compilation, like statistics and solve; other is the rest.
        error: mean relative output error of the layers pruned.
        images_used: of the calibration images, those that a compilation ran.
        live_mib: most MiB of calibration values held.
        rss_mib: most MiB resident of the whole process (on CUDA: allocated on the GPU).
        load: of the machine as the section began; above its cores, the times are too long.
    """

    section: str
    case: str
    method: str
    seconds: float
    seconds_min: float
    seconds_max: float
    repeats: int
    over_first: float | None = None
    gflop: float | None = None
    gbyte: float | None = None
    result_mib: float | None = None
    extra_mib: float | None = None
    difference: float | None = None
    stream: float | None = None
    statistics: float | None = None
    solve: float | None = None
    other: float | None = None
    error: float | None = None
    kl: float | None = None
    agreement: float | None = None
    images: int | None = None
    images_used: int | None = None
    live_mib: float | None = None
    rss_mib: float | None = None
    load: float | None = None
    threads: int | None = None
    machine: str = ""

    @classmethod
    def of(cls, section: str, case: str, method: str, times: Times, **values: Any) -> Row:
        """A row from its times."""
        seconds = times.seconds
        return cls(section, case, method, times.median, min(seconds), max(seconds), len(seconds), **values)


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of sections that were run again take the place of the old ones."""
    again = {row.section for row in new}
    return [row for row in old if row.section not in again] + list(new)
