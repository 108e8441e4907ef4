"""ReestimateBatchNorm: measures the running statistics of all BatchNorm modules anew on a calibration set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.calibration.batches import EMPTY, check_loader, inputs_of
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.failures import run_graph
from fxprune.errors import CalibrationError
from fxprune.graph import Runner, module_of
from fxprune.passes.base import Pass
from fxprune.runtime.processes import gathered, summed, together, world
from fxprune.runtime.surroundings import undisturbed

REMEDY = "BatchNorm needs more than one value per channel"
_FUNCTIONAL = (torch.nn.functional.batch_norm, torch.batch_norm)


class ReestimateBatchNorm(Pass):
    """Replaces every BatchNorm's running mean and variance by their average over the calibration batches.

    1. All BatchNorm modules, those inside leaf modules too, run in training mode with momentum=None: their
       statistics become the plain average of the batches' means and (unbiased) variances, each batch counting
       alike. Everything else runs in eval mode. Only the statistics change; every flag is set back.
    2. A BatchNorm without running statistics, or one that no batch reaches, is kept, with the reason on
       record; so is a functional batch_norm.

    Source: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, sec. 3.2.

    Args:
        loader: iterable of batches in any form, see `fxprune.calibration.batches`; read once per call.
        device: where to run; None runs the model where it is. The model is put back afterwards.

    Raises:
        CalibrationError: if the loader is empty, or a batch holds no finite tensors that the model can be run
            on. The old statistics are then in place again.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
        self.loader = loader
        self.device = device

    @together()
    @undisturbed
    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        norms = self._norms(graph_module)
        if not norms:
            return PassResult(graph_module, False)
        before = {norm: _statistics(norm) for norm in norms}
        try:
            batches = self._estimate(graph_module, list(norms))
            for norm, node in norms.items():
                if not all(torch.isfinite(statistic).all() for statistic in _statistics(norm)):
                    raise CalibrationError(
                        f"the BatchNorm at node {node.name!r} ({node.target}) got statistics that are not "
                        "finite: its input overflows or holds NaN; check the model's weights"
                    )
        except BaseException:
            for norm in norms:
                _restore(norm, before[norm])
            raise
        modified = False
        for norm, node in norms.items():
            if norm.num_batches_tracked == 0:
                _restore(norm, before[norm])
                self.record(graph_module, "kept", node, reason="no calibration batch reached this BatchNorm")
            elif any(not torch.equal(a, b) for a, b in zip(_statistics(norm), before[norm], strict=True)):
                modified = True
                self.record(graph_module, "replaced", node, reason=f"re-estimated on {batches} batches")
        return PassResult(graph_module, modified)

    def _norms(self, graph_module: GraphModule) -> dict[_BatchNorm, Node]:
        """The BatchNorm modules with running statistics, and for each the first node that calls it."""
        norms: dict[_BatchNorm, Node] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in _FUNCTIONAL:
                self.record(graph_module, "kept", node, reason="a functional call, not a BatchNorm module")
            module = module_of(node)
            for norm in module.modules() if module is not None else ():
                if not isinstance(norm, _BatchNorm):
                    continue
                if norm.track_running_stats and norm.running_mean is not None:
                    norms.setdefault(norm, node)
                else:
                    self.record(graph_module, "kept", node, reason="a BatchNorm without running statistics")
        return norms

    def _estimate(self, graph_module: GraphModule, norms: list[_BatchNorm]) -> int:
        """Run all batches with only the BatchNorm modules in training mode; return their number."""
        home = next(norms[0].buffers()).device
        device = home if self.device is None else torch.device(self.device)
        training = {module: module.training for module in graph_module.modules()}
        momenta = {norm: norm.momentum for norm in norms}
        own = -1
        check_loader(self.loader)
        try:
            graph_module.to(device).eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            placeholders = graph_module.graph.find_nodes(op="placeholder")
            batches = Calibration(self.loader)
            with torch.no_grad():
                for own, batch in enumerate(batches):
                    number = batches.number(own)
                    values = list(inputs_of(batch, placeholders, number, device=device).values())
                    run_graph(Runner(graph_module), values, f"calibration batch {number}", remedy=REMEDY)
        finally:
            for module, flag in training.items():
                module.training = flag
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            graph_module.to(home)
        read = sum(gathered(own + 1))
        if not read:
            raise CalibrationError(EMPTY)
        for norm in norms if world().count > 1 else ():
            _average(norm)
        return read


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of running mean and variance (C,), and of the number of batches ()."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _average(norm: _BatchNorm) -> None:
    """Take the average over the batches of all processes."""
    *moments, batches = _statistics(norm)
    *totals, count = summed([*(moment.double() * batches for moment in moments), batches.double()])
    if count:
        mean, variance = ((total / count).to(moment) for total, moment in zip(totals, moments, strict=True))
        _restore(norm, (mean, variance, count.long()))


def _restore(norm: _BatchNorm, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    norm.running_mean, norm.running_var, norm.num_batches_tracked = statistics
