"""Small networks with every way in which channels are tied, for tests of their removal."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def images(count: int = 96, seed: int = 0) -> Tensor:
    """Smooth noise, (N, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return F.avg_pool2d(torch.randn(count, 3, 8, 8, generator=generator), 3, 1, 1) * 2


def norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with statistics and parameters of its own."""
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias, 0, 0.2)
    layer.running_mean = torch.randn(channels) * 0.1
    layer.running_var = torch.rand(channels) + 0.5
    return layer


class Residual(nn.Module):
    """Two blocks on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.c, self.d = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, 3, padding=1, stride=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(x + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class OptionA(nn.Module):
    """A shortcut that strides and pads channels, as in the CIFAR ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(short + self.b(F.relu(self.a(x)))).mean((2, 3)))


class Mobile(nn.Module):
    """An inverted residual with squeeze-and-excitation, and a depthwise layer with two filters a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.expand, self.depthwise = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 8, 1)
        self.twofold, self.last = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_bn(self.stem(x)))
        y = F.silu(self.depthwise(F.silu(self.expand(x))))
        y = y * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        x = x + self.project(y)
        return self.head(F.relu(self.last(self.twofold(x))).mean((2, 3)))


class DenseBlock(nn.Module):
    """Concatenations, and BatchNorm before convolutions, which cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = norm(8), nn.Conv2d(8, 6, 3, padding=1)
        self.bn2, self.conv2 = norm(14), nn.Conv2d(14, 6, 3, padding=1)
        self.bn3, self.head = norm(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(self.bn3(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in groups, whose groups go as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.Conv2d(24, 8, 1)
        self.act, self.head = nn.PReLU(24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


class Flat(nn.Module):
    """Flatten, view with sizes that name the channels, and hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2)
        self.hidden, self.head = nn.Linear(54, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.b(F.relu(self.a(x)).view(-1, 8, 8, 8))), 1)
        return self.head(F.relu(self.hidden(x.view(-1, 54))))


class Halves(nn.Module):
    """C2f: a tensor split in halves, one of them going on, all concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.join, self.head = nn.Conv2d(18, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.a(x)).chunk(2, 1))
        y.append(F.silu(self.b(y[-1])))
        return self.head(F.silu(self.join(torch.cat(y, 1))))


class Sliced(nn.Module):
    """Slices of channels, written in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(7, 6, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = torch.cat([F.relu(self.b(x[:, :5])), F.relu(self.c(x[:, -7:, ...]))], 1)
        return self.head(y.mean((2, 3)))


class UNet(nn.Module):
    """A transposed convolution, a skip connection that is concatenated, sizes asked of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        b = F.relu(self.up(F.relu(self.deep(a))))
        b = F.interpolate(b, size=a.shape[-2:])
        return self.head(F.relu(self.join(torch.cat([b, a], 1))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    net.__name__: net for net in (Residual, OptionA, Mobile, DenseBlock, Grouped, Flat, Halves, Sliced, UNet)
}


def network(name: str, seed: int = 0) -> nn.Module:
    """One of them, the same every time."""
    torch.manual_seed(seed)
    return NETWORKS[name]().eval()
