"""How fast and how small fxprune is, beside the usual ways: speed.csv, speed.md and speed_*.png.

    python -m benchmarks.speed                                  all sections on the CPU (half an hour on 2 cores)
    python -m benchmarks.speed --sections statistics,compile    some of them; the CSV keeps the others
    python -m benchmarks.speed --small                          tiny sizes, to see that it works (a minute or two)
    python -m benchmarks.speed --device cuda                    ResNet-50 and the statistics on a GPU

Sections: statistics (ResNet-18's 3x3 stride-1 layers), compile (ResNet-20), growth (images, channels, depth), resnet50,
wide (compilations in dense passes over the same images, CPU seconds), spilled (a set larger than memory).
Computations that are compared run in turn, A B A B, and ratios are taken round by round. Trained weights and CIFAR-10
images are read from `FXPRUNE_DATA` (else ../shared/data); random ones stand in for them where they are absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.speed import layer_statistics, resnet50, whole_compile, wide
from benchmarks.speed.measure import Times, load, product_rate
from benchmarks.speed.output import write_markdown, write_plots
from benchmarks.speed.rows import Row, merge
from fxprune.experiments.csv_rows import read_rows, write_rows

HERE = Path(__file__).resolve().parent
SECTIONS = ("statistics", "compile", "growth", "resnet50", "wide", "spilled")


def main(arguments: list[str] | None = None) -> None:
    """Run the sections asked for, and write the files after each."""
    given = _parser().parse_args(arguments)
    sections = SECTIONS if given.sections is None else tuple(given.sections.split(","))
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"unknown section {', '.join(sorted(unknown))}; choose of {', '.join(SECTIONS)}")
    on_gpu = torch.device(given.device).type == "cuda"
    if on_gpu:
        sections = tuple(s for s in sections if s in ("statistics", "resnet50"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(given.threads)
    output = given.output.with_name(given.output.name + ("_cuda" if on_gpu else ""))
    for section in sections:
        print(f"== {section}", flush=True)
        words = machine(given.device)
        rows = [dataclasses.replace(row, machine=words) for row in SECTION_OF[section](given)]
        rows = merge(read_rows(output.with_suffix(".csv"), Row), rows)
        write_rows(output.with_suffix(".csv"), Row, rows, number=".6g")
        write_markdown(output.with_suffix(".md"), rows, "python -m benchmarks.speed" + " --device cuda" * on_gpu)
        write_plots(output, rows)


def _statistics(given: argparse.Namespace) -> Iterator[Row]:
    rate = product_rate(given.device, 256 if given.small else 2048)
    flop = 2e-9 * (256 if given.small else 2048) ** 3
    yield Row.of(
        "statistics", "one large product, 2048x2048 float32", "the machine's limit", Times((flop / rate,)),
        gflop=flop, load=load(), threads=given.threads,
    )  # fmt: skip
    sizes: dict[str, tuple[tuple[int, int], ...]] = {"CIFAR": ((16, 16),)}
    if not given.small:
        sizes = {"CIFAR": layer_statistics.CIFAR, "ImageNet": layer_statistics.IMAGENET}
    images = (
        {"CIFAR": 8, "ImageNet": 2} if given.small else {"CIFAR": given.cifar_batch, "ImageNet": given.imagenet_batch}
    )
    yield from layer_statistics.run(sizes, images, repeats=given.repeats, device=given.device, say=_say)


def _compile(given: argparse.Namespace) -> Iterator[Row]:
    images = 32 if given.small else given.images
    exact_obs = not given.small and not given.no_exact_obs
    return whole_compile.run("resnet20", given.data, images, repeats=given.repeats, exact_obs=exact_obs, say=_say)


def _growth(given: argparse.Namespace) -> Iterator[Row]:
    return whole_compile.growth(given.data, repeats=given.repeats, small=given.small, say=_say)


def _resnet50(given: argparse.Namespace) -> Iterator[Row]:
    on_gpu = torch.device(given.device).type == "cuda"
    images = given.resnet50_images or (1024 if on_gpu else 128)
    budget = given.budget_gib or (16.0 if on_gpu else 8.0)
    if given.small:
        yield resnet50.run(2, 32, given.device, given.threads, budget, "resnet20", "magnitude")
    else:
        yield resnet50.run(images, 224, given.device, given.threads, budget, "resnet50", given.resnet50_method)


def _wide(given: argparse.Namespace) -> Iterator[Row]:
    return wide.run(given.wide_cases.split(","), small=given.small, say=_say)


def _spilled(given: argparse.Namespace) -> Iterator[Row]:
    return wide.spilled(given.data, repeats=given.repeats, small=given.small, say=_say)


SECTION_OF = {
    "statistics": _statistics,
    "compile": _compile,
    "growth": _growth,
    "resnet50": _resnet50,
    "wide": _wide,
    "spilled": _spilled,
}


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    data = os.environ.get("FXPRUNE_DATA", HERE.parents[2] / "shared/data")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}; all of them if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--output", type=Path, default=HERE.parent / "speed", help="path without suffix")
    parser.add_argument("--images", type=int, default=1024, help="calibration images of the compile section")
    parser.add_argument("--no-exact-obs", action="store_true", help="leave the slow reference out")
    parser.add_argument("--cifar-batch", type=int, default=128)
    parser.add_argument("--imagenet-batch", type=int, default=32)
    parser.add_argument("--resnet50-images", type=int, help="128 on the CPU, 1024 on a GPU if not given")
    parser.add_argument("--resnet50-method", default="admm")
    parser.add_argument("--wide-cases", default=",".join(wide.CASES), help="of the wide section")
    parser.add_argument("--budget-gib", type=float, help="memory for ResNet-50; 8 on the CPU, 16 on a GPU if not given")
    return parser


if __name__ == "__main__":
    main()
