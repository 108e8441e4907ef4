"""Does an imported graph compute what the file computes, and the same for each image whatever its batch?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.errors import OnnxImportError, ValidationError
from fxprune.export.onnx_file import first_line
from fxprune.export.session import open_session
from fxprune.graph import Runner
from fxprune.onnx_import.inputs import Inputs
from fxprune.onnx_import.read import Source

# Relative to the norm of the output, by its type: kernels sum in another order.
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE = 1e-3
LEAST = 1e-6  # Smaller differences are none: engines approximate a sigmoid to this, whose output may be as small.


def differing_file(source: Source, graph_module: GraphModule, inputs: Inputs) -> str:
    """Compare with the file in onnxruntime; a sentence where that cannot be done, "" where all is well.

    Raises:
        OnnxImportError: they compute something else.
    """
    batches = [inputs.some(inputs.batch)]
    if inputs.is_open:
        batches.append(inputs.some(inputs.batch + 1))
    try:
        session = open_session(source.path)
    except ValidationError as error:
        return f"{source.name} is not compared with onnxruntime, which does not load it: {first_line(error)}"
    for values in batches:
        feeds = {port.name: x.numpy() for port, x in zip(inputs.ports, values, strict=True)}
        try:
            wanted = [torch.from_numpy(array) for array in session.run(None, feeds)]
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            if values is not batches[0]:
                continue  # A file may say that its batch size is open when it is not; the graph is compared with single images.
            return f"{source.name} is not compared with onnxruntime, which fails on it: {first_line(error)}"
        found = _run(graph_module, values)
        for port, a, b in zip(source.outputs, wanted, found, strict=True):
            if a.shape != b.shape:
                raise OnnxImportError(
                    f"{source.name}: its output {port.name!r} is {tuple(a.shape)} in onnxruntime, and {tuple(b.shape)} as it "
                    "was read here, which is a fault of fxprune; please report it with the file"
                )
            distance = _distance(a, b)
            if distance > _TOLERANCES.get(b.dtype, TOLERANCE):
                raise OnnxImportError(
                    f"{source.name}: its output {port.name!r} differs from onnxruntime's by {distance:.2g} of its norm; an "
                    "operator was read wrongly, which is a fault of fxprune: please report it with the file"
                )
    return ""


def agrees(source: Source, graph_module: GraphModule, inputs: Inputs) -> bool:
    """Whether onnxruntime gives the same for a batch of another size than the file's own."""
    values = inputs.some(inputs.many)
    try:
        session = open_session(source.path)
        wanted = session.run(None, {port.name: x.numpy() for port, x in zip(inputs.ports, values, strict=True)})
    except Exception:  # onnxruntime's own exceptions have no common base class
        return False
    pairs = [(torch.from_numpy(a), b) for a, b in zip(wanted, _run(graph_module, values), strict=True)]
    return all(a.shape == b.shape and _distance(a, b) <= _TOLERANCES.get(b.dtype, TOLERANCE) for a, b in pairs)


def differing_batch(graph_module: GraphModule, inputs: Inputs) -> str:
    """What is wrong with a graph that gives something else for images that are together; "" if nothing is."""
    many, few = inputs.some(inputs.many), inputs.batch
    try:
        together = _run(graph_module, many)
        alone = [_run(graph_module, inputs.part(many, i * few, few)) for i in range(inputs.many // few)]
    except Exception as error:  # whatever torch raises
        return f"the graph fails on {inputs.many} images: {first_line(error)}"
    for i, whole in enumerate(together):
        parts = [outputs[i] for outputs in alone]
        axis = next((d for d, (a, b) in enumerate(zip(whole.shape, parts[0].shape, strict=False)) if a != b), None)
        if axis is None:  # No batch in this output; then it is the same for all.
            joined = parts[-1]
        else:
            joined = torch.cat(parts, axis)
        if joined.shape != whole.shape or _distance(joined, whole) > _TOLERANCES.get(whole.dtype, TOLERANCE):
            return f"its output {i} mixes the images of a batch"
    return ""


@torch.no_grad()
def _run(graph_module: GraphModule, values: tuple[Tensor, ...]) -> list[Tensor]:
    output: Any = Runner(graph_module).run(*(x.clone() for x in values))
    return [output] if isinstance(output, Tensor) else list(output)


def _distance(wanted: Tensor, found: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point():
        return float((wanted != found).double().mean())
    a, b = (x.double().nan_to_num(0, 0, 0) for x in (wanted, found))
    if not torch.equal(wanted.isnan(), found.isnan()):
        return float("inf")
    if float((a - b).abs().max()) <= LEAST:
        return 0.0
    distance, size = float((a - b).norm()), float(a.norm())
    return distance / size if size > 0 else distance
