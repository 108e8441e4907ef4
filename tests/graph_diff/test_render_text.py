from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.text import Text
from torch import Tensor

from fxprune.compiled import CompiledModule
from fxprune.graph_diff import GraphDiff, diff
from tests.graph_diff.small_net import SmallNet, svd_pair

Golden = Callable[[str, str], None]


@pytest.fixture
def result(net: SmallNet, compiled: CompiledModule, images: Tensor) -> GraphDiff:
    return diff(net, compiled, example_inputs=images)


def with_fixed_reasons(result: GraphDiff) -> GraphDiff:
    """The wording of reasons is the passes' own, and no part of these snapshots."""
    reasons = {"conv1": "not pruned: why conv1 was not pruned"}
    notes = {"act": ("SomePass: what it did to act",), "conv1": ("SomePass: what it did to conv1",)}
    nodes = tuple(
        replace(node, reason=reasons.get(node.name, ""), notes=notes.get(node.name, ())) for node in result.nodes
    )
    return replace(result, nodes=nodes)


def test_the_text_of_a_compiled_model(result: GraphDiff, golden: Golden) -> None:
    golden("graph_diff/compiled.txt", with_fixed_reasons(result).render(color=False) + "\n")


def test_the_text_with_all_nodes(result: GraphDiff, golden: Golden) -> None:
    golden("graph_diff/compiled_all.txt", with_fixed_reasons(result).render(all=True, color=False) + "\n")


def test_the_text_of_an_svd_pair(net: SmallNet, golden: Golden) -> None:
    golden("graph_diff/svd_pair.txt", diff(net, svd_pair(net, 3)).render(color=False) + "\n")


def test_all_adds_unchanged_nodes_and_folded_batchnorms(result: GraphDiff) -> None:
    some, everything = result.render(color=False), result.render(all=True, color=False)
    assert "\n- bn1 " not in some
    assert "\n  fc " not in some
    assert "\n- bn1 " in everything
    assert "\n  act " in everything


@pytest.mark.parametrize("width", [60, 80, 100])
def test_long_names_and_reasons_stay_within_the_width(result: GraphDiff, width: int) -> None:
    long = replace(
        result,
        before="SomeNetworkWithAVeryLongClassName" * 2,
        nodes=tuple(
            replace(
                node,
                name=f"features.denseblock4.denselayer24.{node.name}",
                reason="not pruned: " + "no reason in particular " * 9,
            )
            for node in result.nodes
        ),
    )
    lines = long.render(all=True, color=False, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "noreasoninparticular" in "".join("".join(line.split()) for line in lines)


def test_colours_are_marks_on_the_same_text(result: GraphDiff) -> None:
    plain, coloured = result.render(color=False), result.render(color=True)
    assert "\x1b[" not in plain
    assert "\x1b[3" in coloured
    assert [line.rstrip() for line in Text.from_ansi(coloured).plain.splitlines()] == plain.splitlines()


def test_str_has_no_colours_where_there_is_no_terminal(result: GraphDiff) -> None:
    assert str(result) == result.render(color=False)


def test_a_terminal_gets_colours_unless_no_color_is_set(result: GraphDiff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in str(result)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", str(result))


def test_every_reason_is_told_once_below_the_table(result: GraphDiff) -> None:
    text = result.render(color=False)
    assert text.count("3 input channels are not a multiple of 4") == 1
    assert "not pruned [1]" in text
    assert "\n[1] 3 input channels" in text


def test_markup_in_names_is_text(result: GraphDiff) -> None:
    odd = replace(result, nodes=tuple(replace(node, name="[red]block[/red]") for node in result.nodes))
    assert "[red]block[/red]" in odd.render(color=False)
