"""Layers have the names that people know them by."""

from __future__ import annotations

import pytest
from onnx import helper

from fxprune.onnx_import.names import Names, input_name, layer_names


@pytest.mark.parametrize(
    ("node", "op", "weight", "bias", "name"),
    [
        ("node_conv2d", "Conv", "layer1.0.conv1.weight", "", "layer1.0.conv1"),
        ("p2o.Conv.3", "Conv", "conv2d_0.w_0", "", "conv2d_0"),
        ("/layer1/layer1.0/conv1/Conv", "Conv", "onnx::Conv_497", "onnx::Conv_498", "layer1.0.conv1"),
        ("/features/features.0/features.0.0/Conv", "Conv", "onnx::Conv_3", "", "features.0.0"),
        ("/layers.0/attn/qkv/MatMul", "MatMul", "onnx::MatMul_7", "layers.0.attn.qkv.bias", "layers.0.attn.qkv"),
        ("node_MatMul_17", "MatMul", "val_31", "encoder.mlp.0.bias", "encoder.mlp.0"),
        ("node_MatMul_17", "MatMul", "val_31", "", "node_MatMul_17"),
        ("model/block1/Conv2D", "Conv", "model/block1/Conv2D/ReadVariableOp:0", "", "model.block1"),
        ("Conv_12", "Conv", "487", "", "Conv_12"),
        ("", "Conv", "conv1_w", "", "conv1_w"),
        ("", "Conv", "487", "", "conv"),
    ],
)
def test_layer_names(node: str, op: str, weight: str, bias: str, name: str) -> None:
    assert layer_names(helper.make_node(op, [], [], name=node), weight, bias)[0] == name


def test_names_are_given_once_and_not_inside_layers() -> None:
    names = Names(frozenset(["y"]))
    names.reserve(["block.attention.out.weight"])
    assert names.layer(["conv", "op"], "Conv2d") == "conv"
    assert names.layer(["conv", "second", "op"], "Conv2d") == "second"
    assert names.layer(["conv", "op"], "Conv2d") == "op"
    assert names.layer(["conv", "op"], "Conv2d") == "conv_2"
    assert names.layer(["block.attention", "op"], "Linear") == "block.attention.linear"
    assert names.layer(["conv.inner", "op"], "Linear") == "conv_inner"
    assert names.layer(["graph", "op"], "Linear") == "graph_"
    assert names.weight("y") == "y_2"
    assert names.weight("onnx::Add_5") == "onnx_Add_5"


@pytest.mark.parametrize(
    ("name", "found"),
    [("x", "x"), ("input.1", "input_1"), ("x:0", "x_0"), ("0", "input_0"), ("class", "class_"), ("::", "input_3")],
)
def test_input_names(name: str, found: str) -> None:
    assert input_name(name, 3) == found
    assert found.isidentifier()
