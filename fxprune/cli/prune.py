"""fxprune prune: a trained model in; pruned weights, a validated ONNX file, reports and a run folder out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fxprune import solvers
from fxprune.cli.command import stderr, stdout
from fxprune.cli.parameters import TASK, BatchSize, Device, Out, Register, TestImages, data_name
from fxprune.compiler import compile
from fxprune.data import calibration_loader
from fxprune.devices import default_device
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.experiments.runs import start_run
from fxprune.experiments.tasks import Task, import_user_code, module_classes, scoring_loader
from fxprune.export import OnnxReport, export_onnx
from fxprune.files import atomic
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.saving import save

PRUNED, ONNX = "pruned.pt", "model.onnx"


def prune(
    task: Annotated[Task, TASK],
    options: Annotated[Options, "Solver"],
    config: dict[str, Any],
    *,
    pattern: Annotated[str, typer.Option(help='"2:4" and the like, or a sparsity such as 0.9.')] = "2:4",
    method: Annotated[str, typer.Option(help="admm, sparsegpt, exact_obs, magnitude, or one of your own.")] = "admm",
    exclude: Annotated[list[str] | None, typer.Option(help="Layer to leave as it is: a name or pattern.")] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="Training images to calibrate on.")] = 1024,
    batch_size: BatchSize = 128,
    test_images: TestImages = None,
    register: Register = None,
    onnx: Annotated[bool, typer.Option(help="Write an ONNX file and validate it in onnxruntime.")] = True,
    device: Device = None,
    out: Out = None,
) -> None:
    """Prune a trained model in one shot, score it, and export it to a validated ONNX file."""
    import_user_code(register or ())
    pattern = str(Pattern.parse(pattern))
    solvers.get(method)  # a misspelt name must not cost a dense evaluation first
    splits = task.load_data()
    model = task.trained_model(splits.info.num_classes)
    calibration = calibration_loader(splits.train, calibration_images, batch_size, seed=options.seed)
    test = scoring_loader(splits, images=test_images)
    place = default_device(device)
    folder = out or Path("out", "prune", f"{task.model}-{data_name(task.data)}-{pattern.replace(':', '-')}-{method}")
    run = start_run(folder, "prune", config)

    with stderr.status("scoring the dense model"):
        dense_accuracy = evaluate(model, test, place)
    compiled = compile(
        model,
        calibration,
        pattern,
        method=method,
        exclude=tuple(exclude or ()),
        device=place,
        options=options,
        progress=stderr.is_terminal,
    )
    report = compiled.report
    typer.echo(report.render(width=max(stdout.width, 100), color=stdout.is_terminal))
    _write(report.to_csv, folder / "report.csv")
    _write(report.to_json, folder / "report.json")
    save(compiled, folder / PRUNED, allow=module_classes(model))

    with stderr.status("scoring the pruned model"):
        accuracy = evaluate(compiled, test, place)
        close = agreement(model, compiled, test, place)
    results: dict[str, Any] = {
        "dense_accuracy": dense_accuracy,
        "accuracy": accuracy,
        "agreement": close.top1,
        "kl": close.kl,
        "sparsity": report.sparsity,
        "layers_pruned": sum(layer.status == "pruned" for layer in report.layers),
        "compile_seconds": report.seconds,
        "num_classes": splits.info.num_classes,
    }
    exported: OnnxReport | None = None
    if onnx:
        with stderr.status("exporting to ONNX and validating the file"):
            exported = export_onnx(compiled, folder / ONNX, next(iter(test)), loader=test)
        _write(exported.to_json, folder / "onnx.json")
        stdout.print(exported.summary, markup=False, soft_wrap=True)
        results["onnx_accuracy"] = exported.parity.accuracy_onnx
        results["onnx_max_difference"] = exported.parity.max_abs
    run.finish(results)
    stdout.print(_table(results, exported))
    files = [PRUNED, *([ONNX] if onnx else []), "report.csv", "report.json", "run.json"]
    stdout.print(f"{folder}: {', '.join(files)}", soft_wrap=True)


def _write(writer: Callable[[Path], None], path: Path) -> None:
    with atomic(path) as part:
        writer(part)


def _table(results: dict[str, Any], exported: OnnxReport | None) -> Table:
    table = Table()
    for heading in ("", "accuracy", "agrees with dense", "KL to dense", "zeros"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("dense", f"{results['dense_accuracy']:.2f}%", "", "", "")
    close = (f"{results['agreement']:.2f}%", f"{results['kl']:.4f}", f"{results['sparsity']:.1%}")
    table.add_row("pruned", f"{results['accuracy']:.2f}%", *close)
    if exported is not None:
        table.add_row("in onnxruntime", f"{exported.parity.accuracy_onnx:.2f}%", "", "", f"{exported.sparsity:.1%}")
    return table
