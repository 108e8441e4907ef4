"""Recurrent layers whose matrices are linear layers of their own, and the modules that such a layer is unrolled into.

`LSTM`, `GRU` and `RNN` compute what torch's classes of these names do, by the same functions (an ONNX file has the same
operator), but hold each matrix as an nn.Linear with its bias, named as torch names the matrix: `lstm.weight_ih_l0`. So all that
knows linear layers knows these: rows of a report, recorded zeros, training on, saving.

While layers are solved, a recurrent layer is unrolled into plain products (`fxprune.passes.UnrollRecurrent`). One layer in one
direction, such as h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), becomes

    a = W_ih x + b_ih        a linear layer on all time steps at once
    s = States(a)            h_0, ..., h_{T-1}: what W_hh reads
    b = W_hh s + b_hh        a linear layer on all time steps at once
    y = Outputs(a, b)        h_1, ..., h_T

so that the statistics of W_hh are those of the states that it really reads. `Outputs` runs the recurrence with the weights that
the layer has by then; from b it takes only that it comes after W_hh. Both run torch's own function, on the products a with the
identity in place of W_ih.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]  # (h,), of an LSTM (h, c); each (layers * directions, N, size).
_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu,
}  # fmt: skip


class Recurrent(nn.Module):
    """What an nn.LSTM, nn.GRU or nn.RNN computes, with a linear layer for each of its matrices.

    Args:
        module: of torch; its parameters become this one's.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.num_layers, self.hidden_size = module.mode, module.num_layers, module.hidden_size
        self.proj_size, self.dropout = module.proj_size, module.dropout
        self.bidirectional, self.batch_first = module.bidirectional, module.batch_first
        for suffix in self.suffixes:
            for kind in ("ih", "hh", "hr")[: 3 if self.proj_size else 2]:
                bias = getattr(module, f"bias_{kind}_{suffix}", None)
                self.add_module(f"weight_{kind}_{suffix}", linear(getattr(module, f"weight_{kind}_{suffix}"), bias))
        self.train(module.training)

    @property
    def suffixes(self) -> list[str]:
        """Of the names of its matrices: one for each layer and direction, "l0", "l0_reverse", "l1", ..."""
        ways = ("", "_reverse")[: 2 if self.bidirectional else 1]
        return [f"l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    def matrix(self, kind: str, suffix: str) -> nn.Linear:
        """The linear layer of a matrix: "ih", "hh" or, with a projection, "hr"."""
        found = self.get_submodule(f"weight_{kind}_{suffix}")
        assert isinstance(found, nn.Linear)
        return found

    def extra_repr(self) -> str:
        """Its settings."""
        names = ("hidden_size", "num_layers", "proj_size", "bidirectional", "batch_first")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """(T, N, C), (N, T, C) with `batch_first`, or (T, C): as torch's classes."""
        packed = input if isinstance(input, PackedSequence) else None
        x: Tensor = input.data if packed is not None else input  # type: ignore[assignment]
        single = packed is None and x.dim() == 2
        x = x.unsqueeze(0 if self.batch_first else 1) if single else x
        images = int(packed.batch_sizes[0]) if packed is not None else x.shape[0 if self.batch_first else 1]
        state = self._state(x, images, hx, single=single)
        biases, weights = self._weights()
        settings = (biases, self.num_layers, self.dropout, self.training, self.bidirectional)
        if packed is None:
            y, *state_after = _FUNCTIONS[self.mode](x, self._given(state), weights, *settings, self.batch_first)
        else:
            state = _chosen(state, packed.sorted_indices)
            y, *state_after = _FUNCTIONS[self.mode](x, packed.batch_sizes, self._given(state), weights, *settings)
            state_after = list(_chosen(tuple(state_after), packed.unsorted_indices))
        if single:
            y, state_after = y.squeeze(0 if self.batch_first else 1), [s.squeeze(1) for s in state_after]
        result = y if packed is None else PackedSequence(y, *packed[1:])
        return result, tuple(state_after) if self.mode == "LSTM" else state_after[0]

    def _weights(self) -> tuple[bool, list[Tensor]]:
        """Whether there are biases, and all weights in torch's order; where one layer has a bias, all get one."""
        layers = [[self.matrix(kind, suffix) for kind in ("ih", "hh")] for suffix in self.suffixes]
        biases = any(layer.bias is not None for of in layers for layer in of)
        found: list[Tensor] = []
        for suffix, of in zip(self.suffixes, layers, strict=True):
            found += [layer.weight for layer in of]
            found += [bias_of(layer) for layer in of] if biases else []
            found += [self.matrix("hr", suffix).weight] if self.proj_size else []
        return biases, found

    def _state(self, x: Tensor, images: int, hx: Any, *, single: bool) -> State:
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return tuple(x.new_zeros(len(self.suffixes), images, size) for size in sizes)
        given: State = tuple(hx) if self.mode == "LSTM" else (hx,)
        return tuple(s.unsqueeze(1) for s in given) if single else given

    def _given(self, state: State) -> Any:
        return state if self.mode == "LSTM" else state[0]


class LSTM(Recurrent):
    """An nn.LSTM."""


class GRU(Recurrent):
    """An nn.GRU."""


class RNN(Recurrent):
    """An nn.RNN."""


class Reader(nn.Module):
    """A module that reads weights of layers which the graph calls elsewhere; they are none of its own children.

    Attributes:
        reads: those layers.
    """

    reads: tuple[nn.Module, ...] = ()


class Scan(Reader):
    """One layer of a recurrent layer in one direction, run from its input products.

    Args:
        layer: all of it.
        place: which of its layers and directions.
    """

    def __init__(self, layer: Recurrent, place: int) -> None:
        super().__init__()
        self.mode, self.batch_first, self.place = layer.mode, layer.batch_first, place
        suffix = layer.suffixes[place]
        self.reverse = suffix.endswith("_reverse")
        kinds = ("hh", "hr")[: 2 if layer.proj_size else 1]
        self.reads = tuple(layer.matrix(kind, suffix) for kind in kinds)

    @property
    def _recurrent(self) -> nn.Linear:
        return self.reads[0]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Its settings."""
        return f"mode={self.mode}, place={self.place}, reverse={self.reverse}, batch_first={self.batch_first}"

    def in_order(self, x: Tensor) -> Tensor:
        """Products or states as the layer has them -> (T, N, channels) in the order in which it goes through them."""
        x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if self.batch_first else x
        return x.flip(0) if self.reverse else x

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        x = x.flip(0) if self.reverse else x
        return x.squeeze(1) if like.dim() == 2 else x.transpose(0, 1) if self.batch_first else x

    def start(self, products: Tensor, hx: Any) -> State:
        """The state before the first step, (1, N, size) each, for products (T, N, gates)."""
        hidden = self._recurrent
        gates = {"LSTM": 4, "GRU": 3}.get(self.mode, 1)
        sizes = [hidden.in_features, hidden.out_features // gates][: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return tuple(products.new_zeros(1, products.shape[1], size) for size in sizes)
        given: State = tuple(hx) if self.mode == "LSTM" else (hx,)
        own = [s[self.place : self.place + 1] for s in given]
        return tuple(s.unsqueeze(1) if s.dim() == 2 else s for s in own)

    def scanned(self, products: Tensor, start: State) -> tuple[Tensor, ...]:
        """Outputs (T, N, size) and the last state, for products (T, N, gates) and a state."""
        weights: Any = [layer.weight for layer in self.reads]
        return self._run(products, start, weights)

    def _run(self, products: Tensor, start: State, weights: list[Tensor]) -> tuple[Tensor, ...]:
        hidden, *projection = weights
        gates = products.shape[-1]
        identity = torch.eye(gates, dtype=products.dtype, device=products.device)
        biases = [products.new_zeros(gates), bias_of(self._recurrent)]
        state: Any = start if self.mode == "LSTM" else start[0]
        flat = [identity, hidden, *biases, *projection]
        return _FUNCTIONS[self.mode](products, state, flat, True, 1, 0.0, False, False, False)


class States(Scan):
    """What the recurrent matrix reads at each time step: the outputs of the step before, in the layout of the products."""

    def forward(self, products: Tensor, hx: Any = None) -> Tensor:
        """(T, N, gates), (N, T, gates) or (T, gates) -> the same with the layer's outputs as channels."""
        in_order = self.in_order(products)
        start = self.start(in_order, hx)
        y = self.scanned(in_order, start)[0]
        return self.back(torch.cat([start[0], y[:-1]]), products)


class Unprojected(Scan):
    """What the projection of an LSTM reads at each time step, in the layout of the products.

    An LSTM with h_t = W_hr u_t is one without projection, with outputs u_t and the recurrent matrix W_hh W_hr; what h_0 adds
    belongs to the first step's products.
    """

    def forward(self, products: Tensor, after: Tensor, hx: Any = None) -> Tensor:
        """As `States`; `after` is what the recurrent matrix gives, which has to come first."""
        in_order = self.in_order(products)
        h, c = self.start(in_order, hx)
        first = in_order[:1] + h @ self._recurrent.weight.T
        in_order = torch.cat([first, in_order[1:]])
        weight = self._recurrent.weight @ self.reads[1].weight  # type: ignore[operator]
        return self.back(self._run(in_order, (torch.zeros_like(c), c), [weight])[0], products)


class Outputs(Reader):
    """One layer of a recurrent layer, both directions together, from their products.

    Args:
        scans: one for each direction.
    """

    def __init__(self, *scans: Scan) -> None:
        super().__init__()
        self.scans = nn.ModuleList(scans)
        self.reads = tuple(layer for scan in scans for layer in scan.reads)

    def forward(self, hx: Any, *products: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """For each direction its products, and what has to come first -> outputs; the last state, (directions, N, size)."""
        found, outputs = [], []
        for scan, (given, *_) in zip(self.scans, products, strict=True):
            assert isinstance(scan, Scan)
            in_order = scan.in_order(given)
            y, *state = scan.scanned(in_order, scan.start(in_order, hx))
            outputs.append(scan.back(y, given))
            found.append(state)
        return (torch.cat(outputs, -1), *(torch.cat(of) for of in zip(*found, strict=True)))


class Collect(nn.Module):
    """What a recurrent layer returns, from the results of its layers.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, *layers: tuple[Tensor, ...]) -> Any:
        """Outputs, and the last state of all layers."""
        y = layers[-1][0]
        states = [torch.cat(of) for of in zip(*(layer[1:] for layer in layers), strict=True)]
        states = [s.squeeze(1) for s in states] if y.dim() == 2 else states
        return y, tuple(states) if self.mode == "LSTM" else states[0]


def has_place_for_bias(graph_module: nn.Module, layer: str) -> bool:
    """Whether a layer of this name may be given a bias; the projection of an LSTM has none."""
    owner, _, name = layer.rpartition(".")
    return not (name.startswith("weight_hr") and isinstance(graph_module.get_submodule(owner), Recurrent))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer in eval mode of parameters that there are; tensors that are none become copies' parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
    return layer.eval()


def bias_of(layer: nn.Linear) -> Tensor:
    """A layer's bias, or zeros."""
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _chosen(state: State, images: Tensor | None) -> State:
    return state if images is None else tuple(s.index_select(1, images) for s in state)
