"""Values that wait in memory or on disk come back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune import FxPruneError
from fxprune.calibration import scratch
from fxprune.calibration.batch_store import BatchStore, BatchValues


def values(seed: int) -> tuple[BatchValues, list[torch.fx.Node]]:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(4)]
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    held = BatchValues({nodes[0]: x, nodes[1]: x, nodes[2]: (x[:, 1:3], 7, {"a": x.t()})}, {nodes[0]: x + 1})
    return held, nodes


@pytest.mark.parametrize("limit", [1, 200, 10**6])
def test_every_tier_gives_back_what_it_was_given(limit):
    store = BatchStore(torch.device("cpu"), limit)
    given = [values(seed) for seed in range(3)]
    for number, (held, _) in enumerate(given):
        store.put(number, held)
    assert (store.spilled_bytes > 0) == (limit < 3 * given[0][0].nbytes)
    for number, (_, nodes) in enumerate(given):
        expected, _ = values(number)
        expected = {node.name: value for node, value in expected.dense_values.items()}
        back = store.take(number)
        assert list(back.dense_values) == nodes[:3]
        first, again, nested = (back.dense(node) for node in nodes[:3])
        assert first is again
        torch.testing.assert_close(first, expected["x0"], rtol=0, atol=0)
        torch.testing.assert_close(nested[0], expected["x2"][0], rtol=0, atol=0)
        assert nested[1] == 7
        assert nested[2]["a"].stride() == expected["x2"][2]["a"].stride()
        torch.testing.assert_close(back.pruned(nodes[0]), expected["x0"] + 1, rtol=0, atol=0)
        assert back.pruned(nodes[1]) is first


def test_bytes_of_views_count_once():
    held, _ = values(0)
    assert held.nbytes == 2 * 8 * 4 * 4


def test_parameters_do_not_count_and_do_not_move():
    node = torch.fx.Graph().placeholder("x")
    parameter = nn.Parameter(torch.ones(1000))
    store = BatchStore(torch.device("cpu"), 1)
    store.put(0, BatchValues({node: parameter}))
    assert store.take(0).dense(node) is parameter


def test_a_scratch_folder_that_cannot_be_written_is_named(monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "_write_all", full)
    store = BatchStore(torch.device("cpu"), 1)
    store.put(0, values(0)[0])  # Written behind.
    with pytest.raises(FxPruneError, match=r"No space left.*TMPDIR"):
        store.take(0)
    store.put(0, values(0)[0])
    with pytest.raises(FxPruneError, match=r"No space left.*TMPDIR"):
        store.put(1, values(1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_scratch_files_keep_types_and_strides(dtype):
    files = scratch.ScratchFiles()
    whole = torch.randn(2, 6, 5, 4).to(dtype)
    given = [whole, whole.to(memory_format=torch.channels_last), whole[:, 1:3], whole[0, 0, 0, 0], whole[:0], whole.mT]
    files.write(3, given)
    for tensor, back in zip(given, files.read(3), strict=True):
        assert torch.equal(tensor, back)
        assert back.dtype == dtype
    assert files.read(3)[1].is_contiguous(memory_format=torch.channels_last)
    assert files.read(3)[5].stride() == whole.mT.stride()


def test_what_was_read_ahead_is_not_given_once_it_was_written_over():
    files = scratch.ScratchFiles()
    for key in range(3):
        files.write(key, [torch.full((100,), float(key))])
    files.read_ahead(1)
    files.write(1, [torch.full((7,), 9.0)])  # Shorter than the file was.
    assert torch.equal(files.read(1)[0], torch.full((7,), 9.0))
    files.read_ahead(2)
    assert torch.equal(files.read(0)[0], torch.zeros(100))
    assert torch.equal(files.read(2)[0], torch.full((100,), 2.0))


def test_a_memory_limit_does_not_change_the_result():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    batches = list(torch.randn(32, 3, 12, 12).split(8))
    free = fxprune.compile(model, batches, "2:4", progress=False)
    tight = fxprune.compile(model, batches, "2:4", progress=False, memory_limit=60_000)
    assert tight.report.peak_memory <= 60_000 < free.report.peak_memory
    for name, parameter in free.state_dict().items():
        assert torch.equal(parameter, tight.state_dict()[name])
