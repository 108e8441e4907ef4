"""Channels: "channels:0.6". Fewer input channels, jointly for all layers that read them; leaves the columns of the others free.

Which channels go is decided over the whole graph before any layer is solved, since layers that share channels cannot decide one
after another (`fxprune/passes/remove_channels.py:RemoveChannels`). What is left for a layer to solve is a smaller layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry
from fxprune.layers.constraint import Constraint, Part, Rest, register
from fxprune.options import Method


@register
@dataclass(frozen=True)
class Channels(Constraint):
    """Input channels go, and with them rows of the layers that write them.

    Attributes:
        share: at most that share of the MACs stays, or with `speedup` 0.
        speedup: the network gets that many times faster in onnxruntime, measured, or with `share` 0.
    """

    share: float = 0.0
    speedup: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Channels | None:
        """Read "channels:0.6" (60% of the MACs stay) or "channels:speedup=1.5"."""
        match = re.fullmatch(r"channels:(speedup=)?(.+)", text)
        if match is None:
            return None
        try:
            value = float(match[2])
        except ValueError:
            value = 0.0
        if match[1] and 1 < value < 1000:
            return cls(speedup=value)
        if not match[1] and 0 < value < 1:
            return cls(share=value)
        raise PatternError(
            f"cannot read {text!r}; write 'channels:0.6' (at most 60% of the MACs stay), a share between 0 and 1, or "
            "'channels:speedup=1.5', a factor above 1"
        )

    def __str__(self) -> str:
        return f"channels:speedup={self.speedup:g}" if self.speedup else f"channels:{self.share:g}"

    @property
    def is_of_graph(self) -> bool:  # noqa: D102 - documented on Constraint
        return True

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102
        return None

    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        """Nothing: the layer that is solved has only the channels that stay.

        Raises:
            PatternError: it was asked of one layer alone.
        """
        raise PatternError(
            f"{self} is decided over the whole network, since layers share channels: it has no price for one layer alone; "
            "use fxprune.compile"
        )
