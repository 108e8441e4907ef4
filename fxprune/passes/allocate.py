"""Allocate: where layers share a budget, says what each of them gets."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotate, annotation
from fxprune.calibration.calibration import Calibration
from fxprune.constraints import Chain, Constraint, keep_possible
from fxprune.layers.shared import Calls, role_without_chain, weight_calls
from fxprune.options import Method
from fxprune.passes.base import CalibratedPass


class Allocate(CalibratedPass):
    """Replaces a constraint that layers share ("mixed:0.6") by one for each layer ("1:4"); to be run after InsertObservers.

    Layers with equal shared constraints share one budget. A layer of which the budget asks nothing stays dense.

    Args:
        method: solver and options.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        modified, calls = False, weight_calls(graph_module)
        while (found := _first_shared(graph_module, self.method)) is not None:
            shared, layers = found
            given = shared.allocate(graph_module, layers, calibration, self.method)
            for node in layers:
                self._give(graph_module, node, shared, given[node], calls)
            modified = True
        return PassResult(graph_module, modified)

    def _give(
        self, graph_module: GraphModule, node: Node, shared: Constraint, own: Constraint | str, calls: Calls
    ) -> None:
        chain: Chain = annotation(node).chain
        if not isinstance(own, str):
            annotate(node, chain=tuple(own if constraint == shared else constraint for constraint in chain))
            return
        geometry = annotation(node).geometry
        assert geometry is not None
        # What follows a rank was to be kept by two factors; the layer itself may not be able to.
        others, declined = keep_possible([constraint for constraint in chain if constraint != shared], geometry)
        reason = f"{own}; {declined}" if declined else own
        if others:
            annotate(node, chain=others)
        else:
            role = role_without_chain(calls, node, geometry, reconstruct=bool(self.method.options.reconstruct))
            annotate(node, chain=(), role=role, reason=reason)
        self.record(graph_module, "kept", node, reason=reason)


def _first_shared(graph_module: GraphModule, method: Method) -> tuple[Constraint, list[Node]] | None:
    """A constraint whose layers share a budget that is still to be spent, and these layers."""
    chains = {node: annotation(node).chain for node in graph_module.graph.nodes if annotation(node).role == "compress"}
    for chain in chains.values():
        for constraint in chain:
            if constraint.is_shared(method):
                return constraint, [node for node, of in chains.items() if constraint in of]
    return None
