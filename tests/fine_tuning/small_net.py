"""A small network, and where its weights are zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Train = Callable[..., None]
IMAGES = (4, 10, 10)


class Net(nn.Module):
    """Convolutions with BatchNorm, a skip connection and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    """BatchNorm with statistics and factors as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of layers that hold zeros are zero."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    return {name: weight == 0 for name, weight in weights.items() if (weight == 0).any()}


def filled(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """How many of the zeros are none."""
    weights = dict(model.named_parameters())
    return sum(int((weights[name].detach().cpu()[mask] != 0).sum()) for name, mask in masks.items())
