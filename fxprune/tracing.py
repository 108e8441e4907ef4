"""Model -> GraphModule: a traced copy in eval mode and in the normal form, or an error that says where tracing stopped.

There are several ways in, tried in this order: torch.fx; torch.fx with example values, which answer what Python asks about
shapes; torch.export; and torch.fx again with the modules that none of these gets through called as a whole. Whatever the
way, the graph is compared with the model.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from fxprune.calibration.batches import model_inputs, names_in
from fxprune.errors import NoGraphError, TraceError
from fxprune.graph import device_of
from fxprune.graph.code_names import allow_any_name, refuse_reserved_names
from fxprune.graph.model_argument import not_a_model
from fxprune.intake import attention, batch_sizes, computed_weights, exported, questions, recurrent, wrapped_functions
from fxprune.intake.example_values import Frozen, ValueTracer
from fxprune.intake.names import check_exclude, matches
from fxprune.intake.normal_form import is_layer_call, normalise
from fxprune.intake.origins import Origin, origins, set_origins
from fxprune.intake.record import Intake, Leaf, Unread, intake, set_intake
from fxprune.intake.symbolic import TRANSFORMERS, PathTracer, explain
from fxprune.layers.zero_keeper import let_go
from fxprune.trace_check import difference, parting

__all__ = ["check_exclude", "matches", "trace"]

FEW, MORE = 3, 5  # Images: what example values are computed on, and the other size that a graph has to hold for.


def trace(model: nn.Module, *, exclude: Sequence[str] = (), example: Any = None) -> GraphModule:
    """Copy a model, put the copy in eval mode, trace it, and bring the graph into the normal form.

    The user's model is not modified: neither its weights nor its training flags nor its device. Arguments of `forward`
    that have a plain default (None, a number, a string) keep it, unless the example gives them.

    Args:
        model: any module; a GraphModule may be traced again; what torch.export gives, an ExportedProgram or its module, is
            taken as it is.
        exclude: module names or fnmatch patterns. An excluded module that cannot be traced, or that is traced wrongly,
            becomes a leaf: it is called as a whole, and nothing inside it is changed.
        example: a batch as a calibration loader gives it. Without one only torch.fx is tried, and nothing is compared.

    Raises:
        TraceError: names the module and the source line where tracing stopped, and the remedy; or says that the graph
            does not compute what the model does.
        FxPruneError: if a name in `exclude` matches no module.
    """
    if exported.is_program(model):
        model = exported.module_of_program(model)
    elif exported.is_exported(model):
        model = exported.as_traced(model)
    task = _Task.of(usable_copy(model, exclude), tuple(exclude), example)
    with _transformers_written_in_python():
        graph_module = _first_way(task)
        graph_module = wrapped_functions.without_weights(graph_module, lambda: _first_way(task))
    unread = _unread(task.reference, graph_module)
    return _noted(graph_module, "torch.fx", unread=unread) if unread else graph_module


@dataclass
class _Task:
    """What is to be traced.

    Attributes:
        reference: the copy as it came, to compare with.
        model: the same, or another copy with its computed weights computed and its attention written out.
        exclude: patterns.
        example: a batch, or None.
        origins: of the weights that differ between the two.
    """

    reference: nn.Module
    model: nn.Module
    exclude: tuple[str, ...]
    example: Any
    origins: dict[str, Origin] = field(default_factory=dict)

    @classmethod
    def of(cls, reference: nn.Module, exclude: tuple[str, ...], example: Any) -> _Task:
        model = reference
        found: dict[str, Origin] = {}
        parts = (computed_weights.are_there, attention.is_there, recurrent.cells_are_there)
        if any(are_there(model, exclude) for are_there in parts):
            model = _copied(reference)
            found |= computed_weights.compute(model, exclude)
            model, more = attention.write_out(model, exclude)
            found |= more | recurrent.write_out_cells(model, exclude)
        return cls(reference, model, exclude, example, found)

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(names_in(self.example))

    def finished(self, graph_module: GraphModule) -> GraphModule:
        """The graph in the normal form."""
        nodes = len(graph_module.graph.nodes)
        attention.drop_unread_weights(graph_module)
        changed = recurrent.with_linear_layers(graph_module)
        changed |= normalise(graph_module, self.model, exclude=self.exclude)
        redirected = questions.redirect(graph_module)
        names = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
        composed = {name: _before(origin, self.origins) for name, origin in changed.items()}
        set_origins(graph_module, {n: o for n, o in (self.origins | composed).items() if n in names})
        exported.drop_examples(graph_module)
        graph_module.graph.lint()
        if redirected or len(graph_module.graph.nodes) != nodes:  # Otherwise its code is written already.
            graph_module.recompile()
        return graph_module


@dataclass(frozen=True)
class _Failure:
    """Why a way did not lead in.

    Attributes:
        problem: in words.
        places: the modules where it stopped, outermost first.
        cause: the exception behind it.
    """

    problem: str
    places: tuple[str, ...] = ()
    cause: Exception | None = None


@torch.random.fork_rng()
def _first_way(task: _Task) -> GraphModule:
    """The graph by the first way that leads to one."""
    first = _symbolically(task)
    if isinstance(first, GraphModule):
        return first
    if task.example is None:
        raise TraceError(first.problem) from first.cause
    later: list[str] = []
    for name, way in (("example values", _with_values), ("torch.export", _by_export)):
        found = way(task)
        if isinstance(found, GraphModule):
            return found
        later.append(f"With {name}: {found.problem}")
    found = _with_leaves(task)
    if isinstance(found, GraphModule):
        return found
    raise NoGraphError("\n".join([first.problem, *later, found.problem])) from first.cause


def _symbolically(task: _Task) -> GraphModule | _Failure:
    if exported.is_in_traced_form(task.model):
        graph_module = task.finished(task.model)
        return _checked(task, graph_module, ()) or _noted(graph_module, "torch.export")
    found = _excluding(task, lambda leaves: PathTracer(leaves, task.given, TRANSFORMERS), way="torch.fx")
    stars = tuple(x.name for x in model_inputs(task.model) if x.stars)
    if isinstance(found, _Failure) and stars:  # Nobody seemed to give them; it may be that the model cannot do without.
        again = _excluding(task, lambda leaves: PathTracer(leaves, (*task.given, *stars), TRANSFORMERS), way="torch.fx")
        return again if isinstance(again, GraphModule) else found
    return found


def _with_values(task: _Task, leaves: frozenset[str] = frozenset()) -> GraphModule | _Failure:
    """By example values: of a few images, or of the whole batch if the model takes no other size."""
    device = device_of(task.reference)
    failure = _Failure("")
    for batch in (batch_sizes.with_images(task.example, FEW), task.example):
        tracers: list[ValueTracer] = []

        def tracer(more: set[str], batch: Any = batch, tracers: list[ValueTracer] = tracers) -> PathTracer:
            tracers.append(ValueTracer(batch, device, leaves | more, task.given, TRANSFORMERS))
            return tracers[-1]

        found = _excluding(task, tracer, way="example values")
        if isinstance(found, _Failure):
            failure = found
            continue
        frozen = _other_sizes(task, found, batch, partial(_frozen, task, tracers[-1]))
        return frozen if isinstance(frozen, _Failure) else _noted(found, "example values", frozen=frozen)
    return failure


def _by_export(task: _Task) -> GraphModule | _Failure:
    batch = batch_sizes.with_images(task.example, FEW)
    try:
        with _state_kept(task.model):
            graph_module = task.finished(exported.export(task.model, batch, device_of(task.reference)))
    except Exception as error:
        return _Failure(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", (), error
        )
    wrong = _checked(task, graph_module, ())
    if wrong is not None:
        return wrong
    frozen = _other_sizes(task, graph_module, batch, lambda _: [])
    return frozen if isinstance(frozen, _Failure) else _noted(graph_module, "torch.export", frozen=frozen)


def _with_leaves(task: _Task) -> GraphModule | _Failure:
    """By example values, each module that cannot be traced becoming a leaf, innermost first."""
    leaves: dict[str, str] = {}
    while True:
        found = _with_values(task, frozenset(leaves))
        if isinstance(found, GraphModule):
            break
        inner = next((place for place in reversed(found.places) if place not in leaves), None)
        if inner is None:
            return _Failure(f"With untraceable modules called as a whole: {found.problem}", cause=found.cause)
        leaves[inner] = found.problem
    called = {str(node.target) for node in found.graph.find_nodes(op="call_module")}
    if not any(map(is_layer_call, found.graph.nodes)):
        return _Failure(f"Nothing that could be pruned is left outside of {', '.join(map(repr, leaves))}.")
    total = sum(p.numel() for p in task.reference.parameters())
    records = []
    for name, reason in leaves.items():
        if name in called:
            module = task.reference.get_submodule(name)
            share = sum(p.numel() for p in module.parameters()) / max(total, 1)
            records.append(Leaf(name, type(module).__name__, share, reason))
    for record in records:
        warnings.warn(f"fxprune: {record}", stacklevel=5)
    return _noted(found, "example values", leaves=tuple(records))


def _excluding(task: _Task, tracer_of: Callable[[set[str]], PathTracer], *, way: str) -> GraphModule | _Failure:
    """Trace; an excluded module that this fails in, or that computes something else then, becomes a leaf."""
    leaves: set[str] = set()
    while True:
        tracer = tracer_of(leaves)
        before = _state(task.model)
        try:
            graph = allow_any_name(tracer.trace(task.model))
            if isinstance(tracer, ValueTracer):
                tracer.tidy()
            graph_module = GraphModule(task.model, graph, type(task.model).__name__).eval()
            if isinstance(tracer, ValueTracer):
                _restore(before)
            task.finished(graph_module)
        except TraceError:
            raise
        except Exception as error:
            failure: _Failure | None = _Failure(explain(task.model, tracer, error), tuple(tracer.path), error)
            _restore(before)
        else:
            failure = _checked(task, graph_module, tuple(tracer.entered))
            if failure is None:
                return _noted(graph_module, way)
        assert failure is not None
        # After a failure the innermost excluded module may be the reason; where all runs, the first that was entered.
        excluded = [path for path in failure.places if path not in leaves and matches(path, task.exclude)]
        if not excluded:
            return failure
        leaves.add(excluded[0])


def _checked(task: _Task, graph_module: GraphModule, entered: tuple[str, ...]) -> _Failure | None:
    """What is wrong with a graph on the example."""
    if task.example is None:
        return None
    wrong = difference(task.reference, graph_module, task.example)
    if wrong is None:
        return None
    excluded = tuple(path for path in entered if matches(path, task.exclude))
    return _Failure(wrong, excluded or _places(task, graph_module, entered, task.example))


def _places(task: _Task, graph_module: GraphModule, entered: tuple[str, ...], batch: Any) -> tuple[str, ...]:
    """The modules around the place where model and graph part, outermost first."""
    after, at = parting(task.reference, graph_module, batch)
    around = [path for path in entered if (at or after).startswith(f"{path}.")]
    return tuple(sorted(set(around), key=len))


def _other_sizes(
    task: _Task, graph_module: GraphModule, batch: Any, frozen: Callable[[Any], list[Frozen]]
) -> tuple[str, ...] | _Failure:
    """Whether a graph holds for other numbers of images; and what it takes for granted of their height and width."""
    more = batch_sizes.with_images(batch, MORE)
    if batch_sizes.agree(task.reference, graph_module, more) is False:
        lines = "; ".join(f"{f.line}, which gave {f.answer}" for f in frozen(more))
        return _Failure(
            f"the graph holds for batches of {FEW} images, or for one call, only: Python decided something by their number, or "
            "keeps count of calls: "
            f"{lines or 'it does not say where'}"
        )
    larger = batch_sizes.with_larger_images(batch)
    if larger is None or batch_sizes.agree(task.reference, graph_module, larger) is not False:
        return ()
    changed = [f.line for f in frozen(larger)] or ["something that torch.export fixed"]
    unique = tuple(dict.fromkeys(changed))
    batch_sizes.require_size(graph_module, batch, unique)
    return unique


def _frozen(task: _Task, tracer: ValueTracer, batch: Any) -> list[Frozen]:
    """The answers of an earlier trace that are others for another batch."""
    again = ValueTracer(batch, tracer.device, tracer.leaves, tracer.given, tracer.into)
    with _state_kept(task.model):
        try:
            again.trace(task.model)
        except Exception:  # noqa: S110 - what was asked up to here says enough
            pass
    return [a for a, b in zip(tracer.frozen, again.frozen, strict=False) if a != b]


def _unread(model: nn.Module, graph_module: GraphModule) -> tuple[Unread, ...]:
    """The parameters of two or more dimensions of which nothing is in the graph."""
    held = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    held |= {name for origin in origins(graph_module).values() for name in origin.names}
    names: dict[nn.Parameter, list[str]] = {}  # Of each parameter: it may have several.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for parameter, known in names.items():
        if parameter.dim() > 1 and held.isdisjoint(known):
            owner = model.get_submodule(known[0].rpartition(".")[0])
            found.append(Unread(known[0], type(owner).__name__, tuple(parameter.shape)))
    return tuple(found)


def _noted(graph_module: GraphModule, way: str, **more: Any) -> GraphModule:
    before = intake(graph_module) or Intake(way)
    set_intake(graph_module, replace(before, **more))
    return graph_module


def _before(origin: Origin, earlier: dict[str, Origin]) -> Origin:
    """An origin in the model that was traced as one in the user's model."""
    if not any(name in earlier for name in origin.names):
        return origin
    if len(origin.names) == 1 and origin.how == "same":
        return earlier[origin.names[0]]
    names = chain.from_iterable(earlier[name].names if name in earlier else (name,) for name in origin.names)
    return Origin(tuple(dict.fromkeys(names)), "computed")


@contextmanager
def _transformers_written_in_python() -> Iterator[None]:
    """Without the fused kernels that torch's transformer layers call in eval mode, they are ordinary Python."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_DICTS = ("_parameters", "_buffers", "_modules")


def _state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """All attributes of all modules: a forward may set some while it is traced."""
    return [(m, {k: dict(v) if k in _DICTS else v for k, v in vars(m).items()}) for m in model.modules()]


def _restore(state: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, attributes in state:
        vars(module).clear()
        vars(module).update({k: dict(v) if k in _DICTS else v for k, v in attributes.items()})


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    before = _state(model)
    try:
        yield
    finally:
        _restore(before)


def usable_copy(model: nn.Module, exclude: Sequence[str] = ()) -> nn.Module:
    """A deep copy in eval mode, out of a wrapper for parallel runs or torch.compile.

    Raises:
        TraceError: there is nothing to trace, or it cannot be copied.
        FxPruneError: if a name in `exclude` matches no module.
    """
    return _copied(_usable(model, exclude))


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


_COPIED_BY = ("__new__", "__reduce_ex__", "__reduce__", "__getstate__", "__deepcopy__")


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """What copy.deepcopy would do with modules that have no ways of their own, in half the time: fills its memo.

    Most of what a module holds are numbers and empty dictionaries of hooks, over which deepcopy takes long.
    """
    modules = list(model.modules())
    for kind in {type(module) for module in modules}:
        own = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _COPIED_BY)
        if own or not kind.__setstate__.__module__.startswith("torch.nn.modules."):  # torch's only see to older files.
            return
    copies = [object.__new__(type(module)) for module in modules]
    memo |= {id(module): copied for module, copied in zip(modules, copies, strict=True)}
    for module, copied in zip(modules, copies, strict=True):
        for key, value in vars(module).items():
            if type(value) in (OrderedDict, dict) and not value:
                vars(copied)[key] = memo.setdefault(id(value), type(value)())
            elif type(value) in (bool, int, float, str, NoneType):
                vars(copied)[key] = value
            else:
                vars(copied)[key] = copy.deepcopy(value, memo)


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode."""
    # Tensors that were computed and are only kept around (by weight_norm's hook, say) cannot be copied with their history.
    held = chain.from_iterable(vars(module).values() for module in model.modules())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        _copy_modules(model, memo)
        copied = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxprune works on a copy only. Detach what the model "
            "holds besides parameters and buffers (hooks with closures, generators, open files) before compiling."
        ) from error
    for module in copied.modules():
        let_go(module)  # What is made of the copy may get other zeros.
    return copied
