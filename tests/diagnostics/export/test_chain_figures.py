"""R-hat and ESS of a container: ArviZ's own numbers, in this environment's version and in 1.x without torch."""

import json
import subprocess

import numpy as np
import pytest

import pyro_sb.diagnostics.export.container as half
from pyro_sb.diagnostics.export.container import chain_figures, to_container

az = pytest.importorskip("arviz")

SCRIPT = r"""
import importlib.util, json, sys, warnings
warnings.simplefilter("error")
import arviz as az
import numpy as np

path, arrays = sys.argv[1:]
spec = importlib.util.spec_from_file_location("chain_figures", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
saved = dict(np.load(arrays))
tree = az.from_dict({"posterior": {k: v for k, v in saved.items() if k != "diverging"},
                     "sample_stats": {"diverging": saved["diverging"]}})
f = module.chain_figures(tree)
one = module.chain_figures(az.from_dict({"posterior": {"mu": saved["mu"][:1]}}))
try:
    module.chain_figures(az.from_dict({"prior": {"mu": saved["mu"]}}))
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(json.dumps({"version": az.__version__, "torch": "torch" in sys.modules, "names": f.names,
    "r_hat": f.r_hat.tolist(), "bulk": f.ess_bulk.tolist(), "tail": f.ess_tail.tolist(),
    "shape": [f.num_chains, f.num_draws], "diverging": f.diverging, "one": one.r_hat.tolist(), "refusal": refusal,
    "arrays": {k: list(v.shape) for k, v in module.container_arrays(tree).items()}}))
"""


def saved():
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(4, 300))
    return {
        "mu": mu,
        "theta": rng.normal(size=(4, 300, 2, 3)) + np.arange(4)[:, None, None, None] * 0.1,
        "diverging": np.arange(1200).reshape(4, 300) < 7,
    }


def container(arrays):
    rest = {name: value for name, value in arrays.items() if name != "diverging"}
    return to_container({"posterior": rest, "sample_stats": {"diverging": arrays["diverging"]}})


def test_every_number_has_arvizs_figures():
    arrays = saved()
    figures = chain_figures(container(arrays))
    assert figures.names == ["mu", *(f"theta[{i}, {j}]" for i in range(2) for j in range(3))]
    assert (figures.num_chains, figures.num_draws, figures.diverging) == (4, 300, 7)
    for name, values in zip(figures.names, zip(figures.r_hat, figures.ess_bulk, figures.ess_tail)):
        column = arrays["mu"] if name == "mu" else arrays["theta"][:, :, int(name[6]), int(name[9])]
        column = np.ascontiguousarray(column)
        expected = (az.rhat(column), az.ess(column, method="bulk"), az.ess(column, method="tail"))
        np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_one_chain_is_judged_by_its_halves():
    rng = np.random.default_rng(0)
    drifting = np.linspace(0, 4, 400)[None] + rng.normal(size=(1, 400))
    still = rng.normal(size=(1, 400, 2))
    figures = chain_figures(to_container({"posterior": {"a": drifting, "b": still}}))
    assert figures.r_hat[0] > 1.2 and (figures.r_hat[1:] < 1.03).all()
    assert figures.diverging is None


def test_too_few_draws_and_no_posterior_are_refused():
    with pytest.raises(ValueError, match="at least 4 draws a chain, got 3"):
        chain_figures(to_container({"posterior": {"a": np.zeros((2, 3))}}))
    with pytest.raises(ValueError, match="must have a group posterior"):
        chain_figures(to_container({"prior": {"a": np.zeros((2, 30))}}))


def test_arviz_1_says_the_same_on_a_python_without_torch(tmp_path, arviz1_python):
    arrays = saved()
    np.savez(tmp_path / "arrays.npz", **arrays)
    command = [arviz1_python, "-c", SCRIPT, half.__file__, tmp_path / "arrays.npz"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found, here = json.loads(finished.stdout), chain_figures(container(arrays))
    assert found["version"].startswith("1.") and not found["torch"]
    assert found["names"] == here.names and found["diverging"] == 7 and found["shape"] == [4, 300]
    np.testing.assert_allclose(found["r_hat"], here.r_hat, rtol=1e-6)
    np.testing.assert_allclose(found["bulk"], here.ess_bulk, rtol=1e-6)
    np.testing.assert_allclose(found["tail"], here.ess_tail, rtol=1e-6)
    alone = chain_figures(to_container({"posterior": {"mu": arrays["mu"][:1]}}))
    np.testing.assert_allclose(found["one"], alone.r_hat, rtol=1e-6)
    assert "group posterior" in found["refusal"] and found["arrays"] == {"mu": [4, 300], "theta": [4, 300, 2, 3]}
