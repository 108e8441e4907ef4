"""RankRule: "energy:0.95", "ratio:0.5", "multiply_adds:0.7", "speedup:1.3" parsed, and ranks chosen by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fxprune.errors import OptionsError, SolverError
from fxprune.ranks.choices import Choice, LayerRanks, RankPlan, Survey
from fxprune.solvers.allocation import allocate

Kind = Literal["energy", "ratio", "multiply_adds", "speedup"]


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
            f"{budget:,} multiply-adds are out of reach: at the lowest ranks the network still has {least:,} of "
            f"{survey.multiply_adds:,}; ask for more, or for a smaller `multiple`"
        )
    try:
        levels = allocate(costs, kept, budget - fixed)
    except SolverError:  # The budget is within rounding of the least possible.
        levels = [counts.index(min(counts)) for counts in kept]
    return {name: choices[level] for name, choices, level in zip(layers, options, levels, strict=True)}
