"""Recurrent layers: the statistics of their matrices, and what becomes of them on the way to a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxprune
from fxprune.annotations import annotation
from fxprune.errors import ExportError, OptionsError, PatternError
from fxprune.export import inspect_onnx
from fxprune.graph import module_of
from fxprune.intake.origins import origins
from fxprune.layers.recurrent import Collect, Recurrent
from fxprune.passes import InsertObservers, RollUpRecurrent, UnrollRecurrent
from fxprune.recipe import Recipe
from fxprune.tracing import trace
from tests.pipelines import calibration, report_in, solve

KINDS = {
    "LSTM": nn.LSTM(8, 12),
    "LSTM batch first": nn.LSTM(8, 12, batch_first=True),
    "LSTM both ways, two layers": nn.LSTM(8, 12, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM projected": nn.LSTM(8, 12, num_layers=2, proj_size=4),
    "LSTM projected, both ways": nn.LSTM(8, 12, proj_size=4, bidirectional=True, bias=False),
    "GRU": nn.GRU(8, 12, num_layers=2, batch_first=True),
    "GRU both ways": nn.GRU(8, 12, bidirectional=True),
    "RNN": nn.RNN(8, 12, batch_first=True),
    "RNN relu, both ways": nn.RNN(8, 12, nonlinearity="relu", bidirectional=True, bias=False),
}
each_kind = pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)


class Net(nn.Module):
    """A recurrent layer over (N, T, C) or (T, N, C), and a linear layer behind it."""

    def __init__(self, layer: nn.RNNBase, *, states: bool = False) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        size = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.tail, self.last = nn.Linear(size, 8), nn.Linear(layer.proj_size or layer.hidden_size, 8)
        self.states = states

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        if self.states:
            h, c = x.new_ones(4, 3, 12), x.new_ones(4, 3, 12)
            y, (last, _) = self.layer(x, (h, c))
        else:
            y, states = self.layer(x)
            last = states[0] if isinstance(self.layer, nn.LSTM) else states
        y = self.tail(y)
        return (y if self.layer.batch_first else y.transpose(0, 1)) + self.last(last[-1]).unsqueeze(1)


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 5, 8, generator=generator, dtype=dtype) for n in (7, 4, 9)]


def step(layer: nn.RNNBase, products: Tensor, h: Tensor, c: Tensor, hidden: nn.Linear, projection: Tensor | None):
    """One step by the formulas of torch's documentation: the new h and c, and h before the projection."""
    own = nn.functional.linear(h, hidden.weight, hidden.bias)
    if layer.mode == "GRU":
        (r, z, n), (of_r, of_z, of_n) = products.chunk(3, -1), own.chunk(3, -1)
        r, z = torch.sigmoid(r + of_r), torch.sigmoid(z + of_z)
        h = (1 - z) * torch.tanh(n + r * of_n) + z * h
    elif layer.mode == "LSTM":
        i, f, g, o = (products + own).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    else:
        h = torch.relu(products + own) if layer.mode == "RNN_RELU" else torch.tanh(products + own)
    return (h if projection is None else h @ projection.T), c, h


def run(
    layer: nn.RNNBase, x: Tensor, inputs: nn.Linear, hidden: nn.Linear, projection: nn.Linear | None, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer on (N, T, C), step by step: states before each step, those after, unprojected ones."""
    n, steps = x.shape[:2]
    h, c = x.new_zeros(n, hidden.in_features), x.new_zeros(n, layer.hidden_size)
    before, after, inner = ([torch.empty(0)] * steps for _ in range(3))
    for t in reversed(range(steps)) if reverse else range(steps):
        before[t] = h
        h, c, u = step(layer, inputs(x[:, t]), h, c, hidden, None if projection is None else projection.weight)
        after[t], inner[t] = h, u
    return torch.stack(before, 1), torch.stack(after, 1), torch.stack(inner, 1)


def matrices(layer: nn.RNNBase | Recurrent) -> dict[str, nn.Linear]:
    """All matrices of a layer as linear layers, by torch's names."""
    if isinstance(layer, Recurrent):
        return dict(layer.named_children())
    found = {}
    for name, weight in layer.named_parameters():
        if name.startswith("weight"):
            bias = getattr(layer, name.replace("weight", "bias"), None) if "_hr_" not in name else None
            found[name] = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
            found[name].weight, found[name].bias = weight, bias
    return found


@pytest.mark.parametrize("target", ["weights", "dense"])
@pytest.mark.parametrize("bias_correction", [True, False])
@each_kind
def test_matrices_are_least_squares_over_all_time_steps(layer, bias_correction, target):
    """What W_hh reads are the states h_0, ..., h_{T-1}; every matrix is fitted after those before it."""
    net, damping = Net(layer).double(), 0.01
    options = {"target": target, "bias_correction": bias_correction, "refit": True, "damping": damping}
    graph_module = solve(net, batches(), "admm", **options)
    old, new = matrices(net.layer), matrices(graph_module.get_submodule("layer"))
    x = torch.cat(batches())
    x_dense = x

    def check(name: str, inputs: Tensor, dense_inputs: Tensor) -> None:
        inputs, dense_inputs = inputs.flatten(0, 1), dense_inputs.flatten(0, 1)
        wanted = old[name](inputs if target == "weights" else dense_inputs)
        centred = bias_correction and "_hr_" not in name
        own = torch.zeros(len(wanted[0])).double() if old[name].bias is None else old[name].bias
        a, b = (inputs - inputs.mean(0), wanted - wanted.mean(0)) if centred else (inputs, wanted - own)
        shift = damping * float(a.square().mean())
        for row in range(len(new[name].weight)):
            kept = new[name].weight[row] != 0
            assert 0 < int(kept.sum()) <= a.shape[1] // 2
            columns = torch.cat([a[:, kept] / len(a) ** 0.5, shift**0.5 * torch.eye(int(kept.sum())).double()])
            values = torch.cat([b[:, row] / len(a) ** 0.5, shift**0.5 * old[name].weight[row, kept]])
            expected = torch.linalg.lstsq(columns, values[:, None]).solution[:, 0]
            torch.testing.assert_close(new[name].weight[row, kept], expected, rtol=1e-6, atol=1e-8)
        if centred:
            bias = wanted.mean(0) - inputs.mean(0) @ new[name].weight.T
            torch.testing.assert_close(new[name].bias, bias, rtol=1e-7, atol=1e-8)

    for number in range(layer.num_layers):
        outputs, dense_outputs = [], []
        for way in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            suffix = f"l{number}{way}"
            ih, hh, hr = (f"weight_{kind}_{suffix}" for kind in ("ih", "hh", "hr"))
            check(ih, x, x_dense)
            reverse = bool(way)
            dense = run(layer, x_dense, old[ih], old[hh], old.get(hr), reverse=reverse)
            before, _, _ = run(layer, x, new[ih], old[hh], old.get(hr), reverse=reverse)
            check(hh, before, dense[0])
            if hr in new:
                _, _, inner = run(layer, x, new[ih], new[hh], old[hr], reverse=reverse)
                check(hr, inner, dense[2])
            outputs.append(run(layer, x, new[ih], new[hh], new.get(hr), reverse=reverse)[1])
            dense_outputs.append(dense[1])
        x, x_dense = torch.cat(outputs, -1), torch.cat(dense_outputs, -1)


def relative_error(dense: nn.Module, pruned: nn.Module, name: str, images: list[Tensor]) -> float:
    """Of a layer's output, in whole runs of both models."""
    seen: list[list[Tensor]] = []
    for model in (dense, pruned):
        seen.append([])
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, y, of=seen[-1]: of.append(y))
        for x in images:
            model(x)
        hook.remove()
    ys, zs = (torch.cat([y.flatten(0, -2) for y in of]) for of in seen)
    return float((ys - zs).square().sum() / (ys - ys.mean(0)).square().sum())


@pytest.mark.parametrize("method", ["admm", "magnitude"])
@each_kind
def test_later_layers_see_what_each_model_really_computes(layer, method):
    net = Net(layer).double()
    graph_module = solve(net, batches(), method)
    with torch.no_grad():
        for name in ("tail", "last"):
            expected = relative_error(net, graph_module, name, batches())
            assert report_in(graph_module)[name].relative_error == pytest.approx(expected, rel=1e-6), name


class CalledTwice(Net):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y, _ = self.layer(x)
        z, _ = self.layer(y[..., :8] + x)
        return self.tail(y + z)


@pytest.mark.parametrize("exclude", [(), ("layer.weight_ih_l0",)])
def test_a_layer_that_is_called_twice_is_solved_over_both_calls(exclude):
    net = CalledTwice(nn.LSTM(8, 12, batch_first=True)).double()
    graph_module = solve(net, batches(), "admm", exclude=exclude)
    report = report_in(graph_module)
    assert report["layer.weight_hh_l0"].reason == "one weight at 2 places"
    with torch.no_grad():
        expected = relative_error(net, graph_module, "tail", batches())
    assert report["tail"].relative_error == pytest.approx(expected, rel=1e-6)


@each_kind
def test_a_whole_compilation(layer, tmp_path):
    torch.manual_seed(0)
    net, images = Net(layer).eval(), [torch.randn(32, 5, 8) for _ in range(3)]
    options = None if layer.bias and not layer.proj_size else fxprune.Options(bias_correction=False)
    compiled = fxprune.compile(net, images, "2:4", options=options, progress=False)
    rows = {row.name: row for row in compiled.report.layers}
    assert set(rows) == {f"layer.{name}" for name in matrices(layer)} | {"tail", "last"}
    assert {row.status for row in rows.values()} == {"pruned"}
    assert compiled.report.sparsity == 0.5
    called = next(iter(compiled.graph.find_nodes(op="call_module")))
    assert type(module_of(called)).__name__ == type(layer).__name__

    class_of_user = Net(layer).eval()
    class_of_user.load_state_dict(fxprune.state_dict_for(compiled, class_of_user))
    torch.testing.assert_close(class_of_user(images[0]), compiled(images[0]), rtol=1e-5, atol=1e-6)
    assert {float((p == 0).float().mean()) for n, p in class_of_user.layer.named_parameters() if "weight" in n} == {0.5}

    fxprune.save(compiled, tmp_path / "net.pt")
    loaded = fxprune.load(tmp_path / "net.pt")
    assert torch.equal(loaded(images[0]), compiled(images[0]))
    assert loaded.report == compiled.report
    if layer.proj_size:
        with pytest.raises(ExportError, match=r"layer is an LSTM with a projection \(proj_size=4\)"):
            fxprune.export_onnx(compiled, tmp_path / "net.onnx", images[0])
        return
    exported = fxprune.export_onnx(compiled, tmp_path / "net.onnx", images[0])
    checks = {check.name: check for check in exported.layers}
    assert all(checks[f"layer.{name}"].ok for name in matrices(layer))
    if isinstance(layer, nn.RNN):
        return  # torch's exporter writes its steps out.
    assert {checks[f"layer.{name}"].op for name in matrices(layer)} == {type(layer).__name__}
    inspected = [found for found in inspect_onnx(tmp_path / "net.onnx").layers if found.op == type(layer).__name__]
    assert len(inspected) == len(matrices(layer))
    assert all(found.sparsity == 0.5 and "2:4" in found.patterns and found.axis == 2 for found in inspected)


def test_the_layers_of_a_file_are_pruned_too(tmp_path):
    layer = nn.LSTM(8, 12, bidirectional=True, batch_first=True)
    net, images = Net(layer).eval(), [torch.randn(32, 5, 8) for _ in range(3)]
    torch.onnx.export(net, (images[0],), tmp_path / "dense.onnx", dynamo=True, verbose=False)
    compiled = fxprune.compile(tmp_path / "dense.onnx", images, "2:4", progress=False)
    names = [row.name.rpartition(".")[2] for row in compiled.report.layers if row.status == "pruned"]
    assert set(names) >= set(matrices(layer))
    exported = fxprune.export_onnx(compiled, tmp_path / "sparse.onnx", images[0], dynamic_batch=False)
    assert [check.ok for check in exported.layers if check.op == "LSTM"] == [True] * 4
    told = fxprune.diff(tmp_path / "dense.onnx", tmp_path / "sparse.onnx")
    assert [node.changes[0] for node in told.changed if node.state.op == "LSTM"] == ["pruned to 2:4"]


class StatesRead(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.inner.layer(x if self.inner.layer.batch_first else x.transpose(0, 1))
        states = state if isinstance(state, tuple) else (state,)
        return (y if self.inner.layer.batch_first else y.transpose(0, 1)).sum(2) + sum(s.sum((0, 2)) for s in states)[
            :, None
        ]


@each_kind
def test_exported_programs_have_them_as_modules_again(layer):
    net, x = StatesRead(layer).eval(), torch.randn(4, 5, 8)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    graph_module = trace(program, example=x)
    assert isinstance(graph_module.get_submodule("inner.layer"), Recurrent)
    assert {origin.names[0] for origin in origins(graph_module).values()} == set(net.state_dict())
    torch.testing.assert_close(graph_module(x), net(x), rtol=1e-6, atol=1e-6)


@each_kind
def test_what_is_excluded_is_exactly_what_it_was(layer):
    net, (x, *_) = Net(layer).eval(), batches(torch.float32)
    compiled = fxprune.compile(net, [x], "2:4", exclude=("layer",), progress=False)
    assert {compiled.report[f"layer.{name}"].reason for name in matrices(layer)} == {"excluded"}
    assert torch.equal(compiled.get_submodule("layer")(x.transpose(0, 1))[0], net.layer(x.transpose(0, 1))[0])
    assert torch.equal(fxprune.compile(net, [x], "2:4", exclude=("*",), progress=False)(x), net(x))


class WithState(nn.Module):
    """States given by the graph, a single sequence, and the last states read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), nn.LSTM(8, 12, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = x.mean(1, keepdim=True)[..., :1].expand(-1, 4, 12).transpose(0, 1)
        y, (h, c) = self.layer(x.transpose(0, 1), (h, 2 * h))
        return y.transpose(0, 1).mean(1) + torch.cat([h.sum(0), c[-1]], -1)


class SingleSequence(nn.Module):
    """One sequence (T, C), whose time steps are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tail = nn.GRU(8, 12, bidirectional=True), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.layer(x[:, 0])
        return self.tail(y) + h.sum()


@pytest.mark.parametrize("kind", [WithState, SingleSequence])
def test_unrolled_and_rolled_up_it_is_the_same_function(kind):
    net, images = kind().double().eval(), batches()
    graph_module = trace(net, example=images[0])
    wanted = graph_module(images[0])
    text = str(graph_module.graph)
    assert UnrollRecurrent()(graph_module, calibration(images)).modified
    assert not UnrollRecurrent()(graph_module, calibration(images)).modified
    assert any(isinstance(module_of(node), Collect) for node in graph_module.graph.nodes)
    torch.testing.assert_close(graph_module(images[0]), wanted, rtol=1e-12, atol=1e-12)
    assert RollUpRecurrent()(graph_module).modified
    assert not RollUpRecurrent()(graph_module).modified
    assert torch.equal(graph_module(images[0]), wanted)
    assert len(str(graph_module.graph).splitlines()) == len(text.splitlines())
    assert not any("unrolled_recurrent" in name for name, _ in graph_module.named_modules())


def test_both_directions_share_one_hessian():
    graph_module = trace(Net(nn.LSTM(8, 12, bidirectional=True, batch_first=True)))
    UnrollRecurrent()(graph_module, calibration(batches(torch.float32)))
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    of = {str(n.target): n.args[0] for n in graph_module.graph.nodes if annotation(n).role}
    assert of["layer.weight_ih_l0"] is of["layer.weight_ih_l0_reverse"]
    assert of["layer.weight_hh_l0"] is not of["layer.weight_hh_l0_reverse"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.tail = nn.Linear(8, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        packed = pack_padded_sequence(x, torch.tensor([5] * len(x)), batch_first=True, enforce_sorted=False)
        return self.tail(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])


@pytest.mark.filterwarnings("ignore::fxprune.CalibrationWarning")
def test_packed_sequences_stay_dense_with_the_reason():
    net, (x, *_) = Packed().eval(), [torch.randn(64, 5, 8)]
    compiled = fxprune.compile(net, [x], "2:4", progress=False)
    assert compiled.report["layer.weight_hh_l0"].reason.startswith("reads packed sequences")
    assert compiled.report["tail"].status == "pruned"
    assert torch.equal(fxprune.compile(net, [x], "2:4", exclude=("*",), progress=False)(x), net(x))


class Cells(nn.Module):
    """A cell called in a loop."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: object) -> None:
        super().__init__()
        self.cell, self.tail = kind(8, 12, **options), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(5):
            state = self.cell(x[:, t], state)
        return self.tail(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_cells_are_two_layers_that_are_called_at_several_places(kind, options, tmp_path):
    net, images = Cells(kind, **options).eval(), [torch.randn(32, 5, 8) for _ in range(3)]
    graph_module = trace(net, example=images[0])
    torch.testing.assert_close(graph_module(images[0]), net(images[0]), rtol=1e-5, atol=1e-6)
    own = None if options == {} else fxprune.Options(bias_correction=False)
    compiled = fxprune.compile(net, images, "2:4", options=own, progress=False)
    assert {row.name: row.status for row in compiled.report.layers} == dict.fromkeys(
        ("cell.weight_ih", "cell.weight_hh", "tail"), "pruned"
    )
    assert compiled.report["cell.weight_hh"].reason == "one weight at 5 places"
    again = Cells(kind, **options).eval()
    again.load_state_dict(fxprune.state_dict_for(compiled, again))
    torch.testing.assert_close(again(images[0]), compiled(images[0]), rtol=1e-5, atol=1e-6)
    fxprune.export_onnx(compiled, tmp_path / "net.onnx", images[0])
    assert torch.equal(fxprune.compile(net, images, "2:4", exclude=("*",), progress=False)(images[0]), net(images[0]))


def test_a_recipe_may_name_a_matrix_of_a_layer_that_is_excluded():
    net, images = Net(nn.GRU(8, 12)), [torch.randn(64, 5, 8)]
    recipe = {"layer.weight_hh_l0": "1:4", "*": "2:4"}
    compiled = fxprune.compile(net, images, recipe, exclude=["layer"], progress=False)
    assert [compiled.report[f"layer.weight_{kind}_l0"].reason for kind in ("ih", "hh")] == ["excluded"] * 2
    with pytest.raises(PatternError, match=r"'layer.weight_hh_l1' matches no layer that the model calls"):
        fxprune.compile(net, images, {"layer.weight_hh_l1": "1:4", "*": "2:4"}, progress=False)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.GRU(8, 8, batch_first=True), "weight_hh_l0"),
        (nn.LSTMCell(8, 8), "weight_ih"),
        (nn.MultiheadAttention(8, 2, batch_first=True), "k_proj"),
    ],
)
def test_what_the_report_names_can_be_excluded(layer, name):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tail, self.kind = layer, nn.Linear(8, 8), type(layer)

        def forward(self, x):
            if self.kind is nn.LSTMCell:
                return self.tail(self.layer(x[:, 0])[0])
            return self.tail(self.layer(x)[0] if self.kind is nn.GRU else self.layer(x, x, x)[0])

    compiled = fxprune.compile(One().eval(), [torch.randn(64, 5, 8)], exclude=[f"layer.{name}"], progress=False)
    done = {row.name: (row.status, row.reason) for row in compiled.report.layers}
    assert done.pop(f"layer.{name}") == ("kept", "excluded")
    assert {status for status, _ in done.values()} == {"pruned"}
    with pytest.raises(OptionsError, match=r"'layer.weight_ih_l7' matches no module of One"):
        fxprune.compile(One().eval(), [torch.randn(64, 5, 8)], exclude=["layer.weight_ih_l7"], progress=False)


def test_two_factors_are_declined_with_the_reason():
    recipe = {"layer.*": "rank:energy=0.5", "*": "2:4"}
    compiled = fxprune.compile(Net(nn.GRU(8, 12)), [torch.randn(64, 5, 8)], recipe, progress=False)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert compiled.report[f"layer.{name}"].reason == "a recurrent layer has one matrix there, and no place for two"


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("mixed:0.6", {}),
        ("0.6", {"global_budget": True}),
        ("2:4", {"polish": 2}),
        ("channels:0.8", {}),
        ("2:4", {"target": "relu_aware"}),
    ],
)
def test_other_recipes_and_options(pattern, options):
    class Convolutions(Net):
        def __init__(self) -> None:
            super().__init__(nn.LSTM(8, 12, bidirectional=True, batch_first=True))
            self.stem = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 8, 1))

        def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
            return super().forward(self.stem(x.transpose(1, 2)).transpose(1, 2))

    net, images = Convolutions().eval(), [torch.randn(32, 5, 8) for _ in range(3)]
    compiled = fxprune.compile(net, images, pattern, options=fxprune.Options(**options), progress=False)
    assert isinstance(compiled, GraphModule)
    assert isinstance(compiled.get_submodule("layer"), Recurrent)
    error = (compiled(images[0]) - net(images[0])).square().sum() / net(images[0]).var() / net(images[0]).numel()
    assert 0 < float(error) < 0.5


def test_a_scan_tells_what_each_matrix_costs():
    net, images = Net(nn.GRU(8, 12, batch_first=True)).eval(), [torch.randn(32, 5, 8) for _ in range(3)]
    found = fxprune.scan(net, images, ["2:4", "1:4"], progress=False)
    for name in ("layer.weight_ih_l0", "layer.weight_hh_l0"):
        assert 0 < found[name, "2:4"].cost < found[name, "1:4"].cost


def test_dropout_between_layers_is_there_in_training_only():
    compiled = fxprune.compile(
        Net(nn.GRU(8, 12, num_layers=2, dropout=0.5)), [torch.randn(64, 5, 8)], method="magnitude", progress=False
    )
    x = torch.randn(4, 5, 8)
    assert torch.equal(compiled(x), compiled(x))
    compiled.train()
    assert not torch.equal(compiled(x), compiled(x))


def test_zeros_are_kept_while_training():
    net, images = Net(nn.LSTM(8, 12)), [torch.randn(32, 5, 8) for _ in range(3)]
    compiled = fxprune.compile(net, images, "2:4", progress=False)
    fxprune.keep_zeros(compiled)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    before = compiled(images[0])
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(compiled(images[0]), before)
    assert compiled.report.sparsity == 0.5
    assert compiled.report["layer.weight_hh_l0"].pattern == "2:4"
