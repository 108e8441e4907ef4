"""The widths of a network: sets of channels that are alike, of which some can go, and what layers cost by their widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.macs import macs_per_sample
from fxprune.calibration.shapes import Example
from fxprune.channels.layout import Channels, Classes
from fxprune.geometry import LayerGeometry, is_matrix_layer
from fxprune.graph import input_of, module_of

Numbers: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = (
    Mapping[int, Any] | Sequence[Any]
)  # Units that are left, by number of a width; arrays for several at once.


@dataclass(frozen=True)
class Width:
    """Units of channels that are alike: any of them can go, everywhere at once.

    Attributes:
        name: of the layer that writes them first.
        units: by number in `Channels.units`.
        size: channels of one unit in that layer's output.
        readers: calls of the layers that sum over them.
        writers: calls of the layers that write them.
    """

    name: str
    units: tuple[int, ...]
    size: int
    readers: tuple[Node, ...]
    writers: tuple[Node, ...]

    def choices(self, multiple: int) -> tuple[int, ...]:
        """How many units may be left: all, or such that their channels are a multiple; most first."""
        step = multiple // math.gcd(multiple, self.size)
        count = len(self.units)
        return (count, *(n for n in range(count - 1, 0, -1) if n % step == 0))


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer by its channels: by those of its input with all of its output, and the other way round.

    Kernels work in blocks of channels, so that time goes down in steps. Between the measured numbers it is interpolated.

    Attributes:
        whole: with all channels.
        read: numbers of input channels, ascending, and the time of each; none: the input makes no difference.
        given: of output channels.
    """

    whole: float
    read: tuple[tuple[int, float], ...]
    given: tuple[tuple[int, float], ...]

    def at(self, read: Any, given: Any) -> Any:
        """Microseconds; what one side saves is taken to be the same share whatever the other has."""
        return _interpolated(read, self.read, self.whole) * _interpolated(given, self.given, self.whole) / self.whole


@dataclass(frozen=True)
class LayerSize:
    """What one call costs for one sample: MACs, `per_pair` for each pair of an input and an output channel, or measured time.

    Attributes:
        name: of the layer.
        per_pair: MACs.
        inputs: by number of a width, the input channels that one unit of it is; a convolution in groups has none.
        outputs: the same of the output.
        fixed_inputs: the other input channels, of one group.
        fixed_outputs: the other output channels.
        times: measured; None: MACs are what it costs.
    """

    name: str
    per_pair: float
    inputs: Mapping[int, int]
    outputs: Mapping[int, int]
    fixed_inputs: int
    fixed_outputs: int
    times: Times | None = None

    def channels(self, counts: Counts) -> tuple[Any, Any]:
        """Input channels of one group, and output channels, with so many units left of each width; counts may be arrays."""
        read = self.fixed_inputs + sum(size * counts[w] for w, size in self.inputs.items())
        given = self.fixed_outputs + sum(size * counts[w] for w, size in self.outputs.items())
        return read, given

    def macs(self, counts: Counts) -> Any:
        """With so many units left of each width."""
        read, given = self.channels(counts)
        return self.per_pair * read * given

    def cost(self, counts: Counts) -> Any:
        """Microseconds where times were measured, else MACs."""
        return self.macs(counts) if self.times is None else self.times.at(*self.channels(counts))


def _interpolated(counts: Any, times: tuple[tuple[int, float], ...], whole: float) -> Any:
    if not times:
        return whole
    at, taken = zip(*times, strict=True)
    return np.interp(counts, at, taken)


def find_widths(channels: Channels, allowed: Callable[[Node], str]) -> tuple[list[Width], dict[Node, str]]:
    """The widths of a graph.

    Args:
        channels: analysis of the graph.
        allowed: why a layer's input channels must stay, or "".

    Returns:
        The widths in the order of the layers that write them; and for each layer that sums over channels and none of whose
        channels can go, why not.
    """
    unit_of = np.full(channels.count, -1)
    for number, classes in enumerate(channels.units):
        unit_of[classes] = number
    readers: dict[int, list[Node]] = {}
    writers: dict[int, list[Node]] = {}
    reasons: dict[Node, str] = {}
    refused: dict[int, str] = {}
    for node in channels.layouts:
        module = module_of(node)
        if not is_matrix_layer(module):
            continue
        source, geometry = input_of(node), LayerGeometry.of(module)
        if geometry.groups == 1 and source in channels.layouts:
            units = _distinct(unit_of[channels.layouts[source].classes])
            reason = allowed(node) or channels.why_needed(source)
            if reason:
                reasons[node] = reason
            for unit in units:
                readers.setdefault(unit, []).append(node)
                if reason:
                    refused.setdefault(unit, f"{node.target!r} reads them as well: {reason}")
        for unit in _distinct(unit_of[channels.layouts[node].classes]):
            writers.setdefault(unit, []).append(node)
    widths = []
    for alike in channels.alike:
        first = alike[0]
        written = writers.get(first, [])
        why = refused.get(first) or ("" if len(alike) > 1 and written else "no two of them are alike")
        if why:
            for node in readers.get(first, []):
                reasons.setdefault(node, why)
            continue
        classes = channels.layouts[written[0]].classes
        size = int(np.isin(classes, channels.units[first]).sum())
        widths.append(Width(str(written[0].target), alike, size, tuple(readers.get(first, ())), tuple(written)))
    for width in widths:
        for node in width.readers:
            reasons.pop(node, None)
    position = {node: i for i, node in enumerate(channels.layouts)}
    return sorted(widths, key=lambda width: position[width.writers[0]]), reasons


def layer_sizes(channels: Channels, widths: Sequence[Width], example: Example) -> dict[Node, LayerSize]:
    """What each call of a Conv or Linear module costs by the widths."""
    width_of = np.full(channels.count, -1)
    for number, width in enumerate(widths):
        for unit in width.units:
            width_of[channels.units[unit]] = number
    found = {}
    for node, macs in macs_per_sample(example).items():
        module = module_of(node)
        groups, weight = int(getattr(module, "groups", 1)), getattr(module, "weight", None)
        source = channels.layouts.get(input_of(node))
        inputs, fixed_inputs = _by_width(None if source is None else source.classes, width_of, widths)
        layout = channels.layouts.get(node)
        outputs, fixed_outputs = _by_width(None if layout is None else layout.classes, width_of, widths)
        if groups > 1 or source is None:
            inputs, fixed_inputs = {}, 1  # Whole groups go, with their outputs.
        if layout is None:
            outputs, fixed_outputs = {}, 1
        assert isinstance(weight, Tensor)
        pairs = (fixed_inputs + sum(n * len(widths[w].units) for w, n in inputs.items())) * (
            fixed_outputs + sum(n * len(widths[w].units) for w, n in outputs.items())
        )
        found[node] = LayerSize(str(node.target), macs / pairs, inputs, outputs, fixed_inputs, fixed_outputs)
    return found


def columns_of(channels: Channels, width: Width, reader: Node) -> Tensor:
    """The columns (n, k) of a layer's matrix that belong to each of a width's n units."""
    classes = channels.layouts[input_of(reader)].classes
    module = module_of(reader)
    assert module is not None
    positions = math.prod(LayerGeometry.of(module).kernel_size)
    places = np.stack([np.flatnonzero(np.isin(classes, channels.units[unit])) for unit in width.units])
    return torch.from_numpy((places[:, None] + np.arange(positions)[:, None] * len(classes)).reshape(len(places), -1))


def rows_of(channels: Channels, width: Width, writer: Node) -> Tensor:
    """The output channels (n, k) of a layer that belong to each of a width's n units."""
    classes = channels.layouts[writer].classes
    return torch.from_numpy(np.stack([np.flatnonzero(np.isin(classes, channels.units[u])) for u in width.units]))


def _by_width(classes: Classes | None, width_of: Classes, widths: Sequence[Width]) -> tuple[dict[int, int], int]:
    """By number of a width the channels of one unit of it, and how many channels belong to none."""
    if classes is None:
        return {}, 0
    numbers, counts = np.unique(width_of[classes], return_counts=True)
    held = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    fixed = held.pop(-1, 0)
    return {w: count // len(widths[w].units) for w, count in held.items()}, fixed


def _distinct(units: Classes) -> list[int]:
    return [unit for unit in np.unique(units).tolist() if unit >= 0]
