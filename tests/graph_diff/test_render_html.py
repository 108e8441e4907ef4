from __future__ import annotations

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.compiled import CompiledModule
from fxprune.geometry import flatten_weight
from fxprune.graph_diff import GraphDiff, diff
from fxprune.graph_diff.pictures import BINS, CORNER, OVERVIEW, draw_weights
from fxprune.graph_diff.weights import Weights
from tests.graph_diff.small_net import SmallNet, svd_pair


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or "code" if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    def buttons(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "button" and "node" in (attrs.get("class") or "").split()]


def page_of(result: GraphDiff, folder: Path) -> Page:
    result.to_html(folder / "diff.html")
    return Page((folder / "diff.html").read_text(encoding="utf-8"))


@pytest.fixture
def result(net: SmallNet, compiled: CompiledModule, images: Tensor) -> GraphDiff:
    return diff(net, compiled, example_inputs=images)


def test_the_page_needs_nothing_else(result: GraphDiff, tmp_path: Path) -> None:
    page = page_of(result, tmp_path)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset", "data"} & attrs.keys()]
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    text = (tmp_path / "diff.html").read_text(encoding="utf-8")
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") + text.count("http-equiv")
    assert "@import" not in text
    assert "url(#" in text
    assert text.count("url(") == text.count("url(#")


def test_every_node_is_one_button(result: GraphDiff, net: SmallNet, tmp_path: Path) -> None:
    for shown in (result, diff(net, svd_pair(net, 3))):
        buttons = page_of(shown, tmp_path).buttons()
        assert sorted(int(button["data-index"] or -1) for button in buttons) == list(range(len(shown.nodes)))
        for button in buttons:
            node = shown.nodes[int(button["data-index"] or -1)]
            assert button["title"] == node.name
            assert node.status in (button["class"] or "").split()


def test_the_data_are_those_of_the_diff(result: GraphDiff, tmp_path: Path) -> None:
    data = json.loads(page_of(result, tmp_path).scripts["data"])["nodes"]
    expected = json.loads(json.dumps(result.to_dict()["nodes"]))
    pictures = [node.pop("picture") for node in data]
    assert data == expected
    weighted = [node.state.weight_shape != () for node in result.nodes]
    assert [picture is not None for picture in pictures] == weighted


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "</script><b>", '"><script>x</script>', "a&b'{{7*7}}"]
)
def test_names_are_data(result: GraphDiff, name: str, tmp_path: Path) -> None:
    nodes = tuple(replace(node, name=f"{i}{name}", changes=(name,), folded=()) for i, node in enumerate(result.nodes))
    plain = page_of(result, tmp_path)
    page = page_of(replace(result, before=name, notes=(name,), nodes=nodes), tmp_path)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {button["title"] for button in page.buttons()} == {node.name for node in nodes}
    assert json.loads(page.scripts["data"])["nodes"][0]["name"] == f"0{name}"


def test_an_empty_diff_says_so(net: SmallNet, tmp_path: Path) -> None:
    result = diff(net, net)
    page_of(result, tmp_path)
    assert "No difference: SmallNet and SmallNet" in (tmp_path / "diff.html").read_text(encoding="utf-8")


def test_pictures_hold_the_mask_in_columns_of_input_channels(compiled: CompiledModule, result: GraphDiff) -> None:
    picture = result["conv2"].picture
    assert picture is not None
    assert picture.shape == picture.corner_shape == (8, 72)
    assert picture.corner_after is not None
    levels = np.frombuffer(picture.corner_after, np.int8).reshape(8, 72)
    weight = flatten_weight(compiled.get_submodule("conv2").weight.detach())
    assert ((levels != 0) == (weight != 0).numpy()).all()
    assert (np.sign(levels) == weight.sign().numpy()).all()
    assert np.abs(levels / 127 * picture.limit - weight.numpy()).max() <= picture.limit / 127
    assert ((levels.reshape(8, 18, 4) != 0).sum(-1) == 2).all()


def test_small_weights_are_not_drawn_as_zeros() -> None:
    weight = torch.tensor([[1.0, 1e-6], [-1e-6, 0.0]])
    picture = draw_weights(None, Weights(weight))
    assert picture is not None
    assert picture.corner_after is not None
    assert np.frombuffer(picture.corner_after, np.int8).tolist() == [127, 1, -1, 0]


def test_pictures_of_large_weights_stay_small_and_keep_the_shares() -> None:
    weight = torch.randn(256, 128, 3, 3)
    weight[:128] = 0
    picture = draw_weights(Weights(torch.randn(256, 128, 3, 3)), Weights(weight))
    assert picture is not None
    assert picture.corner_shape == CORNER
    assert picture.overview_shape == OVERVIEW
    assert picture.overview_before == bytes([255]) * (OVERVIEW[0] * OVERVIEW[1])
    assert picture.overview_after is not None
    shares = np.frombuffer(picture.overview_after, np.uint8).reshape(OVERVIEW)
    assert (shares[:32] == 0).all()
    assert (shares[32:] == 255).all()
    assert len(base64.b64encode(picture.overview_after)) < 20_000


def test_histograms_count_every_weight_once() -> None:
    weight = torch.randn(16, 16, 3, 3)
    weight[weight.abs() < 0.5] = 0
    picture = draw_weights(None, Weights(weight))
    assert picture is not None
    histogram = picture.histogram_after
    assert histogram is not None
    assert sum(histogram.counts) + histogram.zeros == weight.numel()
    assert histogram.zeros == int((weight == 0).sum())
    assert histogram.counts[BINS // 2] == 0
    edges = np.linspace(-histogram.limit, histogram.limit, BINS + 1)
    expected = np.histogram(weight[weight != 0].double().numpy(), edges)[0]
    assert np.abs(np.array(histogram.counts) - expected).max() <= 1  # rounding at the edges


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.full((4, 4), float("nan"))])
def test_weights_without_numbers_can_be_drawn(weight: Tensor) -> None:
    picture = draw_weights(Weights(weight), Weights(weight))
    assert picture is not None
    assert picture.corner_after == bytes(16)
    assert draw_weights(Weights(torch.zeros(0, 4)), None) is None
    assert draw_weights(Weights(torch.ones(4)), None) is None


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({f"{kind}_projection": nn.Linear(8, 8) for kind in "qkv"})
        self.encoder_of_pictures = nn.ModuleDict({"self_attention_of_layer_0": attention})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder_of_pictures["self_attention_of_layer_0"].values():
            x = layer(x)
        return x


def test_long_names_keep_what_tells_them_apart(tmp_path: Path) -> None:
    net, other = Deep(), Deep()
    diff(net, other).to_html(tmp_path / "diff.html")
    page = (tmp_path / "diff.html").read_text(encoding="utf-8")
    for kind in "qkv":
        name = f"encoder_of_pictures.self_attention_of_layer_0.{kind}_projection"
        assert f'title="{name}"' in page  # When the mouse rests on it.
        assert f'<span class="title">…self_attention_of_layer_0.{kind}_projection</span>' in page
