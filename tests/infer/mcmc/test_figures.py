"""Figures of what varies: entries that cannot vary are named or left out, never shown as NaN."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.mcmc.figures import moving_entries, varying


def correlated(y):
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.deterministic("correlation", factor @ factor.transpose(-1, -2))
    pyro.deterministic("known", torch.ones(2) + 0.0 * factor[..., 1, 0, None])
    pyro.deterministic("one", dist.Normal(0.0, 1.0).loc + 1.0 + 0.0 * factor[..., 1, 0])
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=y)


def test_the_summary_of_a_cholesky_factor_has_no_nan(capsys):
    mcmc = MCMC(KernelLangevin(correlated, num_particles=100), 20, 5, num_chains=8, disable_progbar=True)
    mcmc.run(torch.randn(30, 3))
    mcmc.summary()
    table = capsys.readouterr().out
    assert "nan" not in table
    assert "factor[1,0]" in table and "factor[0,1]" not in table and "factor[0,0]" not in table
    assert "correlation[0,1]" in table and "correlation[0,0]" not in table and "correlation[2,2]" not in table
    assert "Constant: known, one" in table and "Number of divergences: " in table


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rounding_is_no_variation_and_small_variation_is_some(scale):
    noise = torch.randn(4, 50, dtype=torch.float64)
    value = torch.stack([1 + 1e-16 * noise, 1 + 1e-12 * noise, noise, 0 * noise, 1e-300 * noise], -1) * scale
    assert varying(value).tolist() == [False, True, True, False, True]
    assert varying(torch.full((2, 3), torch.nan)).item()  # it is shown
    assert set(moving_entries("x", value)) == {"x[1]", "x[2]", "x[4]"}
    assert moving_entries("x", value[..., 3:4]) == {}


def test_a_site_that_varies_in_all_entries_keeps_its_name():
    value = torch.randn(2, 5, 3)
    assert moving_entries("x", value) == {"x": value}
