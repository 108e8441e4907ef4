"""What changed between two models, as text, JSON, or a page to look at."""

from __future__ import annotations

from fxprune.graph_diff.compare import diff
from fxprune.graph_diff.result import Costs, Edge, GraphDiff, NodeDiff, NodeState

__all__ = ["Costs", "Edge", "GraphDiff", "NodeDiff", "NodeState", "diff"]
