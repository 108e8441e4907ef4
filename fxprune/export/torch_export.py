"""torch's own ONNX exporter, run quietly, and its graph put in order: names kept, no traces of the machine left."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExportError
from fxprune.export.batches import input_names, named_outputs
from fxprune.export.half_precision import PREFIX, Float16Inside
from fxprune.export.layer_check import TRANSPOSED


def to_onnx_program(
    model: nn.Module, inputs: tuple[Tensor, ...], *, opset: int | None, dynamic_batch: bool, precision: str
) -> torch.onnx.ONNXProgram:
    """Export a model in eval mode.

    Args:
        model: the model; not modified.
        inputs: example inputs on the model's device.
        opset: operator set version, None for the exporter's own choice.
        dynamic_batch: leave axis 0 open in all inputs that have as many samples as the first.
        precision: "fp32" or "fp16".

    Raises:
        ExportError: the exporter fails, fixes the batch size, or cannot reach the opset.
    """
    module = _prepared(model, precision)
    inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)  # what the file takes, in fp16 as well
    inputs = tuple(_two_samples(x, inputs[0]) for x in inputs) if dynamic_batch else inputs
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} if x.dim() and len(x) == len(inputs[0]) else None for x in inputs)
        shapes = (shapes,) if isinstance(module, Float16Inside) else shapes
    try:
        with _quiet(), torch.no_grad():
            names = list(named_outputs(module(*inputs)))
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=_distinct(input_names(model, len(inputs)), names),
                output_names=names,
            )
    except ExportError:
        raise
    except Exception as error:  # the exporter lets through whatever its many stages raise
        advice = "; if its graph fixes the batch size, pass dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"torch.onnx.export fails on {type(model).__name__}: {_cause(error)}{advice}") from error
    assert program is not None
    reached = program.model.opset_imports.get("")
    if opset is not None and reached != opset:
        raise ExportError(
            f"opset {opset} cannot be reached, the exporter stops at {reached}; choose another opset, or None"
        )
    if dynamic_batch and any(isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape):
        raise ExportError(f"{type(model).__name__} fixes the batch size in its graph; pass dynamic_batch=False")
    _tidy(program, module)
    return program


def _prepared(model: nn.Module, precision: str) -> nn.Module:
    """The module to export: the model itself where it is float32 already, else a copy."""
    if precision == "fp16":
        return Float16Inside(model).eval()
    dtypes = {p.dtype for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()}
    return model if dtypes <= {torch.float32} else copy.deepcopy(model).float()


def _two_samples(x: Tensor, first: Tensor) -> Tensor:
    """At least two samples: torch.export takes a size of 1 for a constant."""
    return torch.cat([x, x]) if first.dim() and len(first) == 1 and x.dim() and len(x) == 1 else x


def _distinct(inputs: tuple[str, ...], outputs: list[str]) -> list[str]:
    """Input names, changed where an output has the same."""
    return [f"input_{name}" if name in outputs else name for name in inputs]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress lines, warnings or log records from the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """The first lines of the innermost exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def _tidy(program: torch.onnx.ONNXProgram, module: nn.Module) -> None:
    """Give the weights the model's names, and drop the exporter's notes, which hold source paths."""
    graph = program.model.graph
    if isinstance(module, Float16Inside):
        for value in list(graph.initializers.values()):
            if value.name is not None and value.name.startswith(PREFIX):
                value.name = value.name.removeprefix(PREFIX)
        module = module.model
    parameters = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    linear = {f"{name}.weight" if name else "weight" for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    for value in list(graph.initializers.values()):
        if value.name in parameters or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        array = torch.from_numpy(value.const_value.numpy())
        for name in linear:
            weight = parameters.get(name)
            if weight is not None and weight.T.shape == array.shape and torch.equal(weight.T.cpu(), array):
                if f"{name}{TRANSPOSED}" not in graph.initializers:
                    value.name = f"{name}{TRANSPOSED}"
                break
    for values in (graph.inputs, graph.outputs, graph.initializers.values()):
        for value in values:
            value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
