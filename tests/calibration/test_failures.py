"""Whatever a user's forward raises becomes an error that says where, on which batch and on what shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CalibrationError, EvaluationError
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.passes import ReestimateBatchNorm
from fxprune.tracing import trace

X = torch.randn(8, 4, 9, 9)


class Full(Exception):  # noqa: N818 - a user's own
    """No relation to any of Python's."""


class Gate(nn.Module):
    """Lets pass what is as wide as it expects; else raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 7:
            raise self.error
        return x * 1


torch.fx.wrap("refuse")


def refuse(x: Tensor) -> Tensor:
    if x.shape[-1] != 9:
        raise KeyError("size")
    return x + 0


class Network(nn.Sequential):
    def __init__(self, error: BaseException) -> None:
        super().__init__(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), Gate(error), nn.Conv2d(8, 4, 3))


class Wrapped(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(refuse(x))


ERRORS = (
    AssertionError("narrow"),
    KeyError("width"),
    Full(),
    StopIteration("end"),
    AttributeError("no width"),
    OSError(2, "gone"),
)
CALLS: list[Callable[[nn.Module, Any], Any]] = [
    lambda model, batches: fxprune.compile(model, batches, exclude=("2",), progress=False),
    lambda model, batches: fxprune.compile(model, batches, method="magnitude", exclude=("2",), progress=False),
    lambda model, batches: fxprune.low_rank(model, batches, "ratio:0.5", exclude=("2",), progress=False),
    lambda model, batches: ReestimateBatchNorm(batches)(trace(model, exclude=("2",))),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_the_message_names_node_batch_and_shapes(call: Callable[[nn.Module, Any], Any], error: BaseException) -> None:
    with pytest.raises(CalibrationError) as caught:
        call(Network(error), [X, X, X[..., 1:]])
    assert "calibration batch 2 at node '_2' (2), input shapes [(8, 8, 7, 6)]" in str(caught.value)
    assert type(error).__name__ in str(caught.value)
    assert type(caught.value.__cause__) is type(error)


def test_on_the_first_batch_too_and_in_functions_and_assertions() -> None:
    class Asserting(Network):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[-1] == 9, "nine, please")
            return super().forward(x)

    with pytest.raises(
        CalibrationError, match=r"batch 0 at node '_2' \(2\), input shapes \[\(4, 8, 7, 3\)\]|\(8, 8, 7, 3\)"
    ):
        CALLS[0](Network(Full()), [X[..., :5]])
    with pytest.raises(CalibrationError, match=r"batch 0 at node 'refuse' .*KeyError: 'size'"):
        CALLS[0](Wrapped(Full()), [X[..., :5]])
    with pytest.raises(CalibrationError, match=r"batch 1 at node '_assert'.*AssertionError: nine, please"):
        CALLS[0](Asserting(Full()), [X, X[..., :5]])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("call", CALLS)
def test_interruption_and_lack_of_memory_stay_what_they_are(
    call: Callable[[nn.Module, Any], Any], error: BaseException
) -> None:
    for batches in ([X, X[..., 1:]], [X[..., 1:]]):
        with pytest.raises(type(error)):
            call(Network(error), batches)


def test_a_model_of_one_batch_size_fails_in_polish_with_its_remedy() -> None:
    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(80, -1)

    images = torch.randn(80, 4, 9, 9)
    with pytest.raises(CalibrationError, match=r"16 images of a calibration batch at node 'view'.* takes 16 at a time"):
        fxprune.compile(
            Fixed(nn.Conv2d(4, 8, 3)), [images], progress=False, options=fxprune.Options(polish=1, patches=0, holdout=0)
        )


def test_evaluation() -> None:
    model = nn.Sequential(Network(Full()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(EvaluationError, match=r"Sequential failed on batch 1, input shapes \[\(8, 4, 9, 8\)\]: Full"):
        agreement(model, model, [X, X[..., 1:]])
    with pytest.raises(MemoryError):
        evaluate(nn.Sequential(Network(MemoryError()), nn.Flatten()), [(X[..., 1:], torch.zeros(8))])
