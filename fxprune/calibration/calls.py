"""What a model's children are called with when a batch goes through the whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import call_by_name, count, inputs_by_name, map_tensors, model_inputs
from fxprune.calibration.failures import said
from fxprune.errors import CalibrationError
from fxprune.graph import device_of
from fxprune.runtime.surroundings import same_random_numbers


@dataclass(frozen=True)
class Call:
    """One call of a child.

    Attributes:
        inputs: values by the names of the forward's arguments, those left to a plain default not among them; None where they
            cannot be given by name (`*args`).
        number: of the calls before it in the run, of all the children that were watched.
    """

    inputs: dict[str, Any] | None
    number: int

    @property
    def rows(self) -> int:
        """The size of the first dimension of its first tensor: images, or what a head takes for such."""
        return count(self.inputs or {})


@dataclass(frozen=True)
class Reading:
    """How a model is called with what a loader gives.

    Attributes:
        whole: whether the batch as it is is the first argument, as with a list of images; else it is read as all batches are.
    """

    whole: bool

    @staticmethod
    def of(model: nn.Module, batch: Any) -> Reading:
        """The way in which a model takes a batch: the first that it runs with.

        Raises:
            CalibrationError: it takes it in neither way.
        """
        orders = (True, False) if is_list_of_images(batch) else (False, True)
        failures = []
        for whole in orders:
            try:
                Reading(whole).run(model, batch)
            except Exception as error:  # A model may raise anything on what it does not take.
                failures.append(f"{type(error).__name__}: {said(error)}")
            else:
                return Reading(whole)
        raise CalibrationError(f"the model fails on calibration batch 0: {failures[0]}")

    def values(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """The model's inputs in a batch, by name, on the model's device."""
        if self.whole:
            given = {model_inputs(model)[0].name: batch}
        else:
            given = inputs_by_name(batch, model_inputs(model), "calibration batch")
        device = device_of(model)
        return {name: map_tensors(value, lambda x: x.to(device)) for name, value in given.items()}

    def images(self, model: nn.Module, batch: Any) -> int:
        """How many images a batch holds."""
        first = next(iter(self.values(model, batch).values()), None)
        return len(first) if isinstance(first, (list, tuple)) else count(first)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch."""
        values = map_tensors(self.values(model, batch), torch.clone)
        with torch.no_grad(), same_random_numbers():
            return call_by_name(model, values)


def is_list_of_images(batch: Any) -> bool:
    """Whether a batch is a list of images without a dimension for a batch, as detectors take it."""
    return isinstance(batch, list) and all(isinstance(x, Tensor) and x.dim() == 3 for x in batch)


def calls_of(
    run: Callable[[], Any], children: Mapping[str, nn.Module], *, keep: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, list[Call]]:
    """Run something, and give the calls of each of some modules in it.

    Args:
        run: runs the model.
        children: modules by name.
        keep: what to make of a tensor that a child is called with: it may be overwritten later.
    """
    found: dict[str, list[Call]] = {name: [] for name in children}
    with _watched(children, found, keep):
        run()
    return found


@contextmanager
def _watched(
    children: Mapping[str, nn.Module], found: dict[str, list[Call]], keep: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    numbers = iter(range(1_000_000_000))

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _by_name(module, args, kwargs)
            kept = None if given is None else {k: map_tensors(v, lambda x: keep(x.detach())) for k, v in given.items()}
            found[name].append(Call(kept, next(numbers)))

        return note

    hooks = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in children.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a module is called with by the names of its forward's arguments, without what is a plain default."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # The call itself will say so.
        return None
    given = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if value:
                return None
            continue
        plain = isinstance(value, (bool, int, float, str, type(None)))
        if not (plain and parameter.default is not parameter.empty and value == parameter.default):
            given[name] = value
    return given
