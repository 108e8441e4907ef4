"""What must hold of every network: each function takes a case and raises where it does not."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import fxprune
from fxprune import CompiledModule, PruneReport, Recipe
from fxprune.constraints.mask import Mask, sparse_matrix
from fxprune.errors import ExportError
from fxprune.geometry import CONVOLUTIONS
from fxprune.graph import module_of
from fxprune.layers.recurrent import Recurrent
from fxprune.options import Method
from fxprune.pattern import NMPattern, Pattern
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.refit import refit
from fxprune.tracing import trace
from tests.fuzz.case import Case, Refused
from tests.fuzz.network import tensors

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 1e-2}


def excluding_everything_changes_nothing(case: Case) -> None:
    if "channels" in str(case.recipe):
        return  # There is nothing left of which the budget could be kept, which is an error.
    compiled = case.compile(case.model, case.network.batches(), exclude=("*",))
    assert all(row.status in ("kept", "unread") and row.reason for row in compiled.report.layers), compiled.report
    same_outputs(case.outputs(case.model), case.outputs(compiled))
    weights = compiled.state_dict()
    for name, value in case.model.state_dict().items():
        found = weights.get(name, weights.get(f"{name}.weight"))  # Of recurrent layers the matrices are layers.
        assert found is None or torch.equal(found, value), f"{name} has changed"


def passes_before_solving_keep_the_function(case: Case) -> None:
    same_outputs(case.outputs(case.model), case.outputs(case.before_solving()), factor=5)


def dense_recipe_keeps_the_function(case: Case) -> None:
    compiled = case.compile(case.model, case.network.batches(), recipe="dense", options=fxprune.Options())
    same_outputs(case.outputs(case.model), case.outputs(compiled), factor=5)


def the_users_things_are_untouched(case: Case) -> None:
    """Model, batches, random state and torch's settings."""
    assert case.compiled is not None
    assert case.before.keys() == case.after.keys()
    for key, value in case.before.items():
        assert value == case.after[key], f"{key} has changed"


def the_report_is_true(case: Case) -> None:
    """Rows are those of the modules, their figures those of the weights, and patterns hold where they are claimed."""
    compiled, report = case.compiled, case.compiled.report
    rows = {row.name: row for row in report.layers}
    used = {str(node.target): module_of(node) for node in compiled.graph.nodes if module_of(node) is not None}
    recurrent = {name: module for name, module in used.items() if isinstance(module, Recurrent)}
    used |= {f"{name}.{inner}": layer for name, module in recurrent.items() for inner, layer in module.named_children()}
    zeros = total = 0
    for name, module in used.items():
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            continue
        weight = module.weight.detach()
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        assert torch.isfinite(weight).all()
        whole = rows.get(name.rpartition(".")[0])
        if whole is not None and whole.status == "factored" and not whole.pattern:
            continue  # One row for both factors.
        if name not in rows:  # The row of a weight with several owners is that of the first.
            assert any(used[other].weight is module.weight for other in rows.keys() & used.keys()), f"{name} has no row"
            continue
        row = rows[name]
        if not hasattr(module, "parametrizations"):
            assert row.shape == tuple(weight.shape), (row, weight.shape)
        assert abs(row.sparsity - float((weight == 0).double().mean())) < 1e-9, (row, "zeros")
        if row.pattern:
            assert Pattern.parse(row.pattern).check(weight).ok, row
    for row in report.layers:
        assert row.status in ("pruned", "factored") or row.reason, f"{row.name} is {row.status} without a reason"
        assert row.relative_error is None or 0 <= row.relative_error < float("inf"), row
        only_outputs = (
            row.status == "narrowed" and row.channels[0] == row.channels[1]
        )  # What stays needs no new weights.
        has_error = row.relative_error is not None or "factor of" in row.reason
        assert row.status in ("kept", "unread") or only_outputs or has_error, row
        excluded = case.exclude and {row.name, row.name.rpartition(".weight_")[0]} & {*case.exclude}
        assert not excluded or row.status in ("kept", "unread"), row
        _as_asked(case, row)
    if total and sum(row.weights for row in rows.values()) == total:
        assert abs(report.sparsity - zeros / total) < 1e-9, (report.sparsity, zeros, total)
    assert str(report)
    _classes_are_those_of_a_classifier(case)
    assert all(bool(torch.isfinite(t).all()) for t in case.outputs(compiled)), "outputs that are not finite"


def _classes_are_those_of_a_classifier(case: Case) -> None:
    """A score of classes is of (N, classes); the logits that are scaled are what the model puts out; outputs have errors."""
    compiled, report = case.compiled, case.compiled.report
    with torch.no_grad():
        output = copy.deepcopy(case.model).eval()(*case.network.images(3, 50))
    has_classes = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    if report.images_held_out:
        assert has_classes or report.why_no_classes, "classes of an output that has none"
        assert len(report.output_errors) == len(tensors(output))
        assert all(0 <= error < float("inf") for error in report.output_errors), report.output_errors
        assert ("No agreement and no KL" in report.summary) == bool(report.why_no_classes)
    else:
        assert report.output_errors == ()
    scaled = [row.name for row in report.layers if row.logit_scale != 1]
    heads = {str(node.target) for node in compiled.graph.find_nodes(op="output")[0].all_input_nodes}
    assert not scaled or (has_classes and len(scaled) == 1 and scaled[0] in heads), (scaled, heads)


def _as_asked(case: Case, row: Any) -> None:
    """A layer that is pruned is pruned to what the recipe says of it."""
    recipe = Recipe.parse(case.recipe)
    masks = [c for c in recipe.chain(row.name) or () if isinstance(c, Mask)]
    if row.status == "pruned" and masks and not case.options.get("global_budget") and "mixed" not in str(case.recipe):
        assert row.pattern == str(masks[0]), (row, str(masks[0]))
        if not isinstance(masks[0].pattern, NMPattern):
            assert row.sparsity >= masks[0].sparsity - 1e-9, row


def memory_formats_stay(case: Case) -> None:
    """Weights lie in memory as they did: a forward with `view` may depend on it."""
    before = dict(case.model.named_parameters())
    for name, p in case.compiled.named_parameters():
        if name in before and before[name].shape == p.shape:
            assert p.stride() == before[name].stride(), f"{name} had strides {before[name].stride()}, has {p.stride()}"
    wanted, found = case.outputs(case.model), case.outputs(case.compiled)
    differ = [i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if axes_in_memory(a) != axes_in_memory(b)]
    if not differ:
        return
    graph_module = trace(case.model, example=case.network.batches()[0])
    read = [_outputs_reading_as(graph_module, case, channels_last) for channels_last in (False, True)]
    for i in differ:
        either = [axes_in_memory(of[i]) for of in read]
        assert axes_in_memory(found[i]) in either, (
            f"an output had strides {wanted[i].stride()}, has {found[i].stride()}"
        )


def axes_in_memory(x: Tensor) -> list[int]:
    """The axes from the slowest to the fastest; what was a view of something larger may have become a tensor of its own."""
    return sorted((axis for axis in range(x.dim()) if x.shape[axis] > 1), key=lambda axis: (-x.stride(axis), axis))


def _outputs_reading_as(graph_module: GraphModule, case: Case, channels_last: bool) -> list[Tensor]:
    """Outputs with every value whose strides do not say whether it is in channels last taken for the one or the other."""

    class Reader(Interpreter):
        def run_node(self, n: Node) -> Any:
            x = super().run_node(n)
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            last = formats.get(x.dim()) if isinstance(x, Tensor) else None
            if last is None or not (x.is_contiguous() and x.is_contiguous(memory_format=last)):
                return x
            like = torch.empty(x.shape, memory_format=last if channels_last else torch.contiguous_format)
            return x.as_strided(x.shape, like.stride())

    with torch.no_grad():
        return tensors(Reader(graph_module).run(*case.network.images(3, 50)))


def a_second_run_gives_the_same(case: Case) -> None:
    first = case.compiled
    again = case.compile(case.model, case.network.batches())
    assert timeless(again.report) == timeless(first.report), f"{timeless(first.report)}\n{timeless(again.report)}"
    assert again.state_dict().keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), f"{name} differs in a second run"


def timeless(report: PruneReport) -> PruneReport:
    """A report without what a clock says."""
    rows = tuple(replace(row, seconds=0.0) for row in report.layers)
    return replace(report, layers=rows, seconds=0.0, timings={}, peak_memory=0)


def save_and_load_agree(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fxprune.save(case.compiled, Path(folder) / "model.pt")
        loaded = fxprune.load(Path(folder) / "model.pt")
    _same_model(case, loaded)


def pickle_and_deepcopy_keep_the_report(case: Case) -> None:
    _same_model(case, copy.deepcopy(case.compiled))
    if "parametrized" in case.network.features:
        raise Refused("torch pickles no parametrized modules")
    _same_model(case, pickle.loads(pickle.dumps(case.compiled)))


def _same_model(case: Case, other: CompiledModule) -> None:
    assert isinstance(other, CompiledModule)
    assert other.report == case.compiled.report
    for a, b in zip(case.outputs(case.compiled), case.outputs(other), strict=True):
        assert torch.equal(a, b)


def diff_tells_what_changed(case: Case) -> None:
    assert str(fxprune.diff(case.model, case.compiled, example_inputs=case.network.images(2, 0)))
    assert fxprune.diff(case.compiled, case.compiled).is_empty
    assert fxprune.diff(case.model, case.model).is_empty


def the_onnx_file_agrees(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            fxprune.export_onnx(case.compiled, path, case.network.images(2, 51))
        except ExportError as error:
            if "No ONNX function found" in str(error):
                raise Refused("an operation that ONNX does not have") from error
            if "proj_size" in str(error) and "proj_size" in case.network.script:
                raise Refused("an LSTM with a projection, which ONNX does not have") from error
            raise
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for n in (1, 5):
            images = case.network.images(n, 52)
            inputs = zip(session.get_inputs(), images, strict=True)
            feeds = {i.name: x.contiguous().float().numpy() for i, x in inputs}  # The file's numbers are float32.
            found = [torch.from_numpy(value) for value in session.run(None, feeds)]
            wanted = case.outputs(case.compiled, n, 52)
            coarsest = max(ROUNDING[t.dtype] for t in wanted)  # A half precision model rounds where its file does not.
            factor = max(20.0, coarsest / ROUNDING[torch.float32])
            if "rnn" in case.network.script and coarsest == ROUNDING[torch.float16]:
                factor *= 5  # From time step to time step what was rounded adds up.
            same_outputs([t.float() for t in wanted], found, factor=factor)


def no_layer_is_worse_than_magnitude(case: Case) -> None:
    """On the problems that the solver was given; where the method re-fits, magnitude's mask is re-fitted too."""
    assert case.compiled is not None
    solver = case.solver.inner
    if not solver.safeguarded:
        return
    method = Method(solver, fxprune.Options(**case.options).resolved(solver, Recipe.parse(case.recipe)))
    for problem, pattern, _ in case.solver.problems:
        answer = sparse_matrix(problem, pattern, method)
        simple = magnitude(problem, pattern)
        if method.options.refit:
            answer, simple = (refit(problem, matrix != 0, start=matrix) for matrix in (answer, simple))
        least = problem.loss(problem.optimum())
        ours, theirs = float(problem.loss(answer) - least), float(problem.loss(simple) - least)
        energy = float((problem.target * problem.optimum()).sum())
        assert ours <= theirs * (1 + 1e-3) + 1e-6 * energy, (
            f"{solver} {pattern} {tuple(answer.shape)}: {ours:.4g} beside magnitude's {theirs:.4g} of {energy:.4g}"
        )


def same_outputs(wanted: list[Tensor], found: list[Tensor], *, factor: float = 1.0) -> None:
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.isfinite(b).all(), "outputs that are not finite"
        largest = max(float(a.abs().max()), 1e-3)
        difference = float((a - b).abs().max()) / largest
        assert difference <= factor * ROUNDING[a.dtype], f"outputs differ by {difference:.3g} of the largest"


ALWAYS: tuple[Callable[[Case], None], ...] = (
    the_users_things_are_untouched,
    the_report_is_true,
    memory_formats_stay,
    excluding_everything_changes_nothing,
    passes_before_solving_keep_the_function,
    no_layer_is_worse_than_magnitude,
)
OFTEN: tuple[Callable[[Case], None], ...] = (
    dense_recipe_keeps_the_function,
    a_second_run_gives_the_same,
    save_and_load_agree,
    pickle_and_deepcopy_keep_the_report,
    diff_tells_what_changed,
)
SELDOM: tuple[Callable[[Case], None], ...] = (the_onnx_file_agrees,)
