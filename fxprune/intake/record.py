"""What is worth knowing about how a model came in: by which way, what stayed whole, what was frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.fx import GraphModule

from fxprune.annotations import annotate_graph, graph_annotation


@dataclass(frozen=True)
class Leaf:
    """A module that could not be traced and is called as a whole; nothing inside it is pruned.

    Attributes:
        name: of the module.
        kind: its class.
        share: of all the model's weights, those inside it.
        reason: why, in words.
    """

    name: str
    kind: str
    share: float
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}), with {self.share:.1%} of the weights, is called as a whole: {self.reason}"


@dataclass(frozen=True)
class Unread:
    """A parameter that no output depends on, such as those of heads for training: it is not in the graph.

    Attributes:
        name: in the user's model.
        kind: class of the module that holds it.
        shape: its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Intake:
    """How a model came in.

    Attributes:
        way: "torch.fx", "example values", "torch.export" or "ONNX".
        leaves: what could not be traced.
        frozen: lines of the model's code, or nodes of its file, that hold for images of the calibration set's size only.
        notes: what else there is to know, in sentences.
        unread: parameters of two or more dimensions that the graph does not hold, because nothing reads them.
        inputs: of an ONNX file, the names of its inputs, which a file exported again has as well.
        outputs: likewise.
    """

    way: str
    leaves: tuple[Leaf, ...] = field(default=())
    frozen: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    unread: tuple[Unread, ...] = field(default=())
    inputs: tuple[str, ...] = field(default=())
    outputs: tuple[str, ...] = field(default=())

    @property
    def lines(self) -> list[str]:
        """For a report: a line for everything that a user has to know."""
        frozen = [f"for images of this height and width only: {line}" for line in self.frozen]
        return [*map(str, self.leaves), *frozen, *self.notes]


def intake(graph_module: nn.Module) -> Intake | None:
    """How a graph's model came in; None for a graph that `trace` did not make."""
    return graph_annotation(graph_module).intake


def set_intake(graph_module: GraphModule, value: Intake) -> None:
    """Note down how a model came in; saved with it."""
    annotate_graph(graph_module, intake=value)
