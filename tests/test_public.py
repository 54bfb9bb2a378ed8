"""The public interface: what each package lists, and every signature, as tests/public.txt has them.

After a change that is meant: ``python -m tests.test_public --write``, and read the difference before it is committed.
"""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).with_name("public.txt")
WRITE = "python -m tests.test_public --write"
PACKAGES = ("bridges", "infer", "diagnostics", "metrics", "plots", "datasets")
SHARED = ("nn", "training", "weights", "distributions")
OPS = sorted(path.stem for path in (Path(__file__).parents[1] / "pyro_sb" / "ops").glob("[a-z]*.py"))
COVERED = (*PACKAGES, "infer.population", *SHARED, *(f"ops.{name}" for name in OPS))
EMPTY = inspect.Parameter.empty


def packages() -> list[ModuleType]:
    """The public packages and modules, the one that exports the others' names last."""
    return [importlib.import_module(name) for name in (*(f"pyro_sb.{name}" for name in COVERED), "pyro_sb")]


def public(module: ModuleType) -> list[str]:
    """What a module lists, or, where it has no list, the functions and classes that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def default(value: Any) -> Any:
    """A default value as a text that is the same in every process."""

    class Shown:
        def __repr__(self) -> str:
            return getattr(value, "__qualname__", None) or repr(value)

    return value if value is EMPTY else Shown()


def signature(made: Any) -> str:
    """Names, kinds and defaults of the parameters."""
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    bare = [p.replace(annotation=EMPTY, default=default(p.default)) for p in parameters]
    return str(inspect.Signature(bare))


def members(kind: type, listed: set[type]) -> list[str]:
    """Own public methods and properties, and those of our bases that no package lists."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith("pyro_sb") or (base is not kind and base in listed):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in found:
                continue
            value = getattr(value, "__func__", value)
            if isinstance(value, property):
                found[name] = f"{kind.__name__}.{name}"
            elif inspect.isfunction(value):
                found[name] = f"{kind.__name__}.{name}{signature(value)}"
    return [found[name] for name in sorted(found)]


def snapshot() -> str:
    """Every public name with its signature, at the first package that lists it."""
    homes: dict[int, str] = {}
    listed = {value for p in packages() for value in map(p.__dict__.get, public(p)) if inspect.isclass(value)}
    lines = []
    for package in packages():
        lines += ["", f"[{package.__name__}]"]
        for name in public(package):
            value = getattr(package, name)
            if id(value) in homes:
                lines.append(f"{name} = {homes[id(value)]}")
                continue
            homes[id(value)] = f"{package.__name__}.{name}"
            if inspect.isclass(value):
                lines += [f"{name}{signature(value)}", *("    " + line for line in members(value, listed))]
            else:
                lines.append(f"{name}{signature(value)}" if callable(value) else name)
    return "\n".join(lines[1:]) + "\n"


def test_public_names_and_signatures_are_those_of_the_file():
    found, expected = snapshot().splitlines(), FILE.read_text().splitlines()
    gone = [f"- {line}" for line in expected if line not in found]
    new = [f"+ {line}" for line in found if line not in expected]
    changed = "\n".join(gone + new) or "the order of the lines"
    assert found == expected, f"the public interface differs from {FILE.name}; if that is meant: {WRITE}\n{changed}"


@pytest.mark.parametrize("name", ["", *PACKAGES, *SHARED, "threads", "files"])
def test_modules_list_what_is_public(name):
    module = importlib.import_module(f"pyro_sb.{name}" if name else "pyro_sb")
    others = () if name else (*PACKAGES, "__version__")
    assert dir(module) == sorted([*module.__all__, *others])
    assert all(hasattr(module, listed) for listed in dir(module))


IMPORTS = """
import sys
import pyro_sb
heavy = [m for m in ("sklearn", "scipy", "pandas", "matplotlib", "arviz", "ot", "zuko", "xarray") if m in sys.modules]
assert not heavy, f"import pyro_sb loads {heavy}: import them in the functions that use them"
assert "pyro_sb.plots" not in sys.modules and "pyro_sb.datasets" not in sys.modules
for name in ("bridges", "datasets", "diagnostics", "infer", "metrics", "plots"):
    assert getattr(pyro_sb, name) is sys.modules[f"pyro_sb.{name}"], name
try:
    pyro_sb.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("an unknown name must raise")
"""


def test_import_is_light_and_packages_are_attributes():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        *(f"infer.{part}" for part in ("mcmc", "kernels", "amortized", "population", "potential")),
        *("nn", "training", "weights", "distributions", "threads", "ops.sinkhorn", "ops.closed_form"),
    ],
)
def test_named_modules_resolve(name):
    importlib.import_module(f"pyro_sb.{name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {WRITE}")
    FILE.write_text(snapshot())
    print(f"{FILE}: {len(snapshot().splitlines())} lines")
