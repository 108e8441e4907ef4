"""Keeps finished layers on disk, so that an interrupted compilation goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.fx import GraphModule

from fxprune.errors import OptionsError
from fxprune.files import save_tensors
from fxprune.layer_solution import SolvedLayer
from fxprune.options import Options
from fxprune.pattern import Pattern

NOT_PART_OF_THE_RESULT = ("checkpoint_dir", "memory_limit")


class LayerCheckpoint:
    """A folder with one file for each finished layer, and a manifest that says of which run they are.

    Without a folder nothing is kept and nothing is found.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, graph_module: GraphModule, pattern: Pattern, method: str, options: Options) -> LayerCheckpoint:
        """Open `options.checkpoint_dir`, made if need be.

        Raises:
            OptionsError: if the folder holds the layers of another model, pattern, method or other options.
        """
        if options.checkpoint_dir is None:
            return cls(None)
        folder = Path(options.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {k: v for k, v in dataclasses.asdict(options).items() if k not in NOT_PART_OF_THE_RESULT}
        run = {"model": _fingerprint(graph_module), "pattern": str(pattern), "method": method, "options": chosen}
        checkpoint = cls(folder)
        checkpoint._agree("run.json", run)
        return checkpoint

    def check_data(self, fingerprint: str) -> None:
        """Make sure that a resumed run sees the same calibration data.

        Raises:
            OptionsError: if it does not.
        """
        if self.folder is not None:
            self._agree("data.json", {"calibration data": fingerprint})

    def has(self, name: str) -> bool:
        """Whether a layer is finished."""
        return self.folder is not None and self._file(name).exists()

    def load(self, name: str) -> SolvedLayer | None:
        """A finished layer, or None."""
        return SolvedLayer(**torch.load(self._file(name), weights_only=True)) if self.has(name) else None

    def save(self, name: str, layer: SolvedLayer) -> None:
        """Keep a finished layer.

        Raises:
            CheckpointError: if its file cannot be written.
        """
        if self.folder is None:
            return
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
        save_tensors(fields, self._file(name))

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.layer.pt"

    def _agree(self, file: str, found: Mapping[str, object]) -> None:
        """Write what a run is, or compare it with what was written."""
        assert self.folder is not None
        path = self.folder / file
        if not path.exists():
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            return
        written = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in found.items() if json.loads(json.dumps(value)) != written.get(key)]
        if differing:
            raise OptionsError(
                f"checkpoint_dir {str(self.folder)!r} holds layers of a run with another {', another '.join(differing)}; "
                "give an empty folder, or the same model, data and settings"
            )


def _fingerprint(graph_module: GraphModule) -> str:
    """A hash of the graph and of every parameter and buffer."""
    digest = hashlib.sha256(graph_module.code.encode())
    for name, tensor in sorted(graph_module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
