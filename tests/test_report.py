from __future__ import annotations

import csv
import dataclasses
import json
import re

import pytest

from fxprune import LayerReport, PruneReport

CONV = LayerReport(
    "stem.conv", "Conv2d", (16, 3, 3, 3), reason="3 input channels are not a multiple of 4", sparsity=0.0
)
PRUNED = LayerReport(
    "layer1.0.conv1", "Conv2d", (16, 16, 3, 3), "2:4", "pruned", sparsity=0.5, relative_error=0.0123, damping=0.01,
    dead_inputs=3, seconds=1.5, verdict="2:4 ready",
)  # fmt: skip
HEAD = LayerReport("linear", "Linear", (10, 64), "2:4", "pruned", sparsity=0.75, relative_error=1e-4, damping=0.1)
REPORT = PruneReport(
    (CONV, PRUNED, HEAD), "admm", "2:4", images=1024, images_held_out=102, seconds=12.34, agreement=0.924, kl=0.107
)


def test_sparsity_is_over_all_weights():
    sizes = {432: 0.0, 2304: 0.5, 640: 0.75}
    assert [layer.weights for layer in REPORT.layers] == list(sizes)
    expected = sum(size * share for size, share in sizes.items()) / sum(sizes)
    assert REPORT.sparsity == pytest.approx(expected)
    assert PruneReport((), "admm", "2:4").sparsity == 0


def test_a_layer_called_twice_counts_once():
    assert dataclasses.replace(REPORT, layers=(CONV, PRUNED, PRUNED, HEAD)).sparsity == REPORT.sparsity


def test_a_weight_of_unknown_shape_counts_for_nothing():
    unknown = LayerReport("conv2d", "conv2d", ())
    assert unknown.weights == 0
    assert dataclasses.replace(REPORT, layers=(CONV, PRUNED, HEAD, unknown)).sparsity == REPORT.sparsity


def test_a_layer_by_name():
    assert REPORT["linear"] is HEAD
    with pytest.raises(KeyError, match=r"no layer named 'fc'; there are: stem.conv, layer1.0.conv1, linear"):
        REPORT["fc"]


def test_the_table_says_everything_once():
    text = REPORT.render(width=110)
    assert "\x1b" not in text
    for layer in REPORT.layers:
        row = next(line for line in text.splitlines() if layer.name in line)
        assert layer.op in row
        assert "x".join(map(str, layer.shape)) in row
        assert layer.status in row
        assert f"{layer.sparsity:.1%}" in row
    assert "1.23e-02" in text
    assert re.search(r"2:4 ready; 3 dead\s+inputs", text)
    assert "2 of 3 layers pruned to 2:4 with admm" in text
    words = " ".join(text.split())
    assert "1024 images, 12.3 s" in words
    assert "On 102 images that were held out: top-1 agreement with the dense model 92.4%, KL 0.1070" in words


def test_no_agreement_no_line_about_it():
    assert "agreement" not in str(dataclasses.replace(REPORT, agreement=None, kl=None))


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_the_table_fits_its_width(width):
    long_name = dataclasses.replace(CONV, name=".".join(["a_rather_long_module_name"] * 5), reason="for a reason " * 20)
    report = dataclasses.replace(REPORT, layers=(*REPORT.layers, long_name))
    lines = report.render(width=width).splitlines()
    assert max(map(len, lines)) <= width
    joined = re.sub(r"[\s│┃]", "", "".join(lines))
    assert joined.count("forareason") >= 1
    assert all(len(line) <= 110 for line in str(report).splitlines())


def test_colours_on_demand():
    assert "\x1b[" in REPORT.render(color=True)


def test_markup_in_names_is_shown_as_it_is():
    odd = dataclasses.replace(CONV, name="[red]block[/red]", reason="[bold]why")
    text = str(dataclasses.replace(REPORT, layers=(odd,)))
    assert "[red]block[/red]" in text
    assert "[bold]why" in text


def test_csv(tmp_path):
    REPORT.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["stem.conv", "layer1.0.conv1", "linear"]
    assert list(rows[0]) == [f.name for f in dataclasses.fields(LayerReport)]
    assert rows[1]["shape"] == "16x16x3x3"
    assert float(rows[1]["relative_error"]) == 0.0123
    assert rows[0]["relative_error"] == ""
    assert rows[0]["reason"] == "3 input channels are not a multiple of 4"


def test_json(tmp_path):
    REPORT.to_json(str(tmp_path / "report.json"))
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["sparsity"] == pytest.approx(REPORT.sparsity)
    assert (data["method"], data["pattern"], data["images"], data["kl"]) == ("admm", "2:4", 1024, 0.107)
    for written, layer in zip(data["layers"], REPORT.layers, strict=True):
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(layer).items()}
        assert written == lists


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """JSON knows no Infinity and no NaN; many readers stop at them."""
    layer = dataclasses.replace(HEAD, relative_error=float("nan"))
    dataclasses.replace(REPORT, layers=(layer,), kl=float("inf")).to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert data["kl"] is None
    assert data["layers"][0]["relative_error"] is None
