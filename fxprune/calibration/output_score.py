"""How far the pruned model's outputs are from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxprune.calibration.batches import tensors_in
from fxprune.calibration.output_error import OutputError
from fxprune.layers.logits import ClassInformation, log_probabilities
from fxprune.runtime.processes import gathered


@dataclass
class OutputScore:
    """Top-1 agreement and KL(dense || pruned), where a model puts out (N, classes); the relative error of whatever it puts out.

    Attributes:
        is_softmax: whether the weights tell that outputs are logits (`fxprune.layers.logits.rows_cancel`).
        errors: of each tensor of the output, in order.
        shape: of the output of one image; None where it is not one tensor.
    """

    is_softmax: bool = False
    same: int = 0
    divergence: float = 0.0
    count: int = 0
    information: ClassInformation = field(default_factory=ClassInformation)
    errors: list[OutputError] = field(default_factory=list)
    shape: tuple[int, ...] | None = None

    def update(self, dense: Any, pruned: Any) -> None:
        """Add what both models put out for a batch."""
        of_both = [
            (x, y)
            for x, y in zip(tensors_in(dense), tensors_in(pruned), strict=True)
            if x.is_floating_point() and x.dim() and x.shape == y.shape
        ]
        if not self.errors:
            self.errors = [OutputError(1 - x.dim() if x.dim() > 3 else -1) for x, _ in of_both]
            self.shape = tuple(dense.shape[1:]) if isinstance(dense, Tensor) else None
        for error, (x, y) in zip(self.errors, of_both, strict=False):
            error.update(*((x, y) if x.dim() > 1 else (x[:, None], y[:, None])))
        if not isinstance(dense, Tensor) or dense.dim() != 2 or not dense.shape[1]:
            return
        log_dense, log_pruned = log_probabilities(dense, pruned)
        self.same += int((dense.argmax(1) == pruned.argmax(1)).sum())
        self.divergence += float((log_dense.exp() * (log_dense - log_pruned)).sum())
        self.count += len(dense)
        self.information.add(log_dense)

    def summed(self) -> OutputScore:
        """That of all processes together."""
        of_all = gathered((self.same, self.divergence, self.count, len(self.errors), self.shape))
        same, divergence, count = (sum(of_one) for of_one in zip(*(of[:3] for of in of_all), strict=True))
        outputs = max(of[3] for of in of_all)
        # A process without held-out images has seen no output.
        own = self.errors if len(self.errors) == outputs else [OutputError(-1) for _ in range(outputs)]
        shape = next((of[4] for of in of_all if of[3]), None)
        information = self.information.summed()
        return OutputScore(self.is_softmax, same, divergence, count, information, OutputError.summed(own), shape)

    @property
    def share(self) -> float | None:
        """On which both have the same top class, or None."""
        return self.same / self.count if self.count else None

    @property
    def kl(self) -> float | None:
        """Nats a sample, or None."""
        return self.divergence / self.count if self.count else None

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """||y_dense - y_pruned||^2 / ||y_dense - mean||^2 of each tensor that the model puts out."""
        return tuple(error.relative for error in self.errors)

    @property
    def why_no_classes(self) -> str:
        """Why agreement and KL would say nothing; "" for a classifier, and where nothing was added."""
        if not self.errors:
            return ""
        if self.shape is None:
            return f"the model puts out {len(self.errors)} tensors, not one of logits (N, classes)"
        if len(self.shape) != 1:
            return f"the output is {' x '.join(['N', *map(str, self.shape)])}, not logits (N, classes)"
        if self.shape[0] < 2:
            return "the output is one number an image, not logits (N, classes)"
        if self.is_softmax or self.information.is_a_classifiers:
            return ""
        return f"the output's {self.shape[0]} numbers an image do not look like the logits of a trained classifier"
