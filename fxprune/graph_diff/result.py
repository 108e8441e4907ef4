"""What `fxprune.diff` returns."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from fxprune.graph_diff.page import render_html
from fxprune.graph_diff.pictures import WeightPicture
from fxprune.graph_diff.text import render_text

Status = Literal["unchanged", "changed", "removed", "inserted", "replaced"]


@dataclass(frozen=True)
class NodeState:
    """A node in one of the two graphs.

    Attributes:
        node: its name in the graph.
        op: operation, such as "Conv2d".
        arguments: what it is called with beside tensors, by name.
        weight_shape: (R, C/G, *kernel), (R, C) or, transposed, (C, R/G, *kernel); () without a weight.
        weights: numbers in its weight, or in all matrices of a recurrent layer.
        dtype: number type of its weight, or "".
        output_shape: sizes of its output, None where they are not known.
        parameters: numbers in its weight and bias or other learnable tensors.
        nonzeros: how many of its weight's numbers are not zero.
        sparsity: share of zeros in its weight.
        pattern: the pattern that it was pruned to, or else the strictest N:M patterns that its weight satisfies.
        macs: for one sample; None where they are not known or there are none.
    """

    node: str
    op: str
    arguments: dict[str, str]
    weight_shape: tuple[int, ...] = ()
    weights: int = 0
    dtype: str = ""
    output_shape: tuple[int | str, ...] | None = None
    parameters: int = 0
    nonzeros: int = 0
    sparsity: float = 0.0
    pattern: str = ""
    macs: int | None = None


@dataclass(frozen=True)
class NodeDiff:
    """One operation in both graphs, or in one of them.

    Attributes:
        name: what it is called: a module's path or a node's name, in the graph after if it is there.
        status: "unchanged", "changed", "removed", "inserted" or "replaced".
        before: None for an inserted node.
        after: None for one that was removed, or replaced by several.
        changes: what changed, one short phrase each.
        into: names of the nodes that took over its work: the layer that a BatchNorm was folded into, or the nodes that
            replace it.
        folded: names of the BatchNorms folded into it.
        weight_change: ||after - before|| / ||before|| of the weight, with those BatchNorms folded into `before`; of a
            layer that two replace, with the product of their weights as `after`; None if the shapes do not compare.
        output_error: ||y_dense - y_pruned||^2 / ||y_dense - mean||^2 on calibration images, held out if there are enough.
        reason: why the layer was not pruned, as "not pruned: ...".
        notes: what the passes wrote down about it.
        picture: its weights for the HTML page.
    """

    name: str
    status: Status
    before: NodeState | None
    after: NodeState | None
    changes: tuple[str, ...] = ()
    into: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    weight_change: float | None = None
    output_error: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    picture: WeightPicture | None = field(default=None, repr=False)

    @property
    def state(self) -> NodeState:
        """After, or before for a node that is gone."""
        state = self.after or self.before
        assert state is not None
        return state

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture as plain numbers, strings, lists and dicts."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "picture"}
        states = {k: None if fields[k] is None else dataclasses.asdict(fields[k]) for k in ("before", "after")}
        return fields | states


@dataclass(frozen=True)
class Edge:
    """A value that goes from one operation to another: positions in `GraphDiff.nodes`; in which graphs it does."""

    source: int
    target: int
    before: bool
    after: bool


@dataclass(frozen=True)
class Costs:
    """What a whole graph costs.

    Attributes:
        nodes: operations, inputs and outputs.
        parameters: learnable numbers that the graph reads, each counted once.
        nonzeros: how many of them are not zero.
        macs: of convolutions and matrix products, for one sample; None where sizes are not known.
        nonzero_macs: those with a non-zero weight. No engine saves all the others: see the deployment verdicts.
    """

    nodes: int
    parameters: int
    nonzeros: int
    macs: int | None = None
    nonzero_macs: int | None = None


@dataclass(frozen=True)
class GraphDiff:
    """What changed from one graph to another; `print` it, or look at it with `to_html`.

    Attributes:
        before: what the first graph is called.
        after: what the second graph is called.
        nodes: every operation of either, in graph order.
        edges: every value that goes from one to another, in either graph.
        costs_before: of the first graph.
        costs_after: of the second.
        notes: what else the reader should know.
    """

    before: str
    after: str
    nodes: tuple[NodeDiff, ...]
    edges: tuple[Edge, ...]
    costs_before: Costs
    costs_after: Costs
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.changed

    @property
    def changed(self) -> tuple[NodeDiff, ...]:
        """The nodes that are not unchanged."""
        return tuple(node for node in self.nodes if node.status != "unchanged")

    def __getitem__(self, name: str) -> NodeDiff:
        """The node called `name`."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node named {name!r}; there are: {', '.join(node.name for node in self.nodes)}")

    def __str__(self) -> str:
        return self.render()

    def render(self, *, all: bool = False, color: bool | None = None, width: int = 100) -> str:
        """The diff as text.

        Args:
            all: list unchanged nodes too, folded BatchNorms on lines of their own, and what passes wrote down.
            color: with ANSI colours; None colours what goes to a terminal, unless NO_COLOR is set.
            width: columns at most.
        """
        return render_text(self, all=all, color=color, width=width)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures as plain numbers, strings, lists and dicts."""
        return {
            "before": self.before,
            "after": self.after,
            "is_empty": self.is_empty,
            "costs": {"before": dataclasses.asdict(self.costs_before), "after": dataclasses.asdict(self.costs_after)},
            "nodes": [node.to_dict() for node in self.nodes],
            "edges": [dataclasses.asdict(edge) for edge in self.edges],
            "notes": self.notes,
        }

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write everything but the pictures."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write one page that shows the graph and every layer; it needs no network and no other file."""
        Path(path).write_text(render_html(self), encoding="utf-8")
