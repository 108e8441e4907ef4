"""Every knob of `fxprune.compile` beyond pattern and method, and what each method takes for its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, get_args

from fxprune.errors import OptionsError

if TYPE_CHECKING:  # `fxprune prune --help` shows these options, and must not wait for torch
    from fxprune.pattern import Pattern

Target = Literal["weights", "dense", "skip", "rectified"]
Inputs = Literal["pruned", "dense"]
LIGHT_SPARSITY = 0.5  # Up to here rectified targets gain nothing on images held out.


@dataclass(frozen=True)
class Options:
    """How layers are posed and solved. None means: what the method does by itself (`Options.resolved`).

    Attributes:
        damping: lambda / mean(diag H), the pull towards the dense weights.
        inputs: where a layer's statistics come from: the "pruned" prefix (sequential), or the "dense" model.
        target: what a layer regresses: the output of its own "weights" on those inputs, the "dense" model's output, or
            "skip": the dense output plus the error that a skip connection brings to the add that follows, or "rectified":
            the same, but where a ReLU follows, what the dense model has below its threshold need only stay below; it gains
            where fewer than half of the weights stay.
        bias_correction: fit the bias too (means are removed from the statistics); created where there was none.
        refit: solve for the kept weights by least squares after the solver has chosen the mask.
        reconstruct: re-fit layers that are not pruned (first conv, depthwise, ...) to the same target.
        fold_batchnorm: fold BatchNorm into the layer before it.
        patches: how many patches for each column of a layer (each input of an output channel) its statistics are taken from.
            Where a set of at least 128 images has more than these, and than 49,152, rows and images are left out evenly, and
            what every layer leaves out is not run; 0 for all there are.
        permute: choose which input channels share an N:M group, on the first 64 images.
        global_budget: for unstructured patterns: spread the zeros over the layers by what each costs.
        polish: epochs afterwards in which the activations learn the dense model's, masks fixed; 0 for none.
        flip: polish on mirrored images too; right for photographs, wrong for digits.
        seed: seed for everything random.
        memory_limit: bytes of live calibration values to hold on the device (on the CPU: in memory); the rest waits in host
            memory or in a scratch file. None: a share of what is free.
        checkpoint_dir: folder in which finished layers are kept; a run that was interrupted goes on from there.
    """

    damping: float = 0.01
    inputs: Inputs | None = None
    target: Target | None = None
    bias_correction: bool | None = None
    refit: bool | None = None
    reconstruct: bool | None = None
    fold_batchnorm: bool = True
    patches: int | None = None
    permute: bool | None = None
    global_budget: bool = False
    polish: int = 0
    flip: bool = False
    seed: int = 0
    memory_limit: int | None = None
    checkpoint_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("damping", "patches", "polish", "seed", "memory_limit"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, type(None))) or isinstance(value, bool):
                raise OptionsError(f"{name} is {value!r}; it should be a number")
        for name in ("bias_correction", "refit", "reconstruct", "fold_batchnorm", "permute", "global_budget", "flip"):
            if getattr(self, name) not in (True, False, None):
                raise OptionsError(f"{name} is {getattr(self, name)!r}; it should be True or False")
        if not 0 <= self.damping < 1e3:
            raise OptionsError(f"damping is {self.damping}; it should be at least 0, and is usually 0.001 to 0.1")
        if self.inputs not in (None, "pruned", "dense"):
            raise OptionsError(f"inputs is {self.inputs!r}; it should be 'pruned' or 'dense'")
        if self.target not in (None, *get_args(Target)):
            raise OptionsError(f"target is {self.target!r}; it should be 'weights', 'dense', 'skip' or 'rectified'")
        if self.patches is not None and self.patches < 0:
            raise OptionsError(f"patches is {self.patches}; it is a number for each column, 0 for all there are")
        if self.polish < 0:
            raise OptionsError(f"polish is {self.polish}; it is a number of epochs, 0 for none")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise OptionsError(
                f"memory_limit is {self.memory_limit}; it is a number of bytes, or None to have it chosen"
            )

    def resolved(self, method: str, pattern: Pattern) -> Options:
        """The same options with every None replaced by the method's own choice, for a pattern.

        Raises:
            OptionsError: if the options ask for what the pattern cannot do.
        """
        from fxprune.pattern import MixedPattern, NMPattern

        grouped = isinstance(pattern, (NMPattern, MixedPattern))
        if self.permute and not grouped:
            raise OptionsError(f"permute chooses which channels share an N:M group; pattern {pattern} has none")
        if self.global_budget and isinstance(pattern, NMPattern):
            raise OptionsError(f"global_budget: {pattern} is the same in every layer; use a sparsity, or 'mixed:0.6'")
        own = PUBLISHED if method in ("magnitude", "sparsegpt", "exact_obs") else OURS
        missing = {f.name: getattr(own, f.name) for f in fields(self) if getattr(self, f.name) is None}
        budget = self.global_budget or isinstance(pattern, MixedPattern)
        if missing.get("target") == "rectified" and pattern.sparsity <= LIGHT_SPARSITY:
            missing["target"] = "skip"
        missing["permute"] = grouped and bool(own.permute if self.permute is None else self.permute)
        return replace(self, **(missing | {"global_budget": budget}))


def given_options(options: object) -> Options:
    """The options themselves, the defaults for None.

    Raises:
        OptionsError: it is something else, a dict mostly.
    """
    if options is None:
        return Options()
    if isinstance(options, Options):
        return options
    if isinstance(options, Mapping):
        fields = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise OptionsError(f"options is a {type(options).__name__}; write fxprune.Options({fields})")
    raise OptionsError(f"options is {options!r}; write fxprune.Options(...), with the fields that are to differ")


PUBLISHED = Options(
    inputs="pruned", target="weights", bias_correction=False, refit=False, reconstruct=False, patches=0, permute=False
)
OURS = Options(
    inputs="pruned", target="rectified", bias_correction=True, refit=True, reconstruct=True, patches=64, permute=True
)
