"""CheckImages: warns of calibration images that cannot be right; to be run before BatchNorm is folded.

The checks need no labels, and are made before anything is fitted. BatchNorm's running mean and variance describe the images
that the network was trained on; images of another size, range or content give another mean and variance. To constant
images, or where most activations are dead, nothing can be fitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.calibration.batches import count, inputs_of, map_tensors, take
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.failures import stays_as_it_is
from fxprune.calibration.holdout import LEAST_IMAGES
from fxprune.graph import Runner, device_of, input_of, module_of
from fxprune.operations import bounds_of
from fxprune.passes.base import CalibratedPass

IMAGES = 64  # That are looked at.
RUN_IMAGES = 32  # Of these, through the network.
CONSTANT = 1e-3  # Standard deviation within images, relative to their largest value.
DEAD_SHARE = 0.9
FIRST_NORMS = 3  # Later ones see what the first have made of a wrong input.
MEAN_SHIFT = 1.0  # In running standard deviations, the median over a layer's channels.
VARIANCE_RATIO = 4.0
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class CheckImages(CalibratedPass):
    """Changes nothing; what is wrong with the images becomes a `CalibrationWarning` and a line in the report."""

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        for sentence in suspicions(graph_module, calibration.head(IMAGES)):
            calibration.warn(sentence)
        return PassResult(graph_module, False)


@torch.no_grad()
def suspicions(graph_module: GraphModule, batches: list[object]) -> list[str]:
    """What is wrong with a set of images, in sentences; [] if nothing is.

    Args:
        graph_module: in eval mode, its BatchNorm modules not folded yet.
        batches: with the first IMAGES images or more, as the loader gave them.
    """
    images = sum(map(count, batches))
    found = []
    if images < LEAST_IMAGES:
        found.append(
            f"{images} calibration images are few: none can be held out for a score, and layers may fit these images "
            f"only; give at least {LEAST_IMAGES}, better a few hundred"
        )
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    device, watch = device_of(graph_module), _Watch(graph_module)
    inputs: list[Tensor] = []
    seen = 0
    for number, batch in enumerate(batches):
        values = list(inputs_of(batch, placeholders, number, device=device).values())
        if not values or not isinstance(values[0], Tensor) or not values[0].is_floating_point():
            return found
        inputs.append(values[0][: IMAGES - seen])
        if seen < RUN_IMAGES and not _runs(watch, values, RUN_IMAGES - seen):
            return found
        seen += count(values)
        if seen >= IMAGES:
            break
    found += _of_inputs(inputs)
    found += watch.findings()
    return found


def _runs(watch: _Watch, values: list[Any], images: int) -> bool:
    """Run so many images of a batch, or all where the network takes no other number; whether it does."""
    for some in (take(values, slice(images)), values):
        try:
            watch.run(*map_tensors(some, torch.clone))
            return True
        except Exception as error:  # The run that solves the layers names the place.
            if stays_as_it_is(error):
                raise
    return False


def _of_inputs(inputs: list[Tensor]) -> Iterator[str]:
    size = max(float(x.abs().max()) for x in inputs)
    deviations = torch.cat([x.flatten(1).double().std(1) for x in inputs if x[0].numel() > 1] or [torch.ones(1)])
    constant = int((deviations <= CONSTANT * size).sum())
    if constant > len(deviations) // 2:
        yield (
            f"{constant} of the first {len(deviations)} calibration images are constant or nearly so: they show the network "
            "nothing; check how they are loaded"
        )
    flat = [x.flatten(1) for x in inputs]
    if len({x.shape[1] for x in flat}) == 1 and sum(map(len, flat)) > 1 and constant <= len(deviations) // 2:
        whole = torch.cat(flat)
        if bool((whole - whole[:1]).abs().max() <= CONSTANT * size):
            yield f"the first {len(whole)} calibration images are all alike; check the loader"


class _Watch(Runner):
    """Runs a graph, and looks at what its rectifiers give and its BatchNorms read."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self._norms = [n for n in graph_module.graph.nodes if _is_trained_norm(module_of(n))][:FIRST_NORMS]
        self._sums: dict[Node, list[Tensor]] = {}
        self._largest: dict[Node, Tensor] = {}
        self._values: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        """Run one node and note what concerns it."""
        value = super().run_node(n)
        if n in self._norms:
            x = self.env[input_of(n)].double().transpose(0, 1).flatten(1)
            moments = [x.sum(1), x.square().sum(1), torch.tensor(float(x.shape[1]))]
            before = self._sums.get(n)
            self._sums[n] = moments if before is None else [a + b for a, b in zip(before, moments, strict=True)]
        if isinstance(value, Tensor) and value.dim() > 1 and bounds_of(n) is not None:
            largest = value.abs().transpose(0, 1).flatten(1).amax(1)
            self._largest[n] = largest if n not in self._largest else torch.maximum(self._largest[n], largest)
        return value

    def findings(self) -> Iterator[str]:
        """Sentences about what was seen."""
        channels = sum(len(x) for x in self._largest.values())
        dead = sum(int((x == 0).sum()) for x in self._largest.values())
        if channels and dead > DEAD_SHARE * channels:
            yield (
                f"{dead / channels:.0%} of the activations' channels are zero on the calibration images: most of the network "
                "sees nothing; check the images and their normalisation"
            )
        for node, (total, squares, seen) in self._sums.items():
            norm = module_of(node)
            assert isinstance(norm, BATCHNORMS)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            running, variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
            mean = total / seen
            shift = float(((mean - running).abs() / variance.sqrt()).median())
            ratio = float((((squares / seen - mean**2).clamp_min(0) + norm.eps) / variance).log().median().exp())
            if shift > MEAN_SHIFT or not 1 / VARIANCE_RATIO < ratio < VARIANCE_RATIO:
                yield (
                    f"the calibration images are unlike those that the model was trained on: at {str(node.target)!r} the mean "
                    f"is {shift:.1f} standard deviations from BatchNorm's running mean, and the variance {ratio:.3g} times "
                    "its running variance (medians over channels); check their range, normalisation and colour order"
                )
                return


def _is_trained_norm(module: nn.Module | None) -> bool:
    """Whether a BatchNorm's running statistics are those of a training."""
    if not isinstance(module, BATCHNORMS) or module.running_mean is None or module.running_var is None:
        return False
    untouched = bool((module.running_mean == 0).all() and (module.running_var == 1).all())
    return not untouched and not module.training
