"""compile(): trace the model, fold BatchNorm, insert observers, solve layer after layer, take the observers out again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune import solvers
from fxprune.annotations import InputForm, annotate_graph, report_of
from fxprune.calibration.calibration import Calibration
from fxprune.compiled import CompiledModule
from fxprune.compiled_parts import CompiledParts
from fxprune.errors import CalibrationError, FxPruneError, GraphError, NoGraphError, OptionsError
from fxprune.graph import device_of
from fxprune.intake.record import intake
from fxprune.options import FOLLOWS_SKIPS, Method, Options, given_options
from fxprune.parts.run import compile_parts
from fxprune.passes import (
    Allocate,
    CheckHooks,
    CheckImages,
    FoldBatchNorm,
    InsertObservers,
    KeepDense,
    Pass,
    PermuteChannels,
    Polish,
    RemoveChannels,
    RemoveInplace,
    RemoveObservers,
    RollUpRecurrent,
    ShortcutsFirst,
    SolveLayers,
    UnrollRecurrent,
    verify,
)
from fxprune.pattern import Pattern
from fxprune.recipe import Recipe
from fxprune.runtime.devices import default_device
from fxprune.runtime.processes import agreed, as_in_first, together, world
from fxprune.runtime.progress import layer_progress
from fxprune.runtime.surroundings import undisturbed, without_inference_tensors
from fxprune.solvers import Solver
from fxprune.tracing import trace

DEFAULT_RECIPE = "2:4"
MUCH = 0.05  # Of the weights, inside modules that are called as a whole: then parts are tried.


@together()
@undisturbed
def compile(
    model: nn.Module | str | PathLike[str],
    calib_loader: Iterable[Any],
    pattern: str | Pattern | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    method: str | Solver = "admm",
    exclude: Sequence[str] = (),
    options: Options | None = None,
    passes: Sequence[Pass] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    memory_limit: int | None = None,
    checkpoint_dir: str | None = None,
) -> CompiledModule | CompiledParts:
    """Compress a trained CNN in one shot: no retraining, no labels.

    In an initialised group of torch.distributed all processes call it, share the work, and get the same result (docs/scale.md);
    what one of them is to compile by itself belongs inside `with fxprune.alone():`.

    Args:
        model: trained model; it is copied, never modified. An ONNX file, by its path or as a ModelProto, is one too.
        calib_loader: iterable of batches, read once: tensors, (images, labels), or mappings with the names of the model's
            inputs; labels are not read. A few hundred to a few thousand images, preprocessed as for inference.
        pattern: the recipe. "2:4", "1:4", ... (N kept of M consecutive input channels), a sparsity such as "0.9",
            "mixed:0.6", "rank:0.7" (low rank), a chain such as "rank:0.7+2:4"; or a mapping from layer names or fnmatch
            patterns to such, {"layer4.*": "1:4", "fc": "dense", "*": "2:4"}, first match wins.
        method: "admm" (ours), as published "sparsegpt", "exact_obs" (slow) or "magnitude", or a solver with settings of its
            own, `fxprune.solvers.ADMM(rho=0.03)`.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        options: everything else that concerns the method.
        passes: to run in place of `default_passes(pattern, ...)`, from which such a list is best made.
        device: where to compute; None takes CUDA if there is one. The result is where the model was.
        progress: show a progress bar.
        memory_limit: bytes of live calibration values to hold on the device (on the CPU: in memory); the rest waits in host
            memory or in a scratch file. None: a share of what is free.
        checkpoint_dir: folder in which finished layers are kept; a run that was interrupted goes on from there.

    Returns:
        A GraphModule in eval mode, with `.report`. Of a model whose own forward is no graph, such as a detector: a
        `CompiledParts`, the model with its largest children that are graphs compiled in place.

    Raises:
        FxPruneError: a subclass that names what is wrong, and the remedy.
    """
    started = time.perf_counter()
    options = given_options(options)
    in_parts = passes is None  # Passes of the caller's own are for one graph.
    if passes is None:
        passes = default_passes(pattern, method=method, exclude=exclude, options=options)
    elif pattern != DEFAULT_RECIPE or method != "admm":
        raise OptionsError("passes hold a recipe and a method already; give these to default_passes alone")
    calibration = Calibration(
        calib_loader,
        device=default_device(device),
        holdout=options.holdout,
        seed=options.seed,
        memory_limit=checked_memory(memory_limit),
        checkpoint_dir=checkpoint_dir,
    )
    _agree(model, str(pattern), method, tuple(exclude), options, [type(step).__name__ for step in passes])
    with layer_progress(progress and world().is_first) as calibration.on_layer:
        preparing, solving = _divided(passes)
        prepared = _prepared(model, calibration, preparing, exclude)
        if prepared.problem is not None and in_parts and isinstance(model, nn.Module):
            calibration.warnings.clear()  # Of the images; the parts tell again.
            parts = compile_parts(
                model,
                calibration,
                Recipe.parse(pattern),
                options=options,
                exclude=exclude,
                passes_of=lambda of, but: default_passes(of, method=method, exclude=but, options=options),
                problem=prepared.problem,
            )
            if parts is not None:
                as_in_first(parts)
                return parts
        graph_module = prepared.accepted()
        for step in solving:
            step(graph_module, calibration)
        without_inference_tensors(graph_module)
        as_in_first(graph_module)
        verify(graph_module)
    annotate_graph(graph_module, inputs=_forms(graph_module, calibration.shapes.inputs or []))
    before = report_of(model) if isinstance(model, nn.Module) else None
    given = "" if before is None else f"{before.done} with {before.method}"
    seconds = time.perf_counter() - started
    return CompiledModule.of(graph_module.to(prepared.home), seconds, calibration.warnings, given)


def _forms(graph_module: GraphModule, values: Sequence[Any]) -> tuple[InputForm, ...]:
    """Of the values of a graph's inputs; () if one is no tensor."""
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return ()
    return tuple(
        InputForm(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in zip(names, values, strict=False)
    )


def _agree(model: object, *given: object) -> None:
    """Make sure that all processes compile the same.

    Raises:
        ProcessError: they do not.
    """
    if world().count > 1:
        state = model.state_dict() if isinstance(model, nn.Module) else {}
        sums = {name: f"{tuple(x.shape)} {float(x.double().abs().sum()):.6e}" for name, x in state.items()}
        agreed("the model", sums or type(model), remedy="load the same weights in all of them")
        agreed("what was asked for", given, remedy="give all of them the same recipe, method and options")


def traced(
    model: nn.Module | str | PathLike[str], calibration: Calibration, *, exclude: Sequence[str] = ()
) -> GraphModule:
    """The graph of a model, of whatever kind it is given, checked on the first calibration batch."""
    example = calibration.first
    if not isinstance(model, nn.Module):
        from fxprune.onnx_import import import_onnx, is_onnx  # which brings onnx

        if is_onnx(model):
            model = import_onnx(model, example)
    return trace(model, exclude=exclude, example=example)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Prepared:
    """What became of a model before its layers are solved.

    Attributes:
        graph_module: None where there is no graph that could be worked with.
        home: the device on which the model was.
        told: warnings of the way.
        problem: what speaks against this graph; without one there is always something.
    """

    graph_module: GraphModule | None
    home: torch.device
    told: list[warnings.WarningMessage]
    problem: FxPruneError | None

    def accepted(self) -> GraphModule:
        """The graph, warnings told; raises the problem if there is none."""
        if self.graph_module is None:
            assert self.problem is not None
            raise self.problem
        for warning in self.told:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return self.graph_module


def _prepared(
    model: nn.Module | str | PathLike[str], calibration: Calibration, passes: Sequence[Pass], exclude: Sequence[str]
) -> _Prepared:
    """Trace a model, and run the passes that say whether its graph can be worked with."""
    home = torch.device("cpu")
    with warnings.catch_warnings(record=True) as told:
        try:
            graph_module = traced(model, calibration, exclude=exclude)
            home = device_of(graph_module)
            graph_module.to(calibration.device)
            for step in passes:
                step(graph_module, calibration)
        except (NoGraphError, GraphError, CalibrationError) as error:
            return _Prepared(None, home, [], error)
    return _Prepared(graph_module, home, told, _much_inside_leaves(graph_module))


def _divided(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The passes that say whether a graph can be worked with at all, and those after them."""
    last = max((i for i, step in enumerate(passes) if isinstance(step, RemoveInplace)), default=-1)
    return list(passes[: last + 1]), list(passes[last + 1 :])


def _much_inside_leaves(graph_module: GraphModule) -> NoGraphError | None:
    """What is wrong with a graph if much of the model is in modules that could not be traced, and are called as a whole."""
    found = intake(graph_module)
    leaves = () if found is None else found.leaves
    return NoGraphError("; ".join(map(str, leaves))) if sum(leaf.share for leaf in leaves) > MUCH else None


def default_passes(
    pattern: str | Pattern | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    method: str | Solver = "admm",
    exclude: Sequence[str] = (),
    options: Options | None = None,
) -> list[Pass]:
    """The passes that `compile` runs, to insert others into; arguments as there."""
    recipe, solver = Recipe.parse(pattern), solvers.get(method)
    return solving_passes(recipe, Method(solver, given_options(options).resolved(solver, recipe)), exclude=exclude)


def solving_passes(recipe: Recipe, method: Method, *, exclude: Sequence[str] = ()) -> list[Pass]:
    """The passes for a recipe and a method, whose options are resolved."""
    options = method.options
    passes: list[Pass] = [CheckHooks(), CheckImages(), RemoveInplace()]
    if options.fold_batchnorm:
        passes.append(FoldBatchNorm(exclude=exclude))
    passes.append(UnrollRecurrent(exclude=exclude))
    if options.target in FOLLOWS_SKIPS:
        passes.append(ShortcutsFirst())
    if recipe.removes_channels:
        passes.append(RemoveChannels(recipe, method, exclude=exclude))
    if options.permute:
        passes.append(PermuteChannels(recipe, exclude=exclude, damping=options.damping, seed=options.seed))
    if options.polish:
        passes.append(KeepDense())
    observing = InsertObservers(
        recipe, exclude=exclude, reconstruct=bool(options.reconstruct), observe=method.needs_statistics
    )
    passes += [observing, Allocate(method), SolveLayers(recipe, method), RemoveObservers()]
    if options.polish:
        passes.append(Polish(epochs=options.polish, flip=options.flip, seed=options.seed))
    passes.append(RollUpRecurrent())
    return passes


def checked_memory(limit: int | None) -> int | None:
    """A memory limit in bytes, or None.

    Raises:
        OptionsError: it is no positive number.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0):
        raise OptionsError(f"memory_limit is {limit!r}; it is a number of bytes, or None to have it chosen")
    return limit
