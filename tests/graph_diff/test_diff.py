from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse

import fxprune
from fxprune.annotations import annotate, annotate_graph
from fxprune.compiled import CompiledModule
from fxprune.errors import ExportError, GraphError
from fxprune.graph_diff import GraphDiff, diff
from fxprune.passes.base import Change
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.tracing import trace
from tests.graph_diff.small_net import SmallNet, edited, fill


def statuses(result: GraphDiff) -> dict[str, str]:
    return {node.name: node.status for node in result.nodes}


def test_the_diff_of_a_model_with_itself_is_empty(net: SmallNet, compiled: CompiledModule, images: Tensor) -> None:
    for model in (net, trace(net), compiled):
        result = diff(model, model, example_inputs=images)
        assert result.is_empty
        assert result.changed == ()
        assert result.costs_before == result.costs_after
        assert set(statuses(result).values()) == {"unchanged"}
        assert all(edge.before and edge.after for edge in result.edges)
        assert "are the same: no difference in" in " ".join(str(result).split())
        assert len(str(result).splitlines()) <= 2


def test_a_copy_of_a_model_does_not_differ(net: SmallNet) -> None:
    other = SmallNet().eval()
    other.load_state_dict(net.state_dict())
    assert diff(net, other).is_empty


def test_one_weight_that_differs_is_found(net: SmallNet) -> None:
    other = SmallNet().eval()
    other.load_state_dict(net.state_dict())
    other.conv2.weight.data[1, 2, 0, 1] += 0.5
    result = diff(net, other)
    assert [node.name for node in result.changed] == ["conv2"]
    assert result["conv2"].changes == ("weight changed",)
    expected = 0.5 / net.conv2.weight.detach().double().norm().item()
    assert result["conv2"].weight_change == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "tensor", "phrase"),
    [
        ("conv2", "conv2.bias", "bias changed by"),
        ("bn2", "bn2.running_mean", "running_mean changed by"),
        ("mix", "mix", "weight changed"),
        ("fc", "fc.bias", "bias changed by"),
    ],
)
def test_every_stored_tensor_is_compared(net: SmallNet, name: str, tensor: str, phrase: str) -> None:
    other = SmallNet().eval()
    other.load_state_dict(net.state_dict())
    other.state_dict()[tensor].view(-1)[0] += 1
    (node,) = diff(net, other).changed
    assert node.name == name
    assert node.changes[0].startswith(phrase)


def test_a_compiled_model_is_told_apart_layer_by_layer(net: SmallNet, compiled: CompiledModule, images: Tensor) -> None:
    result = diff(net, compiled, example_inputs=images)
    assert {name: status for name, status in statuses(result).items() if status != "unchanged"} == {
        "conv1": "changed", "bn1": "removed", "conv2": "changed", "bn2": "removed", "fc": "changed",
        "mix": "changed",
    }  # fmt: skip
    assert result["bn1"].into == ("conv1",)
    assert result["bn1"].changes == ("folded into conv1",)
    assert result["conv2"].folded == ("bn2",)
    assert result["conv2"].changes == ("pruned to 2:4", "bn2 folded in")
    assert result["conv2"].after is not None
    assert result["conv2"].after.pattern == "2:4"
    assert result["conv2"].after.sparsity == 0.5
    assert result["conv2"].output_error == compiled.report["conv2"].relative_error
    assert result["conv1"].reason == "not pruned: 3 input channels are not a multiple of 4"
    assert "in place" in " ".join(result.notes)


def test_the_weight_change_is_taken_against_the_folded_weight(net: SmallNet, compiled: CompiledModule) -> None:
    folded = trace(net)
    FoldBatchNorm()(folded)
    result = diff(net, compiled)
    for name in ("conv1", "conv2"):
        dense = folded.get_submodule(name).weight.detach().double()
        pruned = compiled.get_submodule(name).weight.detach().double()
        expected = ((pruned - dense).norm() / dense.norm()).item()
        assert result[name].weight_change == pytest.approx(expected, rel=1e-6)
    assert result["conv1"].weight_change == 0  # folded, and otherwise as it was
    assert result["conv1"].changes == ("bn1 folded in",)


def test_folding_by_someone_else_is_recognised_by_the_weights(net: SmallNet) -> None:
    result = diff(net, fuse(net))
    assert result["bn1"].into == ("conv1",)
    assert result["bn2"].into == ("conv2",)
    assert result["conv2"].weight_change == 0
    assert result["conv2"].changes == ("bn2 folded in",)


def test_a_batchnorm_that_was_dropped_is_not_called_folded(net: SmallNet) -> None:
    def drop(graph_module: torch.fx.GraphModule) -> None:
        (node,) = (n for n in graph_module.graph.nodes if n.name == "bn2")
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)

    result = diff(net, edited(net, drop))
    assert [(node.name, node.status, node.into) for node in result.changed] == [("bn2", "removed", ())]


def test_costs_are_those_of_a_count_by_hand(net: SmallNet, compiled: CompiledModule, images: Tensor) -> None:
    result = diff(net, compiled, example_inputs=images)
    before, after = result.costs_before, result.costs_after
    pixels = 6 * 6
    assert before.parameters == sum(p.numel() for p in net.parameters())
    assert before.nonzeros == sum(int((p != 0).sum()) for p in net.parameters())
    assert before.macs == (8 * 3 * 9 + 8 * 8 * 9 + 4 * 8) * pixels + 4 * 5
    assert after.macs == before.macs
    assert after.nonzero_macs == (8 * 3 * 9 + 4 * 8 * 9 + 4 * 4) * pixels + 10
    assert after.parameters == sum(p.numel() for p in compiled.parameters())
    assert (before.nodes, after.nodes) == (12, 10)  # parameters are no nodes


def test_without_inputs_macs_are_not_known(net: SmallNet, compiled: CompiledModule) -> None:
    result = diff(net, compiled)
    assert result.costs_before.macs is None
    assert "MACs" not in str(result)


def test_nothing_is_modified(net: SmallNet, compiled: CompiledModule, images: Tensor) -> None:
    net.train()
    graph_module = trace(net)
    graph_module.train()
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    metas = [dict(node.meta) for node in graph_module.graph.nodes]
    diff(net, graph_module, example_inputs=images)
    diff(graph_module, compiled, example_inputs=images)
    assert net.training
    assert graph_module.training
    assert graph_module.bn1.training
    assert [dict(node.meta) for node in graph_module.graph.nodes] == metas
    assert all(torch.equal(before[name], tensor) for name, tensor in graph_module.state_dict().items())


def test_arguments_dtype_and_shapes_are_told(images: Tensor) -> None:
    before = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    after = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 1))
    result = diff(before, after, example_inputs=images)
    assert result["0"].changes[0] == "stride (1, 1) → (2, 2)"
    assert "weight 8×3×3×3 → 6×3×3×3" in result["0"].changes
    assert "output 8×8×6×6 → 8×6×3×3" in result["0"].changes
    assert result["0"].weight_change is None


def test_a_changed_dtype_is_told_with_the_rounding(net: SmallNet) -> None:
    result = diff(net, SmallNet().eval().half())
    assert "float32 → float16" in result["conv1"].changes
    other = SmallNet().eval()
    other.load_state_dict(net.state_dict())
    change = diff(net, other.half())["conv1"].weight_change
    assert change is not None
    assert 0 < change < 1e-3


def test_a_wider_graph_of_inputs_is_told(net: SmallNet) -> None:
    def cut_skip(graph_module: torch.fx.GraphModule) -> None:
        (add,) = (n for n in graph_module.graph.nodes if n.name == "add")
        add.args = (add.args[0], add.args[0])

    (node,) = diff(net, edited(net, cut_skip)).changed
    assert node.name == "add"
    assert node.changes == ("reads bn2, bn2 instead of bn2, act",)


def test_nan_is_not_hidden(net: SmallNet) -> None:
    other = SmallNet().eval()
    other.load_state_dict(net.state_dict())
    other.fc.weight.data[0, 0] = float("nan")
    node = diff(net, other)["fc"]
    assert node.weight_change is None
    assert "weight holds NaN or infinite values" in node.changes


def permuted(net: SmallNet, *, recorded: bool) -> GraphModule:
    """conv1's eight channels in another order up to the skip connection, where they are put back."""
    places = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    graph_module = trace(net)
    graph_module.conv1.weight.data = graph_module.conv1.weight.data[places]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(graph_module.bn1, name).data = getattr(graph_module.bn1, name).data[places]
    graph_module.conv2.weight.data = graph_module.conv2.weight.data[:, places] * 1.25
    annotate_graph(graph_module, changes=(Change("Permute", "permuted", "conv2"),))
    if recorded:
        orders = {"conv1": (None, places), "bn1": (None, places), "conv2": (places, None)}
        for node in graph_module.graph.nodes:
            if node.name in orders:
                annotate(node, order=orders[node.name])
    return graph_module


def test_permuted_channels_are_put_in_order_where_it_is_recorded(net: SmallNet) -> None:
    result = diff(net, permuted(net, recorded=True))
    assert {node.name: node.changes for node in result.changed} == {
        "conv1": ("channels permuted",),
        "bn1": ("channels permuted",),
        "conv2": ("weight changed", "channels permuted"),
    }
    assert result["conv1"].weight_change == 0
    assert result["conv2"].weight_change == pytest.approx(0.25, rel=1e-6)


def test_permuted_channels_are_not_taken_for_changed_weights(net: SmallNet) -> None:
    other = permuted(net, recorded=False)
    result = diff(net, other)
    assert {node.name: node.changes for node in result.changed} == {
        "conv1": ("the same weights in another order",),
        "bn1": ("weight, bias, running_mean, running_var in another order",),
        "conv2": ("weight changed",),
    }
    assert result["conv1"].weight_change is None
    assert result["conv2"].weight_change is None
    assert any("not recorded how" in note for note in result.notes)
    assert diff(other, other).is_empty
    assert diff(other, other).notes == ()


def test_modules_that_cannot_be_traced_stay_leaves_on_both_sides() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Conv2d(4, 4, 3), Branching()).eval()
    compiled = fxprune.compile(model, [torch.randn(4, 4, 6, 6)], method="magnitude", exclude=("1",), progress=False)
    result = diff(model, compiled)
    assert statuses(result) == {"input_1": "unchanged", "0": "changed", "1": "unchanged", "output": "unchanged"}


def test_json_round_trip(net: SmallNet, compiled: CompiledModule, images: Tensor, tmp_path: Path) -> None:
    result = diff(net, compiled, example_inputs=images)
    result.to_json(tmp_path / "diff.json")
    text = (tmp_path / "diff.json").read_text(encoding="utf-8")
    read = json.loads(text)
    assert read == json.loads(json.dumps(result.to_dict()))
    assert [node["name"] for node in read["nodes"]] == [node.name for node in result.nodes]
    (conv2,) = (node for node in read["nodes"] if node["name"] == "conv2")
    assert conv2["after"]["weight_shape"] == [8, 8, 3, 3]
    assert conv2["weight_change"] == result["conv2"].weight_change
    assert read["costs"]["after"]["nonzeros"] == result.costs_after.nonzeros
    assert "picture" not in conv2


def test_an_unknown_name_is_answered_with_the_known_ones(net: SmallNet) -> None:
    with pytest.raises(KeyError, match="no node named 'conv9'; there are: x, conv1"):
        diff(net, net)["conv9"]


def test_a_model_against_a_file_is_refused(net: SmallNet) -> None:
    with pytest.raises(GraphError, match=r"cannot compare SmallNet, a model, with a\.onnx, a file"):
        diff(net, "a.onnx")


def test_inputs_that_do_not_fit_are_refused(net: SmallNet) -> None:
    with pytest.raises(GraphError, match=r"SmallNet cannot run on example_inputs of shape \(1, 5, 6, 6\)"):
        diff(net, net, example_inputs=torch.zeros(1, 5, 6, 6))
    with pytest.raises(ExportError, match="example_inputs must give a tensor"):
        diff(net, net, example_inputs="images")


def test_fill_gives_a_network_that_does_something(net: SmallNet, images: Tensor) -> None:
    fill(net)
    assert net(images).std() > 0.01


def test_a_graph_module_of_another_library_has_no_meta(net: SmallNet) -> None:
    graph_module = trace(net)
    del graph_module.meta
    assert diff(graph_module, graph_module).is_empty


def test_a_model_that_was_compressed_before_is_said_to_be(
    net: SmallNet, compiled: CompiledModule, images: Tensor
) -> None:
    again = fxprune.compile(compiled, [images], "1:4", method="magnitude", progress=False)
    assert any("is itself pruned to 2:4" in note for note in diff(compiled, again).notes)
    assert not any("is itself" in note for note in diff(net, compiled).notes)


def test_a_layer_that_is_called_twice_is_compared_at_both_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(self.conv(x)) + y

    before, after = Twice(), Twice()
    after.conv.weight.data = before.conv.weight.data * 2
    after.conv.bias.data = before.conv.bias.data.clone()
    result = diff(before, after, example_inputs=(torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)))
    assert [(node.name, node.weight_change) for node in result.changed] == [
        ("conv (call 1)", 1.0), ("conv (call 2)", 1.0)
    ]  # fmt: skip
    assert result.costs_after.parameters == 20
