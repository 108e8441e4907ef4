"""How many channels stay in each width under a budget of MACs or time: the least sum of errors, by bisection on a price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxprune.widths.network import LayerSize, Numbers

SWEEPS = 20  # Over all widths at one price; the choices settle after a few.
PRICES = 40  # Bisections.


@dataclass(frozen=True)
class Curve:
    """What a width costs by how many of its units are left.

    Attributes:
        choices: how many may be left, most first.
        errors: of each choice.
    """

    choices: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass
class Budget:
    """Choices over all widths together.

    Attributes:
        curves: of the widths.
        layers: what they cost.
        at: by number of a width, the number of its choice.
    """

    curves: Sequence[Curve]
    layers: Sequence[LayerSize]
    at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = self.at or [0] * len(self.curves)
        touched: list[list[LayerSize]] = [[] for _ in self.curves]
        for layer in self.layers:
            for w in {*layer.inputs, *layer.outputs}:
                touched[w].append(layer)
        self._touched = touched

    @property
    def counts(self) -> list[int]:
        """How many units are left of each width."""
        return [curve.choices[i] for curve, i in zip(self.curves, self.at, strict=True)]

    @property
    def cost(self) -> float:
        """Of all layers, in MACs or microseconds."""
        counts = self.counts
        return float(sum(layer.cost(counts) for layer in self.layers))

    @property
    def error(self) -> float:
        """Of all widths together."""
        return sum(curve.errors[i] for curve, i in zip(self.curves, self.at, strict=True))

    def cost_by_choice(self, width: int) -> Numbers:
        """What the layers that a width is part of cost, for each of its choices, the other widths as they are."""
        counts: list[Any] = list(self.counts)
        counts[width] = np.array(self.curves[width].choices, dtype=np.float64)
        total: Numbers = np.zeros(len(counts[width]))
        for layer in self._touched[width]:
            total += layer.cost(counts)
        return total

    def settle(self, price: float) -> None:
        """Give each width, the others as they are, the choice of least error plus price times cost, until none changes."""
        for _ in range(SWEEPS):
            before = list(self.at)
            for width, curve in enumerate(self.curves):
                total = np.array(curve.errors) + price * self.cost_by_choice(width)
                self.at[width] = int(total.argmin())
            if self.at == before:
                break

    def spend(self, budget: float) -> None:
        """Give units back while the cost stays within a budget, those first that lower the error most for theirs."""
        while True:
            left = budget - self.cost
            best: tuple[float, int, int] | None = None
            for width, curve in enumerate(self.curves):
                i = self.at[width]
                if not i:
                    continue
                costs, errors = self.cost_by_choice(width)[: i + 1], np.array(curve.errors[: i + 1])
                more, gain = costs[:i] - costs[i], errors[i] - errors[:i]
                worth = np.where((more <= left) & (gain > 0), gain / np.maximum(more, 1e-9), 0)
                j = int(worth.argmax())
                if worth[j] > 0 and (best is None or worth[j] > best[0]):
                    best = float(worth[j]), width, j
            if best is None:
                return
            self.at[best[1]] = best[2]


def least_cost(curves: Sequence[Curve], layers: Sequence[LayerSize]) -> float:
    """With as few channels as there may be."""
    return Budget(curves, layers, [len(curve.choices) - 1 for curve in curves]).cost


def within_budget(curves: Sequence[Curve], layers: Sequence[LayerSize], budget: float) -> list[int]:
    """How many units of each width are left, such that the cost is within a budget that can be kept.

    What a layer costs depends on two widths, so the choice for one depends on the others: at each price the widths are settled
    one after another, and the price is found by bisection.
    """
    whole = Budget(curves, layers)
    if whole.cost <= budget or not curves:
        return whole.counts
    best = Budget(curves, layers, [len(curve.choices) - 1 for curve in curves])
    best.spend(budget)
    largest = max(max(curve.errors) for curve in curves) or 1.0
    low, high = 1e-9 * largest / whole.cost, 1e6 * largest / max(1.0, whole.cost)
    for _ in range(PRICES):
        price = float(np.sqrt(low * high))
        tried = Budget(curves, layers)
        tried.settle(price)
        if tried.cost > budget:
            low = price
            continue
        high = price
        tried.spend(budget)
        if tried.error < best.error:
            best = tried
    return best.counts
