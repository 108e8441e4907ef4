from __future__ import annotations

import itertools

import pytest

from fxprune.errors import OptionsError
from fxprune.ranks.plan import Choice, LayerRanks, RankPlan, RankRule, Survey, pareto, within_budget


def layer(dense: int, *choices: tuple[int, int, float]) -> LayerRanks:
    return LayerRanks(dense, pareto(Choice("channel", rank, cost, error) for rank, cost, error in choices), {})


SURVEY = Survey(
    {
        "a": layer(1000, (4, 400, 0.20), (8, 800, 0.05)),
        "b": layer(2000, (4, 600, 0.30), (8, 1200, 0.08), (12, 1800, 0.01)),
        "c": layer(500),
    },
    4000,  # 500 of them in layers that the survey leaves out
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("energy:0.95", RankRule("energy", 0.95)),
        ("ratio:.5", RankRule("ratio", 0.5)),
        ("macs:0.70", RankRule("macs", 0.7)),
        ("multiply_adds:0.7", RankRule("macs", 0.7)),
        ("speedup:1.3", RankRule("speedup", 1.3)),
    ],
)
def test_parse(text: str, rule: RankRule) -> None:
    assert RankRule.parse(text) == rule
    assert RankRule.parse(rule) is rule
    assert RankRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "0.5", "energy", "energy:", "energy:1", "ratio:0", "speedup:1", "rank:4", "ratio:nan"]
)
def test_anything_else_is_an_error_that_shows_the_forms(text: str) -> None:
    with pytest.raises(OptionsError, match=r"energy:0\.95.*ratio:0\.5.*macs:0\.7.*speedup:1\.3"):
        RankRule.parse(text)


def test_pareto_keeps_what_nothing_beats() -> None:
    kept = pareto([Choice("channel", 1, 10, 0.5), Choice("spatial", 2, 10, 0.4), Choice("channel", 3, 20, 0.4)])
    assert kept == (Choice("spatial", 2, 10, 0.4),)


@pytest.mark.parametrize("budget", range(2000, 4200, 100))
def test_budget_is_spent_as_well_as_by_trying_everything(budget: int) -> None:
    options = [[None, *ranks.choices] for ranks in SURVEY.layers.values()]
    dense = [ranks.macs for ranks in SURVEY.layers.values()]

    def cost(chosen: tuple[Choice | None, ...]) -> int:
        return 500 + sum(c.macs if c else whole for c, whole in zip(chosen, dense, strict=True))

    def error(chosen: tuple[Choice | None, ...]) -> float:
        return sum(c.error for c in chosen if c)

    best = min(error(chosen) for chosen in itertools.product(*options) if cost(chosen) <= budget)
    found = tuple(within_budget(SURVEY, budget).values())
    assert cost(found) <= budget
    assert error(found) == pytest.approx(best)


def test_a_budget_out_of_reach() -> None:
    assert SURVEY.least_macs == 2000
    with pytest.raises(OptionsError, match="out of reach"):
        within_budget(SURVEY, 1999)


def test_plan_by_budget() -> None:
    plan = RankRule.parse("macs:0.7").plan(SURVEY)
    assert plan.macs == (4000, 2600)
    assert plan.choice("a") == Choice("channel", 4, 400, 0.20)
    assert plan.choice("b") == Choice("channel", 8, 1200, 0.08)
    assert plan.reason("c") == "no rank would save MACs"
    assert "not in the plan" in plan.reason("elsewhere")


def test_energy_takes_the_cheapest_within_the_error_and_ratio_the_best_within_the_cost() -> None:
    energy = RankRule.parse("energy:0.9").plan(SURVEY)
    assert energy.choice("a") == Choice("channel", 8, 800, 0.05)
    assert energy.choice("b") == Choice("channel", 8, 1200, 0.08)
    assert energy.choice("c") is None
    ratio = RankRule.parse("ratio:0.4").plan(SURVEY)
    assert ratio.choice("a") == Choice("channel", 4, 400, 0.20)
    assert ratio.choice("b") == Choice("channel", 4, 600, 0.30)
    strict = RankRule.parse("energy:0.97").plan(SURVEY)
    assert strict.choice("a") is None
    assert strict.reason("a") == "left whole by rank energy:0.97"


def test_speedup_cannot_be_planned_without_measuring() -> None:
    with pytest.raises(OptionsError, match=r"fxprune\.low_rank"):
        RankRule.parse("speedup:1.3").plan(SURVEY)


def test_a_plan_sums_up_what_it_saves() -> None:
    chosen = {"a": Choice("channel", 4, 400, 0.2), "b": None, "c": None}
    plan = RankPlan.of("the user", SURVEY, chosen)
    assert plan.macs == (4000, 3400)
    assert plan.reason("b") == "left whole by the user"
