"""What a pass is: requires(input), call, lint and recompile, ensures(output).

torch.fx's own `PassBase` runs `ensures` on the input graph, so this small base class stands in for it, with torch's
`PassResult`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import Change, annotate_graph, changes
from fxprune.calibration.calibration import Calibration
from fxprune.errors import GraphError

__all__ = ["CalibratedPass", "Change", "Pass", "PassResult", "changes"]


class Pass(ABC):
    """A graph transformation. Subclasses write `call`; `requires` and `ensures` may check the graph around it."""

    def __call__(self, graph_module: GraphModule, calibration: Calibration | None = None) -> PassResult:
        """Run the pass in place: requires(input), call, lint and recompile, ensures(output).

        Args:
            graph_module: changed in place.
            calibration: the images, for passes that look at them.
        """
        self.requires(graph_module)
        result = self._run(graph_module, calibration)
        result.graph_module.graph.lint()
        result.graph_module.recompile()
        self.ensures(result.graph_module)
        return result

    def _run(self, graph_module: GraphModule, calibration: Calibration | None) -> PassResult:
        return self.call(graph_module)

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
        recorded = changes(graph_module)
        if change not in recorded:
            annotate_graph(graph_module, changes=(*recorded, change))


class CalibratedPass(Pass):
    """A pass that looks at the calibration images. Subclasses write `calibrate` in place of `call`."""

    def _run(self, graph_module: GraphModule, calibration: Calibration | None) -> PassResult:
        if calibration is None:
            raise GraphError(f"{type(self).__name__} looks at images: call it with a Calibration(batches)")
        return self.calibrate(graph_module, calibration)

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - `calibrate` stands in for it
        raise GraphError(f"{type(self).__name__} looks at images: call it with a Calibration(batches)")

    @abstractmethod
    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:
        """Transform the graph module in place by what the images show, and say whether anything changed."""
