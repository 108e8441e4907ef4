"""How to train: optimizer, schedule and what goes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fxprune.errors import OptionsError

WARMUP = 0.3  # of all steps, under one-cycle
FIRST_RATE = 0.04  # of the peak, where the warm-up starts
DEFAULT_RATE = {"sgd": 0.1, "adamw": 2e-3}


@dataclass(frozen=True)
class TrainingRecipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        optimizer: "sgd" (Nesterov) or "adamw".
        learning_rate: at its peak; None takes 0.1 for sgd, 0.002 for adamw.
        momentum: of sgd.
        weight_decay: of weights; biases and BatchNorm's parameters have none.
        schedule: "one_cycle" (linear warm-up over the first 30% of the steps, then cosine to 0) or "cosine".
        label_smoothing: share of the target spread over all classes.
        amp: on CUDA, compute in bfloat16 (float16 with loss scaling where the GPU lacks it). No effect on a CPU.
        channels_last: keep activations in NHWC order, which is faster on most GPUs and on many CPUs.
        seed: every epoch's order and augmentation follow from it.
    """

    epochs: int = 10
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    label_smoothing: float = 0.0
    amp: bool = False
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.epochs >= 1, "epochs", "at least 1"),
            (self.optimizer in DEFAULT_RATE, "optimizer", "'sgd' or 'adamw'"),
            (self.learning_rate is None or self.learning_rate > 0, "learning_rate", "positive"),
            (0 <= self.momentum < 1, "momentum", "at least 0 and below 1"),
            (self.weight_decay >= 0, "weight_decay", "at least 0"),
            (self.schedule in ("one_cycle", "cosine"), "schedule", "'one_cycle' or 'cosine'"),
            (0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1"),
        )
        for good, name, wanted in checks:
            if not good:
                raise OptionsError(f"{name} is {getattr(self, name)!r}; it should be {wanted}")

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        return DEFAULT_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` of ``steps``, counted from 0; a formula, so that resuming needs no state."""
        warmup = WARMUP * steps if self.schedule == "one_cycle" else 0.0
        if step < warmup:
            return self.peak_rate * (FIRST_RATE + (1 - FIRST_RATE) * step / warmup)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
