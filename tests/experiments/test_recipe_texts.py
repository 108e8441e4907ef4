from __future__ import annotations

import pytest

from fxprune.errors import PatternError
from fxprune.experiments.recipe_texts import file_name, recipe_from
from fxprune.recipe import Recipe


@pytest.mark.parametrize(
    ("texts", "recipe"),
    [
        (["2:4"], "2:4"),
        (["*=2:4"], "2:4"),
        (["rank:energy=0.9+2:4"], "rank:energy=0.9+2:4"),
        (["layer4.* = 1:4", "fc=dense", "2:4"], {"layer4.*": "1:4", "fc": "dense", "*": "2:4"}),
        (["2:4", "fc=rank:energy=0.9"], {"fc": "rank:energy=0.9", "*": "2:4"}),
        (["fc=0.9"], {"fc": "0.9"}),
    ],
)
def test_pieces_become_what_compile_takes(texts: list[str], recipe: str | dict[str, str]) -> None:
    found = recipe_from(texts)
    assert found == recipe
    if isinstance(found, dict):
        assert list(found) == list(recipe)  # The first match counts.
    Recipe.parse(found)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "there is no recipe"),
        (["2:4", "1:4"], "two recipes are for all other layers, '2:4' and '1:4'"),
        (["2:4", "*=1:4"], "all other layers"),
        (["fc=2:4", "fc=1:4"], "two recipes are for layers 'fc'"),
        (["=2:4"], "'=2:4' is no recipe for a layer"),
        (["fc="], "'fc=' is no recipe for a layer"),
    ],
)
def test_what_cannot_be_meant(texts: list[str], said: str) -> None:
    with pytest.raises(PatternError) as caught:
        recipe_from(texts)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_folders_are_short_plain_and_differ() -> None:
    recipes = ["2:4", "0.9", "rank:0.7+2:4", {"layer4.*": "1:4", "*": "2:4"}, {"layer3.*": "1:4", "*": "2:4"}]
    names = [file_name(recipe) for recipe in recipes]
    assert names[:3] == ["2-4", "0.9", "rank-0.7-2-4"]
    assert len(set(names)) == len(names)
    assert all(len(name) < 30 and not set(name) & set('/\\:*?"<>| ') for name in names)
