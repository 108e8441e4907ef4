"""Where the weights of a traced graph come from: which parameters of the user's model each of them was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule

from fxprune.annotations import annotate_graph, graph_annotation


@dataclass(frozen=True)
class Origin:
    """What one parameter of a graph was in the model that the user handed over.

    Attributes:
        names: parameters and buffers of the user's model.
        how: "same" values under another name; "transposed"; "rows", some rows of one parameter; or "computed".
        rows: first row and the row after the last, for "rows".
    """

    names: tuple[str, ...]
    how: Literal["same", "transposed", "rows", "computed"] = "same"
    rows: tuple[int, int] = (0, 0)


def origins(graph_module: GraphModule) -> dict[str, Origin]:
    """The origin of every parameter whose name or value is not what it was; all others are what they were."""
    return dict(graph_annotation(graph_module).origins)


def set_origins(graph_module: GraphModule, found: dict[str, Origin]) -> None:
    """Note down where parameters come from, for state dicts; saved with the model."""
    annotate_graph(graph_module, origins=found)
