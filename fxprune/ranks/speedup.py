"""Ranks for a wanted speed-up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from fxprune import speedup
from fxprune.annotations import annotation
from fxprune.calibration.observers import remove_observers
from fxprune.errors import OptionsError
from fxprune.layers.problem import layer_of
from fxprune.layers.splits import split_call, two_layers
from fxprune.ranks.plan import RankPlan, Survey, within_budget
from fxprune.speedup import Measure

TRIALS = 5


def plan_for_speedup(
    graph_module: GraphModule,
    survey: Survey,
    factor: float,
    inputs: Sequence[Tensor],
    *,
    measure: Measure | None = None,
) -> RankPlan:
    """The plan with the most MACs found that runs `factor` times faster than dense, by bisection over budgets.

    Only sizes matter to speed, so the candidates that are timed have weights that mean nothing.

    Args:
        graph_module: traced, with observers.
        survey: of that graph.
        factor: wanted ratio of the lower quartiles, dense / factored.
        inputs: the model's arguments for one image.
        measure: how to time files; None: `fxprune.export.latency.measure_latency`.

    Raises:
        OptionsError: not reached even with the fewest MACs.
    """

    def write(plan: RankPlan | None, path: Path) -> None:
        write_shape(graph_module, plan, inputs, path)

    with speedup.beside_dense(lambda path: write(None, path), inputs, measure) as speed:
        return search(survey, factor, lambda plan: speed(lambda path: write(plan, path)))


def search(survey: Survey, factor: float, speed: Callable[[RankPlan], float]) -> RankPlan:
    """Bisection over budgets of MACs.

    Args:
        survey: of the network.
        factor: wanted speed-up.
        speed: measures the speed-up of a plan.

    Raises:
        OptionsError: not reached even with the fewest MACs.
    """

    def plan_of(budget: int) -> RankPlan:
        return RankPlan.of(f"rank speedup:{factor:g}", survey, within_budget(survey, budget))

    plan, reached = speedup.search(
        survey.least_macs,
        survey.macs,
        factor,
        lambda budget: plan_of(int(budget)),
        speed,
        fewest=lambda: plan_of(survey.least_macs),
        trials=TRIALS,
    )
    if reached < factor:
        raise OptionsError(
            f"a speed-up of {factor:g} is out of reach: it was {reached:.2f} with the fewest MACs that low rank "
            f"can give here, {plan.macs[1] / 1e6:.1f} M of {plan.macs[0] / 1e6:.1f} M"
        )
    return replace(plan, rule=f"{plan.rule}, measured {reached:.2f}")


def write_shape(graph_module: GraphModule, plan: RankPlan | None, inputs: Sequence[Tensor], path: Path) -> None:
    """Write the dense graph, or one of the shape that the plan would give it."""
    graph_module = copy.deepcopy(graph_module).cpu()
    for node in list(graph_module.graph.nodes):
        choice = plan.choice(str(node.target)) if plan is not None and annotation(node).role else None
        if choice is not None:
            module = layer_of(node)
            pair = two_layers(module, choice.split, choice.rank, bias=module.bias is not None)
            graph_module.set_submodule(str(node.target), pair)
            split_call(node)
            graph_module.graph.erase_node(node)
    remove_observers(graph_module)
    speedup.write_onnx(graph_module, inputs, path)
