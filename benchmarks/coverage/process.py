"""A process for each network: one that crashes, hangs or eats all memory does not stop the others."""

from __future__ import annotations

import multiprocessing
import time
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from benchmarks.coverage.row import Row

# Imported once, in the process that the others are copies of.
PRELOAD = [
    "torch",
    "torchvision",
    "onnxruntime",
    "timm",
    "fxprune.export",
    "fxprune.compiler",
    "benchmarks.coverage.stages",
]


def run_in_process(name: str, pattern: str, method: str, *, limit: float) -> Row:
    """The row of a network; if its process comes to nothing, as far as it went, with a note.

    Args:
        name: zoo/model.
        pattern: to compile to.
        method: by which.
        limit: seconds that it may take.
    """
    started = time.monotonic()
    ours, theirs = _context().Pipe(duplex=False)
    process = _context().Process(target=_tell, args=(theirs, name, pattern, method))
    process.start()
    theirs.close()
    row, note = Row(*name.split("/", 1)), ""
    try:
        while left := max(0.0, started + limit - time.monotonic()):
            if ours.poll(left):
                row = ours.recv()
        note = f"stopped after {limit:.0f} s"
    except EOFError:
        process.join()
        note = f"its process ended with code {process.exitcode}" if process.exitcode else ""
    finally:
        process.kill()
        process.join()
    row.note = "; ".join(filter(None, (row.note, note)))
    row.seconds = time.monotonic() - started
    return row


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _tell(connection: Connection, name: str, pattern: str, method: str) -> None:
    from benchmarks.coverage.stages import run
    from benchmarks.coverage.zoos import cases

    connection.send(run(cases()[name], pattern=pattern, method=method, tell=connection.send))
