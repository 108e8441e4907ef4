"""What an observer gathers over the calibration set: moments in float64, about an offset, and their centred forms.

Products of one batch are taken in float32 (or whatever the activations are) of values less an offset (`offset`), and added
up in float64, so that many batches neither overflow nor drift and a large mean does not drown the deviation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.geometry import LayerGeometry
from fxprune.runtime.processes import gathered, summed, world
from fxprune.statistics.offset import InsideMoments, Offset, inside_moments, inside_of, spread
from fxprune.statistics.patches import image_sum
from fxprune.statistics.pool import Pool
from fxprune.statistics.products import GramAccumulator, cross_product

ROUNDING = 1e-6  # Relative to the second moment about the offset, whose batches are summed in float32.
CONSTANT_STEPS = 8  # A value that the model computes as a constant varies by a few steps of its dtype.


@dataclass(frozen=True)
class InputStatistics:
    """Second and first moments of a layer's patches X (D x P), for each group, held about an offset where there is one.

    Attributes:
        products: (G, D, D) float64, X' X'^T; X' is X less the offset inside the image.
        sums: (G, D) float64, X' 1.
        count: P, patches seen.
        inside: the moments that lead from X' to X; None: X' is X.
        eps: of the activations' dtype.
        factors: what has been computed from them for one layer, for the next one that reads them.
    """

    products: Tensor
    sums: Tensor
    count: int
    inside: InsideMoments | None = None
    eps: float = torch.finfo(torch.float32).eps
    factors: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def hessian(self, *, centred: bool) -> Tensor:
        """X X^T / P, (G, D, D) float64; with `centred` the mean patch is removed first."""
        second = self.products / self.count
        if centred:
            mean = self.sums / self.count
            second.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        if self.inside is not None:
            offset, (products, both) = self.inside.offset, self._with_inside(centred=centred)
            mixed = spread(products, offset)
            mixed += mixed.mT.clone()
            second += mixed
            second += spread(spread(both.expand(len(offset), -1, -1), offset).mT, offset)
        if not centred:
            return second
        constant = self.constant
        return second.masked_fill_(constant[:, :, None] | constant[:, None, :], 0)

    def _with_inside(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """X' M^T / P, (G, D, K), and M M^T / P, (K, K); with `centred` the means of both factors are removed."""
        assert self.inside is not None
        products, both = self.inside.products / self.count, self.inside.both / self.count
        if centred:
            mean, share = self.sums / self.count, self.inside.inside / self.count
            products, both = products - mean[:, :, None] * share, both - share[:, None] * share
        return products, both

    def about(self, offset: Tensor | None) -> InputStatistics:
        """The same moments about another offset, (G, C/G) float64; None: about zero.

        X = X' + M o = X'' + M o'', so X'' = X' + M d with d = o - o'': as in `hessian`.
        """
        if self.inside is None:
            assert offset is None, "moments of X alone do not say how X lies to the inside of the image"
            return self
        seen, d = self.inside, self.inside.offset if offset is None else self.inside.offset - offset
        mixed = spread(seen.products, d)
        of_inside = spread(seen.both.expand(len(d), -1, -1), d).mT
        products = self.products + mixed + mixed.mT + spread(of_inside, d)
        sums = self.sums + spread(seen.inside.expand(len(d), -1), d)
        inside = None if offset is None else InsideMoments(offset, seen.products + of_inside, seen.inside, seen.both)
        return replace(self, products=products, sums=sums, inside=inside, factors={})

    def hessian_without(self, part: InputStatistics, *, centred: bool) -> Tensor:
        """`hessian` of the patches that are not in a part of what was seen."""
        apart = self.mean - part.mean if centred else None
        whole, of_part = self.hessian(centred=centred), part.hessian(centred=centred)
        return moments_without(whole, of_part, self.count, part.count, apart, apart)

    @property
    def variance(self) -> Tensor:
        """Of each input, (G, D) float64: the diagonal of the centred Hessian before constants are taken out."""
        variance = self.products.diagonal(dim1=1, dim2=2) / self.count - (self.sums / self.count) ** 2
        if self.inside is not None:
            offset, (products, both) = self.inside.offset, self._with_inside(centred=True)
            own = products.unflatten(1, (len(both), -1)).diagonal(dim1=1, dim2=3).mT  # (G, K, C/G)
            own = 2 * own * offset[:, None] + both.diagonal()[:, None] * offset[:, None] ** 2
            variance = variance + own.flatten(1)
        return variance

    @property
    def constant(self) -> Tensor:
        """Whether an input hardly varies, (G, D): what rounding leaves of its variance must not look like a signal."""
        second = self.products.diagonal(dim1=1, dim2=2) / self.count
        return self.variance <= ROUNDING * second + (CONSTANT_STEPS * self.eps * self.mean) ** 2

    @property
    def dead(self) -> Tensor:
        """Whether an input was zero in every patch, (G, D)."""
        return (self.products.diagonal(dim1=1, dim2=2) == 0) & (self.mean == 0)

    @property
    def gram(self) -> Tensor:
        """X X^T, (G, D, D) float64."""
        return self.hessian(centred=False) * self.count

    @property
    def total(self) -> Tensor:
        """X 1, (G, D) float64."""
        return self.mean * self.count

    @property
    def mean(self) -> Tensor:
        """Mean patch, (G, D) float64."""
        mean = self.sums / self.count
        if self.inside is None:
            return mean
        share = self.inside.inside / self.count
        return mean + spread(share.expand(len(mean), -1), self.inside.offset)


def moments_without(
    whole: Tensor, part: Tensor, count: int, of_part: int, apart_y: Tensor | None, apart_x: Tensor | None
) -> Tensor:
    """Mean products y x^T of the patches that are not in a part of them, by Chan, Golub & LeVeque 1983.

    Args:
        whole: of all patches, (G, R, D).
        part: of the part.
        count: all patches.
        of_part: those of the part.
        apart_y: by how much the mean of y over all is above that over the part, (G, R); None where no mean was removed.
        apart_x: the same for x, (G, D).
    """
    left = count - of_part
    found = (whole * (count / left)).sub_(part, alpha=of_part / left)
    if apart_y is None or apart_x is None:
        return found
    return found.baddbmm_(apart_y[:, :, None], apart_x[:, None, :], alpha=-count * of_part / left**2)


@dataclass
class CrossStatistics:
    """Cross moment of the wanted output Y (R x P) with the patches X, for each group, about offsets where there are any.

    Attributes:
        cross: (G, R/G, D) float64, Y' X'^T; X' is X less its offset inside the image, Y' is Y less its own.
        total: (G, R/G) float64, Y' 1.
        count: P, output positions seen.
        inside: (G, R/G, K) float64, Y' M^T, where X has an offset; M says which kernel positions are inside the image.
        outputs_offset: (G, R/G) float64, what is taken from Y.
        inputs: what is taken from a batch's x; None before the first batch.
        outputs: what is taken from its y.
        inputs_total: (G, D) float64, X 1, where several processes share the work, and Y has an offset that is each one's own.
    """

    cross: Tensor
    total: Tensor
    count: int = 0
    inside: Tensor | float = 0.0
    outputs_offset: Tensor | float = 0.0
    inputs: Offset | None = None
    outputs: Offset | None = None
    inputs_total: Tensor | float = 0.0

    @classmethod
    def empty(cls, geometry: LayerGeometry, device: torch.device) -> CrossStatistics:
        """Nothing seen yet."""
        shape = (geometry.groups, geometry.rows, geometry.columns)
        cross = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(cross, torch.zeros(shape[:2], dtype=torch.float64, device=device))

    def update(self, geometry: LayerGeometry, x: Tensor, y: Tensor) -> None:
        """Add a batch: layer input x and wanted output y."""
        x, y, dim = geometry.batched(x), geometry.batched(y), geometry.channel_dim
        if not len(x):
            return
        if self.inputs is None or self.outputs is None:
            self.inputs, self.outputs = Offset.of(x, dim), Offset.of(y, dim)
            if self.outputs.values is not None:
                self.outputs_offset = self.outputs.values.double().reshape(self.total.shape)
        if self.outputs.values is not None and world().count > 1:
            self.inputs_total = self.inputs_total + geometry.patches(image_sum(x)).sum(1)
        x, y = self.inputs.removed(x, dim), self.outputs.removed(y, dim)
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        self.cross += cross_product(geometry, x, y)
        if self.inputs.values is None:
            sums = y.sum([d for d in range(y.dim()) if d != dim % y.dim()])
            self.total += sums.reshape(self.total.shape)
        else:
            of_images = geometry.output_matrix(image_sum(y))
            self.total += of_images.sum(2)
            self.inside = self.inside + of_images @ inside_of(geometry, x)
        self.count += y.numel() // geometry.out_channels

    def plus(self, change: CrossStatistics) -> CrossStatistics:
        """The moments of Y + Z, with those of Z scaled up from as many positions as were seen of it."""
        if not change.count:
            return self
        scale = self.count / change.count
        return CrossStatistics(
            self.with_inputs + scale * change.with_inputs,
            self.total + scale * change.total,
            self.count,
            outputs_offset=self.outputs_offset + change.outputs_offset,
        )

    def summed(self) -> CrossStatistics:
        """Those of all processes together."""
        if world().count == 1:
            return self
        own = self.outputs_offset if isinstance(self.outputs_offset, Tensor) else None
        counts, offsets = zip(*gathered((self.count, own)), strict=True)
        offset, cross, total = _common(counts, offsets), self.with_inputs, self.total
        moved = (0.0 if own is None else own) - (0.0 if offset is None else offset)
        if self.count and isinstance(moved, Tensor):
            assert isinstance(self.inputs_total, Tensor)
            cross = cross + moved[:, :, None] * self.inputs_total[:, None]
            total = total + self.count * moved
        cross, total = summed([cross, total])
        return CrossStatistics(cross, total, sum(counts), outputs_offset=0.0 if offset is None else offset)

    @property
    def with_inputs(self) -> Tensor:
        """Y' X^T, (G, R/G, D) float64: the offset of the inputs put back."""
        if self.inputs is None or self.inputs.values is None:
            return self.cross
        assert isinstance(self.inside, Tensor)
        return self.cross + spread(self.inside, self.inputs.values.double().reshape(len(self.cross), -1))

    @property
    def mean(self) -> Tensor:
        """Mean wanted output, (G, R/G) float64."""
        return self.total / self.count + self.outputs_offset

    def target(self, inputs: InputStatistics, bias: Tensor | None, *, centred: bool) -> Tensor:
        """Y X^T / P, (G, R/G, D) float64, with both means removed, or with only the layer's fixed bias removed."""
        fixed = self.total / self.count if centred else _zero_or(bias, self.total) - self.outputs_offset
        target = self.with_inputs / self.count - fixed[:, :, None] * inputs.mean[:, None, :]
        return target.masked_fill_(inputs.constant[:, None, :], 0) if centred else target


def _zero_or(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias.to(like).reshape(like.shape)


def _common(counts: Sequence[int], offsets: Sequence[Tensor | None]) -> Tensor | None:
    """An offset for the sums of all processes: the first one's, or zero (None) if any with images has none.

    Sums are in float64, in which the offset matters little: it is products of one batch that have to be taken about it.
    """
    of_seen = [offset for count, offset in zip(counts, offsets, strict=True) if count]
    return of_seen[0] if of_seen and all(offset is not None for offset in of_seen) else None


class HessianObserver(nn.Module):
    """Passes its input through and adds its patches to the statistics.

    Layers that read the same input in the same geometry share one observer. A graph with observers still computes what
    it did; running it on calibration batches gathers every layer's statistics on the dense model's activations.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.enabled = True
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._pool = Pool(self.add)
        self._gram = GramAccumulator(self.geometry)
        self._offset: Offset | None = None
        self._inside: InsideMoments | None = None
        self._total: Tensor | float = 0.0
        self._count = 0
        self._statistics: InputStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Observe (N, C, *spatial), or (..., C) for a Linear layer, and return it unchanged."""
        self.observe(x, self.geometry)
        return x

    def observe(self, x: Tensor, geometry: LayerGeometry) -> None:
        """Observe what the layer, in another geometry (of another padding), reads of an input."""
        if self.enabled:
            self._pool.put(geometry, self.geometry.batched(x.detach()))

    @torch.inference_mode()
    def add(self, geometry: LayerGeometry, batch: Tensor) -> None:
        """Observe a batch at once; `observe` lets small ones wait for more."""
        if not len(batch):
            return
        if self._offset is None:
            self._offset = Offset.of(batch, geometry.channel_dim)
        batch = self._offset.removed(batch, geometry.channel_dim)
        self._gram.add(batch, geometry)
        patches = geometry.patches(image_sum(batch))
        if self._offset.values is not None:
            inside = inside_moments(geometry, batch, patches, self._offset.values)
            self._inside = inside if self._inside is None else self._inside + inside
        self._total = self._total + patches.sum(1)
        self._count += patch_count(geometry, batch)
        self._statistics = None

    @contextmanager
    def paused(self) -> Iterator[bool]:
        """To observe nothing inside; gives whether somebody else is to `add` what would have been seen, being the first."""
        enabled, self.enabled = self.enabled, False
        try:
            yield enabled and not self._count and not len(self._pool)
        finally:
            self.enabled = enabled

    def has_seen(self) -> bool:
        """Whether any process has observed anything: each has to ask."""
        self._pool.flush()
        return any(gathered(self._count))

    def statistics(self) -> InputStatistics:
        """The moments of everything observed so far, of several processes by all of them together: each has to ask."""
        self._pool.flush()
        if self._statistics is None:
            self._statistics = self._own() if world().count == 1 else self._summed()
        return self._statistics

    def _own(self) -> InputStatistics:
        gram, total = self._gram.total(), torch.as_tensor(self._total)
        assert self._offset is not None
        return InputStatistics(gram, total, self._count, self._inside, self._offset.eps)

    def _summed(self) -> InputStatistics:
        """Of all processes, of which some may have seen nothing."""
        own = self._own() if self._count else None
        offset = None if own is None or own.inside is None else own.inside.offset
        seen = gathered((self._count, offset, None if own is None else (own.eps, own.products.device.type)))
        counts, offsets, kinds = zip(*seen, strict=True)
        known = next(filter(None, kinds), None)
        if known is None:
            return self._own()  # An error.
        common = _common(counts, offsets)
        own = self._nothing(known[1], common) if own is None else own.about(common)
        tensors = [own.products, own.sums]
        if own.inside is not None:
            tensors += [own.inside.products, own.inside.inside, own.inside.both]
        products, sums, *of_inside = summed(tensors)
        inside = InsideMoments(own.inside.offset, *of_inside) if own.inside is not None else None
        return InputStatistics(products, sums, sum(counts), inside, max(kind[0] for kind in kinds if kind))

    def _nothing(self, device: str, offset: Tensor | None) -> InputStatistics:
        """The moments of no patches."""
        groups, columns, positions = self.geometry.matrices, self.geometry.columns, math.prod(self.geometry.kernel_size)
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        inside = None
        if offset is not None:
            of_inside = zeros(groups, columns, positions), zeros(positions), zeros(positions, positions)
            inside = InsideMoments(offset, *of_inside)
        return InputStatistics(zeros(groups, columns, columns), zeros(groups, columns), 0, inside)

    def extra_repr(self) -> str:
        """Shown in the graph module's repr."""
        return f"columns={self.geometry.columns}, groups={self.geometry.groups}"


def patch_count(geometry: LayerGeometry, x: Tensor) -> int:
    """P, patches in a batch: images times output positions, or vectors for Linear."""
    if not geometry.kernel_size:
        return x.numel() // geometry.in_channels
    return x.shape[0] * math.prod(geometry.output_shape(x.shape[2:]))
