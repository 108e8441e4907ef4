"""CheckHooks: finds the modules whose value is not what their parameters say; to be run first."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotate
from fxprune.calibration.calibration import Calibration
from fxprune.hooks import changed_by_hooks
from fxprune.passes.base import CalibratedPass


class CheckHooks(CalibratedPass):
    """Changes nothing; notes the reason on every call of a module whose value a hook changes, for the passes that follow."""

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        changed = changed_by_hooks(graph_module, calibration.first)
        for node in graph_module.graph.find_nodes(op="call_module"):
            if str(node.target) in changed:
                annotate(node, changed=changed[str(node.target)])
        return PassResult(graph_module, False)
