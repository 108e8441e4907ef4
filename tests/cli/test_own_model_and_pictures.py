"""A newcomer's way in: a class of one's own, and images without labels."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune import compile, save
from fxprune.experiments.yaml_files import read_yaml
from fxprune.export import inspect_onnx
from fxprune.models import create
from fxprune.saving import load

Fxprune = Callable[..., str]
GREY = ("--mean", "0.13", "--std", "0.31")

NET = """
from torch import nn
from own_block import block


class Net(nn.Sequential):
    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__(block(1, width), block(width, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes))
"""
BLOCK = (
    "from torch import nn\n\n\ndef block(a, b):\n    return nn.Sequential(nn.Conv2d(a, b, 3, stride=2), nn.ReLU())\n"
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own_net.py, own_block.py, net.pt, 30 pictures, and the same images as arrays."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_net.py").write_text(NET)
    (folder / "own_block.py").write_text(BLOCK)
    torch.manual_seed(0)
    torch.save(create(f"{folder / 'own_net.py'}:Net", width=12).state_dict(), folder / "net.pt")
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    (folder / "pictures").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / "pictures" / f"{place}.png")
    np.savez(folder / "images.npz", images=images[:, None].astype(np.float32) / 255)
    return folder


def given(net: Path, data: str) -> tuple[object, ...]:
    return (
        "--model",
        f"{net / 'own_net.py'}:Net",
        "--model-args",
        "width=12",
        "--weights",
        net / "net.pt",
        "--data",
        net / data,
    )


@pytest.mark.parametrize("data", ["pictures", "images.npz"])
def test_pruned_on_images_without_labels(fxprune: Fxprune, net: Path, tmp_path: Path, data: str) -> None:
    said = fxprune("prune", *given(net, data), *GREY, "--image-size", 28, "--calibration-images", 20, "--out", tmp_path)
    assert "10 images that were not calibrated on" in said
    assert "accuracy" not in said
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    assert results["layers_pruned"] == 2
    assert results["input_shape"] == [1, 28, 28]
    assert "accuracy" not in results
    assert load(tmp_path / "pruned.pt").report.images == 20
    assert read_yaml(tmp_path / "config.yaml")["model_args"] == {"width": 12}


@pytest.mark.parametrize("data", ["pictures", "images.npz"])
def test_two_files_are_compared_without_labels(fxprune: Fxprune, net: Path, tmp_path: Path, data: str) -> None:
    fxprune("prune", *given(net, data), *GREY, "--image-size", 28, "--calibration-images", 20, "--out", tmp_path)
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    for file in ("pruned.pt", "model.onnx"):
        said = fxprune("evaluate", tmp_path / file, "--against", net / "net.pt", "--json-file", tmp_path / "f.json")
        assert "of 10 images" in said  # Those that the run was not calibrated on.
        assert "which has no labels" in said
        figures = json.loads((tmp_path / "f.json").read_text())
        assert "accuracy" not in figures
        assert (figures["images"], figures["agreement"]) == (10, results["agreement"])
        assert figures["kl"] == pytest.approx(results["kl"], abs=1e-5)
    for file in ("pruned.pt", "model.onnx"):
        shutil.copy(tmp_path / file, net)
    elsewhere = ("--against", net / "model.onnx", "--data", net / data, *GREY, "--image-size", 28)
    assert "on 100.00% of 30 images" in fxprune("evaluate", net / "pruned.pt", *elsewhere)
    assert "on 100.00% of 7 images" in fxprune("evaluate", net / "pruned.pt", *elsewhere, "--test-images", 7)
    said = fxprune("evaluate", tmp_path / "pruned.pt", code=1)
    assert "holds no labels, which accuracy needs; --against another file" in " ".join(said.split())


def test_more_images_than_there_are_is_a_warning(fxprune: Fxprune, net: Path, tmp_path: Path) -> None:
    said = fxprune("prune", *given(net, "images.npz"), *GREY, "--no-onnx", "--out", tmp_path)
    assert "warning: 1024 calibration images were asked for, the data set has 30" in said
    assert "calibration images: there are no others" in said


def test_the_configuration_makes_it_again_from_a_mapping(fxprune: Fxprune, net: Path, tmp_path: Path) -> None:
    fxprune("prune", *given(net, "images.npz"), *GREY, "--no-onnx", "--out", tmp_path / "a")
    fxprune("prune", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    first, second = (load(tmp_path / name / "pruned.pt").state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_low_rank_and_export(fxprune: Fxprune, net: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr"
    said = fxprune("low-rank", *given(net, "images.npz"), *GREY, "--rank", "ratio:0.5", "--multiple", 1, "--out", out,
                   "--exclude", "4", "--opset", 19)  # fmt: skip
    assert "times fewer" in " ".join(said.split())
    report = load(out / "pruned.pt").report
    assert report["1.0"].status == "factored"
    assert report["4"].status == "kept"
    assert json.loads((out / "onnx.json").read_text())["opset"] == 19
    said = fxprune("export", out / "pruned.pt", "--precision", "fp16", "--out", tmp_path / "half.onnx")
    assert "fp16" in said
    assert (tmp_path / "half.onnx").stat().st_size < (out / "model.onnx").stat().st_size
    assert "is an ONNX file already" in fxprune("export", tmp_path / "half.onnx", code=1)


def test_weights_are_exported_with_the_model_named(fxprune: Fxprune, net: Path, tmp_path: Path) -> None:
    model = ("--model", f"{net / 'own_net.py'}:Net", "--model-args", "width=12", "--out", tmp_path / "d.onnx")
    assert "give --input-shape" in fxprune("export", net / "net.pt", *model, code=1)
    assert "write the sizes" in fxprune("export", net / "net.pt", *model, "--input-shape", "1,x", code=1)
    assert "d.onnx" in fxprune("export", net / "net.pt", *model, "--input-shape", "1,28,28")


def test_nothing_pruned_is_not_a_success(fxprune: Fxprune, net: Path, tmp_path: Path) -> None:
    said = fxprune(
        "prune", *given(net, "images.npz"), *GREY, "--pattern", "3:5", "--no-onnx", "--out", tmp_path, code=1
    )
    assert "error: nothing can be compressed to 3:5: of 3 layers none can take it" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--device", "potato"), "no device 'potato'; write cpu", 1),
        (("--device", "meta"), "holds no values", 1),
        (("--model-args", "width"), "'width' is not KEY=VALUE", 2),
        (("--mean", "0.1,b"), "'0.1,b' is not a row of numbers", 2),
        (("--model-args", "depth=3"), "unexpected keyword argument 'depth'", 1),
        (("--weights", "absent.pt"), "there is no file absent.pt", 1),
    ],
)
def test_wrong_uses_are_one_line(
    fxprune: Fxprune, net: Path, tmp_path: Path, arguments: tuple[str, ...], said: str, code: int
) -> None:
    output = fxprune("prune", *given(net, "images.npz"), *GREY, "--out", tmp_path / "x", *arguments, code=code)
    assert said in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["", "text\n", "<!DOCTYPE html>"])
def test_files_that_are_no_weights(fxprune: Fxprune, net: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "w.pt").write_text(content)
    said = fxprune("prune", *given(net, "images.npz"), *GREY, "--weights", tmp_path / "w.pt", code=1)
    assert {"": "is empty", "text\n": "is text", "<!DOCTYPE html>": "is a web page"}[content] in said


@pytest.fixture(autouse=True)
def _restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("size", [28, 20])
def test_a_model_that_is_no_classifier_has_no_agreement(fxprune: Fxprune, net: Path, tmp_path: Path, size: int) -> None:
    images = np.random.default_rng(1).random((80, 1, size, size), np.float32)
    np.savez(tmp_path / "more.npz", images=images)
    said = fxprune(
        "prune", *given(net, tmp_path / "more.npz"), *GREY, "--calibration-images", 70, "--out", tmp_path / "a"
    )
    assert "do not look like the logits of a trained classifier" in " ".join(said.split())
    assert "agreement with" not in said
    assert "Top-1 agreement" not in said
    assert not {"agreement", "kl"} & json.loads((tmp_path / "a" / "run.json").read_text())["results"].keys()


def test_a_saved_model_of_sequences_is_exported_without_more_words(fxprune: Fxprune, tmp_path: Path) -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = torch.nn.GRU(4, 8, batch_first=True), torch.nn.Linear(8, 4)

        def forward(self, words: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
            return self.fc(self.rnn(words * known)[0])

    batch = {"words": torch.randn(40, 6, 4), "known": torch.ones(40, 6, 1)}
    compiled = compile(Tagger().eval(), [batch], progress=False)
    save(compiled, tmp_path / "tagger.pt")
    fxprune("export", tmp_path / "tagger.pt")
    told = inspect_onnx(tmp_path / "tagger.onnx")
    assert [port.partition(" (")[2] for port in told.inputs] == ["batch, 6, 4)", "batch, 6, 1)"]
    assert {layer.initializer for layer in told.layers} >= {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
