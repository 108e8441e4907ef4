"""Model -> GraphModule: a traced copy in eval mode, or an error that says where tracing stopped and how to go on."""

from __future__ import annotations

import copy
import operator
import traceback
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Proxy, Tracer
from torch.nn.parameter import is_lazy

from fxprune.calibration.batches import names_in
from fxprune.errors import OptionsError, TraceError
from fxprune.graph.code_names import allow_any_name, refuse_reserved_names
from fxprune.graph.model_argument import not_a_model
from fxprune.layers.zero_keeper import let_go
from fxprune.trace_check import difference

_NOT_THE_USERS_CODE = (str(Path(torch.__file__).parent), __file__)
_INPLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
)  # fmt: skip


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name, or that of a module around it, matches one of the names or fnmatch patterns."""
    parts = name.split(".")
    enclosing = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in enclosing)


def trace(model: nn.Module, *, exclude: Sequence[str] = (), example: Any = None) -> GraphModule:
    """Copy a model, put the copy in eval mode and trace it symbolically.

    The user's model is not modified: neither its weights nor its training flags nor its device. Arguments of `forward`
    that have a plain default (None, a number, a string) keep it, unless the example gives them.

    Args:
        model: any module that torch.fx can trace; a GraphModule may be traced again.
        exclude: module names or fnmatch patterns. An excluded module that cannot be traced, or that is traced wrongly,
            becomes a leaf: it is called as a whole, and nothing inside it is changed.
        example: a batch as a calibration loader gives it; with one, the traced graph is compared with the model on it.

    Raises:
        TraceError: names the module and the source line where tracing stopped, and the remedy; or says that the graph
            does not compute what the model does.
        OptionsError: if a name in `exclude` matches no module.
    """
    model = _copied(_usable(model, exclude))
    leaves: set[str] = set()
    cause: Exception | None
    given = names_in(example)
    while True:
        tracer = _PathTracer(leaves, given)
        try:
            graph = allow_any_name(tracer.trace(model))
            graph_module = GraphModule(model, graph, type(model).__name__).eval()
        except TraceError:
            raise
        except Exception as error:
            stopped_in, problem, cause = tracer.path, _explain(model, tracer, error), error
        else:
            wrong = None if example is None else difference(model, graph_module, example)
            if wrong is None:
                return graph_module
            stopped_in, problem, cause = tracer.entered, wrong, None
        excluded = [path for path in stopped_in if path not in leaves and matches(path, exclude)]
        if not excluded:
            raise TraceError(problem) from cause
        leaves.add(excluded[0])


def check_exclude(model: nn.Module, exclude: Sequence[str]) -> None:
    """Raise OptionsError for a pattern that matches no module: most likely a misspelt name."""
    if isinstance(exclude, str):
        raise OptionsError(f"exclude takes a sequence of names; write exclude=({exclude!r},)")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise OptionsError(f"exclude takes names of modules, such as {names[:1]}, not {pattern!r}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionsError(
                f"exclude: {pattern!r} matches no module of {type(model).__name__}; "
                f"names look like {', '.join(map(repr, names[:5]))}"
            )


def _usable(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
    """The model itself, out of a wrapper for parallel runs or torch.compile; or an error if there is nothing to trace."""
    if not isinstance(model, nn.Module):
        raise TraceError(not_a_model(model))
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{type(model).__name__} is TorchScript, which cannot be traced; compile the nn.Module it came from"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _usable(model.module, exclude)
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return _usable(inner, exclude)
    check_exclude(model, exclude)
    refuse_reserved_names(model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise TraceError(
                f"{name!r} holds no values yet ({type(tensor).__name__} on {tensor.device}): run a lazy model on one batch, "
                "load the weights of one built on the meta device, and train it, before compiling"
            )
    return model


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode."""
    # Tensors that were computed and are only kept around (by weight_norm's hook, say) cannot be copied with their history.
    held = chain.from_iterable(vars(module).values() for module in model.modules())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        copied = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxprune works on a copy only. Detach what the model "
            "holds besides parameters and buffers (hooks with closures, generators, open files) before compiling."
        ) from error
    for module in copied.modules():
        let_go(module)  # What is made of the copy may get other zeros.
    return copied


class _PathTracer(Tracer):
    """A tracer that remembers which modules it went into, so that a failure can be placed.

    Args:
        leaves: modules to call as a whole.
        given: arguments of `forward` that are inputs even if they have a default.
    """

    def __init__(self, leaves: Collection[str] = (), given: Collection[str] = ()) -> None:
        super().__init__()
        self.leaves = leaves
        self.given = given
        self.path: list[str] = []
        self.entered: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        return _InplaceProxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return root_fn, [self._own_default(arg) for arg in args]

    def _own_default(self, arg: Any) -> Any:
        """The default of an argument that nobody gives, in place of its placeholder."""
        if not isinstance(arg, Proxy) or not arg.node.args or arg.node.target in self.given:
            return arg
        default = arg.node.args[0]
        if not isinstance(default, (bool, int, float, str, type(None))):
            return arg
        self.graph.erase_node(arg.node)
        return default

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.path.append(self.path_of_module(m))
        if not self.is_leaf_module(m, self.path[-1]):
            self.entered.append(self.path[-1])
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # Not in a finally: after a failure the path says where it was.
        return result


class _InplaceProxy(Proxy):
    """A proxy under which `x += y` is recorded as the in-place operation it is.

    torch.fx's own has no `__iadd__`, so Python falls back to `x = x + y`, and another name of x keeps its old value.
    """


def _record_inplace(function: Callable[[Any, Any], Any]) -> None:
    name = function.__name__  # "iadd"

    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name=name.rstrip("_")[1:])

    setattr(_InplaceProxy, f"__{name}__", record)


for _function in _INPLACE:
    _record_inplace(_function)


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
        f"torch.fx could not trace {type(model).__name__}: it stopped in {place} ({kind}){line}: {str(error).rstrip('.')}. "
        f"{remedy}, or rewrite the line without control flow that depends on tensor values."
    )
