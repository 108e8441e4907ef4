from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.coverage import __main__ as command
from benchmarks.coverage.output import write_markdown
from benchmarks.coverage.process import run_in_process
from benchmarks.coverage.row import Row
from benchmarks.coverage.stages import run
from benchmarks.coverage.zoos import cases

# One for each way in, and each kind of model; `python -m benchmarks.coverage` runs them all.
SAMPLE = (
    "awkward/BareParameters", "awkward/Detector", "awkward/DataDependent", "awkward/Transformer", "torchvision/mobilenet_v2",
    "torchvision/ssdlite320_mobilenet_v3_large", "timm/tf_efficientnet_lite0", "timm/mobilevit_xxs", "ultralytics/yolo11n",
    "smp/Unet-resnet18", "facenet-pytorch/PNet",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_goes_through_all_stages(name: str) -> None:
    row = run(cases()[name], pattern="2:4", method="magnitude")
    if not row.is_installed:
        pytest.skip(row.note)
    assert not row.failed
    assert row.of_possible is not None
    assert row.of_possible > 0.95


def test_names_are_different() -> None:
    known = cases()
    assert len({case.zoo for case in known.values()}) == 8
    assert sum(case.zoo == "timm" for case in known.values()) == 100


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def instead(name: str, pattern: str, method: str, *, limit: float) -> Row:
        asked.append(name)
        zoo, model = name.split("/")
        ok = dict.fromkeys(("compile", "export", "diff", "save", "load", "exclude"), "ok")
        return Row(
            zoo, model, **(ok if model != "Einsum" else ok | {"save": "CheckpointError: why | not"}), of_possible=0.5
        )

    monkeypatch.setattr(command, "run_in_process", instead)
    output = tmp_path / "table"
    command.main(["--only", "awkward/E*", "--output", str(output)])
    command.main(["--only", "awkward/E*", "awkward/Tied*", "--output", str(output)])
    assert asked == ["awkward/Einsum", "awkward/EarlyExit", "awkward/TiedWeights"]
    command.main(["--only", "awkward/*", "--failed", "--output", str(output)])
    assert asked.count("awkward/Einsum") == 2
    text = output.with_suffix(".md").read_text()
    assert "| awkward/Einsum | save | CheckpointError: why \\| not |" in text


def test_what_is_not_installed_is_said(tmp_path: Path) -> None:
    write_markdown(
        tmp_path / "table.md", [Row("timm", "a", note="not installed: No module named 'timm'")], "2:4", "magnitude"
    )
    assert "| timm | 0 | not installed |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_network_that_takes_too_long_is_stopped() -> None:
    row = run_in_process("torchvision/vgg11_bn", "2:4", "magnitude", limit=3)
    assert "stopped after 3 s" in row.note
