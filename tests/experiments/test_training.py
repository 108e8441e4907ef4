from __future__ import annotations

import csv
import dataclasses
import math
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import CheckpointError, FxPruneError, OptionsError
from fxprune.experiments.checkpoints import load_checkpoint
from fxprune.experiments.training import Epoch, Step, TrainingError, read_log, train
from fxprune.experiments.training_recipe import TrainingRecipe

CENTRES = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]])


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def loader(count: int = 120, batch_size: int = 20, *, shuffle: bool = True) -> DataLoader:
    """Images of three colours with noise: a task that a small model learns in seconds."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    images = CENTRES[labels][:, :, None, None] + torch.randn(count, 3, 2, 2, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size, shuffle=shuffle)


def fit(recipe: TrainingRecipe, seed: int = 0, **kwargs: object) -> tuple[nn.Module, tuple[Epoch, ...]]:
    model = small_model(seed)
    return model, train(model, loader(), loader(shuffle=False), recipe, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_it_learns(optimizer: str, schedule: str) -> None:
    rate = {"sgd": 0.1, "adamw": 0.02}[optimizer]
    model, log = fit(TrainingRecipe(4, optimizer, rate, schedule=schedule, label_smoothing=0.1, channels_last=True))  # type: ignore[arg-type]
    assert log[-1].val_accuracy > 85
    assert log[-1].train_loss < log[0].train_loss
    assert not model.training


def test_one_cycle_rates_by_hand() -> None:
    recipe = TrainingRecipe(learning_rate=1.0)
    assert recipe.rate(0, 100) == pytest.approx(0.04)
    assert recipe.rate(15, 100) == pytest.approx(0.52)  # half way up
    assert recipe.rate(30, 100) == pytest.approx(1.0)
    assert recipe.rate(65, 100) == pytest.approx(0.5)  # half way down
    assert recipe.rate(99, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 69 / 70)))


def test_cosine_rates_by_hand() -> None:
    recipe = TrainingRecipe(optimizer="adamw", schedule="cosine")
    assert [recipe.rate(step, 4) for step in range(4)] == pytest.approx(
        [2e-3, 1e-3 * (1 + 0.5**0.5), 1e-3, 1e-3 * (1 - 0.5**0.5)]
    )


def test_one_step_of_sgd_is_torchs() -> None:
    model, reference = small_model(), small_model()
    images, labels = next(iter(loader(20)))
    batch = [(images, labels)]
    recipe = TrainingRecipe(epochs=1, learning_rate=0.5, schedule="cosine", weight_decay=0.1)
    train(model, batch, batch, recipe)

    nn.functional.cross_entropy(reference.train()(images), labels).backward()
    for name, parameter in reference.named_parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        gradient = parameter.grad + decay * parameter.detach()
        # The first Nesterov step: g + momentum * g.
        torch.testing.assert_close(model.get_parameter(name), parameter - 0.5 * 1.9 * gradient)


def test_label_smoothing_changes_the_loss() -> None:
    _, plain = fit(TrainingRecipe(epochs=1))
    _, smooth = fit(TrainingRecipe(epochs=1, label_smoothing=0.3))
    assert smooth[0].train_loss != plain[0].train_loss


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path) -> None:
    recipe = TrainingRecipe(epochs=4)
    whole, whole_log = fit(recipe, folder=tmp_path / "whole")

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, folder=tmp_path / "parts", on_epoch=stop)
    # Other weights and another random state to start from: all must come from the checkpoint.
    resumed, log = fit(recipe, seed=5, folder=tmp_path / "parts", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert [dataclasses.replace(e, seconds=0) for e in log] == [dataclasses.replace(e, seconds=0) for e in whole_log]


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    model, log = fit(TrainingRecipe(epochs=2), folder=tmp_path)
    again, log_again = fit(TrainingRecipe(epochs=2), seed=3, folder=tmp_path, resume=True)
    assert log_again == log
    assert torch.equal(again[0].weight, model[0].weight)  # type: ignore[index]


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    fit(TrainingRecipe(epochs=1), folder=tmp_path)
    with pytest.raises(TrainingError, match=r"another recipe \(epochs 1 there, 3 here\)"):
        fit(TrainingRecipe(epochs=3), folder=tmp_path, resume=True)


def test_resuming_with_nothing_there_starts_anew(tmp_path: Path) -> None:
    _, log = fit(TrainingRecipe(epochs=1), folder=tmp_path, resume=True)
    assert [epoch.epoch for epoch in log] == [1]


def test_best_checkpoint_and_log(tmp_path: Path) -> None:
    _, log = fit(TrainingRecipe(epochs=3, learning_rate=0.01), folder=tmp_path)
    best = max(log, key=lambda epoch: epoch.val_accuracy)
    model = small_model(9)
    checkpoint = load_checkpoint(tmp_path / "best.pt", model)
    assert (checkpoint.epoch, checkpoint.accuracy) == (best.epoch, best.val_accuracy)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["val_accuracy"]) for row in rows] == [epoch.val_accuracy for epoch in log]
    assert tuple(read_log(tmp_path / "log.csv")) == log


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(epoch: Epoch) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond that

    try:
        with pytest.raises((CheckpointError, OSError), match=r"cannot write .*\.pt: .* is unchanged|File too large"):
            fit(TrainingRecipe(epochs=3), folder=tmp_path, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / "last.pt", small_model()).epoch == 1
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "best.pt", "log.csv"}
    # The log may be ahead of the checkpoint; resuming goes by the checkpoint.
    _, log = fit(TrainingRecipe(epochs=3), folder=tmp_path, resume=True)
    assert [epoch.epoch for epoch in log] == [1, 2, 3]


def test_progress_is_reported() -> None:
    steps: list[Step] = []
    fit(TrainingRecipe(epochs=2), on_step=steps.append)
    assert [(s.epoch, s.step, s.steps) for s in steps] == [(1, 6, 6), (2, 6, 6)]
    assert all(0 <= s.accuracy <= 100 and s.loss > 0 for s in steps)


def test_a_last_batch_of_one_image_is_left_out() -> None:
    # BatchNorm over (1, C, 1, 1) would raise.
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))
    log = train(model, loader(41), loader(shuffle=False), TrainingRecipe(epochs=1))
    assert math.isfinite(log[0].train_loss)


def test_a_loss_that_explodes_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"the loss became .* in epoch 1.*lower learning rate than 1e\+30"):
        fit(TrainingRecipe(epochs=1, learning_rate=1e30))


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no batches"):
        train(small_model(), [], loader(), TrainingRecipe(epochs=1))


def test_a_model_without_weights_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        train(nn.Sequential(nn.BatchNorm2d(3)), loader(), loader(), TrainingRecipe(epochs=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("optimizer", "lion"), ("learning_rate", 0.0), ("momentum", 1.0), ("weight_decay", -1.0),
     ("schedule", "step"), ("label_smoothing", 1.0)],
)  # fmt: skip
def test_bad_recipes_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionsError, match=f"{name} is "):
        TrainingRecipe(**{name: value})  # type: ignore[arg-type]


def test_a_damaged_log_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("epoch,what\n1,2\n")
    with pytest.raises(TrainingError, match=r"log\.csv"):
        read_log(tmp_path / "log.csv")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(TrainingRecipe(epochs=1), folder=tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        train(
            nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
            loader(),
            loader(),
            TrainingRecipe(epochs=1),
            folder=tmp_path,
            resume=True,
        )
    assert issubclass(TrainingError, FxPruneError)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_precision_learns(channels_last: bool) -> None:
    model, log = fit(TrainingRecipe(epochs=4, amp=True, channels_last=channels_last), device="cuda")
    assert log[-1].val_accuracy > 85
    assert next(model.parameters()).dtype == torch.float32
