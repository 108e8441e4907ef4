"""The usual way to a convolution's Hessian: all patches as one matrix, times itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.geometry import LayerGeometry


def unfold_gram(geometry: LayerGeometry, x: Tensor) -> Tensor:
    """X X^T of a batch as OBC, GPTQ and their descendants do it: unfold, bring the channels to the front, one product.

    (They also scale the patch matrix by the number of samples, one more copy, which is left out here.)

    Returns:
        (D, D) float32, the columns ordered (channels, kernel positions).
    """
    patches = _unfold(geometry, x)
    matrix = patches.permute(1, 0, 2).flatten(1)  # (D, N L): a copy of the patch matrix.
    del patches
    return matrix @ matrix.mT


def unfold_gram_lean(geometry: LayerGeometry, x: Tensor) -> Tensor:
    """The same without the copy: the images' products are added up as they stand."""
    patches = _unfold(geometry, x)
    columns = patches.shape[1]
    return x.new_zeros(columns, columns).addbmm_(patches, patches.mT)


def channels_innermost(geometry: LayerGeometry, gram: Tensor) -> Tensor:
    """The Hessian with the columns in fxprune's order, (kernel positions, channels)."""
    order = torch.arange(geometry.columns, device=gram.device).reshape(geometry.in_channels, -1).mT.flatten()
    return gram[order][:, order]


def _unfold(geometry: LayerGeometry, x: Tensor) -> Tensor:
    """(N, D, L); fit for symmetric zero padding and one group."""
    padding = tuple(before for before, _ in geometry.padding)
    return F.unfold(x, geometry.kernel_size, geometry.dilation, padding, geometry.stride)
