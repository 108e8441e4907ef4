"""A run folder: what was asked for, with what it was made, and what came out, so that it can be made again."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fxprune.data import list_data
from fxprune.errors import DataError, OptionsError
from fxprune.experiments.yaml_files import to_yaml
from fxprune.files import atomic

CONFIG, RECORD = "config.yaml", "run.json"
# What each command may write beside these two.
_COMPRESSED = ("pruned.pt", "model.onnx", "model.onnx.data", "onnx.json", "report.csv", "report.json")
WRITES = {
    "train": ("best.pt", "last.pt", "log.csv"),
    "prune": _COMPRESSED,
    "low-rank": _COMPRESSED,
    "scan": ("scan.csv", "scan.png", "scan.svg"),
}
_PATHS = ("weights", "root", "out", "checkpoint_dir")
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

    def finish(self, results: Mapping[str, Any], files: Sequence[str] = ()) -> None:
        """Write run.json: the results, and all that they may depend on.

        Args:
            results: plain values; they are the last thing in the file.
            files: names of the files in the folder that this run wrote, beside config.yaml and run.json.
        """
        begun = datetime.fromtimestamp(self.started, tz=timezone.utc)
        record = {
            "command": self.command,
            "arguments": shlex.join(sys.argv[1:]),
            "working_directory": os.getcwd(),
            "started": begun.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 2),
            "git_commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
            "config": dict(self.config),
            "files": [CONFIG, RECORD, *files],
            "results": dict(results),
        }
        with atomic(self.folder / RECORD) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _EarlierRun:
    """What a folder holds of a run.

    Attributes:
        command: that made it; "" where nothing says.
        finished: whether it has a run.json.
        files: all that it wrote and that is there.
    """

    command: str
    finished: bool
    files: tuple[Path, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it failed before it wrote anything: a corrected command may use the folder."""
        results = [file for file in self.files if file.name != CONFIG and not file.name.startswith(".")]
        return bool(self.command) and not self.finished and not results


def check_folder(folder: str | Path, command: str, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that holds another run, so that none is ever a mix of two.

    Args:
        folder: that the command is to write to.
        command: "train", "prune", ...
        overwrite: that run may be replaced.
        resume: a run of the same command may be continued.

    Raises:
        OptionsError: the folder is used; the message says by what, and the remedy.
    """
    earlier = _earlier_run(Path(folder), command)
    if earlier is None or earlier.is_empty or overwrite or (resume and earlier.command == command):
        return
    run = f"{'a' if earlier.finished else 'an unfinished'} run of fxprune {earlier.command}" if earlier.command else (
        f"{', '.join(sorted(file.name for file in earlier.files))}, which fxprune {command} would write"
    )  # fmt: skip
    go_on = "go on with --resume, " if command == "train" and earlier.command == "train" and not resume else ""
    raise OptionsError(f"{folder} holds {run}: {go_on}replace it with --overwrite, or name another folder with --out")


def start_run(
    folder: str | Path, command: str, config: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Run:
    """Make a run folder with its config.yaml, which the command takes as --config to do the same again.

    There is no run.json until the run has finished. Paths in the configuration become absolute, so that it means the same in
    any directory.

    Args:
        folder: where; made where absent.
        command: "train", "prune", ...
        config: every option of the command.
        overwrite: remove what an earlier run wrote there, and nothing else.
        resume: keep what an earlier run of the same command wrote there.

    Raises:
        OptionsError: the folder holds another run (`check_folder`), or this one reads what it would remove.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, command, overwrite=overwrite, resume=resume)
    earlier = None if resume and not overwrite else _earlier_run(folder, command)
    if earlier is not None:
        _refuse_to_remove_input(earlier.files, config)
        for file in earlier.files:
            file.unlink(missing_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    config = absolute_paths(config)
    with atomic(folder / CONFIG) as part:
        part.write_text(f"# fxprune {command}\n{to_yaml(config)}", encoding="utf-8")
    return Run(folder, command, config, time.time())


def absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A command's options with the paths among them absolute: files, and data sets and user code that are files."""

    def absolute(value: str) -> str:
        return str(Path(value).expanduser().absolute())

    made = dict(config)
    made |= {key: absolute(made[key]) for key in _PATHS if made.get(key)}
    if made.get("data") and Path(made["data"]).exists() and made["data"] not in list_data():
        made["data"] = absolute(made["data"])
    if made.get("register"):
        made["register"] = [absolute(name) if name.endswith(".py") else name for name in made["register"]]
    place, colon, name = (made.get("model") or "").rpartition(":")
    if place.endswith(".py"):  # my_models.py:MyModel
        made["model"] = absolute(place) + colon + name
    return made


def _earlier_run(folder: Path, command: str) -> _EarlierRun | None:
    """The run that a folder holds, or files of the names that `command` would write; None if there is neither."""
    config, record = folder / CONFIG, folder / RECORD
    by, names = "", [name for name in WRITES.get(command, ()) if (folder / name).exists()]
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            by, names = str(found["command"]), list(found.get("files") or WRITES[found["command"]])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    elif config.is_file():
        with config.open(encoding="utf-8", errors="replace") as file:
            header = re.match(r"# fxprune ([\w-]+)\n", file.readline())
        if header is not None and header[1] in WRITES:
            by, names = header[1], [*WRITES[header[1]]]
    # A run that was killed leaves a part of the file that it was writing (`atomic`).
    names = [name for name in (*names, CONFIG, RECORD) if isinstance(name, str) and Path(name).name == name]
    parts = [part for name in names for part in folder.glob(f".*-{glob.escape(name)}") if _is_part(part, name)]
    files = tuple(dict.fromkeys(file for file in (*(folder / name for name in names), *parts) if file.is_file()))
    return _EarlierRun(by, record.is_file(), files) if files else None


def _is_part(file: Path, name: str) -> bool:
    return re.fullmatch(rf"\.\d+-{re.escape(name)}", file.name) is not None


def _refuse_to_remove_input(files: Sequence[Path], config: Mapping[str, Any]) -> None:
    for key in ("weights", "data"):
        value = config.get(key)
        if value and any(file.resolve() == Path(value).resolve() for file in files):
            raise OptionsError(
                f"{key} is {value}, which --overwrite would remove with the run that made it; name another folder with --out"
            )


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
