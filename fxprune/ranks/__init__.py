"""Which ranks a network's layers could have, what each costs, and which of them a rule picks."""

from __future__ import annotations

from fxprune.ranks.choices import Choice, LayerRanks, PlannedLayer, RankPlan, Survey
from fxprune.ranks.options import low_rank_options
from fxprune.ranks.plan_check import check_plan
from fxprune.ranks.rule import RankRule
from fxprune.ranks.splits import SPLITS, Factorable, Split, splits_of
from fxprune.ranks.survey import METHODS, Method, survey

__all__ = [
    "METHODS",
    "SPLITS",
    "Choice",
    "Factorable",
    "LayerRanks",
    "Method",
    "PlannedLayer",
    "RankPlan",
    "RankRule",
    "Split",
    "Survey",
    "check_plan",
    "low_rank_options",
    "splits_of",
    "survey",
]
