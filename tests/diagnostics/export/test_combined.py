"""Many chains laid end to end for plots: no draw lost, none moved but to its place."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import sample

from pyro_sb.diagnostics import Run, to_arviz
from pyro_sb.diagnostics.export.groups import Groups, combined

az = pytest.importorskip("arviz")

Y = torch.tensor([0.3, -1.0])


def model(y):
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=y)


def finished(num_chains, num_draws):
    place = torch.arange(float(num_chains * num_draws)).reshape(num_chains, num_draws)
    return Run({"mu": place}, model, (Y,), sample_stats={"diverging": place > 3})


@pytest.mark.parametrize(
    ("num_chains", "combine", "expected"),
    [(64, 8, 8), (100, 8, 10), (6, 8, 6), (7, 8, 7), (13, 3, 1), (64, 1, 1), (256, 8, 8), (12, 5, 6), (1, 8, 1)],
)
def test_chains_follow_each_other_in_order(num_chains, combine, expected):
    idata = to_arviz(finished(num_chains, 3), combine=combine)
    mu = idata["posterior"]["mu"].values
    assert mu.shape == (expected, num_chains * 3 // expected)
    np.testing.assert_array_equal(mu.reshape(-1), np.arange(num_chains * 3))
    assert idata["sample_stats"]["diverging"].values.sum() == max(0, num_chains * 3 - 4)


def test_every_group_of_draws_is_laid_alike_and_the_others_stay():
    asked = {"log_likelihood": True, "posterior_predictive": 2, "prior": 7}
    whole, laid = (to_arviz(finished(6, 4), combine=n, **asked) for n in (None, 2))
    for group, shape in (("log_likelihood", (2, 12)), ("posterior_predictive", (2, 6)), ("prior", (1, 7))):
        name = "mu" if group == "prior" else "y"
        assert laid[group][name].values.shape[:2] == shape
    likelihood = whole["log_likelihood"]["y"].values
    np.testing.assert_allclose(laid["log_likelihood"]["y"].values.reshape(likelihood.shape), likelihood)
    np.testing.assert_array_equal(laid["observed_data"]["y"].values, Y.numpy())


@pytest.mark.parametrize("number", [0, 2.5, "8", -1])
def test_the_number_of_chains_is_a_whole_number(number):
    with pytest.raises((ValueError, TypeError), match="combine must be at least 1"):
        to_arviz(finished(6, 4), combine=number)


def test_dimension_names_stay():
    groups = Groups({"posterior": {"x": np.zeros((4, 2, 3))}}, {"x": ["rows"]})
    made = combined(groups, 2)
    assert made.arrays["posterior"]["x"].shape == (2, 4, 3) and made.dims == {"x": ["rows"]}
