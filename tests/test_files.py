from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fxprune.errors import CheckpointError
from fxprune.files import atomic, save_tensors


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_appears_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.csv"
    with atomic(target) as part:
        part.write_text("1,2")
        assert not target.exists()
        assert part.suffix == ".csv"
    assert target.read_text() == "1,2"
    assert [file.name for file in target.parent.iterdir()] == ["b.csv"]


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    target = tmp_path / "a.txt"
    if before:
        target.write_text(before)

    def interrupted() -> None:
        with atomic(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(OSError, match="large"), largest_file(10_000), atomic(target) as part:
        part.write_text("x" * 20_000)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_on_a_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "a.pt"
    save_tensors({"x": torch.ones(3)}, target)
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.pt: .*unchanged"), largest_file(10_000):
        save_tensors({"x": torch.zeros(20_000)}, target)
    assert torch.load(target, weights_only=True)["x"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_tensors({}, tmp_path / "file" / "a.pt")
