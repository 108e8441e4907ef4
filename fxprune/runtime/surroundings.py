"""The settings that a caller has switched on around a call, put aside while it lasts: the result does not depend on them.

Autocast, gradient and inference mode, default dtype and device, deterministic algorithms, precision of float32 products,
numpy's error handling and the global random state are as they were when the call returns, or fails.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.runtime.precision import full_precision

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run in `own_surroundings` of the model among its arguments."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = next((value for value in chain(args, kwargs.values()) if isinstance(value, nn.Module)), None)
        with own_surroundings(model):
            return function(*args, **kwargs)

    return run


@contextmanager
def own_surroundings(model: nn.Module | None = None) -> Iterator[None]:
    """Work as in a fresh process, and leave everything as it was.

    The default dtype and device are float32 and the CPU. Where they are the model's own they stay, since its forward may
    make tensors that rely on them. Deterministic algorithms stay switched on, but an operation that has none is no error.
    """
    tensors = [] if model is None else [*model.parameters(), *model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        stack.enter_context(_same_random_state())
        stack.enter_context(_default_dtype(tensors))
        if torch.get_default_device().type not in ("cpu", *(tensor.device.type for tensor in tensors)):
            stack.enter_context(torch.device("cpu"))  # Only then: it slows every operation.
        stack.enter_context(_no_error_where_nothing_is_deterministic())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let what is drawn be the same every time, so that two runs can be compared."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def without_inference_tensors(model: nn.Module) -> None:
    """Give a model parameters and buffers that can be trained in place of those that inference mode has left in it.

    A forward that rebinds a buffer, or a hook that sets a weight, leaves such when it runs during calibration.
    """
    new: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    copied = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    normal = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
                    tensors[name] = new.setdefault(id(tensor), normal)  # type: ignore[assignment]


@contextmanager
def _default_dtype(tensors: list[Tensor]) -> Iterator[None]:
    before = torch.get_default_dtype()
    if not any(tensor.dtype == before for tensor in tensors):
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _no_error_where_nothing_is_deterministic() -> Iterator[None]:
    mode = torch.get_deterministic_debug_mode()  # 0 is off, 1 warns, 2 is an error.
    if mode == 2:
        torch.set_deterministic_debug_mode(1)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def _same_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - it is the caller's
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # By the call: back to the start of the sequence.
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())
