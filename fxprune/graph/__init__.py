"""A torch.fx graph: small questions about its nodes, running it, and names that torch.fx cannot write in code."""

from __future__ import annotations

from fxprune.graph.nodes import (
    call_quietly,
    call_sites,
    device_of,
    has_global_hooks,
    has_hooks,
    input_of,
    is_tied,
    module_of,
    without_input,
)
from fxprune.graph.running import Runner, Shape, ShapeRecorder, arguments_of, value_shapes

__all__ = [
    "Runner",
    "Shape",
    "ShapeRecorder",
    "arguments_of",
    "call_quietly",
    "call_sites",
    "device_of",
    "has_global_hooks",
    "has_hooks",
    "input_of",
    "is_tied",
    "module_of",
    "value_shapes",
    "without_input",
]
