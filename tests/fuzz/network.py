"""A network, its calibration set and how it is compiled, as a script that says all of it and can be pasted into a test."""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SCRIPT = """import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {arguments}):
{forward}


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return {images}


def model():
    torch.manual_seed({seed})
    net = Net()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                nn.init.uniform_(module.weight, {gamma}, 1.5)
                nn.init.normal_(module.bias)
        for step in range({training_steps}):
            net(*images(8, 100 + step))
    return net.{finish}


def batches():
    return [{batch} for seed, x in enumerate(images(n, i) for i, n in enumerate({sizes}))]
"""


@dataclass(frozen=True)
class Network:
    """One drawn network.

    Attributes:
        script: defines `model()`, `images(n, seed)`, a tuple of the model's inputs, and `batches()`.
        names: of the model's inputs.
        features: what is in it, in words, for counting.
    """

    script: str
    names: tuple[str, ...]
    features: frozenset[str] = frozenset()
    _space: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def space(self) -> dict[str, Any]:
        """What the script defines."""
        if not self._space:
            file = f"<network {hash(self.script):x}>"
            linecache.cache[file] = (len(self.script), None, self.script.splitlines(keepends=True), file)
            exec(compile(self.script, file, "exec"), self._space)
        return self._space

    def model(self) -> nn.Module:
        """A new one, the same every time."""
        built: nn.Module = self.space["model"]()
        return built

    def images(self, n: int, seed: int) -> tuple[Tensor, ...]:
        """`n` samples for every input."""
        found: tuple[Tensor, ...] = self.space["images"](n, seed)
        return found

    def batches(self) -> list[Any]:
        """The calibration set."""
        found: list[Any] = self.space["batches"]()
        return found

    def runs(self) -> bool:
        """Whether the network itself does what it should: a value that is not finite is no fault of ours."""
        try:
            model = self.model().eval()
            with torch.no_grad():
                results = [model(*self.images(n, 50)) for n in (1, 3)]
        except (RuntimeError, ValueError):
            return False
        return all(bool(torch.isfinite(t).all()) for result in results for t in tensors(result))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []
