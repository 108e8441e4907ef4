"""Full float32 products: TF32 and bfloat16 keep 10 and 7 bits of the mantissa, too few for Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Take float32 products in float32, whatever the user has allowed instead, and put the settings back afterwards."""
    # torch has these settings twice. The old ones cannot be read once the new ones say something else, and are what
    # torch.compile and torch.export read, so both are kept.
    old = {name: _read(read) for name, (read, _) in _OLD.items()}
    new = [(kind, kind.fp32_precision) for kind in _kinds()]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for kind, _ in new:
        if kind.fp32_precision not in ("none", "ieee"):
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for name, value in old.items():
            if value is not None:
                _OLD[name][1](value)
        for kind, value in new:
            for setting in ("none", value):  # "none" is as the settings above it say.
                if kind.fp32_precision != value:
                    kind.fp32_precision = setting


def _kinds() -> tuple[Any, ...]:
    """The settings for every kind of operation that may take less than float32."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    return cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _set_tf32(module: Any, value: bool) -> None:
    module.allow_tf32 = value


_OLD: dict[str, tuple[Any, Any]] = {
    "cudnn": (lambda: torch.backends.cudnn.allow_tf32, lambda value: _set_tf32(torch.backends.cudnn, value)),
    "tf32": (lambda: torch.backends.cuda.matmul.allow_tf32, lambda value: _set_tf32(torch.backends.cuda.matmul, value)),
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
}


def _read(read: Any) -> Any:
    """An old setting, or None where torch says that the new ones have made it meaningless."""
    try:
        return read()
    except RuntimeError:
        return None
