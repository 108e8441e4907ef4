"""Names for modules, weights and inputs, made of those in the file.

1. A layer whose weight is stored as "layer1.0.conv1.weight", or "conv2d_0.w_0", is called "layer1.0.conv1", or "conv2d_0".
2. Else it has the node's name if that is a path: "/layer1/layer1.0/conv1/Conv", as torch's older exporter writes it, is
   "layer1.0.conv1", and "model/block1/Conv2D" is "model.block1".
3. Else it is called after its bias, "layer1.0.conv1.bias", after its node, its weight, or its operator.

What is neither a letter, a digit nor an underscore becomes an underscore.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto

from fxprune.graph.code_names import RESERVED

_WEIGHT = re.compile(r"(weight|kernel|gamma|scale|w)(_?\d*|_quantized|_transposed)?", re.IGNORECASE)
_BIAS = re.compile(r"(bias|beta|b)(_?\d*)?", re.IGNORECASE)
# How the last part of a node's name tells its operator; tf2onnx writes TensorFlow's.
_OPERATORS = re.compile(
    r"(conv\w*|depthwise\w*|separable\w*|matmul\w*|gemm\w*|linear|batchnorm\w*|fusedbatchnorm\w*|biasadd\w*|prelu\w*"
    r"|\w*normalization\w*|lstm|gru|rnn)",
    re.IGNORECASE,
)


def layer_names(node: NodeProto, weight: str, bias: str = "") -> list[str]:
    """Dotted names for a layer, by its weight, its bias and its node, the best first; see the file's docstring.

    Several layers may be called after one weight, since some exporters store equal tensors once.
    """
    by_weight, by_bias = (_stem(name, pattern) for name, pattern in ((weight, _WEIGHT), (bias, _BIAS)))
    parts = _path(node.name)
    last = re.sub(r"(_+\d+)+$", "", parts[-1].rpartition(".")[2]) if parts else ""
    if len(parts) > 1 and (last.lower() == node.op_type.lower() or _OPERATORS.fullmatch(last)):
        parts.pop()
    by_node = clean(".".join(parts))
    # A node's name that is a path says where it is; other names are mostly counted up.
    by_node, by_bias = (by_node, by_bias) if "/" in node.name else (by_bias, by_node)
    stored = "" if node.name or weight.isdigit() else clean(weight)
    return [*filter(None, (by_weight, by_node, by_bias, stored)), node.op_type.lower()]


def _stem(name: str, pattern: re.Pattern[str]) -> str:
    """What a weight's name says about its layer; "" if it ends in another way."""
    stem, _, last = name.rpartition(".")
    return clean(stem) if stem and "::" not in name and pattern.fullmatch(last) else ""


def _path(name: str) -> list[str]:
    """The parts of a node's name, without those that the next one repeats: "/layer1/layer1.0/conv1" is layer1.0, conv1."""
    path: list[str] = []
    for part in filter(None, name.split("/")):
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return path


def clean(name: str) -> str:
    """A dotted path of words; "" if nothing is left."""
    words = [re.sub(r"\W+", "_", part).strip("_") for part in name.split(".")]
    return ".".join(word for word in words if word)


def node_name(name: str) -> str:
    """For a node of the graph; torch.fx adds a number where it is taken."""
    word = clean(".".join(_path(name))).replace(".", "_")
    return f"_{word}" if word[:1].isdigit() else word


def input_name(name: str, number: int) -> str:
    """For an argument of forward, an identifier."""
    word = node_name(name) or f"input_{number}"
    word = f"input{word}" if word.startswith("_") and word[1:2].isdigit() else word
    return f"{word}_" if keyword.iskeyword(word) or word in ("self", "cls") else word


@dataclass
class Names:
    """Names that are taken, each once, and none inside a layer.

    Attributes:
        kept: names that no weight may have: those of the file's inputs and outputs.
    """

    kept: frozenset[str] = frozenset()
    _layers: set[str] = field(default_factory=set)
    _around: set[str] = field(default_factory=set)

    def reserve(self, weights: Iterable[str]) -> None:
        """Keep the names that the file's weights give to what is around their layers: no layer is called so."""
        for weight in weights:
            self._around.update(_enclosing(_stem(weight, _WEIGHT) or _stem(weight, _BIAS)))

    def layer(self, wanted: Sequence[str], kind: str) -> str:
        """The first of these names that is free, for a module; what is around others becomes the name of its kind in it."""
        alone = [name for name in wanted if name not in self._around]
        inside = [f"{name}.{kind.lower()}" for name in wanted if name in self._around]
        names = [*alone[:-1], *inside, *alone[-1:]]  # the operator's name last
        return self._take(next((name for name in names if name not in self._layers), names[0]), lambda name: False)

    def weight(self, name: str) -> str:
        """A free name for a parameter or buffer like this one."""
        return self._take(clean(name) or "constant", lambda found: found in self.kept)

    def _take(self, path: str, is_kept: Callable[[str], bool]) -> str:
        first, _, rest = path.partition(".")
        if first in RESERVED or keyword.iskeyword(first):
            path = f"{first}_.{rest}" if rest else f"{first}_"
        if any(inside in self._layers for inside in _enclosing(path)):
            path = path.replace(".", "_")
        found, number = path, 2
        while found in self._layers or found in self._around or is_kept(found):
            found, number = f"{path}_{number}", number + 1
        self._layers.add(found)
        self._around.update(_enclosing(found))
        return found


def _enclosing(path: str) -> Iterable[str]:
    return [path[:i] for i, c in enumerate(path) if c == "."]
