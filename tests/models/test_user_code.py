from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from fxprune.errors import ModelError, UnknownModelError
from fxprune.models import create, model_info

NET = """
from torch import nn
from {helper} import make_layer

SIZE = 3


class {name}(nn.Sequential):
    def __init__(self, num_classes: int = 2, width: int = 4) -> None:
        super().__init__(make_layer(width), nn.Flatten(), nn.Linear(width, num_classes))


class Bare(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)


def build(depth):
    return nn.Sequential(*(Bare() for _ in range(depth)))


def fails():
    raise RuntimeError("no weights here")


ready = Bare()
"""


@pytest.fixture
def net(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with models, which imports another one beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    helper = f"helper_{request.node.name.partition('[')[0]}"
    (tmp_path / f"{helper}.py").write_text(
        "from torch import nn\n\n\ndef make_layer(width):\n    return nn.Conv2d(3, width, 3)\n"
    )
    (tmp_path / "mynet.py").write_text(NET.format(name="MyNet", helper=helper))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    return str(tmp_path / "mynet.py")


def test_a_class_in_a_file_that_imports_its_neighbour(net: str) -> None:
    model = create(f"{net}:MyNet", num_classes=7, width=5)
    assert (model[0].out_channels, model[2].out_features) == (5, 7)
    assert type(create(f"{net}:MyNet")) is type(model)


def test_a_function_and_a_model_that_is_there(net: str) -> None:
    assert len(create(f"{net}:build", depth=3)) == 3
    assert create(f"{net}:ready") is sys.modules["mynet"].ready


def test_a_class_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_mine").mkdir()
    (tmp_path / "zoo_of_mine" / "nets.py").write_text("from torch import nn\n\n\nclass Net(nn.ReLU): ...\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)  # the current folder is looked in, as with python -m
    assert isinstance(create("zoo_of_mine.nets:Net"), nn.ReLU)


def test_a_file_does_not_take_the_place_of_a_module_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("from torch import nn\n\n\nclass Net(nn.ReLU): ...\n")
    before = sys.modules["json"]
    create(f"{tmp_path / 'json.py'}:Net")
    assert sys.modules["json"] is before


@pytest.mark.parametrize(
    ("ending", "arguments", "said"),
    [
        ("", {}, "name the class too, .*mynet.py:MyNet; .* holds MyNet, Bare"),
        (":", {}, "name the class too"),
        (":MyNt", {}, "no 'MyNt' in it; did you mean .*mynet.py:MyNet"),
        (":SIZE", {}, "is a int, not a class or function"),
        (":Bare", {"num_classes": 3}, r"Bare\(num_classes=3\): got an unexpected keyword argument 'num_classes'"),
        (":build", {}, "missing a required argument: 'depth'.*--model-args"),
        (":fails", {}, "RuntimeError: no weights here .*mynet.py, line"),
        (":ready", {"width": 3}, "is a model already"),
    ],
)
def test_errors_name_what_is_wrong(net: str, ending: str, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        create(net + ending, **arguments)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module", "No module named 'no_such_module' .*broken.py, line 1"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero .*broken.py, line 1"),
        ("import sys\nsys.exit(3)", "SystemExit: 3 .*broken.py, line 2"),
        ("def", "SyntaxError"),
    ],
)
def test_code_that_fails_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ModelError, match=f"cannot import .*broken.py': {said}"):
        create(f"{tmp_path / 'broken.py'}:Net")
    with pytest.raises(ModelError, match="there is no such file"):
        create(f"{tmp_path / 'absent.py'}:Net")


def test_nothing_is_known_of_it_beforehand(net: str) -> None:
    with pytest.raises(ModelError, match="nothing is known about"):
        model_info(f"{net}:MyNet")
    with pytest.raises(UnknownModelError, match="no model named 'mynet'"):
        create("mynet")
