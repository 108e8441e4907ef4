"""Random small models with random names and values: what save accepts, load gives back the same."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import CheckpointError, TraceError
from fxprune.saving import load, save
from fxprune.tracing import trace

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
names = st.one_of(
    st.text(min_size=1, max_size=8),
    st.sampled_from(
        ["class", "in", "block1-0", "self", "torch", "forward", "training", "report", "\ufb01", "e\u0301", "1", "a b"]
    ),
)
numbers = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=5),
    st.sampled_from([
        torch.float16, torch.int8, torch.channels_last, torch.strided, torch.device("cpu"), torch.device("cuda:1"), ...,
        torch.Size([2, 3]), slice(1, None, 2), range(3), torch.relu, nn.ReLU, functools.partial(torch.flatten, start_dim=1),
        math.inf, -math.inf, math.nan, -0.0, 10**40, (), [], {}, frozenset({1}),
    ]),
)  # fmt: skip
values = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(a: Any, b: Any) -> bool:
    """Whether two values are of one type and equal; NaN is NaN, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, functools.partial):
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    return bool(a == b)


def round_trip(model: torch.fx.GraphModule) -> fxprune.CompiledModule | None:
    """The model from its file; None if `save` refuses it, in which case nothing is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        try:
            save(model, path)
        except CheckpointError:
            assert not list(Path(folder).iterdir())
            return None
        return load(path)  # An error here is a fault of save's.


def part(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "gelu": nn.GELU("tanh"),
        "padding": nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), "group": nn.GroupNorm(2, 4),
        "parametrized": torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    }  # fmt: skip
    return made[kind]


KINDS = ("conv", "norm", "relu", "gelu", "padding", "group", "parametrized")


@SETTINGS
@given(st.lists(st.tuples(names, st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=4), st.data())
def test_models_with_any_names_come_back_the_same(layers: list[tuple[str, str, bool]], data: st.DataObject) -> None:
    model = nn.Sequential()
    for name, kind, inside in layers:
        module = part(kind)
        try:
            model.add_module(name, nn.Sequential(module, nn.Identity()) if inside else module)
        except (KeyError, TypeError):  # PyTorch does not allow it
            continue
    with_weights = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not hasattr(m, "parametrizations")]
    if len(with_weights) > 1 and data.draw(st.booleans()):
        with_weights[1].weight = nn.Parameter(
            with_weights[1].weight.detach()[:, :, :1, :1].expand_as(with_weights[1].weight)
        )
    if (
        len(with_weights) > 1
        and data.draw(st.booleans())
        and with_weights[0].weight.shape == with_weights[1].weight.shape
    ):
        with_weights[1].weight = with_weights[0].weight
    for module in model.modules():
        if data.draw(st.booleans()):
            module.register_buffer("extra", data.draw(st.sampled_from([None, torch.rand(2)])), persistent=False)
        if data.draw(st.booleans()):
            module.eval()
    try:
        before = trace(model)
    except TraceError:
        return
    after = round_trip(before)
    if after is None:
        return
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(after(x), before(x))
    assert after.code == before.code
    assert list(after.state_dict()) == list(before.state_dict())
    assert [name for name, _ in after.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert [m.training for m in after.modules()] == [m.training for m in before.modules()]
    again = round_trip(after)
    assert again is not None
    assert again.code == before.code


@SETTINGS
@given(st.dictionaries(names, values, max_size=3))
def test_attributes_of_any_value_come_back_the_same(attributes: dict[str, Any]) -> None:
    module = nn.Conv2d(1, 1, 1)
    attributes = {name: value for name, value in attributes.items() if not hasattr(module, name)}
    module.__dict__.update(attributes)
    before = trace(nn.Sequential(module))
    after = round_trip(before)
    if after is not None:
        assert list(after.get_submodule("0").__dict__) == list(module.__dict__)
        for name, value in attributes.items():
            assert same(after.get_submodule("0").__dict__[name], value), name


@SETTINGS
@given(values)
def test_arguments_of_any_value_come_back_the_same(value: Any) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    try:
        graph.output((graph.call_function(torch.neg, (x,)), {"value": value}))
        before = torch.fx.GraphModule(nn.Module(), graph)
        before(torch.ones(1))
    except Exception:  # torch.fx cannot hold the value, or not write it as code
        return
    after = round_trip(before)
    if after is not None:
        assert after.code == before.code
        torch.testing.assert_close(after(torch.ones(1))[0], before(torch.ones(1))[0])
        assert repr(after(torch.ones(1))[1]) == repr(before(torch.ones(1))[1])
