"""Which pictures there are of a file: of a benchmark's CSV, of a report, or of a pruned model."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxprune.cli.command import stderr
from fxprune.cli.compression import PRUNED
from fxprune.cli.run_folder import dense_model
from fxprune.errors import DataError, FxPruneError, OptionsError
from fxprune.experiments.grid_rows import OK, read_rows
from fxprune.experiments.tasks import module_classes
from fxprune.geometry import is_matrix_layer, reduction_second
from fxprune.passes import FoldBatchNorm, RemoveInplace
from fxprune.pattern import NMPattern, Pattern
from fxprune.report import LayerReport
from fxprune.saving import load
from fxprune.tracing import trace

SPECTRA, MASKS = 8, 3  # layers drawn where none are named

Weights = dict[str, Tensor]


def pictures(source: Path, plots: Any, chosen: list[str]) -> Iterator[tuple[str, Any]]:
    """Names and figures of all pictures of one source."""
    if source.suffix == ".csv":
        rows = read_rows(source)
        if failed := sum(row.status != OK for row in rows):
            stderr.print(f"{source}: {failed} failed rows are left out", soft_wrap=True)
        for name in dict.fromkeys(row.name for row in rows if row.status == OK):
            if any(plots.has_level(row.pattern) for row in rows if row.name == name and row.status == OK):
                yield f"accuracy-{name}", plots.accuracy_against_sparsity(rows, name)
            yield f"methods-{name}", plots.method_comparison(rows, name)
    elif source.suffix == ".json":
        yield f"layers-{source.parent.name}", plots.layer_sparsity_and_error(plots.read_report(source))
    elif source.is_dir() or source.suffix == ".pt":
        file = source / PRUNED if source.is_dir() else source
        yield from _model_pictures(file, plots, chosen)
    else:
        raise DataError(
            f"{source} is neither a .csv, nor a .json, nor a .pt file, nor a folder; there is nothing to draw"
        )


def _model_pictures(file: Path, plots: Any, chosen: list[str]) -> Iterator[tuple[str, Any]]:
    """Report, spectra and masks of a pruned model."""
    dense, classes = _dense_weights(file.parent)
    compiled = load(file, allow=classes)
    name = type(compiled).__name__
    label = file.parent.name if file.name == PRUNED else file.stem
    yield f"layers-{label}", plots.layer_sparsity_and_error(compiled.report, name)
    pruned = [layer.name for layer in compiled.report.layers if layer.status == "pruned"]
    weights = {layer: _weight(compiled.get_submodule(layer)) for layer in pruned}
    if not weights:
        stderr.print(f"{file}: no layer is pruned, so there are no spectra and masks to draw", soft_wrap=True)
        return
    yield f"spectra-{label}", plots.singular_value_spectra(_choose(weights, chosen, SPECTRA), dense, name)
    masks = _choose(weights, chosen, MASKS)
    yield f"masks-{label}", plots.mask_pictures(masks, name, {layer: _group(compiled.report[layer]) for layer in masks})


def _group(layer: LayerReport) -> int:
    """Input channels that an N:M pattern puts into one group; 0 for any other."""
    pattern = Pattern.parse(layer.pattern)
    return pattern.m if isinstance(pattern, NMPattern) else 0


def _weight(module: nn.Module) -> Tensor:
    return reduction_second(module)


def _dense_weights(folder: Path) -> tuple[Weights | None, tuple[type[nn.Module], ...]]:
    """Weights of the dense model, BatchNorm folded, and its classes; None for weights that cannot be had, and why on stderr."""
    classes: tuple[type[nn.Module], ...] = ()
    try:
        model, config = dense_model(folder)
        classes = module_classes(model)
        graph = trace(model, exclude=config["exclude"] or ())
    except FxPruneError as error:
        stderr.print(f"without the dense model's spectra: {error}", markup=False, soft_wrap=True)
        return None, classes
    RemoveInplace()(graph)
    if config["fold_batchnorm"]:
        FoldBatchNorm()(graph)
    weights = {name: _weight(module) for name, module in graph.named_modules() if is_matrix_layer(module)}
    return weights, classes


def _choose(weights: Weights, patterns: list[str], count: int) -> Weights:
    """The layers that match; without patterns `count` of them, spread evenly over the network's depth."""
    if patterns:
        found = {name: weight for name, weight in weights.items() if any(fnmatchcase(name, p) for p in patterns)}
        if not found:
            raise OptionsError(f"layers: {', '.join(patterns)} match none of the pruned layers {', '.join(weights)}")
        return found
    names = list(weights)
    places = (
        range(len(names)) if len(names) <= count else [round(i * (len(names) - 1) / (count - 1)) for i in range(count)]
    )
    return {names[place]: weights[names[place]] for place in places}
