"""Times that can be compared on a noisy machine, and the memory that a computation takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Seconds of the repeats of one computation, in the order they were run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.seconds)


def interleaved(
    computations: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: bool = True,
) -> dict[str, Times]:
    """Time several computations in turn, A B C A B C ..., so that a slow minute of the machine hits all alike.

    Args:
        computations: by name.
        repeats: rounds that are timed.
        device: on CUDA, the clock is read only after the device has finished.
        warm_up: run each once before, untimed.
    """
    if warm_up:
        for computation in computations.values():
            computation()
    seconds: dict[str, list[float]] = {name: [] for name in computations}
    for _ in range(repeats):
        for name, computation in computations.items():
            synchronise(device)
            started = time.perf_counter()
            computation()
            synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def ratio(first: Times, second: Times) -> Times:
    """First over second, round by round: each quotient is of two neighbours in time."""
    return Times(tuple(a / b for a, b in zip(first.seconds, second.seconds, strict=True)))


def synchronise(device: torch.device | str) -> None:
    """Wait until a CUDA device has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(computation: Callable[[], T], device: torch.device | str = "cpu") -> tuple[int, T]:
    """Most bytes that torch's allocator held during a computation beyond what it held before, results included.

    Returns:
        The bytes, and what the computation returned.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = computation()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = computation()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def load() -> float:
    """Processes that wanted to run over the last minute: above the number of cores, times are too long."""
    return os.getloadavg()[0]


def product_rate(device: torch.device | str = "cpu", size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of one large float32 product, the limit that everything here is measured against."""
    a, b = torch.randn(2, size, size, device=device)
    times = interleaved({"product": lambda: a @ b}, repeats, device=device)["product"]
    return 2e-9 * size**3 / min(times.seconds)
