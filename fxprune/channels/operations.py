"""What torch's modules and functions do to channels, by exact type and by name."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from fxprune.graph import module_of

_POOLS_AND_PADS = (
    "MaxPool LPPool AvgPool AdaptiveMaxPool AdaptiveAvgPool FractionalMaxPool "
    "ZeroPad ReflectionPad ReplicationPad ConstantPad CircularPad"
)
SPATIAL_MODULES = {
    getattr(nn, f"{kind}{d}d"): d + 2
    for kind in _POOLS_AND_PADS.split()
    for d in (1, 2, 3)
    if hasattr(nn, f"{kind}{d}d")
}  # type: dict[type[nn.Module], int]
"""Modules that act on each channel of (N, C, *spatial) alone, with the number of dimensions they take."""

SPATIAL_FUNCTIONS = {
    f"{kind}_pool{d}d": d + 2 for kind in "max avg lp adaptive_max adaptive_avg".split() for d in (1, 2, 3)
}
RESIZES = frozenset("interpolate upsample upsample_nearest upsample_bilinear".split())
RESIZE_MODULES = frozenset({nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d})

ELEMENTWISE_MODULES = frozenset(
    {
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
        nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh,
        nn.Softplus, nn.Softsign, nn.Threshold,
    }
)  # type: frozenset[type[nn.Module]]  # fmt: skip
ELEMENTWISE = frozenset(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh hardshrink softshrink "
    "tanhshrink sigmoid logsigmoid tanh softplus softsign threshold dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout stochastic_depth abs neg exp log sqrt rsqrt square reciprocal erf sin cos clamp clip "
    "clamp_min clamp_max contiguous detach clone to float double half bfloat16 type_as positive".split()
)
BINARY = frozenset(
    "add sub subtract mul multiply div divide truediv pow maximum minimum radd rsub rmul rtruediv rpow iadd isub imul "
    "itruediv".split()
)
RESHAPES = frozenset("flatten view reshape squeeze unsqueeze unflatten".split())
RESHAPE_MODULES = frozenset({nn.Flatten, nn.Unflatten})
REDUCTIONS = frozenset("mean sum amax amin var std".split())
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
SPLITS = frozenset("chunk split split_with_sizes tensor_split".split())
METADATA = frozenset("getattr size dim ndimension numel nelement stride element_size".split())

BATCH_NORMS = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,),
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,),
}  # type: dict[type[nn.Module], tuple[int, ...]]  # fmt: skip
"""Normalisation of each channel of dimension 1 alone, with the numbers of dimensions taken."""

VECTORS = ("weight", "bias", "running_mean", "running_var")
"""Parameters and buffers of one value a channel."""
VECTOR_MODULES = frozenset({*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.PReLU})
"""Modules whose parameters and buffers, where they have more than one value, have one a channel."""
MATRIX_MODULES = {
    nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # type: dict[type[nn.Module], int]  # fmt: skip
"""Layers with a weight matrix for each kernel position, with the number of spatial dimensions."""

_TRUSTED = frozenset({"torch", "_operator", "builtins", "torchvision", "math"})


def called_name(node: Node) -> str:
    """The name of the tensor method, or of the function of torch, that a node calls, without underscores; else ""."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    root = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return getattr(node.target, "__name__", "").strip("_") if node.op == "call_function" and root in _TRUSTED else ""


def describe(node: Node) -> str:
    """A node and what it calls, for messages."""
    module = module_of(node)
    what = called_name(node) or node.op if module is None else type(module).__name__
    return f"{node.target!r} ({what})" if module is not None else f"{node.name!r} ({what})"
