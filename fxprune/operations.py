"""What each operation does to values, channels, shapes and memory: one table, which all graph analyses read.

An operation is one thing under all its names: `nn.ReLU`, `F.relu`, `torch.relu_`, `x.relu()`, `torch.ops.aten.relu`. To add
one, add an entry to `OPERATIONS`; `operation_of(node)` finds it from then on.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxprune.graph import module_of

Channels = Literal[
    "unknown", "elementwise", "binary", "spatial", "reshape", "reduce", "concatenate", "split", "item", "pad", "matrix",
    "normalisation",
]  # fmt: skip
Memory = Literal["new", "same", "view", "views"]


@dataclass(frozen=True)
class Argument:
    """Where an operation takes a setting from.

    Attributes:
        position: among the positional arguments of a function or method (its tensor is number 0).
        name: its keyword, and the attribute of a module; other keywords of the same after a space.
        default: where it is not given.
    """

    position: int
    name: str
    default: Any = None

    def of(self, node: Node) -> Any:
        """Its value in a call."""
        names = self.name.split()
        if (module := module_of(node)) is not None:
            return getattr(module, names[0], self.default)
        given = [node.kwargs[name] for name in names if name in node.kwargs]
        value = given[0] if given else node.args[self.position] if len(node.args) > self.position else None
        return self.default if value is None else value


@dataclass(frozen=True)
class Operation:
    """What is known of an operation.

    Attributes:
        name: of the function or tensor method, without underscores before or after it; "" for what only a module does.
        channels: what becomes of the channels of its input: "elementwise" keeps the shape, "binary" too, with broadcasting;
            "spatial" acts on each channel of (N, C, ...) alone; "reshape" keeps the elements in row-major order; "matrix"
            makes new ones (Conv, Linear); "normalisation" has parameters for each; "unknown" may mix them.
        modules: classes that do the same.
        aliases: other names.
        dims: numbers of dimensions that the input may have; () for any.
        memory: of its result: "new"; "same", the input itself; "view", for what is or may be a view of it; "views", a tuple of
            those.
        identity: whether the result equals the input: always, or with `training` where that is False.
        training: where an operation that acts in training only is told so.
        bounds: (low, high), outside of which an input's value makes no difference to the result; None for none.
        weight: where a weight may be read.
        factors: positions of two matrices that are multiplied; the last dimension of the first is summed over.
        is_metadata: whether it reads shape, type or device, and none of the values.
        reads_strides: whether the result depends on how the input lies in memory.
        out_of_place: whether its in-place form, `name_`, gives the same values and type as `name`.
        only: where the name means this; the functions or the methods of that name are something else.
    """

    name: str
    channels: Channels = "unknown"
    modules: tuple[type[nn.Module], ...] = ()
    aliases: str = ""
    dims: tuple[int, ...] = ()
    memory: Memory = "new"
    identity: bool = False
    training: Argument | None = None
    bounds: tuple[float | Argument, float | Argument] | None = None
    weight: Argument | None = None
    factors: tuple[int, int] | None = None
    is_metadata: bool = False
    reads_strides: bool = False
    out_of_place: bool = True
    only: Literal["", "function", "method"] = ""


def _alike(names: str, channels: Channels = "unknown", **fields: Any) -> tuple[Operation, ...]:
    """Operations of which the same is known."""
    return tuple(Operation(name, channels, **fields) for name in names.split())


def _spatial(kind: str, module: str) -> tuple[Operation, ...]:
    """For one to three spatial dimensions, as far as torch has modules; the functions are called `kind`."""
    classes = {d: getattr(nn, f"{module}{d}d", None) for d in (1, 2, 3)}
    return tuple(Operation(f"{kind}{d}d", "spatial", (cls,), dims=(d + 2,)) for d, cls in classes.items() if cls)


def _weighted(name: str, *modules: type[nn.Module], dims: tuple[int, ...] = ()) -> Operation:
    return Operation(name, "matrix", modules, dims=dims, weight=Argument(1, "weight"))


def _dropout(name: str, module: type[nn.Module] | None, training: Argument) -> Operation:
    modules = () if module is None else (module,)
    return Operation(name, "elementwise", modules, memory="same", identity=True, training=training)


_INF = math.inf
_TRAINING = Argument(2, "training train", True)
_EVAL = Argument(2, "training train", False)

OPERATIONS: tuple[Operation, ...] = (
    # What gives its input.
    Operation("", "elementwise", (nn.Identity,), memory="same", identity=True),
    _dropout("dropout", nn.Dropout, _TRAINING),
    _dropout("dropout1d", nn.Dropout1d, _TRAINING),
    _dropout("dropout2d", nn.Dropout2d, _TRAINING),
    _dropout("dropout3d", nn.Dropout3d, _TRAINING),
    _dropout("feature_dropout", None, _TRAINING),
    _dropout("alpha_dropout", nn.AlphaDropout, _EVAL),
    _dropout("feature_alpha_dropout", nn.FeatureAlphaDropout, _EVAL),
    _dropout("stochastic_depth", None, Argument(3, "training", True)),
    _dropout("drop_block2d", None, Argument(5, "training", True)),
    _dropout("drop_block3d", None, Argument(5, "training", True)),
    Operation("detach", "elementwise", memory="same", identity=True),
    Operation("positive", "elementwise", aliases="pos", memory="same", identity=True),
    Operation("contiguous", "elementwise", memory="view", identity=True),  # The input or a copy.
    Operation("clone", "elementwise", identity=True),
    *_alike("to type type_as float double half bfloat16 cpu cuda", "elementwise", memory="view"),
    *_alike("long int short bool char byte", memory="view"),
    # Activations.
    Operation("relu", "elementwise", (nn.ReLU,), bounds=(0.0, _INF)),
    Operation("relu6", "elementwise", (nn.ReLU6,), bounds=(0.0, 6.0)),
    Operation(
        "hardtanh", "elementwise", (nn.Hardtanh,), bounds=(Argument(1, "min_val", -1.0), Argument(2, "max_val", 1.0))
    ),
    Operation("hardswish", "elementwise", (nn.Hardswish,), bounds=(-3.0, _INF)),
    Operation("hardsigmoid", "elementwise", (nn.Hardsigmoid,), bounds=(-3.0, 3.0)),
    Operation("threshold", "elementwise", (nn.Threshold,), bounds=(Argument(1, "threshold"), _INF)),
    Operation("clamp", "elementwise", aliases="clip", bounds=(Argument(1, "min", -_INF), Argument(2, "max", _INF))),
    Operation("clamp_min", "elementwise", bounds=(Argument(1, "min"), _INF)),
    Operation("clamp_max", "elementwise", bounds=(-_INF, Argument(1, "max"))),
    Operation("leaky_relu", "elementwise", (nn.LeakyReLU,)),
    Operation("rrelu", "elementwise", (nn.RReLU,)),
    Operation("elu", "elementwise", (nn.ELU,)),
    Operation("selu", "elementwise", (nn.SELU,)),
    Operation("celu", "elementwise", (nn.CELU,)),
    Operation("gelu", "elementwise", (nn.GELU,)),
    Operation("silu", "elementwise", (nn.SiLU,)),
    Operation("mish", "elementwise", (nn.Mish,)),
    Operation("hardshrink", "elementwise", (nn.Hardshrink,)),
    Operation("softshrink", "elementwise", (nn.Softshrink,)),
    Operation("tanhshrink", "elementwise", (nn.Tanhshrink,)),
    Operation("sigmoid", "elementwise", (nn.Sigmoid,)),
    Operation("logsigmoid", "elementwise", (nn.LogSigmoid,)),
    Operation("tanh", "elementwise", (nn.Tanh,)),
    Operation("softplus", "elementwise", (nn.Softplus,)),
    Operation("softsign", "elementwise", (nn.Softsign,)),
    *_alike("abs neg exp log sqrt rsqrt square reciprocal erf sin cos", "elementwise"),
    # Arithmetic. The augmented form of `add` is called `iadd`, and so on.
    Operation("add", "binary", aliases="radd iadd"),
    Operation("sub", "binary", aliases="subtract rsub isub"),
    Operation("mul", "binary", aliases="multiply rmul imul"),
    Operation("div", "binary", aliases="divide truediv rtruediv itruediv"),
    Operation("pow", "binary", aliases="rpow ipow"),
    *_alike("maximum minimum", "binary"),
    *_alike("eq ne lt le gt ge less less_equal greater greater_equal not_equal", out_of_place=False),
    *_alike("logical_and logical_or logical_xor logical_not resize resize_as", out_of_place=False),
    # Layers, and products that may read a weight.
    _weighted("linear", nn.Linear),
    _weighted("conv1d", nn.Conv1d, dims=(3,)),
    _weighted("conv2d", nn.Conv2d, dims=(4,)),
    _weighted("conv3d", nn.Conv3d, dims=(5,)),
    _weighted("conv_transpose1d", nn.ConvTranspose1d, dims=(3,)),
    _weighted("conv_transpose2d", nn.ConvTranspose2d, dims=(4,)),
    _weighted("conv_transpose3d", nn.ConvTranspose3d, dims=(5,)),
    Operation("convolution", weight=Argument(1, "weight")),
    Operation("bilinear", modules=(nn.Bilinear,), weight=Argument(2, "weight")),
    Operation("matmul", aliases="rmatmul imatmul", weight=Argument(1, "other"), factors=(0, 1)),
    *_alike("mm bmm", weight=Argument(1, "mat2"), factors=(0, 1)),
    Operation("addmm", weight=Argument(2, "mat2"), factors=(1, 2)),
    Operation("baddbmm", weight=Argument(2, "batch2"), factors=(1, 2)),
    *_alike("mv inner einsum tensordot addmv addbmm multi_dot chain_matmul", weight=Argument(1, "other")),
    # Normalisation, and what else has parameters for each channel.
    Operation("batch_norm", "normalisation"),
    Operation("", "normalisation", (nn.BatchNorm1d,), dims=(2, 3)),
    Operation("", "normalisation", (nn.BatchNorm2d,), dims=(4,)),
    Operation("", "normalisation", (nn.BatchNorm3d,), dims=(5,)),
    Operation("instance_norm", "normalisation"),
    Operation("", "normalisation", (nn.InstanceNorm1d,), dims=(3,)),
    Operation("", "normalisation", (nn.InstanceNorm2d,), dims=(4,)),
    Operation("", "normalisation", (nn.InstanceNorm3d,), dims=(5,)),
    Operation("group_norm", "normalisation", (nn.GroupNorm,)),
    Operation("layer_norm", "normalisation", (nn.LayerNorm,)),
    Operation("prelu", "normalisation", (nn.PReLU,)),
    # Pooling, padding and resizing.
    *_spatial("max_pool", "MaxPool"),
    *_spatial("avg_pool", "AvgPool"),
    *_spatial("lp_pool", "LPPool"),
    *_spatial("adaptive_max_pool", "AdaptiveMaxPool"),
    *_spatial("adaptive_avg_pool", "AdaptiveAvgPool"),
    *_spatial("fractional_max_pool", "FractionalMaxPool"),
    *_spatial("zero_pad", "ZeroPad"),
    *_spatial("reflection_pad", "ReflectionPad"),
    *_spatial("replication_pad", "ReplicationPad"),
    *_spatial("constant_pad", "ConstantPad"),
    *_spatial("circular_pad", "CircularPad"),
    Operation("pad", "pad"),
    *_alike("interpolate", "spatial"),
    Operation("upsample", "spatial", (nn.Upsample,)),
    Operation("upsample_nearest", "spatial", (nn.UpsamplingNearest2d,)),
    Operation("upsample_bilinear", "spatial", (nn.UpsamplingBilinear2d,)),
    *_alike("mean sum amax amin var std", "reduce"),
    # Shapes.
    Operation("flatten", "reshape", (nn.Flatten,), memory="view"),
    Operation("unflatten", "reshape", (nn.Unflatten,), memory="view"),
    *_alike("view reshape ravel squeeze unsqueeze", "reshape", memory="view"),
    *_alike("cat concat concatenate", "concatenate"),
    *_alike("chunk split split_with_sizes tensor_split", "split", memory="views"),
    *_alike("hsplit vsplit dsplit unbind", memory="views"),
    Operation("getitem", "item", memory="view"),
    *_alike(
        "view_as reshape_as transpose t permute swapaxes swapdims movedim moveaxis adjoint expand expand_as broadcast_to "
        "broadcast_tensors narrow select diagonal real imag conj resolve_conj resolve_neg view_as_real view_as_complex "
        "atleast_1d atleast_2d atleast_3d alias",
        memory="view",
    ),
    Operation("unfold", memory="view", only="method"),  # F.unfold copies.
    Operation("as_strided", memory="view", reads_strides=True),
    Operation("set", memory="view", reads_strides=True, out_of_place=False),
    # What is asked of a tensor that is no tensor.
    *_alike("size dim ndimension numel nelement element_size len is_floating_point get_device", is_metadata=True),
    *_alike("stride is_contiguous storage_offset data_ptr", is_metadata=True, reads_strides=True),
)

_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_VIEW_ATTRIBUTE, _OTHER_ATTRIBUTE = Operation("getattr", memory="view"), Operation("getattr", is_metadata=True)

_BY_MODULE = {module: operation for operation in OPERATIONS for module in operation.modules}
_BY_NAME = {name: op for op in OPERATIONS for name in (op.name, *op.aliases.split()) if name}

LAYERS = tuple(module for operation in OPERATIONS if operation.channels == "matrix" for module in operation.modules)
"""Modules that hold a weight matrix for each kernel position: Conv1d to 3d, ConvTranspose1d to 3d, Linear."""

AUGMENTED: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, f"i{name.strip('_')}"): getattr(operator, name)
    for name in "add sub mul matmul truediv floordiv mod pow and_ or_ xor lshift rshift".split()
}
"""`x += y` as torch.fx writes it, operator.iadd, and the operator without the assignment."""

_OURS = frozenset({"torch", "_operator", "builtins", "torchvision", "math"})
# What a subclass may define and still compute what its base does.
_WITHOUT_EFFECT = frozenset(
    "__init__ __module__ __doc__ __qualname__ __annotations__ __annotate__ __annotate_func__ __constants__ __firstlineno__ "
    "__static_attributes__ __parameters__ __repr__ extra_repr".split()
)


def operation_of(node: Node) -> Operation | None:
    """What is known of the operation that a node calls, or None.

    A subclass of a module counts as its base where it only has another `__init__`. Functions count if they are torch's,
    torchvision's or Python's: another one of the same name may do anything.
    """
    module = module_of(node)
    if module is not None:
        return _of_class(type(module))
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr:
        return _VIEW_ATTRIBUTE if node.args[1] in _VIEW_ATTRIBUTES else _OTHER_ATTRIBUTE
    found = _BY_NAME.get(operation_name(node))
    if found is None or (found.only and node.op != f"call_{found.only}"):
        return None
    return found


def _of_class(kind: type[nn.Module]) -> Operation | None:
    for cls in kind.__mro__:
        if cls in _BY_MODULE:
            return _BY_MODULE[cls]
        if not vars(cls).keys() <= _WITHOUT_EFFECT:
            return None
    return None


def called_name(node: Node) -> str:
    """The name of the method or function that a node calls, as it is; "" for other nodes and for nameless functions."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", "")) if node.op == "call_function" else ""


def operation_name(node: Node) -> str:
    """The name of the tensor method, or of the function of torch, that a node calls, without underscores; else ""."""
    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        home = "torch" if str(target).startswith("aten.") else ""
    else:
        home = getattr(target, "__module__", None) or "torch"
    return called_name(node).strip("_") if node.op == "call_method" or home.partition(".")[0] in _OURS else ""


def named_arguments(node: Node) -> dict[str, Any]:
    """What a function of torch, a tensor method or an operator is called with, by name; its tensor is called "input"."""
    target: Any = getattr(node.target, "overloadpacket", node.target)
    if inspect.isfunction(target):
        names = list(inspect.signature(target).parameters)
    else:
        if not isinstance(target, OpOverloadPacket):
            target = getattr(torch.ops.aten, operation_name(node))  # Torch's builtins take what their operators take.
        schema = getattr(target, target.overloads()[0])._schema
        names = ["input" if argument.name == "self" else argument.name for argument in schema.arguments]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def describe(node: Node) -> str:
    """A node and what it calls, for messages."""
    module = module_of(node)
    if module is not None:
        return f"{node.target!r} ({type(module).__name__})"
    return f"{node.name!r} ({operation_name(node) or node.op})"


def is_identity(node: Node) -> bool:
    """Whether a node gives a value equal to its input; dropout and its like do in eval mode."""
    operation = operation_of(node)
    if operation is None or not operation.identity:
        return False
    return operation.training is None or operation.training.of(node) is False


def memory_of(node: Node) -> Memory:
    """How a node's value shares memory with its first input."""
    operation = operation_of(node)
    if operation is None or (operation.memory == "same" and not is_identity(node)):
        return "new"
    return operation.memory


def bounds_of(node: Node) -> tuple[float, float] | None:
    """The bounds outside of which its first input's value makes no difference to what a node gives, if there are any."""
    operation = operation_of(node)
    if operation is None or operation.bounds is None:
        return None
    low, high = (bound.of(node) if isinstance(bound, Argument) else bound for bound in operation.bounds)
    is_known = all(isinstance(bound, (int, float)) for bound in (low, high))
    return (low, high) if is_known and low <= high and (low, high) != (-_INF, _INF) else None


def summands(node: Node) -> tuple[Any, Any] | None:
    """The two operands, nodes or numbers, of a plain add; None for any other node, and for one that scales an operand."""
    operation = operation_of(node)
    if operation is None or operation.name != "add":
        return None
    given = dict(node.kwargs)
    if given.pop("alpha", 1) != 1 or given.pop("out", None) is not None:
        return None
    operands = [*node.args, *(given.pop(name) for name in ("input", "other") if name in given)]
    return (operands[0], operands[1]) if len(operands) == 2 and not given else None


def writes_in_place(node: Node) -> bool:
    """Whether a node is written such that it overwrites its first input: `relu_`, `+=`, `inplace=True`."""
    module = module_of(node)
    if module is not None:
        return getattr(module, "inplace", False) is True
    return is_augmented(node) or has_in_place_name(node) or inplace_argument(node) is not None


def is_augmented(node: Node) -> bool:
    """Whether a node is `+=` or one of its kin, as a function or as a method."""
    name = called_name(node)
    return node.target in AUGMENTED or (node.op == "call_method" and name in AUGMENTED_METHODS)


AUGMENTED_METHODS = {
    f"__{augmented.__name__}__": f"__{plain.__name__.strip('_')}__"
    for augmented, plain in AUGMENTED.items()
    if augmented is not operator.imatmul  # Tensors have none.
}


def has_in_place_name(node: Node) -> bool:
    """Whether a node calls a tensor method or a function whose name ends in one underscore."""
    name = called_name(node)
    if not name.endswith("_") or name.startswith("_") or name.endswith("__") or name == "requires_grad_":
        return False
    return getattr(operator, name, None) is not node.target  # operator.and_ and or_ are pure.


def inplace_argument(node: Node) -> str | int | None:
    """The keyword or the position at which a function is told `inplace=True`, or None."""
    if node.op != "call_function":
        return None
    if node.kwargs.get("inplace") is True:
        return "inplace"
    if not any(argument is True for argument in node.args):
        return None
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except ValueError:
        return None  # A builtin; none of those has an `inplace`.
    position = names.index("inplace") if "inplace" in names[: len(node.args)] else None
    return position if position is not None and node.args[position] is True else None


def any_reads_strides(nodes: Iterable[Node]) -> bool:
    """Whether the value of one of the nodes depends on how its input lies in memory."""
    return any(operation is not None and operation.reads_strides for operation in map(operation_of, nodes))
