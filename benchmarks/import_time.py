"""How long `import fxprune` and the first answers of the command line take, beside `import torch`.

    python -m benchmarks.import_time --runs 9

Each line is a fresh process; medians, and the ratio to `import torch`. Files are in the page cache after the first round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

WANTED = 1.3  # `import fxprune` with its compiler, relative to `import torch`
CASES = {
    "import torch": ("-c", "import torch"),
    "import fxprune": ("-c", "import fxprune"),
    "fxprune.compile": ("-c", "import fxprune; fxprune.compile"),
    "fxprune --version": ("-m", "fxprune", "--version"),
    "fxprune --help": ("-m", "fxprune", "--help"),
    "fxprune prune --help": ("-m", "fxprune", "prune", "--help"),
}


def main() -> None:
    """Measure and print; the exit code is 1 where the compiler is not there in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(runs + 1):  # the first round fills the page cache
        for name, arguments in CASES.items():  # in turn, so that whatever else runs here meets all of them alike
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:6.2f} s {median / medians['import torch']:6.2f} x import torch")
    sys.exit(medians["fxprune.compile"] > WANTED * medians["import torch"])


if __name__ == "__main__":
    main()
