"""The Python 3.12 with ArviZ 1.x and without torch, on which the halves that need ArviZ alone are tried.

It is `.venv-arviz1` at the repository's root (`make arviz1-env`) or the interpreter that PYRO_SB_PYTHON312 names. Only
the absence of any python3.12 skips a test.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def runs_python312(command, **environment):
    """The interpreter behind a command, if it runs and is Python 3.12; a pyenv shim may be there and not run."""
    ask = "import sys; print(sys.executable if sys.version_info[:2] == (3, 12) else '')"
    try:
        asked = subprocess.run([command, "-c", ask], capture_output=True, text=True, env={**os.environ, **environment})
    except OSError:
        return None
    return asked.stdout.strip() or None


def python312():
    """Any Python 3.12 on this machine."""
    versions = []
    if shutil.which("pyenv"):
        versions = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    found = runs_python312("python3.12")
    for version in (v for v in versions if v.startswith("3.12.")):
        found = found or runs_python312("python3.12", PYENV_VERSION=version)
    return found


@pytest.fixture(scope="session")
def arviz1_python():
    """A Python 3.12 with ArviZ 1.x and no torch."""
    named = os.environ.get("PYRO_SB_PYTHON312")
    prepared = ROOT / ".venv-arviz1" / "bin" / "python"
    if named or prepared.exists():
        return named or str(prepared)
    if python312() is None:
        pytest.skip("no python3.12 on this machine")
    return pytest.fail("python3.12 is here, but .venv-arviz1 is not. Write make arviz1-env.")
