"""Model -> GraphModule: a traced copy in eval mode, or an error that says where tracing stopped and how to go on."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from fxprune.errors import FxPruneError, TraceError

_NOT_THE_USERS_CODE = (str(Path(torch.__file__).parent), __file__)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name, or that of a module around it, matches one of the names or fnmatch patterns."""
    parts = name.split(".")
    enclosing = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in enclosing)


def trace(model: nn.Module, *, exclude: Sequence[str] = ()) -> GraphModule:
    """Copy a model, put the copy in eval mode and trace it symbolically.

    The user's model is not modified: neither its weights nor its training flags nor its device.

    Args:
        model: any module that torch.fx can trace; a GraphModule may be traced again.
        exclude: module names or fnmatch patterns. An excluded module that cannot be traced becomes a leaf: it is
            called as a whole, and nothing inside it is changed.

    Raises:
        TraceError: names the module and the source line where tracing stopped, and the remedy.
        FxPruneError: if a name in `exclude` matches no module.
    """
    check_exclude(model, exclude)
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxprune works on a copy only. Detach what the model "
            "holds besides parameters and buffers (hooks with closures, generators, open files) before compiling."
        ) from error
    leaves: set[str] = set()
    while True:
        tracer = _PathTracer(leaves)
        try:
            graph = tracer.trace(model)
            return GraphModule(model, graph, type(model).__name__)
        except Exception as error:
            excluded = [path for path in tracer.path if path not in leaves and matches(path, exclude)]
            if not excluded:
                raise TraceError(_explain(model, tracer, error)) from error
            leaves.add(excluded[0])


def check_exclude(model: nn.Module, exclude: Sequence[str]) -> None:
    """Raise FxPruneError for a pattern that matches no module: most likely a misspelt name."""
    if isinstance(exclude, str):
        raise FxPruneError(f"exclude takes a sequence of names; write exclude=({exclude!r},)")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise FxPruneError(
                f"exclude: {pattern!r} matches no module of {type(model).__name__}; "
                f"names look like {', '.join(map(repr, names[:5]))}"
            )


class _PathTracer(Tracer):
    """A tracer that remembers which modules it is inside of, so that a failure can be placed."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # Not in a finally: after a failure the path says where it was.
        return result


def _explain(model: nn.Module, tracer: _PathTracer, error: Exception) -> str:
    """The sentence a user reads after a failed trace."""
    place = f"module {tracer.path[-1]!r}" if tracer.path else "the model's own forward"
    kind = type(model.get_submodule(tracer.path[-1])).__name__ if tracer.path else type(model).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS_CODE)]
    line = f' at {frames[-1].filename}:{frames[-1].lineno} ("{frames[-1].line}")' if frames else ""
    remedy = (
        f"Compile with exclude=({tracer.path[-1]!r},) to keep that module whole as a leaf"
        if tracer.path
        else "Move that part into a submodule and name it in exclude to keep it whole as a leaf"
    )
    return (
        f"torch.fx could not trace {type(model).__name__}: it stopped in {place} ({kind}){line}: {error} "
        f"{remedy}, or rewrite the line without control flow that depends on tensor values."
    )
