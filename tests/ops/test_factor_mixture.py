"""Mixtures by factors of their precisions: torch's own mixture, a unit integral, moments of the draws."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_sb.ops.factor_mixture import FactorMixture

F64 = {"dtype": torch.float64}


def random_mixture(rows, components, dim):
    return FactorMixture(
        log_weights=3 + torch.randn(rows, components, **F64),
        locs=2 * torch.randn(rows, components, dim, **F64),
        log_diagonals=0.4 * torch.randn(rows, components, dim, **F64),
        lower=0.5 * torch.randn(rows, components, dim, dim, **F64).tril(-1),
    )


def precisions(mixture):
    factors = mixture.log_diagonals.exp()[..., None] * (mixture.lower + torch.eye(mixture.lower.shape[-1], **F64))
    return factors.mT @ factors


def torchs(mixture):
    components = MultivariateNormal(mixture.locs, precision_matrix=precisions(mixture))
    return MixtureSameFamily(Categorical(logits=mixture.log_weights), components)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_the_density_is_torchs(dim):
    mixture = random_mixture(50, 4, dim)
    x = 3 * torch.randn(50, dim, **F64)
    torch.testing.assert_close(mixture.log_prob(x), torchs(mixture).log_prob(x), rtol=1e-10, atol=1e-10)


def test_the_density_has_the_integral_one_whatever_the_weights_sum_to():
    mixture = random_mixture(1, 3, 2)
    axis = torch.linspace(-25, 25, 601, **F64)
    grid = torch.cartesian_prod(axis, axis)
    many = FactorMixture(*(part.expand(len(grid), *part.shape[1:]) for part in mixture))
    assert float(many.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-9)


def test_covariances_invert_the_precisions():
    mixture = random_mixture(6, 3, 4)
    product = mixture.covariances() @ precisions(mixture)
    torch.testing.assert_close(product, torch.eye(4, **F64).expand_as(product), rtol=1e-9, atol=1e-9)


def test_the_draws_have_the_mixtures_moments():
    num, one = 40_000, random_mixture(1, 3, 2)
    mixture, law = FactorMixture(*(part.expand(num, *part.shape[1:]) for part in one)), torchs(one)
    x = mixture.sample()
    weights = torch.softmax(one.log_weights[0], 0)
    second = weights @ (one.covariances()[0] + one.locs[0][..., None] * one.locs[0][:, None, :]).flatten(1)
    z_mean = (x.mean(0) - law.mean[0]) / x.std(0) * math.sqrt(num)
    products = (x[:, :, None] * x[:, None, :]).flatten(1)
    z_second = (products.mean(0) - second) / products.std(0) * math.sqrt(num)
    assert z_mean.abs().max() < 4 and z_second.abs().max() < 4
