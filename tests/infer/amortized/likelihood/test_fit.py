"""Learned likelihoods beside the simulator's own, and hierarchies under them beside exact posteriors."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_sb.infer import MCMC, AmortizedLikelihood, KernelLangevin

NOISE = 0.5


def shifted(theta):
    return theta + NOISE * torch.randn(len(theta), 1)


@functools.cache
def linear():
    """Likelihood of y = theta + noise, learnt."""
    torch.manual_seed(0)
    likelihood = AmortizedLikelihood(shifted, proposal=dist.Uniform(-5.0, 5.0).expand([1]).to_event(1))
    likelihood.fit(num_simulations=20_000, num_updates=1500, progress=False)
    return likelihood


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("subjects", len(y), dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0).expand([1]).to_event(1))
        with pyro.plate("trials", y.shape[1], dim=-1):
            pyro.sample("y", linear()(theta), obs=y)


def subjects(num=8, trials=10):
    torch.manual_seed(3)
    theta = 0.7 + torch.randn(num, 1)
    return theta[:, None, :] + NOISE * torch.randn(num, trials, 1)


def exact(y):
    """Mean and sd of mu: subjects' means are N(mu, 1 + noise^2 / trials)."""
    num, trials, _ = y.shape
    precision = num / (1 + NOISE**2 / trials)
    return float(y.mean((1, 2)).mean()) * precision / (1 + precision), (1 + precision) ** -0.5


@pytest.mark.slow
def test_it_is_the_simulators_own_density():
    theta, noise = torch.linspace(-4.5, 4.5, 19)[:, None], torch.linspace(-1.2, 1.2, 13)[:, None]
    y = theta[:, None] + noise
    error = linear()(theta[:, None]).log_prob(y) - dist.Normal(theta, NOISE).log_prob(y[..., 0])
    assert abs(float(error.mean())) < 0.02 and float(error.abs().mean()) < 0.08 and float(error.abs().max()) < 0.4
    entropy = 0.5 * math.log(2 * math.pi * math.e * NOISE**2)
    assert linear().scores["learnt"] == pytest.approx(-entropy, abs=4 / math.sqrt(2 * 2000))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*outside the region")
def test_chains_of_a_hierarchy_have_the_exact_group_mean():
    # y_ij ~ N(theta_i, .25), theta_i ~ N(mu, 1), mu ~ N(0, 1): the posterior of mu is normal in closed form
    y = subjects()
    mcmc = MCMC(KernelLangevin(hierarchy), num_samples=100, num_chains=32, disable_progbar=True)
    mcmc.run(y)
    mean, sd = exact(y)
    mu = mcmc.get_samples()["mu"]
    assert abs(float(mu.mean()) - mean) < 0.15 * sd
    assert float(mu.std()) == pytest.approx(sd, rel=0.1)
    assert linear().outside(mcmc.get_samples()["theta"]) < 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*outside the region")
def test_svi_climbs_to_it_too():
    y = subjects()
    guide = AutoMultivariateNormal(hierarchy)
    svi = SVI(hierarchy, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.998}), Trace_ELBO(num_particles=4))
    for _ in range(800):
        svi.step(y)
    mean, sd = exact(y)
    law = guide.get_posterior()
    assert abs(law.mean[0].item() - mean) < 0.3 * sd  # mu is the model's first latent
    assert law.variance[0].sqrt().item() == pytest.approx(sd, rel=0.25)


def drift(theta):
    """A choice whose log odds are theta_0, and a time that depends on it: both known in closed form."""
    choice = torch.bernoulli(torch.sigmoid(theta[:, 0]))
    time = torch.exp(0.5 * theta[:, 1] - 0.4 * choice + 0.3 * torch.randn(len(theta)))
    return torch.stack([choice, time], 1)


@pytest.mark.slow
def test_a_choice_and_its_time_have_their_joint_density():
    likelihood = AmortizedLikelihood(drift, proposal=dist.Uniform(-2.0, 2.0).expand([2]).to_event(1), discrete=(0,))
    likelihood.fit(num_simulations=20_000, progress=False)
    assert likelihood.parts.data.logged == (0,)
    theta = torch.cartesian_prod(torch.linspace(-1.6, 1.6, 5), torch.linspace(-1.6, 1.6, 5))
    y = drift(theta.repeat(20, 1)).reshape(20, 25, 2)
    choice, time = y[..., 0], y[..., 1]
    own = dist.Bernoulli(logits=theta[:, 0]).log_prob(choice)
    own = own + dist.LogNormal(0.5 * theta[:, 1] - 0.4 * choice, 0.3).log_prob(time)
    error = likelihood(theta).log_prob(y) - own
    assert float(error.abs().mean()) < 0.1
    assert abs(float(error.mean())) < 0.03
