"""AllocateSparsity: gives each layer its own sparsity level, such that the whole network meets one target.

Every layer is solved at each level against the dense model's statistics. What a level costs is measured at the network's
output, with only that layer pruned: the squared change of the outputs relative to their variance. It is taken at a few
levels, and scaled from the nearest one to the others by the layer error (both are quadratic in a small change of the
weights). Dynamic programming then chooses the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._pytree import tree_leaves

from fxprune import solvers
from fxprune.calibration.batches import assign
from fxprune.calibration.observers import observer_of
from fxprune.calibration.output_error import OutputError
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.calibration.stream import CalibrationStream
from fxprune.errors import PatternError
from fxprune.graph import call, device_of
from fxprune.layer_solution import layer_of, sparse_solution
from fxprune.options import Options
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem
from fxprune.solvers.allocation import allocate
from fxprune.statistics import HessianObserver

PROBE_IMAGES = 128
PROBE_EVERY = 2  # Levels apart.


class AllocateSparsity(Pass):
    """Sets the pattern of every `LayerTask` with role "prune"; a layer that is to stay dense gets role "reconstruct".

    Args:
        pattern: its `levels` are the choice each layer has, its `sparsity` is the target over all of them together.
        method: solver used to find what each level costs.
        batches: calibration batches (they are read twice).
        options: resolved options.
        stopwatch: takes the time of "stream" and "statistics".
    """

    def __init__(
        self,
        pattern: Pattern,
        method: str,
        batches: Sequence[Any],
        options: Options,
        *,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.pattern = pattern
        self.solver = solvers.get(method)
        self.batches = batches
        self.options = options
        self.stopwatch = stopwatch

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        tasks: dict[Node, LayerTask] = {
            node: node.meta[TASK]
            for node in graph_module.graph.nodes
            if TASK in node.meta and node.meta[TASK].role == "prune" and node.meta[TASK].pattern is None
        }
        if not tasks:
            return PassResult(graph_module, False)
        device = device_of(graph_module)
        # Those of layers that are only re-fitted too: what is seen here must not be left in them.
        observers = [module for module in graph_module.modules() if isinstance(module, HessianObserver)]
        with torch.inference_mode():
            CalibrationStream.by(self.options, graph_module, self.batches, self.stopwatch).finish()
            for observer in observers:
                observer.enabled = False
            probe = self._probe(graph_module, device)
            dense = _outputs(graph_module, probe)
            costs = [self._costs(graph_module, node, probe, dense) for node in tasks]
            for observer in observers:
                observer.enabled = True
                observer.reset()
        sizes = [layer_of(node).weight.numel() for node in tasks]
        kept = [[size if level is None else level.kept(size) for level in self.pattern.levels] for size in sizes]
        budget = self.pattern.kept(sum(sizes))
        for node, level in zip(tasks, allocate(costs, kept, budget), strict=True):
            self._assign(graph_module, node, self.pattern.levels[level])
        return PassResult(graph_module, True)

    def _probe(self, graph_module: GraphModule, device: torch.device) -> list[list[Any]]:
        """The model's arguments in the first batches, PROBE_IMAGES together."""
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        probe: list[list[Any]] = []
        seen = 0
        for number, batch in enumerate(self.batches):
            values = list(assign(placeholders, batch, number, device=device).values())
            left = PROBE_IMAGES - seen
            probe.append([x[:left] if isinstance(x, Tensor) else x for x in values])
            seen += len(values[0])
            if seen >= PROBE_IMAGES:
                break
        return probe

    def _costs(self, graph_module: GraphModule, node: Node, probe: list[list[Any]], dense: list[Tensor]) -> list[float]:
        """What each level of one layer costs at the network's output: the relative squared change."""
        module, geometry = layer_of(node), node.meta[TASK].geometry
        weight = geometry.to_matrix(module.weight.detach()).double()
        inputs = observer_of(node).statistics()
        hessian = inputs.hessian(centred=bool(self.options.bias_correction))
        problem = LayerProblem(hessian, weight @ hessian, weight).damped(self.options.damping)
        solutions = [
            None if level is None else sparse_solution(problem, level, self.solver, self.options)
            for level in self.pattern.levels
        ]
        none_lost = problem.loss(weight).sum()
        errors = [0.0 if s is None else max(0.0, float(problem.loss(s).sum() - none_lost)) for s in solutions]
        original, bias = module.weight.data, module.bias
        costs_per_error: dict[int, float] = {}
        for i, solution in list(enumerate(solutions))[::PROBE_EVERY]:
            if solution is not None and errors[i] > 0:
                module.weight.data = geometry.to_weight(solution).to(original)
                if self.options.bias_correction:
                    shift = torch.einsum("grd,gd->gr", weight - solution, inputs.mean).flatten().to(original)
                    module.bias = nn.Parameter(shift if bias is None else bias + shift)
                change = OutputError(channel_dim=1)
                for wanted, output in zip(dense, _outputs(graph_module, probe), strict=True):
                    change.update(wanted, output)
                costs_per_error[i] = change.relative / errors[i]
                module.weight.data, module.bias = original, bias
        if not costs_per_error:
            return errors
        nearest = [min(costs_per_error, key=lambda i: abs(i - level)) for level in range(len(errors))]
        return [error * costs_per_error[i] for error, i in zip(errors, nearest, strict=True)]

    def _assign(self, graph_module: GraphModule, node: Node, level: Pattern | None) -> None:
        task = node.meta[TASK]
        if level is None:
            reason = f"dense within the budget of {self.pattern}"
            node.meta[TASK] = replace(task, role="reconstruct", reason=reason)
            self.record(graph_module, "kept", node, reason=reason)
        else:
            node.meta[TASK] = replace(task, pattern=level)


def _outputs(graph_module: GraphModule, probe: list[list[Any]]) -> list[Tensor]:
    """All floating point tensors, (N, ...) each, that the model puts out for a batch, as one (N, K); for each batch."""
    outputs = []
    for inputs in probe:
        leaves = [x for x in tree_leaves(call(graph_module, *inputs)) if isinstance(x, Tensor)]
        tensors = [x.flatten(1) for x in leaves if x.is_floating_point() and x.dim()]
        if not tensors:
            raise PatternError(
                "a sparsity budget over layers is measured at the model's output, which holds no floating point tensor; "
                "use a pattern that is the same for every layer"
            )
        outputs.append(torch.cat(tensors, 1))
    return outputs
