"""Truth in totals: which weights no row of a report covers, and whether so little was pruned that the user has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.intake.record import intake
from fxprune.report import LayerReport


def uncovered(graph_module: GraphModule, rows: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """A row for every parameter of two or more dimensions that no row covers, each with the reason.

    A row covers the weight of the module that it names, the parameter that it names, or, if it names a node, what that
    node reads. What the user's model holds and no output depends on has a row, too, with status "unread". So a report's weights
    are those of the user's model, each counted once.
    """
    rows = tuple(rows)
    names = {row.name for row in rows}
    covered = {id(p) for row in rows for p in _parameters_of(graph_module, row)}
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
    known = intake(graph_module)
    for unread in known.unread if known is not None else ():
        reason = "no output depends on it, so that the compiled model does without"
        found.append(
            LayerReport(
                name=unread.name.removesuffix(".weight"),
                op=unread.kind,
                shape=unread.shape,
                status="unread",
                reason=reason,
            )
        )
    return tuple(found)


def little(model: nn.Module, rows: Sequence[LayerReport], recipe: str) -> str:
    """Says that less than half of the weights that outputs depend on were compressed, and the main reason; "" if not so.

    Args:
        model: the compressed one.
        rows: of its report, those of `uncovered` too.
        recipe: what was asked for.
    """
    rows = [row for row in rows if row.is_read]
    total = sum(row.weights for row in rows)
    done = sum(row.weights for row in rows if row.is_compressed)
    if 2 * done >= total:
        return ""
    reasons: Counter[str] = Counter()
    for row in rows:
        if not row.is_compressed:
            reasons[row.reason] += row.weights
    (reason, weights), *_ = reasons.most_common(1)
    found = intake(model)
    leaves = f"; {'; '.join(map(str, found.leaves))}" if found is not None and found.leaves else ""
    return (
        f"only {done / total:.0%} of the weights were compressed to {recipe}; the main reason, for {weights / total:.0%} of "
        f"all: {reason or 'no reason given'}{leaves}"
    )


def _parameters_of(graph_module: GraphModule, row: LayerReport) -> list[Tensor]:
    """The parameter of a row's name, or those of the module called so, with its parts' where it became several."""
    name = row.name
    owner, _, last = name.rpartition(".")
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    if name in modules:
        return list(modules[name].parameters(recurse=row.status == "factored"))
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
