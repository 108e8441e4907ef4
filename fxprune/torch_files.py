"""Reads files that torch.save wrote, without running what is in them; says what a file is where it is none."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import CheckpointError

# Of the zip archives of torch >= 1.6, and of the pickles before.
_ZIP, _PICKLE = b"PK", b"\x80"


def read_torch_file(path: str | Path) -> Mapping[str, Any]:
    """Read a dict of tensors and plain values, onto the CPU.

    Raises:
        CheckpointError: the file is absent, empty, damaged, of another kind, or holds Python objects; the message says
            which, and the remedy.
    """
    path = Path(path)
    _check_start(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"Python objects ({found[1]})" if found else "Python objects"
        raise CheckpointError(
            f"{path} holds {what}, which are never run here. Where the model's code is at hand, load it there and write "
            "the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript file; write the weights alone: "
                "torch.save(torch.jit.load(path).state_dict(), another_path)"
            ) from error
        raise CheckpointError(f"{path} is damaged or was cut off; write, copy or download it again") from error
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
