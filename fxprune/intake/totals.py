"""Truth in totals: which weights no row of a report covers, and whether so little was pruned that the user has to know."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.errors import GraphError
from fxprune.intake.record import intake
from fxprune.report import LayerReport


def uncovered(graph_module: GraphModule, rows: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """A row for every parameter of two or more dimensions that no row covers, each with the reason.

    A row covers the weight of the module that it names, the parameter that it names, or, if it names a node, what that
    node reads. With these rows a report's weights are those of the state dict, each counted once.
    """
    names = {row.name for row in rows}
    covered = {id(p) for name in names for p in _parameters_of(graph_module, name)}
    reads: dict[str, list[Node]] = {}
    for node in graph_module.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                reads.setdefault(str(source.target), []).append(node)
    found = []
    for name, parameter in graph_module.named_parameters():
        readers = reads.get(name, [])
        if parameter.dim() < 2 or id(parameter) in covered or any(reader.name in names for reader in readers):
            continue
        owner = graph_module.get_submodule(name.rpartition(".")[0])
        op = type(owner).__name__ if owner is not graph_module and type(owner) is not nn.Module else "Parameter"
        zeros = float((parameter == 0).double().mean())
        reason = _reason(graph_module, name, owner, readers)
        found.append(LayerReport(name=name, op=op, shape=tuple(parameter.shape), reason=reason, sparsity=zeros))
    return tuple(found)


def check_amount(graph_module: GraphModule, rows: Sequence[LayerReport], pattern: str) -> str:
    """Warn if less than half of the weights were pruned, for the main reason; "" or what was said.

    Args:
        graph_module: the pruned model.
        rows: of its report, those of `uncovered` too.
        pattern: what was asked for.

    Raises:
        GraphError: if nothing was pruned, though not everything was excluded.
    """
    total = sum(row.weights for row in rows)
    pruned = sum(row.weights for row in rows if row.status in ("pruned", "factored"))
    if 2 * pruned >= total:
        return ""
    reasons: Counter[str] = Counter()
    for row in rows:
        if row.status not in ("pruned", "factored"):
            reasons[row.reason] += row.weights
    (reason, weights), *_ = reasons.most_common(1)
    if pruned == 0:
        if all(row.reason == "excluded" for row in rows):
            return ""
        raise GraphError(
            f"nothing could be pruned to {pattern}: of {total:,} weights none is in a layer that can hold it. The main reason, "
            f"for {weights / total:.0%} of them: {reason or 'no reason given'}. Choose another pattern, such as '0.5', which "
            "any layer with 4 inputs or more can hold"
        )
    found = intake(graph_module)
    leaves = f" {'; '.join(map(str, found.leaves))}." if found is not None and found.leaves else ""
    message = (
        f"only {pruned / total:.0%} of the weights were pruned to {pattern}; the main reason, for {weights / total:.0%} of "
        f"them: {reason or 'no reason given'}.{leaves}"
    )
    warnings.warn(f"fxprune: {message}", stacklevel=3)
    return message


def _parameters_of(graph_module: GraphModule, name: str) -> list[Tensor]:
    """The parameter called `name`, or those of the module called so, without its parts'."""
    owner, _, last = name.rpartition(".")
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    if name in modules:
        return list(modules[name].parameters(recurse=False))
    parameter = modules[owner]._parameters.get(last) if owner in modules else None
    return [] if parameter is None else [parameter]


def _reason(graph_module: GraphModule, name: str, owner: nn.Module, readers: Sequence[Node]) -> str:
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding: its rows are looked up, not multiplied by"
    if readers:
        functions = {getattr(n.target, "__name__", str(n.target)) for n in readers}
        return f"only {', '.join(sorted(functions))} reads it, in which it is not the weight of a convolution or linear layer"
    called = {str(n.target) for n in graph_module.graph.find_nodes(op="call_module")}
    inside = next((part for part in called if name.startswith(f"{part}.")), None)
    if inside is not None and graph_module.get_submodule(inside) is not owner:
        return f"inside {inside!r}, which is called as a whole"
    return f"{type(owner).__name__} is no convolution or linear layer"
