from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from fxprune.annotations import annotation
from fxprune.constraints import parse_chain
from fxprune.constraints.rank import Rank
from fxprune.errors import CalibrationError, GraphError, OptionsError
from fxprune.export import export_onnx
from fxprune.layers.splits import full_rank, splits_of
from fxprune.options import Method
from fxprune.passes import Allocate, FoldBatchNorm, InsertObservers, RemoveObservers, SolveLayers, changes, verify
from fxprune.rank_reduction import low_rank, low_rank_options
from fxprune.ranks.plan import Choice, PlannedLayer, RankPlan, RankRule
from fxprune.recipe import Recipe
from fxprune.saving import load, save
from fxprune.solvers import ADMM, Magnitude
from tests.pipelines import calibration, report_in


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class Net(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.block1, self.block2 = Block(channels), Block(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def smooth(images: int = 64, channels: int = 3, size: int = 12, seed: int = 0) -> Tensor:
    noise = torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1, 1) * 2


def net() -> Net:
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(3):
        model(smooth(seed=7))  # gives BatchNorm statistics
    return model.eval()


def folded(model: nn.Module) -> GraphModule:
    graph_module = symbolic_trace(copy.deepcopy(model).eval())
    FoldBatchNorm()(graph_module)
    return graph_module


def plan_of(**choices: tuple[Any, int]) -> RankPlan:
    layers = {name: PlannedLayer(1, Choice(split, rank, 1, 0.0)) for name, (split, rank) in choices.items()}
    return RankPlan("given", layers, (len(layers), len(layers)))


def factor(graph_module: GraphModule, batches: Any, method: Any = "data_aware", **kwargs: Any) -> bool:
    """Observe, choose ranks and solve; whether anything was modified."""
    options = low_rank_options(kwargs.pop("options", None), method)
    rule = kwargs.pop("rank")
    recipe = Recipe((("*", (Rank(rule if isinstance(rule, RankPlan) else RankRule.parse(rule), **kwargs),)),))
    how, images = Method(Magnitude() if method == "svd" else ADMM(), options, method), calibration(batches)
    InsertObservers(recipe, reconstruct=bool(options.reconstruct))(graph_module)
    Allocate(how)(graph_module, images)
    return bool(SolveLayers(recipe, how)(graph_module, images).modified)


def run(graph_module: GraphModule, batches: Any, method: Any = "data_aware", **kwargs: Any) -> GraphModule:
    assert factor(graph_module, batches, method, **kwargs)
    RemoveObservers()(graph_module)
    verify(graph_module)
    return graph_module


def count_macs(model: nn.Module, x: Tensor) -> int:
    total = 0

    def add(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()
        total += per_output * output[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(x[:1])
    for handle in handles:
        handle.remove()
    return total


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "uneven": {"kernel_size": (3, 5), "padding": (2, 1), "stride": (2, 1)},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 5, "padding": "same", "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", ["channel", "spatial"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_full_rank_factors_compute_what_the_convolution_computes(name: str, split: Any, bias: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, bias=bias, **CONVOLUTIONS[name]), nn.Flatten()).double()  # type: ignore[arg-type]
    geometry = fxprune.geometry.LayerGeometry.of(model[0])
    full = full_rank(geometry, split)
    x = torch.randn(8, 4, 9, 10, dtype=torch.float64)
    result = run(folded(model), [x], "svd", rank=plan_of(**{"0": (split, full)}))
    assert [str(n.target) for n in result.graph.nodes if n.op == "call_module"] == ["0.0", "0.1", "1"]
    torch.testing.assert_close(result(x), model(x))
    first, second = result.get_submodule("0.0"), result.get_submodule("0.1")
    assert first.bias is None
    assert (second.bias is not None) == bias
    if split == "spatial":
        assert first.kernel_size[1] == second.kernel_size[0] == 1


@pytest.mark.parametrize("shape", [(16, 12), (4, 5, 12)])
def test_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    x = torch.randn(*shape, dtype=torch.float64)
    result = run(folded(model), [x], "svd", rank=plan_of(**{"0": ("channel", 8)}))
    torch.testing.assert_close(result(x), model(x))
    report = report_in(result).layers[0]
    assert report.relative_error < 1e-20


def test_other_convolutions_have_a_channel_split() -> None:
    torch.manual_seed(3)
    for make, x in ((nn.Conv1d, torch.randn(4, 6, 9)), (nn.Conv3d, torch.randn(2, 6, 5, 5, 5))):
        model = nn.Sequential(make(6, 8, 3, padding=1)).double()
        result = run(folded(model), [x.double()], "svd", rank=plan_of(**{"0": ("channel", 8)}))
        torch.testing.assert_close(result(x.double()), model(x.double()))


def test_a_layer_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x).relu()

    torch.manual_seed(4)
    model, x = Keyword().double(), torch.randn(4, 4, 8, 8, dtype=torch.float64)
    result = run(folded(model), [x], "svd", rank=plan_of(conv=("channel", 6)))
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("split", ["channel", "spatial"])
def test_a_single_layer_reaches_the_least_squares_error(split: Any) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).double()
    x = smooth(64, 4, 10).double()
    options = fxprune.Options(damping=1e-9)
    errors = {}
    for method in ("svd", "data_aware"):
        result = run(folded(model), x.split(16), method, rank=plan_of(**{"0": (split, 5)}), options=options)
        y, y_low = model(x).detach(), result(x).detach()
        relative = (y - y_low).square().sum() / (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
        assert report_in(result)["0"].relative_error == pytest.approx(float(relative), rel=1e-6)
        errors[method] = float(relative)
    assert 0 < errors["data_aware"] < 0.7 * errors["svd"]
    if split == "channel":  # Among rank-5 maps with a free bias this error is the least: the tail of the output's SVD.
        flat = y.movedim(1, 0).flatten(1)
        spectrum = torch.linalg.svdvals(flat - flat.mean(1, keepdim=True)).square()
        assert errors["data_aware"] == pytest.approx(float(spectrum[5:].sum() / spectrum.sum()), rel=1e-5)


def test_network_meets_its_budget_and_data_aware_is_nearer_to_dense() -> None:
    model, x = net(), smooth()
    dense = count_macs(model, x)
    kl = {}
    for method in ("svd", "data_aware"):
        compiled = low_rank(model, x.split(32), "macs:0.6", method=method, device="cpu", progress=False)
        before, after = compiled.report.macs
        assert (before, after) == (dense, count_macs(compiled, x))
        assert 0.55 * dense < after <= 0.6 * dense
        kl[method] = compiled.report.kl
    assert kl["data_aware"] < 0.2 * kl["svd"]


def test_report_changes_and_names() -> None:
    model, x = net(), smooth()
    before = copy.deepcopy(model.state_dict())
    compiled = low_rank(model, x.split(32), "macs:0.6", device="cpu", progress=False)
    assert isinstance(compiled, fxprune.CompiledModule)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = compiled.report
    assert [layer.name for layer in report.layers] == [
        "stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "head",
    ]  # fmt: skip
    factored = [layer for layer in report.layers if layer.status == "factored"]
    assert len(factored) >= 3
    replaced = {change.target: change for change in changes(compiled) if change.action == "replaced"}
    assert set(replaced) == {layer.name for layer in factored}
    nodes = {node.name: node for node in compiled.graph.nodes}
    for layer in factored:
        assert layer.rank % 4 == 0
        assert layer.macs[1] < layer.macs[0]
        assert layer.shape == (16, 16, 3, 3)
        second = nodes[replaced[layer.name].into]
        assert str(second.target) == f"{layer.name}.1"
        assert annotation(second).report == layer
        assert compiled.get_submodule(f"{layer.name}.0").out_channels == layer.rank
        assert f"rank {layer.rank}" in str(report).replace("\n", " ")
    for layer in report.layers:
        assert layer.relative_error is not None
        assert layer.status == "factored" or layer.reason
    assert "times fewer" in report.summary
    assert not any("observer" in str(node.target) for node in compiled.graph.nodes)


def test_a_second_run_changes_nothing() -> None:
    graph_module, batches = folded(net()), smooth().split(32)
    recipe, options = Recipe.parse("rank:ratio=0.6"), low_rank_options(None, "data_aware")
    method, images = Method(ADMM(), options), calibration(batches)
    steps = [Allocate(method), SolveLayers(recipe, method)]
    InsertObservers(recipe)(graph_module)
    assert all(step(graph_module, images).modified for step in steps)
    text, weights = str(graph_module.graph), copy.deepcopy(graph_module.state_dict())
    assert not any(step(graph_module, images).modified for step in steps)
    assert str(graph_module.graph) == text
    assert all(torch.equal(weights[name], tensor) for name, tensor in graph_module.state_dict().items())


@pytest.mark.parametrize("rank", ["ratio:0.5", "energy:0.9"])
@pytest.mark.parametrize("split", ["channel", "spatial", "auto"])
def test_rules_hold_in_every_layer(rank: str, split: Any) -> None:
    model, x = net(), smooth()
    compiled = low_rank(model, x.split(32), rank, split=split, multiple=1, device="cpu", progress=False)
    factored = [layer for layer in compiled.report.layers if layer.status == "factored"]
    assert factored
    for layer in factored:
        if rank == "ratio:0.5":
            assert layer.macs[1] <= 0.5 * layer.macs[0]
        assert split == "auto" or layer.reason == f"{split} split"
    first = factored[0]  # Its input is still the dense model's.
    assert first.relative_error is not None
    assert rank != "energy:0.9" or 0.01 < first.relative_error < 0.105


def test_split_auto_is_no_worse_than_either() -> None:
    model, x = net(), smooth()
    kl = {}
    for split in ("channel", "spatial", "auto"):
        compiled = low_rank(model, x.split(32), "macs:0.55", split=split, device="cpu", progress=False)
        kl[split] = compiled.report.kl
    assert kl["auto"] <= 1.05 * min(kl["channel"], kl["spatial"])


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.thin = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.grouped(x)))
        return self.thin(self.shared(self.shared(self.up(x))).relu())


def test_layers_that_cannot_be_factored_say_why() -> None:
    torch.manual_seed(6)
    model, x = Unusual(), smooth(32, 8)
    compiled = low_rank(model, [x], "ratio:0.5", split="spatial", multiple=1, device="cpu", progress=False)
    reasons = {layer.name: (layer.status, layer.reason) for layer in compiled.report.layers}
    assert reasons["grouped"] == ("reconstructed", "2 groups, each small already")
    assert reasons["depthwise"] == ("reconstructed", "8 groups, each small already")
    assert reasons["pointwise"][0] == "reconstructed"
    assert "no spatial split" in reasons["pointwise"][1]
    assert reasons["up"][0] == "reconstructed"
    assert reasons["shared"][0] == "kept"
    assert "2 places" in reasons["shared"][1]
    assert compiled(x).shape == model(x).shape
    compiled = low_rank(model, [x], "ratio:0.5", split="channel", multiple=1, device="cpu", progress=False)
    assert compiled.report["thin"].reason == "a weight of 1 x 72 has rank 1 as it is"
    with pytest.raises(GraphError, match=r"of 6 layers none can take it\. Why: "):
        low_rank(model, [x], "ratio:0.5", split="channel", multiple=4, device="cpu", progress=False)


def test_excluded_layers_stay_exactly_as_they_are() -> None:
    model, x = net(), smooth()
    compiled = low_rank(model, [x], "ratio:0.5", exclude=("block1",), device="cpu", progress=False)
    assert compiled.report["block1.conv1"].reason == "excluded"
    assert torch.equal(compiled.get_submodule("block1.conv1").weight, model.block1.conv1.weight)
    assert compiled.report["block2.conv1"].status == "factored"


def test_plain_svd_leaves_the_rest_alone_and_needs_no_statistics() -> None:
    model, x = net(), smooth()
    compiled = low_rank(model, x.split(32), "ratio:0.6", method="svd", split="channel", device="cpu", progress=False)
    folded = symbolic_trace(copy.deepcopy(model))
    FoldBatchNorm()(folded)
    for layer in compiled.report.layers:
        if layer.status == "factored":
            dense = folded.get_submodule(layer.name).weight
            first, second = (compiled.get_submodule(f"{layer.name}.{i}").weight for i in (0, 1))
            product = torch.einsum("or,rikl->oikl", second[:, :, 0, 0], first)
            left, spectrum, right = torch.linalg.svd(dense.flatten(1), full_matrices=False)
            wanted = (left[:, : layer.rank] * spectrum[: layer.rank]) @ right[: layer.rank]
            torch.testing.assert_close(product.flatten(1), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(compiled.get_submodule(f"{layer.name}.1").bias, folded.get_submodule(layer.name).bias)
        else:
            assert layer.status == "kept"
            assert torch.equal(compiled.get_submodule(layer.name).weight, folded.get_submodule(layer.name).weight)


def test_refitting_the_second_factor_of_plain_svd_helps() -> None:
    model, x = net(), smooth()
    options = fxprune.Options(refit=True, bias_correction=True, target="skip")
    plain = low_rank(model, [x], "ratio:0.5", method="svd", device="cpu", progress=False)
    refit = low_rank(model, [x], "ratio:0.5", method="svd", device="cpu", progress=False, options=options)
    assert [layer.rank for layer in plain.report.layers] == [layer.rank for layer in refit.report.layers]
    assert plain.report.kl is not None
    assert refit.report.kl is not None
    assert refit.report.kl < 0.7 * plain.report.kl


def test_factored_layers_can_be_pruned() -> None:
    model, x = net(), smooth()
    small = low_rank(model, x.split(32), "macs:0.7", split="spatial", device="cpu", progress=False)
    sparse = fxprune.compile(small, x.split(32), "2:4", device="cpu", progress=False)
    pruned = {layer.name for layer in sparse.report.layers if layer.status == "pruned"}
    factored = [layer.name for layer in small.report.layers if layer.status == "factored"]
    assert {f"{name}.{i}" for name in factored for i in (0, 1)} <= pruned
    assert sparse(x).shape == (64, 10)


def test_save_load_and_export(tmp_path: Any) -> None:
    model, x = net(), smooth()
    compiled = low_rank(model, x.split(32), "macs:0.7", device="cpu", progress=False)
    save(compiled, tmp_path / "small.pt")
    again = load(tmp_path / "small.pt")
    assert torch.equal(again(x), compiled(x))
    assert again.report == compiled.report
    report = export_onnx(compiled, tmp_path / "small.onnx", x[:4])
    assert (tmp_path / "small.onnx").is_file()
    names = [layer.name for layer in report.layers]
    assert any(name.startswith("block1.conv1.") for name in names)


def test_frozen_parameters_dtype_and_eval_mode_are_kept() -> None:
    model = net().double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    compiled = low_rank(model, [smooth().double()], "ratio:0.5", device="cpu", progress=False)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in compiled.parameters())
    assert not any(module.training for module in compiled.modules())


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_budget_in_a_mapping_is_one_of_the_layers_that_it_names(share: float) -> None:
    model, x = net(), smooth()
    recipe = {"block1.*": f"rank:{share}", "block2.conv1": "rank:0.5", "*": "dense"}
    compiled = fxprune.compile(model, [x], recipe, device="cpu", progress=False)
    whole = 144 * 16 * 16 * 9  # MACs of each of the four convolutions in the blocks
    left = {row.name: row.macs[1] if row.macs else whole for row in compiled.report.layers}
    for names, asked in ((("block1.conv1", "block1.conv2"), share), (("block2.conv1",), 0.5)):
        part = sum(left[name] for name in names) / (whole * len(names))
        assert asked - 0.2 < part <= asked, names  # Ranks are multiples of 4.
    assert left["block2.conv2"] == whole
    with pytest.raises(OptionsError, match=r"1,658 MACs are out of reach: at the lowest ranks .* of 331,776 are left"):
        fxprune.compile(model, [x], {"block1.conv1": "rank:0.005"}, device="cpu", progress=False)


def test_bad_requests_are_refused_before_any_work() -> None:
    model, x = net(), smooth(8)
    for rank in ("energy", "energy:1.5", "speedup:0.9", "0.5", "half"):
        with pytest.raises(OptionsError, match="cannot read the rank rule"):
            low_rank(model, [x], rank, progress=False)
    with pytest.raises(OptionsError, match="unknown method 'magic'"):
        low_rank(model, [x], method="magic", progress=False)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="split is 'both'"):
        low_rank(model, [x], split="both", progress=False)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="multiple is 0"):
        low_rank(model, [x], multiple=0, progress=False)
    with pytest.raises(OptionsError, match="permute"):
        low_rank(model, [x], options=fxprune.Options(permute=True), progress=False)
    with pytest.raises(OptionsError, match="out of reach"):
        low_rank(model, [x], "macs:0.05", device="cpu", progress=False)
    with pytest.raises(CalibrationError, match="no batches"):
        low_rank(model, [], device="cpu", progress=False)
    with pytest.raises(CalibrationError, match="NaN"):
        low_rank(model, [x * float("nan")], device="cpu", progress=False)


@pytest.mark.parametrize(
    ("name", "split", "rank", "words"),
    [
        ("block1.conv9", "spatial", 8, "no layer that can be; there are: stem, block1.conv1"),
        ("block1.conv1", "channel", 17, "ranks from 1 to 16"),
        ("head", "spatial", 4, "no such split"),
    ],
)
def test_a_plan_that_does_not_fit(name: str, split: Any, rank: int, words: str) -> None:
    graph_module = folded(net())
    before = copy.deepcopy(graph_module.state_dict())
    with pytest.raises(OptionsError, match=words):
        factor(graph_module, [smooth(8)], "svd", rank=plan_of(**{name: (split, rank)}))
    assert all(torch.equal(before[key], tensor) for key, tensor in graph_module.state_dict().items())


def test_a_layer_with_hooks_stays_whole() -> None:
    model, calls = net(), []
    model.block1.conv1.register_forward_hook(lambda *_: calls.append(1))
    compiled = low_rank(model, [smooth()], "ratio:0.5", device="cpu", progress=False)
    assert compiled.report["block1.conv1"].reason == "its forward hooks would be lost"
    assert compiled.report["block1.conv1"].status == "reconstructed"
    assert compiled.report["block1.conv2"].status == "factored"


def test_a_layer_that_is_not_in_the_plan_is_left_whole() -> None:
    result = run(folded(net()), [smooth()], rank=plan_of(**{"block1.conv1": ("spatial", 8)}))
    assert [layer.status for layer in report_in(result).layers] == ["reconstructed", "factored", *["reconstructed"] * 4]


@pytest.mark.parametrize("split", ["channel", "spatial", "auto"])
@pytest.mark.parametrize("mask", ["2:4", "0.5"])
def test_a_mask_on_both_factors_in_the_same_stream(mask: str, split: Any) -> None:
    """Nearer to the dense model than the same two steps one after the other, the second of which takes the first for it."""
    model, x = net(), smooth(256)
    small = low_rank(model, x.split(32), "macs:0.8", split=split, device="cpu", progress=False)
    options = fxprune.Options(permute=False)
    two_runs = fxprune.compile(small, x.split(32), mask, device="cpu", progress=False, options=options)
    recipe = Recipe((("*", (Rank(RankRule.parse("macs:0.8"), splits_of(split)), *parse_chain(mask))),))
    one_run = fxprune.compile(model, x.split(32), recipe, device="cpu", progress=False, options=options)
    rows = {layer.name: layer for layer in one_run.report.layers}
    factored = [layer.name for layer in small.report.layers if layer.status == "factored"]
    assert factored
    for name in factored:
        first, second = (one_run.get_submodule(f"{name}.{i}") for i in (0, 1))
        assert first.weight.shape == small.get_submodule(f"{name}.0").weight.shape
        for i, module in enumerate((first, second)):
            row = rows[f"{name}.{i}"]
            assert (row.status, row.pattern) == ("pruned", mask)
            assert row.sparsity == float((module.weight == 0).double().mean()) >= 0.49
            assert f"factor of {name!r}" in row.reason
    assert one_run.report.macs[1] < one_run.report.macs[0]
    held_out = smooth(64, seed=3)
    y = model(held_out)
    errors = [float((m(held_out) - y).detach().square().mean()) for m in (one_run, two_runs)]
    assert errors[0] < 1.1 * errors[1]


def test_rank_in_a_recipe_is_low_rank() -> None:
    model, x = net(), smooth()
    by_recipe = fxprune.compile(model, x.split(32), "rank:0.7", device="cpu", progress=False)
    by_name = low_rank(model, x.split(32), "macs:0.7", device="cpu", progress=False)
    for (key, one), (other, two) in zip(by_recipe.state_dict().items(), by_name.state_dict().items(), strict=True):
        assert key == other
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("recipe", ["rank:ratio=0.7", "rank:0.8+2:4", "rank:energy=0.7"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "admm"])
def test_a_loader_that_can_be_read_once_is_enough(recipe: str, method: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 8)).eval()
    images = torch.randn(96, 4, 8, 8)
    options = {"method": method, "progress": False}
    once = fxprune.compile(model, (batch for batch in images.split(32)), recipe, **options)
    listed = fxprune.compile(model, images.split(32), recipe, **options)
    assert once.report.macs == listed.report.macs
    for name, value in listed.state_dict().items():
        assert torch.equal(once.state_dict()[name], value)


def test_a_layer_that_stays_whole_is_asked_again_what_it_can_hold() -> None:
    """Its factors could have held 2:4; the stem itself, with 3 channels, cannot."""
    stem = fxprune.compile(net(), smooth().split(32), "rank:0.9+2:4", progress=False).report["stem"]
    assert stem.status == "reconstructed"
    assert stem.reason == "left whole by rank macs:0.9; 3 input channels are not a multiple of 4"
