"""Tensors in scratch files, written behind and read ahead of the computation by one thread.

A file holds the bytes of its tensors one after another, in the order in which memory has them, and is written over by the next
values of the same batch: archives with checksums, and new files, took longer than the disk did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fxprune.errors import CalibrationError


@dataclass(frozen=True)
class _Layout:
    """What a tensor's bytes mean."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _File(Protocol):
    def write(self, data: Any, /) -> int | None: ...


class ScratchFiles:
    """A folder with a file for each key. At most one file waits to be written, and one read ahead waits to be asked for."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        self._thread = ThreadPoolExecutor(1, "fxprune-scratch")  # One: what is read has been written before.
        self._writing: Future[None] | None = None
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None
        self._layouts: dict[int, list[_Layout]] = {}

    def write(self, key: int, tensors: Sequence[Tensor]) -> None:
        """Write tensors; they must not change afterwards.

        Raises:
            CalibrationError: these or those before could not be written.
        """
        self.finish()
        if self._ahead is not None and self._ahead[0] == key:
            self._ahead = None
        dense = [_dense(tensor) for tensor in tensors]
        self._layouts[key] = [_Layout(t.dtype, tuple(t.shape), t.stride()) for t in dense]
        self._writing = self._thread.submit(_write, self._path(key), dense)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CalibrationError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def read(self, key: int) -> list[Tensor]:
        """The tensors of a key, in host memory."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != key:
            ahead = key, self._read_later(key)
        self.finish()
        return ahead[1].result()

    def read_ahead(self, key: int) -> None:
        """Begin to read what is asked for next."""
        if self._ahead is None or self._ahead[0] != key:
            self._ahead = key, self._read_later(key)

    def _read_later(self, key: int) -> Future[list[Tensor]]:
        return self._thread.submit(_read, self._path(key), self._layouts[key])

    def _path(self, key: int) -> Path:
        return Path(self._folder.name) / str(key)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy without gaps: a view's whole storage is not written."""
    tensor = tensor.cpu()
    is_dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor if is_dense else tensor.clone()


def _bytes_of(dense: Tensor) -> Any:
    """Its memory as a buffer."""
    flat = dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
    return flat.view(torch.uint8).numpy().data


@torch.inference_mode()
def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    try:
        # Not truncated: blocks that are there need not be found again.
        with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
            for tensor in tensors:
                _write_all(file, _bytes_of(tensor))
            file.truncate()
    except OSError as error:
        mib = sum(tensor.nbytes for tensor in tensors) / 2**20
        raise CalibrationError(
            f"calibration values do not fit in memory, and writing {mib:.0f} MiB of them to {path.parent} "
            f"failed ({error}); free space there, set TMPDIR to another disk, or use fewer calibration images"
        ) from error


def _write_all(file: _File, data: Any) -> None:
    while len(data):
        data = data[file.write(data) :]


@torch.inference_mode()
def _read(path: Path, layouts: Sequence[_Layout]) -> list[Tensor]:
    tensors = []
    with open(path, "rb", buffering=0) as file:
        for layout in layouts:
            tensor = torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype)
            data = _bytes_of(tensor)
            while len(data):
                got = file.readinto(data)
                if not got:
                    raise CalibrationError(
                        f"the scratch file {path} has become shorter; was it written to by something else?"
                    )
                data = data[got:]
            tensors.append(tensor)
    return tensors
