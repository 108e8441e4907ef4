"""Streams the calibration set through a graph, node by node, for the dense and for the pruned model side by side.

The graph is cut at the layers that will be solved. Between two cuts every batch runs once through the dense model and
once through the pruned one; at a cut only the values that later nodes still read are held. Until the first layer
is replaced, and on every branch that no replaced layer feeds, the two models share their values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxprune.errors import CalibrationError
from fxprune.graph import module_of
from fxprune.statistics import HessianObserver


@dataclass
class BatchValues:
    """The live values of one batch: of the dense model, and of the pruned model where they differ."""

    dense_values: dict[Node, Any] = field(default_factory=dict)
    pruned_values: dict[Node, Any] = field(default_factory=dict)

    def dense(self, node: Node) -> Any:
        """The value of a node in the dense model."""
        return self.dense_values[node]

    def pruned(self, node: Node) -> Any:
        """The value of a node in the pruned model."""
        return self.pruned_values[node] if node in self.pruned_values else self.dense_values[node]


@dataclass
class OutputError:
    """||y_dense - y_pruned||^2 / ||y_dense - mean||^2 of one layer, the mean per output channel."""

    channel_dim: int
    squared_error: float = 0.0
    squares: float = 0.0
    sums: Tensor | None = None
    count: int = 0

    def update(self, dense: Tensor, pruned: Tensor) -> None:
        """Add one batch of layer outputs."""
        dense = dense.movedim(self.channel_dim, 0).flatten(1)
        pruned = pruned.movedim(self.channel_dim, 0).flatten(1)
        self.squared_error += float((dense - pruned).square().sum(dtype=torch.float64))
        self.squares += float(dense.square().sum(dtype=torch.float64))
        sums = dense.sum(1, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += dense.shape[1]

    @property
    def relative(self) -> float:
        """The ratio; 0 if the output is constant and reproduced."""
        if self.sums is None:
            return 0.0
        variance = self.squares - float(self.sums.square().sum()) / self.count
        return self.squared_error / variance if variance > 0 else float(self.squared_error > 0)


@dataclass
class OutputAgreement:
    """Top-1 agreement and KL(dense || pruned) of the model's outputs, if the output is one (N, classes) tensor."""

    same: int = 0
    divergence: float = 0.0
    count: int = 0

    def update(self, values: BatchValues) -> None:
        """Add one batch at the graph's output node."""
        output = next(reversed(next(iter(values.dense_values)).graph.nodes)).args[0]
        if (
            not isinstance(output, Node)
            or not isinstance(values.dense(output), Tensor)
            or values.dense(output).dim() != 2
        ):
            return
        dense, pruned = values.dense(output).double(), values.pruned(output).double()
        self.same += int((dense.argmax(1) == pruned.argmax(1)).sum())
        log_dense, log_pruned = dense.log_softmax(1), pruned.log_softmax(1)
        self.divergence += float((log_dense.exp() * (log_dense - log_pruned)).sum())
        self.count += len(dense)

    @property
    def agreement(self) -> float | None:
        """Percent, or None."""
        return 100 * self.same / self.count if self.count else None

    @property
    def kl(self) -> float | None:
        """Nats a sample, or None."""
        return self.divergence / self.count if self.count else None


class CalibrationStream:
    """Runs a graph from cut to cut over all calibration batches.

    Args:
        graph_module: the graph; its layers are replaced by the caller between two cuts.
        loader: iterable of batches, read once: tensors, or tuples, lists or dicts whose first item is the input.
        device: where the graph runs.
        observe_dense: let observers see the dense model's values in place of the pruned model's.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        loader: Iterable[Any],
        *,
        device: torch.device,
        observe_dense: bool = False,
    ) -> None:
        self.graph_module = graph_module
        self.device = device
        self.observe_dense = observe_dense
        self.images = 0
        self.peak_bytes = 0
        self.seconds = 0.0
        self.errors: dict[Node, OutputError] = {}
        self._interpreter = Interpreter(graph_module)
        self._nodes = list(graph_module.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._dying = _last_uses(self._nodes)
        self._diverged: set[Node] = set()
        self._source: Iterable[Any] | None = loader
        self._batches: list[BatchValues] = []
        self._cut: Node | None = None

    def run_to(self, cut: Node, visit: Callable[[BatchValues], None]) -> None:
        """Run all batches up to and including the dense output of `cut`, and show each one's values to `visit`.

        The layer at the cut before this one counts as replaced from now on.
        """
        previous, self._cut = self._cut, cut
        if previous is not None:
            self._diverged.add(previous)
            self.errors[previous] = OutputError(-1 if _is_linear(previous) else 1)
        first = 0 if previous is None else self._position[previous] + 1
        between = self._nodes[first : self._position[cut]]
        self._diverged.update(self._reached(between))
        live = 0
        for number, values in enumerate(self._stored_or_read()):
            with self._explaining(number, values) as at:
                if previous is not None:
                    at.node = previous
                    self._run_replaced(previous, values)
                for node in between:
                    at.node = node
                    self._run(node, values)
                at.node = cut
                if cut.op != "output":
                    self._run_dense(cut, values)
            visit(values)
            live += _bytes(values)
        self.peak_bytes = max(self.peak_bytes, live)

    def finish(self, visit: Callable[[BatchValues], None]) -> None:
        """Run all batches to the graph's output; `visit` reads the values of the output's arguments."""
        self.run_to(self._nodes[-1], visit)

    def _stored_or_read(self) -> Iterator[BatchValues]:
        """The batches of the last cut; at the first cut, those of the loader."""
        started = time.perf_counter()
        if self._source is None:
            yield from self._batches
        else:
            source, self._source = self._source, None
            for number, batch in enumerate(source):
                values = BatchValues(dict(self._inputs(number, batch)))
                self._batches.append(values)
                yield values
            if not self._batches:
                raise CalibrationError(
                    "the calibration loader gave no batches; pass a non-empty iterable (a generator can be read only once)"
                )
        self.seconds += time.perf_counter() - started

    def _inputs(self, number: int, batch: Any) -> Iterator[tuple[Node, Any]]:
        """Assign one batch of the loader to the graph's placeholders."""
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        if isinstance(batch, dict) and placeholders[0].target in batch:
            given = {node: batch[node.target] for node in placeholders if node.target in batch}
        else:
            given = {placeholders[0]: first_item(batch, number)}
        for node in placeholders:
            if node in given:
                yield node, self._checked(given[node], number)
            elif node.args:
                yield node, node.args[0]
            else:
                raise CalibrationError(
                    f"the model has an input {node.target!r} that calibration batch {number} does not give; "
                    "yield dicts with the names of the model's inputs as keys"
                )
        first = next(iter(given.values()))
        self.images += len(first)

    def _checked(self, x: Any, number: int) -> Tensor:
        """The batch on the device, or an error if it cannot be calibrated on."""
        if not isinstance(x, Tensor):
            raise CalibrationError(f"calibration batch {number} is a {type(x).__name__}; expected a tensor (or a tuple, "
                                   "list or dict whose first item is one)")  # fmt: skip
        if x.dim() == 0 or x.shape[0] == 0:
            raise CalibrationError(f"calibration batch {number} is empty: shape {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise CalibrationError(f"calibration batch {number} holds NaN or infinite values; check its preprocessing")
        return x.to(self.device)

    def _reached(self, nodes: list[Node]) -> Iterator[Node]:
        """Those of the nodes whose values now differ between the two models."""
        for node in nodes:
            if node in self._diverged or any(source in self._diverged for source in node.all_input_nodes):
                self._diverged.add(node)
                yield node

    def _run(self, node: Node, values: BatchValues) -> None:
        """Run a node that is not a cut for the dense model and, where it differs, the pruned model."""
        if node.op == "placeholder":
            pass  # Given with the batch.
        elif isinstance(observer := module_of(node), HessianObserver):
            source = node.all_input_nodes[0]
            observer(values.dense(source) if self.observe_dense else values.pruned(source))
            values.dense_values[node] = values.dense(source)
            if node in self._diverged:
                values.pruned_values[node] = values.pruned(source)
        else:
            values.dense_values[node] = self._execute(node, values.dense)
            if node in self._diverged:
                values.pruned_values[node] = self._execute(node, values.pruned)
        for dead in self._dying[node]:
            values.dense_values.pop(dead, None)
            values.pruned_values.pop(dead, None)

    def _run_dense(self, cut: Node, values: BatchValues) -> None:
        """The dense output of a layer that is about to be replaced; its pruned input stays for later."""
        values.dense_values[cut] = self._execute(cut, values.dense)
        for dead in self._dying[cut]:
            if dead in values.pruned_values:
                values.dense_values.pop(dead, None)

    def _run_replaced(self, cut: Node, values: BatchValues) -> None:
        """The output of a layer that has been replaced, and its error."""
        values.pruned_values[cut] = self._execute(cut, values.pruned)
        self.errors[cut].update(values.dense(cut), values.pruned(cut))
        for dead in self._dying[cut]:
            values.dense_values.pop(dead, None)
            values.pruned_values.pop(dead, None)

    def _execute(self, node: Node, value_of: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def _explaining(self, number: int, values: BatchValues) -> _Explaining:
        return _Explaining(number, values)


class _Explaining:
    """Turns an error inside the model into one that names the node, the batch and the shapes."""

    def __init__(self, number: int, values: BatchValues) -> None:
        self.number, self.values = number, values
        self.node: Node | None = None

    def __enter__(self) -> _Explaining:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, (RuntimeError, TypeError, ValueError, IndexError)) or self.node is None:
            return
        sources = self.node.all_input_nodes
        shapes = [getattr(self.values.dense_values.get(source), "shape", None) for source in sources]
        raise CalibrationError(
            f"the model failed on calibration batch {self.number} at node {self.node.name!r} ({self.node.target}), "
            f"input shapes {[tuple(s) for s in shapes if s is not None]}: {error}"
        ) from error


def first_item(batch: Any, number: int = 0) -> Any:
    """The input in a batch: the batch itself, or the first item of a tuple, list or dict."""
    while isinstance(batch, (tuple, list, dict)):
        if not batch:
            raise CalibrationError(f"calibration batch {number} is an empty {type(batch).__name__}")
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def _is_linear(node: Node) -> bool:
    return isinstance(module_of(node), torch.nn.Linear)


def _last_uses(nodes: list[Node]) -> dict[Node, list[Node]]:
    """For each node, the nodes whose values are not read after it."""
    dying: dict[Node, list[Node]] = {node: [] for node in nodes}
    seen: set[Node] = set()
    for node in reversed(nodes):
        for source in [node, *node.all_input_nodes]:
            if source not in seen:
                seen.add(source)
                dying[node].append(source)
    return dying


def _bytes(values: BatchValues) -> int:
    """Bytes held by the distinct tensors of a batch."""
    tensors: dict[int, int] = {}
    for held in (values.dense_values, values.pruned_values):
        map_arg_tensors(list(held.values()), tensors)
    return sum(tensors.values())


def map_arg_tensors(value: Any, sizes: dict[int, int]) -> None:
    """Collect the storage sizes of all activation tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.nn.Parameter):
        return
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        map_arg_tensors(list(value.values()), sizes)
    elif isinstance(value, (list, tuple)):
        for item in value:
            map_arg_tensors(item, sizes)
