"""Small networks, each with one habit that a graph compiler finds awkward, as people write them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


def _conv(channels: int, out: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, **more)


class Body(nn.Module):
    """Stem, something in the middle, head; the subclasses write the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(4, 16), nn.BatchNorm2d(16), nn.ReLU())
        self.build()
        self.tail = nn.Sequential(_conv(16, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))

    def build(self) -> None:
        """The middle's modules."""
        self.middle = _conv(16, 16)

    def between(self, x: Tensor) -> Tensor:
        """The middle."""
        return self.middle(x)

    def forward(self, x: Tensor) -> Any:
        """Stem, middle, tail."""
        return self.tail(self.between(self.stem(x)))


class SharedLayer(Body):
    """One layer, three calls."""

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        for _ in range(3):
            x = self.middle(x).relu()
        return x


class TiedWeights(Body):
    """Two modules with one weight."""

    def build(self) -> None:
        """Middle."""
        self.a, self.b = _conv(16, 16), _conv(16, 16)
        self.b.weight = self.a.weight

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        return self.b(self.a(x).relu())


class StarArguments(Body):
    """Arguments that nobody gives."""

    def forward(self, x: Tensor, *args: Any, augment: bool = False, **kwargs: Any) -> Any:
        """As ultralytics has it."""
        return super().forward(x.flip(-1) if augment else x)


class ShapeBranch(Body):
    """Checks and pads by shape, in the root."""

    def forward(self, x: Tensor) -> Any:
        """As segmentation_models_pytorch and timm have it."""
        _, _, h, w = x.shape
        if h % 8 != 0 or w % 8 != 0:
            raise ValueError(f"{h} x {w}: multiples of 8, please")
        pad = max((math.ceil(w / 2) - 1) * 2 + 3 - w, 0)
        return super().forward(F.pad(x, (pad // 2, pad - pad // 2)) if pad > 0 else x)


class ListOfFeatures(Body):
    """Lists that grow, chunks, a loop over both."""

    def build(self) -> None:
        """Middle."""
        self.blocks = nn.ModuleList(_conv(8, 8) for _ in range(3))
        self.join = _conv(40, 16, 1)

    def between(self, x: Tensor) -> Tensor:
        """As YOLO's C2f has it."""
        y = list(x.chunk(2, 1))
        y.extend(block(y[-1]) for block in self.blocks)
        return self.join(torch.cat(y, 1))


class DictOfOutputs(Body):
    """A dict of several scales."""

    def forward(self, x: Tensor) -> Any:
        """As torchvision's segmentation models have it."""
        features = OrderedDict(fine=self.stem(x))
        features["coarse"] = F.max_pool2d(self.between(features["fine"]), 2)
        return {name: self.tail(value) for name, value in features.items()}


class Answer(NamedTuple):
    """What NamedOutputs returns."""

    scores: Tensor
    features: Tensor


class NamedOutputs(Body):
    """A named tuple."""

    def forward(self, x: Tensor) -> Any:
        """Scores and features."""
        features = self.between(self.stem(x))
        return Answer(self.tail(features), features)


class Recurrent(Body):
    """A bidirectional LSTM over columns, as text recognition has it."""

    def build(self) -> None:
        """Middle."""
        self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=True)

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        y, _ = self.lstm(x.mean(2).transpose(1, 2))
        return x + y.transpose(1, 2).unsqueeze(2)


class BareParameters(Body):
    """Weights that belong to no layer."""

    def build(self) -> None:
        """Middle."""
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.matrix = nn.Parameter(torch.randn(16, 16) / 4)
        self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        x = F.conv2d(x, self.kernel, padding=1) * self.scale
        return F.linear(x.permute(0, 2, 3, 1), self.matrix).permute(0, 3, 1, 2)


class SamePaddingConv(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        """As EfficientNet-PyTorch has it."""
        pads = []
        for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            pad = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads = [pad // 2, pad - pad // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    """Weights standardised at every call."""

    def forward(self, x: Tensor) -> Tensor:
        """As BiT and NFNets have it."""
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Subclasses(Body):
    """Convolutions of classes of their own."""

    def build(self) -> None:
        """Middle."""
        self.middle = nn.Sequential(SamePaddingConv(16, 16, 3, stride=2), StandardisedConv(16, 16, 3, padding=1))


class Attention(Body):
    """nn.MultiheadAttention over pixels."""

    def build(self) -> None:
        """Middle."""
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        y = self.norm(x.flatten(2).transpose(1, 2))
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Transformer(Body):
    """nn.TransformerEncoder with a position embedding and a class token."""

    def build(self) -> None:
        """Middle."""
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 65, 16) * 0.02)

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        y = F.adaptive_avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        return x * self.encoder(y)[:, 0, :, None, None]


class ReparametrisedWeights(Body):
    """weight_norm, spectral_norm and a pruning mask."""

    def build(self) -> None:
        """Middle."""
        self.middle = nn.Sequential(
            parametrizations.weight_norm(_conv(16, 16)),
            parametrizations.spectral_norm(_conv(16, 16)),
            prune.l1_unstructured(_conv(16, 16), "weight", 0.2),
        )


class OldWeightNorm(Body):
    """torch.nn.utils.weight_norm, which computes its weight in a hook."""

    def build(self) -> None:
        """Middle."""
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.middle = nn.utils.weight_norm(_conv(16, 16))


class ChannelShuffle(Body):
    """Groups and a shuffle by view."""

    def build(self) -> None:
        """Middle."""
        self.a, self.b = _conv(16, 32, 1, groups=2), _conv(32, 16, groups=4)

    def between(self, x: Tensor) -> Tensor:
        """As ShuffleNet has it."""
        x = self.a(x).relu()
        n, c, h, w = x.size()
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class UpAndDown(Body):
    """A transposed convolution, interpolation to another tensor's size, concatenation."""

    def build(self) -> None:
        """Middle."""
        self.down, self.up = _conv(16, 32, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join = _conv(64, 16)

    def between(self, x: Tensor) -> Tensor:
        """As a U-Net has it."""
        small = self.down(x).relu()
        smaller = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat([x, F.interpolate(self.up(small), x.shape[-2:]), smaller], dim=1))


class Einsum(Body):
    """A product of matrices by torch.einsum, and one by @."""

    def build(self) -> None:
        """Middle."""
        self.mix, self.mix2 = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16, 16) / 4)

    def between(self, x: Tensor) -> Tensor:
        """Middle."""
        x = torch.einsum("oc,nchw->nohw", self.mix, x)
        return (x.flatten(2).transpose(1, 2) @ self.mix2).transpose(1, 2).unflatten(2, x.shape[2:])


class Detector(nn.Module):
    """A list of images of different sizes in, boxes of each out: Python in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(_conv(4, 16), nn.BatchNorm2d(16), nn.ReLU(), _conv(16, 32, stride=2), nn.ReLU())
        self.head = nn.Sequential(_conv(32, 32), nn.ReLU(), _conv(32, 5, 1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """As torchvision's detectors have it."""
        height, width = (max(int(image.shape[i]) for image in images) for i in (1, 2))
        batch = torch.stack([F.pad(im, (0, width - im.shape[2], 0, height - im.shape[1])) for im in images])
        features = self.backbone(batch)
        found = []
        for level in (features, F.max_pool2d(features, 2)):
            scores = self.head(level).flatten(2)
            for image, of_image in enumerate(scores):
                keep = of_image[0] > of_image[0].median()
                found.append({"image": torch.tensor(image), "scores": of_image[0, keep], "boxes": of_image[1:, keep].T})
        return found


class DataDependent(nn.Module):
    """Decides by the values in a tensor, in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(4, 16), nn.ReLU())
        self.easy, self.hard = _conv(16, 16), nn.Sequential(_conv(16, 32), nn.ReLU(), _conv(32, 16))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Two rounds at most, and the harder way for contrasty images."""
        x = self.stem(x)
        for _ in range(2):
            x = self.hard(x) if float(x.std()) > 0.1 else self.easy(x)
        return self.head(x.mean((2, 3)))


class EarlyExit(Body):
    """Data-dependent Python deep inside one of its modules."""

    class Gate(nn.Module):
        """Adds something where something is found."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = _conv(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            """A branch on values."""
            return x + self.conv(x) if bool((x > 0).any()) else x

    def build(self) -> None:
        """Middle."""
        self.middle = nn.Sequential(_conv(16, 16), self.Gate(), _conv(16, 16))


class CountsCalls(Body):
    """Keeps count of its calls, and of what it saw last."""

    def build(self) -> None:
        """Middle."""
        super().build()
        self.calls, self.last = 0, None

    def between(self, x: Tensor) -> Tensor:
        """As some video models have it."""
        self.calls += 1
        self.last = self.middle(x)
        return self.last


class InPlace(Body):
    """In-place arithmetic on views and slices."""

    def between(self, x: Tensor) -> Tensor:
        """As ESRGAN's and TSM's code have it."""
        y = self.middle(x)
        y[:, :4] += x[:, :4]
        y *= 0.5
        return y.add_(x)


AWKWARD = (
    SharedLayer, TiedWeights, StarArguments, ShapeBranch, ListOfFeatures, DictOfOutputs, NamedOutputs, Recurrent,
    BareParameters, Subclasses, Attention, Transformer, ReparametrisedWeights, OldWeightNorm, ChannelShuffle, UpAndDown, Einsum,
    Detector, DataDependent, EarlyExit, CountsCalls, InPlace,
)  # fmt: skip
RETURNED = (Answer,)  # Classes of what they return, which a saved file has to be allowed to name.
