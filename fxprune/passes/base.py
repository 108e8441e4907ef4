"""What a pass is: requires(input), call, lint and recompile, ensures(output); and what passes write down.

torch.fx's own `PassBase` runs `ensures` on the input graph, so this small base class stands in for it, with torch's
`PassResult`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph import call_sites, input_of, is_tied, module_of

__all__ = ["Change", "Pass", "PassResult", "call_sites", "changes", "input_of", "is_tied", "module_of"]

_CHANGES = "fxprune_changes"


@dataclass(frozen=True)
class Change:
    """One thing that a pass did, or declined to do, to one node.

    Attributes:
        pass_name: class name of the pass.
        action: "folded", "inserted", "removed", "replaced", "pruned", "reconstructed", "permuted" or "kept".
        node: name of the node that the pass looked at (it may be gone from the graph afterwards).
        target: name of the module behind the node, or "".
        into: name of the node that took over its work, or "".
        reason: why, in words; always given when the action is "kept".
    """

    pass_name: str
    action: str
    node: str
    target: str = ""
    into: str = ""
    reason: str = ""


class Pass(ABC):
    """A graph transformation. Subclasses write `call`; `requires` and `ensures` may check the graph around it."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run the pass in place: requires(input), call, lint and recompile, ensures(output)."""
        self.requires(graph_module)
        result = self.call(graph_module)
        result.graph_module.graph.lint()
        result.graph_module.recompile()
        self.ensures(result.graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Transform the graph module in place and say whether anything changed."""

    def requires(self, graph_module: GraphModule) -> None:  # noqa: B027 - no condition is the default
        """Raise GraphError if the input graph is not one that this pass can work on."""

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Raise GraphError if the output graph lacks what this pass promises."""

    def record(self, graph_module: GraphModule, action: str, node: Node, *, into: str = "", reason: str = "") -> None:
        """Write down a `Change`, once: a pass that is run twice does not repeat itself."""
        target = str(node.target) if node.op == "call_module" else ""
        change = Change(type(self).__name__, action, node.name, target, into, reason)
        recorded = graph_module.meta.setdefault(_CHANGES, [])
        if change not in recorded:
            recorded.append(change)


def changes(graph_module: nn.Module) -> tuple[Change, ...]:
    """Everything that passes wrote down about a graph module, in order."""
    return tuple(getattr(graph_module, "meta", {}).get(_CHANGES, ()))
