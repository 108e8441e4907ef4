"""A run that was killed goes on where it was, and gives what it would have given."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import fxprune
from fxprune import FxPruneError, Options
from fxprune.layers.checkpoint import LayerCheckpoint
from fxprune.layers.solve import solve_layer


@pytest.fixture
def model():
    torch.manual_seed(0)
    channels = (3, 8, 8, 8, 4)  # The first layer stays as it is; three are solved.
    layers = [part for c, r in pairwise(channels) for part in (nn.Conv2d(c, r, 3), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


@pytest.fixture
def batches():
    return list(torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(8))


def run(model, batches, folder, pattern="2:4", memory_limit=None, **options):
    where = {"checkpoint_dir": None if folder is None else str(folder), "memory_limit": memory_limit}
    return fxprune.compile(model, batches, pattern, progress=False, options=Options(**options), **where)


@pytest.mark.parametrize("finished", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_result(model, batches, tmp_path, monkeypatch, finished):
    saves = 0
    save = LayerCheckpoint.save

    def interrupted(self, name, layer):
        nonlocal saves
        save(self, name, layer)
        saves += 1
        if saves == finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerCheckpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, tmp_path)
    monkeypatch.setattr(LayerCheckpoint, "save", save)
    solved = []
    monkeypatch.setattr("fxprune.passes.solve_layers.solve_layer", spy(solved))
    resumed, whole = run(model, batches, tmp_path), run(model, batches, None)
    assert len(solved) == (3 - finished) + 3
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name])
    assert [r.relative_error for r in resumed.report.layers] == [r.relative_error for r in whole.report.layers]


def spy(calls):
    def solve(*args):
        calls.append(args)
        return solve_layer(*args)

    return solve


def test_a_folder_of_another_run_is_refused(model, batches, tmp_path):
    run(model, batches, tmp_path)
    with pytest.raises(FxPruneError, match="another constraints"):
        run(model, batches, tmp_path, "1:4")
    with pytest.raises(FxPruneError, match="another options"):
        run(model, batches, tmp_path, damping=0.1)
    with pytest.raises(FxPruneError, match="another calibration data"):
        run(model, [*batches[:2], batches[2].roll(1, 0) * 0.999], tmp_path, permute=None)
    model[0].weight.data += 1
    with pytest.raises(FxPruneError, match="another model"):
        run(model, batches, tmp_path)


def test_a_memory_limit_is_not_another_run(model, batches, tmp_path):
    first = run(model, batches, tmp_path)
    again = run(model, batches, tmp_path, memory_limit=50_000)
    assert torch.equal(first.get_submodule("2").weight, again.get_submodule("2").weight)
