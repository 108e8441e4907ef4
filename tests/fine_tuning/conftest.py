"""A small pruned network, and a way to train it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.fine_tuning.small_net import IMAGES, Net, Train, randomized


@pytest.fixture
def images() -> Tensor:
    return torch.randn(32, *IMAGES)


@pytest.fixture
def dense() -> nn.Module:
    return randomized(Net())


@pytest.fixture
def compiled(dense: nn.Module, images: Tensor) -> fxprune.CompiledModule:
    return fxprune.compile(dense, images.split(16), "2:4", method="magnitude", device="cpu", progress=False)


@pytest.fixture
def train(images: Tensor) -> Train:
    """Ten steps (or `steps`) of an optimizer on a model."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(images) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    return run
