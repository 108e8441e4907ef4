"""Faults injected into files and into writing them: each ends in an error that names the file, or in the file as it was."""

from __future__ import annotations

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import fxprune
from fxprune.errors import CheckpointError
from fxprune.experiments.checkpoints import load_weights, save_checkpoint
from fxprune.saving import load, save

ROOT = str(Path(__file__).resolve().parents[2])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU())


def write_old(path: Path) -> None:
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)


# How a file of each kind is written, and read.
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "graph": (lambda path: save(symbolic_trace(network()), path), load),
    "checkpoint": (lambda path: save_checkpoint(path, network()), lambda path: load_weights(network(), path)),
    "weights of before torch 1.6": (write_old, lambda path: load_weights(network(), path)),
}
STEP = 7  # of the lengths; all of them were tried once


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_at_any_length_is_an_error(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "a.pt"
    write(path)
    read(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), STEP):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_an_error_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "a.pt"
    write(path)
    whole, expected = path.read_bytes(), read(path)
    draw, found = random.Random(0), 0
    for _ in range(400):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            model = read(path)
        except CheckpointError:
            found += 1
        else:
            if kind == "graph":  # which has a fingerprint; weights alone have none
                assert model.code == expected.code
                for name, value in expected.state_dict().items():
                    assert torch.equal(value, model.state_dict()[name])
    assert found > 100


def pickled(content: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


GRAPH = {"format": "fxprune graph", "version": 1}
OTHERS: dict[str, bytes] = {
    "empty": b"",
    "text": b"epoch,loss\n1,0.5\n",
    "text that starts like a zip": b"PK\x03\x04 and so on",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "zeros": bytes(5000),
    "noise": random.Random(0).randbytes(5000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a plain pickle": pickled({"a": 1}),
    "a pickle in a later protocol": pickled({"a": 1}, 5),
    "a pickle of many marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "lists in lists in lists": nested(100_000),
    "a zip of other things": zipped(a=b"1", b=b"2"),
    "a zip without data.pkl": zipped(archive__version=b"3"),
    "a zip whose data.pkl is none": zipped(archive__data__pkl=b"x", archive__version=b"3"),
    "an empty zip": zipped(),
    "a list": saved([1, 2, 3]),
    "a tensor": saved(torch.ones(3)),
    "a dict of other things": saved({"format": "other"}),
    "a graph without content": saved(GRAPH),
    "a graph that is no JSON": saved({**GRAPH, "graph": "{", "state_dict": {}, "tensors": {}}),
    "a graph that is a list": saved({**GRAPH, "graph": "[]", "state_dict": {}, "tensors": {}}),
    "a graph nested too deeply": saved({**GRAPH, "graph": "[" * 100_000, "state_dict": {}, "tensors": {}}),
    "a graph of numbers": saved({**GRAPH, "graph": 3, "state_dict": {}, "tensors": {}}),
    "weights that are none": saved({**GRAPH, "graph": "{}", "state_dict": {"a": 1}, "tensors": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_kinds_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(OTHERS[name])
    for read in (load, lambda path: load_weights(network(), path)):
        with pytest.raises(CheckpointError, match=r"a\.pt") as caught:
            read(path)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "is text, not a file that torch.save wrote"),
        ("empty", "is empty: it was cut off"),
        ("a web page", "is a web page"),
        ("a pointer", "git lfs pull"),
    ],
)
def test_the_message_says_what_the_file_is(name: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(OTHERS[name])
    with pytest.raises(CheckpointError, match=said):
        load(path)


@pytest.mark.parametrize("file", ["folder", "absent", "unreadable link"])
def test_what_is_no_file_is_refused_by_name(file: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    if file == "folder":
        path.mkdir()
    elif file == "unreadable link":
        path.symlink_to(tmp_path / "nowhere")
    for read in (load, lambda path: load_weights(network(), path)):
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            read(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_disk_that_fills_up_leaves_the_old_file(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    save(symbolic_trace(network()), path)
    old = path.read_bytes()
    left = [int(share * len(old))]
    really_save = torch.save

    class Disk(io.BytesIO):
        def write(self, data: Any) -> int:
            if len(data) > left[0]:
                raise OSError(28, "No space left on device")
            left[0] -= len(data)
            return super().write(data)

    monkeypatch.setattr(torch, "save", lambda content, file: really_save(content, Disk()))
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.pt.*what was there is unchanged"):
        save(symbolic_trace(nn.Sequential(nn.Conv2d(2, 8, 1))), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


SAVING = """
import sys, torch
from torch import nn
from torch.fx import symbolic_trace
from fxprune.saving import save

models = [symbolic_trace(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, n))) for n in (10, 20)]
save(models[0], sys.argv[1])
print("ready", flush=True)
while True:
    for model in models:
        save(model, sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    draw = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert isinstance(load(path), fxprune.CompiledModule)
