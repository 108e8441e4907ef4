"""A naive float64 im2col written with Python loops, and layers of every geometry to compare it on."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def naive_patches(module: nn.Module, x: Tensor) -> Tensor:
    """(G, P, D) by loops over images, output positions and kernel offsets, from torch's own padding."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, module.in_features)
    mode = module.padding_mode
    padding = module._reversed_padding_repeated_twice
    x = torch.nn.functional.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    ]
    channels = module.in_channels // module.groups
    groups = []
    for g in range(module.groups):
        part = x[:, g * channels : (g + 1) * channels]
        rows = []
        for image in part:
            for position in itertools.product(*map(range, sizes)):
                columns = []
                for offset in itertools.product(*map(range, module.kernel_size)):
                    at = [
                        p * s + o * d
                        for p, s, o, d in zip(position, module.stride, offset, module.dilation, strict=True)
                    ]
                    columns.append(image[(slice(None), *at)])
                rows.append(torch.cat(columns))
        groups.append(torch.stack(rows))
    return torch.stack(groups)


CONVS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, padding=0, bias=False),
    nn.Conv2d(4, 6, 3, padding=2),
    nn.Conv2d(4, 6, 3, padding=3),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, dilation=2),
    nn.Conv2d(4, 6, 5, padding=2),
    nn.Conv2d(4, 6, 5, padding=1),
    nn.Conv2d(4, 6, (3, 5), padding=(1, 2)),
    nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
    nn.Conv2d(4, 6, (2, 4), padding="same"),
    nn.Conv2d(4, 6, 4, padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"),
    nn.Conv2d(4, 6, 3, padding=1, stride=2),
    nn.Conv2d(4, 6, 3, padding=1, stride=(2, 1)),
    nn.Conv2d(3, 6, 7, padding=3, stride=2),
    nn.Conv2d(4, 6, 3, padding=(0, 2), stride=3, dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2),
    nn.Conv2d(4, 6, 1),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.Conv2d(4, 6, 1, padding=1),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv1d(4, 6, 5, padding=2, stride=2, groups=2),
    nn.Conv3d(2, 3, 3, padding=1),
    nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2),
]


def example(module: nn.Module, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    sizes = {1: (11,), 2: (9, 11), 3: (4, 5, 6)}[len(module.kernel_size)]
    return module.to(dtype), torch.randn(3, module.in_channels, *sizes, dtype=dtype) + 0.5
