"""A run folder: what was asked for, with what it was made, and what came out, so that it can be made again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import DataError
from fxprune.experiments.yaml_files import to_yaml
from fxprune.files import atomic

CONFIG, RECORD = "config.yaml", "run.json"
PACKAGES = ("fxprune", "torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Run:
    """A run that has been started.

    Attributes:
        folder: receives config.yaml at the start and run.json at the end.
        command: "train", "prune", ...
        config: every option of the command, as resolved.
        started: seconds since the epoch.
    """

    folder: Path
    command: str
    config: Mapping[str, Any]
    started: float

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write run.json: the results, and all that they may depend on.

        Args:
            results: plain values; they are the last thing in the file.
        """
        begun = datetime.fromtimestamp(self.started, tz=timezone.utc)
        record = {
            "command": self.command,
            "arguments": shlex.join(sys.argv[1:]),
            "started": begun.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 2),
            "git_commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
            "config": dict(self.config),
            "results": dict(results),
        }
        with atomic(self.folder / RECORD) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def start_run(folder: str | Path, command: str, config: Mapping[str, Any]) -> Run:
    """Make a run folder with its config.yaml, which the command takes as --config to do the same again.

    A run.json from an earlier run goes, so that there is none until this run has finished.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    with atomic(folder / CONFIG) as part:
        part.write_text(to_yaml(config), encoding="utf-8")
    (folder / RECORD).unlink(missing_ok=True)
    return Run(folder, command, dict(config), time.time())


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the run.json of a finished run.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no finished run of fxprune: {error}") from error
    if not isinstance(record, dict) or not {"config", "results"} <= set(record):
        raise DataError(f"{path} is no record of a run of fxprune")
    return record


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A source tree that is on the path and not installed has no metadata.
    found["fxprune"] = str(getattr(sys.modules.get("fxprune"), "__version__", found.get("fxprune", "unknown")))
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def source_commit() -> str | None:
    """The commit of fxprune's source tree, with "+changes" if files differ from it; None outside a git work tree."""
    here = Path(__file__)
    try:
        # Fails where the package is installed: a site-packages inside somebody's repository does not track it.
        _git("ls-files", "--error-unmatch", here.name)
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
