"""Imports point down, and have one form: `from pyro_sb.x.y import z`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_sb"
LAYERS = [
    {"ops"},
    {
        "nn",
        "training",
        "threads",
        "weights",
        "distributions",
        "files",
        "warn",
        "checks",
        "fingerprint",
        "plain",
        "stages",
    },
    {"bridges"},
    {"infer"},
    {"metrics", "plots", "datasets"},
    {"diagnostics"},
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


def test_families_of_bridges_do_not_import_each_other():
    bridges = PACKAGE / "bridges"
    families = {path.name for path in bridges.iterdir() if path.is_dir() and path.name != "__pycache__"}
    may = {("latent", "codecs"), ("latent", "diffusion")}
    found = []
    for path in sorted(bridges.rglob("*.py")):
        here = path.relative_to(bridges).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_sb.bridges."):
                there = node.module.split(".")[2]
                if there in families and there != here and (here, there) not in may and here != "__init__":
                    found.append(f"{path.relative_to(bridges)} imports the family {there}")
    assert families and not found, "\n".join(found)


def test_no_folder_holds_more_than_15_modules():
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    full = {str(f.relative_to(PACKAGE)): len(list(f.glob("[!_]*.py"))) for f in folders}
    assert not {name: number for name, number in full.items() if number > 15}


def test_names_of_classes_are_unique():
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_private_names_stay_in_their_module():
    theirs = {
        "_mask",
        "_asdict",
        "_replace",
        "_foreach_lerp_",
        "_batch_shape",
        "_buffers",
        "_standard_gamma",
        "_args",
        "_kwargs",
        "_C",
        "_cdata",
        "_functorch",
        "_linalg_check_errors",
        "_schema",
        "_version",
    }  # of Python, torch and Pyro
    defined: dict[Path, set[str]] = {}
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    for path, tree in trees.items():
        names = defined.setdefault(path, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                used = [alias.name for alias in node.names if alias.name.startswith("_")]
                used = used if (node.module or "").startswith("pyro_sb") else []
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                above = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
                inside = node.attr in defined[path] | theirs
                used = [] if own or above or inside else [node.attr]
            else:
                continue
            found += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in used]
    assert not found, "\n".join(found)


# ---- inside infer: one order of folders, no circle of files, no private name of another module ----

INFER = ["model", "moves", "population", "mcmc", "amortized", "kernels", "autoguide"]


def imports_of(path: Path) -> list[tuple[str, str]]:
    """Module and name of everything of ours that a file imports, lazy imports too."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").startswith("pyro_sb.")]
    return [(str(node.module), alias.name) for node in ours for alias in node.names]


def refusals_inside(path: Path, package: Path) -> list[str]:
    """Breaches of a file of infer, one line each."""
    folder = path.relative_to(package / "infer").parts[0]
    found = []
    for module, name in imports_of(path):
        parts = module.split(".")[1:]
        if parts[0] == "infer" and len(parts) > 2 and INFER.index(parts[1]) > INFER.index(folder):
            found.append(f"infer/{folder} imports infer/{parts[1]}, which lies above it")
        if name.startswith("_") or any(part.startswith("_") for part in parts):
            found.append(f"{module} keeps {name} to itself")
    return found


def circles(package: Path) -> list[list[str]]:
    """Files that import each other, directly or through others."""
    graph = {
        f"pyro_sb.{path.relative_to(package).with_suffix('').as_posix().replace('/', '.')}": {
            module for module, _ in imports_of(path)
        }
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module in graph and module not in seen:
                seen.add(module)
                waiting.extend(graph[module])
        return seen

    far = {module: reached(module) for module in graph}
    return [
        sorted({module, *(m for m in far[module] if module in far[m])}) for module in graph if module in far[module]
    ]


def test_folders_of_infer_import_in_one_order_and_no_private_names():
    files = [path for path in (PACKAGE / "infer").rglob("*.py") if path.parent != PACKAGE / "infer"]
    assert {path.relative_to(PACKAGE / "infer").parts[0] for path in files} <= set(INFER)
    found = [f"{path.name}: {line}" for path in files for line in refusals_inside(path, PACKAGE)]
    assert not found, "\n".join(found)


def test_no_files_import_each_other_in_a_circle():
    assert not circles(PACKAGE)


@pytest.mark.parametrize(
    ("folder", "line", "message"),
    [
        ("moves", "from pyro_sb.infer.mcmc.walk import Walk", "infer/moves imports infer/mcmc, which lies above it"),
        ("mcmc", "def f():\n    from pyro_sb.infer.kernels.checks import x", "infer/mcmc imports infer/kernels"),
        ("mcmc", "from pyro_sb.infer.moves.moves import _moved", "pyro_sb.infer.moves.moves keeps _moved to itself"),
        ("mcmc", "from pyro_sb.infer.moves._secret import x", "keeps x to itself"),
    ],
)
def test_the_rules_inside_infer_refuse(tmp_path, folder, line, message):
    path = tmp_path / "pyro_sb" / "infer" / folder / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert message in refusals_inside(path, tmp_path / "pyro_sb")[0]


def test_a_circle_of_files_is_found(tmp_path):
    folder = tmp_path / "pyro_sb" / "infer" / "moves"
    folder.mkdir(parents=True)
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        (folder / f"{name}.py").write_text(f"from pyro_sb.infer.moves.{other} import x")
    found = circles(tmp_path / "pyro_sb")
    assert len(found) == 3 and all(circle == [f"pyro_sb.infer.moves.{n}" for n in "abc"] for circle in found)


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
