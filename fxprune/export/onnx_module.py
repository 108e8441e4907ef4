"""An ONNX file as a torch module, so that everything that scores a module scores the file too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import ValidationError
from fxprune.export.onnx_file import read_onnx
from fxprune.export.session import open_session


class OnnxModule(nn.Module):
    """Runs a file with one input and, first among its outputs, logits; in onnxruntime on the CPU.

    Args:
        path: the file.

    Raises:
        ValidationError: the file is absent, damaged or refused by onnxruntime, or takes several inputs.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        file = read_onnx(path)
        if len(file.inputs) != 1:
            ports = "; ".join(map(str, file.inputs))
            raise ValidationError(f"{path} takes {len(file.inputs)} inputs ({ports}); a classifier takes images alone")
        self._path, self._port = path, file.inputs[0]
        self._session = open_session(Path(path))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the file's first output (N, ...); in parts where its batch size is fixed.

        Raises:
            ValidationError: the images do not fit the file's input.
        """
        wanted = self._port.shape
        fits = len(wanted) == images.ndim and all(
            not isinstance(size, int) or size == found
            for size, found in zip(wanted[1:], images.shape[1:], strict=False)
        )
        if not fits:
            raise ValidationError(
                f"{self._path} takes {self._port}, the images are {tuple(images.shape)}; is this another model's data?"
            )
        if not isinstance(wanted[0], int):
            return self._run(images)
        # A fixed batch size: zeros fill up the last part, and what comes of them is cut off.
        parts = images.split(wanted[0])
        short = wanted[0] - len(parts[-1])
        padded = torch.cat([parts[-1], images.new_zeros(short, *images.shape[1:])])
        return torch.cat([self._run(part) for part in (*parts[:-1], padded)])[: len(images)]

    def _run(self, images: Tensor) -> Tensor:
        array = images.detach().cpu().numpy().astype(np.dtype(self._port.dtype), copy=False)
        return torch.from_numpy(self._session.run(None, {self._port.name: array})[0])
