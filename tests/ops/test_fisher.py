"""The Fisher fit: exact on Gaussians whatever the draws, equivariant, positive definite, a solution of its equation."""

import math

import pytest
import torch

from pyro_sb.ops.sampling.fisher import fisher_diagonal, fisher_fit

F64 = {"dtype": torch.float64}


def gaussian(dim, condition=1e3, seed=0):
    """Mean and covariance with rotated axes and widely different units."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=g, **F64)).Q
    values = torch.logspace(0, math.log10(condition), dim, **F64) / math.sqrt(condition)
    units = torch.logspace(-2, 2, dim, **F64)[torch.randperm(dim, generator=g)]
    covariance = units[:, None] * (axes * values @ axes.T) * units
    return units * torch.randn(dim, generator=g, **F64), 0.5 * (covariance + covariance.T)


def elsewhere(num, dim, mean, covariance):
    """Draws far from the target and of another shape, and the target's gradients there."""
    x = mean + 7 * covariance.diagonal().sqrt() * (1 + torch.randn(num, dim, **F64).exp())
    return x, -torch.linalg.solve(covariance, (x - mean).T).T


def relative(found, truth):
    """Error in the truth's own units: eigenvalues of L^-1 found L^-T about 1."""
    root = torch.linalg.cholesky(truth)
    white = torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, found, upper=False).T, upper=False)
    return float((torch.linalg.eigvalsh(0.5 * (white + white.T)) - 1).abs().max())


@pytest.mark.parametrize(("dim", "num"), [(1, 2), (5, 6), (20, 25), (100, 101), (100, 400)])
def test_it_is_exact_on_a_gaussian_whatever_the_draws(dim, num):
    mean, covariance = gaussian(dim)
    fit = fisher_fit(*elsewhere(num, dim, mean, covariance))
    assert relative(fit.covariance, covariance) < 1e-8
    torch.testing.assert_close(
        fit.mean / covariance.diagonal().sqrt(), mean / covariance.diagonal().sqrt(), rtol=0, atol=1e-6
    )
    assert torch.equal(fit.scale_tril, fit.scale_tril.tril())
    assert (fit.scale_tril.diagonal() > 0).all()


def test_the_covariance_of_the_same_draws_is_not():
    mean, covariance = gaussian(20)
    x, _ = elsewhere(25, 20, mean, covariance)
    assert relative(torch.cov(x.T), covariance) > 10


def test_it_solves_its_equation_on_any_sample():
    # S G S = X, with X, G the sample's covariances: the optimality condition of the Fisher divergence
    x = torch.randn(200, 6, **F64).exp()
    g = torch.randn(200, 6, **F64) - 0.3 * x.roll(1, -1)
    weights = torch.rand(200, **F64)
    fit = fisher_fit(x, g, weights)
    X, G = (torch.cov(part.T, aweights=weights, correction=0) for part in (x, g))
    torch.testing.assert_close(fit.covariance @ G @ fit.covariance, X, rtol=1e-10, atol=1e-10)
    expected = (weights @ x + fit.covariance @ (weights @ g) / 1) / weights.sum()
    torch.testing.assert_close(fit.mean, expected, rtol=1e-10, atol=1e-10)


def test_it_minimises_the_fisher_divergence_to_the_normal():
    # E |L' g + L^-1 (x - m)|^2 over L L' and m: any small change of either raises it
    x = torch.randn(300, 4, **F64).exp()
    g = -x + torch.randn(300, 4, **F64) * 0.4
    fit = fisher_fit(x, g)

    def divergence(mean, tril):
        return float(
            (g @ tril + torch.linalg.solve_triangular(tril, (x - mean).T, upper=False).T).square().sum(1).mean()
        )

    least = divergence(*fit)
    for _ in range(20):
        change = 1e-2 * torch.randn(4, 4, **F64).tril()
        assert divergence(fit.mean, fit.scale_tril + change) > least
        assert divergence(fit.mean + 1e-2 * torch.randn(4, **F64), fit.scale_tril) > least


def test_units_carry_over():
    x, g = torch.randn(60, 5, **F64).exp(), torch.randn(60, 5, **F64)
    units = torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e7], **F64)
    fit, scaled = fisher_fit(x, g), fisher_fit(x * units, g / units)
    torch.testing.assert_close(scaled.covariance / units / units[:, None], fit.covariance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scaled.mean / units, fit.mean, rtol=1e-10, atol=1e-12)
    few = fisher_fit(x[:4], g[:4])  # with a ridge, too
    scaled = fisher_fit(x[:4] * units, g[:4] / units)
    torch.testing.assert_close(scaled.covariance / units / units[:, None], few.covariance, rtol=1e-6, atol=1e-9)


def test_weights_are_repetitions_and_responsibilities_are_modes():
    x, g = torch.randn(30, 3, **F64), torch.randn(30, 3, **F64)
    count = torch.randint(0, 4, (30,))
    counted, repeated = (
        fisher_fit(x, g, count.double()),
        fisher_fit(x.repeat_interleave(count, 0), g.repeat_interleave(count, 0)),
    )
    torch.testing.assert_close(counted.covariance, repeated.covariance, rtol=1e-10, atol=1e-10)
    shares = torch.softmax(torch.randn(30, 2, **F64), -1)
    both = fisher_fit(x, g, shares)
    assert both.mean.shape == (2, 3) and both.scale_tril.shape == both.covariance.shape == (2, 3, 3)
    for k in range(2):
        torch.testing.assert_close(both.covariance[k], fisher_fit(x, g, shares[:, k]).covariance)
    diagonal = fisher_diagonal(x, g, shares)
    assert diagonal.mean.shape == diagonal.variance.shape == (2, 3)
    torch.testing.assert_close(diagonal.variance[1], fisher_diagonal(x, g, shares[:, 1]).variance)


@pytest.mark.parametrize("case", ["one", "few", "repeated", "still", "flat"])
def test_it_is_positive_definite_whatever_comes(case):
    x, g = torch.randn(50, 8, **F64), torch.randn(50, 8, **F64)
    if case == "one":
        x, g = x[:1], g[:1]
    elif case == "few":
        x, g = x[:5], g[:5]
    elif case == "repeated":
        x, g = x[:3].repeat(20, 1), g[:3].repeat(20, 1)
    elif case == "still":
        x[:, 2] = 1.5
    else:
        g[:, 2] = 0.0
    fit = fisher_fit(x, g)
    assert torch.isfinite(fit.mean).all() and torch.isfinite(fit.scale_tril).all()
    assert (fit.scale_tril.diagonal() > 0).all()
    assert float(torch.linalg.eigvalsh(fit.covariance).min()) > 0
    diagonal = fisher_diagonal(x, g)
    assert torch.isfinite(diagonal.mean).all() and (diagonal.variance > 0).all()


def test_rows_that_are_not_finite_do_not_count():
    x, g = torch.randn(20, 3, **F64), torch.randn(20, 3, **F64)
    bad_x, bad_g = (
        torch.cat([x, torch.full((2, 3), math.inf, **F64)]),
        torch.cat([g, torch.full((2, 3), math.nan, **F64)]),
    )
    torch.testing.assert_close(fisher_fit(bad_x, bad_g).covariance, fisher_fit(x, g).covariance)
    with pytest.raises(ValueError, match="finite draw of positive weight"):
        fisher_fit(x, g, torch.zeros(20, **F64))
    with pytest.raises(ValueError, match="one shape"):
        fisher_fit(x, g[:-1])


@pytest.mark.parametrize("num", [2, 5])
def test_the_diagonal_form_is_exact_for_independent_gaussians(num):
    variance = torch.logspace(-4, 4, 50, **F64)
    x = 3 + torch.randn(num, 50, **F64).exp() * variance.sqrt()
    fit = fisher_diagonal(x, -(x - 1) / variance)
    torch.testing.assert_close(fit.variance, variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(fit.mean, torch.ones(50, **F64), rtol=0, atol=1e-6)


def test_single_precision_comes_back_in_double():
    x = torch.randn(50, 3)
    assert fisher_fit(x, -x).scale_tril.dtype == torch.float64
    torch.testing.assert_close(fisher_fit(x, -x).covariance, torch.eye(3, **F64), rtol=0, atol=1e-5)
