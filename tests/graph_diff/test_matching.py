from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.errors import GraphError
from fxprune.graph_diff import diff
from fxprune.graph_diff.matching import match_graphs
from fxprune.graph_diff.read_fx import read_fx
from fxprune.tracing import trace
from tests.graph_diff.small_net import SmallNet, edited, svd_pair


def pairs(before: nn.Module, after: nn.Module) -> dict[str, str]:
    return dict(match_graphs(read_fx(trace(before)), read_fx(trace(after))).pairs)


class Calls(nn.Module):
    """Function calls only: nothing but structure tells them apart."""

    def __init__(self, steps: str) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        functions = {"r": F.relu, "s": torch.sigmoid, "t": torch.tanh, "a": lambda y: torch.add(y, x)}
        y = x
        for step in self.steps:
            y = functions[step](y)
        return y


def test_renumbered_calls_are_matched_by_their_place() -> None:
    # A sigmoid and relu inserted in front renumber relu to relu_1 and sigmoid to sigmoid_1.
    found = pairs(Calls("trs"), Calls("srtrs"))
    assert found["tanh"] == "tanh"
    assert found["relu"] == "relu_1"
    assert found["sigmoid"] == "sigmoid_1"


def test_a_removed_call_leaves_the_others_matched() -> None:
    result = diff(Calls("rtrs"), Calls("trs"))
    assert [(node.name, node.status) for node in result.changed] == [("relu", "removed")]


def test_skip_connections_tell_equal_calls_apart() -> None:
    found = pairs(Calls("ratas"), Calls("tas"))
    assert found["add_1"] == "add"
    assert "add" not in found


def test_a_renamed_model_is_matched_by_structure(net: SmallNet) -> None:
    class Renamed(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            for old, new in (("conv1", "stem"), ("bn1", "norm"), ("fc", "head")):
                setattr(self, new, getattr(self, old))
                delattr(self, old)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(self.stem(x)))
            y = F.relu(self.bn2(self.conv2(y)) + y)
            y = F.conv2d(y, self.mix)
            return self.head(y.mean((2, 3)))

    renamed = Renamed().eval()
    state = net.state_dict()
    names = {"stem": "conv1", "norm": "bn1", "head": "fc"}
    renamed.load_state_dict(
        {
            key: state[key.replace(key.split(".")[0], names.get(key.split(".")[0], key.split(".")[0]))]
            for key in renamed.state_dict()
        }
    )
    result = diff(net, renamed)
    assert {node.name: node.changes for node in result.changed} == {"stem": ("was conv1",), "head": ("was fc",)}
    assert result["stem"].weight_change == 0


def test_a_module_called_twice_is_matched_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self, between: bool) -> None:
            super().__init__()
            self.conv, self.act, self.between = nn.Conv2d(4, 4, 1), nn.ReLU(), between

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.conv(x))
            return self.act(self.conv(y.tanh() if self.between else y))

    before = Twice(False)
    after = Twice(True)
    after.load_state_dict(before.state_dict())
    result = diff(before, after)
    assert [node.name for node in result.nodes] == [
        "x", "conv (call 1)", "act (call 1)", "tanh", "conv (call 2)", "act (call 2)", "output"
    ]  # fmt: skip
    assert [(node.name, node.status) for node in result.changed] == [("tanh", "inserted")]


def test_one_operation_in_place_of_another_is_replaced(net: SmallNet) -> None:
    def other_activation(graph_module: GraphModule) -> None:
        (node,) = (n for n in graph_module.graph.nodes if n.name == "relu")
        with graph_module.graph.inserting_before(node):
            node.replace_all_uses_with(graph_module.graph.call_function(F.gelu, node.args))
        graph_module.graph.erase_node(node)

    (node,) = diff(net, edited(net, other_activation)).changed
    assert (node.name, node.status, node.changes) == ("gelu", "replaced", ("relu → gelu",))


def test_an_svd_pair_is_told_with_the_weight_it_amounts_to(net: SmallNet) -> None:
    result = diff(net, svd_pair(net, 3))
    assert {node.name: node.status for node in result.changed} == {
        "conv2": "replaced", "conv2.0": "inserted", "conv2.1": "inserted"
    }  # fmt: skip
    assert result["conv2"].into == ("conv2.0", "conv2.1")
    assert result["conv2.0"].changes == ("in place of conv2",)
    values = torch.linalg.svdvals(net.conv2.weight.detach().double().flatten(1))
    expected = (values[3:].norm() / values.norm()).item()
    assert result["conv2"].weight_change is not None
    assert abs(result["conv2"].weight_change - expected) < 1e-6


def test_order_keeps_removed_nodes_where_they_were(net: SmallNet) -> None:
    names = [node.name for node in diff(net, svd_pair(net, 3)).nodes]
    assert names[names.index("act") :][:5] == ["act", "conv2", "conv2.0", "conv2.1", "bn2"]


def test_edges_are_those_of_both_graphs(net: SmallNet) -> None:
    result = diff(net, svd_pair(net, 3))
    names = [node.name for node in result.nodes]
    edges = {(names[e.source], names[e.target]): (e.before, e.after) for e in result.edges}
    assert edges["act", "conv2"] == (True, False)
    assert edges["act", "conv2.0"] == (False, True)
    assert edges["conv2.0", "conv2.1"] == (False, True)
    assert edges["act", "add"] == (True, True)
    before = {(names[e.source], names[e.target]) for e in result.edges if e.before}
    graph = read_fx(trace(net))
    called = {node.id: node.name for node in graph.nodes}
    assert before == {(called[source], node.name) for node in graph.nodes for source in node.inputs}


def test_models_that_have_nothing_in_common_are_an_error_that_says_so() -> None:
    one, other = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(GraphError, match=r"Linear 2x3.*Conv2d 4x3x1x1.*are different networks.*what was made of it"):
        diff(one, other)
    assert diff(one, nn.Sequential(nn.Linear(3, 5), nn.Tanh())).nodes  # Another width of one network.
    assert diff(one, nn.Sequential(nn.Tanh())).nodes  # Nothing to tell networks by.
