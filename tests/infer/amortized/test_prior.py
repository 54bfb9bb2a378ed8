"""A prior changed after training: weights are exact where the bridge is, and say so where it moves too far."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer import AmortizedPosterior
from pyro_sb.infer.amortized.prior import log_prior_ratio
from pyro_sb.infer.amortized.simulator import simulator

pytestmark = pytest.mark.filterwarnings("ignore:.*has not converged")


def prior_of(mean, width):
    def prior():
        pyro.sample("mu", dist.Normal(mean, width))
        pyro.sample("scale", dist.LogNormal(0.0, width))

    return prior


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    return {"y": mu + 0.5 * torch.randn(()) + 0 * scale}


def conjugate():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 0.5))


def narrower():
    pyro.sample("mu", dist.Normal(0.5, 0.4))


def test_the_ratio_is_that_of_the_densities():
    # in the latents' own space, whatever is simulated behind them
    sites = {"mu": torch.randn(20), "scale": torch.rand(20) + 0.1}
    wanted = dist.Normal(0.3, 0.7).log_prob(sites["mu"]) - dist.Normal(0.0, 1.0).log_prob(sites["mu"])
    wanted = wanted + dist.LogNormal(0.0, 0.7).log_prob(sites["scale"])
    wanted = wanted - dist.LogNormal(0.0, 1.0).log_prob(sites["scale"])
    torch.testing.assert_close(log_prior_ratio(simulator(model), prior_of(0.3, 0.7), sites), wanted)


@functools.cache
def fitted():
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(conjugate, bridge="light")
    amortized.fit(num_simulations=2000, progress=False)
    return amortized


def test_the_posterior_under_it_is_the_conjugate_one():
    y = torch.tensor([0.8, -0.3])
    weighted = fitted().condition(y).with_prior(narrower, 20_000)
    precision = 1 / 0.16 + 4.0
    mean = (0.5 / 0.16 + 4.0 * y) / precision
    found = weighted.expectation(weighted.sites["mu"])
    assert float((found - mean).abs().max()) < 0.1 * precision**-0.5
    spread = weighted.expectation((weighted.sites["mu"] - found) ** 2).sqrt()
    assert torch.allclose(spread, torch.full((2,), precision**-0.5), rtol=0.08)
    own = dist.Normal(0.5, (0.16 + 0.25) ** 0.5).log_prob(y) - dist.Normal(0.0, 1.25**0.5).log_prob(y)
    assert torch.allclose(weighted.log_evidence.float(), own, atol=0.06)


def test_a_prior_too_far_is_said():
    def far():
        pyro.sample("mu", dist.Normal(6.0, 0.2))

    with pytest.warns(RuntimeWarning, match="the new prior lies far"):
        fitted().condition(torch.tensor(0.0)).with_prior(far)


def test_what_it_refuses():
    posterior = fitted().condition(torch.tensor(0.0))
    with pytest.raises(TypeError, match="prior must be a Pyro model"):
        posterior.with_prior(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"must have the latents of the model, \['mu'\], got \['mu', 'scale'\]"):
        posterior.with_prior(prior_of(0.0, 1.0))
    with pytest.raises(ValueError, match="of the model's shapes"):
        posterior.with_prior(lambda: pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1)))
    with pytest.raises(ValueError, match="num_samples must be at least 25"):
        posterior.with_prior(narrower, 5)
