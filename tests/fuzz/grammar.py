"""Draws small CNNs: a grammar of what networks contain, with shapes followed on torch's meta device as lines are added."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.network import SCRIPT, Network

WIDTHS = (4, 8, 8, 8, 12, 16, 6, 3, 1)
MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
MAX_NUMBERS = 4096  # Of a value for one image.
MODULES = (
    "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.Hardswish(inplace=True)", "nn.LeakyReLU(0.1, inplace=True)",
    "nn.ReLU6()", "nn.GELU()", "nn.ELU(inplace=True)", "nn.Sigmoid()", "nn.PReLU()", "nn.Identity()", "nn.Dropout(0.2)",
    "nn.Dropout(0.2, inplace=True)", "nn.Hardsigmoid()", "nn.Softplus()", "nn.Mish(inplace=True)",
)  # fmt: skip
CALLS = (
    "F.relu({x})", "F.relu({x}, inplace=True)", "{x}.relu()", "{x}.relu_()", "torch.relu({x})", "F.silu({x})", "{x}.sigmoid()",
    "torch.tanh({x})", "{x}.clamp(-1, 1)", "{x}.clamp_(min=-0.5)", "F.leaky_relu({x}, 0.2)", "F.hardswish({x})",
    "F.dropout({x}, 0.1, training=self.training)", "{x} * 0.5", "{x} + 0.1", "{x} / 2", "-{x}", "{x}.abs()", "{x}.mul_(0.7)",
    "{x}.contiguous()", "{x}.clone()", "F.softmax({x}, dim=1)",
)  # fmt: skip
BINARY = (
    "{x} + {y}", "{x} + {y}", "torch.add({x}, {y})", "torch.add({x}, {y}, alpha=0.5)", "{x}.add({y})", "{x}.add_({y})",
    "{x} * {y}",
    "{x} - {y}", "torch.maximum({x}, {y})", "F.relu({x} + {y})", "F.relu({x} + {y}, inplace=True)",
)  # fmt: skip


class Draw:
    """Short words for what hypothesis draws."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def maybe(self, times: int, of: int = 10) -> bool:
        """True `times` in `of`; False is the simpler."""
        return self.number(0, of - 1) >= of - times


class Builder(Draw):
    """The lines of a module, and the values that they have computed so far (meta tensors of a batch of two)."""

    def __init__(self, draw: Any, dims: int) -> None:
        super().__init__(draw)
        self.dims = dims
        self.init: list[str] = []
        self.forward: list[str] = []
        self.values: dict[str, Tensor] = {}
        self.given: list[str] = []
        self.dead: set[str] = set()  # Overwritten in place under another name.
        self.features: set[str] = set()
        self.space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": nn.Module()}

    @property
    def maps(self) -> list[str]:
        return [name for name, v in self.values.items() if v.dim() == self.dims + 2 and name not in self.dead]

    def last(self, names: list[str]) -> str:
        """One of the values, the newest more often."""
        return str(names[-1] if self.maybe(6) else self.one(*names[::-1]))

    def member(self, text: str, stem: str = "m") -> str:
        """A line `self.<name> = <text>` of __init__; returns "self.<name>"."""
        name = f"{stem}{len(self.init)}"
        with torch.device("meta"):
            value = eval(text, self.space)
        setattr(self.space["self"], name, value.eval() if isinstance(value, nn.Module) else value)
        self.init.append(f"self.{name} = {text}")
        return f"self.{name}"

    def value(self, text: str, feature: str = "") -> str | None:
        """A line `<name> = <text>` of forward; None, and no line, if the value cannot be computed or is too large."""
        name = f"v{len(self.forward)}"
        try:
            with torch.device("meta"):
                result = eval(text, self.space, dict(self.values))
        except (RuntimeError, ValueError, IndexError):
            return None
        if not isinstance(result, Tensor) or not 0 < result[0].numel() <= MAX_NUMBERS:
            return None
        self.forward.append(f"{name} = {text}")
        self.values[name] = result
        if feature:
            self.features.add(feature)
        return name

    def channels(self, x: str) -> int:
        return self.values[x].shape[1]

    def size(self, x: str) -> list[int]:
        return list(self.values[x].shape[2:])


def per_axis(b: Builder, least: int, most: int) -> int | tuple[int, ...]:
    """A number for all axes, or one for each."""
    if b.maybe(3):
        return tuple(b.number(least, most) for _ in range(b.dims))
    return b.number(least, most)


def convolution(b: Builder, channels: int, out: int | None = None) -> tuple[str, int]:
    """The text of a convolution of any kind, and its output channels."""
    out = out or b.one(*WIDTHS)
    groups = 1
    kind = b.one("plain", "plain", "plain", "grouped", "depthwise", "pointwise")
    if kind == "depthwise" and channels > 1:
        groups, out = channels, channels * b.one(1, 1, 2)
    if kind == "grouped":
        groups = b.one(*[g for g in (2, 3, 4, 1) if channels % g == 0 and out % g == 0])
    kernel = 1 if kind == "pointwise" else per_axis(b, 1, 3)
    mode = b.one(*MODES)
    b.features.add(f"{kind} convolution")
    text = f"nn.Conv{b.dims}d({channels}, {out}, {kernel}"
    stride = per_axis(b, 1, 2) if b.maybe(3) else 1
    if stride != 1:
        text += f", stride={stride}"
    padding = b.one("1", "1", "'same'", "0", "'valid'", "2", "axes")
    if padding == "'same'" and stride != 1:
        padding = "1"
    if padding == "axes":
        padding = str(tuple(b.number(0, 2) for _ in range(b.dims)))
    if padding != "0":
        text += f", padding={padding}"
        b.features.add(f"padding {padding}" if padding.startswith("'") else "padding")
    if mode != "zeros":
        text += f", padding_mode={mode!r}"
        b.features.add(mode)
    if b.maybe(2):
        text += f", dilation={per_axis(b, 1, 2)}"
        b.features.add("dilation")
    if groups > 1:
        text += f", groups={groups}"
    if b.maybe(4):
        text += ", bias=False"
    return text + ")", out


def batchnorm(b: Builder, channels: int, dims: int | None = None) -> str:
    """The text of a BatchNorm in one of its states."""
    state = b.one("", "", "", ", affine=False", ", eps=0.1", ", momentum=None", ", track_running_stats=False")
    b.features.add(f"BatchNorm{state}")
    return f"nn.BatchNorm{max(b.dims if dims is None else dims, 1)}d({channels}{state})"


def add_layer(b: Builder) -> None:
    """A convolution, with BatchNorm before or after it and an activation, one by one or as an nn.Sequential."""
    x = b.last(b.maps)
    text, out = convolution(b, b.channels(x))
    pieces = [text]
    if b.maybe(1):
        pieces.insert(0, batchnorm(b, b.channels(x)))
    if b.maybe(6):
        pieces.append(batchnorm(b, out))
    if b.maybe(5):
        pieces.append(b.one(*MODULES))
    if b.maybe(3):
        block = b.member(f"nn.Sequential({', '.join(pieces)})", "block")
        b.value(f"{block}({x})", "nn.Sequential")
        return
    at: str | None = x
    for piece in pieces:
        if at is not None:
            at = b.value(f"{b.member(piece)}({at})")


def add_transposed(b: Builder) -> None:
    x = b.last(b.maps)
    channels, out = b.channels(x), b.one(4, 8, 3)
    groups = b.one(*[g for g in (1, 2, channels) if channels % g == 0 and out % g == 0])
    stride = b.one(1, 2)
    extra = ", output_padding=1" if stride == 2 and b.maybe(3) else ""
    text = f"nn.ConvTranspose{b.dims}d({channels}, {out}, {b.number(1, 3)}, stride={stride}, groups={groups}{extra})"
    at = b.value(f"{b.member(text)}({x})", "transposed convolution")
    if at is not None and b.maybe(5):
        b.value(f"{b.member(batchnorm(b, out))}({at})", "BatchNorm behind a transposed convolution")


def add_activation(b: Builder) -> None:
    x = b.last(list(b.values))
    if b.maybe(5):
        b.value(f"{b.member(b.one(*MODULES), 'act')}({x})")
        return
    call = b.one(*CALLS)
    if ("_(" in call or "inplace" in call) and x in b.given:
        b.features.add("input written in place")
    b.value(call.format(x=x))


def add_binary(b: Builder) -> None:
    """Two values of one shape; made where there are none by a convolution that keeps the size."""
    x = b.last(b.maps)
    same = [n for n in b.maps if b.values[n].shape == b.values[x].shape and n != x]
    if same and b.maybe(7):
        y: str | None = b.one(*same)
    else:
        padding = b.one("padding=1", "padding='same'", "padding=1, bias=False")
        conv = f"nn.Conv{b.dims}d({b.channels(x)}, {b.channels(x)}, 3, {padding})"
        if b.maybe(6):
            conv = f"nn.Sequential({conv}, {batchnorm(b, b.channels(x))})"
        y = b.value(f"{b.member(conv)}({x})")
    if y is None:
        return
    if b.maybe(2):
        target = y if y not in b.given and b.maybe(8) else x
        b.forward.append(f"{target} {b.one('+=', '*=', '-=')} {x if target == y else y}")
        b.features.add("augmented assignment")
        return
    if b.maybe(5):
        x, y = y, x
    b.value(b.one(*BINARY).format(x=x, y=y), "two values joined")


def add_concat(b: Builder) -> None:
    x = b.last(b.maps)
    like = [n for n in b.maps if b.size(n) == b.size(x)]
    parts = [x, *(b.one(*like) for _ in range(b.number(1, 2)))]
    if sum(map(b.channels, parts)) <= 24:
        axis = b.one("1", "dim=1", f"dim={-1 - b.dims}")
        b.value(f"torch.cat({b.one('[{}]', '({})').format(', '.join(parts))}, {axis})", "concat")


def add_split(b: Builder) -> None:
    x = b.last(b.maps)
    channels = b.channels(x)
    if channels < 2:
        return
    cut = b.number(1, channels - 1)
    half = channels // 2
    kind = b.one("chunk", "split", "slice", "index", "select", "unbind", "shuffle", "flip")
    if kind == "chunk" and channels % 2 == 0:
        b.value(f"{x}.chunk(2, dim=1)[{b.number(0, 1)}]", "chunk")
    elif kind == "split":
        b.value(f"torch.split({x}, [{cut}, {channels - cut}], dim=1)[{b.number(0, 1)}]", "split")
    elif kind == "slice":
        b.value(b.one(f"{x}[:, :{cut}]", f"{x}[:, {cut}:]", f"{x}[:, ::2]", f"{x}.narrow(1, 0, {cut})"), "slice")
    elif kind == "index":
        b.value(b.one(f"{x}[..., 1:]", f"{x}[..., ::2]", f"{x}[:, :, :-1]"), "slice of positions")
    elif kind == "select":
        b.value(f"{x}[:, {cut}:{cut + 1}]", "slice")
    elif kind == "flip":
        b.value(b.one(f"{x}.flip(1)", f"torch.roll({x}, 1, 1)", f"{x}.flip(-1)"), "flip")
    elif kind == "shuffle" and channels % 2 == 0:
        sizes = ", ".join(map(str, b.size(x)))
        shape = b.one(f"{x}.shape[0]", f"{x}.size(0)", "-1")
        b.value(f"{x}.reshape({shape}, 2, {half}, {sizes}).transpose(1, 2).flatten(1, 2)", "channel shuffle")


def add_pool(b: Builder) -> None:
    x, d = b.last(b.maps), b.dims
    text = b.one(
        f"nn.MaxPool{d}d(2)", f"nn.MaxPool{d}d(3, 2, 1)", f"nn.AvgPool{d}d(2)", f"nn.AvgPool{d}d(3, 1, 1)",
        f"nn.AvgPool{d}d(3, 2, 1, count_include_pad=False)", f"nn.AdaptiveAvgPool{d}d(2)", f"nn.AdaptiveAvgPool{d}d(1)",
        f"nn.MaxPool{d}d(2, ceil_mode=True)", f"nn.AdaptiveMaxPool{d}d(1)", f"nn.AvgPool{d}d(2, ceil_mode=True)",
    )  # fmt: skip
    if b.maybe(3):
        b.value(b.one(f"F.max_pool{d}d({x}, 2)", f"F.avg_pool{d}d({x}, 2)", f"F.adaptive_avg_pool{d}d({x}, 1)"), "pool")
    else:
        b.value(f"{b.member(text, 'pool')}({x})", "pool")


def add_squeeze_excitation(b: Builder) -> None:
    x = b.last(b.maps)
    c, d = b.channels(x), b.dims
    axes = tuple(range(2, 2 + d))
    act = b.one("nn.ReLU(inplace=True)", "nn.SiLU()", "nn.ReLU()")
    gate = b.one("nn.Sigmoid()", "nn.Hardsigmoid()")
    if b.maybe(5):
        small = b.value(f"{x}.mean({axes}, keepdim=True)")
        net = b.member(f"nn.Sequential(nn.Conv{d}d({c}, 4, 1), {act}, nn.Conv{d}d(4, {c}, 1), {gate})", "se")
        b.value(b.one(f"{x} * {net}({small})", f"{net}({small}) * {x}"), "squeeze and excitation")
    else:
        net = b.member(f"nn.Sequential(nn.Linear({c}, 8), {act}, nn.Linear(8, {c}), {gate})", "se")
        ones = ", 1" * d
        b.value(f"{x} * {net}({x}.mean({axes})).view(-1, {c}{ones})", "squeeze and excitation")


def add_resize(b: Builder) -> None:
    x, d = b.last(b.maps), b.dims
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
    options = [
        f"F.interpolate({x}, scale_factor=2)", f"F.interpolate({x}, scale_factor=2, mode={linear!r}, align_corners=False)",
        f"F.pad({x}, (1, 0))", f"F.pad({x}, (1, 2), value=0.5)", f"F.interpolate({x}, size={tuple(b.size(x))})",
    ]  # fmt: skip
    if d == 2 and b.channels(x) % 4 == 0:
        options += [f"F.pixel_shuffle({x}, 2)", f"F.pad({x}, (1, 1, 1, 1), mode='reflect')"]
    if d == 2 and b.maybe(3):
        options = [f"F.pixel_unshuffle({x}, 2)", f"{x}.transpose(2, 3)", f"{x}.permute(0, 1, 3, 2)"]
    b.value(b.one(*options), "resized or padded")


def add_shared(b: Builder) -> None:
    """One convolution called twice, or two with one weight."""
    x = b.last(b.maps)
    c = b.channels(x)
    conv = b.member(f"nn.Conv{b.dims}d({c}, {c}, 3, padding=1)", "shared")
    at: str | None
    if b.maybe(5):
        at = b.value(f"{conv}({x})", "shared layer")
        b.value(f"{conv}({at})")
        return
    other = b.member(f"nn.Conv{b.dims}d({c}, {c}, 3, padding=1)", "tied")
    b.init.append(f"{other}.weight = {conv}.weight")
    at = b.value(f"{conv}({x})", "tied weight")
    b.value(f"{other}({at})")


def recurrent(b: Builder, channels: int) -> tuple[str, bool]:
    """A recurrent layer of any kind: its name in the forward, and whether the batch comes first."""
    kind = b.one("LSTM", "LSTM", "GRU", "RNN")
    hidden, ways, layers = b.one(4, 8, 8, 6), b.one(1, 1, 2), b.one(1, 1, 2)
    first = b.maybe(6)
    settings = [str(channels), str(hidden)]
    settings += [f"num_layers={layers}"] if layers > 1 else []
    settings += ["bidirectional=True"] if ways > 1 else []
    settings += ["batch_first=True"] if first else []
    settings += ["bias=False"] if b.maybe(1) else []
    settings += ["nonlinearity='relu'"] if kind == "RNN" and b.maybe(4) else []
    if kind == "LSTM" and hidden > 4 and b.maybe(2):
        settings.append("proj_size=4")
    b.features.add(f"{kind}{', both ways' if ways > 1 else ''}{', batch first' if first else ''}")
    return b.member(f"nn.{kind}({', '.join(settings)})", "rnn"), first


def sequence(b: Builder, x: str, first: bool) -> str:
    """Positions of a map as time steps: (N, T, C), or (T, N, C)."""
    flat = x if b.dims == 1 else f"{x}.flatten(2)"
    if first:
        return b.one(f"{flat}.transpose(1, 2)", f"{flat}.permute(0, 2, 1)")
    return str(b.one(f"{flat}.permute(2, 0, 1)", f"{flat}.transpose(1, 2).transpose(0, 1)"))


def add_recurrent(b: Builder) -> None:
    """A recurrent layer over the positions of a map, and its outputs as a map again."""
    x = b.last(b.maps)
    layer, first = recurrent(b, b.channels(x))
    size = b.size(x)
    y = b.value(f"{layer}({sequence(b, x, first)})[0]", "recurrent layer")
    if y is None:
        return
    back = f"{y}.transpose(1, 2)" if first else f"{y}.permute(1, 2, 0)"
    b.value(back if b.dims == 1 else f"{back}.unflatten(2, {tuple(size)})")


def last_state(b: Builder, x: str) -> str | None:
    """From a map to a vector, by a recurrent layer: its last step, the mean of all, or its state."""
    layer, first = recurrent(b, b.channels(x))
    call = f"{layer}({sequence(b, x, first)})"
    steps = 1 if first else 0
    state = f"{call}[1][0]" if "nn.LSTM" in b.init[-1] else f"{call}[1]"
    return b.value(
        b.one(f"{call}[0][:, -1]" if first else f"{call}[0][-1]", f"{call}[0].mean({steps})", f"{state}[-1]"),
        "recurrent layer in the head",
    )


def add_odd(b: Builder) -> None:
    """What else may stand in a forward."""
    x = b.last(b.maps)
    c, d = b.channels(x), b.dims
    ones = ", 1" * d
    kind = b.one(
        "scale", "functional", "groupnorm", "unused", "dead", "constant", "layernorm", "buffer", "parametrized", "linear"
    )  # fmt: skip
    if kind == "scale":
        b.value(f"{x} * {b.member(f'nn.Parameter(torch.rand({c}{ones}))', 'scale')}", "parameter")
    elif kind == "functional":
        weight = b.member(f"nn.Parameter(torch.randn(4, {c}{', 3' * d}) / 4)", "kernel")
        b.value(f"F.conv{d}d({x}, {weight}, padding=1)", "functional convolution")
    elif kind == "groupnorm":
        b.value(f"{b.member(f'nn.GroupNorm(1, {c})', 'norm')}({x})", "GroupNorm")
    elif kind == "unused":
        b.member(f"nn.Conv{d}d(4, 4, 1)", "unused")
        b.features.add("module that is never called")
    elif kind == "dead":
        name = b.value(f"{b.member(f'nn.Conv{d}d({c}, 4, 1)', 'dead')}({x})", "value that nobody reads")
        if name:
            b.dead.add(name)
    elif kind == "constant":
        b.value(b.one(f"{x} + torch.ones({c}{ones})", f"torch.where({x} > 0, {x}, 0.1 * {x})", f"{x} ** 2"), "constant")
    elif kind == "layernorm":
        order = ", ".join(map(str, [0, *range(2, d + 2), 1]))
        back = ", ".join(map(str, [0, d + 1, *range(1, d + 1)]))
        norm = b.member(f"nn.LayerNorm({c})", "norm")
        b.value(f"{norm}({x}.permute({order})).permute({back})", "LayerNorm")
    elif kind == "buffer":
        b.init.append(f"self.register_buffer('mean{len(b.init)}', torch.randn({c}{ones}))")
        name = b.init[-1].split("'")[1]
        b.space["self"].register_buffer(name, torch.empty(c, *[1] * d, device="meta"))
        b.value(f"{x} - self.{name}", "buffer")
    elif kind == "parametrized":
        norm = b.one("nn.utils.parametrizations.weight_norm", "nn.utils.parametrizations.spectral_norm")
        member = b.member(f"nn.Conv{d}d({c}, 4, 1)", "normed")
        b.init.append(f"{norm}({member})")
        b.value(f"{member}({x})", "parametrized")
    else:
        order = ", ".join(map(str, [0, *range(2, d + 2), 1]))
        back = ", ".join(map(str, [0, d + 1, *range(1, d + 1)]))
        b.value(
            f"{b.member(f'nn.Linear({c}, 8)', 'linear')}({x}.permute({order})).permute({back})",
            "Linear on channels last",
        )


def head(b: Builder, x: str) -> str:
    """From feature maps to classes, or other numbers."""
    axes = tuple(range(2, 2 + b.dims))
    flat = last_state(b, x) if b.maybe(2) else None
    if flat is None and math.prod(b.values[x].shape[1:]) <= 256 and b.maybe(5):
        flat = b.value(
            b.one(f"{x}.flatten(1)", f"torch.flatten({x}, 1)", f"{x}.view({x}.size(0), -1)", f"{b.member('nn.Flatten()')}({x})",
                  f"{x}.reshape({x}.shape[0], -1)"), "flatten",
        )  # fmt: skip
    if flat is None:
        pool = f"nn.AdaptiveAvgPool{b.dims}d(1)"
        flat = b.value(
            b.one(f"{x}.mean({axes})", f"{x}.amax({axes})", f"{b.member(pool, 'pool')}({x}).flatten(1)"), "mean"
        )
    assert flat is not None
    if b.maybe(5):
        hidden = b.value(f"{b.member(f'nn.Linear({b.channels(flat)}, 8)', 'fc')}({flat})")
        assert hidden is not None
        flat = hidden
        if b.maybe(4):
            flat = b.value(f"{b.member(batchnorm(b, 8, 1), 'bn')}({flat})") or flat
        flat = b.value(f"{b.member(b.one(*MODULES), 'act')}({flat})") or flat
    result = b.value(f"{b.member(f'nn.Linear({b.channels(flat)}, {b.one(10, 4, 2, 1)})', 'fc')}({flat})")
    assert result is not None
    if b.maybe(4):  # Boxes, embeddings, labels, probabilities, and sure classes.
        result = b.value(
            b.one("torch.sigmoid({x})", "F.normalize({x}, dim=1)", "100 * {x} + 50", "F.softmax({x}, dim=1)", "{x}.tanh()",
                  "{x}.relu()", "20 * {x}", "F.log_softmax({x}, dim=1)").format(x=result), "head that puts out no logits"
        ) or result  # fmt: skip
    return result


def dense_head(b: Builder, x: str) -> str:
    """From a feature map to a number, or a few, at each position: a mask, a depth map, a heat map."""
    result = b.value(f"{b.member(f'nn.Conv{b.dims}d({b.channels(x)}, {b.one(1, 1, 5)}, 1)', 'mask')}({x})") or x
    return (
        b.value(
            b.one("torch.sigmoid({x})", "F.interpolate({x}, scale_factor=2)", "{x}.flatten(2).softmax(-1)", "{x}.squeeze(1)")
            .format(x=result), "number at each position",
        ) or result
    )  # fmt: skip


OPERATIONS: tuple[tuple[int, Callable[[Builder], None]], ...] = (
    (10, add_layer), (4, add_activation), (4, add_binary), (2, add_concat), (2, add_split), (2, add_pool), (1, add_transposed),
    (2, add_squeeze_excitation), (1, add_resize), (1, add_shared), (2, add_odd), (2, add_recurrent),
)  # fmt: skip


@st.composite
def networks(draw: Any) -> Network:
    """A network with its calibration set."""
    d = Draw(draw)
    dims = d.one(2, 2, 2, 2, 1, 3)
    b = Builder(draw, dims)
    side = {1: (8, 16), 2: (5, 10), 3: (4, 5)}[dims]
    names = ["x"] if d.maybe(8) else ["x", "y"]
    shapes = []
    for name in names:
        size = [d.number(*side) for _ in range(dims)]
        size = size if d.maybe(3) else size[:1] * dims
        shapes.append((d.one(3, 4, 1, 8), *size))
        b.values[name] = torch.empty(2, *shapes[-1], device="meta")
        b.given.append(name)
    if len(names) == 2:  # Both are read.
        stems = [b.member(f"nn.Conv{dims}d({shape[0]}, 4, 1)", "stem") for shape in shapes]
        joined = [b.value(f"{stem}({n})") for stem, n in zip(stems, names, strict=True)]
        pooled = [b.value(f"F.adaptive_avg_pool{dims}d({n}, 4)") for n in joined]
        b.value(f"torch.cat([{pooled[0]}, {pooled[1]}], 1)", "two inputs")
    add_layer(b)
    for _ in range(d.number(1, 7)):
        d.one(*[add for weight, add in OPERATIONS for _ in range(weight)])(b)
    if not any("Conv" in line for line in b.init):
        add_layer(b)
    outputs = _outputs(b)
    values = [_images(d, shape, dims, b) for shape in shapes]
    dtype = d.one(*["torch.float32"] * 9, "torch.float64", "torch.float64", "torch.float16")
    if dtype != "torch.float32":
        b.features.add(dtype)
        values = [f"{text}.to({dtype})" for text in values]
    last = ".to(memory_format=torch.channels_last)" if dims == 2 and d.maybe(1) else ""
    finish = f"{d.one('eval()', 'eval()', 'train()')}{last}"
    if last:
        b.features.add("model in channels last")
    training = d.one(2, 2, 0)
    script = SCRIPT.format(
        init="\n".join(f"        {line}" for line in b.init),
        arguments=", ".join(names),
        forward="\n".join(f"        {line}" for line in [*b.forward, f"return {outputs}"]),
        images=f"({', '.join(values)},)",
        seed=d.number(0, 999),
        gamma=d.one(0.5, 0.5, -1.0),
        training_steps=training,
        finish=finish if dtype == "torch.float32" else f"to({dtype}).{finish}",
        batch=_batch(d, names, b),
        sizes=_sizes(d, b),
    )
    if dtype != "torch.float32":  # Training needs images of its type.
        script = script.replace("    net = Net()", f"    net = Net().to({dtype})")
    return Network(script, tuple(names), frozenset(b.features))


def _outputs(b: Builder) -> str:
    x = b.last(b.maps)
    kind = b.one("head", "head", "head", "map", "dense", "tuple", "dict", "list", "nested")
    if kind == "dense":
        return dense_head(b, x)
    if kind == "map":
        b.features.add("feature map as output")
        return x
    result = head(b, x)
    if kind == "head":
        return result
    b.features.add(f"output: {kind}")
    other = b.last(b.maps)
    return {
        "tuple": f"({result}, {other})",
        "dict": f"{{'out': {result}, 'aux': {other}}}",
        "list": f"[{result}, {other}]",
        "nested": f"{{'out': ({result}, {other})}}",
    }[kind]


def _images(d: Draw, shape: tuple[int, ...], dims: int, b: Builder) -> str:
    kind = d.one("plain", "plain", "offset", "positive", "channels last", "permuted")
    sizes = ", ".join(map(str, shape))
    if kind == "offset":
        return f"(torch.randn(n, {sizes}, generator=g) * 0.3 + 5)"
    if kind == "positive":
        return f"torch.rand(n, {sizes}, generator=g)"
    if kind == "channels last" and dims == 2:
        b.features.add("images in channels last")
        return f"torch.randn(n, {sizes}, generator=g).contiguous(memory_format=torch.channels_last)"
    if kind == "permuted":
        b.features.add("images permuted")
        last = ", ".join(map(str, (*shape[1:], shape[0])))
        order = ", ".join(map(str, (0, dims + 1, *range(1, dims + 1))))
        return f"torch.randn(n, {last}, generator=g).permute({order})"
    return f"torch.randn(n, {sizes}, generator=g)"


def _batch(d: Draw, names: list[str], b: Builder) -> str:
    forms = ["x[0]", "(x[0], torch.arange(len(x[0])))", "[x[0]]"] if len(names) == 1 else ["x", "list(x)"]
    forms.append("{" + ", ".join(f"{name!r}: x[{i}]" for i, name in enumerate(names)) + "}")
    return str(d.one(*forms))


def _sizes(d: Draw, b: Builder) -> list[int]:
    kind = d.one("even", "short last", "single", "one batch", "any")
    b.features.add(f"batches: {kind}")
    size = d.number(2, 24)
    if kind == "even":
        return [size] * d.number(1, 4)
    if kind == "short last":
        return [size] * d.number(1, 3) + [d.number(1, size)]
    if kind == "single":
        return [1] * d.number(2, 12)
    if kind == "one batch":
        return [d.number(8, 80)]
    return [d.number(1, 40) for _ in range(d.number(2, 5))]
