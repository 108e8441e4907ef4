"""Several processes give what one gives, whatever the shares of the images; an error in one ends all with its message."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxprune import Options
from fxprune.calibration.shares import _Seen, is_share
from fxprune.errors import CalibrationError
from fxprune.experiments.checkpoints import save_checkpoint
from fxprune.experiments.grid import Grid
from fxprune.experiments.grid_rows import read_rows
from fxprune.experiments.tasks import Task
from fxprune.models import create
from fxprune.runtime.processes import World, gathered, in_order, joined, shared, summed
from tests import distributed_jobs as jobs
from tests.process_group import Failed, ProcessGroup

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def two() -> Iterator[ProcessGroup]:
    group = ProcessGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def three() -> Iterator[ProcessGroup]:
    group = ProcessGroup(3)
    yield group
    group.close()


def assert_same_bits(found: list[dict[str, Any]]) -> None:
    first = found[0]
    for other in found[1:]:
        assert other["state"].keys() == first["state"].keys()
        assert all(torch.equal(value, other["state"][name]) for name, value in first["state"].items())
        assert other["errors"] == first["errors"]
        assert other["scores"] == first["scores"]


def assert_close(found: dict[str, Any], wanted: dict[str, Any], *, tolerance: float) -> None:
    """The same images, and weights that differ by rounding."""
    assert found["images"] == wanted["images"]
    assert found["errors"] == pytest.approx(wanted["errors"], rel=tolerance, abs=1e-9)
    assert found["state"].keys() == wanted["state"].keys()
    for name, value in wanted["state"].items():
        assert torch.allclose(found["state"][name], value, rtol=0, atol=tolerance * float(value.abs().max())), name


class TestAlone:
    """Without a group nothing is exchanged."""

    def test_everything_gives_back_what_it_is_given(self) -> None:
        x = torch.ones(3)
        assert gathered(4) == [4]
        assert summed([x])[0] is x
        assert joined(x) is x
        assert shared(lambda k: k + 1, [1, 2]) == [2, 3]
        assert in_order("ab") == (["a", "b"], [0, 1])

    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_shares_are_equal_and_whole(self, count: int) -> None:
        for items in (0, 1, 5, 23):
            parts = [range(items)[World(number, count).share(items)] for number in range(count)]
            assert [k for part in parts for k in part] == list(range(items))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


class TestWhoseBatches:
    def test_loaders_that_are_alike_are_dealt_out(self, two: ProcessGroup) -> None:
        whole = jobs.images().split(jobs.BATCH)
        for again in (False, True):
            found = two.results(jobs.read_shares, None, again)
            for number, of_one in enumerate(found):
                assert torch.equal(torch.cat(of_one["own"]), torch.cat(whole[number::2]))
                assert torch.equal(of_one["head"], torch.cat(whole[:5]))
                assert of_one["numbers"] == list(range(number, len(whole), 2))
        assert torch.equal(found[1]["longer"], torch.cat(whole[:12]))

    def test_loaders_that_differ_are_shares(self, three: ProcessGroup) -> None:
        """Of 3, 0 and 10 batches: the set's order is the first ones of all, the second ones, and so on."""
        whole = jobs.images().split(jobs.BATCH)
        shares = [list(whole[:3]), [], list(whole[3:])]
        order = [whole[k] for k in (0, 3, 1, 4, 2, *range(5, 13))]
        for again in (False, True):
            found = three.results(jobs.read_shares, shares, again)
            for number, of_one in enumerate(found):
                assert len(of_one["own"]) == len(shares[number])
                assert torch.equal(of_one["head"], torch.cat(order[:5]))
                assert torch.equal(of_one["fitted"], torch.cat(order[:4]))
        assert torch.equal(found[1]["longer"], torch.cat(order[:12]))

    def test_a_rule_for_every_case(self) -> None:
        def seen(*firsts: str, shuffles: bool = False, samplers: tuple[Any, ...] = ()) -> list[_Seen]:
            of = samplers or (None,) * len(firsts)
            return [_Seen(sampler, first, shuffles) for first, sampler in zip(firsts, of, strict=True)]

        assert not is_share(seen("a", "a", "a"))
        assert is_share(seen("a", "b", "c"))
        assert is_share(seen("a", "", "c"))
        assert not is_share(seen("", ""))
        assert is_share(seen("a", "a", samplers=((0, 2), (1, 2))))
        assert not is_share(seen("a", "a", shuffles=True))
        with pytest.raises(CalibrationError, match="same first calibration batch"):
            is_share(seen("a", "a", "b"))
        with pytest.raises(CalibrationError, match="shuffles"):
            is_share(seen("a", "b", shuffles=True))
        with pytest.raises(CalibrationError, match="process 1 of 2 has none"):
            is_share(seen("a", "b", samplers=((0, 2), None)))
        with pytest.raises(CalibrationError, match="process 1 of 2 has one for process 1 of 4"):
            is_share(seen("a", "b", samplers=((0, 2), (1, 4))))

    @pytest.mark.parametrize(("images", "drop_last", "read"), [(71, False, 71), (71, True, 70), (1, False, 1)])
    def test_what_a_sampler_repeats_is_left_out(
        self, two: ProcessGroup, images: int, drop_last: bool, read: int
    ) -> None:
        found = two.results(jobs.compiled_on_sampler, images, 8, drop_last)
        assert_same_bits(found)
        assert found[0]["images"][0] == read

    def test_a_loader_that_shuffles_is_refused(self, two: ProcessGroup) -> None:
        for failed in two(jobs.shuffled):
            assert failed.kind == "CalibrationError"
            assert "shuffle=True" in failed.message


class TestMoments:
    @pytest.mark.parametrize("kernel", [0, 1, 3])
    @pytest.mark.parametrize(
        ("with_offset", "shares"),
        [
            ((False, False, False), (4, 7, 2)),
            ((True, True, True), (4, 7, 2)),
            ((True, False, True), (4, 7, 2)),
            ((False, True, True), (0, 7, 2)),
            ((True, True, True), (5, 0, 0)),
        ],
    )
    def test_sums_are_those_of_all_images(
        self, three: ProcessGroup, kernel: int, with_offset: tuple[bool, ...], shares: tuple[int, ...]
    ) -> None:
        """Whatever each process has taken off its channels."""
        wanted = jobs.moments(with_offset, shares, kernel)
        for found in three.results(jobs.moments, with_offset, shares, kernel):
            for name, value in wanted.items():
                scale = float(value.abs().max())
                assert torch.allclose(found[name], value, rtol=1e-7, atol=1e-7 * scale), name


RECIPES: list[tuple[Any, dict[str, Any]]] = [
    ("2:4", {}),
    ("0.8", {}),
    ("mixed:0.6", {}),
    ("0.8", {"options": Options(global_budget=True)}),
    ("2:4", {"method": "magnitude"}),
    ("2:4", {"method": "sparsegpt"}),
    ("2:4", {"exclude": ("first",), "options": Options(polish=1)}),
    ("rank:0.7", {}),
    ("rank:0.8+2:4", {}),
    ("channels:0.7", {}),
    ({"down": "dense", "*": "1:4"}, {"method": "sparsegpt"}),
]


class TestResults:
    @pytest.mark.parametrize(("recipe", "settings"), RECIPES)
    def test_as_one_process(self, two: ProcessGroup, recipe: Any, settings: dict[str, Any]) -> None:
        found = two.results(jobs.compiled, recipe, settings)
        assert_same_bits(found)
        assert_close(found[0], jobs.compiled(recipe, settings), tolerance=1e-5)

    def test_three_and_rows_shared_out(self, three: ProcessGroup) -> None:
        wanted = jobs.compiled()
        for job in (jobs.compiled, jobs.compiled_by_rows):
            found = three.results(job)
            assert_same_bits(found)
            assert_close(found[0], wanted, tolerance=1e-5)

    def test_in_float32(self, two: ProcessGroup) -> None:
        """A rounding error may send ADMM and the search for an order of channels another way, to as good an end."""
        found = two.results(jobs.compiled_in_single)
        assert_same_bits(found)
        wanted = jobs.compiled_in_single()
        assert found[0]["images"] == wanted["images"]
        assert found[0]["errors"] == pytest.approx(wanted["errors"], rel=0.1)

    def test_unequal_shares(self, three: ProcessGroup) -> None:
        """One process with few images, one without: as one process on all of them, in the set's order."""
        whole = jobs.images().split(jobs.BATCH)
        shares = [list(whole[:2]), [], list(whole[2:])]
        in_turn = [[whole[k] for k in (0, 2, 1, *range(3, 13))]]
        found = three.results(jobs.compiled_on, shares)
        assert_same_bits(found)
        assert_close(found[0], jobs.compiled_on(in_turn), tolerance=1e-5)

    def test_low_rank_and_scan(self, two: ProcessGroup) -> None:
        found = two.results(jobs.low_rank)
        assert_same_bits(found)
        assert_close(found[0], jobs.low_rank(), tolerance=1e-5)
        first, second = two.results(jobs.scanned)
        assert first == second
        for (name, recipe, cost), (other, of, wanted) in zip(first, jobs.scanned(), strict=True):
            assert (name, recipe) == (other, of)
            assert cost == pytest.approx(wanted, rel=1e-4)

    def test_models_compiled_in_parts(self, two: ProcessGroup) -> None:
        found = two.results(jobs.compiled, "2:4", {}, jobs.Parts)
        assert_same_bits(found)
        assert_close(found[0], jobs.compiled("2:4", {}, jobs.Parts), tolerance=1e-5)

    def test_batchnorm_re_estimated(self, three: ProcessGroup) -> None:
        wanted: dict[str, Tensor] = jobs.batchnorm()
        for found in three.results(jobs.batchnorm):
            assert found.keys() == wanted.keys()
            assert all(torch.allclose(found[name].double(), wanted[name].double(), rtol=1e-5) for name in wanted)

    def test_one_process_by_itself(self, two: ProcessGroup) -> None:
        assert two.results(jobs.alone_in_the_first) == [jobs.compiled()["images"], None]


class TestFailures:
    @pytest.mark.parametrize(
        ("how", "kind", "message"),
        [
            ("loader", "OSError", "process 1 of 2 failed: OSError: the disk is gone"),
            ("nan", "CalibrationError", "process 1 of 2 failed: calibration batch 2 holds NaN or infinite values"),
            ("ctrl-c", "KeyboardInterrupt", "process 1 of 2 failed: interrupted"),
        ],
    )
    def test_an_error_in_one_ends_all(self, two: ProcessGroup, how: str, kind: str, message: str) -> None:
        first, second = two(jobs.failing, how)
        assert isinstance(first, Failed)
        assert isinstance(second, Failed)
        assert (first.kind, second.kind) == ("ProcessError", kind)
        assert message in first.message
        assert two.results(jobs.still_there) == [1, 1]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("weights", "the model is not the same in process 0 and in process 1; load the same weights"),
            ("recipe", "what was asked for is not the same in process 0 and in process 1"),
            ("mixed shares", "some processes have the same first calibration batch"),
            ("ends apart", "they have 9, 10, 11 batches"),
        ],
    )
    def test_processes_that_do_not_agree(self, three: ProcessGroup, how: str, message: str) -> None:
        for failed in three(jobs.failing, how):
            assert isinstance(failed, Failed)
            assert message in failed.message

    def test_warnings_of_the_first_only(self, two: ProcessGroup) -> None:
        first, second = two.results(jobs.told)
        assert any("calibration images are few" in text for text in first)
        assert second == []


def tiny_task(folder: Path) -> Task:
    """A model with weights, and images to prune it with."""
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 255, (60, 8, 8), np.uint8) for split in ("train", "test")}
    np.savez(folder / "data.npz", **arrays, train_labels=np.arange(60) % 3, test_labels=np.arange(60) % 3)
    save_checkpoint(folder / "weights.pt", create("tiny_rows"))
    return Task("tiny_rows", str(folder / "data.npz"), str(folder / "weights.pt"))


@pytest.mark.slow
class TestCommands:
    """As a user starts them."""

    @staticmethod
    def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fxprune"]
        return subprocess.run([*start, *words], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)

    def test_the_first_process_reports(self, tmp_path: Path) -> None:
        task = tiny_task(tmp_path)
        out = tmp_path / "run"
        words = ["--model", str(task.model), "--data", str(task.data), "--weights", str(task.weights), "--no-onnx"]
        words += [
            "--register",
            str(ROOT / "tests/distributed_jobs.py"),
            "--calibration-images",
            "60",
            "--batch-size",
            "8",
        ]
        done = self.torchrun("prune", *words, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("fxprune 2:4 (admm)") == 1
        assert json.loads((out / "report.json").read_text())["images_read"] == 60
        again = self.torchrun("prune", *words, "--out", str(out))
        assert again.returncode == 1
        assert again.stderr.count("holds a run of fxprune prune") == 1

    def test_what_cannot_be_shared_says_so(self) -> None:
        done = self.torchrun("inspect", "model.onnx")
        assert done.returncode == 1
        assert "fxprune inspect runs in one process: start it without torchrun" in done.stderr


class TestFiles:
    def test_a_checkpoint_goes_on_with_another_number(
        self, two: ProcessGroup, three: ProcessGroup, tmp_path: Path
    ) -> None:
        folder = str(tmp_path / "layers")
        assert two.results(jobs.checkpointed, folder, 2) == [None, None]
        finished = {file.name.removesuffix(".layer.pt") for file in Path(folder).glob("*.layer.pt")}
        assert len(finished) == 2
        found = three.results(jobs.checkpointed, folder, None)
        assert_same_bits(found)
        assert found[0]["saved"]
        assert finished.isdisjoint(found[0]["saved"])
        again = jobs.checkpointed(folder, None)
        assert again is not None
        assert again["saved"] == []
        assert all(torch.equal(value, again["state"][name]) for name, value in found[0]["state"].items())

    def test_rows_of_a_grid_are_shared_and_none_is_lost(self, two: ProcessGroup, tmp_path: Path) -> None:
        task = tiny_task(tmp_path)
        grid = Grid((("tiny", task),), ("2:4", "0.5"), ("magnitude", "sparsegpt"), (0,), (30,))
        out = tmp_path / "rows.csv"
        first, second = two(jobs.rows_of, grid, str(out), 1)
        assert "process 1 of 2 failed: interrupted" in first.message
        assert second.kind == "KeyboardInterrupt"
        assert sorted(file.name for file in tmp_path.glob("rows.csv*")) == ["rows.csv.process0", "rows.csv.process1"]
        (rows, own), (of_second, others) = two.results(jobs.rows_of, grid, str(out), None)
        assert rows == of_second == read_rows(out)
        assert [row.status for row in rows] == ["ok"] * 4
        assert others == []  # One row was left to run, and the first process tells of those that were there.
        assert own == [1, 2, 3, 4]
        assert sorted(file.name for file in tmp_path.glob("rows.csv*")) == ["rows.csv"]
