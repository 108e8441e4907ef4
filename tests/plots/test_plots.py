from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from fxprune import plots
from fxprune.errors import DataError
from fxprune.experiments.grid_rows import Row
from fxprune.plots.results import points
from fxprune.plots.spectra import energy_rank, singular_values
from fxprune.report import LayerReport, PruneReport

ACCURACY = {("magnitude", "2:4"): 73.0, ("admm", "2:4"): 92.0, ("magnitude", "1:4"): 20.0, ("admm", "1:4"): 89.0,
            ("magnitude", "0.9"): 12.0, ("admm", "0.9"): 75.0}  # fmt: skip


def rows(patterns: Sequence[str] = ("2:4", "1:4", "0.9"), seeds: int = 3) -> list[Row]:
    zeros = {"2:4": 0.5, "1:4": 0.75, "0.9": 0.9}
    return [
        Row(
            "net",
            "{}",
            "w",
            pattern,
            method,
            seed,
            64,
            "{}",
            "ok",
            91.7,
            accuracy + seed,
            99.0,
            0.1,
            zeros[pattern],
            3,
            1.0,
        )
        for (method, pattern), accuracy in ACCURACY.items()
        if pattern in patterns
        for seed in range(seeds)
    ]


def texts(picture: Figure) -> list[str]:
    return [text.get_text() for text in picture.findobj(Text) if text.get_text() and text.get_visible()]


def overlaps(picture: Figure, words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of the given texts whose boxes overlap once drawn."""
    picture.draw_without_rendering()
    # An annotation's own extent has its arrow in it.
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in picture.findobj(Text) if t.get_text() in words]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1 :] if one.overlaps(other)]


def test_seeds_are_one_point_with_their_deviation() -> None:
    found = {(p.method, p.pattern): p for p in points(rows(), "net")}
    point = found["admm", "1:4"]
    assert (point.accuracy, point.deviation, point.seeds) == (90.0, 1.0, 3)
    assert (point.sparsity, point.dense) == (75.0, pytest.approx(91.7))
    assert points(rows(seeds=1), "net")[0].deviation == 0


def test_failed_rows_and_other_models_are_left_out() -> None:
    failed = [Row("net", "{}", "w", "2:4", "admm", 9, 64, "{}", "failed", error="x")]
    other = [Row("other", "{}", "w", "2:4", "new", 0, 64, "{}", "ok", 1.0, 1.0, 1.0, 1.0, 0.5, 1, 1.0)]
    assert points(rows() + failed + other, "net") == points(rows(), "net")
    with pytest.raises(DataError, match="no finished row is of model 'none'; there are net"):
        points(rows(), "none")


def test_what_tells_rows_apart_is_in_the_label() -> None:
    more = [Row("net", "{}", "w", "2:4", "admm", 0, 256, '{"damping": 0.1}', "ok", 1.0, 1.0, 1.0, 1.0, 0.5, 1, 1.0)]
    labels = {point.label for point in points(rows() + more, "net")}
    assert labels == {"magnitude, 64 images", "admm, 64 images", 'admm, 256 images, {"damping": 0.1}'}


@pytest.mark.parametrize("patterns", [("2:4", "1:4"), ("0.9",), ("2:4", "1:4", "0.9")])
def test_accuracy_against_sparsity_shows_every_figure(patterns: tuple[str, ...], tmp_path: Path) -> None:
    picture = plots.accuracy_against_sparsity(rows(patterns), "net")
    drawn = [float(y) for axes in picture.axes for line in axes.get_lines() for y in np.atleast_1d(line.get_ydata())]
    for (_, pattern), accuracy in ACCURACY.items():
        assert (accuracy + 1 in drawn) == (pattern in patterns)
    said = texts(picture)
    assert {"admm", "magnitude", "dense 91.7%"} <= set(said)
    assert ("2:4" in said) == ("2:4" in patterns)
    assert "bars: standard deviation over 3 calibration seeds" in said
    assert not overlaps(picture, ["admm", "magnitude"])


def test_close_labels_do_not_overlap() -> None:
    close = [
        Row("net", "{}", "w", "2:4", f"m{i}", 0, 64, "{}", "ok", 91.0, 90 + i / 100, 9.0, 0.1, 0.5, 3, 1.0)
        for i in range(6)
    ]
    picture = plots.accuracy_against_sparsity(close + rows(("2:4",)), "net")
    assert not overlaps(picture, [f"m{i}" for i in range(6)])


def test_method_comparison_writes_accuracy_and_loss() -> None:
    said = texts(plots.method_comparison(rows(), "net"))
    assert "93.0 (+1.3)" in said
    assert "21.0 (−70.7)" in said
    assert {"2:4  (50% zeros)", "unstructured, 90% zeros"} <= set(said)


def report(count: int = 4) -> PruneReport:
    layers = [
        LayerReport("conv1", "Conv2d", (4, 3, 3, 3), status="kept", reason="3 input channels are not a multiple of 4"),
        LayerReport("conv2", "Conv2d", (4, 4, 3, 3), status="reconstructed", relative_error=1e-12),
    ]
    layers += [
        LayerReport(f"layer{i}", "Conv2d", (4, 4, 3, 3), "2:4", "pruned", sparsity=0.5, relative_error=0.01 * i)
        for i in range(1, count - 1)
    ]
    return PruneReport(tuple(layers), "admm", "2:4")


def test_layers_are_drawn_from_the_report(tmp_path: Path) -> None:
    picture = plots.layer_sparsity_and_error(report(), "net")
    widths = [patch.get_width() for patch in picture.axes[0].patches]
    assert widths[4:8] == [0, 0, 50, 50]
    said = texts(picture)
    assert {"layer2", "1e-12", "pruned"} <= set(said)
    assert "kept" not in said  # The kept layers have no zeros, and so nothing in that colour.
    assert any(text.startswith("3 input channels") for text in said)
    report().to_json(tmp_path / "report.json")
    assert plots.read_report(tmp_path / "report.json") == report()


def test_reports_that_cannot_be_drawn_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no layers"):
        plots.layer_sparsity_and_error(PruneReport((), "admm", "2:4"))
    for text in ("{}", "[]", "no", '{"layers": [{"name": 1}]}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(DataError, match=r"report\.json is no report"):
            plots.read_report(tmp_path / "report.json")


def test_a_report_without_errors_is_drawn() -> None:
    layers = (LayerReport("a", "Linear", (4, 4), "2:4", "pruned", sparsity=0.5),)
    assert "not measured" in texts(plots.layer_sparsity_and_error(PruneReport(layers, "magnitude", "2:4")))


def test_singular_values_are_those_of_the_flattened_weight() -> None:
    weight = torch.randn(5, 4, 3, 3)
    expected = np.linalg.svd(weight.permute(0, 2, 3, 1).reshape(5, -1).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight), expected, rtol=1e-10)
    assert energy_rank(np.array([3.0, 1.0, 0.0])) == 1  # 9 of 10
    assert energy_rank(np.array([1.0, 1.0, 1.0, 1.0])) == 4


def test_spectra_show_dense_and_pruned() -> None:
    weights = {"a": torch.randn(8, 4, 3, 3), "b": torch.randn(6, 8), "c": torch.randn(6, 8)}
    picture = plots.singular_value_spectra(weights, {"a": torch.randn(8, 4, 3, 3)}, "net")
    lines = [line for axes in picture.axes for line in axes.get_lines() if len(np.atleast_1d(line.get_xdata())) > 1]
    assert [len(line.get_xdata()) for line in lines] == [8, 8, 6, 6]
    np.testing.assert_allclose(lines[2].get_ydata(), singular_values(weights["b"]))
    with pytest.raises(DataError, match="no layer is chosen"):
        plots.singular_value_spectra({})


def test_masks_leave_zeros_white() -> None:
    weight = torch.randn(8, 4, 2, 2)
    weight[:, ::2] = 0
    picture = plots.mask_pictures({"a": weight, "b": torch.randn(20, 60)}, "net")
    image = picture.axes[0].get_images()[0].get_array()
    assert image.shape == (8, 16)
    assert np.ma.getmaskarray(image).reshape(8, 4, 4)[:, :, ::2].all()
    assert not np.ma.getmaskarray(image).reshape(8, 4, 4)[:, :, 1::2].any()
    assert np.array_equal(
        np.sign(image[0, 1::2]), torch.sign(weight.permute(0, 2, 3, 1).reshape(8, -1)[0, 1::2]).numpy()
    )
    assert picture.axes[1].get_images()[0].get_array().shape == (16, 48)
    assert "a: 50% zeros of 8 × 16" in texts(picture)
    with pytest.raises(DataError, match="no layer is chosen"):
        plots.mask_pictures({})


def test_a_factored_report_shows_macs_left_and_words_for_what_is_no_number() -> None:
    layers = tuple(
        LayerReport(name, "Conv2d", (4, 4, 3, 3), status="factored", relative_error=error, macs=(200, 50))
        for name, error in (("a", 0.01), ("b", float("nan")), ("c", None), ("d", 0.0))
    )
    picture = plots.layer_sparsity_and_error(PruneReport(layers, "svd", "rank ratio:0.25"), "net")
    assert [patch.get_width() for patch in picture.axes[0].patches][4:8] == [25] * 4
    assert picture.axes[0].get_xlabel() == "MACs left (%)"
    assert {"not finite", "not measured", "0"} <= set(texts(picture))
    assert [line.get_xdata()[0] for line in picture.axes[1].get_lines() if len(line.get_xdata()) == 1] == [0.01]


def test_patterns_with_as_many_zeros_share_a_label() -> None:
    both = [
        Row("net", "{}", "w", pattern, "admm", 0, 64, "{}", "ok", 91.0, 90.0, 9.0, 0.1, 0.5, 3, 1.0)
        for pattern in ("2:4", "4:8")
    ]
    assert "2:4, 4:8" in texts(plots.accuracy_against_sparsity(both, "net"))
