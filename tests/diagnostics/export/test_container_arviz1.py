"""Second half of to_arviz under ArviZ 1.x: on Python 3.12, without torch, from saved arrays.

The environment is that of the fixture `arviz1_python`.
"""

import json
import subprocess

import numpy as np
import pytest

import pyro_sb.diagnostics.export.container as half
from pyro_sb.diagnostics.export.container import to_container

az = pytest.importorskip("arviz")
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


def test_arviz_1_reads_the_same_arrays_on_a_python_without_torch(tmp_path, arviz1_python):
    groups = saved_arrays()
    np.savez(
        tmp_path / "arrays.npz", **{f"{g}/{k}": value for g, names in groups.items() for k, value in names.items()}
    )
    command = [arviz1_python, "-c", SCRIPT, half.__file__, tmp_path / "arrays.npz", tmp_path / "run.nc"]
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
