"""What the processes of `tests.process_group` run: in a module that they can import."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxprune
from fxprune import Calibration, Options
from fxprune.calibration.output_error import OutputError
from fxprune.experiments.grid import Grid, run_grid
from fxprune.experiments.grid_rows import Row
from fxprune.geometry import LayerGeometry
from fxprune.models import register
from fxprune.passes import ReestimateBatchNorm
from fxprune.runtime import processes
from fxprune.solvers import shared_out
from fxprune.statistics import CrossStatistics, HessianObserver
from fxprune.tracing import trace

IMAGES, BATCH = 200, 16


class Net(nn.Module):
    """A residual network, small and of every kind of layer that there is a target for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.fc = nn.Linear(32, 12)
        with torch.no_grad():  # As after training under a softmax: its logits are scaled.
            self.fc.weight.copy_(10 * (self.fc.weight - self.fc.weight.mean(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        x = torch.relu(self.down(torch.relu(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


class Parts(nn.Module):
    """A model that is no graph, of two children that are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if bool(x.detach().numpy().mean() > -1e9) else x


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def images(count: int = IMAGES, *, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    brightness = torch.rand(count, 3, 1, 1, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator) + brightness


def outcome(compiled: Any) -> dict[str, Any]:
    """What is compared over processes."""
    report = compiled.report
    return {
        "state": compiled.state_dict(),
        "images": (report.images_read, report.images, report.images_held_out),
        "errors": {layer.name: layer.relative_error for layer in report.layers if layer.relative_error is not None},
        "scores": (report.agreement, report.kl),
        "warnings": report.warnings,
    }


def compiled(
    recipe: Any = "2:4", settings: dict[str, Any] | None = None, kind: type[nn.Module] = Net
) -> dict[str, Any]:
    """In float64, in which rounding turns no choice."""
    settings = {"progress": False, **(settings or {})}
    return outcome(fxprune.compile(net(kind).double(), images().double().split(BATCH), recipe, **settings))


def compiled_in_single() -> dict[str, Any]:
    return outcome(fxprune.compile(net(), images().split(BATCH), progress=False))


def compiled_by_rows() -> dict[str, Any]:
    """Where even small layers are shared out."""
    usual, shared_out.LEAST_WORK = shared_out.LEAST_WORK, 0
    try:
        return compiled()
    finally:
        shared_out.LEAST_WORK = usual


def compiled_on(shares: list[list[Tensor]]) -> dict[str, Any]:
    """On a share of one's own."""
    own = shares[processes.world().number] if processes.world().count > 1 else [x for share in shares for x in share]
    return outcome(fxprune.compile(net().double(), (batch.double() for batch in own), progress=False))


def compiled_on_sampler(count: int, batch: int, drop_last: bool) -> dict[str, Any]:
    data = TensorDataset(images(count))
    loader = DataLoader(data, batch, sampler=DistributedSampler(data, shuffle=False, drop_last=drop_last))
    return outcome(fxprune.compile(net(), loader, progress=False))


def shuffled() -> None:
    torch.manual_seed(processes.world().number)
    fxprune.compile(net(), DataLoader(TensorDataset(images()), 16, shuffle=True), progress=False)


def low_rank() -> dict[str, Any]:
    return outcome(fxprune.low_rank(net().double(), images().double().split(BATCH), progress=False))


def scanned() -> list[tuple[str, str, float]]:
    found = fxprune.scan(net().double(), images().double().split(BATCH), ["2:4", "1:4"], progress=False)
    return [(layer.name, layer.recipe, layer.cost) for layer in found.layers if layer.cost == layer.cost]


def read_shares(shares: list[list[Tensor]] | None, again: bool) -> dict[str, Any]:
    """What a calibration set says of itself, to each process."""
    here = processes.world()
    own = images().split(BATCH) if shares is None else shares[here.number]
    calibration = Calibration(iter(own))
    with processes.together():
        head, fitted = torch.cat(calibration.head(70)), torch.cat(calibration.fitted_head(64))
        if again:
            calibration.hold()
        batches = list(calibration)
        longer = torch.cat(calibration.head(190)) if again else None
        return {
            "head": head,
            "fitted": fitted,
            "own": batches,
            "numbers": [calibration.number(k) for k in range(len(batches))],
            "longer": longer,
        }


def broken_loader(process: int) -> Iterator[Tensor]:
    for number, batch in enumerate(images().split(BATCH)):
        if number == 3 and processes.world().number == process:
            raise OSError("the disk is gone")
        yield batch


def failing(how: str) -> Any:
    here = processes.world()
    if how == "loader":
        return fxprune.compile(net(), broken_loader(1), progress=False)
    if how == "nan":
        own = [batch.clone() for batch in images().split(BATCH)[here.number :: here.count]]
        if here.number == 1:
            own[2][0] = torch.nan
        return fxprune.compile(net(), own, progress=False)
    if how == "ctrl-c":
        batches = (batch if here.number == 0 or k < 3 else interrupt() for k, batch in enumerate(images().split(BATCH)))
        return fxprune.compile(net(), batches, progress=False)
    if how == "weights":
        model = net()
        with torch.no_grad():
            model.fc.weight[0, 0] += here.number  # type: ignore[index, union-attr]
        return fxprune.compile(model, images().split(BATCH), progress=False)
    if how == "recipe":
        return fxprune.compile(net(), images().split(BATCH), "2:4" if here.number else "1:4", progress=False)
    if how == "mixed shares":
        return fxprune.compile(net(), images().split(BATCH)[max(0, here.number - 1) :], progress=False)
    if how == "ends apart":
        return fxprune.compile(net(), images().split(BATCH)[: 9 + here.number], progress=False)
    raise AssertionError(how)


def interrupt() -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)  # Another thread may be the one that gets it first.
    raise AssertionError("a KeyboardInterrupt comes first")


def still_there() -> int:
    return sum(processes.gathered(processes.world().number))


def moments(with_offset: tuple[bool, ...], shares: tuple[int, ...], kernel: int) -> dict[str, Tensor]:
    """Those of a layer whose processes see different numbers of images, some with a mean far from zero."""
    here = processes.world()
    x = images(sum(shares), size=7).double()
    far = torch.cat([torch.full((n,), 1e3 if far else 0.0) for n, far in zip(shares, with_offset, strict=True)])
    x = x + far[:, None, None, None]
    layer = nn.Conv2d(3, 5, kernel, padding=kernel // 2).double() if kernel else nn.Linear(3, 5).double()
    with torch.no_grad():
        for p, generator in zip(layer.parameters(), (2, 3), strict=True):
            p.requires_grad_(False).copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(generator)))
    x = x if kernel else x.movedim(1, -1)
    own = x.split(list(shares))[here.number] if here.count > 1 else x
    geometry = LayerGeometry.of(layer)
    observer, cross = HessianObserver(geometry), CrossStatistics.empty(geometry, torch.device("cpu"))
    error = OutputError(1 - own.dim() if kernel else -1)
    with torch.no_grad():
        for batch in own.split(3):
            y = layer(batch)
            observer.add(geometry, batch)
            cross.update(geometry, batch, y)
            error.update(y, y + 0.1 * y.sin())
    inputs, cross = observer.statistics(), cross.summed()
    (error,) = OutputError.summed([error])
    return {
        "hessian": inputs.hessian(centred=True),
        "gram": inputs.gram,
        "mean": inputs.mean,
        "target": cross.target(inputs, None, centred=True),
        "plain target": cross.target(inputs, layer.bias, centred=False),
        "output": cross.mean,
        "error": torch.tensor([error.relative, error.variance, error.count]),
    }


def batchnorm() -> dict[str, Tensor]:
    graph_module = trace(net())
    ReestimateBatchNorm(images().split(BATCH))(graph_module)
    return graph_module.state_dict()


def checkpointed(folder: str, kill_after: int | None) -> dict[str, Any] | None:
    """A run that ends after so many layers, or one that goes on from there."""
    from fxprune.layers.checkpoint import LayerCheckpoint

    save = LayerCheckpoint.save
    saved = []

    def limited(self: LayerCheckpoint, name: str, layer: Any) -> None:
        save(self, name, layer)
        saved.append(name)
        if len(saved) == kill_after:
            raise KeyboardInterrupt

    LayerCheckpoint.save = limited  # type: ignore[method-assign]
    try:
        options = Options(permute=False)
        found = fxprune.compile(net(), images().split(BATCH), progress=False, options=options, checkpoint_dir=folder)
        return {"saved": saved, **outcome(found)}
    except KeyboardInterrupt:
        return None
    finally:
        LayerCheckpoint.save = save  # type: ignore[method-assign]


@register("tiny_rows", input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,))
def tiny_rows(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, num_classes))


def rows_of(grid: Grid, out: str, stop_in: int | None) -> tuple[list[Row], list[int]]:
    """The grid's rows, and the numbers of those that this process ran; one process may be interrupted after its first row."""
    own: list[int] = []

    def on_row(row: Row, number: int, rows: int) -> None:
        own.append(number)
        if processes.world().number == stop_in:
            raise KeyboardInterrupt

    with processes.together():
        return run_grid(grid, out, device="cpu", on_row=on_row), own


def told() -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fxprune.compile(net(), images(40).split(BATCH), progress=False)
    return [str(one.message) for one in found if isinstance(one.message, fxprune.CalibrationWarning)]


def alone_in_the_first() -> tuple[int, ...] | None:
    """What one process compiles by itself, while the others do something else."""
    if processes.world().number:
        return None
    with fxprune.alone():
        return outcome(fxprune.compile(net(), images().split(BATCH), progress=False))["images"]
