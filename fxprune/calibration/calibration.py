"""The calibration set of one run: its loader, read as it is needed, and where and how the run takes place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.calibration.batches import count, inputs_of, map_tensors, peek, read_all, take
from fxprune.calibration.dense_twin import DenseTwin
from fxprune.calibration.holdout import drawn, held_out_count
from fxprune.calibration.observers import observers_off
from fxprune.calibration.shapes import Example, KnownShapes
from fxprune.calibration.shares import SharedLoader
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.errors import CalibrationWarning
from fxprune.graph import Runner, device_of
from fxprune.runtime.processes import world

HEAD_IMAGES = 160  # In a set of as many, the first FITTED_HEAD are never held out: some passes look at no more of it.
FITTED_HEAD = 64
OnLayer = Callable[[str, int], None]


@dataclass
class Calibration:
    """A calibration set, and what every pass that reads it has to know of the run.

    Where several processes work together, each one iterates over its own batches (`fxprune.calibration.shares`), and the head
    is that of the whole set.

    Attributes:
        loader: iterable of batches, started once only. What is looked at more than once is kept.
        device: where to compute.
        holdout: share of the images that take no part in the statistics; None: a tenth, see `held_out`.
        seed: of which images these are.
        memory_limit: bytes of live values to hold on the device (on the CPU: in memory); None: a share of what is free.
        checkpoint_dir: folder for finished layers, or None.
        on_layer: called with a layer's name and the number of stages, for progress bars.
        stopwatch: takes the time of "stream", "statistics" and "solve".
        warnings: what is wrong with the images, in sentences.
        dense: the graph before channels were removed or layers solved, where a later pass needs it.
        shapes: of the values of the run's graphs, as far as they are known.
        is_part: whether the graph is one of several parts of the user's model.
        is_share: whether the loader holds this process's batches alone; None finds out.
    """

    loader: Iterable[Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    holdout: float | None = None
    seed: int = 0
    memory_limit: int | None = None
    checkpoint_dir: str | None = None
    on_layer: OnLayer = lambda name, stages: None
    stopwatch: Stopwatch = None  # type: ignore[assignment]  # Of the device, by default.
    warnings: list[str] = field(default_factory=list)
    dense: DenseTwin | None = None
    shapes: KnownShapes = field(default_factory=KnownShapes)
    is_part: bool = False
    is_share: bool | None = None
    _first: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.stopwatch = self.stopwatch or Stopwatch(self.device)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shared or self.loader)

    @property
    def _shared(self) -> SharedLoader | None:
        """The loader as several processes read it; None for one process."""
        if world().count > 1 and not isinstance(self.loader, SharedLoader):
            self.loader = SharedLoader(self.loader, is_share=self.is_share, ahead=HEAD_IMAGES)
        return self.loader if isinstance(self.loader, SharedLoader) else None

    @property
    def first(self) -> Any:
        """The first batch, also when the loader has been read."""
        if self._first is None:
            self._first = self.head()[0]
        return self._first

    def head(self, images: int = 1) -> list[Any]:
        """The first batches, with so many images if there are.

        Raises:
            CalibrationError: if there are none, one cannot be used, or this is not a loader.
        """
        if self._shared:
            return self._shared.head(images)
        batches, self.loader = peek(self.loader, images)
        return batches

    def fitted_head(self, images: int) -> list[Any]:
        """The first batches without the images that are held out, with so many images together if there are.

        Of the last batch only as many as are asked for.
        """
        batches = self.head(max(images, HEAD_IMAGES))
        masks = self.held_out(sum(map(count, batches))).split([count(batch) for batch in batches])
        fitted: list[Any] = []
        for batch, mask in zip(batches, masks, strict=True):
            left = (~mask).nonzero()[:images, 0]
            if len(left) == len(mask):
                fitted.append(batch)
            elif len(left):
                fitted.append(take(batch, left))
            images -= len(left)
            if images <= 0:
                break
        return fitted

    def held_out(self, images: int) -> Tensor:
        """Which of the set's images are held out, (images,) bool; of a set's first HEAD_IMAGES it gives the same alone."""
        head = FITTED_HEAD if images >= HEAD_IMAGES else 0
        count = held_out_count(images, self.holdout)
        return torch.cat([torch.zeros(head, dtype=torch.bool), drawn(images - head, count, self.seed)])

    def hold(self) -> Sequence[Any]:
        """All batches (of this process), kept from now on, for what reads them more than once."""
        if self._shared:
            return self._shared.hold()
        self.loader = batches = read_all(self.loader)
        return batches

    def number(self, own: int) -> int:
        """By which number, from 0, a user knows a batch of the loader: the own-th of those that this process reads."""
        return self._shared.number(own) if self._shared else own

    def example(self, graph_module: GraphModule, batch: Sequence[Any] | None = None) -> Example:
        """A few images, and the shapes of the graph's values on them; the graph runs only if they are not known.

        Args:
            graph_module: any graph of this run.
            batch: values of its placeholders in the first batch, where they are at hand.

        Raises:
            CalibrationError: if the graph does not run on the first batch.
        """
        return self.shapes.example(graph_module) or self.run_example(graph_module, batch)[0]

    def run_example(self, graph_module: GraphModule, batch: Sequence[Any] | None = None) -> tuple[Example, Any]:
        """Run a graph on the example, and give its output too; arguments and errors as for `example`."""
        if batch is None:
            batch = self.shapes.inputs or self._first_values(graph_module)
        with observers_off(graph_module):
            return self.shapes.run(graph_module, batch)

    def images(self, graph_module: GraphModule, images: int) -> list[Any]:
        """Values of the graph's inputs: so many images of the first batch, or all where the graph takes no other number."""
        few: list[Any] = take(self.example(graph_module).inputs, slice(images))
        try:
            with torch.no_grad(), observers_off(graph_module):
                Runner(graph_module).run(*map_tensors(few, torch.clone))
        except Exception:  # Whatever it is: it has run on the example.
            return self.example(graph_module).inputs
        return few

    def _first_values(self, graph_module: GraphModule) -> list[Any]:
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        return list(inputs_of(self.first, placeholders, device=device_of(graph_module)).values())

    def warn(self, message: str) -> None:
        """Say that something is wrong with the images, here and in the report."""
        self.warnings.append(message)
        warnings.warn(message, CalibrationWarning, stacklevel=2)
