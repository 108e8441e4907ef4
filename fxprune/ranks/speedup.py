"""Ranks for a wanted speed-up: candidates are exported, and timed in onnxruntime beside the dense model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor
from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.calibration.observers import remove_observers
from fxprune.errors import OptionsError
from fxprune.layers.problem import layer_of
from fxprune.layers.splits import split_call, two_layers
from fxprune.ranks.plan import RankPlan, Survey, within_budget

if TYPE_CHECKING:
    from fxprune.export.latency import Latency

TRIALS = 5
Measure: TypeAlias = "Callable[[Sequence[Path], Sequence[Tensor]], Sequence[Latency]]"


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
        factor: wanted ratio of the medians, dense / factored.
        inputs: the model's arguments for one image.
        measure: how to time files; None: `fxprune.export.latency.measure_latency`.

    Raises:
        OptionsError: not reached even with the fewest MACs.
    """
    # The engine imports the export here only, where files are what is measured.
    from fxprune.export.latency import measure_latency

    measure = measure or measure_latency
    inputs = [x.cpu() for x in inputs]
    with tempfile.TemporaryDirectory() as folder:
        dense, candidate = Path(folder) / "dense.onnx", Path(folder) / "candidate.onnx"
        write_shape(graph_module, None, inputs, dense)

        def speed(plan: RankPlan) -> float:
            write_shape(graph_module, plan, inputs, candidate)
            slow, fast = measure([dense, candidate], inputs)
            return slow.median / fast.median

        return search(survey, factor, speed)


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

    best: tuple[RankPlan, float] | None = None
    low, high = survey.least_macs, survey.macs
    budget = max(low, int(0.9 * high / factor))
    for _ in range(TRIALS):
        plan = plan_of(budget)
        reached = speed(plan)
        if reached >= factor:
            best, low = (plan, reached), budget
        else:
            high = budget
        budget = (low + high) // 2
    if best is None:
        plan = plan_of(low)
        best = plan, speed(plan)
    plan, reached = best
    if reached < factor:
        raise OptionsError(
            f"a speed-up of {factor:g} is out of reach: it was {reached:.2f} with the fewest MACs that low rank "
            f"can give here, {plan.macs[1] / 1e6:.1f} M of {plan.macs[0] / 1e6:.1f} M"
        )
    return replace(plan, rule=f"{plan.rule}, measured {reached:.2f}")


def write_shape(graph_module: GraphModule, plan: RankPlan | None, inputs: Sequence[Tensor], path: Path) -> None:
    """Write the dense graph, or one of the shape that the plan would give it."""
    from fxprune.export.torch_export import to_onnx_program

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
    graph_module.recompile()
    program = to_onnx_program(graph_module.eval(), tuple(inputs), opset=None, dynamic_batch=False, precision="fp32")
    program.save(str(path))
