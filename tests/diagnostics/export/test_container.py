"""Second half of to_arviz, and both halves together, in the ArviZ of this environment."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import Run, to_arviz
from pyro_sb.diagnostics.export.container import to_container
from pyro_sb.infer import MCMC, KernelLangevin

az = pytest.importorskip("arviz")
F64 = torch.float64
ZERO = torch.zeros((), dtype=F64)
Y = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.9], dtype=F64)


def conjugate(y):
    """mu ~ N(0, 2^2), y_i ~ N(mu, 1): the posterior and every leave-one-out density are normal."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
    pyro.deterministic("pair", torch.stack([mu, -mu], -1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior_of_mean(y):
    precision = 1 / 4 + len(y)
    return y.sum() / precision, precision**-0.5


def finished(num_chains=4, num_draws=1000):
    """A run whose draws are independent and exact."""
    mean, sd = posterior_of_mean(Y)
    mu = mean + sd * torch.randn(num_chains, num_draws, dtype=F64)
    draws = {"mu": mu, "pair": torch.stack([mu, -mu], -1)}
    statistics = {"diverging": torch.zeros(num_chains, num_draws, dtype=torch.bool), "lp": -(mu**2)}
    return Run(draws, conjugate, (Y,), sample_stats=statistics)


def test_arviz_reads_exact_draws_as_such():
    run = finished()
    idata = to_arviz(run, log_likelihood=True)
    mean, sd = posterior_of_mean(Y)
    summary = az.summary(idata, var_names=["mu"], round_to="none")
    z = (float(summary["mean"].iloc[0]) - float(mean)) / (sd / 4000**0.5)
    assert abs(z) < 4
    assert 3000 < float(az.ess(idata)["mu"]) < 5000 and float(az.rhat(idata)["mu"]) < 1.01
    mu = run.draws["mu"].numpy()
    assert float(az.ess(idata)["mu"]) == pytest.approx(float(az.ess(to_container({"posterior": {"x": mu}}))["x"]))


def test_loo_is_the_sum_of_the_exact_leave_one_out_densities():
    found = az.loo(to_arviz(finished(4, 2500), log_likelihood=True))
    exact = 0.0
    for i in range(len(Y)):
        mean, sd = posterior_of_mean(torch.cat([Y[:i], Y[i + 1 :]]))
        variance = 1 + sd**2
        exact += float(-0.5 * (Y[i] - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance))
    elpd = found["elpd_loo"] if "elpd_loo" in getattr(found, "index", []) else found.elpd
    assert abs(float(elpd) - exact) < 0.02  # Monte Carlo error of 10,000 draws: about 0.005
    assert found.n_data_points == 5


def test_every_group_arrives_with_its_dimensions():
    idata = to_arviz(
        finished(3, 20), log_likelihood=True, prior=7, posterior_predictive=True, coords={"rows": list("abcde")}
    )
    expected = {
        "posterior": {"mu": ("chain", "draw"), "pair": ("chain", "draw", "pair_dim_0")},
        "sample_stats": {"diverging": ("chain", "draw"), "lp": ("chain", "draw")},
        "log_likelihood": {"y": ("chain", "draw", "rows")},
        "posterior_predictive": {"y": ("chain", "draw", "rows")},
        "prior": {"mu": ("chain", "draw"), "pair": ("chain", "draw", "pair_dim_0")},
        "prior_predictive": {"y": ("chain", "draw", "rows")},
        "observed_data": {"y": ("rows",)},
    }
    for group, variables in expected.items():
        assert {name: idata[group][name].dims for name in idata[group].data_vars} == variables
    assert idata["posterior_predictive"]["y"].shape == (3, 20, 5)
    assert list(idata["observed_data"]["y"].coords["rows"].values) == list("abcde")


def test_users_dimension_names_win():
    idata = to_arviz(finished(2, 5), dims={"pair": ["sign"], "y": ["row"]}, coords={"sign": ["+", "-"]})
    assert idata["posterior"]["pair"].dims == ("chain", "draw", "sign")
    assert idata["observed_data"]["y"].dims == ("row",)
    assert float(idata["posterior"]["pair"].sel(sign="-", chain=1, draw=3)) == -float(
        idata["posterior"]["mu"].sel(chain=1, draw=3)
    )


def test_more_chains_than_draws_is_no_cause_for_alarm():  # warnings are errors here
    assert to_arviz(finished(64, 3))["posterior"]["mu"].shape == (64, 3)


def test_a_file_returns_what_was_written(tmp_path):
    idata = to_arviz(finished(3, 20), log_likelihood=True, prior=7, posterior_predictive=True)
    idata.to_netcdf(tmp_path / "run.nc")
    again = az.from_netcdf(tmp_path / "run.nc")
    for group in ("posterior", "sample_stats", "log_likelihood", "prior", "posterior_predictive", "observed_data"):
        for name, value in idata[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, value.values)
            assert again[group][name].values.dtype == value.values.dtype


def test_a_run_of_pyros_nuts():
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(conjugate), num_samples=30, warmup_steps=20, disable_progbar=True)
    mcmc.run(Y)
    idata = to_arviz(mcmc, log_likelihood=True, posterior_predictive=True)
    mu = mcmc.get_samples(group_by_chain=True)["mu"]
    np.testing.assert_array_equal(idata["posterior"]["mu"].values, mu.numpy())
    assert idata["sample_stats"]["diverging"].shape == (1, 30)
    expected = -0.5 * (Y - mu[..., None]) ** 2 - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values, expected.numpy(), rtol=1e-12)


def test_a_run_of_our_kernel():
    mcmc = MCMC(KernelLangevin(conjugate), num_samples=20, num_chains=8, disable_progbar=True)
    mcmc.run(Y)
    idata = to_arviz(mcmc, log_likelihood=True)
    np.testing.assert_array_equal(idata["posterior"]["mu"].values, mcmc.get_samples(group_by_chain=True)["mu"].numpy())
    statistics = set(idata["sample_stats"].data_vars)
    assert {"acceptance_rate", "energy", "step_size", "diverging", "move", "lp"} <= statistics
    assert all(idata["sample_stats"][name].shape == (8, 20) for name in statistics)


def test_without_arviz_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-sb\[arviz\]'"):
        to_container({"posterior": {"x": np.zeros((1, 4))}})
