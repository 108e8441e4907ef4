"""What is measured at the model's output, and whether it has classes to agree on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.calibration.output_score import OutputScore


def score(dense: Tensor, pruned: Tensor, size: int = 7) -> OutputScore:
    found = OutputScore()
    for of_both in zip(dense.split(size), pruned.split(size), strict=True):
        found.update(*of_both)
    return found.summed()


def test_agreement_kl_and_error() -> None:
    dense = 5 * torch.randn(50, 10)
    pruned = dense + torch.randn(50, 10)
    found = score(dense, pruned)
    log_dense, log_pruned = dense.double().log_softmax(1), pruned.double().log_softmax(1)
    assert found.share == float((dense.argmax(1) == pruned.argmax(1)).double().mean())
    assert found.kl == pytest.approx(float(F.kl_div(log_pruned, log_dense, reduction="batchmean", log_target=True)))
    error = (pruned - dense).square().sum() / (dense - dense.mean(0)).square().sum()
    assert found.relative_errors == (pytest.approx(float(error), rel=1e-5),)
    assert found.why_no_classes == ""


def test_probabilities_are_taken_as_such() -> None:
    dense, pruned = (x.softmax(1) for x in (5 * torch.randn(50, 10), 5 * torch.randn(50, 10)))
    found = score(dense, pruned)
    wanted = (dense.double() * (dense.double().log() - pruned.double().log())).sum(1).mean()
    assert found.kl == pytest.approx(float(wanted), rel=1e-5)
    assert found.why_no_classes == ""


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (torch.randn(50, 1), "one number an image"),
        (torch.rand(50, 4), "4 numbers an image do not look like the logits"),
        (100 * torch.rand(1, 10) + torch.randn(50, 10), "10 numbers an image do not look like the logits"),
        (F.normalize(torch.randn(50, 64)), "64 numbers an image do not look like the logits"),
        (torch.randn(50, 1, 4, 4), "N x 1 x 4 x 4, not logits"),
    ],
)
def test_other_outputs_have_an_error_alone(outputs: Tensor, why: str) -> None:
    found = score(outputs, 0.9 * outputs)
    assert why in found.why_no_classes
    assert len(found.relative_errors) == 1


def test_errors_of_several_outputs_in_their_order() -> None:
    found = OutputScore()
    boxes, classes = torch.randn(20, 4), torch.randn(20, 3, 5, 5)
    for part in (slice(8), slice(8, None)):
        dense = {"boxes": boxes[part], "classes": [classes[part]], "count": torch.tensor(3)}
        found.update(dense, {"boxes": boxes[part] + 0.1, "classes": [classes[part]], "count": torch.tensor(3)})
    wanted = 20 * 4 * 0.01 / float((boxes - boxes.mean(0)).square().sum())
    assert found.summed().relative_errors == (pytest.approx(wanted, rel=1e-4), 0.0)
    assert found.summed().why_no_classes == "the model puts out 2 tensors, not one of logits (N, classes)"


class Head(nn.Sequential):
    def __init__(self, outputs: int, size: float) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, outputs))
        with torch.no_grad():
            self[-1].weight *= size
            if size > 1:  # As a softmax leaves it.
                self[-1].weight -= self[-1].weight.mean(0)


@pytest.mark.parametrize(("size", "told"), [(50.0, "top-1 agreement"), (0.1, "No agreement and no KL")])
def test_the_report_shows_what_there_is(size: float, told: str) -> None:
    compiled = fxprune.compile(Head(10, size).eval(), torch.randn(80, 3, 8, 8).split(20), progress=False)
    report = compiled.report
    assert told in report.summary
    assert ("agreement with" in report.summary) == (size > 1)
    assert report.output_errors == (report["3"].relative_error,)
    assert bool(report.why_no_classes) == (size < 1)


def test_single_numbers_need_no_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixtures(*_: object) -> None:
        raise AssertionError("mixtures were made")

    monkeypatch.setattr("fxprune.calibration.mixtures.Mixing.mixtures", mixtures)
    images = torch.randn(80, 3, 8, 8).split(20)
    fxprune.compile(Head(1, 1.0).eval(), images, progress=False)
    with pytest.raises(AssertionError, match="mixtures were made"):
        fxprune.compile(Head(2, 1.0).eval(), images, progress=False)


def test_a_model_that_was_compressed_before_is_called_so() -> None:
    images = torch.randn(80, 3, 8, 8).split(20)
    factored = fxprune.low_rank(Head(10, 50.0).eval(), images, exclude=["3"], progress=False)
    assert factored.report.given == ""
    report = fxprune.compile(factored, images, exclude=["3"], progress=False).report
    assert report.given == "factored (rank macs:0.7) with data_aware"
    assert (
        "top-1 agreement with the model given, which was factored (rank macs:0.7) with data_aware before"
        in report.summary
    )
    assert "the dense model" not in report.summary
