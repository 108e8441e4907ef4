"""Which networks go through every stage: coverage.csv and coverage.md.

    python -m benchmarks.coverage                                the networks that coverage.csv does not have yet
    python -m benchmarks.coverage --fresh                        all of them again
    python -m benchmarks.coverage --only 'timm/*' --failed       again those of timm that did not go through
    python -m benchmarks.coverage --only awkward/Recurrent --debug     with tracebacks, in this process; nothing is written

Each network has a process and a time limit of its own, and its row is written as soon as it is done, so that a run can be
stopped and continued. Packages that are not installed are said to be so: timm, ultralytics, segmentation_models_pytorch,
facenet-pytorch, torchcrepe.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.coverage.output import write_markdown
from benchmarks.coverage.process import run_in_process
from benchmarks.coverage.row import Row
from benchmarks.coverage.stages import run
from benchmarks.coverage.zoos import cases
from fxprune.experiments.csv_rows import read_rows, write_rows

OUTPUT = Path(__file__).resolve().parent.parent / "coverage"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write the files after each network."""
    given = _parser().parse_args(arguments)
    table, known = given.output.with_suffix(".csv"), cases()
    done = {f"{row.zoo}/{row.model}": row for row in read_rows(table, Row)}
    chosen = [name for name in known if any(fnmatchcase(name, wanted) for wanted in given.only)]
    if not chosen:
        raise SystemExit(f"--only: no network is called {' or '.join(given.only)}; there are {', '.join(known)}")
    if given.debug:
        for name in chosen:
            print(run(known[name], pattern=given.pattern, method=given.method, debug=True))
        return
    if not given.fresh:
        chosen = [n for n in chosen if n not in done or (given.failed and not done[n].is_through)]
    for number, name in enumerate(chosen, 1):
        done[name] = row = run_in_process(name, given.pattern, given.method, limit=given.limit)
        told = "; ".join([*(f"{s}: {why}" for s, why in row.failed.items() if why), row.note]) or "through"
        print(f"[{number}/{len(chosen)}] {name}: {told.strip('; ') or 'through'} ({row.seconds:.0f} s)", flush=True)
        rows = [done[n] for n in known if n in done]
        write_rows(table, Row, rows, number=".4g")
        write_markdown(given.output.with_suffix(".md"), rows, given.pattern, given.method)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="zoo/name or fnmatch patterns of such")
    parser.add_argument("--fresh", action="store_true", help="also those that are in the table already")
    parser.add_argument("--failed", action="store_true", help="of those in the table the ones that did not go through")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--limit", type=int, default=240, help="seconds for a network")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--debug", action="store_true", help="in this process, with tracebacks; writes nothing")
    return parser


if __name__ == "__main__":
    main()
