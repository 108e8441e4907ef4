"""A plain eight-layer CNN for CIFAR: no branches, no skips."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.models.registry import register


@register(
    "cifar_cnn",
    input_shape=(3, 32, 32),
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
class CifarCNN(nn.Module):
    """Six 3x3 convs with BatchNorm in three stages, max pooling after each, two linear layers.

    Args:
        num_classes: width of the output.
        in_channels: channels of the (in_channels, 32, 32) input.
        width: channels of the first stage; each later stage has twice as many.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage_width in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, stage_width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(stage_width),
                    nn.ReLU(),
                ]
                channels = stage_width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(channels * 4 * 4, 256)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, 32, 32) to logits (N, num_classes)."""
        x = torch.flatten(self.features(x), 1)
        logits: torch.Tensor = self.fc2(self.dropout(self.relu(self.fc1(x))))
        return logits
