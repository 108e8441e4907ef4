"""scan(): costs against a plain run of the model with one layer replaced."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import OptionsError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.useless, self.needed = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        self.useless.weight.data *= 1e-2

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (self.useless(x) + x).relu()
        return self.head(self.needed(x).relu().mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(96, 3, 8, 8)


def test_costs_are_those_of_the_layer_alone(images):
    model = Net().double().eval()
    scan = fxprune.scan(
        model, images.double().split(32), ["2:4", "0.75"], progress=False, options=fxprune.Options(holdout=0.0)
    )
    assert scan.recipes == ("2:4", "0.75")
    assert [row.name for row in scan.layers[::2]] == ["stem", "useless", "needed", "head"]
    with torch.no_grad():
        y = model(images.double())
    for name in ("useless", "needed", "head"):
        others = tuple({"stem", "useless", "needed", "head"} - {name})
        options = fxprune.Options(permute=False, holdout=0.0, target="weights")
        alone = fxprune.compile(
            model, images.double().split(32), "2:4", exclude=others, progress=False, options=options
        )
        with torch.no_grad():
            change = (alone(images.double()) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert scan[name, "2:4"].cost == pytest.approx(float(change), rel=1e-6)
        assert scan[name, "2:4"].sparsity == 0.5
    assert scan["needed", "0.75"].cost > scan["needed", "2:4"].cost > 10 * scan["useless", "2:4"].cost
    assert math.isnan(scan["stem", "2:4"].cost)
    assert "3 input channels" in scan["stem", "2:4"].reason
    assert (scan["needed", "2:4"].weights, scan["needed", "2:4"].macs) == (16 * 72, 64 * 16 * 72)


def test_chains_and_the_model_as_it_was(images):
    model = Net().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scan = fxprune.scan(model, images.split(32), ["rank:0.6", "rank:0.6+2:4", "2:4"], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rank, both, mask = (scan["needed", recipe] for recipe in scan.recipes)
    assert both.cost > rank.cost
    assert (rank.sparsity, mask.sparsity) == (0.0, 0.5)
    assert both.sparsity == pytest.approx(0.5, abs=0.01)


def test_table_and_csv(images, tmp_path):
    scan = fxprune.scan(Net().eval(), images.split(32), progress=False)
    assert "useless" in str(scan)
    for width in (50, 100):
        assert max(map(len, scan.render(width=width).splitlines())) <= width
    assert "3 input channels are not a multiple of 4" in scan.render(width=100)
    scan.to_csv(tmp_path / "scan.csv")
    with (tmp_path / "scan.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["recipe"], float(row["cost"])) for row in rows if row["cost"] != "nan"] == [
        (row.name, row.recipe, row.cost) for row in scan.layers if not math.isnan(row.cost)
    ]
    with pytest.raises(KeyError, match="layers: stem, useless"):
        scan["conv9", "2:4"]


@pytest.mark.parametrize("recipe", ["mixed:0.6", "rank:speedup=1.3"])
def test_what_only_a_whole_network_has(recipe, images):
    with pytest.raises(OptionsError, match="; scan "):
        fxprune.scan(Net().eval(), [images], [recipe], progress=False)
