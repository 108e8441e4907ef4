"""Dependencies point one way: docs/design.md says which, and this holds the code to it.

Every import counts, wherever it stands in a file, but for those that only a type checker sees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fxprune

ROOT = Path(fxprune.__file__).parent
# From the ground up: a package or module imports those of its own floor, without circles, and of the floors before it.
FLOORS = (
    ("errors", "files", "runtime", "tables"),
    ("annotations", "consumers", "geometry", "graph", "operations", "pattern", "report"),
    ("solvers", "statistics"),
    ("calibration", "layers", "options"),
    ("channels", "constraints", "intake", "passes", "ranks", "recipe", "speedup", "trace_check", "tracing", "widths"),
    ("compiled", "compiled_parts", "compiler", "fine_tuning", "parts", "rank_reduction", "scanning"),
    ("data", "export", "graph_diff", "models", "onnx_import", "saving"),
    ("cli", "experiments", "plots"),
)
# A measured speed-up writes the files that it times, and a model may be an ONNX file; imported there, and only then.
WHERE_NEEDED = {("speedup", "export"), ("compiler", "onnx_import")}


def imported(source: str, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules of this package that a file imports, and whether it does so as soon as it is imported itself."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while pending:
        node, at_once = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, at_once) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module, at_once
        at_once = at_once and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        pending += [(child, at_once) for child in ast.iter_child_nodes(node)]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}
ARROWS = [
    (name, target, at_once)
    for name, path in FILES.items()
    for target, at_once in imported(path.read_text(encoding="utf-8"), set(FILES))
    if target != name
]


def unit(module: str) -> str:
    """The package or module right below fxprune; "" for fxprune itself."""
    return module.partition(".")[2].partition(".")[0]


def test_every_package_has_a_floor() -> None:
    listed = [name for floor in FLOORS for name in floor]
    found = {unit(module) for module in FILES} - {"", "__main__"}
    assert sorted(listed) == sorted(found), "tests/test_imports.py and docs/design.md list what there is, each once"


def test_imports_lead_downwards() -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{name} imports {target}"
        for name, target, at_once in ARROWS
        if unit(name) in floor_of and unit(target) in floor_of and floor_of[unit(target)] > floor_of[unit(name)]
        if at_once or (unit(name), unit(target)) not in WHERE_NEEDED
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("of", ["packages", "files"])
def test_there_is_no_circle(of: str) -> None:
    graph: dict[str, set[str]] = {}
    for name, target, _ in ARROWS:
        a, b = (unit(name), unit(target)) if of == "packages" else (name, target)
        # Diffs draw themselves: GraphDiff.to_html and str import what draws.
        drawn = name == "fxprune.graph_diff.result"
        if a != b and a and b and not drawn:
            graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_counts_as_an_import() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport a.b\nfrom a import c, other\n"
        "if TYPE_CHECKING:\n    import a.d\nelse:\n    import a.e\n"
        "class A:\n    def f(self):\n        from a.f import x\n"
    )
    found = set(imported(source, {"a", "a.b", "a.c", "a.d", "a.e", "a.f"}))
    assert found == {("a.b", True), ("a.c", True), ("a", True), ("a.e", True), ("a.f", False)}
