"""Accuracy of one-shot pruning methods on trained CIFAR-10 networks: a CSV, a plot, one command.

    python -m benchmarks.accuracy --data ../shared/data --models resnet20 --patterns 2:4,1:4

Rows that are already in the CSV are kept, so that a run can be stopped and continued. Accuracy is measured on the lossless
test images and on the JPEG test images, agreement and KL(dense || pruned) on the first 3,000 JPEG test images.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

import fxprune
from benchmarks import modelopt_sparsity
from benchmarks.machine import machine
from fxprune import Options
from fxprune.data import load_npz
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.csv_rows import append_rows, read_lines
from fxprune.passes import ReestimateBatchNorm

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREDICTIONS = Path("out/accuracy")
AGREEMENT_IMAGES = 3000
BATCH = 128

Method = Callable[[nn.Module, Sequence[Tensor], str], nn.Module]


def compiled_with(method: str, **options: object) -> Method:
    """A method of fxprune with options."""
    return lambda model, batches, pattern: fxprune.compile(
        model, batches, pattern, method=method, device=batches[0].device, progress=False, options=Options(**options)
    )


def published_obs(model: nn.Module, batches: Sequence[Tensor], pattern: str) -> nn.Module:
    """Exact OBS as published: statistics of the dense model, BatchNorm not folded."""
    return compiled_with("exact_obs", inputs="dense", fold_batchnorm=False)(model, batches, pattern)


def published_obs_batchnorm(model: nn.Module, batches: Sequence[Tensor], pattern: str) -> nn.Module:
    """The same, and BatchNorm statistics re-estimated on the calibration images."""
    pruned = published_obs(model, batches, pattern)
    ReestimateBatchNorm(batches)(pruned)
    return pruned


def modelopt(model: nn.Module, batches: Sequence[Tensor], pattern: str) -> nn.Module:
    """NVIDIA modelopt's SparseGPT mode, which keeps the first convolution and the classifier dense."""
    if pattern != modelopt_sparsity.PATTERN:
        raise typer.BadParameter(f"modelopt prunes {modelopt_sparsity.PATTERN}, not {pattern}")
    return modelopt_sparsity.prune(model, batches)


METHODS: dict[str, Method] = {
    "magnitude": compiled_with("magnitude"),
    "sparsegpt": compiled_with("sparsegpt"),
    "exact_obs": published_obs,
    "exact_obs + BatchNorm": published_obs_batchnorm,
    "modelopt": modelopt,
    "ours without permutation": compiled_with("admm", permute=False),
    "ours": compiled_with("admm"),
    "ours + all patches": compiled_with("admm", patches=0),
    "ours + budget": compiled_with("admm", global_budget=True),
    "ours + polish": compiled_with("admm", polish=8, flip=True),
    # What each ingredient gives, one after the other.
    "admm with its own target": compiled_with(
        "admm", target="weights", bias_correction=False, reconstruct=False, permute=False
    ),
    "+ dense target": compiled_with("admm", target="dense", bias_correction=False, reconstruct=False, permute=False),
    "+ bias": compiled_with("admm", target="dense", reconstruct=False, permute=False),
    "+ skip target": compiled_with("admm", target="skip", reconstruct=False, permute=False),
    # + ReLU-aware target (from LIGHT_SPARSITY on): "ours without permutation"; + permutation: "ours".
}


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies and agreement in percent, KL in nats, seconds of processor time."""

    model: str
    pattern: str
    method: str
    sparsity: float
    accuracy: float
    accuracy_jpeg: float
    agreement: float
    kl: float
    seconds: float
    images: int
    machine: str


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """All logits, (N, classes) float64."""
    return torch.cat([model(batch) for batch in images.split(500)]).double()


def images_of(path: Path, split: str | None, first: int | None = None, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Normalised images (N, C, H, W) and labels (N,)."""
    images, labels = load_npz(path, split, first=first, **NORMALISATION)[:]
    return images.to(device), labels.to(device)


def measure(model: nn.Module, dense: dict[str, Tensor], test: dict[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """Accuracies, agreement and KL of a pruned model, and its JPEG predictions."""
    lossless, jpeg = (logits(model, test[name][0]) for name in ("lossless", "jpeg"))
    a, b = dense["jpeg"][:AGREEMENT_IMAGES], jpeg[:AGREEMENT_IMAGES]
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    right = {name: out.argmax(1) == test[name][1] for name, out in (("lossless", lossless), ("jpeg", jpeg))}
    return {
        "accuracy": 100 * float(right["lossless"].double().mean()),
        "accuracy_jpeg": 100 * float(right["jpeg"].double().mean()),
        "agreement": 100 * float((a.argmax(1) == b.argmax(1)).double().mean()),
        "kl": float((log_a.exp() * (log_a - log_b)).sum(1).mean()),
        "right": right["jpeg"].cpu().numpy(),
    }


def sparsity(pruned: nn.Module) -> float:
    """The share of zeros in the layers that were pruned."""
    if isinstance(pruned, fxprune.CompiledModule):
        return pruned.report.sparsity
    weights = [m.weight for m in pruned.modules() if isinstance(m, nn.Conv2d | nn.Linear) and (m.weight == 0).any()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p-value that two models are right equally often, from which images only one gets right."""
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b).pvalue)


def main(
    data: Annotated[Path, typer.Option(help="folder that holds cifar10/")] = Path("../shared/data"),
    models: str = "resnet20",
    patterns: str = "2:4,1:4",
    methods: str = "magnitude,sparsegpt,ours without permutation,ours",
    images: int = 1024,
    threads: int = 2,
    device: Annotated[str, typer.Option(help="where everything runs: cpu, cuda")] = "cpu",
    output: Path = Path("benchmarks/accuracy.csv"),
) -> None:
    """Fill the table for every combination that is not in it yet."""
    torch.set_num_threads(threads)
    cifar = data / "cifar10"
    calibration, _ = images_of(cifar / "cifar10_subset.npz", "train", images, device)
    test = {
        "lossless": images_of(cifar / "cifar10_subset.npz", "test", device=device),
        "jpeg": images_of(cifar / "cifar10_jpeg_test.npz", None, device=device),
    }
    batches = calibration.split(BATCH)
    words = machine(device)
    rows = read_lines(output)
    done = {(row["model"], row["pattern"], row["method"], row["images"]) for row in rows}
    torch.backends.cudnn.allow_tf32 = False
    for name in models.split(","):
        model = load_weights(fxprune.models.create(name), cifar / WEIGHTS[name]).to(device).eval()
        dense = {key: logits(model, pictures) for key, (pictures, _) in test.items()}
        if (name, "", "dense", str(images)) not in done:
            found = measure(model, dense, test)
            right = found.pop("right")
            dense_row = Row(name, "", "dense", 0.0, **found, seconds=0.0, images=images, machine=words)
            append_rows(output, [dense_row], number=".4f")
            keep(PREDICTIONS, name, "", "dense", right)
        for pattern, method in itertools.product(patterns.split(","), methods.split(",")):
            method = next(known for known in METHODS if known == method.strip())
            if (name, pattern, method, str(images)) in done:
                continue
            started = time.process_time()  # Not wall time: a table takes hours, in which the machine does other things.
            pruned = METHODS[method](model, batches, pattern)
            seconds = time.process_time() - started
            found = measure(pruned, dense, test)
            keep(PREDICTIONS, name, pattern, method, found.pop("right"))
            row = Row(name, pattern, method, sparsity(pruned), **found, seconds=seconds, images=images, machine=words)
            append_rows(output, [row], number=".4f")
            print(f"{name} {pattern} {method}: {row.accuracy:.2f} / {row.accuracy_jpeg:.2f} / {row.agreement:.2f} / "
                  f"{row.kl:.4f}, {seconds:.0f} s", flush=True)  # fmt: skip
    significance(PREDICTIONS, read_lines(output), output.with_name(output.stem + "_significance.csv"))


def keep(folder: Path, model: str, pattern: str, method: str, right: np.ndarray) -> None:
    """Which JPEG images were right, for paired tests."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{model}_{pattern.replace(':', '-')}_{method.replace(' ', '_')}.npy", right)


def significance(folder: Path, rows: list[dict[str, str]], path: Path) -> None:
    """Write, for each method, McNemar's p against ours on the JPEG test images, from the predictions kept in the folder."""
    lines = ["model,pattern,method,p_against_ours"]
    for row in rows:
        stem = f"{row['model']}_{row['pattern'].replace(':', '-')}"
        ours, other = folder / f"{stem}_ours.npy", folder / f"{stem}_{row['method'].replace(' ', '_')}.npy"
        if row["method"] not in ("ours", "dense") and ours.exists() and other.exists():
            p = mcnemar(np.load(ours), np.load(other))
            lines.append(f"{row['model']},{row['pattern']},{row['method']},{p:.2g}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
