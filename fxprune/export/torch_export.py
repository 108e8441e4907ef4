"""torch's own ONNX exporter, run quietly, and its graph put in order: names kept, no traces of the machine left.

How tensors lie in memory is no business of a file: examples and weights are made contiguous before the export, and a view
that only states strides, which a pooling to 1 x 1 leaves on images in channels_last, is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_as_strided
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import graph_annotation
from fxprune.errors import ExportError
from fxprune.export.half_precision import PREFIX, Float16Inside
from fxprune.export.inputs_outputs import input_names, named_outputs
from fxprune.export.layer_check import TRANSPOSED
from fxprune.export.weight_uses import GATES, RECURRENT
from fxprune.intake.record import intake
from fxprune.layers.recurrent import Recurrent
from fxprune.runtime.quiet import quiet

# What the axes after the channels are called where they are left open, by their number.
_OPEN_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def to_onnx_program(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    precision: str = "fp32",
    names_in: Sequence[str] | None = None,
    names_out: Sequence[str] | None = None,
) -> torch.onnx.ONNXProgram:
    """Export a model in eval mode.

    Args:
        model: the model; not modified.
        inputs: example inputs on the model's device.
        opset: operator set version, None for the exporter's own choice.
        dynamic_batch: leave axis 0 open in all inputs that have as many samples as the first.
        dynamic_size: leave the axes after the channels open in all inputs of three axes or more.
        precision: "fp32" or "fp16".
        names_in: names of the file's inputs; None for those of the ONNX file that the model came from, or of forward's
            parameters.
        names_out: names of its outputs; None likewise, or for the keys and fields of what forward returns, or "output".

    Raises:
        ExportError: the exporter fails, or is known to; it fixes a size that was to be open, or cannot reach the opset; or the
            names do not fit.
    """
    for name, layer in model.named_modules():
        if getattr(layer, "proj_size", 0) and isinstance(layer, (nn.RNNBase, Recurrent)):
            raise ExportError(
                f"{name or 'the model'} is an LSTM with a projection (proj_size={layer.proj_size}), which ONNX's LSTM does not "
                "have, and for which torch.onnx.export writes a file that does not load; save the model with fxprune.save, or "
                "train it without proj_size"
            )
    module = _prepared(model, precision)
    # The file takes float32, in fp16 as well.
    inputs = tuple((x.float() if x.is_floating_point() else x).contiguous() for x in inputs)
    inputs = tuple(_two_samples(x, inputs[0]) for x in inputs) if dynamic_batch else inputs
    if precision == "fp32" and module is not model and not _runs(module, inputs) and _runs(model, inputs):
        module = _contiguous(copy.deepcopy(model))  # it casts to other types itself, and so does the file
    shapes: Any = _open_axes(inputs, batch=dynamic_batch, size=dynamic_size)
    if shapes is not None and isinstance(module, Float16Inside):
        shapes = (shapes,)
    advice = "; if its graph fixes the batch size, pass dynamic_batch=False" if dynamic_batch else ""
    if dynamic_size:
        advice = f"; if its graph fixes height and width, leave dynamic_size out{advice}"
    try:
        with quiet(), torch.no_grad():
            own_names = list(named_outputs(module(*inputs)))
            inner = module.model if isinstance(module, Float16Inside) else module
            file_in, file_out = _names_in_file(model, len(inputs), len(own_names))
            names = _names(
                inner, input_names(model, len(inputs)), own_names, names_in or file_in, names_out or file_out
            )
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=names[: len(inputs)],
                output_names=names[len(inputs) :],
                custom_translation_table={
                    torch.ops.aten.as_strided.default: _as_strided,
                    torch.ops.aten.squeeze.dim: _squeeze,
                },
            )
    except ExportError:
        raise
    except Exception as error:  # the exporter lets through whatever its many stages raise
        if not _runs(module, inputs):
            given = ", ".join(str(tuple(x.shape)) for x in inputs)
            known = ", ".join(f"{form.name} {form.shape}" for form in graph_annotation(model).inputs)
            raise ExportError(
                f"{type(model).__name__} does not run on inputs of shape {given}: {_cause(error)}"
                f"{known and f'. It was calibrated on {known}'}"
            ) from error
        raise ExportError(f"torch.onnx.export fails on {type(model).__name__}: {_cause(error)}{advice}") from error
    assert program is not None
    reached = program.model.opset_imports.get("")
    if opset is not None and reached != opset:
        raise ExportError(
            f"opset {opset} cannot be reached, the exporter stops at {reached}; choose another opset, or None"
        )
    _require_open_axes(type(model).__name__, program, inputs, batch=dynamic_batch, size=dynamic_size)
    _tidy(program, module)
    return program


def _open_axes(inputs: tuple[Tensor, ...], *, batch: bool, size: bool) -> tuple[dict[int, Any] | None, ...] | None:
    """Names of the axes left open in each input; axes of one name and size share it, others get a number."""
    taken: dict[str, int] = {}
    together = (
        torch.export.Dim("batch") if batch and not size else "batch"
    )  # a Dim makes the exporter say what fixes it

    def name(base: str, length: int) -> str:
        for i in range(len(inputs)):
            candidate = f"{base}_{i}" if i else base
            if taken.setdefault(candidate, length) == length:
                return candidate
        return base

    shapes: list[dict[int, Any] | None] = []
    for x in inputs:
        axes: dict[int, Any] = {0: together} if batch and x.dim() and len(x) == len(inputs[0]) else {}
        if size:
            axes |= {i: name(base, x.shape[i]) for i, base in enumerate(_OPEN_AXES.get(x.dim() - 2, ()), 2)}
        shapes.append(axes or None)
    return tuple(shapes) if any(shapes) else None


def _require_open_axes(
    model: str, program: torch.onnx.ONNXProgram, inputs: tuple[Tensor, ...], *, batch: bool, size: bool
) -> None:
    """Raise ExportError if the exporter has fixed an axis that was to be open."""
    wanted = _open_axes(inputs, batch=batch, size=size) or ()
    for value, axes in zip(program.model.graph.inputs, wanted, strict=False):
        fixed = [axis for axis in axes or () if value.shape is not None and isinstance(value.shape[axis], int)]
        if 0 in fixed:
            raise ExportError(f"{model} fixes the batch size in its graph; pass dynamic_batch=False")
        if fixed:
            raise ExportError(f"{model} fixes height and width in its graph; leave dynamic_size out")


def _prepared(model: nn.Module, precision: str) -> nn.Module:
    """The module to export: the model itself where it is float32 and contiguous already, else a copy."""
    if precision == "fp16":
        return _contiguous(Float16Inside(model).eval())
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.is_contiguous() and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors):
        return model
    return _contiguous(copy.deepcopy(model).float())


def _contiguous(module: nn.Module) -> nn.Module:
    """The same module with weights that lie in memory in row-major order."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.contiguous()
    return module


def _runs(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception:  # whatever the model raises, as where types do not fit each other
        return False
    return True


def _names_in_file(
    model: nn.Module, inputs: int, outputs: int
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The names that a model's inputs and outputs had in the ONNX file that it came from, if it did."""
    found = intake(model) if isinstance(model, GraphModule) else None
    if found is None:
        return None, None
    return (
        found.inputs if len(found.inputs) == inputs else None,
        found.outputs if len(found.outputs) == outputs else None,
    )


def _names(
    model: nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    names_in: Sequence[str] | None,
    names_out: Sequence[str] | None,
) -> list[str]:
    """The file's input and output names: those asked for, else the model's own, made distinct.

    Raises:
        ExportError: too few or too many names, a name twice, or the name of a parameter.
    """
    stored = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for kind, asked, own in (("input", names_in, inputs), ("output", names_out, outputs)):
        if asked is None:
            continue
        if isinstance(asked, str) or len(asked) != len(own) or not all(isinstance(n, str) and n for n in asked):
            raise ExportError(
                f"{kind}_names must give a name for each of the {len(own)} {kind}s of {type(model).__name__} "
                f"({', '.join(own)}), in this order; found {asked!r}"
            )
        if clash := sorted(stored.intersection(asked)):
            raise ExportError(f"{kind}_names: {clash[0]!r} is the name of a parameter of the model; choose another")
    found: list[str] = list(names_out) if names_out is not None else []
    if names_out is None:
        found = [f"output_{name}" if name in stored else name for name in outputs]
    taken = {*found, *stored}
    first = list(names_in) if names_in is not None else [f"input_{n}" if n in taken else n for n in inputs]
    names = [*first, *found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(f"the name {twice[0]!r} is given to two inputs or outputs; give each one of its own")
    return names


def _as_strided(self: Any, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None) -> Any:
    """aten::as_strided for the exporter: the tensor itself where the view has its shape and its row-major strides.

    Like the exporter's own version, it takes for granted that the tensor lies in memory in row-major order.
    """
    shape = list(self.shape or [])
    alike = not storage_offset and len(shape) == len(size)
    step = 1
    for length, wanted, leap in zip(reversed(shape), reversed(size), reversed(stride), strict=False):
        if isinstance(wanted, int) and wanted == 1 and length == 1:
            continue
        # An open size comes as a value of the graph; only the outermost axis may have one, whose stride is then known.
        alike = alike and step > 0 and leap == step and (not isinstance(wanted, int) or wanted == length)
        step = step * wanted if isinstance(wanted, int) else 0
    return onnxscript.opset18.Identity(self) if alike else aten_as_strided(self, size, stride, storage_offset)


def _squeeze(self: Any, dim: int) -> Any:
    """aten::squeeze for the exporter, whose own version takes out an axis of any size: torch leaves one that is not 1."""
    size = self.shape[dim] if self.shape is not None else None
    if isinstance(size, int) and size != 1:
        return onnxscript.opset18.Identity(self)
    axes: Any = onnxscript.opset18.Constant(value_ints=[dim])
    return onnxscript.opset18.Squeeze(self, axes)


def _two_samples(x: Tensor, first: Tensor) -> Tensor:
    """At least two samples: torch.export takes a size of 1 for a constant."""
    return torch.cat([x, x]) if first.dim() and len(first) == 1 and x.dim() and len(x) == 1 else x


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
    for node in graph.all_nodes():
        if node.op_type in RECURRENT:
            _name_recurrent(node, module, set(graph.initializers))
    ports = [*graph.inputs, *graph.outputs]
    taken = {value.name for value in ports}
    between = [*graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in between:  # the exporter names ports without looking at what lies between them
        if value.name in taken and not any(value is port for port in ports):
            value.name = f"{value.name}_between"
    for values in (graph.inputs, graph.outputs, graph.initializers.values()):
        for value in values:
            value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _name_recurrent(node: Any, module: nn.Module, taken: set[str]) -> None:
    """Give the matrices of a recurrent node, which hold both directions and other gates' order, the names of the first of them.

    W becomes "lstm.weight_ih_l0", R "lstm.weight_hh_l0", B "lstm.bias_l0". Found by their values.
    """
    values = [value if value is not None and value.const_value is not None else None for value in node.inputs[1:4]]
    if not values or values[0] is None:
        return
    stored = torch.from_numpy(values[0].const_value.numpy())[0]
    size, order = len(stored) // len(GATES[node.op_type]), GATES[node.op_type]
    first = torch.cat([stored[gate * size : (gate + 1) * size] for gate in order])
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.RNNBase, Recurrent)):
            continue
        for suffix in [f"l{number}" for number in range(layer.num_layers)]:
            matrix = layer.matrix("ih", suffix) if isinstance(layer, Recurrent) else layer
            weight = getattr(matrix, "weight" if isinstance(layer, Recurrent) else f"weight_ih_{suffix}").detach()
            if weight.shape != first.shape or not torch.equal(weight.cpu().to(first.dtype), first):
                continue
            for value, kind in zip(values, ("weight_ih", "weight_hh", "bias"), strict=False):
                own = ".".join(filter(None, (name, f"{kind}_{suffix}")))
                if value is not None and own not in taken:
                    value.name = own
            return
