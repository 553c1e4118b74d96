"""The house plan: a room imports from its own floor and from those below, never from above, and in no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vinoopt"

FLOORS = {
    "_version": 0, "errors": 0, "records": 0, "serde": 0, "store": 0, "alarm": 0, "forecast": 0,
    "hardware": 1, "frontend": 1, "demo": 1, "schedule": 1,
    "accuracy": 2, "toolchains": 2, "cost_model": 2, "replay": 2,
    "bench": 3, "distillation": 3, "compression": 3, "fleet": 3, "tuning": 3, "yardsticks": 3,
    "bundle": 4, "compiler": 4, "inspection": 4, "lab": 4, "lineup": 4, "report": 4, "selection": 4,
    "verification": 4,
    "pipeline": 5,
    "cli": 6,
}  # fmt: skip

HEAVY = {"openvino", "nncf", "onnx", "scipy", "onnxruntime", "torch"}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_rooms(file: Path) -> set[str]:
    modules = imported_modules(ast.parse(file.read_text()))
    names = {m.split(".")[1] for m in modules if m.startswith("vinoopt.") and m.count(".") >= 1}
    return (names & set(FLOORS)) - {room_of(file), "_version"}


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_room_reaches_up(file: Path) -> None:
    assert room_of(file) in FLOORS, f"{room_of(file)} has no floor in the house plan"
    above = {room for room in imported_rooms(file) if FLOORS[room] > FLOORS[room_of(file)]}
    assert not above, f"{file.name} imports from above: {above}"


def test_rooms_of_one_floor_do_not_lean_on_each_other_in_a_circle() -> None:
    edges = {(room_of(file), room) for file in FILES for room in imported_rooms(file)}
    circles = {tuple(sorted(pair)) for pair in edges if pair[::-1] in edges}
    assert not circles


def test_nncf_has_one_call_site() -> None:
    sites = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if any(m == "nncf" or m.startswith("nncf.") for m in imported_modules(ast.parse(file.read_text())))
    }
    assert sites == {"compression/quantize.py"}


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) == "cli"], ids=lambda f: f.name)
def test_a_command_imports_nothing_heavy_before_its_body(file: Path) -> None:
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.split(".")[0] for node in top for name in imported_modules(node)}
    rooms = {
        name.split(".")[1]
        for node in top
        for name in imported_modules(node)
        if name.startswith("vinoopt.") and name.split(".")[1] in FLOORS
    }
    assert not modules & HEAVY
    assert rooms <= {"alarm", "cli", "errors", "records", "serde"}
