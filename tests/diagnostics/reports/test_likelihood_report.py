"""Report of a learned likelihood: a good one passes, one of another simulator is caught."""

import functools

import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import report
from pyro_sb.infer import AmortizedLikelihood, LikelihoodPairs

pytestmark = pytest.mark.filterwarnings("ignore:.*has not converged")


def simulate(theta):
    choice = torch.bernoulli(torch.sigmoid(theta[:, 0]))
    return torch.stack([choice, theta[:, 0] + choice + torch.randn(len(theta))], 1)


@functools.cache
def fitted():
    torch.manual_seed(0)
    likelihood = AmortizedLikelihood(simulate, proposal=dist.Normal(0.0, 1.0).expand([1]).to_event(1), discrete=(0,))
    likelihood.fit(num_simulations=4000, num_updates=600, progress=False)
    return likelihood


def test_a_good_fit_passes():
    found = report(fitted())
    assert found.verdict == "ok", str(found)
    assert [line.name for line in found.lines][:3] == ["held-out log density", "ranks of data", "local C2ST"]


def test_data_of_another_simulator_are_caught():
    own, likelihood = fitted().simulations, fitted()
    try:
        y = own.y.clone()
        y[:, 1] = own.theta[:, 0] + y[:, 0] + 2 * torch.randn(len(y))
        likelihood.simulations = LikelihoodPairs(own.theta, y)
        found = report(likelihood)
    finally:
        likelihood.simulations = own
    assert found["ranks of data"].verdict == "bad" and "y[1]" in found["ranks of data"].value
    assert found["local C2ST"].verdict == "bad"


def test_what_it_refuses():
    with pytest.raises(RuntimeError, match="must be fitted"):
        report(AmortizedLikelihood(simulate))
    with pytest.raises(ValueError, match="uses no option, got num_data_sets"):
        report(fitted(), num_data_sets=50)
    small = AmortizedLikelihood()
    small.fit(simulations=(torch.randn(200, 1), torch.randn(200, 1)), num_updates=5, progress=False)
    with pytest.raises(ValueError, match="at least 100 held-out"):
        report(small)
