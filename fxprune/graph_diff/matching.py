"""Matches the nodes of two graphs, by name and by structure.

1. By name: modules called once, stored weights, inputs and outputs that both graphs have under the same name.
2. By structure, in topological order: the same operation, with a weight of the same shape, on the same sources. The
   sources of a node are the nearest matched nodes above it, so that what was removed or inserted in between does not
   matter. Names of function calls (add, add_1, ...) are counted up by torch.fx and change with every call inserted
   before them; here they only decide between equals. First the two lists of nodes are aligned like two texts, which
   keeps chains of equal calls apart; then whatever has a counterpart elsewhere is looked for.
3. What is left over was removed or inserted. Where a connected run of removed nodes has the same sources and sinks as
   a run of inserted ones, the latter replaced the former.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from fxprune.graph_diff.model_graph import GraphNode, ModelGraph

LEAST_LIKENESS = 0.5  # share of sources in common that makes two unnamed nodes the same


@dataclass(frozen=True)
class Matching:
    """Which nodes correspond, as ids.

    Attributes:
        pairs: id before -> id after.
        replaced: id before -> ids after, for runs of nodes that took over the place of others.
    """

    pairs: Mapping[str, str]
    replaced: Mapping[str, tuple[str, ...]]


def match_graphs(before: ModelGraph, after: ModelGraph) -> Matching:
    """Match two graphs; a run of one node that a run of one node replaced is a pair too."""
    pairs = _match_by_name(before, after)
    _match_by_alignment(before, after, pairs)
    _match_by_structure(before, after, pairs)
    replaced = {}
    for old, new in _match_runs(before, after, pairs):
        if len(old) == len(new) == 1:
            pairs[old[0]] = new[0]
        else:
            replaced.update(dict.fromkeys(old, new))
    return Matching(pairs, replaced)


def sources(node: GraphNode, nodes: Mapping[str, GraphNode], matched: Container[str]) -> tuple[str, ...]:
    """Ids of the nearest matched nodes above a node, in order of its arguments; an input read twice comes twice.

    Args:
        node: of the graph.
        nodes: all nodes of the graph, by id.
        matched: ids of the matched nodes.
    """
    found: list[str] = []
    seen: set[str] = set()
    for name in node.inputs:
        stack = [name]
        while stack:
            source = stack.pop()
            if source in matched:
                if source == name or source not in found:
                    found.append(source)
            elif source not in seen:
                seen.add(source)
                stack.extend(reversed(nodes[source].inputs))
    return tuple(found)


def _match_by_name(before: ModelGraph, after: ModelGraph) -> dict[str, str]:
    count_before, count_after = (Counter(node.key for node in graph.nodes) for graph in (before, after))
    unique = {node.key: node.id for node in after.nodes if node.key and count_after[node.key] == 1}
    return {n.id: unique[n.key] for n in before.nodes if n.key in unique and count_before[n.key] == 1}


def _match_by_alignment(before: ModelGraph, after: ModelGraph, pairs: dict[str, str]) -> None:
    """Extend `pairs` by what stands in the same order in both lists, and reads the same sources."""
    old, new = ({node.id: node for node in graph.nodes} for graph in (before, after))
    matched = set(pairs.values())
    left = [_token(node, pairs.get(node.id)) for node in before.nodes]
    right = [_token(node, node.id if node.id in matched else None) for node in after.nodes]
    for i, j, size in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for u, v in zip(before.nodes[i : i + size], after.nodes[j : j + size], strict=True):
            if u.id in pairs:
                continue
            above = tuple(pairs[source] for source in sources(u, old, pairs))
            if _likeness(above, sources(v, new, matched)) >= LEAST_LIKENESS:
                pairs[u.id] = v.id
                matched.add(v.id)


def _token(node: GraphNode, counterpart: str | None) -> Hashable:
    """What has to be equal in an alignment: the counterpart of a matched node, the operation of another."""
    return ("matched", counterpart) if counterpart else (*_kind(node), tuple(sorted(node.arguments.items())))


def _match_by_structure(before: ModelGraph, after: ModelGraph, pairs: dict[str, str]) -> None:
    """Extend `pairs` by what stands elsewhere; the second round sees what the first matched further down."""
    old, new = ({node.id: node for node in graph.nodes} for graph in (before, after))
    place = {node.id: i / len(graph.nodes) for graph in (before, after) for i, node in enumerate(graph.nodes)}
    matched = set(pairs.values())
    above: dict[str, tuple[str, ...]] = {}  # sources of candidates; forgotten with every new pair

    def score(candidate: GraphNode, node: GraphNode, wanted: tuple[str, ...]) -> tuple[float, bool, bool, float]:
        if candidate.id not in above:
            above[candidate.id] = tuple(pairs[source] for source in sources(candidate, old, pairs))
        near = -abs(place[candidate.id] - place[node.id])
        likeness = _likeness(above[candidate.id], wanted)
        return likeness, candidate.name == node.name, candidate.arguments == node.arguments, near

    for _ in range(2):
        candidates: dict[tuple[str, tuple[int, ...]], list[GraphNode]] = {}
        for node in before.nodes:
            if node.id not in pairs:
                candidates.setdefault(_kind(node), []).append(node)
        for node in after.nodes:
            alike = candidates.get(_kind(node), []) if node.id not in matched else []
            if not alike:
                continue
            wanted = sources(node, new, matched)
            namesake = next((candidate for candidate in alike if candidate.name == node.name), None)
            best = (score(namesake, node, wanted), namesake) if namesake else None
            if best is None or best[0][:3] < (1.0, True, True):
                scored = [(score(candidate, node, wanted), candidate) for candidate in alike]
                best = max(scored, key=lambda pair: pair[0])
            (likeness, same_name, *_), chosen = best
            if chosen is not None and (likeness >= LEAST_LIKENESS or (same_name and likeness > 0)):
                alike.remove(chosen)
                pairs[chosen.id] = node.id
                matched.add(node.id)
                above.clear()


def _kind(node: GraphNode) -> tuple[str, tuple[int, ...]]:
    """What has to agree: the operation and the shape of its weight."""
    weight = node.weights.all
    return node.op, () if weight is None else tuple(weight.shape)


def _likeness(left: tuple[str, ...], right: tuple[str, ...]) -> float:
    """Share of sources in common; 1 if there are none on either side."""
    if left == right:
        return 1.0
    ours, theirs = Counter(left), Counter(right)
    return (ours & theirs).total() / max((ours | theirs).total(), 1)


def _match_runs(
    before: ModelGraph, after: ModelGraph, pairs: Mapping[str, str]
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Runs of unmatched nodes with the same sources and sinks on both sides."""
    same = {name: name for name in pairs.values()}
    inserted = {_ends(run, after, same): run for run in _runs(after, set(same))}
    removed = {_ends(run, before, pairs): run for run in _runs(before, set(pairs))}
    return [(run, inserted[ends]) for ends, run in removed.items() if ends in inserted]


def _runs(graph: ModelGraph, matched: set[str]) -> list[tuple[str, ...]]:
    """Connected sets of unmatched nodes, each in graph order."""
    run_of: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.id in matched:
            continue
        joined = [node.id]
        for source in dict.fromkeys(node.inputs):
            if source in run_of and run_of[source] is not joined:
                joined = [*run_of[source], *joined]
                run_of.update(dict.fromkeys(joined, joined))
        run_of.update(dict.fromkeys(joined, joined))
    return list({id(run): tuple(run) for run in run_of.values()}.values())


def _ends(run: tuple[str, ...], graph: ModelGraph, names: Mapping[str, str]) -> tuple[frozenset[str], frozenset[str]]:
    """Matched nodes that a run reads and that read it, in the names of the graph after."""
    nodes = {node.id: node for node in graph.nodes}
    above = {names[source] for member in run for source in nodes[member].inputs if source in names}
    below = {names[node.id] for node in graph.nodes if node.id in names and set(node.inputs) & set(run)}
    return frozenset(above), frozenset(below)
