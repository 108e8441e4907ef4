"""Writes files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import CheckpointError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of ``path`` once the block has ended without an error.

    After an error (a full disk, Ctrl-C) ``path`` is what it was before: the old file, or none.

    Args:
        path: the file; its folder is made where absent.

    Raises:
        OSError: the folder cannot be made, or the file not written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "a.txt") as part:
        ...     _ = part.write_text("all of it")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: some writers choose the format by it.
    part = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(content: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors and plain values with torch.save, the whole file or nothing.

    Args:
        content: what `torch.load(..., weights_only=True)` is to give back.
        path: the file; its folder is made where absent.

    Raises:
        CheckpointError: the file cannot be written; what was there is unchanged.
    """
    try:
        with atomic(path) as part, part.open("wb") as file:
            torch.save(content, file)
    except (RuntimeError, OSError) as error:
        # Of a full disk torch says that a position in the file is unexpected; the system's own words come before that.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise CheckpointError(f"cannot write {path}: {cause or error}; what was there is unchanged") from error
