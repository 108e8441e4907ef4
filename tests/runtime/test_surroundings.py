"""What a caller has switched on around a call changes nothing, and is switched on afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.runtime.precision import full_precision
from fxprune.runtime.surroundings import own_surroundings, undisturbed, without_inference_tensors

X = torch.randn(32, 8, 9, 9, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers).eval()


@contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _conv_precision(value: str) -> None:
    torch.backends.mkldnn.conv.fp32_precision = value


def _all_precision(value: str) -> None:
    torch.backends.fp32_precision = value


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "error"),
    "bfloat16 products": lambda: _set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "bfloat16 convolutions": lambda: _set(lambda: "none", _conv_precision, "bf16"),
    "tf32 wherever it may be": lambda: _set(lambda: "none", _all_precision, "tf32"),
    "numpy's errors": lambda: np.errstate(all="raise"),
}


def _state() -> list[Any]:
    kinds = (
        torch.backends.mkldnn.conv,
        torch.backends.mkldnn.matmul,
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
    )
    return [
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_deterministic_debug_mode(),
        [kind.fp32_precision for kind in kinds],
        torch.backends.cudnn.allow_tf32,
        np.geterr(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global one is meant
    ]


@pytest.mark.filterwarnings("ignore::fxprune.errors.EvaluationWarning")  # The network is not trained.
@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
def test_compile_and_scores_are_the_same_and_the_state_is_as_before(around: Callable[[], Any]) -> None:
    model, options = network(), fxprune.Options(polish=1)
    plain = fxprune.compile(model, [X], progress=False, options=options)
    scores = evaluate(plain, [(X, Y)]), agreement(model, plain, [X])
    with around():
        before = _state()
        compiled = fxprune.compile(model, [X], progress=False, options=options)
        assert (evaluate(compiled, [(X, Y)]), agreement(model, compiled, [X])) == scores
        assert _state() == before
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert not any(tensor.is_inference() for tensor in compiled.state_dict(keep_vars=True).values())
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())


@pytest.mark.parametrize("name", ["autocast", "inference mode", "default dtype", "default device", "bfloat16 products"])
def test_low_rank_and_export(name: str, tmp_path: Path) -> None:
    model = network()
    plain = fxprune.low_rank(model, [X], "ratio:0.5", progress=False)
    with SURROUNDINGS[name]():
        before = _state()
        factored = fxprune.low_rank(model, [X], "ratio:0.5", progress=False)
        report = fxprune.export_onnx(factored, tmp_path / "model.onnx", X)
        assert fxprune.validate_onnx(factored, tmp_path / "model.onnx", [(X, Y)], progress=False).parity.samples == 32
        assert _state() == before
    torch.testing.assert_close(factored.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert report.parity.max_rel < 1e-5
    factored(X).sum().backward()


def test_a_model_and_images_made_in_inference_mode() -> None:
    plain = fxprune.compile(network(), [X], progress=False, options=fxprune.Options(polish=1))
    with torch.inference_mode():
        model, x = network(), X.clone()
    compiled = fxprune.compile(model, [x], progress=False, options=fxprune.Options(polish=1))
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
    compiled(X).sum().backward()


def test_a_default_that_is_the_models_own_stays() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.fc(x), torch.eye(8))  # Of the default dtype.

    with SURROUNDINGS["default dtype"]():
        model = Shifted()
        compiled = fxprune.compile(model, [torch.randn(32, 8)], progress=False)
        assert compiled(torch.randn(2, 8)).dtype == torch.float64


def test_the_random_state_is_as_before_though_the_model_draws() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x + 0.01 * torch.randn_like(x))

    model = Noisy()
    state = _state()
    fxprune.compile(model, [X], progress=False)
    assert _state() == state
    with own_surroundings():
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
    assert _state() == state


def test_all_is_put_back_after_an_error() -> None:
    @undisturbed
    def fail(model: nn.Module) -> None:
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float32
        raise ValueError

    with ExitStack() as stack:
        for name in (
            "autocast",
            "inference mode",
            "default dtype",
            "default device",
            "deterministic",
            "bfloat16 products",
        ):
            stack.enter_context(SURROUNDINGS[name]())
        before = _state()
        with pytest.raises(ValueError):  # noqa: PT011 - it says nothing
            fail(nn.ReLU())
        assert _state() == before


def test_full_precision_under_the_old_and_the_new_settings() -> None:
    kinds = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
    )
    for name in ("bfloat16 products", "tf32 wherever it may be"):
        with SURROUNDINGS[name](), full_precision():
            assert not {kind.fp32_precision for kind in kinds} & {"tf32", "bf16"}
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32


def test_tensors_of_inference_mode_are_replaced_once_for_all_names() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    without_inference_tensors(model)
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    assert model[2].weight is model[0].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
