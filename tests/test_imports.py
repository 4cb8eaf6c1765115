"""Imports point one way: what a module imports stands below it, or in its own part."""

import ast
import graphlib
from pathlib import Path

import pytest

import fbprop

ROOT = Path(fbprop.__file__).parent
# Parts of the package from the ground up; those of one line do not import each other.
LAYERS = (
    ("core",),
    ("rules",),
    ("reverse",),
    ("check", "explain", "data"),
    ("ops", "optim", "mesh", "learning", "watch"),
    ("nn", "train"),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fbprop", *parts)).removesuffix(".__init__")


NAMES = {name_of(p) for p in MODULES}


def imports(tree):
    """Modules of fbprop that a piece of code imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{a.name}" for a in node.names]
            found = [f if f in NAMES else node.module for f in full]
        else:
            continue
        yield from (f for f in found if f.partition(".")[0] == "fbprop")


def part_of(module):
    return module.split(".")[1] if "." in module else "fbprop itself"


def upward(importer, imported):
    """Whether an import goes against the order."""
    mine, other = part_of(importer), part_of(imported)
    return mine != other and not HEIGHT[mine] > HEIGHT.get(other, len(LAYERS))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    wrong = [m for m in imports(ast.parse(path.read_text())) if upward(name_of(path), m)]
    assert not wrong, f"{name_of(path)} imports {wrong}"


def test_no_part_imports_in_a_circle():
    top = {
        name_of(p): {m for m in imports(ast.Module(_at_import(p), [])) if m != name_of(p)}
        for p in MODULES
    }
    assert list(graphlib.TopologicalSorter(top).static_order())


def _at_import(path):
    body = ast.parse(path.read_text()).body
    return [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(("line", "wrong"), [
    ("from fbprop.reverse import vjp", True),
    ("def f():\n    from fbprop import reverse", True),
    ("import fbprop.nn.layer", True),
    ("import fbprop", True),
    ("from fbprop.core import engine", False),
    ("from fbprop.rules import table", False),
    ("import jax", False),
])
def test_an_import_upward_is_seen(line, wrong):
    assert any(upward("fbprop.rules.shape", m) for m in imports(ast.parse(line))) == wrong
