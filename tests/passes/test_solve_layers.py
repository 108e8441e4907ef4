"""SolveLayers: every layer's new weights against the formula, evaluated on whole runs of both models with hooks.

A layer's input and its skip operands do not depend on layers after it, so what it saw when it was solved can be read off
the finished model.
"""

from __future__ import annotations

import copy
import math
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.errors import SolverError
from fxprune.geometry import LayerGeometry
from fxprune.passes import InsertObservers, SolveLayers, changes
from fxprune.pattern import Pattern
from fxprune.recipe import Recipe
from fxprune.solvers import SOLVERS, LayerProblem
from fxprune.tracing import trace
from tests.pipelines import calibration, method_of, report_in, solve

PATTERN, RECIPE = Pattern.parse("2:4"), Recipe.parse("2:4")


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Residual(nn.Module):
    """A stem that the pattern declines, two residual adds (one nested), a grouped and a depthwise conv, a classifier."""

    skips = MappingProxyType({"b": ("stem",), "d": ("add_0", "stem")})

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8, bias=False), conv(8, 8, 1)
        self.c, self.d, self.depthwise = conv(8, 8, groups=2, stride=1), conv(8, 8), conv(8, 8, groups=8, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, keep: dict[str, Tensor] | None = None) -> Tensor:
        stem = F.relu(self.stem(x))
        add_0 = self.b(F.relu(self.a(stem))) + stem
        y = self.d(F.relu(self.c(add_0))) + add_0 + stem
        if keep is not None:
            keep.update(stem=stem, add_0=add_0)
        return self.head(F.relu(self.depthwise(y)).mean((2, 3)))


def prune(model: nn.Module, batches: list[Tensor], method: str = "admm", **options: object) -> GraphModule:
    return solve(model, batches, method, **{"target": "skip" if method == "admm" else None, **options})


def like(model: nn.Module, graph_module: GraphModule) -> nn.Module:
    """The user's model with the weights and biases of the finished graph."""
    finished = copy.deepcopy(model)
    for name, module in finished.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found = graph_module.get_submodule(name)
            module.weight, module.bias = found.weight, found.bias
    return finished


def values(
    model: nn.Module, name: str, batches: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """Inputs and outputs of one layer and the skip values, batch by batch."""
    reads, gives, skips = [], [], []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(
        lambda m, args, output: (reads.append(args[0]), gives.append(output)) and None
    )
    with torch.no_grad():
        for batch in batches:
            skips.append({})
            model(batch, skips[-1])
    handle.remove()
    return reads, gives, skips


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (9, 4, 7)]


@pytest.mark.parametrize("damping", [0.01, 0.1])
@pytest.mark.parametrize(
    ("inputs", "target", "bias_correction"),
    [
        ("pruned", "skip", True), ("pruned", "dense", True), ("pruned", "dense", False), ("pruned", "weights", True),
        ("pruned", "weights", False), ("dense", "dense", True), ("dense", "weights", False), ("pruned", "skip", False),
    ],
)  # fmt: skip
def test_kept_weights_are_the_least_squares_solution(inputs, target, bias_correction, damping):
    """For every layer, pruned or re-fitted: given its zeros, each row solves the damped problem on its support."""
    model = Residual().double()
    settings = {"inputs": inputs, "target": target, "bias_correction": bias_correction, "damping": damping}
    graph_module = prune(model, batches(), **settings, refit=True, reconstruct=True)
    finished = like(model, graph_module)
    assert {layer.status for layer in report_in(graph_module).layers} == {"pruned", "reconstructed"}
    for name, module in model.named_children():
        geometry = LayerGeometry.of(module)
        dense_x, dense_y, dense_skips = values(model, name, batches())
        pruned_x, _, pruned_skips = values(finished, name, batches())
        xs = dense_x if inputs == "dense" else pruned_x
        if target == "weights":
            with torch.no_grad():
                ys = [module(x) for x in xs]
        else:
            ys = dense_y
        if target == "skip":
            for skip in model.skips.get(name, ()):
                ys = [y + (a[skip] - b[skip]) for y, a, b in zip(ys, dense_skips, pruned_skips, strict=True)]
        x_all = torch.cat([geometry.patches(x) for x in xs], 1)  # (G, P, D)
        y_all = torch.cat([geometry.output_matrix(y) for y in ys], 2)  # (G, R/G, P)
        new = graph_module.get_submodule(name)
        weights, originals = geometry.to_matrix(new.weight), geometry.to_matrix(module.weight)
        own = torch.zeros(geometry.out_channels).double() if module.bias is None else module.bias
        biases = own.reshape(geometry.groups, -1)
        found_biases = own if new.bias is None else new.bias
        for g in range(geometry.groups):
            x, y = x_all[g], y_all[g]
            count = len(x)
            x_mean, y_mean = x.mean(0), y.mean(1)
            if bias_correction:
                xc, yc = x - x_mean, y - y_mean[:, None]
            else:
                xc, yc = x, y - biases[g][:, None]
            shift = damping * float((xc**2).mean())
            ridge = math.sqrt(shift * count) * torch.eye(x.shape[1], dtype=torch.float64)
            for row in range(len(y)):
                support = weights[g, row] != 0
                system = torch.cat([xc[:, support], ridge[:, support]])
                # Damping pulls each kept weight to where it was; those that are gone have nothing to be pulled to.
                pulled = math.sqrt(shift * count) * originals[g, row] * support
                expected = torch.linalg.lstsq(system, torch.cat([yc[row], pulled])[:, None]).solution[:, 0]
                torch.testing.assert_close(weights[g, row, support], expected, rtol=1e-6, atol=1e-8)
            if bias_correction:
                expected = y_mean - weights[g] @ x_mean
                torch.testing.assert_close(found_biases.reshape(geometry.groups, -1)[g], expected, rtol=1e-7, atol=1e-9)
        if not bias_correction:
            assert (new.bias is None) == (module.bias is None)
            assert torch.equal(found_biases, own)


def one_sided(y: Tensor, z: Tensor, low: float, high: float) -> float:
    """The error that counts before a clamp, element by element."""
    error = 0.0
    for wanted, given in zip(y.flatten().tolist(), z.flatten().tolist(), strict=True):
        if wanted <= low:
            given = max(given, low)
            wanted = low
        elif wanted >= high:
            given = min(given, high)
            wanted = high
        error += (wanted - given) ** 2
    return error


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize(("name", "bounds"), [("a", (0.0, math.inf)), ("b", (0.0, 0.5))])
def test_what_lies_beyond_a_rectifier_need_only_stay_there(pattern, name, bounds):
    """The error after the ReLU of the layer is lower than under the "skip" target, with the same inputs and the same zeros."""
    torch.manual_seed(2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(4, 8), conv(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.a(x))
            return F.hardtanh((self.b(a) + a) + 0.25, 0.0, 0.5)

    model = Net().double()
    data = [torch.randn(n, 4, 8, 8, dtype=torch.float64) for n in (9, 4, 7)]
    errors, weights = {}, {}
    for target in ("skip", "relu_aware"):
        exclude = ("b",) if name == "a" else ("a",)
        graph_module = solve(model, data, "admm", pattern, exclude=exclude, damping=1e-9, target=target)
        new = weights[target] = graph_module.get_submodule(name)
        errors[target] = 0.0
        for x in data:
            a = F.relu(model.a(x))
            y, z = (model.a(x), new(x)) if name == "a" else (model.b(a) + a + 0.25, new(a) + a + 0.25)
            errors[target] += one_sided(y, z, *bounds)
    assert torch.equal(weights["skip"].weight == 0, weights["relu_aware"].weight == 0)
    assert errors["relu_aware"] < 0.98 * errors["skip"]


def test_a_relu_aware_layer_is_least_squares_on_the_wanted_output():
    """A naive reference: a row at a time, lstsq on the patches, the wanted output from the weights before."""
    torch.manual_seed(4)
    model = nn.Sequential(conv(4, 6), nn.ReLU()).double()
    data = [torch.randn(n, 4, 8, 8, dtype=torch.float64) for n in (9, 7)]
    found = {}
    for target in ("skip", "relu_aware"):
        graph_module = prune(model, data, damping=0.0, target=target)
        found[target] = graph_module.get_submodule("0")
    geometry = LayerGeometry.of(model[0])
    patches = torch.cat([geometry.patches(x)[0] for x in data])
    with_one = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    y = torch.cat([geometry.output_matrix(model[0](x))[0] for x in data], 1).detach()
    weights, biases = geometry.to_matrix(found["skip"].weight)[0], found["skip"].bias
    for row in range(6):
        support = torch.cat([weights[row] != 0, torch.tensor([True])])
        solution = torch.cat([weights[row], biases[row : row + 1]])
        z = with_one @ solution
        wanted = torch.tensor([min(b, 0.0) if a < 0 else a for a, b in zip(y[row].tolist(), z.tolist(), strict=True)])
        solution = torch.zeros_like(solution)
        solution[support] = torch.linalg.lstsq(with_one[:, support], wanted.double()[:, None]).solution[:, 0]
        expected = solution[:-1]
        torch.testing.assert_close(
            geometry.to_matrix(found["relu_aware"].weight)[0, row], expected, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(found["relu_aware"].bias[row], solution[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rectifier", "like"), [(nn.ReLU6(), "relu_aware"), (nn.Hardtanh(0, 2), "relu_aware"), (nn.ReLU(), "skip")]
)
def test_relu6_aware_is_for_rectifiers_with_an_upper_end(rectifier, like):
    model = nn.Sequential(conv(4, 8), rectifier, conv(8, 8)).double()
    data = [2 * torch.randn(8, 4, 8, 8, dtype=torch.float64)]
    found = {t: prune(model, data, target=t).state_dict() for t in ("skip", "relu6_aware", "relu_aware")}
    assert not torch.equal(found["skip"]["0.weight"], found["relu_aware"]["0.weight"])
    for key, value in found["relu6_aware"].items():
        assert torch.equal(value, found[like][key])


def test_without_a_rectifier_the_targets_are_the_same():
    model = nn.Sequential(conv(4, 8), nn.SiLU(), conv(8, 8)).double()
    data = [torch.randn(8, 4, 8, 8, dtype=torch.float64)]
    skip, relu_aware = (prune(model, data, target=target) for target in ("skip", "relu_aware"))
    for key, value in skip.state_dict().items():
        assert torch.equal(value, relu_aware.state_dict()[key])


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "exact_obs"])
def test_published_methods_get_the_published_problem(method):
    """H and T of the layer's own output on the pruned prefix, not centred; the solver's own weights; nothing else moves."""
    model = Residual().double()
    graph_module = prune(model, batches(), method)
    finished = like(model, graph_module)
    report = report_in(graph_module)
    for name, module in model.named_children():
        new, geometry = graph_module.get_submodule(name), LayerGeometry.of(module)
        if name in ("stem", "depthwise"):
            assert report[name].status == "kept"
            assert torch.equal(new.weight, module.weight)
        else:
            assert report[name].status == "pruned"
            xs, _, _ = values(finished, name, batches())
            patches = torch.cat([geometry.patches(x) for x in xs], 1)
            hessian = patches.mT @ patches / patches.shape[1]
            dense = geometry.to_matrix(module.weight)
            problem = LayerProblem(hessian, dense @ hessian, dense).damped(0.01)
            expected = torch.stack([SOLVERS[method](group, PATTERN) for group in problem.groups()])
            torch.testing.assert_close(geometry.to_matrix(new.weight), expected, rtol=1e-7, atol=1e-9)
        assert (new.bias is None) == (module.bias is None)
        assert new.bias is None or torch.equal(new.bias, module.bias)


def test_relative_error_in_the_report():
    model = Residual().double()
    graph_module = prune(model, batches())
    finished, report = like(model, graph_module), report_in(graph_module)
    for layer in report.layers:
        dim = -1 if layer.op == "Linear" else 1
        runs = [values(m, layer.name, batches())[1] for m in (model, finished)]
        y, z = (torch.cat([o.movedim(dim, 0).flatten(1) for o in run], 1) for run in runs)
        expected = (y - z).square().sum() / (y - y.mean(1, keepdim=True)).square().sum()
        assert layer.relative_error == pytest.approx(float(expected), rel=1e-9)


class TestReport:
    def test_every_layer_is_listed_in_graph_order_with_what_was_done(self):
        graph_module = prune(Residual(), [b.float() for b in batches()])
        report = report_in(graph_module)
        assert [layer.name for layer in report.layers] == ["stem", "a", "b", "c", "d", "depthwise", "head"]
        assert (report.method, report.pattern, report.images) == ("admm", "2:4", 20)
        by_node = [annotation(n).report for n in graph_module.graph.nodes if annotation(n).report is not None]
        assert by_node == list(report.layers)
        for layer in report.layers:
            module = graph_module.get_submodule(layer.name)
            assert layer.shape == tuple(module.weight.shape)
            assert layer.sparsity == float((module.weight == 0).double().mean())
            if layer.status == "pruned":
                assert (layer.pattern, layer.reason, layer.sparsity) == ("2:4", "", 0.5)
            else:
                assert layer.name in ("stem", "depthwise")
                assert layer.pattern == ""
                assert "not a multiple of 4" in layer.reason or "depthwise" in layer.reason
            assert layer.damping == (None if layer.name == "stem" else 0.01)  # The stem reads what the dense one reads.
            assert layer.dead_inputs == 0
        actions = {
            change.target: change.action for change in changes(graph_module) if change.pass_name == "SolveLayers"
        }
        assert actions == {layer.name: layer.status for layer in report.layers}

    def test_layers_are_announced_in_order(self):
        seen: list[tuple[str, int]] = []
        graph_module = trace(nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8)))
        InsertObservers(RECIPE)(graph_module)
        images = calibration([torch.randn(4, 4, 6, 6)], on_layer=lambda *a: seen.append(a))
        SolveLayers(RECIPE, method_of("admm"))(graph_module, images)
        assert seen == [("0", 3), ("2", 3), ("output", 3)]

    def test_a_second_run_does_nothing(self):
        graph_module = trace(nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8)))
        InsertObservers(RECIPE)(graph_module)
        step, images = SolveLayers(RECIPE, method_of("admm")), calibration(iter([torch.randn(4, 4, 6, 6)]))
        assert step(graph_module, images).modified
        state = copy.deepcopy(graph_module.state_dict())
        assert not step(graph_module, images).modified
        torch.testing.assert_close(graph_module.state_dict(), state, rtol=0, atol=0)

    def test_nothing_to_prune(self):
        graph_module = trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
        step = SolveLayers(RECIPE, method_of("admm"))
        assert not step(graph_module, calibration([torch.randn(64, 4)], holdout=None)).modified
        report = report_in(graph_module)
        assert (report.layers, report.images, report.images_held_out, report.sparsity) == ((), 48, 16, 0.0)
        assert report.agreement == 1


class TestDifficultData:
    def test_dead_inputs_are_counted_and_keep_their_weights(self):
        x = torch.randn(20, 8, 6, 6, dtype=torch.float64)
        x[:, 3] = 0
        layer = conv(8, 4, 1).double()
        graph_module = prune(nn.Sequential(layer), [x])
        report = report_in(graph_module)["0"]
        assert report.dead_inputs == 1
        new = graph_module.get_submodule("0").weight[:, 3]
        torch.testing.assert_close(new, torch.where(new == 0, 0.0, layer.weight[:, 3]))

    def test_all_inputs_dead(self):
        layer = conv(8, 4)
        graph_module = prune(nn.Sequential(layer), [torch.zeros(3, 8, 6, 6)])
        report = report_in(graph_module)["0"]
        assert report.dead_inputs == 72
        assert report.relative_error == 0
        new = graph_module.get_submodule("0").weight
        torch.testing.assert_close(new, torch.where(new == 0, 0.0, layer.weight))

    @pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "exact_obs", "admm"])
    @pytest.mark.parametrize("damping", [0.0, 0.01])
    def test_a_single_small_image(self, method, damping):
        """16 patches, 72 columns: H has rank 16 at most."""
        graph_module = prune(nn.Sequential(conv(8, 4)), [torch.randn(1, 8, 4, 4)], method, damping=damping)
        report = report_in(graph_module)["0"]
        assert math.isfinite(report.relative_error)
        if method == "magnitude":
            assert report.damping is None  # It poses no problem.
        else:
            assert report.damping >= max(damping, 1e-12)

    def test_a_batch_of_constant_images(self):
        """With the means removed nothing is left; the bias alone reproduces the output."""
        model = nn.Sequential(conv(8, 4, 1))
        graph_module = prune(model, [torch.full((4, 8, 5, 5), 3.0)])
        new, x = graph_module.get_submodule("0"), torch.full((4, 8, 5, 5), 3.0)
        assert torch.isfinite(new.weight).all()
        torch.testing.assert_close(graph_module(x), model(x))

    def test_activations_that_overflow_name_the_layer(self):
        model = nn.Sequential(conv(4, 8), conv(8, 8))
        model[0].weight.data *= 1e38
        with pytest.raises(SolverError, match="layer '0': the layer's statistics hold NaN or infinite values"):
            prune(model, [100 * torch.randn(2, 4, 6, 6)])

    @pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
    def test_the_size_of_the_activations_does_not_matter(self, scale):
        """Squares of the largest and smallest are beyond float32."""
        x = torch.randn(8, 8, 12, 12)
        plain, scaled = nn.Sequential(conv(8, 16)), nn.Sequential(conv(8, 16, bias=False))
        scaled[0].weight, plain[0].bias = plain[0].weight, None
        found, wanted = (report_in(prune(copy.deepcopy(m), [y]))["0"] for m, y in ((scaled, scale * x), (plain, x)))
        assert found.relative_error == pytest.approx(wanted.relative_error, rel=0.01)

    @pytest.mark.parametrize("offset", [0.0, 10.0, 300.0, 1000.0, 3000.0, 1e5])
    def test_large_offsets_do_not_spoil_float32(self, offset):
        """The mean of an input costs nothing, however large: the bias takes it."""
        x = torch.randn(64, 8, 6, 6)
        model = nn.Sequential(conv(8, 8, 1))
        found, centred = (report_in(prune(model, [y]))["0"] for y in (x + offset, x))
        assert found.relative_error == pytest.approx(centred.relative_error, rel=0.05)


class Single(nn.Module):
    """Works on one image without a batch dimension, and on a batch of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(torch.relu(self.conv(x)).mean((-2, -1))))


@pytest.mark.parametrize("target", ["dense", "relu_aware"])
def test_images_without_a_batch_dimension_count_like_a_batch_of_them(target):
    torch.manual_seed(0)
    model, images = Single().double(), torch.randn(40, 4, 5, 5, dtype=torch.float64)
    one, batch = (prune(model, batches, target=target) for batches in (list(images), [images]))
    for name in ("conv.weight", "conv.bias", "linear.weight", "linear.bias"):
        torch.testing.assert_close(one.get_parameter(name), batch.get_parameter(name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("method", "bias"), [("admm", True), ("sparsegpt", False)])
def test_a_bias_is_created_where_the_method_fits_one(method, bias):
    model = nn.Sequential(conv(8, 4, bias=False))
    model[0].weight.requires_grad_(False)
    new = prune(model, [torch.rand(4, 8, 6, 6)], method).get_submodule("0")
    assert (new.bias is not None) is bias
    assert new.weight.requires_grad is False
    if bias:
        assert isinstance(new.bias, nn.Parameter)
        assert new.bias.requires_grad is False
        assert new.bias.dtype == torch.float32
    assert model[0].bias is None


class Unaffected(nn.Module):
    """Layers that can only be re-fitted: before, beside and after what can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 6), conv(6, 8)
        self.pruned, self.beside, self.after = conv(8, 6), conv(3, 6), conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        pruned = self.pruned(F.relu(self.second(F.relu(self.first(x)))))
        return self.after(F.relu(self.beside(x) + pruned))


def test_layers_that_no_pruned_layer_reaches_stay_as_they_are():
    torch.manual_seed(5)
    model = Unaffected().double()
    graph_module = prune(model, batches())
    report = report_in(graph_module)
    assert [layer.status for layer in report.layers] == [*["reconstructed"] * 2, "pruned", *["reconstructed"] * 2]
    for name in ("first", "second"):
        assert report[name].relative_error == 0
        for key, value in model.get_submodule(name).state_dict().items():
            assert torch.equal(graph_module.get_submodule(name).state_dict()[key], value)
    for name in ("beside", "after"):  # The one makes up for what it is added to, the other for what it reads.
        assert report[name].relative_error > 0
        assert not torch.equal(graph_module.get_submodule(name).weight, model.get_submodule(name).weight)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fxprune.passes.solve_layers.unaffected", lambda graph_module, roles, calls: [])
        fitted = prune(model, batches())
    for key, value in fitted.state_dict().items():
        torch.testing.assert_close(graph_module.state_dict()[key], value, rtol=1e-7, atol=1e-9)


class Branches(nn.Module):
    """Two layers with one input and geometry, and two more with that input in other geometries."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8), conv(8, 12)
        self.pointwise, self.strided = conv(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        wide = torch.cat([self.a(x), self.b(x), self.pointwise(x)], 1)
        return torch.cat([F.max_pool2d(wide, 2), self.strided(x)], 1)


@pytest.mark.parametrize(
    ("method", "factorisation"),
    [("admm", "eigh"), ("exact_obs", "inv"), ("sparsegpt", "solve_triangular")],
)
def test_layers_that_share_an_input_share_one_factorisation(method, factorisation, monkeypatch):
    torch.manual_seed(6)
    model, calls = Branches().double(), []
    original = getattr(torch.linalg, factorisation)

    def counted(matrix: Tensor, *args: object, **kwargs: object) -> object:
        calls.append(tuple(matrix.shape))
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, factorisation, counted)
    graph_module = prune(model, batches(), method)
    assert sorted(calls) == [(8, 8), (72, 72), (72, 72)]  # pointwise; a and b; strided
    for name in ("a", "b", "pointwise", "strided"):  # Each one alone finds what it found beside the others.
        others = tuple({"a", "b", "pointwise", "strided"} - {name})
        alone = solve(model, batches(), method, exclude=others, target="skip" if method == "admm" else None)
        torch.testing.assert_close(
            graph_module.get_submodule(name).weight, alone.get_submodule(name).weight, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("target", ["relu_aware", "dense"])
def test_from_dense_inputs_each_layer_is_solved_as_if_it_were_alone(target):
    """Dense inputs that nothing else reads are still there when the rectifier's target is gathered."""
    torch.manual_seed(8)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3), nn.ReLU())]
    model, images = nn.Sequential(*layers).double(), list(torch.randn(32, 4, 9, 9, dtype=torch.float64).split(8))
    together = solve(model, images, "admm", "1:4", inputs="dense", target=target)
    for name in ("0", "2", "4"):
        alone = solve(
            model, images, "admm", "1:4", exclude=tuple({"0", "2", "4"} - {name}), inputs="dense", target=target
        )
        weights = (made.get_submodule(name).weight for made in (together, alone))
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)
