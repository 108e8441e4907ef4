"""Where the live values of calibration batches wait between two cuts: on the device, in host memory, or on disk.

Batches are visited in the same order at every cut. So those that fit stay where they are, and only the rest moves; keeping the
most recently used ones instead would move every batch every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, dropwhile
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fxprune.calibration.scratch import ScratchFiles

SHARE_OF_FREE_DEVICE_MEMORY = 0.5
SHARE_OF_FREE_HOST_MEMORY = 0.6


@dataclass
class BatchValues:
    """The live values of one batch: of the dense model, and of the pruned model where they differ."""

    dense_values: dict[Node, Any] = field(default_factory=dict)
    pruned_values: dict[Node, Any] = field(default_factory=dict)

    def dense(self, node: Node) -> Any:
        """The value of a node in the dense model."""
        return self.dense_values[node]

    def pruned(self, node: Node) -> Any:
        """The value of a node in the pruned model."""
        return self.pruned_values[node] if node in self.pruned_values else self.dense_values[node]

    def forget(self, nodes: list[Node]) -> None:
        """Drop the values of nodes that nothing reads any more."""
        for node in nodes:
            self.dense_values.pop(node, None)
            self.pruned_values.pop(node, None)

    def tensors(self) -> Iterator[Tensor]:
        """Every distinct tensor held, parameters left out."""
        seen: set[int] = set()
        for held in chain(self.dense_values.values(), self.pruned_values.values()):
            for value in [held] if isinstance(held, Tensor) else tree_leaves(held):
                if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held; views of one storage count once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def mapped(self, move: Callable[[Tensor], Tensor]) -> BatchValues:
        """The same values with every distinct tensor replaced once."""
        moved = {id(t): move(t) for t in self.tensors()}
        dense, pruned = tree_map(lambda v: moved.get(id(v), v), (self.dense_values, self.pruned_values))
        return BatchValues(dense, pruned)


@dataclass
class _Slot:
    """One batch at rest."""

    values: BatchValues | None
    nbytes: int
    tier: str
    spec: Any = None


class BatchStore:
    """Holds the values of all batches between two cuts.

    Args:
        device: where the values are computed.
        memory_limit: bytes to hold on the device (on the CPU: in memory). None: a share of what is free.
    """

    def __init__(self, device: torch.device, memory_limit: int | None = None) -> None:
        self.device = device
        host = int(SHARE_OF_FREE_HOST_MEMORY * psutil.virtual_memory().available)
        if device.type == "cuda":
            free = int(SHARE_OF_FREE_DEVICE_MEMORY * torch.cuda.mem_get_info(device)[0])
            self._limits = {"device": memory_limit or free, "host": host}
        else:
            self._limits = {"device": memory_limit or host, "host": 0}
        self._slots: dict[int, _Slot] = {}
        self._held = {"device": 0, "host": 0, "disk": 0}
        self._scratch: ScratchFiles | None = None
        self.peak_bytes = 0
        self.spilled_bytes = 0

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, number: int, values: BatchValues) -> None:
        """Store a batch's values in the first tier that has room."""
        nbytes = values.nbytes
        tier = next((t for t, limit in self._limits.items() if self._held[t] + nbytes <= limit), "disk")
        if tier == "device":
            slot = _Slot(values, nbytes, tier)
        elif tier == "host":
            slot = _Slot(values.mapped(lambda t: t.to("cpu").pin_memory()), nbytes, tier)
        else:
            slot = self._write(number, values, nbytes)
        self._slots[number] = slot
        self._held[tier] += nbytes
        self.spilled_bytes = max(self.spilled_bytes, self._held["disk"])
        self.peak_bytes = max(self.peak_bytes, self._held["device"] + self._held["host"])

    def take(self, number: int) -> BatchValues:
        """Remove and return a batch's values, on the device."""
        values = self.look(number)
        slot = self._slots.pop(number)
        self._held[slot.tier] -= slot.nbytes
        return values

    def look(self, number: int) -> BatchValues:
        """A batch's values, on the device; they stay in the store."""
        slot = self._slots[number]
        if slot.values is None:
            return self._read(number, slot)
        if slot.tier == "device":
            return slot.values
        return slot.values.mapped(lambda t: t.to(self.device, non_blocking=True))

    def _write(self, number: int, values: BatchValues, nbytes: int) -> _Slot:
        """Write the tensors to a scratch file; everything else about the batch stays in memory."""
        if self._scratch is None:
            self._scratch = ScratchFiles()
        leaves, spec = tree_flatten((values.dense_values, values.pruned_values))
        tensors = {id(t): i for i, t in enumerate(values.tensors())}
        self._scratch.write(number, list(values.tensors()))
        kept = [_Saved(tensors[id(leaf)]) if id(leaf) in tensors else leaf for leaf in leaves]
        return _Slot(None, nbytes, "disk", (kept, spec))

    def _read(self, number: int, slot: _Slot) -> BatchValues:
        assert self._scratch is not None
        tensors = [t.to(self.device) for t in self._scratch.read(number)]
        # Batches are visited in the order in which they were put.
        later = dropwhile(lambda key: key != number, self._slots)
        following = next((key for key in later if key != number and self._slots[key].values is None), None)
        if following is not None:
            self._scratch.read_ahead(following)
        kept, spec = slot.spec
        return BatchValues(*tree_unflatten([tensors[v.index] if isinstance(v, _Saved) else v for v in kept], spec))


@dataclass(frozen=True)
class _Saved:
    """Stands for the tensor at an index of the scratch file."""

    index: int
