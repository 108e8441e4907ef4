"""The CIFAR ResNets of He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.

6n + 2 layers: a 3x3 conv, three stages of n basic blocks with 16, 32 and 64 channels, global average
pooling, one linear layer. Shortcuts are the paper's option A and hold no weights: where a stage halves
the map, every second pixel is taken and the new channels are zeros, half before and half after the old.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.models.info import IMAGENET_MEAN, IMAGENET_STD
from fxprune.models.registry import register

DEPTHS = (20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3x3 convs with BatchNorm around an option-A shortcut.

    Args:
        in_planes: input channels.
        planes: output channels.
        stride: of the first conv and of the shortcut's slice.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.pad_before = (planes - in_planes) // 2
        self.pad_after = planes - in_planes - self.pad_before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_planes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x
        if self.stride != 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.pad_before or self.pad_after:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.pad_before, self.pad_after))
        return F.relu(out + shortcut)


class ResNetCifar(nn.Module):
    """A CIFAR ResNet; layers are named conv1, bn1, layer1 to layer3 and linear.

    Args:
        blocks: basic blocks a stage, the paper's n.
        num_classes: width of the output.
        in_channels: channels of the input image.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        logits: torch.Tensor = self.linear(out)
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet_cifar(depth: int, num_classes: int = 10, in_channels: int = 3) -> ResNetCifar:
    """Build the ResNet of a given depth, 6n + 2 with n blocks a stage.

    Raises:
        ValueError: ``depth`` is not 6n + 2 for a positive n.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (20, 32, 44, ...), not {depth}")
    return ResNetCifar(blocks, num_classes, in_channels)


for _depth in DEPTHS:
    # The public weights for these networks were trained with ImageNet's normalisation.
    register(
        f"resnet{_depth}",
        input_shape=(3, 32, 32),
        num_classes=10,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        source="He et al. 2015, section 4.2",
    )(functools.partial(resnet_cifar, _depth))
