"""The inputs of a file: what they are called, which of their sizes are open, and at which sizes the file is followed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fxprune.calibration.batches import inputs_of
from fxprune.errors import OnnxImportError
from fxprune.export.onnx_file import Port
from fxprune.onnx_import.graph import BATCH, FILE, SIZE, torch_dtype
from fxprune.onnx_import.names import input_name
from fxprune.onnx_import.read import Source

# Heights and widths to try where a file leaves them open and there is no example: of classifiers, lines of text, small images.
GUESSES = ((224, 224), (48, 320), (32, 320), (640, 640), (64, 64), (32, 32), (28, 28))
GROWTH = 64  # How much larger the images are at the probe of another size.
CHANNELS = 3  # Where even these are open.


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a file takes.

    Attributes:
        ports: of the file.
        names: for arguments of forward.
        shapes: at the file's own batch size, with open sizes as in the example.
        open_axes: of each input, axes behind the batch whose size is open.
        batch: images in a batch of the file's own.
        is_open: whether the file leaves its batch size open.
        batched: whether the first axis of an input is that of the batch.
        images: in the example; None without one.
        values: the example's; random numbers without one.
        kept: names that no weight may have.
    """

    ports: tuple[Port, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    open_axes: tuple[tuple[int, ...], ...]
    batch: int
    is_open: bool
    batched: tuple[bool, ...]
    images: int | None
    values: tuple[Tensor, ...]
    kept: frozenset[str]

    @classmethod
    def of(cls, source: Source, example: Any) -> list[Inputs]:
        """Read the inputs of a file, with an example batch or None; several readings where sizes have to be guessed.

        Raises:
            OnnxImportError: the example does not fit.
        """
        names: list[str] = []
        for i, port in enumerate(source.inputs):
            name = input_name(port.name, i)
            names.append(name if name not in names else f"{name}_{i}")
        values = None if example is None else _given(source, names, example)
        is_open = any(p.shape and not _is_fixed(p.shape[0]) for p in source.inputs)
        batch = 1 if is_open else next((int(p.shape[0]) for p in source.inputs if p.shape), 1)
        # Beside inputs whose first axis is open, one with a fixed axis holds no batch.
        batched = tuple(
            bool(p.shape) and (not _is_fixed(p.shape[0]) if is_open else p.shape[0] == batch) for p in source.inputs
        )
        found: list[Inputs] = []
        for side in GUESSES:
            given = None if values is None else [tuple(x.shape) for x in values]
            shapes = _shapes(source.inputs, batch, side, given)
            if found and shapes == found[0].shapes:
                break
            found.append(
                cls(
                    source.inputs,
                    tuple(names),
                    shapes,
                    _open_axes(source.inputs),
                    batch,
                    is_open,
                    batched,
                    None if values is None or not values[0].dim() else len(values[0]),
                    tuple(values or _random(source.inputs, shapes)),
                    frozenset(port.name for port in (*source.inputs, *source.outputs)),
                )
            )
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The probes to follow the file at."""
        return (FILE, *([BATCH] if any(self.batched) else []), *([SIZE] if any(self.open_axes) else []))

    def narrowed(self) -> Iterator[Inputs]:
        """The same, then with the heights taken for fixed, the widths, and both, as far as they are open."""
        yield self
        for axes in ((-2,), (-1,), (-2, -1), (-3, -2, -1)):
            kept = tuple(
                tuple(i for i in open_axes if i - len(shape) not in axes)
                for open_axes, shape in zip(self.open_axes, self.shapes, strict=True)
            )
            if kept != self.open_axes:
                yield replace(self, open_axes=kept)

    @property
    def many(self) -> int:
        """Images in a batch of another size than the file's own."""
        return 3 * self.batch

    def placeholders(self, kinds: tuple[str, ...]) -> Iterator[tuple[Port, str, tuple[Tensor, ...]]]:
        """Each input with its name, and what stands for it at each probe."""
        for port, name, own, open_axes, batched in zip(
            self.ports, self.names, self.shapes, self.open_axes, self.batched, strict=True
        ):
            dtype = torch_dtype(port.dtype)
            grown = tuple(size + GROWTH * (i in open_axes) for i, size in enumerate(own))
            shapes = {BATCH: (self.many, *own[1:]) if batched else own, SIZE: grown}
            yield port, name, tuple(torch.empty(shapes.get(kind, own), dtype=dtype, device="meta") for kind in kinds)

    def some(self, images: int) -> tuple[Tensor, ...]:
        """Values for so many images, those of the example first."""
        return tuple(_repeated(x, images) if b else x for x, b in zip(self.values, self.batched, strict=True))

    def part(self, values: tuple[Tensor, ...], start: int, images: int) -> tuple[Tensor, ...]:
        """Some of the images in these values."""
        return tuple(x[start : start + images] if b else x for x, b in zip(values, self.batched, strict=True))


def _given(source: Source, names: list[str], example: Any) -> list[Tensor]:
    graph = Graph()
    nodes = [graph.placeholder(name) for name in names]
    values = list(inputs_of(example, nodes).values())
    for port, x in zip(source.inputs, values, strict=True):
        if not isinstance(x, Tensor):
            raise OnnxImportError(
                f"{source.name}: its input {port} is a tensor, and the batch gives a {type(x).__name__}"
            )
        fits = x.dim() == len(port.shape) and all(
            not _is_fixed(size) or size == found for size, found in zip(port.shape[1:], x.shape[1:], strict=True)
        )
        if not fits:
            raise OnnxImportError(
                f"{source.name} takes {port}, and the images are {tuple(x.shape)}. {_advice(port, x)}"
            )
        dtype = torch_dtype(port.dtype)
        if x.dtype != dtype:
            scaled = " / 255, normalised as for inference" if x.dtype == torch.uint8 else ""
            raise OnnxImportError(
                f"{source.name} takes {port}, and the images are {x.dtype}: give images.to({dtype}){scaled}"
            )
    return [x.detach().cpu() for x in values]


def _advice(port: Port, x: Tensor) -> str:
    if x.dim() == 4 == len(port.shape):
        if port.shape[3] == x.shape[1] and port.shape[1] != x.shape[1]:
            return "Its images have their channels last: give images.permute(0, 2, 3, 1)"
        if port.shape[1] == x.shape[3]:
            return "Its images have their channels first: give images.permute(0, 3, 1, 2)"
        height, width = port.shape[2:]
        if port.shape[1] == x.shape[1] or not _is_fixed(port.shape[1]):
            return f"Resize the images to {height} x {width}, as for inference"
    if x.dim() == len(port.shape) - 1:
        return "They have no batch dimension: give images.unsqueeze(0) for one, torch.stack(images) for a list of them"
    return "Is this the data that the file was made for?"


def _shapes(
    ports: tuple[Port, ...], batch: int, side: tuple[int, int], given: list[tuple[int, ...]] | None
) -> tuple[tuple[int, ...], ...]:
    """At the file's own batch size; open sizes of one name are the same."""
    sizes: dict[str, int] = {}
    found = []
    for i, port in enumerate(ports):
        shape = []
        for axis, size in enumerate(port.shape):
            if _is_fixed(size):
                own = int(size)
            elif axis == 0:
                own = batch
            elif given is not None:
                own = given[i][axis]
            elif size in sizes and size != "?":
                own = sizes[str(size)]
            else:
                own = _guess(axis, port, side)
            sizes[str(size)] = own
            shape.append(own)
        found.append(tuple(shape))
    return tuple(found)


def _open_axes(ports: tuple[Port, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(
            axis
            for axis, size in enumerate(port.shape)
            if axis and not _is_fixed(size) and not _is_channels(axis, port)
        )
        for port in ports
    )


def _is_fixed(size: int | str) -> bool:
    return isinstance(size, int) and size > 0


def _guess(axis: int, port: Port, side: tuple[int, int]) -> int:
    if _is_channels(axis, port):
        return CHANNELS
    if len(port.shape) != 4:
        return side[1]
    channels_last = _is_fixed(port.shape[3]) and int(port.shape[3]) <= 4 and not _is_fixed(port.shape[1])
    return side[0] if axis == (1 if channels_last else 2) else side[1]


def _is_channels(axis: int, port: Port) -> bool:
    """Whether an open axis is that of the channels, which nobody leaves open on purpose."""
    return len(port.shape) >= 3 and axis == 1 and not any(map(_is_fixed, port.shape[1:]))


def _random(ports: tuple[Port, ...], shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for port, shape in zip(ports, shapes, strict=True):
        dtype = torch_dtype(port.dtype)
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            found.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return found


def _repeated(x: Tensor, images: int) -> Tensor:
    """So many images; those that there are not are others turned about."""
    while len(x) < images:
        x = torch.cat([x, x.flip(-1).roll(1, 0) * 0.5 if x.is_floating_point() else x.flip(-1)])
    return x[:images]
