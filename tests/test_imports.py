"""Imports go one way, as the table of docs/design.md says, and our names do not break other packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("utils", "modules", "datasets", "engine", "CLAM", "labels")
EVERYTHING = {*ROOMS, "main", "tests", "benchmarks"}
CLAM_FILES = {"create_patches_fp", *(path.stem for path in (ROOT / "CLAM").glob("*.py"))}
LAZY_IN_ABMILX = {"triton"}


def allowed_imports() -> dict[str, set[str]]:
    """What each room may import besides itself, from the table in docs/design.md."""
    rows = re.findall(r"^\| `([\w.]+)/?` \|[^|]*\|([^|]*)\|$", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    return {room: EVERYTHING if "all" in text else set(re.findall(r"`([\w.]+)`", text)) for room, text in rows}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a module imports, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(source: str, room: str, allowed: set[str]) -> list[str]:
    """Imports of ``source``, a module of ``room``, that the table does not allow."""
    found = []
    for name in imported(ast.parse(source)):
        top = name.split(".")[0]
        foreign = top != room and top in EVERYTHING or (top in CLAM_FILES and room != "CLAM")
        if foreign and not any(name == a or name.startswith(f"{a}.") for a in allowed):
            found.append(name)
    return found


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_the_design_page_has_a_row_for_every_room() -> None:
    table = allowed_imports()
    assert set(ROOMS) <= set(table)
    assert table["utils"] == set()
    assert table["CLAM"] == {"utils", "datasets.store", "datasets.jpeg"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_design_page(room: str) -> None:
    allowed = allowed_imports()[room]
    faults = {
        str(path.relative_to(ROOT)): names
        for path in python_files(room)
        if (names := breaches(path.read_text(encoding="utf-8"), room, allowed))
    }
    assert faults == {}


@pytest.mark.parametrize(
    ("source", "room", "wrong"),
    [
        ("import utils.errors\nfrom engine.loop import run", "modules", ["engine.loop.run"]),
        ("def f():\n    from datasets import labels, store", "CLAM", ["datasets.labels"]),
        ("from datasets.jpeg import decode\nimport grid", "CLAM", []),
        ("import utils, torch", "engine", []),
        ("import main", "engine", ["main"]),
        ("import create_patches_fp", "datasets", ["create_patches_fp"]),
    ],
)
def test_a_breach_is_found(source: str, room: str, wrong: list[str]) -> None:
    assert breaches(source, room, allowed_imports()[room]) == wrong


def test_nothing_in_clam_hides_a_room() -> None:
    assert CLAM_FILES.isdisjoint({"utils", "datasets", "modules", "engine", "main"})


def test_abmilx_needs_torch_and_the_standard_library_only() -> None:
    tree = ast.parse((ROOT / "modules/abmilx.py").read_text(encoding="utf-8"))
    free = {"torch", *sys.stdlib_module_names}
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    eager = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n not in inside]
    assert {name.split(".")[0] for n in eager for name in imported(n)} <= free
    assert {name.split(".")[0] for name in imported(tree)} - free <= LAZY_IN_ABMILX
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []


def test_other_packages_import_beside_our_names() -> None:
    code = """
import datasets, utils, modules, engine, timm, torchmetrics, torchvision
from pathlib import Path
for module in datasets, utils, modules, engine:
    print(Path(module.__file__).resolve().parent.parent)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {str(ROOT)}
