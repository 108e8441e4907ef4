"""Which channels of a network may change places: analysis of the graph, and the change itself."""

from __future__ import annotations

from fxprune.channels.apply import permute_channels
from fxprune.channels.layout import Channels, Layout, new_places
from fxprune.channels.walk import analyse_channels
from fxprune.graph import value_shapes

__all__ = ["Channels", "Layout", "analyse_channels", "new_places", "permute_channels", "value_shapes"]
