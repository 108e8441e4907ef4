from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxprune.cli import app
from fxprune.experiments.grid import read_grid
from fxprune.experiments.yaml_files import read_yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_known_and_the_command_is_as_written(config: Path, tmp_path: Path) -> None:
    words = config.read_text().splitlines()[0].removeprefix("# fxprune ").split()
    if words[0] == "benchmark":
        assert read_grid(config).models
        return
    assert words[1:3] == ["--config", f"examples/configs/{config.name}"]
    result = CliRunner().invoke(app, [words[0], "--config", str(config), *words[3:], "--print-config"])
    assert result.exit_code == 0, result.output
    (tmp_path / "printed.yaml").write_text(result.output)
    printed = read_yaml(tmp_path / "printed.yaml")
    for key, value in read_yaml(config).items():
        assert printed[key] == value


def test_there_are_some() -> None:
    assert len(CONFIGS) >= 5
