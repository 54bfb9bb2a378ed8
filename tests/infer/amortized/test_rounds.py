"""Rounds: proposals follow the truncated prior, and the posterior comes near the exact one with few simulations."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer import AmortizedPosterior
from pyro_sb.infer.amortized.prior import log_prior
from pyro_sb.infer.amortized.rounds import Region, proposals
from pyro_sb.infer.amortized.simulator import simulator

NOISE, WIDTH = 0.05, 3.0
Y = torch.tensor([1.3, -0.7])
pytestmark = pytest.mark.filterwarnings("ignore:.*has not converged")
CALLS = {"num": 0}


def black_box():
    theta = pyro.sample("theta", dist.Normal(0.0, WIDTH).expand([2]).to_event(1))
    CALLS["num"] += 1
    return {"y": theta + NOISE * torch.randn(2)}


def bent():
    """Data that a parabola bends, so that no regression is affine."""
    theta = pyro.sample("theta", dist.Normal(0.0, WIDTH).expand([2]).to_event(1))
    CALLS["num"] += 1
    first = theta[0] + theta[1] ** 2 / 3
    return {"y": torch.stack([first, theta[1]]) + NOISE * torch.randn(2)}


def uniform():
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(theta, 0.2).to_event(1))


@functools.cache
def fitted(model=black_box, bridge="light"):
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(model, bridge=bridge)
    amortized.fit(num_simulations=400, num_copies=0, progress=False)
    return amortized


def test_the_prior_alone_has_its_density_and_runs_no_simulator():
    source = simulator(black_box)
    joint, before = log_prior(source), CALLS["num"]
    z = torch.randn(50, 2)
    torch.testing.assert_close(joint.log_prob(z), dist.Normal(0.0, WIDTH).log_prob(z).sum(1), rtol=1e-5, atol=1e-5)
    assert CALLS["num"] == before


def test_simulations_at_given_latents():
    source = simulator(uniform)
    z = torch.randn(4000, 2)
    pairs = source.simulate_at(z)
    assert torch.allclose(pairs.latents, z, atol=1e-5)
    white = (pairs.observations - (2 * torch.sigmoid(z) - 1)) / 0.2
    assert abs(float(white.mean())) < 4 / 8000**0.5 and abs(float(white.var()) - 1) < 4 * (2 / 8000) ** 0.5


def test_proposals_follow_the_prior_within_the_region():
    # a uniform prior truncated is uniform: within a box inside the region the proposals are uniform along each axis
    posterior = fitted(uniform).condition(torch.tensor([0.1, -0.2]))
    region = Region.of(posterior.law, 0.999)
    u, share, effective = proposals([region], log_prior(posterior.simulator), 4000)
    assert bool(region.holds(u).all()) and effective > 2000
    theta = 2 * torch.sigmoid(u) - 1
    box = ((theta - torch.tensor([0.1, -0.2])).abs() < 0.25).all(1)
    assert bool(region.holds(torch.logit((torch.tensor([[0.35, 0.05], [-0.15, -0.45]]) + 1) / 2)).all())
    inside = (theta[box] - torch.tensor([0.1, -0.2])) / 0.25
    z = inside.mean(0) / (1 / 3 / len(inside)) ** 0.5
    spread = (inside.square().mean(0) - 1 / 3) / (4 / 45 / len(inside)) ** 0.5
    assert float(z.abs().max()) < 4 and float(spread.abs().max()) < 4
    area = 4 * share  # of the region, by what its share of the prior is
    assert float(box.double().mean()) == pytest.approx(0.25 / area, rel=0.1)


@pytest.mark.slow
def test_a_narrow_posterior_is_found_by_rounds():
    # theta_1 = y_1 and theta_0 = y_0 - theta_1^2 / 3 but for the noise; the prior is 60 times as wide
    amortized, before = fitted(bent), CALLS["num"]
    mean = torch.stack([Y[0] - (Y[1] ** 2 + NOISE**2) / 3, Y[1]])
    sd = NOISE * torch.tensor([float(1 + (2 * Y[1] / 3) ** 2) ** 0.5, 1.0])
    kept = {name: value.clone() for name, value in amortized.bridge.state_dict().items() if torch.is_tensor(value)}
    posterior = amortized.sharpen(Y, num_rounds=4, num_simulations=400, progress=False)
    draws, coarse = (x.sample(4000)["theta"] for x in (posterior, amortized.condition(Y)))
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.5
    assert float((draws.std(0) / sd).log().abs().max()) < 0.3
    assert float((coarse.std(0) / sd).log().abs().max()) > 1
    rounds = posterior.rounds
    assert 1 < len(rounds) <= 4 and rounds[-1].prior_share < 0.1 * rounds[0].prior_share
    assert CALLS["num"] - before < 400 * len(rounds) + 200  # runs of the simulator, and a few that read the model
    assert all(torch.equal(amortized.bridge.state_dict()[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_a_set_of_observations_shares_its_rounds():
    amortized = fitted()
    y = torch.stack([Y, -Y])
    posterior = amortized.sharpen(y, num_rounds=3, num_simulations=600, progress=False)
    draws = posterior.sample(4000)["theta"]
    assert draws.shape == (4000, 2, 2)
    assert float(((draws.mean(0) - y) / NOISE).abs().max()) < 0.5


def test_data_that_tell_nothing_end_the_rounds():
    def nothing():
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.warns(RuntimeWarning, match=r"holds \d+% of the prior: the data tell little"):
        posterior = fitted(nothing).sharpen(torch.tensor(0.3), num_simulations=50, progress=False)
    assert posterior.rounds == ()


WRONG = {
    "not fitted": (lambda: AmortizedPosterior(black_box).sharpen(Y), RuntimeError, "needs a fitted posterior"),
    "mass": (lambda: fitted().sharpen(Y, mass=1.0), ValueError, "mass must"),
    "rounds": (lambda: fitted().sharpen(Y, num_rounds=0), ValueError, "num_rounds must"),
    "few": (lambda: fitted().sharpen(Y, num_simulations=5), ValueError, "num_simulations must be at least 20"),
    "shape": (lambda: fitted().sharpen(torch.zeros(3)), ValueError, "trained on"),
    "paths": (lambda: fitted(uniform, "vsdm").sharpen(torch.zeros(2)), NotImplementedError, "density of a point"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong):
    call, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call()
