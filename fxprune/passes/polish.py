"""Polish: a few label-free steps in which the pruned model learns the dense model's outputs, its masks held fixed.

Layer-wise least squares is blind to what the layers after it make of an error; distillation (Hinton et al. 2015) on the
calibration images is not. It costs many times what the least squares does, for the last tenth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.batches import input_tensor
from fxprune.errors import OptionsError
from fxprune.output_error import OutputAgreement, OutputError, channel_dim
from fxprune.passes.base import Pass
from fxprune.passes.prune_weights import LAYER, REPORT

LEARNING_RATE = 2e-4
WARM_UP = 0.1
HOLD_OUT_EVERY = 8


class Polish(Pass):
    """Trains the weights that pruning kept, and the biases, on KL(dense || pruned).

    Every eighth batch is held out (if there are several), and the epoch that is best on those is kept; it may be none.

    Args:
        dense: the graph module as it was before pruning, with the same node names.
        batches: calibration batches.
        epochs: passes over them.
        flip: learn from mirrored images too: right for photographs, wrong for digits.
        seed: of the batch order.
    """

    def __init__(
        self, dense: GraphModule, batches: Sequence[Any], *, epochs: int, flip: bool = False, seed: int = 0
    ) -> None:
        self.dense = dense
        self.batches = batches
        self.epochs = epochs
        self.flip = flip
        self.seed = seed

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        device = next(graph_module.parameters()).device
        inputs = [input_tensor(batch, number).to(device) for number, batch in enumerate(self.batches)]
        with torch.no_grad():
            pairs = [(x, _logits(self.dense(x))) for x in inputs]
            training = [pair for number, pair in enumerate(pairs) if number % HOLD_OUT_EVERY or len(pairs) == 1]
            if self.flip:
                training += [(x.flip(-1), _logits(self.dense(x.flip(-1)))) for x, _ in training]
        held_out = pairs[::HOLD_OUT_EVERY]
        before = best = copy.deepcopy(graph_module.state_dict())
        least = _divergence(graph_module, held_out)
        for _ in self._epochs(graph_module, training):
            divergence = _divergence(graph_module, held_out)
            if divergence < least:  # False for NaN, too.
                least, best = divergence, copy.deepcopy(graph_module.state_dict())
        graph_module.load_state_dict(best)
        if best is before:
            return PassResult(graph_module, False)
        with torch.no_grad():
            self._update_report(graph_module, inputs, _agreement(graph_module, pairs))
        return PassResult(graph_module, True)

    def _epochs(self, graph_module: GraphModule, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[int]:
        """Adam on a one-cycle schedule, an epoch at a time; gradients outside the masks are zeroed: zeros stay zero."""
        own = {p: p.requires_grad for p in graph_module.parameters()}
        weights = [p.requires_grad_(True) for p in own if p.is_floating_point()]
        masks = [p != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool) for p in weights]
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        steps = self.epochs * len(pairs)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs):
            for number in torch.randperm(len(pairs), generator=generator).tolist():
                x, wanted = pairs[number]
                with torch.enable_grad():
                    student, teacher = _logits(graph_module(x)).log_softmax(1), wanted.log_softmax(1)
                    loss = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                for p, mask in zip(weights, masks, strict=True):
                    if p.grad is not None:
                        p.grad *= mask
                optimizer.step()
                schedule.step()
            yield epoch
        for p, flag in own.items():
            p.grad = None
            p.requires_grad_(flag)

    def _update_report(self, graph_module: GraphModule, inputs: list[Tensor], polished: OutputAgreement) -> None:
        """Measure every layer's error again, now that the weights are others."""
        errors: dict[str, OutputError] = {}
        names = {
            n.name for n in graph_module.graph.nodes if LAYER in n.meta and n.meta[LAYER].relative_error is not None
        }
        for x in inputs:
            dense, pruned = _Recorder(self.dense, names).outputs(x), _Recorder(graph_module, names).outputs(x)
            for name in names:
                errors.setdefault(name, OutputError(channel_dim(dense[name][0]))).update(
                    dense[name][1], pruned[name][1]
                )
        for node in graph_module.graph.nodes:
            if node.name in errors:
                node.meta[LAYER] = replace(node.meta[LAYER], relative_error=errors[node.name].relative)
        layers = tuple(node.meta[LAYER] for node in graph_module.graph.nodes if LAYER in node.meta)
        graph_module.meta[REPORT] = replace(
            graph_module.meta[REPORT], layers=layers, agreement=polished.agreement, kl=polished.kl
        )


class _Recorder(Interpreter):
    """Runs a graph and keeps the outputs of the nodes with the given names."""

    def __init__(self, graph_module: GraphModule, names: set[str]) -> None:
        super().__init__(graph_module)
        self.names = names
        self.kept: dict[str, tuple[Node, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = n, value
        return value

    def outputs(self, x: Tensor) -> dict[str, tuple[Node, Tensor]]:
        self.run(x)
        return self.kept


def _logits(output: Any) -> Tensor:
    """The model's output as (N, classes) logits, or an error."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise OptionsError("polish needs a model whose output is one (N, classes) tensor of logits; leave polish at 0")
    return output


def _agreement(graph_module: GraphModule, pairs: list[tuple[Tensor, Tensor]]) -> OutputAgreement:
    """Of a model's logits with the wanted ones."""
    agreement = OutputAgreement()
    for x, wanted in pairs:
        agreement.update(wanted, _logits(graph_module(x)))
    return agreement


@torch.no_grad()
def _divergence(graph_module: GraphModule, pairs: list[tuple[Tensor, Tensor]]) -> float:
    kl = _agreement(graph_module, pairs).kl
    assert kl is not None
    return kl
