from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from fxprune import Options, Recipe, solvers
from fxprune.errors import OptionsError

TWO_FOUR = Recipe.parse("2:4")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", -0.1), ("damping", float("nan")), ("damping", 1e3), ("damping", "0.01"), ("damping", True),
        ("inputs", "both"), ("target", "output"), ("holdout", 0.6), ("holdout", -0.1), ("holdout", "some"), ("polish", -1),
        ("polish", "yes"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(OptionsError, match=rf"^{name} is "):
        Options(**{name: value})


def test_options_cannot_be_misspelt_or_changed():
    with pytest.raises(TypeError, match="dampning"):
        Options(dampning=0.1)
    with pytest.raises(FrozenInstanceError):
        Options().damping = 0.1


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "exact_obs"])
def test_published_methods_are_as_published(method):
    options = Options().resolved(solvers.get(method), TWO_FOUR)
    assert (options.inputs, options.target) == ("pruned", "weights")
    assert options.bias_correction is options.refit is options.reconstruct is options.permute is False


@pytest.mark.parametrize("method", ["admm", lambda problem, pattern: problem.weight])
def test_our_own_choice(method):
    options = Options().resolved(solvers.get(method), TWO_FOUR)
    assert (options.inputs, options.target) == ("pruned", "relu6_aware")
    assert options.bias_correction is options.refit is options.reconstruct is options.permute is True
    assert Options().resolved(solvers.get(method), Recipe.parse("0.9")).permute is False  # No groups to share.


@pytest.mark.parametrize("pattern", ["1:4", "0.6", "mixed:0.6"])
def test_relu_aware_targets_are_for_patterns_that_keep_less_than_half(pattern):
    assert Options().resolved(solvers.get("admm"), Recipe.parse(pattern)).target == "relu_aware"
    assert Options().resolved(solvers.get("admm"), Recipe.parse("0.5")).target == "relu6_aware"
    assert Options(target="relu_aware").resolved(solvers.get("admm"), TWO_FOUR).target == "relu_aware"


@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_what_the_user_says_stays(method):
    chosen = {
        "damping": 0.05,
        "inputs": "dense",
        "target": "dense",
        "bias_correction": True,
        "refit": False,
        "reconstruct": False,
    }
    resolved = Options(**chosen).resolved(solvers.get(method), TWO_FOUR)
    for name, value in chosen.items():
        assert getattr(resolved, name) == value


def test_nothing_is_left_open():
    resolved = Options().resolved(solvers.get("sparsegpt"), TWO_FOUR)
    left_open = {f.name for f in fields(resolved) if getattr(resolved, f.name) is None}
    assert left_open == {"holdout"}  # There None has a meaning of its own.
    assert resolved.resolved(solvers.get("admm"), TWO_FOUR) == resolved


@pytest.mark.parametrize(("name", "pattern"), [("permute", "0.9"), ("global_budget", "2:4")])
def test_what_a_pattern_cannot_do(name, pattern):
    with pytest.raises(OptionsError, match=rf"{name}.*{pattern}"):
        Options(**{name: True}).resolved(solvers.get("admm"), Recipe.parse(pattern))
