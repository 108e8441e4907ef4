"""Streams the calibration set through a graph, layer by layer, for the dense and for the pruned model side by side.

    for layer in stream.layers(nodes):
        layer.replace(solve(layer))

The graph is cut at the layers that will be solved. Between two cuts every batch runs once through the dense model and
once through the pruned one; at a cut only the values that later nodes still read are held. Until the first layer
is replaced, and on every branch that no replaced layer feeds, the two models share their values.

A layer that is called at several places is solved at the first of them, from what the dense model shows it at all; from there
on the pruned model runs with the new weights at every call, and the dense model with a copy of the old ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.utils._pytree import tree_map_only

from fxprune.annotations import annotation
from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.dense_twin import DenseTwin
from fxprune.calibration.failures import node_failure, remedy_for, stays_as_it_is
from fxprune.calibration.lifetimes import last_uses, overwrite, spare_input
from fxprune.calibration.observers import observer_of, observers_off
from fxprune.calibration.output_error import OutputError, channel_dim
from fxprune.calibration.output_score import OutputScore
from fxprune.calibration.reading import Slot, Source, read_into
from fxprune.calibration.sampling import BatchPlace, PatchSample, sample_patches
from fxprune.calibration.targets import checked, cross_statistics, outputs_of_both, relu_aware_statistics
from fxprune.consumers import consumers
from fxprune.errors import GraphError
from fxprune.geometry import LayerGeometry
from fxprune.graph import arguments_of, device_of, input_of, module_of
from fxprune.layers.install import install
from fxprune.layers.logits import rows_cancel
from fxprune.layers.problem import layer_of
from fxprune.layers.recurrent import Reader
from fxprune.layers.shared import keeps_own_target, modules_called, weight_calls
from fxprune.layers.solve import SolvedLayer
from fxprune.layers.temperature import BothLogits, puts_out_scores
from fxprune.operations import any_reads_strides
from fxprune.options import FOLLOWS_SKIPS, Options
from fxprune.runtime.processes import gathered
from fxprune.statistics import CrossStatistics, HessianObserver, InputStatistics, Moments, Pool

Visit = Callable[[BatchPlace, BatchValues], None]  # Of a batch's place in the set, and the values at the cut.
ERROR_SHARE = 0.25  # Of the patches, where no image is held out: still thousands. Of held-out images all are taken.


@dataclass(frozen=True)
class Outcome:
    """What a whole run of the stream has measured.

    Attributes:
        source: the images.
        errors: ||y_dense - y_pruned||^2 / ||y_dense - mean||^2 of every layer that was replaced; on the held-out images if
            there are any, else on those whose statistics were taken.
        agreement: share of the held-out images on which both models' outputs have the same top class; None without such
            images, and where the output is not one (N, classes) tensor.
        kl: mean KL(dense || pruned) there, in nats, or None likewise.
        output_errors: relative error of each tensor that the model puts out there; () without such images.
        why_no_classes: why agreement and KL say nothing of this model; "" for a classifier, and without such images.
        peak_bytes: most bytes of live values held in memory between two batches, in one process.
    """

    source: Source
    errors: dict[Node, float]
    agreement: float | None
    kl: float | None
    output_errors: tuple[float, ...]
    why_no_classes: str
    peak_bytes: int


class StreamedLayer:
    """The layer at which a stream stands, with its statistics; it has to be replaced before the stream goes on.

    Attributes:
        node: its call.
        geometry: how it reads its input.
        cross: cross moment of its target with its input; None where the target is its own output.
        check: the moments of some of the images by themselves; None where there are patches in plenty, or no cross moment.
    """

    def __init__(self, stream: CalibrationStream, node: Node, geometry: LayerGeometry) -> None:
        self.node = node
        self.geometry = geometry
        self.cross: CrossStatistics | None = None
        self.check: Moments | None = None
        self.is_replaced = False
        self._stream = stream

    @property
    def inputs(self) -> InputStatistics:
        """Moments of its patches."""
        self._check()
        if self.node in self._stream.of_all_calls:
            return self._stream.of_all_calls[self.node]
        with self._stream.stopwatch.measure("statistics"):
            return observer_of(self.node).statistics()

    @property
    def relu_aware(self) -> Callable[[SolvedLayer], CrossStatistics] | None:
        """The cross term of its target once its weights are known, where a rectifier follows; else None."""
        bounds, target = consumers(self.node).rectifier, self._stream.target
        if (
            self.cross is None
            or bounds is None
            or not (target == "relu_aware" or (target == "relu6_aware" and bounds[1] < math.inf))
        ):
            return None
        cross = self.cross

        def gather(layer: SolvedLayer) -> CrossStatistics:
            self._check()
            return relu_aware_statistics(self._stream, self.node, self.geometry, cross, layer)

        return gather

    @property
    def logits(self) -> Callable[[SolvedLayer, bool], BothLogits] | None:
        """Where its output is the model's, perhaps the logits (N, classes) of a classifier: what both put out, else None.

        The function is given parameters, and whether to run on the images of `check` alone where there are no mixtures.
        """
        if self.cross is None or not puts_out_scores(self.node):
            return None

        def gather(layer: SolvedLayer, check: bool) -> BothLogits:
            self._check()
            return outputs_of_both(self._stream, self.node, self.geometry, layer, check=check)

        return gather

    def replace(self, layer: SolvedLayer) -> None:
        """Give the layer its new weights: the pruned model runs with them from here on."""
        self._check()
        self._stream.keep_dense(self.node)
        install(self._stream.graph_module, self.node, layer, self._stream.calls[self.node])
        self.is_replaced = True

    def _check(self) -> None:
        if self.is_replaced or self._stream.current is not self:
            raise GraphError(f"layer {self.node.target!r}: the calibration stream has left it")


class CalibrationStream:
    """Runs a graph from layer to layer over all calibration batches, once.

    Args:
        graph_module: the graph, with observers.
        calibration: the images, and where they run.
        target: what layers regress, as in `Options`.
        observe_dense: let observers see the dense model's values in place of the pruned model's.
        patches, least_images: those that a layer's statistics are taken from, see `sample_patches`.
        check: whether the moments of every fourth image are kept by themselves, for layers without patches to spare.
        fit: whether statistics are taken at all; if not, only held-out images run, where there are any.
        mix: whether mixtures of images run too, if the model's output is a classifier's (`StreamedLayer.logits`).
        flip: whether mirror images take part in the statistics, where layers need all the images there are.
        dense: what runs as the dense model where that has more channels than the graph; None: the graph itself.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        calibration: Calibration,
        *,
        target: str = "weights",
        observe_dense: bool = False,
        patches: int = 0,
        least_images: int | None = None,
        check: bool = False,
        fit: bool = True,
        mix: bool = False,
        flip: bool = False,
        dense: DenseTwin | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.device = device_of(graph_module)
        self.target = target
        self.observe_dense = observe_dense
        self.patches = patches
        self.least_images = least_images
        self.check = check
        self.stopwatch = calibration.stopwatch
        self.current: StreamedLayer | None = None
        self._calibration = calibration
        self._fit = fit
        self._mix = mix
        self._flip = flip
        self._interpreter = Interpreter(graph_module)
        self._nodes = list(graph_module.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._dying = last_uses(self._nodes)
        self._spare = {node: spare_input(node) for node in self._nodes}
        self._twin = dense
        self._twin_calls = {} if dense is None else dense.calls(self._nodes)
        self._twin_interpreter = None if dense is None else Interpreter(dense.graph_module)
        # Nodes whose values differ between the two models.
        self._diverged = {node for node in self._nodes if dense is not None and node.name in dense.kept}
        # On a CPU, convolutions then need not reorder every activation before and after.
        self._channels_last = self.device.type == "cpu" and not any_reads_strides(self._nodes)
        self._store = BatchStore(self.device, calibration.memory_limit)
        self._source: Source | None = None
        self._cut: Node | None = None
        self._replaced = False  # Whether the layer at the cut has new weights.
        self._errors: dict[Node, OutputError] = {}
        self.calls = weight_calls(graph_module)
        scores = [layer_of(node).weight for node in self.calls if puts_out_scores(node)]
        self._is_softmax = any(map(rows_cancel, scores))  # As it is asked of the dense weights.
        self._first_call: dict[Node, Node] = {}  # Of later calls of layers that have been replaced.
        self._dense_modules: dict[Node, nn.Module] = {}  # What these call in the dense model.
        self._readers = {n: m for n in self._nodes if isinstance(m := module_of(n), Reader)}
        self.of_all_calls: dict[Node, InputStatistics] = {}  # Of layers with several calls, by the first.
        # For an observer, what sees every fourth of the images that it sees.
        self.checks: dict[HessianObserver, HessianObserver] = {}
        self._outcome: Outcome | None = None

    @classmethod
    def of(
        cls,
        graph_module: GraphModule,
        calibration: Calibration,
        options: Options,
        *,
        fit: bool = True,
        mix: bool = False,
        dense: DenseTwin | None = None,
    ) -> CalibrationStream:
        """A stream as resolved options ask for it."""
        return cls(
            graph_module,
            calibration,
            target=options.target or "weights",
            observe_dense=options.inputs == "dense",
            patches=options.patches or 0,
            check=bool(options.shrink or options.temperature),
            fit=fit,
            mix=mix,
            flip=options.flip,
            dense=dense,
        )

    @property
    def source(self) -> Source:
        """What the loader gave; it is read now if it has not been."""
        if self._source is None:
            self._source = read_into(
                self._store,
                self._calibration,
                self.graph_module,
                device=self.device,
                last=self._channels_last,
                patches=self.patches,
                least=self.least_images,
                fit=self._fit,
                mix=self._mix and any(map(puts_out_scores, self.calls)),
                flip=self._flip,
            )
        return self._source

    def layers(
        self, nodes: Sequence[Node], gather: Callable[[Node], bool] = lambda node: True
    ) -> Iterator[StreamedLayer]:
        """Stop at each of the layers, in graph order, with its statistics; then run to the output.

        Args:
            nodes: calls of observed layers.
            gather: whether a layer's statistics are taken; a layer that is known already needs none.

        Raises:
            GraphError: the stream has been used before, or a layer was not replaced.
            CalibrationError: if the loader is empty, a batch cannot be used, or the model fails on one.
        """
        if self._cut is not None:
            raise GraphError("a calibration stream runs once; make another one")
        readers: dict[HessianObserver, list[Node]] = {}
        for node in nodes:
            readers.setdefault(observer_of(node), []).append(node)
        shared = [node for node in nodes if len(self.calls[node]) > 1]
        self.of_all_calls = self._dense_statistics(list(filter(gather, shared)))
        with observers_off(self.graph_module):
            for observer, of in readers.items():
                observer.enabled = self._fit and any(gather(node) and node not in shared for node in of)
            for node in nodes:
                geometry = annotation(node).geometry or LayerGeometry.of(layer_of(node))
                self.current = layer = StreamedLayer(self, node, geometry)
                fits_another = self.target != "weights" and not keeps_own_target(self.calls, node, geometry)
                if gather(node) and self._fit and fits_another:
                    skip = self.target in FOLLOWS_SKIPS
                    layer.cross, layer.check = cross_statistics(self, node, layer.geometry, skip=skip)
                else:
                    self.advance(node)
                yield layer
                if not layer.is_replaced:
                    raise GraphError(f"layer {node.target!r} was not replaced before the stream was to go on")
                self.current, self._replaced = None, True
                self.of_all_calls.pop(node, None)
                of = readers[observer_of(node)]
                of.remove(node)
                if not of:
                    observer_of(node).reset()  # Its Hessian is not needed any more.
            self._finish()

    @property
    def outcome(self) -> Outcome:
        """What was measured, once the iteration is over.

        Raises:
            GraphError: it is not.
        """
        if self._outcome is None:
            raise GraphError("the calibration stream has not reached the output: its outcome is not known yet")
        return self._outcome

    def advance(self, cut: Node, visit: Visit = lambda place, values: None) -> None:
        """Run all batches up to and including the dense output of `cut`; show those that are fitted to `visit`."""
        source, outputs = self.source, dict[Node, Pool]()
        previous, self._cut, first = self._cut if self._replaced else None, cut, 0
        if previous is not None:
            first = self._position[previous] + 1
            self._diverged.update(self.calls.get(previous, (previous,)), self._readers_of(previous))
            self._errors[previous] = OutputError(channel_dim(previous))
            outputs[previous] = self._errors[previous].pool()
        self._replaced = False
        between = self._nodes[first : self._position[cut]]
        outputs |= {node: self._errors[self._first_call[node]].pool() for node in between if node in self._first_call}
        for node in between:
            if not self._diverged.isdisjoint(node.all_input_nodes):
                self._diverged.add(node)
        for slot in source.slots:
            values, number = self._store.take(slot.key), slot.batch
            place = slot.place or BatchPlace(0, 0, 0)
            with torch.inference_mode(), self.stopwatch.measure("stream"):
                if previous is not None:
                    values.pruned_values[previous] = self._execute(previous, values.pruned, number)
                    self._compare(previous, values, slot, outputs[previous])
                    values.forget(self._dying[previous])
                for node in between:
                    self._run(node, values, slot)
                    if node in outputs:
                        self._compare(node, values, slot, outputs[node])
                    values.forget(self._dying[node])
                if cut.op != "output":
                    values.dense_values[cut] = self._execute(cut, values.dense, number, dense=True)
            # A score is of images that nothing was fitted to.
            if not slot.mixed and slot.held_out == (cut.op == "output"):
                with torch.inference_mode(), self.stopwatch.measure("statistics"):
                    visit(place, values)
            # Of the layer's inputs only the pruned one is still needed, to run the layer once it is replaced, unless
            # statistics are taken from the dense one: `revisit` may then ask for it.
            for dead in self._dying[cut]:
                if dead in values.pruned_values and not self.observe_dense:
                    values.dense_values.pop(dead, None)
            self._store.put(slot.key, values)
        for pool in outputs.values():
            self.gather(pool)

    def revisit(self, visit: Visit) -> None:
        """Show every fitted batch's values at the cut again: its dense output, its pruned inputs, all that later nodes read."""
        for slot in self.source.slots:
            if slot.place is not None:
                with torch.inference_mode(), self.stopwatch.measure("statistics"):
                    visit(slot.place, self._store.look(slot.key))

    def revisit_mixtures(self, visit: Callable[[BatchValues], None]) -> None:
        """Show the values of mixtures of images at the cut, as `revisit` shows those of images."""
        for slot in self.source.slots:
            if slot.mixed:
                with torch.inference_mode(), self.stopwatch.measure("statistics"):
                    visit(self._store.look(slot.key))

    def gather(self, pool: Pool) -> None:
        """Hand on what waits in a pool that visits have filled."""
        with torch.inference_mode(), self.stopwatch.measure("statistics"):
            pool.flush()

    def observed(self, values: BatchValues, source: Node) -> Tensor:
        """The input from which a layer's statistics are taken."""
        x: Tensor = self.wanted(values, source) if self.observe_dense else values.pruned(source)
        return x

    def wanted(self, values: BatchValues, node: Node) -> Any:
        """The value of a node in the dense model, of those channels that the pruned model has."""
        value = values.dense(node)
        if self._twin is None:
            return value
        is_observer = isinstance(module_of(node), HessianObserver)  # Which the dense model has not.
        return self._twin.wanted((input_of(node) if is_observer else node).name, value)

    def sample(self, geometry: LayerGeometry, x: Tensor, place: BatchPlace, *, share: float = 1.0) -> PatchSample:
        """What the statistics of a layer with input x are taken from in a batch, or a share of so many patches."""
        return sample_patches(
            geometry,
            x,
            place,
            images=self.source.with_copies,
            patches=self.patches,
            share=share,
            least=self.least_images,
            kept=self.source.step,
        )

    def _finish(self) -> None:
        """Run all batches to the graph's output, and compare the two models there."""
        score, result = OutputScore(self._is_softmax), self._nodes[-1].args[0]

        def compare(_: BatchPlace, values: BatchValues) -> None:
            score.update(map_arg(result, values.dense), map_arg(result, values.pruned))

        self.advance(self._nodes[-1], compare)
        of_all = OutputError.summed([*self._errors.values()])
        errors = {node: error.relative for node, error in zip(self._errors, of_all, strict=True)}
        score = score.summed()
        self._outcome = Outcome(
            self.source,
            errors,
            score.share,
            score.kl,
            score.relative_errors,
            score.why_no_classes,
            max(gathered(self._store.peak_bytes)),
        )

    def _run(self, node: Node, values: BatchValues, slot: Slot) -> None:
        """Run a node that is not a cut for the dense model and, where it differs, the pruned model."""
        if node.op == "placeholder":
            pass  # Given with the batch.
        elif isinstance(observer := module_of(node), HessianObserver):
            source = input_of(node)
            values.dense_values[node] = values.dense(source)
            if node in self._diverged:
                values.pruned_values[node] = values.pruned(source)
            try:
                if slot.place is not None and observer.enabled:
                    with self.stopwatch.measure("statistics"):
                        x = self.observed(values, source)
                        sample = self.sample(observer.geometry, x, slot.place)
                        seen = observer.geometry.batched(sample.input(x))
                        observer.observe(seen, sample.geometry)
                        if observer in self.checks and sample.is_whole and len(seen) == slot.place.images:
                            self.checks[observer].observe(checked(seen, slot.place), sample.geometry)
            except (RuntimeError, IndexError, ValueError):
                for layer in node.users:  # What the layer itself says about such an input is of more use.
                    self._execute(layer, values.dense, slot.batch, dense=True)
                raise
        else:
            values.dense_values[node] = self._execute(node, values.dense, slot.batch, dense=True)
            if node in self._diverged:
                values.pruned_values[node] = self._execute(node, values.pruned, slot.batch)

    def _compare(self, cut: Node, values: BatchValues, slot: Slot, outputs: Pool) -> None:
        """Add to the error of a layer that has been replaced: all of a batch, or a share of the patches it was solved on."""
        if slot.mixed or (self.source.held_out and not slot.held_out):
            return
        geometry, of_both = observer_of(cut).geometry, (self.wanted(values, cut), values.pruned(cut))
        if slot.place is not None:
            sample = self.sample(geometry, values.pruned(input_of(cut)), slot.place, share=ERROR_SHARE)
            geometry, of_both = sample.geometry, (sample.output(of_both[0]), sample.output(of_both[1]))
        outputs.put(geometry, *map(geometry.batched, of_both))

    def keep_dense(self, node: Node) -> None:
        """Keep what later calls of a layer compute in the dense model, before it is replaced."""
        for call in self.calls[node][1:]:
            self._first_call[call] = node
            self._dense_modules[call] = copy.deepcopy(module_of(call))  # type: ignore[assignment]
        for reader in self._readers_of(node):
            if reader not in self._dense_modules:
                self._dense_modules[reader] = copy.deepcopy(self._readers[reader])

    def _readers_of(self, node: Node) -> list[Node]:
        """The nodes after a layer that read its weight beside it."""
        called = set(modules_called(self.calls.get(node, (node,))))
        after = self._position[node]
        return [n for n, m in self._readers.items() if self._position[n] > after and not called.isdisjoint(m.reads)]

    def _dense_statistics(self, nodes: Sequence[Node]) -> dict[Node, InputStatistics]:
        """The moments of the inputs of layers, at all their calls in the dense model."""
        if not nodes or not self._fit:
            return {}
        self._calibration.hold()
        stream = CalibrationStream(
            self.graph_module,
            self._calibration,
            observe_dense=self._twin is not None,
            patches=self.patches,
            least_images=self.least_images,
            flip=self._flip,
            dense=self._twin,
        )
        with _gathered(stream, nodes) as statistics:
            return statistics

    def _execute(self, node: Node, value_of: Callable[[Node], Any], number: int, *, dense: bool = False) -> Any:
        """Run one node on the values of its inputs; a failure names the node, the batch and the shapes."""
        spare = self._spare[node]
        if spare is not None and (spare in self._diverged) == (node in self._diverged):  # Else both models read it.
            if (value := overwrite(node, spare, value_of)) is not None:
                return value
        run, target, arguments = getattr(self._interpreter, node.op), node.target, partial(arguments_of, node, value_of)
        if dense and node in self._twin_calls:
            twin = self._twin_calls[node]
            run, target = getattr(self._twin_interpreter, node.op), twin.node.target
            arguments = partial(twin.arguments, value_of)
        elif dense and node in self._dense_modules:
            run = self._run_dense_module(self._dense_modules[node])
        try:
            try:
                return run(target, *arguments())
            except RuntimeError:
                if not self._channels_last:
                    raise
                # As view needs.
                return run(target, *tree_map_only(Tensor, torch.Tensor.contiguous, arguments()))
        except Exception as error:  # A forward may raise what it likes.
            if stays_as_it_is(error):
                raise
            inputs = {source: value_of(source) for source in node.all_input_nodes}
            images = [value for source, value in inputs.items() if _is_given(source)]
            remedy = remedy_for(self.graph_module, images, error)
            raise node_failure(error, node, inputs.values(), f"calibration batch {number}", remedy) from error

    @staticmethod
    def _run_dense_module(module: nn.Module) -> Callable[..., Any]:
        """A module in the form in which the interpreter calls one."""
        return lambda _, args, kwargs: module(*args, **kwargs)


def _is_given(node: Node) -> bool:
    """Whether a node's value comes with the batch, perhaps past an observer."""
    return node.op == "placeholder" or (isinstance(module_of(node), HessianObserver) and _is_given(input_of(node)))


@contextmanager
def dense_statistics(
    graph_module: GraphModule, calibration: Calibration, options: Options, nodes: Sequence[Node]
) -> Iterator[dict[Node, InputStatistics]]:
    """Inside, the moments of the given layers' inputs in the dense model; every observer is empty before and after.

    Args:
        graph_module: with observers.
        calibration: the images; held-out ones are left out.
        options: resolved.
        nodes: calls of observed layers.
    """
    if not nodes:
        yield {}
        return
    with _gathered(CalibrationStream.of(graph_module, calibration, options), nodes) as statistics:
        yield statistics


@contextmanager
def checked_dense_statistics(
    graph_module: GraphModule, calibration: Calibration, options: Options, nodes: Sequence[Node]
) -> Iterator[tuple[dict[Node, InputStatistics], dict[Node, InputStatistics]]]:
    """The same, and those of every fourth image alone, for layers that take all patches there are (`layers.shrinkage`)."""
    if not nodes:
        yield {}, {}
        return
    stream = CalibrationStream.of(graph_module, calibration, options)
    stream.checks = {observer: HessianObserver(observer.geometry) for observer in map(observer_of, nodes)}
    with _gathered(stream, nodes) as statistics:
        checks = {node: stream.checks[observer_of(node)] for node in nodes}
        some = {node: check.statistics() for node, check in checks.items() if check.has_seen()}
        yield statistics, {node: own for node, own in some.items() if own.count < statistics[node].count}


@contextmanager
def _gathered(stream: CalibrationStream, nodes: Sequence[Node]) -> Iterator[dict[Node, InputStatistics]]:
    """`dense_statistics` with a stream that has not run yet."""
    observers = {observer_of(node) for node in nodes}
    try:
        with observers_off(stream.graph_module):
            for observer in observers:
                observer.reset()
                observer.enabled = True
            stream.advance(stream._nodes[-1])
        yield {node: observer_of(node).statistics() for node in nodes}
    finally:
        for observer in observers:
            observer.reset()
