"""What `fxprune prune` and `fxprune low-rank` share: a trained model and images in, a run folder with the smaller model out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.cli.command import fail, stdout, warn, working
from fxprune.cli.parameters import OnnxOptions
from fxprune.errors import OptionsError, TraceError
from fxprune.experiments.tasks import Task, import_user_code, module_classes, number_of_images, scoring_loader
from fxprune.tables import Column, as_text, table, terminal_width

if TYPE_CHECKING:  # imported when a command starts
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from fxprune.compiled import CompiledModule
    from fxprune.compiled_parts import CompiledParts
    from fxprune.experiments.runs import Run
    from fxprune.export import OnnxReport

    Compress = Callable[[nn.Module, "DataLoader[Any]", torch.device], CompiledModule]

RUNS_ON = (
    "torch", "fxprune.compiler", "fxprune.data", "fxprune.models", "fxprune.experiments.evaluation",
    "fxprune.experiments.runs", "fxprune.saving",
)  # fmt: skip
PRUNED, ONNX = "pruned.pt", "model.onnx"


def compress(
    command: str,
    task: Task,
    how: Compress,
    *,
    config: dict[str, Any],
    folder: Path,
    calibration_images: int,
    batch_size: int,
    seed: int,
    test_images: int | None,
    register: list[str] | None,
    onnx: OnnxOptions | None,
    device: str | None,
    overwrite: bool,
) -> None:
    """Load, compress, score, export, and write the run folder; of several processes all compress, and the first does the rest.

    Args:
        command: "prune" or "low-rank".
        task: the model and its data; labels are not needed.
        how: from (model, calibration batches, device) to the compressed model.
        config: every option, for the run folder.
        folder: the run folder.
        calibration_images: at most so many.
        batch_size: of calibration.
        seed: of the choice of images.
        test_images: score on the first so many; None takes all.
        register: modules or files of the user's own.
        onnx: how to write the ONNX file; None writes none.
        device: where to compute.
        overwrite: replace the run that the folder holds.
    """
    from fxprune.data import calibration_split, make_loader
    from fxprune.experiments.evaluation import agreement, score
    from fxprune.experiments.runs import check_folder, start_run
    from fxprune.runtime.devices import default_device
    from fxprune.runtime.processes import on_first, world
    from fxprune.saving import save

    if task.model is None or task.data is None:
        raise OptionsError(
            f"name a model and images to calibrate on, with --model and --data; fxprune {command} --help"
        )
    place = default_device(device)
    import_user_code(register or ())
    if world().is_first:
        check_folder(folder, command, overwrite=overwrite)
    with working(f"reading {task.data}"):
        splits = task.load_data(labelled=False)
    model = task.trained_model(splits.info.num_classes)
    chosen, others = calibration_split(splits.train, calibration_images, seed, balanced=splits.labelled)
    calibration = make_loader(chosen, batch_size=batch_size)
    if splits.test is not None or len(others):
        test = scoring_loader(splits, images=test_images, unsplit=others)
        scored_on = "test images" if splits.test is not None else "images that were not calibrated on"
    else:
        test, scored_on = calibration, "calibration images: there are no others"
    run = on_first(lambda: start_run(folder, command, config, overwrite=overwrite))

    results: dict[str, Any] = {}
    if splits.labelled and world().is_first:
        with working("scoring the dense model"):
            dense = score(model, test, place)
        results["dense_accuracy"] = dense.accuracy
        if dense.says_nothing:
            warn(
                f"the dense model's accuracy is {dense.accuracy:.2f}%, no better than guessing ({dense.guessing:.2f}%): "
                "are these its weights, its data set, and the mean and std that it was trained with?"
            )
    compiled = how(model, calibration, place)
    if not world().is_first:
        return
    report = compiled.report
    stdout.print()
    stdout.out(report.render(color=stdout.is_terminal), highlight=False)
    _write(report.to_csv, folder / "report.csv")
    _write(report.to_json, folder / "report.json")
    save(compiled, folder / PRUNED, allow=module_classes(model))

    with working("scoring the compressed model"):
        if splits.labelled:
            results["accuracy"] = score(compiled, test, place).accuracy
        if splits.labelled or not report.why_no_classes:
            close = agreement(model, compiled, test, place)
            results |= {"agreement": close.top1, "kl": close.kl}
    done = sum(layer.is_compressed for layer in report.layers)
    results |= {
        "sparsity": report.sparsity,
        "layers_pruned": done,
        "compile_seconds": report.seconds,
        "num_classes": splits.info.num_classes,
        "input_shape": list(splits.info.input_shape),
        "mean": splits.info.mean,
        "std": splits.info.std,
    }
    exported = None
    if onnx is not None:
        exported = _export(compiled, folder / ONNX, test, onnx, labelled=splits.labelled)
        results["onnx_max_difference"] = exported.parity.max_abs
        if splits.labelled:
            results["onnx_accuracy"] = exported.parity.accuracy_onnx
    files = [PRUNED, *([ONNX, "onnx.json"] if exported is not None else []), "report.csv", "report.json"]
    if (folder / f"{ONNX}.data").is_file():  # weights beyond 2 GB
        files.append(f"{ONNX}.data")
    run.finish(results, files)
    _finish(
        run, results, exported, f"{number_of_images(test)} {scored_on}", layers=sum(x.is_read for x in report.layers)
    )


def one_graph(compiled: CompiledModule | CompiledParts) -> CompiledModule:
    """What was compiled, if it is one graph.

    Raises:
        TraceError: it is a model with compiled parts, which has no ONNX file of its own.
    """
    from fxprune.compiled import CompiledModule

    if isinstance(compiled, CompiledModule):
        return compiled
    raise TraceError(
        f"{compiled.report.notes[0]}\nThe commands score and export one graph. Compile such a model in Python: fxprune.compile "
        "gives it back with its parts compiled, each of which can be exported (docs/detectors.md)"
    )


def _export(
    compiled: CompiledModule, path: Path, test: DataLoader[Any], onnx: OnnxOptions, *, labelled: bool
) -> OnnxReport:
    with working("exporting to ONNX and validating the file"):
        from fxprune.export import export_onnx

        batch = next(iter(test))
        exported = export_onnx(compiled, path, batch[0] if labelled else batch, loader=test, **onnx.arguments())
    _write(exported.to_json, path.with_name("onnx.json"))
    stdout.print()
    stdout.print(exported.summary, markup=False, highlight=False)
    return exported


def _finish(run: Run, results: dict[str, Any], exported: OnnxReport | None, where: str, *, layers: int) -> None:
    """The closing table and the files; an error where nothing came of the run."""

    def percent(key: str) -> str:
        return f"{results[key]:.2f}%" if key in results else ""

    name = "pruned" if run.command == "prune" else "low rank"
    rows = [("dense", percent("dense_accuracy"), "", "", "")] if "dense_accuracy" in results else []
    agrees, kl = (
        format(results[key], form) if key in results else "" for key, form in (("agreement", ".2%"), ("kl", ".4f"))
    )
    rows.append((name, percent("accuracy"), agrees, kl, f"{results['sparsity']:.1%}"))
    if exported is not None:
        rows.append(("in onnxruntime", percent("onnx_accuracy"), "", "", f"{exported.sparsity:.1%}"))
    columns = [Column(where), *(Column(heading, right=True) for heading in ("accuracy", "agrees", "KL", "zeros"))]
    stdout.print()
    stdout.out(as_text(table(columns, rows, width=terminal_width()), color=stdout.is_terminal), highlight=False)
    files = [PRUNED, *([ONNX] if exported is not None else []), "report.csv", "report.json", "run.json"]
    stdout.print(f"\n{run.folder}: {', '.join(files)}", soft_wrap=True)
    if results["layers_pruned"] == 0:
        fail(
            f"none of the {layers} layers was changed, so nothing was gained; the table above says why for each. "
            "Another pattern may fit, or fewer layers in --exclude"
        )


def _write(writer: Callable[[Path], None], path: Path) -> None:
    from fxprune.files import atomic

    with atomic(path) as part:
        writer(part)
