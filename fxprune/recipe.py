"""Which layer is solved under which constraints: "2:4", "rank:0.7+2:4", or {"layer4.*": "1:4", "fc": "dense", "*": "2:4"}."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fxprune.constraints import Chain, chain_text, parse_chain
from fxprune.constraints.channels import Channels as Channels  # Read by parse_chain once it is imported.
from fxprune.constraints.mask import Mask
from fxprune.constraints.rank import Rank as Rank  # Read by parse_chain once it is imported.
from fxprune.errors import PatternError
from fxprune.pattern import Pattern

EVERY = "*"
SHOWN = 6  # layers in a message


@dataclass(frozen=True)
class Recipe:
    """Chains of constraints by layer name; of several names that match a layer the first counts.

    Attributes:
        entries: (name or fnmatch pattern, chain) each.
    """

    entries: tuple[tuple[str, Chain], ...]

    @staticmethod
    def parse(recipe: str | float | Pattern | Mapping[str, object] | Recipe) -> Recipe:
        """Read a recipe.

        Args:
            recipe: a chain as text ("2:4", "0.9", "mixed:0.6", "rank:0.7+2:4", "dense") for all layers, a `Pattern`, or a
                mapping from names or fnmatch patterns to such; first match wins, and a layer that nothing matches stays dense.
                A budget in a mapping ("mixed:0.6", "rank:0.7") is one of the layers that have it together.

        Raises:
            PatternError: it cannot be read; the message says what can.

        >>> str(Recipe.parse("rank:0.7 + 2:4"))
        'rank:0.7+2:4'
        >>> str(Recipe.parse({"layer4.*": "1:4", "*": "2:4"}))
        'layer4.*: 1:4, *: 2:4'
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            if not recipe:
                raise PatternError("the recipe is an empty mapping; write {'*': '2:4'}, or '2:4'")
            return Recipe(tuple((str(name), _of_named_layers(_chain(of))) for name, of in recipe.items()))
        return Recipe(((EVERY, _chain(recipe)),))

    def __str__(self) -> str:
        if self.is_uniform:
            return chain_text(self.entries[0][1])
        return ", ".join(f"{name}: {chain_text(chain)}" for name, chain in self.entries)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one chain."""
        return len(self.entries) == 1 and self.entries[0][0] == EVERY

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The sparsity patterns in it."""
        return tuple(c.pattern for _, chain in self.entries for c in chain if isinstance(c, Mask))

    @property
    def removes_channels(self) -> bool:
        """Whether it asks some layer for fewer channels."""
        return any(constraint.is_of_graph for _, chain in self.entries for constraint in chain)

    @property
    def sparsity(self) -> float:
        """The highest sparsity in it."""
        return max((constraint.sparsity for _, chain in self.entries for constraint in chain), default=0.0)

    def chain(self, name: str) -> Chain | None:
        """The constraints of the layer called `name`; None if no entry matches it."""
        return next((chain for pattern, chain in self.entries if _matches(name, pattern)), None)

    def check(self, names: Iterable[str]) -> None:
        """Make sure that every entry counts for some layer.

        Raises:
            PatternError: one matches no layer, most likely a misspelt name; or only layers that entries before it match.
        """
        names = list(dict.fromkeys(names))
        takes = {name: next((p for p, _ in self.entries if _matches(name, p)), None) for name in names}
        for pattern, _ in self.entries:
            if pattern == EVERY or pattern in takes.values():
                continue
            earlier = {str(takes[name]): None for name in names if _matches(name, pattern)}
            if earlier:
                before = ", ".join(map(repr, earlier))
                raise PatternError(
                    f"the recipe's {pattern!r} never counts: {before} matches all of its layers and stands before it; "
                    f"put {pattern!r} first"
                )
            close = [] if set(pattern) & set("*?[") else difflib.get_close_matches(pattern, names, n=3)
            some = close or (names if len(names) <= SHOWN else [*names[: SHOWN - 1], "...", names[-1]])
            called = ", ".join(name if name == "..." else repr(name) for name in some)
            there = f"did you mean {called}?" if close else f"layers: {called}"
            raise PatternError(f"the recipe's {pattern!r} matches no layer that the model calls; {there}")


def _matches(name: str, pattern: str) -> bool:
    """Whether a layer's name, or that of a module around it, matches."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _of_named_layers(chain: Chain) -> Chain:
    """A chain whose budget of MACs is one of the layers that it is given to, and not of the network."""
    return tuple(replace(c, of_network=False) if isinstance(c, Rank) else c for c in chain)


def _chain(text: object) -> Chain:
    if isinstance(text, Pattern):
        return (Mask(text),)
    if isinstance(text, (str, int, float)) and not isinstance(text, bool):
        return parse_chain(str(text))
    raise PatternError(f"a recipe holds {text!r} ({type(text).__name__}); write a text such as '2:4' or 'rank:0.7+2:4'")
