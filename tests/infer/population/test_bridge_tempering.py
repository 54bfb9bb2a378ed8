"""Tempering from a law to a joint: weights of modes and evidence, a batch at once, from a law that is wrong."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.infer.population.tempering import NormalLaw, next_increment, systematic, temper_bridge, weighted_factor


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


class Modes:
    """Two normal modes a column, ``share`` of the mass in the first; the evidence is ``exp(log_z)``."""

    def __init__(self, centres, shares, spread, log_z):
        self.centres, self.shares, self.spread, self.log_z = centres, shares, spread, log_z

    def log_prob(self, x):
        batch, dim = self.centres.shape
        points = x.reshape(-1, batch, dim)
        first, second = (-0.5 * ((points - sign * self.centres) / self.spread).square().sum(-1) for sign in (1, -1))
        constant = -dim * math.log(self.spread * math.sqrt(2 * math.pi))
        value = torch.logaddexp(self.shares.log() + first, (1 - self.shares).log() + second)
        return (value + constant + self.log_z).reshape(-1)

    def value_and_grad(self, x):
        x = x.detach().requires_grad_()
        value = self.log_prob(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad


def test_a_normal_law_is_torchs():
    factor = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[0.3, 0.0], [0.0, 0.1]]])
    law = NormalLaw(torch.randn(2, 2), factor)
    exact = MultivariateNormal(law.mean, scale_tril=factor)
    u, log_q = law.draws(20_000)
    torch.testing.assert_close(log_q, exact.log_prob(u), rtol=1e-10, atol=1e-10)
    z = (u.mean(0) - law.mean) / exact.stddev * 20_000**0.5
    assert z.abs().max() < 4
    point = u[:5].clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact.log_prob(point).sum(), point)
    torch.testing.assert_close(law.value_and_grad(u[:5])[1], slope, rtol=1e-9, atol=1e-9)


def test_the_right_law_is_done_in_one_level():
    law = NormalLaw(torch.zeros(1, 2), torch.eye(2)[None])

    class Same:
        def value_and_grad(self, x):
            value, grad = law.value_and_grad(x[:, None])
            return value[:, 0] + 2.5, grad[:, 0]

    particles = temper_bridge(law, Same(), 200)
    assert particles.num_levels == 1
    assert float(particles.log_evidence[0]) == pytest.approx(2.5, abs=1e-9)


@pytest.mark.slow
def test_modes_and_evidence_from_a_law_that_is_wrong():
    # the law is off, too wide for one column and too narrow for the other
    centres, shares = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([0.3, 0.8])
    target = Modes(centres, shares, 0.4, torch.tensor([1.5, -4.0]))
    law = NormalLaw(torch.full((2, 2), 0.5), torch.stack([3.0 * torch.eye(2), 0.9 * torch.eye(2)]))
    runs = [temper_bridge(law, target, 1000) for _ in range(12)]
    first = torch.stack([((run.points * centres).sum(-1) > 0).double().mean(0) for run in runs])
    evidence = torch.stack([run.log_evidence for run in runs])
    assert max(run.num_levels for run in runs) < 12
    for found, expected, most in ((first, shares, 0.06), (evidence, target.log_z, 0.2)):
        assert (found.std(0) < most).all()
        assert ((found.mean(0) - expected) / found.std(0) * 12**0.5).abs().max() < 4
    inside = torch.cat([run.points for run in runs])
    distance = (inside - torch.where((inside * centres).sum(-1, keepdim=True) > 0, centres, -centres)) / 0.4
    assert distance.square().mean() == pytest.approx(1, abs=0.1)


def test_the_columns_are_independent():
    # each observation has its own exponents: an easy column is done at once, and is right beside a hard one
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0]])
    target = Modes(centres, torch.tensor([0.5, 0.5]), 1.0, torch.tensor([0.7, -0.2]))
    particles = temper_bridge(NormalLaw(torch.zeros(2, 2), torch.eye(2).repeat(2, 1, 1)), target, 2000)
    assert particles.num_levels > 1
    assert float(particles.log_evidence[0]) == pytest.approx(0.7, abs=1e-9)
    assert particles.points[:, 0].square().mean() == pytest.approx(1, abs=0.15)
    assert particles.acceptance.shape == (2,)


def test_half_of_the_effective_particles_stay():
    ratio = 8 * torch.randn(500, 3)
    ratio[:, 2] = 0.1 * torch.randn(500)
    step = next_increment(ratio, torch.ones(3))
    ess = 1 / torch.softmax(step * ratio, 0).square().sum(0) / 500
    torch.testing.assert_close(ess[:2], torch.full((2,), 0.5), atol=1e-3, rtol=0)
    assert step[2] == 1 and ess[2] > 0.9
    assert next_increment(ratio, torch.tensor([1e-4, 0.0, 0.0])).tolist() == [1e-4, 0, 0]


def test_systematic_counts_differ_from_their_means_by_less_than_one():
    weights = torch.softmax(2 * torch.randn(50, 4), 0)
    index = systematic(weights)
    for b in range(4):
        counts = torch.bincount(index[:, b], minlength=50)
        assert (counts - 50 * weights[:, b]).abs().max() < 1 + 1e-9


def test_the_weighted_factor_is_that_of_the_weighted_covariance():
    u, weights = torch.randn(400, 2, 3) @ torch.randn(3, 3), torch.softmax(torch.randn(400, 2), 0)
    factor = weighted_factor(u, weights)
    for b in range(2):
        expected = u[:, b].T.cov(aweights=weights[:, b], correction=0)
        torch.testing.assert_close(factor[b] @ factor[b].T, expected, rtol=1e-3, atol=1e-3)


def test_a_law_beside_the_support_says_so():
    class Nowhere:
        def value_and_grad(self, x):
            return torch.full_like(x[:, 0], -torch.inf), torch.zeros_like(x)

    with pytest.raises(RuntimeError, match=r"no particle .* finite.*at 2 of 2 observations"):
        temper_bridge(NormalLaw(torch.zeros(2, 1), torch.ones(2, 1, 1)), Nowhere(), 50)


def test_particles_outside_the_support_are_dropped():
    class Half:  # exponential on the positive half: evidence 1
        def value_and_grad(self, x):
            inside = x[:, 0] > 0
            return torch.where(inside, -x[:, 0], -torch.inf), torch.where(inside, -1.0, 0.0)[:, None]

    runs = [temper_bridge(NormalLaw(torch.zeros(1, 1), torch.ones(1, 1, 1)), Half(), 2000) for _ in range(6)]
    assert all(bool((run.points > 0).all()) for run in runs)
    evidence = torch.stack([run.log_evidence[0] for run in runs])
    assert abs(float(evidence.mean())) < 0.1
    assert torch.cat([run.points for run in runs]).mean() == pytest.approx(1, abs=0.1)
