"""Recurrent layers as torch's own.

ONNX stores the gates of an LSTM as input, output, forget, cell and those of a GRU as update, reset, new; torch as input,
forget, cell, output and as reset, update, new.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.export.weight_uses import GATES
from fxprune.onnx_import.graph import torch_dtype
from fxprune.onnx_import.names import layer_names
from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Array, Known

_CLASSES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@operator("LSTM", "GRU", "RNN")
def recurrent(op: Operation) -> list[Any]:
    """Forwards, backwards or both, with the usual activations and sequences of one length."""
    x = op.tensor()
    if op.attribute("layout", 0):
        op.fail("it has the batch first (layout=1)")
    direction = op.attribute("direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    _require_usual(op, x, directions)
    w, r, b = op.constant(1), op.constant(2), op.constant(3)
    stored = op.inputs[1]
    if w is None or r is None or not isinstance(stored, Known):
        op.fail("it has no weights")
    hidden = r.shape[2]
    module = _CLASSES[op.type](
        w.shape[2], hidden, bias=b is not None, bidirectional=directions == 2, device="meta", dtype=torch_dtype(w.dtype)
    )
    weights: dict[str, tuple[Array, str, bool]] = {}
    for i, suffix in enumerate(("", "_reverse")[:directions]):
        parts = {"weight_ih_l0": w[i], "weight_hh_l0": r[i]}
        if b is not None:
            parts["bias_ih_l0"], parts["bias_hh_l0"] = np.split(b[i], 2)
        for name, array in parts.items():
            weights[f"{name}{suffix}"] = (_in_torchs_order(op.type, array), f"{op.node.output} {name}{suffix}", True)
    if direction == "reverse":
        x = op.call(torch.flip, x, [0])
    states = _states(op)
    key = (op.type, direction, *op.node.input[1:4])
    output, last = op.graph.module(key, layer_names(op.node, stored.name), module, weights, x, *states)
    whole = op.method("permute", op.method("unflatten", output, -1, (directions, hidden)), 0, 2, 1, 3)
    if direction == "reverse":
        whole = op.call(torch.flip, whole, [0])
    return [whole, *(last if isinstance(last, list) else [last])]


def _require_usual(op: Operation, x: Activation, directions: int) -> None:
    given = [name.decode() for name in op.attribute("activations", [])]
    if given and given != _ACTIVATIONS[op.type] * directions:
        op.fail(f"it has the activations {', '.join(given)}; torch has {', '.join(_ACTIVATIONS[op.type])} only")
    if op.attribute("clip", 0.0) or op.attribute("input_forget", 0) or op.input(7) is not None:
        op.fail("it has clip, input_forget or peepholes, which torch's does not have")
    if op.type == "GRU" and not op.attribute("linear_before_reset", 0):
        op.fail("it resets before the product (linear_before_reset=0); torch's resets after it")
    lengths = op.input(4)
    if lengths is not None and (not isinstance(lengths, Known) or (lengths.array != x.shape[0]).any()):
        op.fail("it is told the lengths of its sequences, which may differ")


def _in_torchs_order(kind: str, array: Array) -> Array:
    gates = np.split(array, len(GATES[kind]))
    return np.concatenate([gates[i] for i in GATES[kind]])


def _states(op: Operation) -> tuple[Any, ...]:
    """The states to begin with; none where they are zero."""
    given = [op.input(i) for i in (5, 6)[: 2 if op.type == "LSTM" else 1]]
    if all(value is None or (isinstance(value, Known) and not value.array.any()) for value in given):
        return ()
    if any(value is None or isinstance(value, Known) for value in given):
        op.fail("it begins with a constant state that is not zero")
    states = tuple(op.graph.tensor(value) for value in given if value is not None)
    return (states if op.type == "LSTM" else states[0],)
