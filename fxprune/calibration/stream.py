"""Streams the calibration set through a graph, node by node, for the dense and for the pruned model side by side.

The graph is cut at the layers that will be solved. Between two cuts every batch runs once through the dense model and
once through the pruned one; at a cut only the values that later nodes still read are held. Until the first layer
is replaced, and on every branch that no replaced layer feeds, the two models share their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.failures import node_failure, remedy_for, stays_as_it_is
from fxprune.calibration.lifetimes import last_uses, overwrite, reads_strides, spare_input
from fxprune.calibration.observers import observer_of
from fxprune.calibration.output_error import OutputAgreement, OutputError, channel_dim
from fxprune.calibration.reading import read_into
from fxprune.calibration.sampling import PatchSample, sample_patches
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.geometry import LayerGeometry
from fxprune.graph import arguments_of, device_of, input_of, module_of
from fxprune.options import Options
from fxprune.statistics import HessianObserver, Pool

ERROR_SHARE = 0.25  # Of the patches: thousands, whatever the layer.


class CalibrationStream:
    """Runs a graph from cut to cut over all calibration batches.

    Args:
        graph_module: the graph; its layers are replaced by the caller between two cuts.
        loader: iterable of batches in any form (`fxprune.calibration.batches`), read once.
        device: where the graph runs.
        stopwatch: takes the time of "stream" and "statistics".
        memory_limit: bytes of live values to hold; see `BatchStore`.
        observe_dense: let observers see the dense model's values in place of the pruned model's.
        patches, least_images: those that a layer's statistics are taken from, see `sample_patches`.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        loader: Iterable[Any],
        *,
        device: torch.device,
        stopwatch: Stopwatch,
        memory_limit: int | None = None,
        observe_dense: bool = False,
        patches: int = 0,
        least_images: int | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.device = device
        self.observe_dense = observe_dense
        self.patches = patches
        self.least_images = least_images
        self.stopwatch = stopwatch
        self.errors: dict[Node, OutputError] = {}
        self._interpreter = Interpreter(graph_module)
        self._nodes = list(graph_module.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._dying = last_uses(self._nodes)
        self._spare = {node: spare_input(node) for node in self._nodes}
        self._diverged: set[Node] = set()  # Nodes whose values differ between the two models.
        # On a CPU, convolutions then need not reorder every activation before and after.
        self._channels_last = device.type == "cpu" and not any(reads_strides(node) for node in self._nodes)
        self._loader = loader
        self._store = BatchStore(device, memory_limit)
        self._cut: Node | None = None

    @classmethod
    def by(
        cls, options: Options, graph_module: GraphModule, loader: Iterable[Any], stopwatch: Stopwatch | None = None
    ) -> CalibrationStream:
        """A stream as resolved options ask for it, on the device of the graph's parameters."""
        device = device_of(graph_module)
        return cls(
            graph_module,
            loader,
            device=device,
            stopwatch=stopwatch or Stopwatch(device),
            memory_limit=options.memory_limit,
            observe_dense=options.inputs == "dense",
            patches=options.patches or 0,
        )

    def run_to(self, cut: Node, visit: Callable[[int, BatchValues], None] = lambda number, values: None) -> None:
        """Run all batches up to and including the dense output of `cut`, and show each one's values to `visit`.

        The layer at the cut before this one counts as replaced from now on.

        Raises:
            CalibrationError: if the loader is empty, a batch cannot be used, or the model fails on one.
        """
        self.read()
        previous, self._cut, first = self._cut, cut, 0
        if previous is not None:
            first = self._position[previous] + 1
            self._diverged.add(previous)
            error = self.errors[previous] = OutputError(channel_dim(previous))
            outputs = Pool(lambda _, dense, pruned: error.update(dense, pruned))
        between = self._nodes[first : self._position[cut]]
        for node in between:
            if not self._diverged.isdisjoint(node.all_input_nodes):
                self._diverged.add(node)
        for number in range(len(self._store)):
            values = self._store.take(number)
            with torch.inference_mode(), self.stopwatch.measure("stream"):
                if previous is not None:
                    self._run_replaced(previous, values, number, outputs)
                for node in between:
                    self._run(node, values, number)
                if cut.op != "output":
                    values.dense_values[cut] = self._execute(cut, values.dense, number)
            with torch.inference_mode(), self.stopwatch.measure("statistics"):
                visit(number, values)
            # Of the layer's inputs only the pruned one is still needed, to run the layer once it is replaced.
            for dead in self._dying[cut]:
                if dead in values.pruned_values:
                    values.dense_values.pop(dead, None)
            self._store.put(number, values)
        if previous is not None:
            self.gather(outputs)

    def revisit(self, visit: Callable[[int, BatchValues], None]) -> None:
        """Show every batch's values at the cut again: its dense output, its pruned inputs, all that later nodes read."""
        for number in range(len(self._store)):
            with torch.inference_mode(), self.stopwatch.measure("statistics"):
                visit(number, self._store.look(number))

    def gather(self, pool: Pool) -> None:
        """Hand on what waits in a pool that visits have filled."""
        with torch.inference_mode(), self.stopwatch.measure("statistics"):
            pool.flush()

    def observed(self, values: BatchValues, source: Node) -> Tensor:
        """The input from which a layer's statistics are taken."""
        x: Tensor = values.dense(source) if self.observe_dense else values.pruned(source)
        return x

    def sample(self, geometry: LayerGeometry, x: Tensor, number: int, *, share: float = 1.0) -> PatchSample:
        """What the statistics of a layer with input x are taken from in batch `number`, or a share of so many patches."""
        return sample_patches(
            geometry,
            x,
            number=number,
            images=self.source.images,
            patches=self.patches,
            share=share,
            least=self.least_images,
            kept=self.source.step,
        )

    def finish(self) -> OutputAgreement:
        """Run all batches to the graph's output, and compare the two models there."""
        agreement, result = OutputAgreement(), self._nodes[-1].args[0]

        def compare(_: int, values: BatchValues) -> None:
            if isinstance(result, Node):
                agreement.update(values.dense(result), values.pruned(result))

        self.run_to(self._nodes[-1], compare)
        return agreement

    @property
    def peak_bytes(self) -> int:
        """Most bytes of live values held in memory between two batches."""
        return self._store.peak_bytes

    def read(self) -> None:
        """Read the loader, where that has not been done yet, and keep the images that a layer needs."""
        if not len(self._store):
            self.source = read_into(
                self._store,
                self._loader,
                self.graph_module,
                device=self.device,
                last=self._channels_last,
                patches=self.patches,
                least=self.least_images,
            )

    def _run(self, node: Node, values: BatchValues, number: int) -> None:
        """Run a node that is not a cut for the dense model and, where it differs, the pruned model."""
        if node.op == "placeholder":
            pass  # Given with the batch.
        elif isinstance(observer := module_of(node), HessianObserver):
            source = input_of(node)
            values.dense_values[node] = values.dense(source)
            if node in self._diverged:
                values.pruned_values[node] = values.pruned(source)
            try:
                if observer.enabled:
                    with self.stopwatch.measure("statistics"):
                        x = self.observed(values, source)
                        sample = self.sample(observer.geometry, x, number)
                        observer.observe(sample.input(x), sample.geometry)
            except (RuntimeError, IndexError, ValueError):
                for layer in node.users:  # What the layer itself says about such an input is of more use.
                    self._execute(layer, values.dense, number)
                raise
        else:
            values.dense_values[node] = self._execute(node, values.dense, number)
            if node in self._diverged:
                values.pruned_values[node] = self._execute(node, values.pruned, number)
        values.forget(self._dying[node])

    def _run_replaced(self, cut: Node, values: BatchValues, number: int, outputs: Pool) -> None:
        """Run a layer that has been replaced; a share of the patches it was solved on will tell its error."""
        values.pruned_values[cut] = self._execute(cut, values.pruned, number)
        sample = self.sample(observer_of(cut).geometry, values.pruned(input_of(cut)), number, share=ERROR_SHARE)
        geometry, of_both = sample.geometry, (values.dense(cut), values.pruned(cut))
        outputs.put(geometry, *(geometry.batched(sample.output(value)) for value in of_both))
        values.forget(self._dying[cut])

    def _execute(self, node: Node, value_of: Callable[[Node], Any], number: int) -> Any:
        """Run one node on the values of its inputs; a failure names the node, the batch and the shapes."""
        spare = self._spare[node]
        if spare is not None and (spare in self._diverged) == (node in self._diverged):  # Else both models read it.
            if (value := overwrite(node, spare, value_of)) is not None:
                return value
        run = getattr(self._interpreter, node.op)
        try:
            try:
                return run(node.target, *arguments_of(node, value_of))
            except RuntimeError:
                if not self._channels_last:
                    raise
                contiguous = tree_map_only(
                    Tensor, torch.Tensor.contiguous, arguments_of(node, value_of)
                )  # As view needs.
                return run(node.target, *contiguous)
        except Exception as error:  # A forward may raise what it likes.
            if stays_as_it_is(error):
                raise
            inputs = {source: value_of(source) for source in node.all_input_nodes}
            images = [value for source, value in inputs.items() if _is_given(source)]
            remedy = remedy_for(self.graph_module, images, error)
            raise node_failure(error, node, inputs.values(), f"calibration batch {number}", remedy) from error


def _is_given(node: Node) -> bool:
    """Whether a node's value comes with the batch, perhaps past an observer."""
    return node.op == "placeholder" or (isinstance(module_of(node), HessianObserver) and _is_given(input_of(node)))
