"""Names of modules and weights that torch.fx does not write correctly in Python code, and those it cannot take at all.

torch.fx writes ``self.conv`` where a name is an identifier, and ``getattr(self, "block1-0")`` where it is not. It takes
keywords for identifiers, forgets that Python reads identifiers in their NFKC form, and does not escape quotes. The result
of a module called self is assigned to self.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen, PythonCode

from fxprune.errors import TraceError

# Attributes of GraphModule, those that its constructor sets and those of fxprune's CompiledModule.
RESERVED = frozenset({*dir(GraphModule), *vars(GraphModule(nn.Module(), Graph())), "report", "of"}) - {"forward"}


class AnyNameCodeGen(CodeGen):
    """Writes code like torch.fx's own, but with `getattr` for every module or weight whose name needs it."""

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> PythonCode:
        namespace.create_name(root_module, None)  # so that no node takes it
        code = super()._gen_python_code(nodes, root_module, namespace, **options)
        for node in nodes:
            if node.op not in ("call_module", "get_attr") or not _is_misspelt(node):
                continue
            # "conv : torch.Tensor = self.class(x)", where torch.fx writes the names as they are.
            written = _path(root_module, node.target, lambda part: part.isidentifier(), '"{}"'.format)
            name = namespace.create_name(node.name, node)
            start = rf"^(\s*{name}(?: : [^=\n]*)? = ){re.escape(written)}(?=[(;\s])"
            right = _path(root_module, node.target, _is_plain, repr)
            code.src = re.sub(start, lambda found, right=right: found[1] + right, code.src, flags=re.MULTILINE)  # type: ignore[misc]
        return code


def allow_any_name(graph: Graph) -> Graph:
    """Make a graph write correct code for all its modules, whatever their names; a graph that does already is left alone.

    Raises:
        TraceError: a name holds a character that cannot be printed, such as a line break.
    """
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not str(node.target).isprintable():
            raise TraceError(f"{node.target!r} cannot stand in a line of code; rename that module or weight")
    if type(graph._codegen) is CodeGen and any(map(_is_misspelt, graph.nodes)):
        graph.set_codegen(AnyNameCodeGen())
    return graph


def refuse_reserved_names(model: nn.Module) -> None:
    """Raise where a module or weight of the model's own has a name that its GraphModule needs for itself.

    Raises:
        TraceError: it has; the message says which, and the remedy.
    """
    if isinstance(model, GraphModule):
        return  # It holds none of these, or holds them as what they are.
    for name in (*model._modules, *model._parameters, *model._buffers):
        if name in RESERVED and not hasattr(nn.Module, name):
            raise TraceError(
                f"{type(model).__name__} has a part named {name!r}, which a torch.fx.GraphModule needs for itself. Rename "
                f"it, or compile torch.nn.Sequential(model), in which it is called '0.{name}'"
            )


def _is_misspelt(node: Node) -> bool:
    """Whether torch.fx's own code for a node would not be what the node says."""
    if node.name == "self" and node.op != "placeholder":
        return True
    if node.op not in ("call_module", "get_attr"):
        return False
    return any(not _is_plain(part) if part.isidentifier() else not _is_quotable(part) for part in _parts(node.target))


def _is_plain(part: str) -> bool:
    return part.isidentifier() and not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part


def _is_quotable(part: str) -> bool:
    return part.isprintable() and '"' not in part and "\\" not in part


def _parts(target: Any) -> list[str]:
    return str(target).split(".")


def _path(root: str, target: Any, as_attribute: Any, quoted: Any) -> str:
    """The expression that reads a module, part after part."""
    for part in _parts(target):
        root = f"{root}.{part}" if as_attribute(part) else f"getattr({root}, {quoted(part)})"
    return root
