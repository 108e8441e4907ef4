"""Symbolic tracing that remembers where it is, so that a failure can be placed."""

from __future__ import annotations

import operator
import os
import re
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy, Tracer

from fxprune.layers.recurrent import Recurrent
from fxprune.operations import AUGMENTED

# torch's own modules that only call others; with torch's fused path for transformers switched off they can be traced.
TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip
INPLACE = tuple(function for function in AUGMENTED if function is not operator.imatmul)
_HERE = Path(__file__).parent
_OWN_PROXIES = re.compile(r"\b(InplaceProxy|ValueProxy|ValueAttribute)\b")
# With the separator: torchvision lies beside torch.
_NOT_THE_USERS_CODE = (f"{Path(torch.__file__).parent}{os.sep}", f"{_HERE}{os.sep}", str(_HERE.parent / "tracing.py"))


class PathTracer(Tracer):
    """A tracer that remembers which modules it went into, so that a failure can be placed.

    Args:
        leaves: modules to call as a whole.
        given: arguments of `forward` that are inputs even if they have a default.
        into: classes of torch.nn to trace into rather than to call as a whole.
    """

    def __init__(
        self, leaves: Collection[str] = (), given: Collection[str] = (), into: tuple[type[nn.Module], ...] = ()
    ) -> None:
        super().__init__()
        self.leaves = leaves
        self.given = given
        self.into = into
        self.path: list[str] = []
        self.entered: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called as a whole."""
        if module_qualified_name in self.leaves:
            return True
        if isinstance(m, Recurrent):  # Of a model that was compiled before.
            return True
        return type(m) not in self.into and super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        """A proxy for a node."""
        return InplaceProxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the arguments of forward, but for those that nobody gives."""
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return root_fn, [self._own_default(arg, first=i == 1) for i, arg in enumerate(args)]

    def _own_default(self, arg: Any, *, first: bool) -> Any:
        """The default of an argument that nobody gives, in place of its placeholder."""
        if not isinstance(arg, Proxy):
            return arg
        target = str(arg.node.target)
        name = target.lstrip("*")
        if name in self.given or (first and name != target):  # The images of forward(*images).
            return arg
        if name != target:
            default: Any = {} if target.startswith("**") else ()
        elif not arg.node.args or not isinstance(arg.node.args[0], (bool, int, float, str, type(None))):
            return arg
        else:
            default = arg.node.args[0]
        self.graph.erase_node(arg.node)
        return default

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As torch.fx, remembering the place."""
        self.path.append(self.path_of_module(m))
        if not self.is_leaf_module(m, self.path[-1]):
            self.entered.append(self.path[-1])
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # Not in a finally: after a failure the path says where it was.
        return result


class InplaceProxy(Proxy):
    """A proxy under which `x += y` is recorded as the in-place operation it is.

    torch.fx's own has no `__iadd__`, so Python falls back to `x = x + y`, and another name of x keeps its old value.
    """


def _record_inplace(function: Callable[[Any, Any], Any]) -> None:
    name = function.__name__  # "iadd"

    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name=name.rstrip("_")[1:])

    setattr(InplaceProxy, f"__{name}__", record)


for _function in INPLACE:
    _record_inplace(_function)


def users_line(frames: traceback.StackSummary) -> str:
    """The innermost line of the user's own code, as "file:line ("text")", or ""."""
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS_CODE) and "<eval_with_key>" not in f.filename]
    return f'{own[-1].filename}:{own[-1].lineno} ("{own[-1].line}")' if own else ""


def explain(model: nn.Module, tracer: PathTracer, error: Exception) -> str:
    """The sentence a user reads after a failed trace."""
    place = f"module {tracer.path[-1]!r}" if tracer.path else "the model's own forward"
    kind = type(model.get_submodule(tracer.path[-1])).__name__ if tracer.path else type(model).__name__
    line = users_line(traceback.extract_tb(error.__traceback__))
    line = f" at {line}" if line else ""
    remedy = (
        f"Compile with exclude=({tracer.path[-1]!r},) to keep that module whole as a leaf"
        if tracer.path
        else "Move that part into a submodule and name it in exclude to keep it whole as a leaf"
    )
    problem = _OWN_PROXIES.sub("a torch.fx Proxy, which stands for a tensor", str(error).rstrip("."))
    return (
        f"torch.fx could not trace {type(model).__name__}: it stopped in {place} ({kind}){line}: {problem}. "
        f"{remedy}, or rewrite the line without control flow that depends on tensor values."
    )
