"""import_onnx: from an ONNX file to a GraphModule that computes the same, compared with onnxruntime."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

from onnx import GraphProto, ModelProto, NodeProto
from torch.fx import GraphModule

from fxprune.errors import OnnxImportError
from fxprune.export.constant_folding import attributes, evaluated, opset_versions, stored_tensors
from fxprune.export.onnx_file import first_line
from fxprune.intake.batch_sizes import require_axes
from fxprune.intake.exported import mark_as_traced
from fxprune.intake.record import Intake, set_intake
from fxprune.onnx_import import (  # noqa: F401 - each adds its builders to the table
    elementwise,
    layers,
    pooling,
    recurrent,
    reductions,
    resize,
    shapes,
)
from fxprune.onnx_import.check import agrees, differing_batch, differing_file
from fxprune.onnx_import.graph import BATCH, FILE, Choices, ProbeError, TorchGraph
from fxprune.onnx_import.inputs import Inputs
from fxprune.onnx_import.names import Names
from fxprune.onnx_import.read import Source, read, saved, temporary_folder
from fxprune.onnx_import.sizes import computed, settled
from fxprune.onnx_import.table import Operation, builder_of
from fxprune.onnx_import.values import Activation, Known, Numbers, Value

MOST_READINGS = 64  # Of a fixed batch size, before it is given up.


def is_onnx(model: object) -> TypeGuard[str | PathLike[str] | ModelProto]:
    """Whether a model is given as an ONNX file, or as what onnx.load makes of one."""
    return isinstance(model, ModelProto) or (isinstance(model, (str, PathLike)) and Path(model).suffix == ".onnx")


def import_onnx(model: str | PathLike[str] | ModelProto, example_inputs: Any = None) -> GraphModule:
    """Read an ONNX file as a model of torch: layers with weights become modules, all else functions.

    The result takes and gives what the file does, in the file's order, and any number of images at once; it has been compared
    with the file in onnxruntime. What is open in the file stays open; so does the batch size where the file fixes it, if its
    operators allow that.

    Args:
        model: the path of a file, or a ModelProto.
        example_inputs: a batch, in any form that a loader may give. It settles sizes that the file leaves open while the graph
            is built, and is what the comparison runs on; random numbers are taken without.

    Returns:
        A GraphModule in eval mode, in which layers have the names of their weights or nodes in the file.

    Raises:
        OnnxImportError: the file holds something that cannot be taken; the message names the node, and the remedy.
        ValidationError: it is no complete ONNX file.
    """
    if isinstance(model, ModelProto):
        with temporary_folder() as folder:
            return _imported(read(saved(model, folder), model.graph.name or "the ONNX model"), example_inputs)
    path = Path(model)
    return _imported(read(path, str(path)), example_inputs)


def _imported(source: Source, example: Any) -> GraphModule:
    first: _FixedError | None = None
    for inputs in Inputs.of(source, example):
        try:
            return _at_sizes(source, inputs)
        except _FixedError as error:  # Another guess at what the file leaves open may do.
            first = first or error
    advice = (
        ""
        if example is not None
        else ". Where that is for the size of the input, give example_inputs, a batch of the right size"
    )
    raise OnnxImportError(f"{source.name}: {first}{advice}") from first


def _at_sizes(source: Source, inputs: Inputs) -> GraphModule:
    """Import a file at given sizes, open in all that can stay so.

    Raises:
        _FixedError: the file does not hold together at these sizes.
        OnnxImportError: it cannot be taken in at all.
    """
    batch, size = "", ""
    for followed in inputs.narrowed():
        made, wrong = _built(source, followed)
        if wrong is None:
            break
        if wrong.kind == BATCH:
            batch = str(wrong)
            made, wrong = _built(source, followed, batch=False)
            if wrong is None:
                break
        size = size or str(wrong)
    assert made is not None
    if batch and inputs.images not in (None, inputs.batch):
        raise OnnxImportError(
            f"{source.name} takes {inputs.batch} image{'s' * (inputs.batch != 1)} at a time and cannot be opened to "
            f"{inputs.images}: {batch}. Calibrate with batches of {inputs.batch}, or export the file again "
            "with an open batch size"
        )
    note = differing_file(source, made, inputs)
    if note:
        warnings.warn(note, stacklevel=5)
    fixed = [f"for batches of {inputs.batch} only: {batch}"] if batch else []
    record = Intake(
        "ONNX",
        frozen=(size,) if size else (),
        notes=(*fixed, *filter(None, [note])),
        inputs=tuple(port.name for port in source.inputs),
        outputs=tuple(port.name for port in source.outputs),
    )
    if size:
        _refuse_other_sizes(made, inputs, followed, size)
    for placeholder, batched in zip(made.graph.find_nodes(op="placeholder"), inputs.batched, strict=True):
        if batch and batched:
            require_axes(made, placeholder, {0: inputs.batch}, f"this graph is {fixed[0]}")
    set_intake(made, record)
    mark_as_traced(made)
    return made


def _refuse_other_sizes(made: GraphModule, inputs: Inputs, followed: Inputs, why: str) -> None:
    """Let a graph refuse sizes that were taken for fixed on the way."""
    for node, shape, before, after in zip(
        made.graph.find_nodes(op="placeholder"), inputs.shapes, inputs.open_axes, followed.open_axes, strict=True
    ):
        sizes = {axis: shape[axis] for axis in before if axis not in after}
        words = " and ".join(f"{size} along axis {axis}" for axis, size in sizes.items())
        require_axes(
            made, node, sizes, f"this graph is for inputs {node.name!r} of {words}, as those it was made with: {why}"
        )


class _FixedError(Exception):
    """The graph holds for the file's own number of images, or for some heights and widths, only.

    Attributes:
        kind: of the probe that it failed at.
    """

    def __init__(self, kind: str, where: str) -> None:
        super().__init__(where)
        self.kind = kind


def _built(source: Source, inputs: Inputs, *, batch: bool = True) -> tuple[GraphModule | None, _FixedError | None]:
    """The graph, or why it does not hold at one of the probes.

    Raises:
        _FixedError: it does not hold at the file's own.
    """
    try:
        return _by_readings(
            source, inputs, inputs.kinds if batch else tuple(k for k in inputs.kinds if k != BATCH)
        ), None
    except _FixedError as error:
        if error.kind == FILE:
            raise
        return None, error


def _by_readings(source: Source, inputs: Inputs, kinds: tuple[str, ...]) -> GraphModule:
    """Build the graph; where a fixed batch size can be read in several ways, by the first that holds."""
    choices = Choices()
    first: _FixedError | None = None
    for _ in range(MOST_READINGS):
        importer = _Importer(source, inputs, TorchGraph(kinds, choices, inputs.batch, Names(inputs.kept)))
        try:
            made = importer.run()
        except ProbeError as error:
            first = first or _FixedError(error.kind, f"node {importer.at}: {error}")
            if error.kind != BATCH or not choices.next():
                raise first from error
            continue
        wrong = differing_batch(made, inputs) if BATCH in kinds else ""
        if wrong and inputs.is_open and agrees(source, made, inputs):
            wrong = ""  # The file itself reckons with the number of images.
        if not wrong:
            return made
        first = first or _FixedError(BATCH, wrong)
        if not choices.next():
            break
    assert first is not None
    raise first


@dataclass
class _Importer:
    """One walk through a file.

    Attributes:
        source: the file.
        inputs: at which sizes it is followed.
        graph: what is built.
        values: what each name of the file stands for.
        at: the node that is being built, for messages.
    """

    source: Source
    inputs: Inputs
    graph: TorchGraph
    values: dict[str, Value] = field(default_factory=dict)
    at: str = ""

    def run(self) -> GraphModule:
        self.values = dict(self.source.known)
        self.graph.names.reserve(value.name for value in self.source.known.values())
        for port, name, probes in self.inputs.placeholders(self.graph.kinds):
            self.values[port.name] = self.graph.placeholder(name, probes)
        graph = self.source.model.graph
        self._walk(graph)
        self.at = "output"
        outputs = [self._output(value.name) for value in graph.output]
        return self.graph.finish(outputs[0] if len(outputs) == 1 else tuple(outputs))

    def _output(self, name: str) -> Activation:
        if name not in self.values:
            raise OnnxImportError(f"{self.source.name}: nothing gives its output {name!r}; the file is damaged")
        return self.graph.tensor(self.values[name])

    def _walk(self, graph: GraphProto) -> None:
        """Build all nodes of a graph."""
        later: dict[str, list[NodeProto]] = {}
        counts = Counter(value.name for value in graph.output)
        for node in graph.node:
            names = {*node.input, *_outer_names(node)}
            counts.update(node.input)
            counts.update(names - set(node.input))
            for name in names:
                later.setdefault(name, []).append(node)
        for number, node in enumerate(graph.node):
            if all(name in self.values for name in node.output if name):
                continue  # A bias that has joined the layer before it.
            self.at = f"{node.name or (node.output[0] if node.output else number)!r} ({_operator(node)})"
            self.graph.hint = node.name or node.op_type
            try:
                self._build(node, counts, later)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
                raise OnnxImportError(
                    f"{self.source.name}: node {self.at} is not as its operator set has it, or in a form that fxprune does not "
                    f"know: {type(error).__name__}: {first_line(error)}"
                ) from error
            except OnnxImportError as error:
                if str(error).startswith(f"{self.source.name}: "):
                    raise
                raise OnnxImportError(
                    f"{self.source.name}: node {self.at} cannot be taken: {str(error).rstrip('.')}. {_remedy(node)}"
                ) from error

    def _build(self, node: NodeProto, counts: Counter[str], later: dict[str, list[NodeProto]]) -> None:
        missing = next((name for name in node.input if name and name not in self.values), None)
        if missing is not None:
            raise OnnxImportError(f"it reads {missing!r}, which nothing gives")
        inputs = tuple(self.values[name] if name else None for name in node.input)
        if node.op_type == "If":
            return self._branch(node, inputs[0])
        if node.op_type in ("Loop", "Scan", "SequenceMap"):
            raise OnnxImportError(
                f"{node.op_type} runs a part of the file several times, which a graph of torch does not hold"
            )
        if (
            node.input
            and all(isinstance(value, Known) for value in inputs if value is not None)
            and self._fold(node, inputs)
        ):
            return None
        build = builder_of(node)
        opsets = opset_versions(self.source.model)
        operation = Operation(
            node, inputs, attributes(node), opsets[""], self.graph,
            readers=lambda name: counts[name],
            later=lambda name: later.get(name, []),
            known=lambda name: found if isinstance(found := self.values.get(name), Known) else None,
            skipped={},
        )  # fmt: skip
        sized = computed(operation)
        if sized is None and build is None:
            raise OnnxImportError("fxprune has no such operator")
        made: Any = sized if sized is not None else build(operation)  # type: ignore[misc]
        results = made if isinstance(made, list) else [made]
        for name, value in zip(node.output, results, strict=False):
            if name and value is not None:
                self.values[name] = settled(value) if isinstance(value, Numbers) else value
        self.values.update(operation.skipped)
        return None

    def _fold(self, node: NodeProto, inputs: Sequence[Value | None]) -> bool:
        """Compute a node all of whose inputs have become constants."""
        arrays = {name: value.array for name, value in zip(node.input, inputs, strict=True) if isinstance(value, Known)}
        found = evaluated(node, arrays, opset_versions(self.source.model))
        if found is None:
            return False
        source = next((value for value in inputs if isinstance(value, Known)), None)
        for name, array in found.items():
            self.values[name] = Known(array, name, source is not None and source.stored and array.ndim > 0)
        return True

    def _branch(self, node: NodeProto, condition: Value | None) -> None:
        """The branch of an If that is always taken."""
        if isinstance(condition, Numbers):
            condition = settled(condition)
        if not isinstance(condition, Known):
            raise OnnxImportError("it chooses a branch by numbers that are computed when the file runs")
        name = "then_branch" if bool(condition.array.reshape(-1)[0]) else "else_branch"
        branch = next(attribute.g for attribute in node.attribute if attribute.name == name)
        before = dict(self.values)
        for tensor, array in stored_tensors(branch).items():
            if array is not None:
                self.values[tensor] = Known(array, tensor, stored=True)
        self._fold_constants(branch)
        self._walk(branch)
        results = [self.values[value.name] for value in branch.output]
        self.values = before | dict(zip(node.output, results, strict=True))

    def _fold_constants(self, graph: GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Constant":
                found = evaluated(node, {}, opset_versions(self.source.model))
                self.values.update({name: Known(array, name) for name, array in (found or {}).items()})


def _outer_names(node: NodeProto) -> set[str]:
    """Names that the bodies of a node read."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                found |= {*inner.input, *_outer_names(inner)}
            found |= {value.name for value in graph.output}
    return found


def _operator(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _remedy(node: NodeProto) -> str:
    if node.domain not in ("", "ai.onnx"):
        return "Give the file as it was exported, before a tool for one engine put its own operators in"
    return (
        "If it stands behind the layers to be pruned, cut the file before it: onnx.utils.extract_model(path, new path, "
        "input names, [the name that it reads])"
    )
