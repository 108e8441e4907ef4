"""nn.LSTM, nn.GRU and nn.RNN in the normal form: the same layers, each matrix an nn.Linear; cells, written out.

A cell is called once for each time step, from Python: it becomes two linear layers that are called at several places, and what
its gates do.
"""

from __future__ import annotations

from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.graph import has_hooks
from fxprune.intake.names import matches
from fxprune.intake.origins import Origin
from fxprune.layers.recurrent import GRU, LSTM, RNN, Recurrent, linear

_CLASSES: dict[type[nn.Module], type[Recurrent]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
_FUNCTIONS: dict[Any, Any] = {
    torch.lstm: nn.LSTM, torch.gru: nn.GRU, torch.rnn_tanh: nn.RNN, torch.rnn_relu: nn.RNN,
}  # fmt: skip
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def with_linear_layers(graph_module: GraphModule) -> dict[str, Origin]:
    """Replace every recurrent layer that a graph calls, in place, and say where the new parameters come from.

    What they compute stays exactly the same. Subclasses, layers with hooks and computed weights stay as they are.
    """
    _call_modules(graph_module)
    found: dict[str, Origin] = {}
    made: dict[nn.Module, Recurrent] = {}
    for path in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module")):
        module = graph_module.get_submodule(path)
        if not isinstance(module, nn.RNNBase) or not _is_replaceable(module, tuple(_CLASSES)):
            continue
        if module not in made:
            made[module] = _CLASSES[type(module)](module)
        graph_module.set_submodule(path, made[module])
        found |= _origins(path, module)
    return found


def _call_modules(graph_module: GraphModule) -> None:
    """Replace torch.lstm and its kin on a module's parameters, as torch.export writes them, by calls of that module."""
    for node in list(graph_module.graph.nodes):
        kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if kind is None or len(node.args) != 9 or node.kwargs or not all(map(_is_item, node.users)):
            continue
        x, hx, weights, biases, layers, _, training, bidirectional, batch_first = node.args
        read = [w for w in weights if isinstance(w, Node) and w.op == "get_attr" and len(w.users) == 1]
        owner = str(read[0].target).rpartition(".")[0] if read else ""
        if training or len(read) != len(weights) or not owner:
            continue
        given = [attrgetter(str(w.target))(graph_module) for w in read]
        gates = {"LSTM": 4, "GRU": 3}.get(kind.__name__, 1)
        hidden = given[1].shape[0] // gates
        more: dict[str, Any] = {"nonlinearity": node.target.__name__.removeprefix("rnn_")} if kind is nn.RNN else {}
        if given[1].shape[1] != hidden:
            more["proj_size"] = given[1].shape[1]
        more |= {"num_layers": layers, "bias": biases, "batch_first": batch_first, "bidirectional": bidirectional}
        module = kind(given[0].shape[1], hidden, device="meta", **more).eval()
        names = list(vars(module)["_flat_weights_names"])
        held = {name for name, _ in graph_module.get_submodule(owner).named_parameters()}
        if [f"{owner}.{name}" for name in names] != [str(w.target) for w in read] or held != set(names):
            continue  # They belong to no module of their own.
        for name, value in zip(names, given, strict=True):
            setattr(module, name, value)
        graph_module.set_submodule(owner, module)
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(owner, (x, tuple(hx) if kind is nn.LSTM else hx))
        call.meta = dict(node.meta)
        for user in list(node.users):
            if kind is nn.LSTM and user.args[1]:
                with graph_module.graph.inserting_before(user):
                    user.args = (graph_module.graph.call_function(getitem, (call, 1)), user.args[1] - 1)
            else:
                user.args = (call, user.args[1])
        for unread in (node, *read):
            graph_module.graph.erase_node(unread)


def _is_item(node: Node) -> bool:
    return node.target is getitem and isinstance(node.args[1], int) and node.args[1] >= 0


def cells_are_there(model: nn.Module, exclude: tuple[str, ...] = ()) -> bool:
    """Whether a model has cells that `write_out_cells` would replace."""
    return any(_is_replaceable(m, _CELLS) and not matches(path, exclude) for path, m in model.named_modules() if path)


def write_out_cells(model: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, Origin]:
    """Replace every nn.LSTMCell, nn.GRUCell and nn.RNNCell inside a model, in place, and say where the weights come from."""
    found: dict[str, Origin] = {}
    made: dict[nn.Module, Cell] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(module, nn.RNNCellBase) and _is_replaceable(module, _CELLS):
            if not matches(path, exclude):
                made[module] = made.get(module) or Cell(module)
                model.set_submodule(path, made[module])
                found |= _origins(path, module)
    return found


class Cell(nn.Module):
    """Computes what a recurrent cell computes; it is traced, and never part of a graph itself."""

    def __init__(self, module: nn.RNNCellBase) -> None:
        super().__init__()
        self.kind, self.hidden_size = type(module).__name__, module.hidden_size
        self.nonlinearity = torch.tanh if getattr(module, "nonlinearity", "tanh") == "tanh" else torch.relu
        self.weight_ih = linear(module.weight_ih, module.bias_ih)
        self.weight_hh = linear(module.weight_hh, module.bias_hh)
        self.train(module.training)

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(N, C) or (C,): as torch's classes."""
        if hx is None:
            zeros = torch.zeros_like(input[..., :1]).expand(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.kind == "LSTMCell" else zeros
        state: Any = hx
        h, c = (state[0], state[1]) if self.kind == "LSTMCell" else (state, state)
        a, b = self.weight_ih(input), self.weight_hh(h)
        if self.kind == "RNNCell":
            after: Tensor = self.nonlinearity(a + b)
            return after
        if self.kind == "GRUCell":
            (r, z, n), (of_r, of_z, of_n) = (self._gates(x, 3) for x in (a, b))
            z = torch.sigmoid(z + of_z)
            n = torch.tanh(n + torch.sigmoid(r + of_r) * of_n)
            mixed: Tensor = (1 - z) * n + z * h
            return mixed
        i, f, g, o = self._gates(a + b, 4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def _gates(self, x: Tensor, count: int) -> list[Tensor]:
        chunks = x.chunk(count, -1)
        return [chunks[i] for i in range(count)]


def _is_replaceable(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    if type(module) not in kinds or has_hooks(module):
        return False
    names = [name for name in vars(module).get("_flat_weights_names", ()) if name] or ["weight_ih", "weight_hh"]
    return all(isinstance(module._parameters.get(name), nn.Parameter) for name in names)


def _origins(path: str, module: nn.Module) -> dict[str, Origin]:
    """weight_ih_l0.weight was weight_ih_l0, weight_ih_l0.bias was bias_ih_l0."""
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter is not None:
            layer, which = (name, "weight") if name.startswith("weight") else (name.replace("bias", "weight"), "bias")
            found[f"{path}.{layer}.{which}"] = Origin((f"{path}.{name}",))
    return found
