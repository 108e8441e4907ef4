"""check_plan(): whether a plan fits a graph, before any layer is touched."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.errors import OptionsError
from fxprune.passes.insert_observers import LayerTask
from fxprune.ranks.choices import RankPlan
from fxprune.ranks.splits import full_rank


def check_plan(plan: RankPlan, tasks: Mapping[str, LayerTask]) -> None:
    """Raise OptionsError if a plan factors a layer that is not there, or in a way that the layer does not have."""
    for name in plan.layers:
        choice = plan.choice(name)
        if choice is None:
            continue
        task = tasks.get(name)
        if task is None or task.geometry is None:
            known = ", ".join(other for other, task in tasks.items() if task.geometry is not None)
            raise OptionsError(f"the plan factors {name!r}, which is no layer that can be; there are: {known}")
        highest = full_rank(task.geometry, choice.split)
        if not 1 <= choice.rank <= highest:
            ranks = f"ranks from 1 to {highest}" if highest else "no such split"
            raise OptionsError(f"the plan gives {name!r} rank {choice.rank} by a {choice.split} split; it has {ranks}")
