"""What is taken of a loader's batches: the model's inputs, in every form; and so many images of them."""

from __future__ import annotations

import types
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxprune
from fxprune.calibration.batches import (
    call_by_name,
    count,
    first_images,
    inputs_by_name,
    inputs_of,
    labels_of,
    model_inputs,
    take,
)
from fxprune.errors import CalibrationError
from fxprune.experiments.evaluation import agreement
from fxprune.passes import ReestimateBatchNorm
from fxprune.tracing import trace

X = torch.randn(12, 4, 6, 6, generator=torch.Generator().manual_seed(0))
M = torch.rand(12, 4, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3

Named = namedtuple("Named", "labels img mask")
Data = namedtuple("Data", "data target")


@dataclass(frozen=True)
class Sample:
    labels: Tensor
    img: Tensor
    mask: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: a mapping, though no dict, with its items as attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("data", {}):
            return self.data[name]
        raise AttributeError(name)


class Network(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class One(Network):
    def forward(self, img):
        return self.body(img)


class ByPlaceAlone(Network):
    def forward(self, img, /):
        return self.body(img)


class WithMask(Network):
    def forward(self, img, mask=None):
        return self.body(img if mask is None else img * mask)


class Two(Network):
    def forward(self, img, mask):
        return self.body(img * mask)


class ByNameAlone(Network):
    def forward(self, img, *, mask):
        return self.body(img * mask)


class Several(Network):
    def forward(self, *xs):
        return self.body(xs[0] * xs[1])


class OneOrMore(Network):
    def forward(self, img, *more):
        return self.body(img * more[0])


class AnyNumber(Network):
    def forward(self, *xs):
        return self.body(xs[0])


class Keywords(Network):
    def forward(self, **inputs):
        return self.body(inputs["img"] * inputs["mask"])


class Unread(Network):
    def forward(self, img, *args, **kwargs):
        return self.body(img)


class OfADict(Network):
    def forward(self, inputs):
        return self.body(inputs["img"] * inputs["mask"])


class OfAPair(Network):
    def forward(self, inputs):
        img, mask = inputs
        return self.body(img * mask)


class Mixed(Network):
    def forward(self, img, more):
        return self.body(img * more["mask"])


ALL = {"labels": Y, "mask": M, "img": X}
IMAGES: list[tuple[type[Network], Any]] = [
    (One, X),
    (One, (X, Y)),
    (One, [X, Y]),
    (One, ALL),
    (One, UserDict(ALL)),
    (One, Encoding(ALL)),
    (One, types.MappingProxyType(ALL)),
    (One, Named(Y, X, M)),
    (One, Data(X, Y)),
    (One, Sample(Y, X, M)),
    (One, {"labels": Y, "pixels": X}),
    (One, ((X, M), Y)),
    (One, ({"id": "a", "img": X}, Y)),
    (ByPlaceAlone, (X, Y)),
    (ByPlaceAlone, ALL),
    (WithMask, (X, Y)),
    (AnyNumber, X),
    (AnyNumber, (X, Y)),
    (Unread, (X, Y)),
    (Unread, ALL),
]
MASKED: list[tuple[type[Network], Any]] = [
    (WithMask, ALL),
    (WithMask, ({"img": X, "mask": M}, Y)),
    (Two, (X, M, Y)),
    (Two, ((X, M), Y)),
    (Two, ALL),
    (Two, Encoding(ALL)),
    (Two, Named(Y, X, M)),
    (Two, Sample(Y, X, M)),
    (ByNameAlone, ALL),
    (Several, (X, M, Y)),
    (OneOrMore, (X, M, Y)),
    (Keywords, Encoding(ALL)),
    (OfADict, ALL),
    (OfADict, ({"img": X, "mask": M}, Y)),
    (OfADict, Encoding(ALL)),
    (OfAPair, ((X, M), Y)),
    (OfAPair, (X, M)),
    (Mixed, (X, {"mask": M}, Y)),
    (Mixed, {"img": X, "more": {"mask": M}, "labels": Y}),
]
CASES = [(*case, X) for case in IMAGES] + [(*case, X * M) for case in MASKED]
IDS = [f"{cls.__name__}-{type(batch).__name__}-{i}" for i, (cls, batch, _) in enumerate(CASES)]


@pytest.mark.parametrize(("cls", "batch", "images"), CASES, ids=IDS)
def test_the_inputs_are_found(cls: type[Network], batch: Any, images: Tensor) -> None:
    model = cls().eval()
    graph_module = trace(model, example=batch)
    given = {
        str(n.target).lstrip("*"): x
        for n, x in inputs_of(batch, graph_module.graph.find_nodes(op="placeholder")).items()
    }
    wanted = One().eval()(images)
    assert torch.equal(call_by_name(model, given), wanted)
    assert torch.equal(call_by_name(graph_module, inputs_by_name(batch, model_inputs(graph_module), "batch")), wanted)
    assert count(batch) == count(given) == 12
    assert labels_of(batch, list(given.values())) is (Y if "labels" in str(batch) or _last(batch) is Y else None)


def _last(batch: Any) -> Any:
    return batch[-1] if isinstance(batch, (tuple, list)) else None


@pytest.mark.parametrize(
    ("cls", "batch", "images"), [case for case in CASES if case[0] in (One, Two, Keywords, OfAPair)][::3]
)
def test_compile_low_rank_and_the_others_read_alike(cls: type[Network], batch: Any, images: Tensor) -> None:
    options = fxprune.Options(polish=1)
    plain = fxprune.compile(One(), [images], progress=False, options=options)
    compiled = fxprune.compile(cls(), [batch], progress=False, options=options)
    if images is X:
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.equal(compiled.get_parameter("conv.weight") == 0, plain.get_parameter("conv.weight") == 0)
    factored = fxprune.low_rank(cls(), [batch], "ratio:0.9", progress=False)
    assert agreement(compiled, compiled, [batch]).top1 == agreement(factored, factored, [batch]).top1 == 1
    graph_module = trace(cls().eval(), example=batch)
    ReestimateBatchNorm([batch])(graph_module)
    reference = trace(One().eval())
    ReestimateBatchNorm([images])(reference)
    torch.testing.assert_close(graph_module.get_buffer("norm.running_mean"), reference.get_buffer("norm.running_mean"))


@pytest.mark.parametrize(
    ("cls", "batch", "message"),
    [
        (Two, (X,), "an input 'mask' that calibration batch 3 does not give: it is a tuple of a tensor"),
        (Two, {"img": X}, "an input 'mask' that calibration batch 3 does not give: it is a dict of img"),
        (Two, {"a": X, "b": M}, "an input 'img', 'mask' that .* yield dicts with the names of the model's inputs"),
        (Keywords, X, r"takes its inputs by name alone \(\*\*inputs\)"),
        (One, (), "batch 3 is an empty tuple"),
        (One, {}, "batch 3 is an empty dict"),
        (One, None, "batch 3 is a NoneType; expected a tensor"),
        (One, ["cat.png"], "batch 3 is a str; expected a tensor"),
        (
            One,
            X.numpy(),
            r"numpy array of shape \(12, 4, 6, 6\), float32; make .*: torch.from_numpy\(array\), or",
        ),
        (One, (np.zeros((2, 4, 6, 6), np.uint8), Y), r"uint8; .* torch.from_numpy\(array\).float\(\)"),
        (Two, (X, M / 0), "batch 3 holds NaN or infinite values"),
    ],
)
def test_batches_that_cannot_be_used(cls: type[Network], batch: Any, message: str) -> None:
    placeholders = symbolic_trace(cls().eval()).graph.find_nodes(op="placeholder")
    with pytest.raises(CalibrationError, match=message):
        inputs_of(batch, placeholders, 3)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.fc(self.table(input_ids)).mean(1)


class Scaled(Network):
    def forward(self, img):
        return self.body(img.float() / 255)


def test_integers_are_inputs_where_the_model_takes_them() -> None:
    ids = torch.randint(0, 50, (40, 7), generator=torch.Generator().manual_seed(0))
    batch = Encoding(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert fxprune.compile(Embedded(), [batch, ids], progress=False).report["fc"].status == "pruned"
    images = (X.clamp(0, 1) * 255).to(torch.uint8)
    assert fxprune.compile(Scaled(), [(images, Y)], progress=False).report["conv"].status == "pruned"


WRONG: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (
        (X.abs() * 99).to(torch.uint8),
        r"images are torch.uint8 and the weights torch.float32: .*images.float\(\) / 255",
        lambda x: x.float() / 255,
    ),
    (X.double(), r"images are torch.float64 and the weights torch.float32: give images.float\(\)", lambda x: x.float()),
    (X[0], r"no batch dimension, their shape is \(4, 6, 6\): give images.unsqueeze\(0\)", lambda x: x.unsqueeze(0)),
    (list(X), r"no batch dimension, .* torch.stack\(images\) for a list", lambda batch: torch.stack(batch)),
    (
        X.permute(0, 2, 3, 1),
        r"and these have 6.* give images.permute\(0, 3, 1, 2\)",
        lambda x: x.permute(0, 3, 1, 2),
    ),
    (
        X[:, :1],
        r"have 1: repeat the one channel, images.repeat_interleave\(4, 1\)",
        lambda x: x.repeat_interleave(4, 1),
    ),
    (torch.cat([X, X[:, :1]], 1), r"have 5: leave out a channel of opacity, images\[:, :4\]", lambda x: x[:, :4]),
    (X[:, :2], "have 2: is this the data set that the model was trained on", lambda x: torch.cat([x, x], 1)),
    (X.numpy(), r"torch.from_numpy\(array\)", torch.from_numpy),
]


@pytest.mark.parametrize(("batch", "message", "remedy"), WRONG)
@pytest.mark.parametrize("plain", [False, True], ids=["classifier", "convolutions"])
def test_the_error_for_wrong_images_says_what_to_do(
    batch: Any, message: str, remedy: Callable[[Any], Any], plain: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)) if plain else One()
    with pytest.raises(CalibrationError, match=message):
        fxprune.compile(model, [batch], progress=False)
    with pytest.raises(CalibrationError, match=message):
        fxprune.low_rank(model, [batch], "ratio:0.5", progress=False)
    mended = remedy(batch)
    assert fxprune.compile(model, [mended], progress=False).report.images == len(mended)


def test_float64_on_a_float64_model() -> None:
    assert fxprune.compile(One().double(), [X.double()], progress=False).report["conv"].status == "pruned"
    with pytest.raises(
        CalibrationError, match=r"float32 and the weights torch.float64: give images.to\(torch.float64\)"
    ):
        fxprune.compile(One().double(), [X], progress=False)


def test_so_many_images_are_taken_and_the_rest_is_not_read():
    x, read = torch.randn(20, 3, 4, 4), []

    def loader():
        for batch in x.split(8):
            read.append(len(batch))
            yield batch

    assert torch.equal(torch.cat(list(first_images(loader(), 12))), x[:12])
    assert read == [8, 8]
    assert torch.equal(torch.cat(list(first_images(loader(), 16))), x[:16])
    assert torch.equal(torch.cat(list(first_images(loader(), 50))), x)


def test_all_that_has_one_entry_for_each_image_is_cut_in_batches_of_every_kind():
    x, labels, scale = torch.randn(8, 3), torch.arange(8), torch.tensor(2.0)
    (pair,) = first_images([(x, labels)], 5)
    assert torch.equal(pair[0], x[:5])
    assert torch.equal(pair[1], labels[:5])
    (named,) = first_images([{"image": x, "scale": scale, "weights": torch.ones(3), "id": "a"}], 5)
    assert torch.equal(named["image"], x[:5])
    assert (named["scale"], named["id"], len(named["weights"])) == (scale, "a", 3)
    for batch in (Named(labels, x, x), Sample(labels, x, x), Encoding(labels=labels, img=x, mask=x)):
        taken = take(batch, slice(5))
        assert type(taken) is type(batch)
        assert torch.equal(taken.img, x[:5])
        assert len(batch.img) == 8


@pytest.mark.parametrize("images", [8, 9])
def test_a_batch_that_is_wanted_whole_is_handed_on_as_it_is(images):
    batch = torch.randn(8, 3)
    (taken,) = first_images([batch], images)
    assert taken is batch


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (UserDict(x=X), "of type UserDict"),
        (X.numpy(), r"a numpy array of shape .* torch.from_numpy\(images\).split\(128\)"),
        (X, r"images.split\(128\)"),
        (3, "of type int"),
    ],
)
def test_what_is_no_loader(loader: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxprune.compile(One(), loader, progress=False)


class ThreeInputs(nn.Module):
    def forward(self, a, b=2.0, c=3.0):
        return 100 * a + 10 * b + c


@pytest.mark.parametrize(
    ("given", "places", "value"),
    [({"a": 1.0}, 1, 123.0), ({"a": 1.0, "b": 4.0}, 2, 143.0), ({"a": 1.0, "c": 5.0}, 1, 125.0)],
)
def test_hooks_that_count_on_positions_find_the_inputs_there(given, places, value):
    model, seen = ThreeInputs(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    assert call_by_name(model, given) == value
    assert [len(inputs) for inputs in seen] == [places]
