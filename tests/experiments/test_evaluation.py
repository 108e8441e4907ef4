from __future__ import annotations

import math
import warnings
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from fxprune import models
from fxprune.data import load_data, load_npz, make_loader
from fxprune.errors import EvaluationError, EvaluationWarning
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.evaluation import Agreement, agreement, evaluate


class Logits(nn.Module):
    """Gives its input back as logits, moved by a fixed offset."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([offset, 0.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.offset


def batches(count: int = 25, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 3, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return list(zip(logits.split(size), labels.split(size), strict=True))


def test_accuracy_counts_images_not_batches():
    data = batches()
    assert len(data[-1][0]) == 1
    right = sum(
        int(row.argmax()) == int(label) for logits, labels in data for row, label in zip(logits, labels, strict=True)
    )
    assert 0 < right < 25
    assert evaluate(Logits(), data) == 100 * right / 25


def test_labels_may_stand_in_a_column_or_in_a_dict():
    data = batches()
    expected = evaluate(Logits(), data)
    assert evaluate(Logits(), [(x, y[:, None]) for x, y in data]) == expected
    assert evaluate(Logits(), [{"image": x, "label": y} for x, y in data]) == expected
    assert evaluate(Logits(), iter(data), device="cpu") == expected


def test_agreement_matches_the_definition():
    data = batches()
    a, b = Logits(), Logits(0.7)
    same, divergence = 0, 0.0
    for logits, _ in data:
        for row in logits.double():
            p, q = row.softmax(0), (row + b.offset.double()).softmax(0)
            same += int(p.argmax()) == int(q.argmax())
            divergence += sum(float(pi * math.log(pi / qi)) for pi, qi in zip(p, q, strict=True))
    found = agreement(a, b, data)
    assert 0 < same < 25
    assert found.top1 == same / 25
    assert found.kl == pytest.approx(divergence / 25, rel=1e-6)
    # The divergence has a direction.
    assert agreement(b, a, data).kl != pytest.approx(found.kl, rel=1e-3)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x, None], lambda x: {"image": x}])
def test_agreement_needs_no_labels(form):
    assert agreement(Logits(), Logits(), [form(x) for x, _ in batches()]) == Agreement(1.0, 0.0)
    top1, kl = agreement(Logits(), Logits(0.5), [form(x) for x, _ in batches()])
    assert top1 < 1
    assert kl > 0


def test_large_logits_give_a_finite_divergence():
    data = [torch.tensor([[1000.0, 0.0, 0.0]])]
    assert agreement(Logits(), Logits(-2000.0), data) == Agreement(0.0, pytest.approx(1000 + math.log(2)))


def test_eval_mode_during_and_old_flags_after():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    model.train()
    model[2].eval()  # a frozen BatchNorm
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model[1].register_forward_hook(lambda m, _i, _o: seen.append((m.training, torch.is_inference_mode_enabled())))
    assert agreement(model, model, batches()) == Agreement(1.0, 0.0)
    evaluate(model, batches())
    assert set(seen) == {(False, True)}
    assert [m.training for m in model.modules()] == flags
    assert not torch.is_inference_mode_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flags_come_back_after_an_error():
    model = Logits().train()
    with pytest.raises(EvaluationError):
        evaluate(model, [])
    assert model.training
    assert not torch.is_inference_mode_enabled()


class Fixed(nn.Module):
    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, _x):
        return self.output


X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            Logits(),
            [(X, Y), (X, Y + 3)],
            "batch 1 has the label 3, and the model has 3 classes, 0 to 2: .* another data set",
        ),
        (Logits(), [(X, Y - 1)], "batch 0 has the label -1, and"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()), [(torch.zeros(2, 3, 5, 5), Y)], "give grey images"),
        (nn.Sequential(nn.Conv2d(3, 3, 5), nn.Flatten()), [(torch.zeros(3, 5, 5), Y)], "no batch dimension"),
        (Logits(), [], "no batches"),
        (Logits(), [X], r"\(images, labels\) tensors; found a tensor of shape \(2, 3\)"),
        (Logits(), [(X,)], "agreement"),
        (Logits(), [(X, [0, 1])], "found a tuple of a tensor"),
        (Logits(), [(X, Y[:1])], r"2 outputs but labels of shape \(1,\)"),
        (Logits(), [([X], Y)], r"Logits failed on batch 0, input shapes \[\(2, 3\)\]"),
        (Logits(math.nan), [(X, Y)], "NaN or infinity for 2 of a batch's 2"),
        (Fixed(torch.tensor([[0.0, 1.0], [math.inf, 0.0]])), [(X, Y)], "infinity for 1 of"),
        (Fixed((X, X)), [(X, Y)], r"must give logits \(N, classes\), not tuple"),
        (Fixed(torch.zeros(2, 3, 4)), [(X, Y)], r"not \(2, 3, 4\)"),
    ],
)
def test_accuracy_errors(model, data, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, data)


def test_what_guessing_would_give_is_said():
    logits = torch.eye(3).repeat(10, 1)
    wrong, half = (logits.argmax(1) + 1) % 3, torch.where(torch.arange(30) < 15, logits.argmax(1), 0)
    with pytest.warns(
        EvaluationWarning, match=r"right on 0\.00% of 30 images, which guessing one of 3 classes would be too"
    ):
        assert evaluate(Logits(), [(logits, wrong)]) == 0
    with pytest.warns(EvaluationWarning, match="agree on 10 of 30 images"):
        agreement(Logits(), Logits(9.0), [logits])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(Logits(), [(logits, half)]) > 50
        assert agreement(Logits(), Logits(0.5), [logits]).top1 == 1


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: {"labels": y, "x": x},
        lambda x, y: UserDict(target=y, pixels=x),
        lambda x, y: namedtuple("Batch", "label x")(y, x),
        lambda x, y: ({"x": x, "name": "a"}, y),
        lambda x, y: [x, y, torch.zeros(len(x))],
    ],
)
def test_images_and_labels_are_found_in_any_form(form):
    data = batches()
    assert evaluate(Logits(), [form(x, y) for x, y in data]) == evaluate(Logits(), data)
    assert evaluate(nn.DataParallel(Logits()), [form(x, y) for x, y in data]) == evaluate(Logits(), data)


def test_agreement_errors():
    with pytest.raises(EvaluationError, match="no batches"):
        agreement(Logits(), Logits(), [])
    with pytest.raises(EvaluationError, match=r"differ in shape: \(2, 3\), \(2, 5\)"):
        agreement(Logits(), Fixed(torch.zeros(2, 5)), [X])
    with pytest.raises(EvaluationError, match="NaN"):
        agreement(Logits(), Logits(math.nan), [X])
    with pytest.raises(EvaluationError, match="batch 0 is an empty dict"):
        agreement(Logits(), Logits(), [{}])


@pytest.mark.gpu
def test_device_is_used_and_left():
    model = Logits()
    seen = []
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].device.type))
    expected = evaluate(model, batches())
    assert evaluate(model, batches(), device="cuda") == expected
    assert agreement(model, Logits(), batches(), device="cuda:0").top1 == 1
    assert seen == ["cpu"] * 4 + ["cuda"] * 8
    assert model.offset.device.type == "cpu"


def test_resnet20_has_its_published_accuracy(data_root):
    info = models.model_info("resnet20")
    model = load_weights(models.create("resnet20"), data_root / "cifar10" / "resnet20-12fca82f.th")
    splits = load_data(data_root / "cifar10" / "cifar10_subset.npz", mean=info.mean, std=info.std)
    assert len(splits.test) == 846
    # 776 of 846: a single image more or less would be 0.12 points.
    assert evaluate(model, make_loader(splits.test)) == pytest.approx(91.73, abs=0.005)


def test_jpeg_images_cost_resnet20_some_accuracy(data_root):
    info = models.model_info("resnet20")
    model = load_weights(models.create("resnet20"), data_root / "cifar10" / "resnet20-12fca82f.th")
    path = data_root / "cifar10" / "cifar10_jpeg_test.npz"
    images = load_npz(path, mean=info.mean, std=info.std, first=500)
    # 81.0% on all 10,000, give or take two standard deviations of 500 images.
    assert evaluate(model, make_loader(images)) == pytest.approx(81.0, abs=3.5)


@pytest.mark.slow
def test_resnet56_has_its_published_accuracy(data_root):
    info = models.model_info("resnet56")
    model = load_weights(models.create("resnet56"), data_root / "cifar10" / "resnet56-4bfd9763.th")
    splits = load_data(data_root / "cifar10" / "cifar10_subset.npz", mean=info.mean, std=info.std)
    assert evaluate(model, make_loader(splits.test)) == pytest.approx(93.26, abs=0.005)


def test_what_is_no_classifier_is_warned_of_where_it_may_be_none() -> None:
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(2))
    data = [torch.randn(20, 3, 2, 2)]
    with pytest.warns(EvaluationWarning, match="say nothing here: the output's 4 numbers an image do not look like"):
        agreement(a, a, data, are_classifiers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreement(a, a, data)
        b[1].weight.data *= 100  # Sure of each image, and of each of another class.
        agreement(b, b, data, are_classifiers=False)
