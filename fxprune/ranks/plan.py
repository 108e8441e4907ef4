"""Which ranks a network's layers could have, and the plan that a rule makes of them.

A rule is written "energy:0.95", "ratio:0.5", "macs:0.7" or "speedup:1.3".
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

Kind = Literal["energy", "ratio", "macs", "speedup"]


@dataclass(frozen=True)
class Choice:
    """One way to factor a layer.

    Attributes:
        split: how.
        rank: r, the channels between the two layers.
        macs: of both for one sample.
        error: expected, relative: of the output ("data_aware") or of the weight ("svd").
    """

    split: Split
    rank: int
    macs: int
    error: float


def pareto(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The choices that no other beats in both MACs and error, cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.macs, choice.error)):
        if not kept or choice.error < kept[-1].error:
            kept.append(choice)
    return tuple(kept)


@dataclass(frozen=True)
class LayerRanks:
    """What a survey found out about one layer.

    Attributes:
        macs: of the layer as it is, for one sample.
        choices: those that save MACs, cheapest first, none beaten by another.
        spectra: singular values by split, descending, relative to the largest.
    """

    macs: int
    choices: tuple[Choice, ...]
    spectra: Mapping[Split, tuple[float, ...]]


@dataclass(frozen=True)
class Survey:
    """What a survey found out about a network.

    Attributes:
        layers: by name, every layer that has one of the splits.
        macs: of all Conv and Linear modules for one sample.
    """

    layers: Mapping[str, LayerRanks]
    macs: int

    @property
    def of_its_layers(self) -> Survey:
        """The same, as if there were no other layers."""
        return Survey(self.layers, sum(layer.macs for layer in self.layers.values()))

    @property
    def least_macs(self) -> int:
        """Of the whole network with the lowest ranks everywhere."""
        saved = (layer.macs - layer.choices[0].macs for layer in self.layers.values() if layer.choices)
        return self.macs - sum(saved)


@dataclass(frozen=True)
class PlannedLayer:
    """What one layer is to become.

    Attributes:
        macs: of the layer as it is.
        choice: None leaves it whole.
        reason: why it stays whole, else "".
    """

    macs: int
    choice: Choice | None
    reason: str = ""


@dataclass(frozen=True)
class RankPlan:
    """What each layer is to become.

    Attributes:
        rule: how it was chosen, in words.
        layers: by name.
        macs: of all Conv and Linear modules for one sample, (now, then).
    """

    rule: str
    layers: Mapping[str, PlannedLayer]
    macs: tuple[int, int]

    @classmethod
    def of(cls, rule: str, survey: Survey, chosen: Mapping[str, Choice | None]) -> RankPlan:
        """A plan from one choice, or None, for each layer of a survey."""
        layers = {}
        for name, layer in survey.layers.items():
            choice = chosen[name]
            reason = "" if choice else f"left whole by {rule}" if layer.choices else "no rank would save MACs"
            layers[name] = PlannedLayer(layer.macs, choice, reason)
        saved = sum(p.macs - p.choice.macs for p in layers.values() if p.choice)
        return cls(rule, layers, (survey.macs, survey.macs - saved))

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
            "ratio": each layer keeps at most that share of its MACs.
            "macs": the network keeps at most that share of its MACs, spread over the layers by error.
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
        name = "macs" if name == "multiply_adds" else name  # As it was called at first.
        try:
            value = float(figure)
        except ValueError:
            value = -1.0
        for kind in get_args(Kind):
            if name == kind and (value > 1 if kind == "speedup" else 0 < value < 1):
                return RankRule(kind, value)
        raise OptionsError(
            f"cannot read the rank rule {text!r}; write 'energy:0.95', 'ratio:0.5' or 'macs:0.7', a share "
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
        if self.kind == "macs":
            chosen = within_budget(survey, int(self.value * survey.macs))
        else:
            chosen = {name: self._of_layer(layer) for name, layer in survey.layers.items()}
        return RankPlan.of(f"rank {self}", survey, chosen)

    def _of_layer(self, layer: LayerRanks) -> Choice | None:
        if self.kind == "energy":
            good = [choice for choice in layer.choices if choice.error <= 1 - self.value]
            return min(good, key=lambda choice: choice.macs, default=None)
        affordable = [choice for choice in layer.choices if choice.macs <= self.value * layer.macs]
        return min(affordable, key=lambda choice: choice.error, default=None)


def within_budget(survey: Survey, budget: int) -> dict[str, Choice | None]:
    """Choices with the least sum of errors such that the whole network stays within a budget of MACs.

    Raises:
        OptionsError: even the lowest ranks exceed the budget.
    """
    layers = survey.layers
    fixed = survey.macs - sum(layer.macs for layer in layers.values())
    options: list[list[Choice | None]] = [[None, *layer.choices] for layer in layers.values()]
    costs = [[c.error if c else 0.0 for c in choices] for choices in options]
    kept = [
        [c.macs if c else layer.macs for c in choices] for layer, choices in zip(layers.values(), options, strict=True)
    ]
    if budget < (least := survey.least_macs):
        raise OptionsError(
            f"{budget:,} MACs are out of reach: at the lowest ranks {least:,} of {survey.macs:,} are left; "
            "ask for more, or for a smaller `multiple`"
        )
    try:
        levels = allocate(costs, kept, budget - fixed)
    except SolverError:  # The budget is within rounding of the least possible.
        levels = [counts.index(min(counts)) for counts in kept]
    return {name: choices[level] for name, choices, level in zip(layers, options, levels, strict=True)}
