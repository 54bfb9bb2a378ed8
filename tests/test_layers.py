"""Imports point down, and have one form: `from pyro_sb.x.y import z`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_sb"
LAYERS = [
    {"ops"},
    {"nn", "training", "threads", "weights", "distributions"},
    {"bridges"},
    {"infer"},
    {"diagnostics", "metrics", "plots", "datasets"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
OPS_MAY_IMPORT = {
    "torch",
    "math",
    "typing",
    "collections",
    "dataclasses",
    "functools",
}  # the first, and the standard library


def home(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def refusals(path: Path, package: Path) -> list[str]:
    """What a file imports against the rules, one line each."""
    found, here = [], home(path, package)
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            found += [f"import {m}: write from {m} import name" for m in modules if m.split(".")[0] == "pyro_sb"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            modules = [module]
            if node.level:
                found.append(f"relative import of {module or '.'}: write from pyro_sb.x import name")
            elif module == "pyro_sb":
                found.append("from pyro_sb import name: name the module")
            elif module.startswith("pyro_sb.") and here != "__init__":
                used = module.split(".")[1]
                if used not in RANK:
                    found.append(f"{module}: in no layer; give it one here")
                elif RANK[used] > RANK[here]:
                    found.append(f"{here} imports {used}, which lies above it")
        if here == "ops":
            outside = {m.split(".")[0] for m in modules} - OPS_MAY_IMPORT - {"pyro_sb", "__future__"}
            found += [f"ops imports {m}: it may use torch alone" for m in outside]
    return [f"{path.relative_to(package.parent)}: {line}" for line in found]


def test_every_module_has_a_layer():
    unknown = {home(path, PACKAGE) for path in PACKAGE.rglob("*.py")} - RANK.keys() - {"__init__"}
    assert not unknown, f"modules in no layer: {unknown}"


def test_imports_point_down_and_have_one_form():
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in refusals(path, PACKAGE)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("ops/a.py", "from pyro_sb.infer.mcmc.mcmc import MCMC", "ops imports infer, which lies above it"),
        ("bridges/a.py", "from pyro_sb.plots import paths", "bridges imports plots, which lies above it"),
        ("infer/a.py", "import pyro_sb.ops", "import pyro_sb.ops"),
        ("infer/a.py", "from pyro_sb import ops", "name the module"),
        ("infer/a.py", "from . import kernels", "relative import"),
        ("infer/a.py", "from .kernels import x", "relative import"),
        ("infer/a.py", "from pyro_sb.utils import x", "in no layer"),
        ("ops/a.py", "import numpy as np", "ops imports numpy"),
        ("ops/a.py", "def f():\n    from pyro.infer import MCMC", "ops imports pyro"),
    ],
)
def test_the_rules_refuse(tmp_path, file, line, message):
    path = tmp_path / "pyro_sb" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    found = refusals(path, tmp_path / "pyro_sb")
    assert found
    assert message in found[0]


# Third-party packages that take long to load: functions import them, modules do not


HEAVY = {
    *("IPython", "arviz", "matplotlib", "mpl_toolkits", "ot", "pandas", "sbibm", "scipy", "sklearn"),
    *("threadpoolctl", "xarray", "zuko"),
}


def loaded_at_import(path: Path) -> set[str]:
    """Packages that a module imports when it is imported itself: outside functions, and not for the type checker."""
    found, waiting = set(), list[ast.AST](ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        waiting += ast.iter_child_nodes(node)
    return found


def test_heavy_packages_are_imported_in_functions():
    found = {str(p.relative_to(PACKAGE.parent)): loaded_at_import(p) & HEAVY for p in sorted(PACKAGE.rglob("*.py"))}
    found = {path: heavy for path, heavy in found.items() if heavy}
    assert not found, f"import them in the functions that use them: {found}"


@pytest.mark.parametrize(
    ("source", "heavy"),
    [
        ("import sklearn.cluster", True),
        ("from scipy import stats", True),
        ("class A:\n    from scipy import stats", True),
        ("try:\n    import ot\nexcept ImportError:\n    ot = None", True),
        ("def f():\n    from scipy import stats", False),
        ("class A:\n    def f(self):\n        import sklearn", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib", False),
    ],
)
def test_what_counts_as_loaded_at_import(tmp_path, source, heavy):
    path = tmp_path / "a.py"
    path.write_text(source)
    assert bool(loaded_at_import(path) & HEAVY) is heavy
