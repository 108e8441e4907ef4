"""Which ranks a network's layers could have, and the plan that a rule makes of them.

A rule is written "energy:0.95", "ratio:0.5", "multiply_adds:0.7" or "speedup:1.3".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.errors import OptionsError, SolverError
from fxprune.layers.splits import Split, full_rank
from fxprune.solvers.allocation import allocate

Kind = Literal["energy", "ratio", "multiply_adds", "speedup"]


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


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen.

    Attributes:
        kind: "energy": each layer keeps that share of its output's variance ("svd": of its squared singular values).
            "ratio": each layer keeps at most that share of its multiply-adds.
            "multiply_adds": the network keeps at most that share of its multiply-adds, spread over the layers by error.
            "speedup": the network gets that many times faster in onnxruntime, measured (`fxprune.low_rank` only).
        value: a share between 0 and 1; for "speedup" a factor above 1.
    """

    kind: Kind
    value: float

    @staticmethod
    def parse(text: str | RankRule) -> RankRule:
        """Read a rule; a RankRule is returned as it is.

        Raises:
            OptionsError: if the text is none.

        >>> RankRule.parse("energy:0.95")
        RankRule(kind='energy', value=0.95)
        """
        if isinstance(text, RankRule):
            return text
        name, _, figure = str(text).partition(":")
        try:
            value = float(figure)
        except ValueError:
            value = -1.0
        for kind in get_args(Kind):
            if name == kind and (value > 1 if kind == "speedup" else 0 < value < 1):
                return RankRule(kind, value)
        raise OptionsError(
            f"cannot read the rank rule {text!r}; write 'energy:0.95', 'ratio:0.5' or 'multiply_adds:0.7', a share "
            "between 0 and 1, or 'speedup:1.3', a factor above 1"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    def plan(self, survey: Survey) -> RankPlan:
        """Choose for every layer of a survey.

        Raises:
            OptionsError: the budget is out of reach, or the rule needs a measurement.
        """
        if self.kind == "speedup":
            raise OptionsError("'speedup' is measured on an exported model: use fxprune.low_rank, or another rule")
        if self.kind == "multiply_adds":
            chosen = within_budget(survey, int(self.value * survey.multiply_adds))
        else:
            chosen = {name: self._of_layer(layer) for name, layer in survey.layers.items()}
        return RankPlan.of(f"rank {self}", survey, chosen)

    def _of_layer(self, layer: LayerRanks) -> Choice | None:
        if self.kind == "energy":
            good = [choice for choice in layer.choices if choice.error <= 1 - self.value]
            return min(good, key=lambda choice: choice.multiply_adds, default=None)
        affordable = [choice for choice in layer.choices if choice.multiply_adds <= self.value * layer.multiply_adds]
        return min(affordable, key=lambda choice: choice.error, default=None)


def within_budget(survey: Survey, budget: int) -> dict[str, Choice | None]:
    """Choices with the least sum of errors such that the whole network stays within a budget of multiply-adds.

    Raises:
        OptionsError: even the lowest ranks exceed the budget.
    """
    layers = survey.layers
    fixed = survey.multiply_adds - sum(layer.multiply_adds for layer in layers.values())
    options: list[list[Choice | None]] = [[None, *layer.choices] for layer in layers.values()]
    costs = [[c.error if c else 0.0 for c in choices] for choices in options]
    kept = [
        [c.multiply_adds if c else layer.multiply_adds for c in choices]
        for layer, choices in zip(layers.values(), options, strict=True)
    ]
    if budget < (least := survey.least_multiply_adds):
        raise OptionsError(
            f"{budget / 1e6:.1f} M multiply-adds are out of reach: at the lowest ranks the network still has "
            f"{least / 1e6:.1f} M of {survey.multiply_adds / 1e6:.1f} M; ask for more, or for a smaller `multiple`"
        )
    try:
        levels = allocate(costs, kept, budget - fixed)
    except SolverError:  # The budget is within rounding of the least possible.
        levels = [counts.index(min(counts)) for counts in kept]
    return {name: choices[level] for name, choices, level in zip(layers, options, levels, strict=True)}
