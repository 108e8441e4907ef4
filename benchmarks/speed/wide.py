"""What a compilation costs in dense passes over the same images, where layers are wide; and a set larger than memory.

Both are in CPU seconds, which other programs on the machine change least. The models have random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.speed.measure import Times, load
from benchmarks.speed.resnet50 import BATCH_SIZE, random_batches, settle_batchnorm
from benchmarks.speed.rows import Row
from benchmarks.speed.whole_compile import DEFAULT, DENSE, Say, forward, load_model, split
from fxprune.models import create
from fxprune.report import PruneReport

CASES = {"resnet18-small": ("resnet18", 16, 64), "resnet18": ("resnet18", 512, 224), "resnet50": ("resnet50", 128, 224)}
IN_MEMORY, SPILLED, BUDGET = "sparsegpt in memory", "sparsegpt in 16 MiB", 16 * 2**20


def run(cases: Sequence[str], *, small: bool, say: Say) -> Iterator[Row]:
    """For each case, one compilation between two dense passes."""
    for case in cases:
        name, images, size = ("resnet20", 8, 32) if small else CASES[case]
        torch.manual_seed(0)
        model = create(name)
        settle_batchnorm(model, size)
        batches = list(random_batches(images, size, BATCH_SIZE))
        forward(model, batches[:1])
        began, reports = load(), list[PruneReport]()
        before = cpu_seconds(partial(forward, model, batches))
        taken = Times((cpu_seconds(_compilation(model, batches, DEFAULT, None, reports)),))
        dense = Times((before, cpu_seconds(partial(forward, model, batches))))
        words = f"{name}, {images} images {size}x{size}, 2:4"
        common = {"images": images, "load": began, "threads": torch.get_num_threads()}
        passes = taken.median / dense.median
        yield Row.of("wide", words, DENSE, dense, over_first=1.0, **common)
        yield Row.of("wide", words, DEFAULT, taken, over_first=passes, **common, **split(reports, taken))
        say(f"{words}: {passes:.1f} dense passes")


def spilled(data_root: Path, *, repeats: int, small: bool, say: Say) -> Iterator[Row]:
    """The same compilation with all values in memory and with nearly all of them in scratch files, in turn.

    By SparseGPT, beside whose solver the files count most; in seconds of the clock, since a disk takes no CPU time.
    """
    images = 64 if small else 1024
    model, batches, words = load_model("resnet20", data_root, images)
    limits, reports = {IN_MEMORY: None, SPILLED: BUDGET // (64 if small else 1)}, dict[str, list[PruneReport]]()
    seconds = dict[str, list[float]]()
    began = load()
    for _ in range(repeats):
        for way, limit in limits.items():
            compilation = _compilation(model, batches, "sparsegpt", limit, reports.setdefault(way, []))
            started = time.perf_counter()
            compilation()
            seconds.setdefault(way, []).append(time.perf_counter() - started)
    quotients = [own / first for own, first in zip(seconds[SPILLED], seconds[IN_MEMORY], strict=True)]
    for way, over in ((IN_MEMORY, 1.0), (SPILLED, median(quotients))):
        times = Times(tuple(seconds[way]))
        yield Row.of(
            "spilled", f"resnet20, {images} images, 2:4 ({words})", way, times, over_first=over, images=images, load=began,
            threads=torch.get_num_threads(), **split(reports[way], times),
        )  # fmt: skip
    say(f"spilled: {median(quotients):.2f} of the time in memory")


def cpu_seconds(computation: Callable[[], Any]) -> float:
    """CPU seconds of this process that a computation takes."""
    started = time.process_time()
    computation()
    return time.process_time() - started


def _compilation(
    model: nn.Module, batches: list[Tensor], method: str, limit: int | None, reports: list[PruneReport]
) -> Callable[[], None]:
    def compile_once() -> None:
        compiled = fxprune.compile(
            model, batches, "2:4", method=method, device="cpu", progress=False, memory_limit=limit
        )
        reports.append(compiled.report)

    return compile_once
