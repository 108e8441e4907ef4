"""The calibration stream against the plain way: run the whole model again for every layer, with hooks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.annotations import annotation
from fxprune.calibration.batch_store import BatchValues
from fxprune.calibration.stream import CalibrationStream
from fxprune.errors import CalibrationError, GraphError
from fxprune.geometry import LayerGeometry
from fxprune.graph import input_of, module_of
from fxprune.layers.problem import layer_of
from fxprune.layers.solve import SolvedLayer, SolvedPart
from fxprune.passes import InsertObservers
from fxprune.recipe import Recipe
from fxprune.tracing import trace
from tests.pipelines import calibration


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = conv(3, 4), conv(4, 8, stride=2), conv(8, 8, groups=2), nn.ReLU()
        self.d = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.c(self.relu(self.b(self.relu(self.a(x))))))
        return self.d(x.mean((2, 3)))


class Residual(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.e = conv(4, 4), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.b(x)
        y = x + y
        y = self.e(F.relu(y)) + y
        return F.relu(y)


class Concatenation(Chain):
    """DenseNet-like: every layer reads all values before it."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.d = conv(4, 4), conv(8, 4), conv(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(x))], 1)
        x = torch.cat([x, self.c(F.relu(x))], 1)
        return self.d(x)


class SharedInput(Chain):
    """Inception-like: three branches read one value, two of them in the same geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.d = conv(4, 4), conv(4, 8), conv(4, 4, 1)
        self.e = conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.e(torch.cat([self.b(x), self.c(input=x), self.d(x)], 1))


class ManyValued(Chain):
    """Nodes whose value is a tuple (chunk, max with indices), and a value read again much later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(4, 4), conv(4, 4)
        self.d = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.a(x)
        left, right = early.chunk(2, 1)
        left = F.relu(self.b(left))
        right = self.c(right) * left
        pooled, _ = torch.cat([left, right], 1).flatten(2).max(2)
        return self.d(pooled) + early.mean((1, 2, 3))[:, None]


class TwoInputs(Chain):
    """A second input, a buffer, and an output that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 4), conv(4, 4)
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.a(image)) + self.b(other) + self.shift
        return {"features": y, "result": self.c(y)}


class Attention(Chain):
    """Linear layers on (N, L, C), all three reading one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        weights = (self.b(x) @ self.c(x).transpose(1, 2)).softmax(-1)
        return x + weights @ self.d(x)


MODELS = [Chain, Residual, Concatenation, SharedInput, ManyValued, Attention, TwoInputs]
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in ((3, 3, 9, 7), (1, 3, 6, 6), (2, 3, 9, 7))
]


def batches_for(model: nn.Module) -> list[dict[str, Tensor]]:
    """Batches of several sizes, as keyword arguments of forward."""
    if isinstance(model, TwoInputs):
        return [{"image": x, "other": x.flip(0) - 1} for x in BATCHES]
    return [{"x": x} for x in BATCHES]


def observed(model: nn.Module) -> tuple[GraphModule, list[Node]]:
    graph_module = trace(model)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    return graph_module, [n for n in graph_module.graph.nodes if annotation(n).geometry is not None]


def stream_of(graph_module: GraphModule, batches: object, **options: object) -> CalibrationStream:
    return CalibrationStream(graph_module, calibration(batches), **options)


def inputs_and_outputs(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """What a layer of a plain module reads and gives, by a hook on a run of the whole model for each batch."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.append((args[0] if args else kwargs["input"], output))

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


def run_through(stream: CalibrationStream, layers: Sequence[Node]) -> None:
    """Iterate to the output, every layer replaced by itself."""
    for layer in stream.layers(layers):
        layer.replace(as_it_is(layer.node))


def run_on(
    stream: CalibrationStream, node: Node, visit: Callable[[int, BatchValues], None] = lambda number, values: None
) -> None:
    """Run to a node as the iteration does, the layer before it replaced."""
    stream._replaced = stream._cut is not None
    stream.advance(node, visit)


def as_it_is(node: Node) -> SolvedLayer:
    """A layer's own weights in place of a solution."""
    module = layer_of(node)
    return SolvedLayer((SolvedPart(LayerGeometry.of(module), module.weight.data, module.bias),))


def damage(model: nn.Module, name: str) -> None:
    """What a solver does to a layer, roughly."""
    module = model.get_submodule(name)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(len(name))
        module.weight.mul_(torch.rand(module.weight.shape, generator=generator, dtype=torch.float64) > 0.4)


@pytest.mark.parametrize("observe_dense", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_sees_what_a_run_of_the_whole_model_shows(kind, observe_dense):
    model = kind().double().eval()
    batches = batches_for(model)
    dense, pruned = copy.deepcopy(model), copy.deepcopy(model)
    graph_module, layers = observed(model)
    assert len(layers) >= 3
    stream = stream_of(graph_module, iter(batches), observe_dense=observe_dense)
    for layer in stream.layers(layers):
        name, geometry, source = str(layer.node.target), layer.geometry, input_of(layer.node)
        seen: list[tuple[Tensor, ...]] = []
        stream.revisit(lambda _, v, s=source, n=layer.node, seen=seen: seen.append((v.pruned(s), v.dense(n))))
        reads = inputs_and_outputs(pruned, name, batches)
        gives = inputs_and_outputs(dense, name, batches)
        for (x, y), (expected_x, _), (_, expected_y) in zip(seen, reads, gives, strict=True):
            torch.testing.assert_close(x, expected_x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
        patches = torch.cat([geometry.patches(x) for x, _ in (gives if observe_dense else reads)], 1)
        statistics = layer.inputs
        torch.testing.assert_close(statistics.gram, patches.mT @ patches, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(statistics.total, patches.sum(1), rtol=1e-10, atol=1e-10)
        assert statistics.count == patches.shape[1]
        layer.replace(as_it_is(layer.node))
        damage(graph_module, name)
        damage(pruned, name)

    for layer in layers:
        gives = inputs_and_outputs(dense, str(layer.target), batches)
        got = inputs_and_outputs(pruned, str(layer.target), batches)
        last = isinstance(module_of(layer), nn.Linear)
        y, z = (torch.cat([o.movedim(-1 if last else 1, 0).flatten(1) for _, o in run], 1) for run in (gives, got))
        expected = (y - z).square().sum() / (y - y.mean(1, keepdim=True)).square().sum()
        assert stream.outcome.errors[layer] == pytest.approx(float(expected), rel=1e-9)
        assert expected > 1e-3
    assert stream.outcome.agreement is None  # No image was held out: there is no score.
    assert stream.source.images == sum(len(next(iter(batch.values()))) for batch in batches)


@pytest.mark.parametrize("kind", MODELS)
def test_only_values_that_are_read_later_are_held(kind):
    """At each cut, for the dense and for the pruned model; before the first cut there is but one model."""
    model = kind().double().eval()
    graph_module, layers = observed(model)
    stream = stream_of(graph_module, batches_for(model))
    nodes = list(graph_module.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    diverged: set[Node] = set()
    peak = 0

    def run_to(node: Node) -> list[BatchValues]:
        held: list[BatchValues] = []
        run_on(stream, node, lambda _, values: held.append(values))
        return held

    def size(values: BatchValues) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.tensors()}.values())

    for layer in layers:
        for node in nodes[: position[layer]]:
            if node in diverged or any(source in diverged for source in node.all_input_nodes):
                diverged.add(node)
        cut = position[layer]
        read_later = {n for n in nodes[:cut] if any(position[user] > cut for user in n.users)}
        read_now = set(layer.all_input_nodes)
        pruned = {n for n in read_later | read_now if n in diverged}
        dense = read_later | {layer} | {n for n in read_now if n not in diverged}
        held = run_to(layer)
        for values in held:
            assert set(values.dense_values) == dense
            assert set(values.pruned_values) == pruned
        peak = max(peak, sum(map(size, held)))
        damage(graph_module, str(layer.target))
        diverged.add(layer)
    peak = max(peak, sum(map(size, run_to(nodes[-1]))))
    assert stream._store.peak_bytes == peak


def test_values_are_freed():
    graph_module, layers = observed(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 4)))
    first, second, third = layers
    stream = stream_of(graph_module, [torch.randn(2, 3, 6, 6) for _ in range(3)])
    seen: dict[str, list[weakref.ref]] = {"first": [], "second": []}
    run_on(stream, first, lambda _, values: seen["first"].append(weakref.ref(values.dense(first))))
    assert all(ref() is not None for ref in seen["first"])
    run_on(stream, second, lambda _, values: seen["second"].append(weakref.ref(values.dense(second))))
    gc.collect()
    assert [ref() for ref in seen["first"]] == [None] * 3
    run_on(stream, third)
    gc.collect()
    assert [ref() for ref in seen["second"]] == [None] * 3


@pytest.mark.parametrize("kind", [Chain, Residual, Concatenation, SharedInput])
def test_each_module_runs_once_a_batch_in_each_model(kind):
    model = kind().double().eval()
    calls: Counter[str] = Counter()
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
    batches = batches_for(model)
    graph_module, layers = observed(model)
    calls.clear()
    stream = stream_of(graph_module, batches)
    run_through(stream, layers)
    sites = Counter(str(n.target) for n in graph_module.graph.find_nodes(op="call_module"))
    for name in ("a", "b", "c", "d", "e", "relu"):
        assert calls[name] == 2 * len(batches) * sites[name], name


def test_what_no_replaced_layer_feeds_runs_once_for_both_models():
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.still, self.relu, self.layer = nn.AvgPool2d(1), nn.ReLU(), conv(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y + self.relu(self.still(x))

    model = TwoStems()
    calls: Counter[str] = Counter()
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
    graph_module, (layer,) = observed(model)
    calls.clear()
    stream = stream_of(graph_module, [torch.randn(2, 3, 4, 4) for _ in range(5)])
    run_through(stream, [layer])
    assert calls == {"still": 5, "relu": 5, "layer": 10}


def test_the_loader_is_started_and_read_once():
    class Loader:
        started = read = 0

        def __iter__(self):
            self.started += 1
            for _ in range(3):
                self.read += 1
                yield torch.randn(2, 3, 6, 6)

    loader = Loader()
    graph_module, layers = observed(Chain())
    stream = stream_of(graph_module, loader)
    run_through(stream, layers)
    assert (loader.started, loader.read) == (1, 3)


class TestBadBatches:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (torch.full((2, 3, 6, 6), float("nan")), "batch 1 holds NaN or infinite values"),
            (torch.full((2, 3, 6, 6), float("inf")), "batch 1 holds NaN or infinite values"),
            (torch.zeros(0, 3, 6, 6), r"batch 1 is empty: shape \(0, 3, 6, 6\)"),
            (torch.tensor(3.0), r"batch 1 is empty: shape \(\)"),
            ("image.png", "batch 1 is a str; expected a tensor"),
            ([], "batch 1 is an empty list"),
            ({}, "batch 1 is an empty dict"),
            (3, "batch 1 is an int"),
            (torch.zeros(2, 4, 6, 6), r"batch 1 at node 'a' \(a\), input shapes \[\(2, 4, 6, 6\)\].*4 channels"),
            (torch.zeros(2, 3, 0, 6), "batch 1"),
            (torch.zeros(2, 3, 6, 6, dtype=torch.float64), r"batch 1 at node 'a'.*double"),
            (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), r"batch 1 at node 'a'.*unsigned char"),
            ((torch.arange(2), torch.zeros(2, 3, 6, 6)), r"batch 1 at node 'a' \(a\), input shapes \[\(2,\)\]"),
        ],
    )
    def test_the_message_names_the_batch(self, batch, message):
        graph_module, layers = observed(Chain())
        stream = stream_of(graph_module, [torch.randn(2, 3, 6, 6), batch])
        with pytest.raises(CalibrationError, match=message):
            run_on(stream, layers[-1])

    @pytest.mark.parametrize("loader", [[], (), iter([])])
    def test_an_empty_loader(self, loader):
        graph_module, layers = observed(Chain())
        with pytest.raises(CalibrationError, match="gave no batches"):
            run_through(stream_of(graph_module, loader), layers)

    def test_an_input_that_no_batch_gives(self):
        graph_module, layers = observed(TwoInputs())
        with pytest.raises(
            CalibrationError, match="the model has an input 'other' that calibration batch 0 does not give"
        ):
            run_through(stream_of(graph_module, [(torch.randn(2, 3, 6, 6),)]), layers)

    def test_a_failure_in_the_middle_names_the_node(self):
        class Strict(Chain):
            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x)).reshape(-1, 8, 3, 3)

        graph_module, layers = observed(Strict())
        stream = stream_of(graph_module, [torch.randn(2, 3, 6, 6), torch.randn(2, 3, 5, 4)])
        with pytest.raises(CalibrationError, match=r"batch 1 at node 'reshape'.*input shapes \[\(2, 8, 3, 2\)\]"):
            run_through(stream, layers)


def test_the_fingerprint_tells_data_apart():
    def fingerprint(batches: list[Tensor]) -> str:
        graph_module, layers = observed(Chain())
        stream = stream_of(graph_module, batches)
        run_on(stream, layers[0])
        return stream.source.fingerprint

    x = torch.randn(4, 3, 6, 6)
    assert fingerprint([x]) == fingerprint([x.clone()])
    assert fingerprint([x]) != fingerprint([x + 0.1])
    assert fingerprint([x]) != fingerprint(list(x.split(2)))


class TestOrder:
    """The stream cannot be used out of order."""

    def test_a_layer_has_to_be_replaced_before_the_next(self):
        graph_module, layers = observed(Chain())
        iteration = stream_of(graph_module, [torch.randn(2, 3, 6, 6)]).layers(layers)
        next(iteration)
        with pytest.raises(GraphError, match="layer 'a' was not replaced"):
            next(iteration)

    def test_a_layer_that_the_stream_has_left_says_so(self):
        graph_module, layers = observed(Chain())
        iteration = stream_of(graph_module, [torch.randn(2, 3, 6, 6)]).layers(layers)
        first = next(iteration)
        first.replace(as_it_is(first.node))
        next(iteration)
        with pytest.raises(GraphError, match="the calibration stream has left it"):
            first.replace(as_it_is(first.node))
        with pytest.raises(GraphError, match="the calibration stream has left it"):
            _ = first.inputs

    def test_it_runs_once(self):
        graph_module, layers = observed(Chain())
        stream = stream_of(graph_module, [torch.randn(2, 3, 6, 6)])
        run_through(stream, layers)
        with pytest.raises(GraphError, match="runs once"):
            run_through(stream, layers)

    def test_the_outcome_is_known_at_the_end_only(self):
        graph_module, layers = observed(Chain())
        stream = stream_of(graph_module, [torch.randn(2, 3, 6, 6)])
        with pytest.raises(GraphError, match="has not reached the output"):
            _ = stream.outcome
        run_through(stream, layers)
        assert set(stream.outcome.errors) == set(layers)

    def test_observers_are_as_they_were_afterwards(self):
        graph_module, layers = observed(Chain())
        run_through(stream_of(graph_module, [torch.randn(2, 3, 6, 6)]), layers)
        for layer in layers:
            observer = module_of(input_of(layer))
            assert observer.enabled
            with pytest.raises(CalibrationError, match="before any calibration batch"):
                observer.statistics()


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16, 16), (50, 50, 33), (1,) * 70, (160, 7)])
def test_held_out_images_take_no_part_in_the_statistics_and_are_what_errors_are_of(sizes):
    torch.manual_seed(0)
    model = Chain().double().eval()
    images = torch.randn(sum(sizes), 3, 9, 7, dtype=torch.float64)
    mask = calibration([], holdout=None).held_out(len(images))
    assert int(mask.sum()) == max(16, len(images) // 10)
    graph_module, layers = observed(model)
    pruned = copy.deepcopy(model)
    stream = CalibrationStream(graph_module, calibration(images.split(sizes), holdout=None))
    for layer in stream.layers(layers):
        patches = layer.geometry.patches(
            inputs_and_outputs(pruned, str(layer.node.target), [{"x": images[~mask]}])[0][0]
        )
        torch.testing.assert_close(layer.inputs.gram, patches.mT @ patches, rtol=1e-10, atol=1e-10)
        layer.replace(as_it_is(layer.node))
        damage(graph_module, str(layer.node.target))
        damage(pruned, str(layer.node.target))
    source, held_out = stream.outcome.source, images[mask]
    assert (source.images_read, source.images, source.held_out) == (len(images), int((~mask).sum()), int(mask.sum()))
    for layer in layers:
        y, z = (inputs_and_outputs(m, str(layer.target), [{"x": held_out}])[0][1] for m in (model, pruned))
        dim = -1 if isinstance(module_of(layer), nn.Linear) else 1
        y, z = (v.movedim(dim, 0).flatten(1) for v in (y, z))
        expected = (y - z).square().sum() / (y - y.mean(1, keepdim=True)).square().sum()
        assert stream.outcome.errors[layer] == pytest.approx(float(expected), rel=1e-9)
    with torch.no_grad():
        before, after = model(held_out), pruned(held_out)
    assert stream.outcome.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).double().mean()))
    kl = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    assert stream.outcome.kl == pytest.approx(float(kl), rel=1e-9)


@pytest.mark.parametrize(("batches", "held_out"), [(1, 0), (2, 40), (3, 40), (5, 40)])
def test_a_model_of_one_batch_size_has_whole_batches_held_out(batches, held_out):
    class Fixed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(40, 3, 8, 8))

    graph_module, layers = observed(Fixed())
    stream = CalibrationStream(graph_module, calibration([torch.randn(40, 3, 8, 8)] * batches, holdout=0.2))
    run_through(stream, layers)
    source = stream.outcome.source
    assert (source.images, source.held_out) == (40 * batches - held_out, held_out)
    assert (stream.outcome.agreement is None) == (not held_out)
