"""How far a layer's least squares goes, and how sure a classifier is: against naive float64 references."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.geometry import LayerGeometry
from fxprune.layers import solve
from fxprune.layers.shrinkage import CORRECTION_DAMPINGS, DAMPINGS, LARGEST_FACTOR, Shrinkage, choose, rescaled
from fxprune.layers.temperature import BothLogits
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from fxprune.statistics import Centred, CrossStatistics, HessianObserver, Moments


def moments(geometry: LayerGeometry, x: Tensor, y: Tensor) -> Moments:
    observer, cross = HessianObserver(geometry), CrossStatistics.empty(geometry, torch.device("cpu"))
    observer.add(geometry, x)
    cross.update(geometry, x, y)
    return Moments(observer.statistics(), cross)


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 4, (3, 1), dilation=2, groups=4), nn.Linear(5, 7)],
    ids=["grouped", "depthwise", "linear"],
)
def test_moments_of_the_other_images_are_those_of_a_run_on_them(layer: nn.Conv2d | nn.Linear, mean: float) -> None:
    geometry = LayerGeometry.of(layer)
    shape = (12, 8 if layer.weight.shape[0] == 6 else 4, 7, 9) if isinstance(layer, nn.Conv2d) else (12, 5)
    x = torch.randn(shape, dtype=torch.float64) + mean
    with torch.no_grad():
        y = layer.double()(x) + torch.randn(1, dtype=torch.float64)
    part = torch.arange(len(x)) % 4 == 1
    found = moments(geometry, x, y).without(moments(geometry, x[part], y[part]))
    wanted = moments(geometry, x[~part], y[~part]).centred
    for name in ("hessian", "target", "mean", "mean_target"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-7, atol=1e-7)


def linear_problem(
    images: int, noise: float, correction: float, seed: int
) -> tuple[Tensor, Moments, Moments, Tensor, Tensor]:
    """Dense weights, moments of all images and of every fourth, and a thousand images more; the wanted output has noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 5, 40
    dense, change = torch.randn(2, 1, rows, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(images + 1000, columns, dtype=torch.float64, generator=generator)
    y = x @ (dense + correction * change)[0].mT
    y += noise * torch.randn(y.shape, dtype=torch.float64, generator=generator)
    geometry = LayerGeometry.of(nn.Linear(columns, rows))
    of_all, check = moments(geometry, x[:images], y[:images]), moments(geometry, x[:images:4], y[:images:4])
    return dense, of_all, check, x[images:], y[images:]


def test_a_correction_that_holds_on_other_images_is_followed_and_noise_is_not() -> None:
    dense, whole, check, _, _ = linear_problem(4000, noise=0.1, correction=0.5, seed=0)
    assert choose(dense, whole, check, 0.01, 0.0) == Shrinkage(0.01, 0.01)
    dense, whole, check, _, _ = linear_problem(60, noise=3.0, correction=0.0, seed=0)
    assert choose(dense, whole, check, 0.01, 0.0).strength < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_errs_less_on_new_images_than_the_whole_correction(seed: int) -> None:
    dense, whole, check, x, y = linear_problem(60, noise=3.0, correction=0.3, seed=seed)
    seen = whole.centred

    def error(shrinkage: Shrinkage) -> float:
        weight = shrinkage.problem(dense, seen).optimum()
        return float((y - x @ weight[0].mT).square().mean())

    assert error(choose(dense, whole, check, 0.01, 0.0)) < 0.8 * error(Shrinkage(0.01, 0.01))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_problem_has_the_shrunk_correction_as_its_optimum(strength: float) -> None:
    dense, whole, _, _, _ = linear_problem(60, noise=1.0, correction=0.3, seed=0)
    seen = whole.centred
    identity = seen.hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(40, dtype=torch.float64)
    residual = seen.target - dense @ seen.hessian
    wanted = dense + strength * torch.linalg.solve(seen.hessian + 0.7 * identity, residual.mT).mT
    problem = Shrinkage(0.02, 0.7, strength).problem(dense, seen, {})
    torch.testing.assert_close(problem.optimum(), wanted)
    torch.testing.assert_close(problem.hessian, seen.hessian + 0.02 * identity)


def test_the_whole_correction_at_the_least_damping_is_the_ordinary_problem() -> None:
    dense, whole, _, _, _ = linear_problem(60, noise=1.0, correction=0.3, seed=0)
    seen = whole.centred
    found, ordinary = Shrinkage(0.1, 0.1).problem(dense, seen), LayerProblem(seen.hessian, seen.target, dense)
    torch.testing.assert_close(found.hessian, ordinary.damped(0.1).hessian)
    torch.testing.assert_close(found.target, ordinary.damped(0.1).target)


@pytest.mark.parametrize(("images", "least"), [(50, 0.1), (20_000, 0.01)])
def test_few_images_need_more_damping_for_what_the_others_make_up_for(images: int, least: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    x = torch.randn(images + 1000, 40, dtype=torch.float64, generator=generator) @ mixing
    dense = torch.randn(1, 30, 40, dtype=torch.float64, generator=generator)
    y, geometry = x @ dense[0].mT, LayerGeometry.of(nn.Linear(40, 30))
    whole, check = moments(geometry, x[:images], y[:images]), moments(geometry, x[:images:4], y[:images:4])
    chosen = choose(dense, whole, check, 0.01, 0.5)
    assert chosen.damping >= least if images == 50 else chosen.damping == least
    # On new inputs, with a mask: no other damping that was tried does better by more than a tenth.
    mask = dense.abs() >= dense.abs().median(-1, keepdim=True).values

    def error(damping: float) -> float:
        problem = Shrinkage(damping, 0.01).problem(dense, whole.centred)
        weight = refit(next(problem.groups()), mask[0])
        return float((y[images:] - x[images:] @ weight.mT).square().mean())

    assert error(chosen.damping) < 1.1 * min(map(error, (0.01, *DAMPINGS)))


def test_no_damping_below_the_one_asked_for_is_chosen() -> None:
    dense, whole, check, _, _ = linear_problem(4000, noise=0.1, correction=0.5, seed=0)
    for sparsity in (0.0, 0.5):
        for least in (0.5, 99.0):
            chosen = choose(dense, whole, check, least, sparsity)
            assert chosen.damping >= least
            assert chosen.correction_damping >= least
    assert max(*DAMPINGS, *CORRECTION_DAMPINGS) < 99


def test_rows_are_rescaled_to_fit_best_but_never_shrunk() -> None:
    weight, x = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 6, 50, dtype=torch.float64)
    factor = torch.tensor([[0.5, 1.4, 7.0], [1.0, 1.9, 1.1]], dtype=torch.float64)
    hessian, target = x @ x.mT, factor[..., None] * weight @ (x @ x.mT)
    seen = Centred(hessian, target, x.mean(-1), x.mean(-1))
    problem = LayerProblem(hessian, target, weight).damped(0.1)
    found = rescaled(weight, seen, problem)
    torch.testing.assert_close(found, weight * factor.clamp(1, LARGEST_FACTOR)[..., None])
    assert torch.equal(rescaled(weight * 0, seen, problem), weight * 0)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.classifier = nn.Linear(64, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(10 * (self.features(x) - 0.05))
        return 20 * x if self.training else x


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        model.classifier.weight *= 6
        model.classifier.weight -= model.classifier.weight.mean(0)  # As training under a softmax leaves it.
    return model


def test_few_images_give_a_model_that_is_better_on_others(trained: nn.Module) -> None:
    images, others = torch.randn(80, 3, 16, 16), torch.randn(1000, 3, 16, 16)

    def kl(**options: bool) -> float:
        compiled = fxprune.compile(
            trained, images.split(30), "1:4", options=Options(holdout=0, **options), progress=False
        )
        with torch.no_grad():
            wanted, found = trained(others).double().log_softmax(1), compiled(others).double().log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum(1).mean())

    assert kl() < 0.8 * kl(shrink=False, temperature=False)


def test_the_report_says_what_was_chosen(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(80, 3, 16, 16)
    plain = fxprune.compile(trained, images.split(30), "1:4", options=Options(temperature=False), progress=False)
    seen: list[BothLogits] = []
    monkeypatch.setattr(solve, "logit_scale", lambda logits: seen.append(logits) or 1.5)
    compiled = fxprune.compile(trained, images.split(30), "1:4", progress=False)
    rows = compiled.report.layers
    assert all(0 <= row.correction <= 1 for row in rows[2:])
    assert rows[-1].logit_scale == 1.5
    torch.testing.assert_close(compiled(images), 1.5 * plain(images))
    (logits,) = seen
    assert logits.mixed
    assert logits.dense.shape == logits.found.shape
    assert {row.logit_scale for row in rows[:-1]} == {1}
    off = Options(shrink=False, temperature=False)
    rows = fxprune.compile(trained, images.split(30), "1:4", options=off, progress=False).report.layers
    assert {(row.correction, row.logit_scale) for row in rows} == {(None, 1)}
    rows = fxprune.compile(trained, images.split(30), "1:4", method="sparsegpt", progress=False).report.layers
    assert {(row.correction, row.logit_scale) for row in rows} == {(None, 1)}


def test_only_what_the_model_puts_out_as_scores_of_an_image_is_scaled(trained: nn.Module) -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    class Two(Classifier):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x.mean()

    def taught(model: nn.Module) -> nn.Module:
        model.load_state_dict(trained.state_dict())
        return model

    regressor = copy.deepcopy(trained)
    with torch.no_grad():
        regressor.classifier.weight += trained.classifier.weight.std()  # Rows that do not sum to zero.
    images = torch.randn(80, 3, 16, 16)
    for model in (taught(Scaled()), taught(Two()), trained.features[:5], regressor):
        report = fxprune.compile(model.eval(), images.split(30), "1:4", progress=False).report
        assert {row.logit_scale for row in report.layers} == {1}
    assert fxprune.compile(trained, images.split(30), "1:4", progress=False).report.layers[-1].logit_scale != 1


@pytest.mark.parametrize(("images", "few"), [(24, True), (60, True), (60, False), (400, False)])
def test_trials_of_wide_layers_find_what_those_of_narrow_ones_do(
    images: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, by conjugate gradients and, where H of few patches has so low a rank, on few columns."""
    shrinkage, problem = (
        importlib.import_module(f"fxprune.{name}") for name in ("layers.shrinkage", "solvers.problem")
    )
    dense, whole, check, _, _ = linear_problem(images, noise=1.0, correction=0.5, seed=3)
    narrow = choose(dense, whole, check, 0.01, 0.5)
    for module in (shrinkage, problem):
        monkeypatch.setattr(module, "WIDE", 1)
    columns = importlib.import_module("fxprune.solvers.few_columns")
    monkeypatch.setattr(columns, "LOW_RANK", 1 if few else 10**6)
    wide = choose(dense, whole, check, 0.01, 0.5)
    assert (wide.damping, wide.correction_damping) == (narrow.damping, narrow.correction_damping)
    assert wide.strength == pytest.approx(narrow.strength, rel=0.02)
    seen = whole.centred
    expected, found = narrow.problem(dense, seen), wide.problem(dense, seen, rank=images)
    scale = expected.weight.abs().max()
    assert float((found.weight - expected.weight).abs().max()) < 0.02 * float(scale)
    torch.testing.assert_close(found.target, found.weight @ found.hessian, rtol=1e-4, atol=1e-4 * float(scale))
