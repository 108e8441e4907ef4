"""What a file of ours says about itself: who made it, with what, each layer's sparsity, and where its channels went.

    fxprune.version, fxprune.pattern, fxprune.method
    fxprune.layers    {"conv2": {"pattern": "2:4", "status": "pruned", "sparsity": 0.5}, ...}
    fxprune.channels  {"orders": [[2, 0, 1, 3], ...], "layers": {"conv2": [0, null], ...}}

A layer's entry in fxprune.channels says which order its input and its output channels were put in, by number, null for
those that stayed; layers of one residual stream share an order. Reading never raises: a file can say anything.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxprune.channels.apply import channel_order
from fxprune.report import PruneReport

VERSION, PATTERN, METHOD = "fxprune.version", "fxprune.pattern", "fxprune.method"
LAYERS, CHANNELS = "fxprune.layers", "fxprune.channels"


@dataclass(frozen=True)
class ChannelOrder:
    """Where a layer's channels come from: the channel at place i was at place `inputs[i]` in the dense model.

    Attributes:
        inputs: order of the input channels, None if they stayed.
        outputs: order of the output channels, None if they stayed.
    """

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


def file_metadata(model: nn.Module, report: PruneReport | None) -> dict[str, str]:
    """The entries for a model that `compile` returned, or for any other module.

    Args:
        model: what is exported.
        report: what was done to it, if anything.
    """
    metadata = {VERSION: str(getattr(importlib.import_module("fxprune"), "__version__", "unknown"))}
    if report is not None:
        layers = {
            layer.name: {"pattern": layer.pattern, "status": layer.status, "sparsity": round(layer.sparsity, 6)}
            for layer in report.layers
        }
        metadata |= {PATTERN: report.pattern, METHOD: report.method, LAYERS: json.dumps(layers)}
    orders: list[list[int]] = []
    places: dict[str, list[int | None]] = {}
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        found: list[int | None] = []
        for places_of in channel_order(node):
            order = None if places_of is None else [int(i) for i in places_of]
            if order is not None and order not in orders:
                orders.append(order)
            found.append(None if order is None else orders.index(order))
        if found != [None, None] and node.op == "call_module":
            places[str(node.target)] = found
    if places:
        metadata[CHANNELS] = json.dumps({"orders": orders, "layers": places}, separators=(",", ":"))
    return metadata


def layer_patterns(metadata: Mapping[str, str]) -> dict[str, str]:
    """Layer -> pattern that it was pruned to, "" for those that were not; {} where the file does not say."""
    layers = _object(metadata.get(LAYERS, ""))
    return {name: str(about.get("pattern", "")) for name, about in layers.items() if isinstance(about, dict)}


def channel_orders(metadata: Mapping[str, str]) -> dict[str, ChannelOrder]:
    """Layer -> order of its channels, for layers whose channels were permuted; {} where the file does not say."""
    found = _object(metadata.get(CHANNELS, ""))
    orders, layers = found.get("orders"), found.get("layers")
    if not isinstance(orders, list) or not isinstance(layers, dict):
        return {}
    permutations = [_permutation(order) for order in orders]

    def order(index: Any) -> tuple[int, ...] | None:
        known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(permutations)
        return permutations[index] if known else None

    pairs = {name: pair for name, pair in layers.items() if isinstance(pair, list) and len(pair) == 2}
    read = {name: ChannelOrder(order(inputs), order(outputs)) for name, (inputs, outputs) in pairs.items()}
    return {name: value for name, value in read.items() if value != ChannelOrder()}


def _permutation(order: Any) -> tuple[int, ...] | None:
    """The order as a tuple; None if it is no permutation."""
    whole = isinstance(order, list) and all(type(i) is int for i in order)
    return tuple(order) if whole and sorted(order) == list(range(len(order))) else None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
