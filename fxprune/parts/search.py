"""Which children of a model can be compiled: the largest that hold weights and can be traced on the inputs that reach them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.calibration.calls import Call, Reading, calls_of
from fxprune.calibration.failures import said
from fxprune.errors import FxPruneError
from fxprune.intake.batch_sizes import agree
from fxprune.intake.names import matches
from fxprune.intake.normal_form import is_layer_call
from fxprune.intake.record import intake
from fxprune.operations import LAYERS
from fxprune.passes import RemoveInplace
from fxprune.trace_check import TOLERANCE, distance
from fxprune.tracing import trace


@dataclass(frozen=True)
class Part:
    """A child that can be compiled.

    Attributes:
        path: in the model.
        graph_module: its trace.
        is_of_images: whether it is called once for a batch, with as many rows as there are images.
    """

    path: str
    graph_module: GraphModule
    is_of_images: bool


@dataclass
class Search:
    """Goes through a model's children, the outer before the inner ones.

    Args:
        model: a copy of the user's, in eval mode; it is run, and is as before afterwards.
        reading: how it takes a batch.
        batch: the first of the calibration set.
        exclude: module names or fnmatch patterns.

    Attributes:
        parts: what was found.
        problems: why a child cannot be compiled as a whole, by its path.
    """

    model: nn.Module
    reading: Reading
    batch: Any
    exclude: Sequence[str]
    parts: list[Part] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def run(self) -> Search:
        """Find the parts, in the order in which they are called first."""
        wanted = self.reading.run(self.model, self.batch)
        trial = copy.deepcopy(self.model)
        level = dict(_children(self.model, ""))
        while level:
            level = {path: module for path, module in level.items() if not matches(path, self.exclude)}
            calls = calls_of(lambda: self.reading.run(self.model, self.batch), _once(level))
            inner: dict[str, nn.Module] = {}
            for path, module in level.items():
                problem = self._take(path, module, calls.get(path, []), trial, wanted)
                if problem:
                    self.problems[path] = problem
                    inner |= dict(_children(module, path))
            level = inner
        modules = {part.path: self.model.get_submodule(part.path) for part in self.parts}
        calls = calls_of(lambda: self.reading.run(self.model, self.batch), modules, keep=lambda x: x)
        self.parts.sort(key=lambda part: calls[part.path][0].number)
        return self

    def _take(self, path: str, module: nn.Module, calls: list[Call], trial: nn.Module, wanted: Any) -> str:
        """Take a child as a part, or say why it is none; "" also if it holds nothing to compress."""
        if not any(p.dim() > 1 for p in module.parameters()):
            return ""
        if any(module is self.model.get_submodule(part.path) for part in self.parts):
            return ""  # By another name it is a part already.
        if not calls:
            return "no call of it was seen on the first batch"
        if any(call.inputs is None for call in calls):
            return "it is called with *args"
        given = next((call.inputs for call in calls if call.rows), calls[0].inputs)
        if not any(call.rows for call in calls):
            return "nothing reached it on the first batch"
        relative = [name for name, _ in module.named_modules() if name and matches(f"{path}.{name}", self.exclude)]
        try:
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                # A layer by itself is called "0": a graph cannot have a module without a name.
                root = nn.Sequential(module) if isinstance(module, LAYERS) else module
                graph_module = trace(root, exclude=relative, example=given)
                RemoveInplace()(graph_module)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except FxPruneError as error:
            return str(error)
        except Exception as error:  # Whatever its Python raises under a tracer.
            return f"{type(error).__name__}: {said(error)}"
        found = intake(graph_module)
        for leaf in found.leaves if found is not None else ():
            if any(p.dim() > 1 for p in module.get_submodule(leaf.name).parameters()):
                return f"its {leaf}"
        if not any(map(is_layer_call, graph_module.graph.nodes)):
            return "no convolution or linear layer is in its graph"
        if any(agree(module, graph_module, call.inputs) is False for call in calls if call.rows):
            return "its graph does not hold for all of its calls in one run of the model"
        return self._put_in(path, graph_module, calls, trial, wanted)

    def _put_in(self, path: str, graph_module: GraphModule, calls: list[Call], trial: nn.Module, wanted: Any) -> str:
        """Try the model with the graph in the child's place."""
        before = trial.get_submodule(path)
        put_in(trial, path, graph_module)
        try:
            got = self.reading.run(trial, self.batch)
        except Exception as error:
            put_in(trial, path, before)
            return f"the model needs more of it than its call: {type(error).__name__}: {said(error)}"
        if distance(wanted, got) > TOLERANCE:
            put_in(trial, path, before)
            return "the model computes something else with its graph in its place"
        images = self.reading.images(self.model, self.batch)
        of_images = len(calls) == 1 and calls[0].rows == images
        self.parts.append(Part(path, graph_module, of_images))
        return ""


def put_in(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another one, wherever the model holds that."""
    before = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is before:
                parent._modules[name] = module


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield (f"{path}.{name}" if path else name), child


def _once(level: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module under the first of its names."""
    found: dict[int, str] = {}
    for path, module in level.items():
        found.setdefault(id(module), path)
    return {path: level[path] for path in found.values()}
