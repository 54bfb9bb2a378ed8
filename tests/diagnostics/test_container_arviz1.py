"""Second half of to_arviz under ArviZ 1.x: on Python 3.12, without torch, from saved arrays.

The environment is `.venv-arviz1` at the repository's root (`make arviz1-env`) or the interpreter that PYRO_SB_PYTHON312
names. Only the absence of any python3.12 skips this test.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import pyro_sb.diagnostics.container as half
from pyro_sb.diagnostics.container import to_container

az = pytest.importorskip("arviz")
ROOT = Path(__file__).parents[2]
SCRIPT = r"""
import importlib.util, json, sys, warnings
warnings.simplefilter("error")
import arviz as az
import numpy as np

path, arrays, written = sys.argv[1:]
spec = importlib.util.spec_from_file_location("container", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
groups = {}
for key, value in np.load(arrays).items():
    group, name = key.split("/")
    groups.setdefault(group, {})[name] = value
with warnings.catch_warnings():
    tree = module.to_container(groups, {"school": list("abcde")}, {"theta": ["school"], "y": ["school"]})
    tree.to_netcdf(written)
again = az.from_netcdf(written)
same = all(np.array_equal(again[g][k].values, v) for g, names in groups.items() for k, v in names.items())
summary, loo = az.summary(tree, round_to="none"), az.loo(tree)
print(json.dumps({
    "version": az.__version__,
    "torch": "torch" in sys.modules,
    "container": type(tree).__name__,
    "same": same,
    "dims": {f"{g}/{k}": list(tree[g][k].dims) for g, names in groups.items() for k in names},
    "shapes": {f"{g}/{k}": list(tree[g][k].shape) for g, names in groups.items() for k in names},
    "rows": list(summary.index),
    "mean": float(summary["mean"]["mu"]),
    "ess": az.ess(tree)["theta"].values.tolist(),
    "rhat": az.rhat(tree)["theta"].values.tolist(),
    "elpd": float(loo.elpd),
}))
"""


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


def environment():
    """A Python 3.12 with ArviZ 1.x and no torch."""
    named = os.environ.get("PYRO_SB_PYTHON312")
    prepared = ROOT / ".venv-arviz1" / "bin" / "python"
    if named or prepared.exists():
        return named or str(prepared)
    if python312() is None:
        pytest.skip("no python3.12 on this machine")
    return pytest.fail("python3.12 is here, but .venv-arviz1 is not. Write make arviz1-env.")


def saved_arrays():
    rng = np.random.default_rng(0)
    lead = (4, 200)
    return {
        "posterior": {
            "mu": rng.normal(size=lead),
            "theta": rng.normal(size=(*lead, 5)),
            "one": rng.normal(size=(*lead, 1)),
        },
        "sample_stats": {"diverging": np.zeros(lead, dtype=bool), "move": np.ones(lead, dtype=np.int64)},
        "log_likelihood": {"y": rng.normal(size=(*lead, 5)) - 3},
        "posterior_predictive": {"y": rng.normal(size=(*lead, 5))},
        "prior": {"mu": rng.normal(size=(1, 50))},
        "observed_data": {"y": rng.normal(size=5)},
    }


def test_arviz_1_reads_the_same_arrays_on_a_python_without_torch(tmp_path):
    python, groups = environment(), saved_arrays()
    np.savez(
        tmp_path / "arrays.npz", **{f"{g}/{k}": value for g, names in groups.items() for k, value in names.items()}
    )
    command = [python, "-c", SCRIPT, half.__file__, tmp_path / "arrays.npz", tmp_path / "run.nc"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (
        found["version"].startswith("1.") and not found["torch"] and found["container"] == "DataTree" and found["same"]
    )
    for key, shape in found["shapes"].items():
        group, name = key.split("/")
        assert tuple(shape) == groups[group][name].shape
    assert found["dims"]["posterior/mu"] == ["chain", "draw"]
    for key in ("posterior/theta", "log_likelihood/y", "posterior_predictive/y"):
        assert found["dims"][key] == ["chain", "draw", "school"]
    assert found["dims"]["observed_data/y"] == ["school"]
    assert {"mu", "theta[a]", "theta[e]", "one[0]"} <= set(found["rows"])
    assert found["mean"] == pytest.approx(groups["posterior"]["mu"].mean())
    # the ArviZ of this environment is the oracle
    here = to_container(groups)
    np.testing.assert_allclose(found["ess"], az.ess(here)["theta"].values, rtol=1e-6)
    np.testing.assert_allclose(found["rhat"], az.rhat(here)["theta"].values, rtol=1e-6)
    assert found["elpd"] == pytest.approx(float(az.loo(here).elpd_loo), rel=1e-3)
