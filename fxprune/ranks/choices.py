"""What the parts of rank reduction tell each other: the choices a layer has, and the plan for a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.errors import OptionsError
from fxprune.layers.splits import Split, full_rank


@dataclass(frozen=True)
class Choice:
    """One way to factor a layer.

    Attributes:
        split: how.
        rank: r, the channels between the two layers.
        multiply_adds: of both for one sample.
        error: expected, relative: of the output ("data_aware") or of the weight ("svd").
    """

    split: Split
    rank: int
    multiply_adds: int
    error: float


def pareto(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The choices that no other beats in both multiply-adds and error, cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.multiply_adds, choice.error)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return tuple(kept)


@dataclass(frozen=True)
class LayerRanks:
    """What a survey found out about one layer.

    Attributes:
        multiply_adds: of the layer as it is, for one sample.
        choices: those that save multiply-adds, cheapest first, none beaten by another.
        spectra: singular values by split, descending, relative to the largest.
    """

    multiply_adds: int
    choices: tuple[Choice, ...]
    spectra: Mapping[Split, tuple[float, ...]]


@dataclass(frozen=True)
class Survey:
    """What a survey found out about a network.

    Attributes:
        layers: by name, every layer that has one of the splits.
        multiply_adds: of all Conv and Linear modules for one sample.
    """

    layers: Mapping[str, LayerRanks]
    multiply_adds: int

    @property
    def least_multiply_adds(self) -> int:
        """Of the whole network with the lowest ranks everywhere."""
        saved = (
            layer.multiply_adds - layer.choices[0].multiply_adds for layer in self.layers.values() if layer.choices
        )
        return self.multiply_adds - sum(saved)


@dataclass(frozen=True)
class PlannedLayer:
    """What one layer is to become.

    Attributes:
        multiply_adds: of the layer as it is.
        choice: None leaves it whole.
        reason: why it stays whole, else "".
    """

    multiply_adds: int
    choice: Choice | None
    reason: str = ""


@dataclass(frozen=True)
class RankPlan:
    """What each layer is to become.

    Attributes:
        rule: how it was chosen, in words.
        layers: by name.
        multiply_adds: of all Conv and Linear modules for one sample, (now, then).
    """

    rule: str
    layers: Mapping[str, PlannedLayer]
    multiply_adds: tuple[int, int]

    @classmethod
    def of(cls, rule: str, survey: Survey, chosen: Mapping[str, Choice | None]) -> RankPlan:
        """A plan from one choice, or None, for each layer of a survey."""
        layers = {}
        for name, layer in survey.layers.items():
            choice = chosen[name]
            reason = "" if choice else f"left whole by {rule}" if layer.choices else "no rank would save multiply-adds"
            layers[name] = PlannedLayer(layer.multiply_adds, choice, reason)
        saved = sum(p.multiply_adds - p.choice.multiply_adds for p in layers.values() if p.choice)
        return cls(rule, layers, (survey.multiply_adds, survey.multiply_adds - saved))

    def choice(self, name: str) -> Choice | None:
        """How a layer is to be factored; None if it stays whole or is not in the plan."""
        return self.layers[name].choice if name in self.layers else None

    def reason(self, name: str) -> str:
        """Why a layer that could be factored stays whole."""
        return self.layers[name].reason if name in self.layers else f"not in the plan ({self.rule})"

    def check(self, graph_module: GraphModule) -> None:
        """Make sure that the plan fits a graph, before any layer is touched.

        Raises:
            OptionsError: it factors a layer that is not there, or in a way that the layer does not have.
        """
        layers = {
            str(node.target): geometry
            for node in graph_module.graph.nodes
            if (geometry := annotation(node).geometry) is not None
        }
        for name in self.layers:
            choice = self.choice(name)
            if choice is None:
                continue
            if name not in layers:
                raise OptionsError(
                    f"the plan factors {name!r}, which is no layer that can be; there are: {', '.join(layers)}"
                )
            highest = full_rank(layers[name], choice.split)
            if not 1 <= choice.rank <= highest:
                ranks = f"ranks from 1 to {highest}" if highest else "no such split"
                raise OptionsError(
                    f"the plan gives {name!r} rank {choice.rank} by a {choice.split} split; it has {ranks}"
                )
