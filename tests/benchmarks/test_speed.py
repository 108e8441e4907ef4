from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the benchmarks draw pictures")

from benchmarks.speed import hook_sparsegpt, measure, resnet50
from benchmarks.speed.__main__ import main
from benchmarks.speed.layer_statistics import OURS, UNFOLD, counts
from benchmarks.speed.layer_statistics import measure as measure_layer
from benchmarks.speed.output import bars
from benchmarks.speed.rows import Row, merge
from benchmarks.speed.unfold import channels_innermost, unfold_gram, unfold_gram_lean
from fxprune import Options, compile
from fxprune.experiments.csv_rows import read_rows, write_rows
from fxprune.geometry import LayerGeometry
from fxprune.pattern import Pattern


def geometry(channels: int = 6) -> LayerGeometry:
    return LayerGeometry(channels, channels, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize("gram", [unfold_gram, unfold_gram_lean])
def test_the_baselines_compute_the_hessian_of_the_patches(gram: object) -> None:
    x = torch.randn(3, 6, 5, 7)
    patches = geometry().patches(x)[0].double()
    found = channels_innermost(geometry(), gram(geometry(), x))  # type: ignore[operator]
    torch.testing.assert_close(found.double(), patches.mT @ patches, rtol=1e-5, atol=1e-5)


def test_counts_of_unfold_are_those_of_its_product() -> None:
    flop, byte = counts(geometry(), images=2, side=4, way=UNFOLD)
    assert flop == 2 * (2 * 16) * 54**2
    assert byte == 4 * (2 * 6 * 16 + 4 * 2 * 16 * 54 + 54**2)
    assert counts(geometry(64), 2, 16, OURS)[0] < counts(geometry(64), 2, 16, UNFOLD)[0] / 4


def test_peak_memory_counts_what_lived_at_once() -> None:
    def two_then_one() -> torch.Tensor:
        a = torch.empty(2**20)
        b = torch.empty(2**20)
        del a, b
        return torch.empty(2**18)

    peak, result = measure.peak_extra_bytes(two_then_one)
    assert peak == 2 * 4 * 2**20
    assert result.shape == (2**18,)


def test_interleaved_runs_take_turns_and_ratios_are_taken_round_by_round() -> None:
    order: list[str] = []
    times = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" * 4  # One round more: the warm-up.
    assert len(times["a"].seconds) == 3
    assert measure.ratio(measure.Times((2.0, 9.0, 8.0)), measure.Times((1.0, 3.0, 4.0))).median == 2.0


def test_a_layer_is_measured_with_its_error_from_float64() -> None:
    rows = {row.method: row for row in measure_layer("tiny", 16, 8, 4, 2, 1, "cpu")}
    assert rows[OURS].difference is not None
    assert rows[OURS].difference < 1e-5
    assert rows[UNFOLD].extra_mib > 2 * 4 * (4 * 64 * 144) / 2**20  # type: ignore[operator]


def test_hooks_give_what_the_compiler_gives_with_the_same_method() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    ).eval()  # fmt: skip
    batches = list(torch.randn(64, 4, 8, 8).split(16))
    pruned = hook_sparsegpt.prune(model, batches, ["0", "2", "5"])
    compiled = compile(
        model, batches, "2:4", method="sparsegpt", device="cpu", progress=False, options=Options(holdout=0)
    )
    for name in ("0", "2", "5"):
        weight = pruned.get_submodule(name).weight
        Pattern.parse("2:4").check(weight)
        torch.testing.assert_close(weight, compiled.get_submodule(name).weight, rtol=1e-3, atol=1e-4)
    assert (model[0].weight != 0).all()


def test_rows_survive_the_csv_and_new_sections_replace_old_ones(tmp_path: Path) -> None:
    old = [
        Row.of("statistics", "a", OURS, measure.Times((1.0, 2.0, 4.0)), images=3),
        Row.of("compile", "b", "admm", measure.Times((5.0,)), solve=2.5),
    ]
    write_rows(tmp_path / "rows.csv", Row, old)
    assert read_rows(tmp_path / "rows.csv", Row) == old
    new = [Row.of("statistics", "c", OURS, measure.Times((1.0,)))]
    assert [row.case for row in merge(old, new)] == ["b", "c"]


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    def row(way: str, over: float) -> Row:
        return Row.of(
            "statistics", "layer", way, measure.Times((over,)), over_first=over, extra_mib=10 * over, result_mib=1.0,
            difference=1e-7,
        )  # fmt: skip

    assert bars([row(OURS, 1.0), row(UNFOLD, 6.0)])[0].endswith(": met.")
    assert bars([row(OURS, 1.0), row(UNFOLD, 3.0)])[0].endswith("NOT met.")


def test_the_small_run_writes_every_file(tmp_path: Path) -> None:
    stem = tmp_path / "speed"
    given = ["--small", "--repeats", "1", "--threads", "1", "--sections", "statistics,wide,spilled"]
    given += ["--wide-cases", "resnet18-small"]
    main([*given, "--output", str(stem), "--data", str(tmp_path)])
    assert {row.method for row in read_rows(stem.with_suffix(".csv"), Row)} >= {OURS, UNFOLD}
    text = stem.with_suffix(".md").read_text()
    assert "Machine (statistics; wide; spilled): " in text
    assert "in 16 MiB takes" in text
    assert "an open figure" in text
    assert (tmp_path / "speed_statistics.png").stat().st_size > 1000


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    row = resnet50.run(2, 32, "cpu", 1, 8.0, "resnet20", "magnitude")
    assert row.rss_mib is not None
    assert row.solve is not None
    assert 100 < row.rss_mib < 4000
    assert row.seconds > row.solve


def test_an_unknown_section_is_named() -> None:
    with pytest.raises(SystemExit, match="unknown section quick"):
        main(["--sections", "quick"])
