"""Compiles the parts of a model one after the other, each on the inputs that reach it in the model as it is by then.

Between two parts stands Python that may decide by values: which boxes are kept, how often a head is called. There the calls of
the dense and of the compressed model do not correspond. So errors are made up for within a part and not across parts: a part's
inputs are those that the compressed parts before it give (with `Options(inputs="dense")`: the dense ones), and its targets are
what the dense part makes of the same inputs.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.calibration.batches import count, map_tensors, take, tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.calls import Reading, calls_of, is_list_of_images
from fxprune.calibration.holdout import drawn, held_out_count
from fxprune.compiled import CompiledModule
from fxprune.compiled_parts import CompiledParts
from fxprune.constraints import keep_possible
from fxprune.errors import CalibrationError, FxPruneError, GraphError, TraceError
from fxprune.geometry import LayerGeometry, is_matrix_layer
from fxprune.graph import device_of
from fxprune.intake.names import matches
from fxprune.intake.normal_form import is_layer_call
from fxprune.intake.totals import little
from fxprune.options import Options
from fxprune.parts.search import Part, Search, put_in
from fxprune.passes import CheckImages, Pass, verify
from fxprune.recipe import Recipe
from fxprune.report import LayerReport, PruneReport
from fxprune.runtime.processes import in_order
from fxprune.runtime.surroundings import without_inference_tensors
from fxprune.trace_check import TOLERANCE, distance
from fxprune.tracing import usable_copy

PassesOf = Callable[[Recipe, Sequence[str]], list[Pass]]
ROWS_PER_IMAGE = 64  # A head may be called with a thousand boxes of an image, which are much alike.


@dataclass
class CallsCalibration(Calibration):
    """The calls of a part as a calibration set.

    Attributes:
        rows: of each call that was given, and whether it is held out whole; none where rows are images, of which single ones
            are held out.
    """

    rows: list[tuple[int, bool]] = field(default_factory=list)

    def held_out(self, images: int) -> Tensor:
        """Which rows are held out, (images,) bool."""
        of_all, _ = in_order(self.rows)
        if not of_all:
            return super().held_out(images)
        masks = [torch.full((rows,), out) for rows, out in of_all]
        return torch.cat([*masks, torch.zeros(images, dtype=torch.bool)])[:images]


def compile_parts(
    model: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    *,
    options: Options,
    exclude: Sequence[str],
    passes_of: PassesOf,
    problem: FxPruneError,
) -> CompiledParts | None:
    """The model with its parts compiled in place; None where this is not the way to compile it.

    Args:
        model: the user's; not modified.
        calibration: of the whole model.
        recipe: for all layers by their names in the model.
        options: as the caller gave them.
        exclude: module names or fnmatch patterns.
        passes_of: makes the passes for the recipe and the exclusions of one part.
        problem: why the model as a whole is no graph that is worth compiling.
    """
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        return None
    if isinstance(problem, CalibrationError) and not is_list_of_images(calibration.first):
        return None
    try:
        copied = usable_copy(model, exclude)
        home = device_of(copied)
        copied.to(calibration.device)
        reading = Reading.of(copied, calibration.first)
    except (TraceError, CalibrationError):  # The first problem says it better.
        return None
    search = Search(copied, reading, calibration.first, exclude).run()
    if not search.parts and not _all_excluded(copied, exclude):
        return None
    run = _Run(copied, reading, calibration, recipe, exclude, options, passes_of, search.problems)
    return run.compile(search.parts, problem).to(home)


def _all_excluded(model: nn.Module, exclude: Sequence[str]) -> bool:
    """Whether every weight is in a module that was excluded."""
    names = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() > 1]
    return bool(names) and all(matches(name, exclude) for name in names)


@dataclass
class _Run:
    """A compilation part by part; see `compile_parts`.

    Attributes:
        model: a copy of the user's, in eval mode, on the device; it is changed.
        left: why modules stay dense, by path.
    """

    model: nn.Module
    reading: Reading
    calibration: Calibration
    recipe: Recipe
    exclude: Sequence[str]
    options: Options
    passes_of: PassesOf
    left: dict[str, str]
    images_checked: bool = False

    def compile(self, parts: Sequence[Part], problem: FxPruneError) -> CompiledParts:
        """Compile the parts, in the order in which they are called, and put them in their places."""
        started = time.perf_counter()
        self._check_names(parts)
        self._batches = self.calibration.hold()
        sizes, own = in_order([self.reading.images(self.model, batch) for batch in self._batches])
        out = -(-held_out_count(sum(sizes), self.calibration.holdout) * len(sizes) // max(sum(sizes), 1))
        of_all = drawn(len(sizes), min(out, len(sizes) // 2), self.calibration.seed).tolist()
        self._held_out = [of_all[batch] for batch in own]
        source = copy.deepcopy(self.model) if self.options.inputs == "dense" else self.model
        reports: dict[str, PruneReport] = {}
        for part in parts:
            compiled = self._part(part, source)
            if compiled is not None:
                put_in(self.model, part.path, compiled)
                reports[part.path] = compiled.report
        without_inference_tensors(self.model)
        of_images = [reports[part.path].images_held_out for part in parts if part.is_of_images and part.path in reports]
        batches = sum(size for size, out in zip(sizes, of_all, strict=True) if out)
        held_out = max(of_images, default=batches if reports else 0)
        whole = self._report(str(problem), reports, sum(sizes), held_out, time.perf_counter() - started)
        result = CompiledParts(self.model, tuple(reports), whole).eval()
        if self.recipe.is_uniform and reports and (message := little(result, result.report.layers, str(self.recipe))):
            self.calibration.warn(message)
            result.set_whole(replace(whole, warnings=tuple(self.calibration.warnings)))
        return result

    def _check_names(self, parts: Sequence[Part]) -> None:
        """Raise PatternError for an entry of the recipe that counts for no layer."""
        inside = [f"{part.path}.{layer}" for part in parts for layer in _layers(part)]
        outside = [name for name, module in self.model.named_modules() if is_matrix_layer(module)]
        self.recipe.check([*inside, *outside])

    def _part(self, part: Part, source: nn.Module) -> CompiledModule | None:
        """A part compiled on the inputs that reach it in `source`; None where nothing in it can be compressed."""
        recipe = self.recipe
        if not recipe.is_uniform:
            chains = {layer: recipe.chain(f"{part.path}.{layer}") for layer in _layers(part)}
            recipe = Recipe(tuple((layer, chain) for layer, chain in chains.items() if chain is not None))
        names = [name for name, _ in part.graph_module.named_modules() if name]
        exclude = [name for name in names if matches(f"{part.path}.{name}", self.exclude)]
        if not recipe.entries or not any(self._takes(part, layer) for layer in _layers(part)):
            return None
        calibration = self._calibration(part, source)
        passes = self.passes_of(recipe, exclude)
        if not part.is_of_images or self.images_checked:
            passes = [step for step in passes if not isinstance(step, CheckImages)]
        self.images_checked |= part.is_of_images
        started = time.perf_counter()
        try:
            for step in passes:
                step(part.graph_module, calibration)
        except GraphError as error:
            self.left[part.path] = str(error)
            return None
        finally:
            self.calibration.warnings += [f"{part.path}: {warning}" for warning in calibration.warnings]
        verify(part.graph_module)
        return CompiledModule.of(part.graph_module, time.perf_counter() - started)

    def _takes(self, part: Part, layer: str) -> bool:
        """Whether a layer of a part can hold something of what the recipe asks of it."""
        name = f"{part.path}.{layer}"
        chain = self.recipe.chain(name) or ()
        geometry = LayerGeometry.of(part.graph_module.get_submodule(layer))
        return not matches(name, self.exclude) and bool(keep_possible(chain, geometry)[0])

    def _calibration(self, part: Part, source: nn.Module) -> CallsCalibration:
        folder = self.calibration.checkpoint_dir
        calibration = CallsCalibration(
            (),
            device=self.calibration.device,
            holdout=self.calibration.holdout,
            seed=self.calibration.seed,
            memory_limit=self.calibration.memory_limit,
            checkpoint_dir=None if folder is None else str(Path(folder) / part.path),
            on_layer=lambda name, stages: self.calibration.on_layer(f"{part.path}.{name}", stages),
            is_part=True,
            is_share=True,
        )
        calibration.loader = self._calls(part, source, calibration)
        return calibration

    def _calls(self, part: Part, source: nn.Module, calibration: CallsCalibration) -> Iterator[dict[str, Any]]:
        """The inputs of every call of a part, batch after batch."""
        thinning: bool | None = None
        module = source.get_submodule(part.path)
        for batch, held_out in zip(self._batches, self._held_out, strict=True):
            with torch.inference_mode(False):
                calls = calls_of(lambda batch=batch: self.reading.run(source, batch), {part.path: module})[part.path]  # type: ignore[misc]
            most = ROWS_PER_IMAGE * self.reading.images(source, batch)
            for call in calls:
                inputs = call.inputs
                if inputs is None or not call.rows:
                    continue
                if call.rows > most:
                    thinning = _rows_are_independent(module, inputs) if thinning is None else thinning
                    if thinning:
                        inputs = take(inputs, torch.arange(most) * call.rows // most)
                if not part.is_of_images:
                    calibration.rows.append((count(inputs), held_out))
                yield inputs

    def _report(
        self, failure: str, reports: dict[str, PruneReport], images: int, held_out: int, seconds: float
    ) -> PruneReport:
        """What concerns the whole, and rows for what is in no part."""
        first = next(iter(reports.values()), None)
        timings: Counter[str] = Counter()
        for report in reports.values():
            timings.update(report.timings)
        macs = [report.macs for report in reports.values() if report.macs]
        names = ", ".join(reports) or "nothing"
        note = (
            f"Compiled in place: {names}. The forward of {type(self.model).__name__} stays the Python that it is, as it is no "
            f"graph: {_first_sentence(failure)}"
        )
        return PruneReport(
            layers=self._outside(reports),
            method="" if first is None else first.method,
            pattern=str(self.recipe),
            images=images,
            images_read=images,
            images_held_out=held_out,
            seconds=seconds,
            timings=dict(timings),
            peak_memory=max((report.peak_memory for report in reports.values()), default=0),
            macs=(sum(m[0] for m in macs), sum(m[1] for m in macs)) if macs else (),
            warnings=tuple(self.calibration.warnings),
            notes=(note,),
        )

    def _outside(self, parts: dict[str, PruneReport]) -> tuple[LayerReport, ...]:
        """A row for every parameter of two or more dimensions that is in no part."""
        rows = []
        for name, parameter in self.model.named_parameters():
            if parameter.dim() < 2 or any(name.startswith(f"{path}.") for path in parts):
                continue
            path, _, last = name.rpartition(".")
            module = self.model.get_submodule(path)
            is_layer = is_matrix_layer(module) and last == "weight"
            rows.append(
                LayerReport(
                    name=path if is_layer else name,
                    op=type(module).__name__,
                    shape=tuple(parameter.shape),
                    reason=self._reason(path, module if is_layer else None),
                    sparsity=float((parameter == 0).double().mean()),
                )
            )
        return tuple(rows)

    def _reason(self, path: str, layer: nn.Module | None) -> str:
        if matches(path, self.exclude):
            return "excluded"
        if layer is not None:
            chain = self.recipe.chain(path)
            if chain is None:
                return "named by no entry of the recipe"
            kept, declined = keep_possible(chain, LayerGeometry.of(layer))
            if not kept:
                return declined or "dense in the recipe"
        around = [path.rsplit(".", n)[0] for n in range(path.count(".") + 1)]
        why = next((self.left[name] for name in around if name in self.left), "")
        return f"in no part that is a graph{why and ': '}{_first_sentence(why)}"


def _first_sentence(text: str) -> str:
    return re.split(r"\.\s|\n", text, maxsplit=1)[0].rstrip(".")


def _layers(part: Part) -> list[str]:
    """Names of a part's layers, in the order of their calls."""
    return list(dict.fromkeys(str(n.target) for n in part.graph_module.graph.nodes if is_layer_call(n)))


def _rows_are_independent(module: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a module makes of some of its rows what it makes of them among all."""
    some = torch.arange(0, count(inputs), 2)
    with torch.no_grad():
        whole, part = module(**map_tensors(inputs, torch.clone)), module(**take(inputs, some))
    rows = count(inputs)
    if any(not x.dim() or len(x) != rows for x in tensors_in(whole)):
        return False
    return distance(map_tensors(whole, lambda x: x[some]), part) <= TOLERANCE
