"""HMC on rows: energy bookkeeping, stationarity at any metric and step, and rejuvenation as a joint law."""

import math

import pytest
import torch

from pyro_sb.infer.amortized.paired import paired_joint
from pyro_sb.infer.amortized.simulator import simulator
from pyro_sb.infer.moves.hamiltonian import hmc_step, rejuvenate, start_rows
from tests.infer.open_models import bounded_and_positive, iid


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def normal(x):
    return -0.5 * torch.einsum("ni,ij,nj->n", x, PRECISION, x), -x @ PRECISION


def z_scores(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_rows_that_start_exact_stay_exact(spread, per_row):
    num, covariance = 20_000, torch.linalg.inv(PRECISION)
    x = torch.randn(num, 2) @ torch.linalg.cholesky(covariance).T
    scale = torch.tensor([[0.5, 0.0], [0.3, 2.0]])  # not the target's
    step = torch.full((num, 1), 0.9) if per_row else 0.9
    rows = start_rows(normal, x)
    for _ in range(4):
        rows, probability = hmc_step(
            normal, rows, scale.expand(num, 2, 2) if per_row else scale, step, num_steps=3, spread=spread
        )
    assert 0.2 < float(probability.mean()) < 0.99  # the accept step matters
    products = (rows.x[:, :, None] * rows.x[:, None, :]).flatten(1)
    assert z_scores(rows.x, torch.zeros(2)).abs().max() < 4
    assert z_scores(products, covariance.flatten()).abs().max() < 4
    value, grad = normal(rows.x)
    torch.testing.assert_close(rows.log_density, value)
    torch.testing.assert_close(rows.grad, grad)


def test_a_row_outside_the_support_never_moves_there():
    def half(x):
        inside = x[:, 0] > 0
        return torch.where(inside, -x[:, 0], -torch.inf), torch.where(inside, -1.0, 0.0)[:, None]

    rows = start_rows(half, torch.rand(500, 1))
    for _ in range(20):
        rows, _ = hmc_step(half, rows, torch.eye(1), 1.5)
    assert bool((rows.x > 0).all()) and bool(torch.isfinite(rows.log_density).all())


def test_rejuvenated_copies_are_draws_of_the_joint_law():
    # mu ~ N(0, 1), five y ~ N(mu, .5^2): given y, mu ~ N(20 / 21 mean, 1 / 21)
    source = simulator(iid)
    pairs = source.simulate(8000)
    copies = rejuvenate(paired_joint(source, pairs), pairs, torch.full((1, 1), 0.2), 3)
    assert copies.shape == (4, 8000, 1) and torch.equal(copies[0], pairs.latents)
    mean = pairs.observations.mean(1)
    for k, copy in enumerate(copies[..., 0]):
        moments = torch.stack([copy, copy.square(), copy * mean, copy.square() * mean.square()], 1)
        variance = 1 + 0.25 / 5  # of the mean of y
        expected = torch.tensor([0.0, 1.0, 1.0, variance + 2.0])  # the last: Isserlis, E mu^2 ybar^2
        assert z_scores(moments, expected).abs().max() < 4, k
        error = copy - 20 / 21 * mean
        given = torch.stack([error, error.square() - 1 / 21, error * mean], 1)
        assert z_scores(given, torch.zeros(3)).abs().max() < 4, k
    error = copies[..., 0] - 20 / 21 * mean
    correlations = torch.corrcoef(error)[0]
    assert correlations[0] == 1 and correlations[1:].abs().max() < 0.1  # 12 sweeps forget the simulated latent


def test_rejuvenation_keeps_a_bounded_and_a_positive_latent_exact():
    source = simulator(bounded_and_positive)
    pairs = source.simulate(4000)
    copies = rejuvenate(paired_joint(source, pairs), pairs, torch.eye(2), 2)
    fresh = source.simulate(4000).latents
    for copy in copies[1:]:
        both = torch.cat([copy, copy.square()], 1), torch.cat([fresh, fresh.square()], 1)
        z = (both[0].mean(0) - both[1].mean(0)) / ((both[0].var(0) + both[1].var(0)) / 4000).sqrt()
        assert z.abs().max() < 4
        assert (copy != pairs.latents).float().mean() > 0.9
