"""Files made to run code or to reach other files: each must be refused, by name, before anything happens."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from fxprune.errors import CheckpointError
from fxprune.saving import load, save

MARK = "PWNED"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x)).view(x.shape[0], -1)


def node(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in graph["nodes"] if n["op"] == op)


def conv(graph: dict[str, Any]) -> dict[str, Any]:
    inner = graph["modules"]["modules"]["inner"]["modules"]
    return inner["0"]


def call(target: str, *args: Any) -> Callable[[dict[str, Any]], None]:
    return lambda graph: node(graph, "call_function").update(target=target, args=list(args))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "os.system": call("os.system", f"touch {MARK}"),
    "posix.system": call("posix.system", f"touch {MARK}"),
    "eval": call("builtins.eval", f"open('{MARK}', 'w')"),
    "open": call("builtins.open", MARK, "w"),
    "import": call("builtins.__import__", "antigravity"),
    "hub": call("torch.hub.load", "a/b", "c"),
    "torch.load": call("torch.load", "x"),
    "torch.save": call("torch.save", [1], MARK),
    "from_file": call("torch.from_file", MARK, True, 10),
    "aten from_file": call("torch.ops.aten.from_file.default", MARK, True, 10),
    "ops load_library": call("torch.ops.load_library", "x.so"),
    "F's own imports": call("torch.nn.functional.importlib.import_module", "antigravity"),
    "attrgetter": call("operator.attrgetter", "__class__"),
    "methodcaller": call("operator.methodcaller", "__reduce__"),
    "operator.call": call("operator.call", {"function": "torch.relu"}),
    "getattr private": call("builtins.getattr", {"node": "x"}, "__class__"),
    "getattr computed": call("builtins.getattr", {"node": "x"}, {"node": "x"}),
    "download": call("torchvision.datasets.utils.download_url", "u", "r"),
    "function argument": call("torch.relu", {"function": "os.system"}),
    "class argument": call("torch.relu", {"class": "subprocess.Popen"}),
    "record argument": call("torch.relu", {"record": "subprocess.Popen", "fields": {"args": ["touch", MARK]}}),
    "record that is none": call("torch.relu", {"record": "fxprune.files.os.system", "fields": {"command": MARK}}),
    "constant that is none": call("torch.relu", {"constant": "hub"}),
    "placeholder": lambda g: node(g, "placeholder").update(target=f"x=open('{MARK}', 'w')"),
    "method": lambda g: node(g, "call_method").update(target=f"view(open('{MARK}', 'w')) or x.view"),
    "private method": lambda g: node(g, "call_method").update(target="__reduce_ex__", args=[{"node": "x"}, 2]),
    "method of others": lambda g: node(g, "call_method").update(target="tofile"),
    "module path": lambda g: node(g, "call_module").update(target=f'inner.0")(open("{MARK}", "w'),
    "keyword": lambda g: node(g, "call_function").update(kwargs={f"a=open('{MARK}', 'w'), b": 1}),
    "node name": lambda g: node(g, "placeholder").update(name=f"x: open('{MARK}', 'w')"),
    "op": lambda g: node(g, "call_function").update(op="call_anything"),
    "class name": lambda g: g.update(class_name=f"A: open('{MARK}', 'w')"),
    "module class": lambda g: conv(g).update({"class": "subprocess.Popen"}),
    "module class elsewhere": lambda g: conv(g).update({"class": "torch.nn.functional.F"}),
    "module class imported": lambda g: conv(g).update({"class": "torch.nn.modules.conv.math.floor"}),
    "attribute": lambda g: conv(g)["attributes"].update(_forward_hooks={"dict": [[0, {"function": "torch.relu"}]]}),
    "dunder attribute": lambda g: conv(g)["attributes"].update(__class__="x"),
    "weight name": lambda g: g["modules"]["parameters"].update({'a")(open("x': None}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(symbolic_trace(Model()), "model.pt")
    content = torch.load("model.pt", weights_only=True)
    graph = json.loads(content["graph"])
    before = json.dumps(graph)
    HOSTILE[name](graph)
    assert json.dumps(graph) != before
    torch.save(content | {"graph": json.dumps(graph)}, "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load("model.pt")
    assert os.listdir() == ["model.pt"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "fxprune graph", "graph": Bomb()}, "model.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    for file in ("model.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(file)
    assert MARK not in os.listdir()
