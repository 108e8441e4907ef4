"""Writes files so that nobody ever sees half of one, and reads those of torch.save without running what is in them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import CheckpointError

# Of the zip archives of torch >= 1.6, and of the pickles before.
_ZIP, _PICKLE = b"PK", b"\x80"


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


def read_torch_file(path: str | Path) -> Mapping[str, Any]:
    """Read a dict of tensors and plain values, onto the CPU.

    Raises:
        CheckpointError: the file is absent, empty, damaged, of another kind, or holds Python objects; the message says
            which, and the remedy.
    """
    path = Path(path)
    _check_start(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # a damaged file may claim any
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"Python objects ({found[1]})" if found else "Python objects"
        raise CheckpointError(
            f"{path} cannot be read: it holds {what}, which are never run here. Where the model's code is at hand, "
            "load it there and write the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # damage shows in any form: struct.error, AssertionError, TypeError, ...
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript file; write the weights alone: "
                "torch.save(torch.jit.load(path).state_dict(), another_path)"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: it is damaged or was cut off; write, copy or download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of weights; write torch.save(model.state_dict(), path)"
        )
    return content


def _check_start(path: Path) -> None:
    """Look at the first bytes: torch's own words for a file of another kind are a single number."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file in it")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise CheckpointError(f"{path} is empty: it was cut off while being written or copied; make it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    if start.startswith((_ZIP, _PICKLE)):
        return
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is a web page, not a file of weights; download the file that the page links to")
    if all(byte in b"\t\n\r\f" or byte >= 32 for byte in start):
        raise CheckpointError(f"{path} is text, not a file that torch.save wrote; name the file with the weights")
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file; what is needed here is a file that torch.save wrote")
    raise CheckpointError(f"{path} is damaged, or was not written by torch.save; name the file with the weights")
