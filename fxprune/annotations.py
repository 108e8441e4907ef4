"""What passes note down on a graph: one typed annotation a node, and one for the graph, each under one key of `meta`.

Nobody else names the key. Annotations are frozen: to change one is to put another in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.geometry import LayerGeometry
from fxprune.report import LayerReport, PruneReport

if TYPE_CHECKING:
    from fxprune.fine_tuning.recorded_zeros import ZeroMask
    from fxprune.intake.origins import Origin
    from fxprune.intake.record import Intake
    from fxprune.layers.constraint import Chain

KEY = "fxprune"
Role = Literal["compress", "reconstruct", "keep", "repeat"]


@dataclass(frozen=True)
class Annotation:
    """What is known of one node.

    Attributes:
        role: what is to become of a Conv or Linear call: "compress" (solved under its constraints), "reconstruct" (dense,
            re-fitted) or "keep"; "repeat" for a later call that reads the weight of an earlier one, and has its fate; "" for
            any other node, and before roles are given.
        reason: why the layer is not compressed; "" for role "compress".
        geometry: how the layer reads its input; None for layers that are kept.
        chain: the constraints under which the layer is solved, in order.
        report: what was done to the layer, once it is done.
        changed: why a module's value is not what its parameters say (a hook changes it), or "".
        order: (inputs, outputs): which of the layer's first channels stands where after a permutation, and after the removal
            of others, or None each.
        narrowing: what the removal of channels has done to the layer; None where none was asked for.
    """

    role: Role | Literal[""] = ""
    reason: str = ""
    geometry: LayerGeometry | None = None
    chain: Chain = ()
    report: LayerReport | None = None
    changed: str = ""
    order: tuple[Tensor | None, Tensor | None] = (None, None)
    narrowing: Narrowing | None = None


@dataclass(frozen=True)
class Narrowing:
    """What the removal of channels has done to one layer, (before, after) each.

    Attributes:
        inputs: input channels.
        outputs: output channels.
        macs: of the layer for one sample.
        reason: why no input channel of it went; "" if some did.
    """

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    reason: str = ""

    def __str__(self) -> str:
        sides = ((*self.inputs, "in"), (*self.outputs, "out"))
        return f"channels {', '.join(f'{a} to {b} {side}' for a, b, side in sides if b < a)}" if self.lost_any else ""

    @property
    def lost_inputs(self) -> bool:
        """Whether it reads fewer channels."""
        return self.inputs[1] < self.inputs[0]

    @property
    def lost_any(self) -> bool:
        """Whether it has fewer channels on either side."""
        return self.lost_inputs or self.outputs[1] < self.outputs[0]


@dataclass(frozen=True)
class Removal:
    """What the removal of channels has done to a graph.

    Attributes:
        rule: how the numbers of channels were chosen, in words.
        macs: of all Conv and Linear modules for one sample, (before, after).
        parameters: in all, (before, after).
    """

    rule: str
    macs: tuple[int, int]
    parameters: tuple[int, int]


@dataclass(frozen=True)
class InputForm:
    """What one input of a model was like in the calibration set.

    Attributes:
        name: of the input.
        shape: of a few images of it.
        dtype: as torch names it, without "torch.".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Change:
    """One thing that a pass did, or declined to do, to one node.

    Attributes:
        pass_name: class name of the pass.
        action: "folded", "inserted", "removed", "replaced", "pruned", "factored", "narrowed", "reconstructed", "permuted",
            "moved" or "kept".
        node: name of the node that the pass looked at (it may be gone from the graph afterwards).
        target: name of the module behind the node, or "".
        into: name of the node that took over its work, or "".
        reason: why, in words; always given when the action is "kept".
    """

    pass_name: str
    action: str
    node: str
    target: str = ""
    into: str = ""
    reason: str = ""


@dataclass(frozen=True)
class GraphAnnotation:
    """What is known of a whole graph.

    Attributes:
        changes: what passes wrote down, in order.
        report: of the run.
        zeros: where the zeros of pruned layers were when the run ended.
        intake: how the model came in.
        removal: what the removal of channels has done, if there was one.
        inputs: what the model was calibrated on; () where an input is no tensor.
        origins: of which parameters of the user's model a parameter was made, where it is not what it was.
    """

    changes: tuple[Change, ...] = ()
    report: PruneReport | None = None
    zeros: tuple[ZeroMask, ...] = ()
    intake: Intake | None = None
    removal: Removal | None = None
    inputs: tuple[InputForm, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)


def annotation(node: Node) -> Annotation:
    """What is known of a node; an empty annotation if nothing is."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Annotation) else Annotation()


def annotate(node: Node, **changes: Any) -> Annotation:
    """Change fields of a node's annotation, and return it."""
    node.meta[KEY] = changed = replace(annotation(node), **changes)
    return changed


def graph_annotation(model: nn.Module) -> GraphAnnotation:
    """What is known of a graph module; an empty annotation for any other model."""
    found = getattr(model, "meta", {}).get(KEY) if isinstance(getattr(model, "meta", None), dict) else None
    return found if isinstance(found, GraphAnnotation) else GraphAnnotation()


def annotate_graph(graph_module: nn.Module, **changes: Any) -> GraphAnnotation:
    """Change fields of a graph's annotation, and return it."""
    meta: dict[str, Any] = graph_module.meta  # type: ignore[assignment]
    meta[KEY] = changed = replace(graph_annotation(graph_module), **changes)
    return changed


def changes(model: nn.Module) -> tuple[Change, ...]:
    """Everything that passes wrote down about a graph module, in order."""
    return graph_annotation(model).changes


def changed_modules(graph_module: GraphModule) -> dict[str, str]:
    """The modules whose value is not what their parameters say, by name, with the reason."""
    return {str(n.target): reason for n in graph_module.graph.nodes if (reason := annotation(n).changed)}


def report_of(model: nn.Module) -> PruneReport | None:
    """The report that a compilation left with a model, if any."""
    return graph_annotation(model).report
