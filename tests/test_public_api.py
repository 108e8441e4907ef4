"""The public names and signatures. A change here is a change for every user: it belongs in the CHANGELOG."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import fxprune
from fxprune import errors, passes, solvers


def test_names():
    assert sorted(fxprune.__all__) == fxprune.__all__
    assert len(set(fxprune.__all__)) == len(fxprune.__all__)
    for module in (fxprune, passes, solvers):
        for name in module.__all__:
            assert getattr(module, name) is not None
    promised = {"compile", "CompiledModule", "FxPruneError", "LayerReport", "Options", "Pattern", "PruneReport"}
    assert promised | {"models", "passes", "solvers"} <= set(fxprune.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fxprune.__version__)


def test_compile_takes_these_arguments_and_no_more():
    parameters = inspect.signature(fxprune.compile).parameters
    places = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert places == ["model", "calib_loader", "pattern"]
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "pattern": "2:4", "method": "admm", "exclude": (), "options": None, "passes": None,
        "device": None, "progress": True, "memory_limit": None, "checkpoint_dir": None,
    }  # fmt: skip


def test_what_is_shared_is_called_the_same_everywhere():
    shared = {"model", "calib_loader", "method", "exclude", "options", "device", "progress", "memory_limit"}
    for function in (fxprune.compile, fxprune.low_rank, fxprune.scan):
        assert shared <= set(inspect.signature(function).parameters)


def test_every_error_is_an_fxprune_error():
    found = [
        v
        for v in vars(errors).values()
        if inspect.isclass(v) and issubclass(v, Exception) and not issubclass(v, Warning)
    ]
    assert fxprune.FxPruneError in found
    for error in found:
        assert issubclass(error, fxprune.FxPruneError)
        assert error.__doc__


def test_errors_about_arguments_are_value_errors():
    for error in (errors.OptionsError, errors.PatternError, errors.CalibrationError, errors.UnknownModelError):
        assert issubclass(error, ValueError)
    with pytest.raises(ValueError, match="cannot read the pattern"):
        fxprune.Pattern.parse("wand")


@pytest.mark.parametrize("compress", [fxprune.compile, fxprune.low_rank])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"damping": 0.1}}, r"options is a dict; write fxprune\.Options\(damping=0\.1\)"),
        ({"options": fxprune.Options}, r"write fxprune\.Options\(\.\.\.\)"),
        ({"device": "potato"}, "no device 'potato'; write cpu"),
        ({"device": "meta"}, "holds no values"),
        ({"method": "wand"}, "unknown method 'wand'"),
        ({"exclude": ("9",)}, "'9' matches no module"),
        ({"exclude": (0,)}, "exclude takes names"),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(compress, arguments, said):
    with pytest.raises(errors.OptionsError, match=said):
        compress(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), [torch.randn(2, 4, 8, 8)], progress=False, **arguments)


@pytest.mark.parametrize(
    "use",
    [
        lambda weights: fxprune.compile(weights, [torch.zeros(1)], progress=False),
        lambda weights: fxprune.low_rank(weights, [torch.zeros(1)], progress=False),
        lambda weights: fxprune.save(weights, "never.pt"),
        lambda weights: fxprune.export_onnx(weights, "never.onnx", torch.zeros(1)),
        lambda weights: fxprune.diff(weights, weights),
        lambda weights: fxprune.scan(weights, [torch.zeros(1)], progress=False),
        lambda weights: fxprune.keep_zeros(weights),
        lambda weights: fxprune.filled_zeros(weights),
        lambda weights: fxprune.restore_zeros(weights),
        lambda weights: fxprune.state_dict_for(weights, torch.nn.Conv2d(4, 8, 3)),
    ],
)
def test_a_state_dict_is_no_model_and_is_not_printed(use):
    weights = torch.nn.Conv2d(4, 8, 3).state_dict()
    with pytest.raises(fxprune.FxPruneError) as caught:
        use(weights)
    assert "tensor(" not in str(caught.value)
    assert "got a" in str(caught.value)


def test_a_failing_batch_prints_nothing(capfd):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    for compress in (fxprune.compile, fxprune.low_rank):
        with pytest.raises(fxprune.FxPruneError):
            compress(model, [torch.randn(4, 8, 8)], progress=False)
    assert capfd.readouterr().err == ""


def test_every_pass_and_solver_is_documented():
    for name in passes.__all__:
        assert inspect.getdoc(getattr(passes, name)), name
    for solver in solvers.SOLVERS.values():
        assert inspect.getdoc(solver)


def test_a_solver_of_ones_own():
    @solvers.register("keep the first")
    def keep_first(problem, pattern):
        return problem.weight * pattern.mask(-torch.arange(problem.weight.shape[1]).double().expand_as(problem.weight))

    try:
        model = torch.nn.Linear(8, 3)
        wrapped = torch.nn.Sequential(model)
        options = fxprune.Options(refit=False, bias_correction=False)
        compiled = fxprune.compile(
            wrapped, [torch.randn(9, 8)], "2:4", method="keep the first", options=options, progress=False
        )
        expected = model.weight.detach().clone()
        expected[:, [2, 3, 6, 7]] = 0
        torch.testing.assert_close(compiled.get_submodule("0").weight.detach(), expected)
        assert compiled.report.method == "keep the first"
    finally:
        del solvers.SOLVERS["keep the first"]


def test_an_unknown_solver_is_told_which_there_are():
    with pytest.raises(fxprune.FxPruneError, match=r"'sparsgpt'.*'magnitude', 'sparsegpt', 'exact_obs', 'admm'"):
        solvers.get("sparsgpt")
