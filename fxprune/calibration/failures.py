"""What to tell a user whose model fails on a batch: where, on what, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import tensors_in
from fxprune.errors import CalibrationError, FxPruneError
from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import Runner, module_of
from fxprune.operations import Argument, operation_of

_OF_TYPES = re.compile(r"dtype|scalar type|input type|not implemented for '|unsigned char|tensor type", re.IGNORECASE)


def stays_as_it_is(error: Exception) -> bool:
    """Whether an exception says no more of the model than of any other: memory is full; or it is one of ours already."""
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    return full or isinstance(error, FxPruneError)


def run_graph(run: Runner, values: Sequence[Any], what: str, *, remedy: str = "") -> Any:
    """Run a graph on the values of its placeholders, and return its output.

    Args:
        run: of the graph.
        values: one for each placeholder.
        what: what to call them in messages, such as "calibration batch 0".
        remedy: what to do if it fails, unless something else is found.

    Raises:
        CalibrationError: if the model fails, whatever it raises; the message names the node.
    """
    try:
        return run.run(*values)
    except Exception as error:
        if stays_as_it_is(error):
            raise
        remedy = remedy_for(run.module, list(values), error) or remedy
        raise node_failure(error, run.node, values_read(run), what, remedy) from error


def values_read(run: Runner) -> list[Any]:
    """The values that the node at which a run stopped reads."""
    return [run.env[source] for source in run.node.all_input_nodes if source in run.env]


def node_failure(error: Exception, node: Node, inputs: Iterable[Any], what: str, remedy: str = "") -> CalibrationError:
    """The error for a model that fails at a node; to be raised from the original.

    Args:
        error: what was raised, of whatever class.
        node: where.
        inputs: the values that the node reads.
        what: what the model failed on, such as "calibration batch 0".
        remedy: what to do, where that is known.
    """
    shapes = [tuple(value.shape) for value in tensors_in(list(inputs))]
    return CalibrationError(
        f"the model failed on {what} at node {node.name!r} ({node.target}), input shapes {shapes}: "
        f"{said(error)}{remedy and '. '}{remedy}"
    )


def said(error: BaseException) -> str:
    """An exception in words; its class too where it is none of the common ones, whose message says enough."""
    text = str(error).strip().rstrip(".")
    if isinstance(error, (KeyError, StopIteration)) or type(error) not in (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
    ):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text or type(error).__name__


def remedy_for(model: nn.Module, inputs: Any, error: BaseException | None = None) -> str:
    """What is wrong with images that a model fails on, and what to do; "" if nothing is known.

    Args:
        model: a graph or any module.
        inputs: the values of its inputs; the first tensor is taken for the images.
        error: what the model raised. None asks about the form of the images only.
    """
    x = next(tensors_in(inputs), None)
    if x is None:
        return ""
    return _of_dimensions(model, x) or _of_channels(model, x, error) or _of_type(model, x, error)


def _of_type(model: nn.Module, x: Tensor, error: BaseException | None) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is None or x.dtype == dtype or error is None or not _OF_TYPES.search(str(error)):
        return ""
    name = str(dtype).removeprefix("torch.")
    convert = "images.float()" if dtype == torch.float32 else f"images.to({dtype})"
    if x.is_floating_point():
        return f"The images are {x.dtype} and the weights {dtype}: give {convert}, or a model in {x.dtype}"
    scale = f"{convert} / 255" if x.dtype == torch.uint8 else convert
    return (
        f"The images are {x.dtype} and the weights {dtype}: convert them to {name} as for inference, by {scale} and the "
        "normalisation that the model was trained with"
    )


def _of_dimensions(model: nn.Module, x: Tensor) -> str:
    convolution = _first_convolution(model)
    dimensions = 1 if convolution is None else convolution[0] + 1  # Of one image, or one row of features.
    if x.dim() != dimensions or not (convolution or x.is_floating_point()):
        return ""
    return (
        f"The images have no batch dimension, their shape is {tuple(x.shape)}: give images.unsqueeze(0) for one, "
        "torch.stack(images) for a list of them, or a DataLoader with a batch_size"
    )


def _of_channels(model: nn.Module, x: Tensor, error: BaseException | None) -> str:
    convolution = _first_convolution(model)
    if convolution is None or error is None or "channels" not in str(error):
        return ""
    spatial, wanted = convolution
    if x.dim() != spatial + 2 or x.shape[1] == wanted:
        return ""
    found = f"The model takes images of {wanted} channels, and these have {x.shape[1]}"
    if x.shape[-1] == wanted:
        order = ", ".join(map(str, (0, x.dim() - 1, *range(1, x.dim() - 1))))
        return f"{found}, of shape {tuple(x.shape)}: their channels come last; give images.permute({order})"
    if x.shape[1] == 1:
        return f"{found}: repeat the one channel, images.repeat_interleave({wanted}, 1), if the model was trained so"
    if wanted == 1:
        return f"{found}: give grey images, such as images.mean(1, keepdim=True), if the model was trained so"
    if x.shape[1] == wanted + 1:
        return f"{found}: leave out a channel of opacity, images[:, :{wanted}]"
    return f"{found}: is this the data set that the model was trained on?"


def _first_convolution(model: nn.Module) -> tuple[int, int] | None:
    """Spatial dimensions and input channels of the first convolution that a graph calls, or that a module holds."""
    found = (
        (_of_node(node) for node in model.graph.nodes) if isinstance(model, GraphModule) else map(_of, model.modules())
    )
    return next(filter(None, found), None)


def weight_of_convolution(node: Node) -> Node | None:
    """Where a convolution that is called as a function takes its weight (R, C/G, *kernel) from; None for all else."""
    operation = operation_of(node)
    if node.op == "call_module" or operation is None or operation.name not in ("conv1d", "conv2d", "conv3d"):
        return None
    weight = Argument(1, "weight").of(node)
    return weight if isinstance(weight, Node) else None


def _of_node(node: Node) -> tuple[int, int] | None:
    module, weight = module_of(node), weight_of_convolution(node)
    if weight is None or weight.op != "get_attr":
        return None if module is None else _of(module)
    tensor = attrgetter(str(weight.target))(node.graph.owning_module)
    return tensor.dim() - 2, tensor.shape[1] * Argument(6, "groups", 1).of(node)


def _of(module: nn.Module) -> tuple[int, int] | None:
    kinds = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
    return (len(module.kernel_size), module.in_channels) if isinstance(module, kinds) else None
