"""Layers that are called at several places, and modules with one weight: one problem over all calls, solved once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune import Options
from fxprune.annotations import annotation
from fxprune.geometry import LayerGeometry
from tests.pipelines import report_in, solve


class Twice(nn.Module):
    """One layer at three places that see inputs of two sizes, a first layer before it and layers after it."""

    def __init__(self, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=bias, groups=groups)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.shared(torch.relu(self.shared(x)))
        small = nn.functional.avg_pool2d(x, 2)
        z = self.shared(input=small)
        return self.last(torch.relu(y)).mean((2, 3)) + torch.relu(z).mean((2, 3))


class Tied(nn.Module):
    """Two modules with one weight and one bias, or none."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, bias=bias), nn.Conv2d(8, 8, 3, bias=bias)
        self.b.weight = self.a.weight
        self.b.bias = self.a.bias
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(torch.relu(self.a(self.stem(x))))).mean((2, 3))


NAMES = {Twice: ("shared",), Tied: ("a", "b")}


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype) for n in (9, 4, 7)]


def calls(model: nn.Module, names: tuple[str, ...], images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of all calls of the given layers, in order."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.append((args[0] if args else kwargs["input"], output))

    handles = [model.get_submodule(name).register_forward_hook(note, with_kwargs=True) for name in names]
    with torch.no_grad():
        for x in images:
            model(x)
    for handle in handles:
        handle.remove()
    return seen


def finished(model: nn.Module, graph_module: GraphModule) -> nn.Module:
    """The user's model with the weights of the graph."""
    plain = copy.deepcopy(model)
    for name, module in plain.named_children():
        found = graph_module.get_submodule(name)
        module.weight, module.bias = found.weight, found.bias
    return plain


def relative_error(dense: nn.Module, pruned: nn.Module, names: tuple[str, ...], images: list[Tensor]) -> float:
    ys, zs = (
        torch.cat([output.movedim(1, 0).flatten(1) for _, output in calls(model, names, images)], 1)
        for model in (dense, pruned)
    )
    return float((ys - zs).square().sum() / (ys - ys.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(
    "model", [Twice(), Twice(bias=False, groups=2), Tied(), Tied(bias=False)], ids=["", "groups", "tied", "tied bare"]
)
def test_the_weights_are_least_squares_over_all_calls(model, bias_correction):
    model = copy.deepcopy(model).double()
    names, damping = NAMES[type(model)], 0.01
    graph_module = solve(model, batches(), "admm", refit=True, bias_correction=bias_correction, damping=damping)
    old = model.get_submodule(names[0])
    new = graph_module.get_submodule(names[0])
    geometry = LayerGeometry.of(old)
    seen = calls(model, names, batches())  # The dense model's.
    xs = torch.cat([geometry.patches(x) for x, _ in seen], 1)
    ys = torch.cat([geometry.output_matrix(y) for _, y in seen], 2)
    weights, originals = geometry.to_matrix(new.weight), geometry.to_matrix(old.weight)
    own = (
        torch.zeros(geometry.groups, geometry.rows).double() if old.bias is None else old.bias.view(geometry.groups, -1)
    )
    for g in range(geometry.groups):
        x, y = xs[g], ys[g]
        xc, yc = (x - x.mean(0), y - y.mean(1, keepdim=True)) if bias_correction else (x, y - own[g][:, None])
        shift = damping * float((xc**2).mean())
        for row in range(geometry.rows):
            kept = weights[g, row] != 0
            assert 0 < int(kept.sum()) <= geometry.columns // 2
            count = len(x)
            a = torch.cat([xc[:, kept] / count**0.5, shift**0.5 * torch.eye(int(kept.sum())).double()])
            b = torch.cat([yc[row] / count**0.5, shift**0.5 * originals[g, row, kept]])
            expected = torch.linalg.lstsq(a, b).solution
            torch.testing.assert_close(weights[g, row, kept], expected, rtol=1e-6, atol=1e-8)
        bias = own[g] if new.bias is None else new.bias.view(geometry.groups, -1)[g]
        wanted = y.mean(1) - weights[g] @ x.mean(0) if bias_correction else own[g]
        torch.testing.assert_close(bias, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("kind", [Twice, Tied])
def test_both_models_run_with_their_own_weights_at_every_call(kind, method):
    """Errors of every layer, and so all that the stream shows to later layers, are those of whole runs of both models."""
    model = kind().double()
    graph_module = solve(model, batches(), method)
    pruned = finished(model, graph_module)
    report = report_in(graph_module)
    rows = [layer.name for layer in report.layers]
    assert len(set(rows)) == len(rows)
    layer = report[NAMES[kind][0]]
    assert (layer.status, layer.pattern, layer.sparsity) == ("pruned", "2:4", 0.5)
    assert layer.relative_error == pytest.approx(relative_error(model, pruned, NAMES[kind], batches()), rel=1e-9)
    if kind is Twice:
        expected = relative_error(model, pruned, ("last",), batches())
        assert report["last"].relative_error == pytest.approx(expected, rel=1e-9)
    x = batches()[0]
    torch.testing.assert_close(graph_module(x), pruned(x), rtol=1e-10, atol=1e-10)


def test_later_layers_are_fitted_to_inputs_from_the_new_weights():
    """The last layer regresses the dense model's output on what the pruned model shows it."""
    model = Twice().double()
    graph_module = solve(model, batches(), "admm", target="dense", refit=True, bias_correction=True, damping=1e-9)
    pruned = finished(model, graph_module)
    geometry, new = LayerGeometry.of(model.last), graph_module.get_submodule("last")
    (x,) = torch.cat([geometry.patches(x) for x, _ in calls(pruned, ("last",), batches())], 1)
    (y,) = torch.cat([geometry.output_matrix(y) for _, y in calls(model, ("last",), batches())], 2)
    for row, weights in enumerate(geometry.to_matrix(new.weight)[0]):
        kept = weights != 0
        expected = torch.linalg.lstsq((x - x.mean(0))[:, kept], y[row] - y[row].mean()).solution
        torch.testing.assert_close(weights[kept], expected, rtol=1e-4, atol=1e-6)


def test_a_bias_that_is_created_is_that_of_every_module():
    graph_module = solve(Tied(bias=False), batches(torch.float32), bias_correction=True)
    assert graph_module.b.bias is not None
    assert graph_module.b.bias is graph_module.a.bias
    assert graph_module.b.weight is graph_module.a.weight


class OtherBias(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.b.bias = nn.Parameter(torch.ones(8))


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("biases", ["two", "second", "first"])
def test_modules_with_one_weight_may_have_biases_of_their_own(biases, bias_correction):
    """The weight is fitted to all calls, and both biases are shifted by what the new weight changes in the mean of these."""
    model = OtherBias().double()
    model.b.bias = None if biases == "first" else model.b.bias
    model.a.bias = None if biases == "second" else model.a.bias
    graph_module = solve(model, batches(), refit=True, bias_correction=bias_correction, target="weights")
    assert report_in(graph_module)["a"].status == "pruned"
    assert graph_module.b.weight is graph_module.a.weight
    geometry = LayerGeometry.of(model.a)
    x = torch.cat([geometry.patches(x)[0] for x, _ in calls(model, ("a", "b"), batches())])
    change = geometry.to_matrix(model.a.weight - graph_module.a.weight)[0] @ x.mean(0)
    for old, new in ((model.a, graph_module.a), (model.b, graph_module.b)):
        if not bias_correction and old.bias is None:
            assert new.bias is None
        else:
            before = torch.zeros(8).double() if old.bias is None else old.bias
            torch.testing.assert_close(new.bias, before + change if bias_correction else before, rtol=1e-8, atol=1e-10)


class OtherStride(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.b.stride = (2, 2)


class ReadDirectly(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.shared.weight.norm()


class Leaf(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > -1e9 else x


class InsideALeaf(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.leaf(self.stem(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "exclude", "reason"),
    [
        (OtherStride(), (), "its weight is shared with 'b', which reads its input in another way"),
        (ReadDirectly(), (), "its weight is shared with another part of the model"),
        (Tied(), ("b",), "its weight is shared with 'b', which is excluded"),
        (InsideALeaf(), ("leaf",), "its weight is shared with 'leaf.layer', inside 'leaf', which is called as a whole"),
        (Twice(), ("shared",), "excluded"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_one_problem_is_kept_and_says_why(model, exclude, reason):
    first = NAMES.get(type(model)) or ("shared",) if hasattr(model, "shared") else ("a",)
    before = copy.deepcopy(model.state_dict())
    compiled = fxprune.compile(model, batches(torch.float32), exclude=exclude, progress=False)
    row = compiled.report[first[0]]
    assert (row.status, row.reason) == ("kept", reason)
    assert [layer.name for layer in compiled.report.layers].count(first[0]) == 1
    assert torch.equal(compiled.get_submodule(first[0]).weight, before[f"{first[0]}.weight"])


def test_a_recipe_has_one_entry_for_one_weight():
    compiled = fxprune.compile(
        Tied(), batches(torch.float32), {"a": "2:4", "b": "1:4", "last": "2:4", "*": "dense"}, progress=False
    )
    assert compiled.report["a"].reason == "its weight is shared with 'b', for which the recipe has another entry"


@pytest.mark.parametrize("pattern", ["0.5", "mixed:0.4", "rank:energy=0.8+2:4"])
def test_other_recipes(pattern):
    options = Options(global_budget=True) if pattern == "0.5" else None
    compiled = fxprune.compile(Twice(), batches(torch.float32), pattern, options=options, progress=False)
    names = [layer.name for layer in compiled.report.layers]
    assert names.count("shared") == 1
    assert compiled(batches(torch.float32)[0]).isfinite().all()


def test_factors_are_declined_with_the_reason():
    compiled = fxprune.compile(
        Twice(), batches(torch.float32), {"shared": "rank:energy=0.5", "*": "2:4"}, progress=False
    )
    assert compiled.report["shared"].reason.startswith("called at 3 places: two layers in place of one")


def test_it_is_saved_exported_and_kept_zero(tmp_path):
    for model in (Twice(), Tied()):
        images = batches(torch.float32)
        name = NAMES[type(model)][0]
        compiled = fxprune.compile(model, images, progress=False)
        fxprune.save(compiled, tmp_path / "m.pt")
        loaded = fxprune.load(tmp_path / "m.pt")
        assert torch.equal(loaded(images[0]), compiled(images[0]))
        exported = fxprune.export_onnx(compiled, tmp_path / "m.onnx", images[0])
        assert {check.name: check.ok for check in exported.layers}[name] is True
        fxprune.keep_zeros(compiled)
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
        compiled(images[0]).square().sum().backward()
        optimizer.step()
        assert (compiled.get_submodule(name).weight == 0).float().mean() == 0.5


def test_an_interrupted_run_goes_on(tmp_path):
    model, images = Twice(), batches(torch.float32)
    whole = fxprune.compile(model, images, progress=False, checkpoint_dir=str(tmp_path))
    again = fxprune.compile(model, images, progress=False, checkpoint_dir=str(tmp_path))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.report["shared"].relative_error == whole.report["shared"].relative_error


def test_polish_measures_every_call():
    model, images = Twice(), batches(torch.float32)
    options = Options(polish=2, holdout=0.0, fold_batchnorm=False)
    compiled = fxprune.compile(model, images, options=options, progress=False)
    pruned = finished(model, compiled)
    expected = relative_error(model, pruned, ("shared",), images)
    assert compiled.report["shared"].relative_error == pytest.approx(expected, rel=1e-3)


def test_the_loader_is_started_once():
    started = []

    def loader():
        started.append(1)
        yield from batches(torch.float32)

    compiled = fxprune.compile(Twice(), loader(), progress=False)
    assert len(started) == 1
    assert compiled.report.images_read == 20


def test_later_calls_have_no_row_of_their_own():
    graph_module = solve(Twice(), batches(torch.float32))
    found = [annotation(node).role for node in graph_module.graph.nodes if str(node.target) == "shared"]
    assert found == ["compress", "repeat", "repeat"]
