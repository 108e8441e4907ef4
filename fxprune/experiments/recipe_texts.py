"""Recipes as command lines and configuration files have them: `2:4`, or `layer4.*=1:4` once for each name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from fxprune.errors import PatternError

EVERY = "*"
RecipeText: TypeAlias = str | dict[str, str]
"""What `fxprune.compile` takes as its pattern, with nothing but texts in it."""


def recipe_from(texts: Sequence[str]) -> str | dict[str, str]:
    """The recipe that is written in pieces; a piece without a name is for all layers that no other piece names.

    Args:
        texts: one recipe for all layers, or `name=recipe` for each name.

    Raises:
        PatternError: there is no piece, or two are for the same layers.

    >>> recipe_from(["rank:energy=0.9"])
    'rank:energy=0.9'
    >>> recipe_from(["2:4", "layer4.*=1:4"])
    {'layer4.*': '1:4', '*': '2:4'}
    """
    found: dict[str, str] = {}
    for name, recipe in map(_piece, texts):
        if name in found:
            whose = f"layers {name!r}" if name != EVERY else "all other layers"
            raise PatternError(f"two recipes are for {whose}, {found[name]!r} and {recipe!r}; give one")
        found[name] = recipe
    if not found:
        raise PatternError("there is no recipe; write '2:4', or 'layer4.*=1:4' once for each name")
    if EVERY in found and list(found) != [EVERY]:
        found[EVERY] = found.pop(EVERY)  # The first match counts, and this one matches everything.
    return found[EVERY] if list(found) == [EVERY] else found


def _piece(text: str) -> tuple[str, str]:
    """Name and recipe of a piece. The recipe may hold a = of its own, `rank:energy=0.9`, but no name holds a colon."""
    name, equals, recipe = text.partition("=")
    if not equals or ":" in name:
        return EVERY, text.strip()
    if not name.strip() or not recipe.strip():
        raise PatternError(f"{text!r} is no recipe for a layer; write LAYER=RECIPE, such as 'layer4.*=1:4'")
    return name.strip(), recipe.strip()


def file_name(recipe: str | Mapping[str, str]) -> str:
    """A recipe as part of a folder's name; one that is told by layer is too long for it and becomes a checksum.

    >>> file_name("rank:0.7+2:4")
    'rank-0.7-2-4'
    """
    if isinstance(recipe, str):
        return re.sub(r"[^\w.]+", "-", recipe)
    text = ", ".join(f"{name}: {of}" for name, of in recipe.items())
    return f"by-layer-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
