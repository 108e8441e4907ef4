"""The small network, images for it, and the network compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.compiled import CompiledModule
from tests.graph_diff.small_net import SmallNet, fill


@pytest.fixture
def net() -> SmallNet:
    model = SmallNet().eval()
    fill(model)
    return model


@pytest.fixture
def images() -> Tensor:
    i = torch.arange(8 * 3 * 6 * 6)
    return ((13 * i * i + 5 * i) % 97 / 48.0 - 1).reshape(8, 3, 6, 6)


@pytest.fixture
def compiled(net: SmallNet, images: Tensor) -> CompiledModule:
    return fxprune.compile(net, [images], method="magnitude", progress=False)
