"""A small CNN for MNIST-sized images: two convs, two linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.models.registry import register


@register("simple_cnn", input_shape=(1, 28, 28), num_classes=10, mean=(0.1307,), std=(0.3081,))
class SimpleCNN(nn.Module):
    """Two 3x3 convs with BatchNorm and 2x2 max pooling, then two linear layers.

    Every layer's input but the first one's has a multiple of 4 channels, so all but ``conv1`` can
    hold a 2:4 pattern.

    Args:
        num_classes: width of the output.
        in_channels: channels of the (in_channels, 28, 28) input.
        width: channels of the first conv; the second has twice as many.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc1 = nn.Linear(2 * width * 7 * 7, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, 28, 28) to logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: torch.Tensor = self.fc2(x)
        return logits
