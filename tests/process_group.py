"""Processes of a torch.distributed group over gloo, which run functions for tests: started once, for many tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

LIMIT = 120.0  # Seconds for one function; a test that hangs is a failure.


@dataclass(frozen=True)
class Failed:
    """What a function raised."""

    kind: str
    message: str
    where: str


class ProcessGroup:
    """So many processes. A function runs in all of them, and gives what it gave in each, or `Failed`."""

    def __init__(self, count: int) -> None:
        # Forked from a process that has imported torch and done nothing else: that takes a fifth of the time.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(["torch", "tests.distributed_jobs"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for number in range(count):
            own, other = context.Pipe()
            process = context.Process(target=_work, args=(number, count, port, other), daemon=True)
            process.start()
            self._pipes.append(own)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] = ()) -> list[Any]:
        """Run function(*args) in each process; with `each`, one more argument that differs."""
        for number, pipe in enumerate(self._pipes):
            pipe.send((function, (*args, *([each[number]] if each else []))))
        found = []
        for number, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                raise TimeoutError(f"process {number} has not ended {function.__name__}")
            found.append(pipe.recv())
        return found

    def results(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] = ()) -> list[Any]:
        """The same, where nothing may fail."""
        found = self(function, *args, each=each)
        failed = [one for one in found if isinstance(one, Failed)]
        assert not failed, "\n".join(f"{one.kind}: {one.message}\n{one.where}" for one in failed)
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _work(number: int, count: int, port: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it, and so would this.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count, timeout=timedelta(seconds=60)
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(function(*args))
        except BaseException as error:
            pipe.send(Failed(type(error).__name__, str(error), traceback.format_exc()))
