"""A drawn network with what is asked of fxprune on it, and the runs that several checks look at."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune import CalibrationWarning, CompiledModule, Options, solvers
from fxprune.errors import GraphError, OptionsError, PatternError
from fxprune.pattern import Pattern
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.solver import Solver
from fxprune.tracing import trace
from tests.fuzz.grammar import Draw, networks
from tests.fuzz.network import Network, tensors

RECIPES: tuple[Any, ...] = (
    "2:4", "2:4", "2:4", "1:4", "0.5", "0.9", "mixed:0.6", "rank:0.9", "rank:ratio=0.5+2:4", "rank:energy=0.9", "dense",
    "1:2", "4:8", "by name", "by name", "channels:0.8", "channels:0.7", "channels:0.8+2:4", "channels:0.8+rank:0.9",
)  # fmt: skip
METHODS = ("admm", "admm", "admm", "magnitude", "sparsegpt", "exact_obs")


class Refused(Exception):  # noqa: N818 - it is no error
    """fxprune declines what is asked with a clear error, and rightly."""


@dataclass(frozen=True)
class Recording(Solver):
    """A solver that does as another does, and keeps the problems that it was given with its answers."""

    inner: Solver
    problems: list[tuple[LayerProblem, Pattern, Tensor]] = field(default_factory=list, compare=False)

    @property
    def published(self) -> bool:  # type: ignore[override]
        return type(self.inner).published

    @property
    def safeguarded(self) -> bool:  # type: ignore[override]
        return type(self.inner).safeguarded

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def needs_statistics(self) -> bool:
        return self.inner.needs_statistics

    def __str__(self) -> str:
        return str(self.inner)

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:
        found = self.inner(problem, pattern)
        self.problems.append((problem, pattern, found))
        return found


@dataclass(frozen=True)
class Case:
    """What is compiled how."""

    network: Network
    recipe: Any = "2:4"
    method: str = "admm"
    options: dict[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    before: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    after: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def script(self) -> str:
        """All of it, to be pasted into a test."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return (
            f"{self.network.script}\n\nimport fxprune\n\ncompiled = fxprune.compile(model(), batches(), {self.recipe!r}, "
            f"method={self.method!r}, exclude={self.exclude!r}, options=fxprune.Options({options}), progress=False)\n"
        )

    def compile(self, model: nn.Module, batches: Any, *, method: Any = None, **changes: Any) -> CompiledModule:
        """Compile a model as the case says; warnings about the images are expected."""
        arguments: dict[str, Any] = {"exclude": self.exclude, "options": Options(**self.options)} | changes
        recipe = arguments.pop("recipe", self.recipe)
        with warnings.catch_warnings(), self.refusals():
            warnings.simplefilter("ignore", CalibrationWarning)
            found = fxprune.compile(
                model, batches, recipe, method=method or self.method, device="cpu", progress=False, **arguments
            )
            if not isinstance(
                found, CompiledModule
            ):  # What was no graph was compiled in parts: for a reason that we know?
                raise GraphError(" ".join(found.report.notes))
            return found

    @functools.cached_property
    def model(self) -> nn.Module:
        """The user's model; whatever is done with it, it should stay as it is."""
        return self.network.model()

    @functools.cached_property
    def solver(self) -> Recording:
        return Recording(solvers.get(self.method))

    @functools.cached_property
    def compiled(self) -> CompiledModule:
        """The result; what the user has is looked at before and after."""
        model, batches = self.model, self.network.batches()
        random.seed(11)
        np.random.seed(12)  # noqa: NPY002
        torch.manual_seed(13)
        self.before.update(snapshot(model, batches))
        compiled = self.compile(model, batches, method=self.solver)
        self.after.update(snapshot(model, batches))
        return compiled

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turns an error that says rightly that something cannot be done into `Refused`."""
        try:
            yield
        except (OptionsError, GraphError, PatternError) as error:
            by_name = isinstance(self.recipe, dict)
            # An input, or another name for a value: `contiguous` of what is contiguous.
            names_of_one = "|".join([*self.network.names, r"contiguous(_\d+)?"])
            overwritten = (
                f"overwrites '.*' in place, and node '.*' later reads '({names_of_one})', which may share its memory"
            )
            called = {name: f"self.{name.partition('.')[0]}(" in self.network.script for name in self.recipe if by_name}
            names = [name for name in called if not called[name]]
            uncalled = "|".join(map(re.escape, names))
            piece = r"overwrites '(getitem|narrow)(_\d+)?' in place, and node '.*' later reads '.*', which may share"
            of_piece = r"overwrites '.*' in place, and node '.*' later reads '(getitem|narrow)(_\d+)?', which may share"
            reasons = {
                piece: "writes into a piece of what it reads later",
                of_piece: "writes into what it reads a piece of later",
                "out of reach": "",
                "nothing can be compressed": "",
                overwritten: "writes into what it reads later under another name",
                f"the recipe's '({uncalled})' matches no layer that": "a layer that nobody calls",
            }
            for reason, short in reasons.items():
                if re.search(reason, str(error)):
                    raise Refused(short or reason) from error
            raise

    def outputs(self, model: nn.Module, n: int = 3, seed: int = 50) -> list[Tensor]:
        """What a model makes of some images; a copy of it runs, in eval mode."""
        with torch.no_grad():
            return tensors(copy.deepcopy(model).eval()(*self.network.images(n, seed)))

    def before_solving(self) -> GraphModule:
        """The graph after all passes that keep the function, with the permutation of the case."""
        batches = self.network.batches()
        calibration = fxprune.Calibration(batches)
        graph_module = trace(self.model, exclude=self.exclude, example=calibration.first)
        passes = fxprune.default_passes(
            self.recipe, method=self.method, exclude=self.exclude, options=Options(**self.options)
        )
        with warnings.catch_warnings(), self.refusals():
            warnings.simplefilter("ignore", CalibrationWarning)
            for step in passes:
                if type(step).__name__ == "InsertObservers":
                    return graph_module
                if type(step).__name__ != "RemoveChannels":  # Fewer channels compute something else.
                    step(graph_module, calibration)
        raise AssertionError("no InsertObservers among the passes")


def snapshot(model: nn.Module, batches: Any) -> dict[str, Any]:
    """What must not change, by name, in a form that `==` compares."""
    found: dict[str, Any] = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": str(np.random.get_state()),  # noqa: NPY002
        "random's state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    state = {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}
    for name, tensor in state.items():
        found[name] = (id(tensor), tensor.stride(), tensor.requires_grad, tensor.grad, _bytes(tensor))
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        found[f"module {name!r}"] = (type(module), module.training, hooks, sorted(vars(module)))
    for i, batch in enumerate(batches):
        found[f"batch {i}"] = [(_bytes(tensor), tensor.stride()) for tensor in tensors(batch)]
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


@st.composite
def cases(draw: Any) -> Case:
    """A network and what is asked for."""
    d = Draw(draw)
    network = draw(networks())
    method, recipe = d.one(*METHODS), d.one(*RECIPES)
    options: dict[str, Any] = {}
    if d.maybe(5):
        key, *values = d.one(
            ("target", "weights", "dense", "skip", "relu6_aware", "relu_aware"), ("fold_batchnorm", False),
            ("refit", True, False), ("reconstruct", True, False), ("bias_correction", True, False),
            ("inputs", "dense"), ("patches", 0, 1), ("holdout", 0.0, 0.3), ("polish", 1), ("damping", 0.0, 0.1),
            ("global_budget", True),
        )  # fmt: skip
        options[key] = d.one(*values)
    if options.get("global_budget") and recipe not in ("0.5", "0.9"):
        recipe = "0.5"
    if "channels" in recipe:
        options["channel_multiple"] = d.one(1, 2, 4)
    lines = [
        line.split() for line in network.script.splitlines() if "nn.Conv" in line or line.strip().startswith("self.rnn")
    ]
    layers = [line[0].removeprefix("self.") for line in lines if line[1] == "=" and "unused" not in line[0]]
    layers = [f"{name}.{d.one('weight_ih_l0', 'weight_hh_l0')}" if name.startswith("rnn") else name for name in layers]
    if recipe == "by name":
        first, second = d.one("1:4", "0.7", "dense", "rank:ratio=0.6"), d.one("2:4", "dense", "0.5")
        recipe = {d.one(*layers): first, "*": second}
    exclude = (d.one(*layers, *[name.partition(".")[0] for name in layers]),) if layers and d.maybe(2) else ()
    return Case(network, recipe, method, options, exclude)
