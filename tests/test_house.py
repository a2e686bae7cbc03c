"""The house: imports point down, without a circle, those inside functions included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import from its own storey and those below it.
STOREYS = (
    ("errors", "files"),
    ("config", "sharing", "quantize", "device"),
    ("costs", "rope", "cache", "attention", "interrupts"),
    ("model", "checkpoint", "text", "models"),
    ("generation",),
    ("runners",),
    ("engine",),
    ("console",),
    ("benchmark", "study"),
    ("cli",),
)
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, but for the type checker alone."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minisa."):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if module_file(name) else node.module for name in names}
    return found


def module_file(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_imports_point_down_and_never_in_a_circle() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("minisa/**/*.py")}
    graph = {name: imports(file) for name, file in files.items() if not name.endswith("__")}
    arrows = [(name, other) for name, imported in graph.items() for other in imported]
    up = [f"{name} → {other}" for name, other in arrows if STOREY[other.split(".")[1]] > STOREY[name.split(".")[1]]]
    assert up == []
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
