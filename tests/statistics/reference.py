"""A naive float64 im2col written with Python loops, and layers of every geometry to compare it on."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor, nn


def naive_patches(module: nn.Module, x: Tensor) -> Tensor:
    """(G, P, D) by loops over images, output positions and kernel offsets, from torch's own padding."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, module.in_features)
    if module.transposed:
        return _naive_transposed_patches(module, x)
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


def _naive_transposed_patches(module: nn.Module, x: Tensor) -> Tensor:
    """The same of a transposed convolution: an input adds to the outputs at stride * position + dilation * offset."""
    channels = module.in_channels // module.groups
    outputs = copy.deepcopy(module).to(x.dtype)(x).shape[2:]
    kernel = module.kernel_size
    found = x.new_zeros(module.groups, len(x), *outputs, *kernel, channels)
    for position in itertools.product(*map(range, x.shape[2:])):
        for offset in itertools.product(*map(range, kernel)):
            at = [
                s * p + d * o - less
                for p, o, s, d, less in zip(
                    position, offset, module.stride, module.dilation, module.padding, strict=True
                )
            ]
            if all(0 <= a < n for a, n in zip(at, outputs, strict=True)):
                reverse = [k - 1 - o for k, o in zip(kernel, offset, strict=True)]
                values = x[(slice(None), slice(None), *position)].unflatten(1, (module.groups, -1))
                found[(slice(None), slice(None), *at, *reverse)] = values.transpose(0, 1)
    return found.reshape(module.groups, -1, channels * math.prod(kernel))


TRANSPOSED = [
    nn.ConvTranspose2d(4, 6, 2, stride=2),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, padding=2),
    nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), padding=(0, 1), output_padding=(2, 0)),
    nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, padding=3, output_padding=1),
    nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
    nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=4),
    nn.ConvTranspose2d(4, 6, 1),
    nn.ConvTranspose2d(4, 6, 1, stride=2, output_padding=1),
    nn.ConvTranspose1d(4, 6, 5, stride=2, padding=2),
    nn.ConvTranspose1d(4, 6, 8, stride=4, groups=2),
    nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 2)),
]

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
    *TRANSPOSED,
]


def example(module: nn.Module, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    sizes = {1: (11,), 2: (9, 11), 3: (4, 5, 6)}[len(module.kernel_size)]
    return module.to(dtype), torch.randn(3, module.in_channels, *sizes, dtype=dtype) + 0.5
