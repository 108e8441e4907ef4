from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxprune.errors import ExportError, ValidationError
from fxprune.export.inputs_outputs import example_tensors, input_names, named_outputs, other_batch, read_batch


class One(nn.Module):
    def forward(self, image: Tensor, flag: bool = False) -> Tensor:
        return image + 1


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class More(nn.Module):
    def forward(self, image: Tensor, **more: Tensor) -> Tensor:
        return image + 1


class AnyNumber(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


A, B, LABELS = torch.ones(3, 2), torch.zeros(3, 1), torch.tensor([1, 0, 1])


def test_input_names() -> None:
    assert input_names(One()) == ("image",)
    assert input_names(One(), 2) == ("image", "flag")
    assert input_names(Two()) == ("a", "b")
    assert input_names(symbolic_trace(Two())) == ("a", "b")
    assert input_names(AnyNumber(), 2) == ("input_0", "input_1")


@pytest.mark.parametrize(
    ("model", "example", "wanted"),
    [
        (One(), A, [A]),
        (One(), (A,), [A]),
        (Two(), [A, B], [A, B]),
        (Two(), (A, B, LABELS), [A, B]),
        (Two(), {"b": B, "a": A}, [A, B]),
        (nn.Identity(), (A, LABELS), [A]),
        (nn.Identity(), {"pixels": A, "label": LABELS}, [A]),
        (AnyNumber(), (A, B), [A, B]),
        (AnyNumber(), (A, LABELS), [A]),
        (One(), (A, LABELS), [A]),
        (One(), (A, B), [A, B]),
        (Two(), ((A, B), LABELS), [A, B]),
        (Two(), UserDict(b=B, a=A, label=LABELS), [A, B]),
        (nn.DataParallel(One()), (A, LABELS), [A]),
        (symbolic_trace(More()), {"image": A, "id": B}, [A]),
    ],
)
def test_example_tensors(model: nn.Module, example: Any, wanted: list[Tensor]) -> None:
    found = example_tensors(example, model)
    assert len(found) == len(wanted)
    assert all(f is w for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("example", [[], (), {}, None, ("x",), (A,)])
def test_example_tensors_errors(example: Any) -> None:
    with pytest.raises(ExportError, match=r"a tensor for each input of Two \(a, b\)"):
        example_tensors(example, Two())


@pytest.mark.parametrize(
    ("batch", "names", "inputs", "labels"),
    [
        (A, ["x"], [A], None),
        ((A,), ["x"], [A], None),
        ([A, LABELS], ["x"], [A], LABELS),
        ((A, B, LABELS), ["a", "b"], [A, B], LABELS),
        ({"x": A, "label": LABELS}, ["x"], [A], LABELS),
        ({"image": A, "class": LABELS}, ["x"], [A], LABELS),
        ({"y": LABELS, "b": B, "a": A}, ["a", "b"], [A, B], LABELS),
        ((A, "text"), ["x"], [A], None),
        (((A, B), LABELS), ["a", "b"], [A, B], LABELS),
        (({"b": B, "a": A}, LABELS), ["a", "b"], [A, B], LABELS),
        ({"labels": LABELS, "image": A}, ["x"], [A], LABELS),
        (UserDict(x=A, target=LABELS), ["x"], [A], LABELS),
    ],
)
def test_read_batch(batch: Any, names: list[str], inputs: list[Tensor], labels: Tensor | None) -> None:
    found = read_batch(batch, names, 0)
    assert all(f is w for f, w in zip(found.inputs, inputs, strict=True))
    assert found.labels is labels
    assert found.size == 3


@pytest.mark.parametrize("batch", [torch.ones(0, 2), [], ("text",), {}, 5])
def test_read_batch_errors(batch: Any) -> None:
    with pytest.raises(ValidationError, match=r"batch 7 of the loader must give .* each input \(x\)"):
        read_batch(batch, ["x"], 7)


def test_named_outputs() -> None:
    assert list(named_outputs(A)) == ["output"]
    assert list(named_outputs((A, None, [B]))) == ["output_0", "output_2_0"]
    assert list(named_outputs({"z": A, "a": {"b": B}})) == ["z", "a_b"]
    with pytest.raises(ExportError, match="output 'n' is an int"):
        named_outputs({"n": 3})
    with pytest.raises(ExportError, match="returns no tensor"):
        named_outputs([None])


@pytest.mark.parametrize(("size", "other"), [(1, 3), (2, 1), (5, 2)])
def test_other_batch(size: int, other: int) -> None:
    x, scale, ids, constant = torch.randn(size, 4), torch.randn(size, 1), torch.arange(size), torch.randn(7)
    found = other_batch((x, scale, ids, constant), same_size=False)
    assert [len(t) for t in found] == [other, other, other, 7]
    assert found[2].dtype == torch.int64
    same = other_batch((x,), same_size=True)[0]
    assert same.shape == x.shape
    assert not torch.equal(same, x)
