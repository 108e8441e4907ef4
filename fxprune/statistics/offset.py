"""What is taken from every channel before products are summed, and what that leaves to be put right in float64.

Raw moments of a channel whose mean is a thousand times its deviation agree in their first six digits, and float32 has seven:
the covariance that is left of them is noise. So products are summed of x' = x - o, with o a value in each channel's middle.
A padded zero stays zero, which x' is not, so the patches of x are

    X = X' + M o        with M (K x P) = 1 where a kernel position lies inside the image, else 0.

Every moment of X then follows from those of X' and M, and all sums with M are small: X' M^T is linear in x', so images are
added up before it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry

SAMPLED = 64  # Positions of the first batch; their median lies within a fifth of a deviation of the mean.
FAR = 8.0  # Interquartile ranges, about 11 deviations, and a hundredth of float32's digits: to here nothing is taken away.
LARGEST, SMALLEST = 2.0**48, 2.0**-48  # Of values whose squares a hundred million times over are in float32's range.


@dataclass(frozen=True)
class Offset:
    """What is taken from the channels of a tensor, the same for all batches.

    Attributes:
        values: (C,) in the dtype of products, or None: the means are no larger than the deviations allow.
        dtype: in which products are taken: float64 for float64 values and for those whose squares float32 cannot hold.
        eps: of the tensor's own dtype.
    """

    values: Tensor | None
    dtype: torch.dtype
    eps: float

    @classmethod
    def of(cls, x: Tensor, channel_dim: int) -> Offset:
        """Measured on a first batch of at least one entry.

        Medians and quartiles of some positions: neither zeros beside the image nor outliers move them, and the median of a
        channel that is constant is that constant exactly.
        """
        values = x.detach().movedim(channel_dim, -1)
        count = values[..., 0].numel()
        stride = 1 if count <= SAMPLED else count * 618_034 // 1_000_000  # The golden section: in step with nothing.
        # NumPy's: torch.unravel_index imports sympy, which takes longer than compiling a small network.
        places = np.unravel_index([i * stride % count for i in range(min(count, SAMPLED))], values.shape[:-1])
        some = values[tuple(torch.as_tensor(place, device=x.device) for place in places)]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        ordered = _sorted(some.to(dtype))
        lower, median, upper = (ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3))
        far = (median.abs() > FAR * (upper - lower)).any()
        peak = (ordered - median if far else ordered).abs().amax()
        if (peak > LARGEST) | ((peak > 0) & (peak < SMALLEST)):
            dtype = torch.float64
        return cls(median.to(dtype) if far else None, dtype, torch.finfo(x.dtype).eps)

    def removed(self, x: Tensor, channel_dim: int) -> Tensor:
        """X less the offset, in the dtype of products; x itself where there is nothing to do."""
        x = x.to(self.dtype)
        if self.values is None:
            return x
        return x - self.values.reshape(-1, *[1] * (x.dim() - 1 - channel_dim % x.dim()))


def _sorted(x: Tensor) -> Tensor:
    """Along the first dimension; of so few, NumPy sorts many columns several times as fast as torch."""
    return torch.from_numpy(np.sort(x.numpy(), axis=0)) if x.device.type == "cpu" else x.sort(0).values


@dataclass(frozen=True)
class InsideMoments:
    """The moments with M that turn those of X' into those of X, summed over patches, all float64.

    Attributes:
        offset: (G, C/G) o.
        products: (G, D, K) X' M^T.
        inside: (K,) M 1.
        both: (K, K) M M^T.
    """

    offset: Tensor
    products: Tensor
    inside: Tensor
    both: Tensor

    def __add__(self, other: InsideMoments) -> InsideMoments:
        return InsideMoments(
            self.offset, self.products + other.products, self.inside + other.inside, self.both + other.both
        )


def inside_moments(geometry: LayerGeometry, x: Tensor, patches: Tensor, offset: Tensor) -> InsideMoments:
    """Those of a batch.

    Args:
        geometry: of the layer.
        x: the batch, for its shape.
        patches: (G, P, D) float64, of the sum over all images, less the offset.
        offset: (C,).
    """
    inside = inside_of(geometry, x)
    return InsideMoments(
        offset.double().reshape(geometry.matrices, -1),
        patches.mT @ inside,
        len(x) * inside.sum(0),
        len(x) * inside.mT @ inside,
    )


def inside_of(geometry: LayerGeometry, x: Tensor) -> Tensor:
    """M^T of one image of a batch (N, C, *spatial) or (..., C), (P, K) float64; the padding of other modes holds values too."""
    shape = tuple(x.shape[2:]) if geometry.kernel_size else tuple(x.shape[1:-1])
    return _inside(replace(geometry, in_channels=1, out_channels=1, groups=1, blocks=1), shape).to(x.device)


@lru_cache(maxsize=64)
def _inside(geometry: LayerGeometry, shape: tuple[int, ...]) -> Tensor:
    ones = torch.ones(1, 1, *shape, dtype=torch.float64)
    return geometry.patches(ones if geometry.kernel_size else ones.movedim(1, -1))[0]


def spread(moments: Tensor, offset: Tensor) -> Tensor:
    """Sums with M, (G, ..., K), as sums with M o, (G, ..., D): each kernel position times every channel's offset (G, C/G)."""
    offset = offset.reshape(len(offset), *[1] * (moments.dim() - 1), -1)
    return (moments[..., None] * offset).flatten(-2)
