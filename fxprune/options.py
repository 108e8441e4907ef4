"""What concerns the method beyond recipe and solver, what each solver takes for its own, and the two together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, get_args

from fxprune.errors import OptionsError

if TYPE_CHECKING:  # `fxprune prune --help` shows these options, and must not wait for torch
    from fxprune.recipe import Recipe
    from fxprune.solvers.solver import Solver

Target = Literal["weights", "dense", "skip", "relu6_aware", "relu_aware"]
FOLLOWS_SKIPS = ("skip", "relu6_aware", "relu_aware")
Inputs = Literal["pruned", "dense"]
Factorisation = Literal["data_aware", "svd"]
CHANNELS_POLISH = 4  # Epochs.
LIGHT_SPARSITY = (
    0.5  # Up to here ReLU-aware targets gain nothing on held-out images, unless the ReLU has an upper end too.
)


@dataclass(frozen=True)
class Options:
    """How layers are posed and solved. None means: what the method does by itself (`Options.resolved`).

    Attributes:
        damping: lambda / mean(diag H), the pull towards the dense weights; with `shrink` the least.
        shrink: settle each layer's damping, and how much of earlier layers' errors it makes up for, on every fourth of the
            images: where a layer has no patches to spare, it would otherwise fit what is peculiar to these images.
        inputs: where a layer's statistics come from: the "pruned" prefix (sequential), or the "dense" model.
        target: what a layer's output is fitted to: the output of its own "weights" on those inputs; the "dense" model's output;
            "skip", the dense output with the error made up for that a skip connection brings to the add that follows; or
            "relu_aware", the same and ReLU-aware: what a ReLU makes zero in the dense model need only stay below zero; or
            "relu6_aware", so only for rectifiers with an upper end, as ReLU6. None: "relu_aware" where fewer than half of the
            weights stay, else "relu6_aware".
        bias_correction: fit the bias too (means are removed from the statistics); created where there was none.
        refit: solve for the kept weights by least squares after the solver has chosen the mask.
        temperature: scale the logits of a classifier, so that on new images its softmax is as sure as the dense model's; other
            heads are left alone.
        reconstruct: re-fit layers that are not pruned (first conv, depthwise, ...) to the same target.
        fold_batchnorm: fold BatchNorm into the layer before it.
        patches: patches for each column of a layer (each input of an output channel) from which its statistics are taken. Where
            a set of at least 128 images has more, and more than 49,152 in all, rows and images are left out evenly; images
            that every layer leaves out are not run. 0 takes all patches.
        permute: choose which input channels share an N:M group, on the first 64 images.
        global_budget: for unstructured patterns: spread the zeros over the layers by what each costs.
        channel_multiple: where channels are removed, a multiple of so many stays, and at least so many: 8 for CPUs and most
            NPUs, 32 or 64 for GPUs. A layer that loses none may have any number.
        polish: epochs afterwards in which the activations learn the dense model's, masks fixed; 0 for none. None: 4 where
            channels are removed, which leaves errors that no layer can make up for by itself, and none otherwise.
        flip: mirror images are as good as the images, which is right for photographs and wrong for digits. Where layers need
            all the images there are, each is fitted beside its mirror image; `polish` mirrors half of them.
        holdout: share of the images, at most 0.5, that takes no part in the statistics; agreement, KL and layer errors in
            the report are measured there. None: a tenth, at least 16, of 64 images or more, and none of fewer.
        seed: seed for everything random.
    """

    damping: float = 0.01
    shrink: bool | None = None
    inputs: Inputs | None = None
    target: Target | None = None
    bias_correction: bool | None = None
    refit: bool | None = None
    temperature: bool | None = None
    reconstruct: bool | None = None
    fold_batchnorm: bool = True
    patches: int | None = None
    permute: bool | None = None
    global_budget: bool = False
    channel_multiple: int = 8
    polish: int | None = None
    flip: bool = False
    holdout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("damping", "patches", "polish", "seed", "holdout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, type(None))) or isinstance(value, bool):
                raise OptionsError(f"{name} is {value!r}; it should be a number")
        for name in (
            "bias_correction",
            "refit",
            "shrink",
            "temperature",
            "reconstruct",
            "fold_batchnorm",
            "permute",
            "global_budget",
            "flip",
        ):
            if getattr(self, name) not in (True, False, None):
                raise OptionsError(f"{name} is {getattr(self, name)!r}; it should be True or False")
        if not 0 <= self.damping < 1e3:
            raise OptionsError(f"damping is {self.damping}; it should be at least 0, and is usually 0.001 to 0.1")
        if self.inputs not in (None, "pruned", "dense"):
            raise OptionsError(f"inputs is {self.inputs!r}; it should be 'pruned' or 'dense'")
        if self.target not in (None, *get_args(Target)):
            raise OptionsError(
                f"target is {self.target!r}; it should be one of {', '.join(map(repr, get_args(Target)))}"
            )
        if self.patches is not None and self.patches < 0:
            raise OptionsError(f"patches is {self.patches}; it is a number for each column, 0 for all there are")
        if not isinstance(self.channel_multiple, int) or self.channel_multiple < 1:
            raise OptionsError(f"channel_multiple is {self.channel_multiple!r}; it is a number of channels, at least 1")
        if self.polish is not None and self.polish < 0:
            raise OptionsError(f"polish is {self.polish}; it is a number of epochs, 0 for none")
        if self.holdout is not None and not 0 <= self.holdout <= 0.5:
            raise OptionsError(f"holdout is {self.holdout}; it is a share of the images, from 0 to 0.5")

    def resolved(self, solver: Solver, recipe: Recipe) -> Options:
        """The same options with every None replaced by the method's own choice, for a recipe; `holdout` keeps its None.

        Raises:
            OptionsError: if the options ask for what the recipe cannot do.
        """
        from fxprune.pattern import MixedPattern, NMPattern

        patterns = recipe.patterns
        grouped = any(isinstance(pattern, (NMPattern, MixedPattern)) for pattern in patterns)
        if self.permute and not grouped:
            raise OptionsError(f"permute chooses which channels share an N:M group; {recipe} has none")
        if self.global_budget and all(isinstance(pattern, NMPattern) for pattern in patterns):
            raise OptionsError(f"global_budget: {recipe} says what each layer gets; use a sparsity, or 'mixed:0.6'")
        own = PUBLISHED if solver.published else OURS
        missing = {f.name: getattr(own, f.name) for f in fields(self) if getattr(self, f.name) is None}
        light = recipe.sparsity <= LIGHT_SPARSITY and not recipe.removes_channels
        if missing.get("target") == "relu_aware" and light:
            missing["target"] = "relu6_aware"
        if "polish" in missing and recipe.removes_channels and not solver.published:
            missing["polish"] = CHANNELS_POLISH
        missing["permute"] = grouped and bool(own.permute if self.permute is None else self.permute)
        return replace(self, **missing)


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
    inputs="pruned",
    target="weights",
    bias_correction=False,
    refit=False,
    shrink=False,
    temperature=False,
    reconstruct=False,
    patches=0,
    permute=False,
    polish=0,
)
OURS = Options(
    inputs="pruned",
    target="relu_aware",
    bias_correction=True,
    refit=True,
    shrink=True,
    temperature=True,
    reconstruct=True,
    patches=64,
    permute=True,
    polish=0,
)


@dataclass(frozen=True)
class Method:
    """A solver with resolved options (`Options.resolved`).

    Attributes:
        solver: chooses the weights that stay.
        options: resolved.
        label: what the report calls the method; "" for the solver's own name.
    """

    solver: Solver
    options: Options
    label: str = ""

    @property
    def name(self) -> str:
        """As the report has it."""
        return self.label or str(self.solver)

    @property
    def factorisation(self) -> Factorisation:
        """How a layer is split: by the output error, or by the weight alone for a solver that sees no images."""
        return "data_aware" if self.solver.needs_statistics else "svd"

    @property
    def needs_statistics(self) -> bool:
        """Whether anything that is done to a layer depends on the calibration images."""
        o = self.options
        return (
            self.solver.needs_statistics or o.target != "weights" or bool(o.refit or o.bias_correction or o.reconstruct)
        )
