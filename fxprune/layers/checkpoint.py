"""Keeps finished layers on disk, so that an interrupted compilation goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.errors import OptionsError
from fxprune.files import save_tensors
from fxprune.geometry import LayerGeometry
from fxprune.layers.constraint import chain_text
from fxprune.layers.solve import SolvedLayer, SolvedPart
from fxprune.options import Method
from fxprune.runtime.processes import from_process, of_first, world

SUFFIX = ".layer.pt"


class LayerCheckpoint:
    """A folder with one file for each finished layer, and a manifest that says of which run they are.

    Without a folder nothing is kept and nothing is found. Of several processes the first one alone reads and writes it.

    Args:
        folder: None in all processes but the first, and without a folder.
        finished: names of the layers that an earlier run has finished.
    """

    def __init__(self, folder: Path | None, finished: frozenset[str] = frozenset()) -> None:
        self.folder = folder
        self.finished = finished

    @classmethod
    def open(cls, folder: str | None, graph_module: GraphModule, method: Method) -> LayerCheckpoint:
        """Open a folder, made if need be.

        Raises:
            OptionsError: if it holds the layers of another model, of other constraints, another method or other options.
        """
        checkpoint = cls(None)
        if folder is not None and world().is_first:
            checkpoint = cls._opened(Path(folder), graph_module, method)
        return cls(checkpoint.folder, of_first(checkpoint.finished))

    @classmethod
    def _opened(cls, path: Path, graph_module: GraphModule, method: Method) -> LayerCheckpoint:
        path.mkdir(parents=True, exist_ok=True)
        chains = {
            str(n.target): chain_text(annotation(n).chain)
            for n in graph_module.graph.nodes
            if annotation(n).role not in ("", "repeat")
        }
        run = {
            "model": _fingerprint(graph_module),
            "constraints": chains,
            "method": method.name,
            "options": dataclasses.asdict(method.options),
        }
        checkpoint = cls(path)
        checkpoint._agree("run.json", run)
        return cls(path, frozenset(file.name.removesuffix(SUFFIX) for file in path.glob(f"*{SUFFIX}")))

    def check_data(self, fingerprint: str) -> None:
        """Make sure that a resumed run sees the same calibration data.

        Raises:
            OptionsError: if it does not.
        """
        if self.folder is not None:
            self._agree("data.json", {"calibration data": fingerprint})

    def has(self, name: str) -> bool:
        """Whether a layer is finished."""
        return name in self.finished

    def load(self, name: str) -> SolvedLayer | None:
        """A finished layer, or None."""
        if not self.has(name):
            return None
        return from_process(0, self._read(name) if world().is_first else None)

    def _read(self, name: str) -> SolvedLayer:
        kept = torch.load(self._file(name), weights_only=True)
        parts = tuple(SolvedPart(LayerGeometry(**part.pop("geometry")), **part) for part in kept.pop("parts"))
        return SolvedLayer(parts, **kept)

    def save(self, name: str, layer: SolvedLayer) -> None:
        """Keep a finished layer.

        Raises:
            CheckpointError: if its file cannot be written.
        """
        if self.folder is not None:
            parts = [_fields(part) | {"geometry": _fields(part.geometry)} for part in layer.parts]
            save_tensors(_fields(layer) | {"parts": parts}, self._file(name))

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"

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


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, as they are."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _fingerprint(graph_module: GraphModule) -> str:
    """A hash of the graph and of every parameter and buffer."""
    digest = hashlib.sha256(graph_module.code.encode())
    for name, tensor in sorted(graph_module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
