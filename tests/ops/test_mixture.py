"""The mixture potential: autograd, the heat equation, quadrature and the Gaussian bridge; no formula again."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import jacrev, vmap

from pyro_sb.ops.closed_form import gaussian_bridge
from pyro_sb.ops.mixture import MixturePotential
from tests.ops.potentials import F64, one_of, random_potential

FORMS = [(1, False), (2, False), (7, False), (1, True), (2, True), (5, True)]
forms = pytest.mark.parametrize("dim, full", FORMS, ids=[f"{d}-{'full' if f else 'diagonal'}" for d, f in FORMS])
in_the_plane = pytest.mark.parametrize("dim, full", [(1, False), (2, False), (2, True)], ids=["1", "2", "2-full"])
times = pytest.mark.parametrize("t", [0.0, 0.37, 1.0])


def spd(dim, seed):
    factor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), **F64)
    return factor @ factor.T / dim + 0.1 * torch.eye(dim, **F64)


def matrices(potential):
    return torch.diag_embed(potential.scales) if potential.diagonal else potential.scales


def hermite(dim, num=80):
    """Nodes ``(n, dim)`` and weights of E f(Z), Z standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    weights = weights if dim == 1 else torch.cartesian_prod(*[weights] * dim).prod(-1)
    return torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim), weights


def grid(dim, half=14.0):
    """Points and the volume of a cell: the trapezoidal rule, exact to rounding for what decays within."""
    axis = torch.linspace(-half, half, 801 if dim == 1 else 281, **F64)
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim), float(axis[1] - axis[0]) ** dim


@forms
@times
def test_drift_and_jacobian_are_derivatives_of_log_h(dim, full, t):
    potential, y = random_potential(dim, full=full), 2 * torch.randn(6, dim, **F64)
    log_h = potential.at(t)
    scalar = lambda point: potential.epsilon * log_h.value(point[None])[0]  # noqa: E731
    torch.testing.assert_close(potential.drift(t, y), vmap(jacrev(scalar))(y), rtol=1e-10, atol=1e-10)
    jacobian = potential.epsilon * log_h.gradient_and_hessian(y)[1]
    torch.testing.assert_close(jacobian, vmap(jacrev(jacrev(scalar)))(y), rtol=1e-10, atol=1e-10)
    slope = vmap(jacrev(lambda point: potential.drift(t, point[None])[0]))(y)
    torch.testing.assert_close(jacobian, slope, rtol=1e-10, atol=1e-10)


@forms
@times
def test_log_h_solves_the_backward_heat_equation(dim, full, t):
    # d/dt log h + eps/2 (laplacian log h + |grad log h|^2) = 0
    potential, y = random_potential(dim, full=full), torch.randn(6, dim, **F64)
    now = torch.tensor(t, **F64)
    change = jacrev(lambda s: potential.at(s).value(y))(now)
    gradient, curvature = potential.at(now).gradient_and_hessian(y)
    spread = curvature.diagonal(dim1=-2, dim2=-1).sum(-1) + gradient.square().sum(-1)
    torch.testing.assert_close(change, -potential.epsilon / 2 * spread, rtol=1e-11, atol=1e-10)


@in_the_plane
@pytest.mark.parametrize("early, late", [(0.3, 0.8), (0.0, 0.5), (0.6, 1.0)])
def test_log_h_is_a_semigroup(dim, full, early, late):
    potential, y = random_potential(dim, full=full, low=0.6, high=1.4), torch.randn(5, dim, **F64)
    nodes, weights = hermite(dim)
    moved = y[:, None] + math.sqrt((late - early) * potential.epsilon) * nodes
    h = potential.at(late).value(moved.reshape(-1, dim)).exp().reshape(len(y), -1)
    torch.testing.assert_close(h @ weights, potential.at(early).value(y).exp(), rtol=1e-10, atol=1e-10)


@in_the_plane
def test_the_plan_is_normalised_and_has_its_moments(dim, full):
    potential, y0 = random_potential(dim, full=full), torch.randn(4, dim, **F64)
    points, cell = grid(dim)
    density = torch.stack([potential.plan_log_prob(points, x.expand_as(points)).exp() for x in y0])
    mass = cell * density
    torch.testing.assert_close(mass.sum(1), torch.ones(4, **F64), rtol=1e-12, atol=1e-12)
    mean, covariance = potential.plan_moments(y0)
    torch.testing.assert_close(mean, mass @ points, rtol=1e-11, atol=1e-11)
    outer = torch.einsum("nm,mi,mj->nij", mass, points, points)
    torch.testing.assert_close(covariance, outer - mean[:, :, None] * mean[:, None, :], rtol=1e-10, atol=1e-10)


@forms
def test_the_first_drift_leads_to_the_mean_of_the_end(dim, full):
    potential, y = random_potential(dim, full=full), torch.randn(6, dim, **F64)
    torch.testing.assert_close(potential.drift(0.0, y), potential.plan_moments(y)[0] - y, rtol=1e-12, atol=1e-12)


@forms
def test_both_ends_of_log_h_are_the_normaliser_and_the_adjusted_potential(dim, full):
    potential, y = random_potential(dim, full=full), torch.randn(6, dim, **F64)
    bowl = y.square().sum(-1) / (2 * potential.epsilon)
    torch.testing.assert_close(potential.normaliser().value(y), potential.at(0.0).value(y) + bowl, rtol=1e-12, atol=0)
    gap = potential.at(1.0).value(y) - bowl - potential.adjusted().value(y)  # one constant, the same everywhere
    torch.testing.assert_close(gap, gap[:1].expand(6), rtol=1e-12, atol=1e-12)


@forms
def test_the_adjusted_potential_is_torchs_mixture(dim, full):
    potential, y = random_potential(dim, full=full), 2 * torch.randn(6, dim, **F64)
    law = MixtureSameFamily(
        Categorical(logits=potential.log_weights),
        MultivariateNormal(potential.locs, potential.epsilon * matrices(potential)),
    )
    expected = law.log_prob(y) + torch.logsumexp(potential.log_weights, 0)
    torch.testing.assert_close(potential.adjusted().value(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("epsilon", [0.1, 2.0])
def test_one_component_is_the_gaussian_bridge(dim, epsilon):
    mean0, mean1 = torch.randn(2, dim, **F64)
    bridge = gaussian_bridge(mean0, spd(dim, 0), mean1, spd(dim, 1), epsilon)
    loc = mean1 - bridge.gain @ mean0
    potential = MixturePotential(torch.tensor([0.4], **F64), loc[None], bridge.gain[None], epsilon)
    y = torch.randn(6, dim, **F64)
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(potential.drift(t, y), bridge.drift(t, y), rtol=1e-11, atol=1e-11)
        slope = epsilon * potential.at(t).gradient_and_hessian(y)[1]
        torch.testing.assert_close(slope, bridge.drift_matrix(t).expand(6, dim, dim), rtol=1e-11, atol=1e-11)
    mean, covariance = bridge.conditional(y)
    found = potential.plan_moments(y)
    torch.testing.assert_close(found[0], mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], covariance.expand(6, dim, dim), rtol=1e-11, atol=1e-11)
    expected = MultivariateNormal(mean, covariance).log_prob(y.flip(0))
    torch.testing.assert_close(potential.plan_log_prob(y.flip(0), y), expected, rtol=1e-10, atol=1e-10)


def test_brownian_motion_has_no_drift():
    potential = MixturePotential(torch.zeros(1, **F64), torch.zeros(1, 2, **F64), torch.ones(1, 2, **F64), 0.3)
    for t in (0.0, 0.5, 1.0):
        assert potential.drift(t, torch.randn(5, 2, **F64)).abs().max() == 0


@pytest.mark.parametrize("dim", [1, 4])
@times
def test_full_matrices_that_are_diagonal_change_nothing(dim, t):
    thin, y = random_potential(dim), torch.randn(6, dim, **F64)
    thick = thin._replace(scales=torch.diag_embed(thin.scales))
    assert thin.diagonal and not thick.diagonal
    for function in ("normaliser", "adjusted"):
        found, expected = (getattr(p, function)().second_order(y) for p in (thick, thin))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(thick.drift(t, y), thin.drift(t, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_a_batch_of_potentials_is_its_members_one_by_one(full):
    batch, y0, y1 = random_potential(2, full=full, batch=(3,)), torch.randn(3, 5, 2, **F64), torch.randn(3, 5, 2, **F64)
    t = torch.tensor([0.0, 0.4, 1.0], **F64)
    for i in range(3):
        one = one_of(batch, i)
        pairs = [
            (batch.drift(t, y0), one.drift(t[i], y0[i])),
            (batch.at(t).value(y0), one.at(t[i]).value(y0[i])),
            (batch.drift(0.4, y0), one.drift(0.4, y0[i])),
            (batch.plan_log_prob(y1, y0), one.plan_log_prob(y1[i], y0[i])),
            *zip(batch.plan_moments(y0), one.plan_moments(y0[i])),
        ]
        for together, alone in pairs:
            torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_draws_of_the_plan_have_its_moments(full):
    num, batch = 20_000, random_potential(2, full=full, batch=(3,), seed=1)
    y0 = torch.randn(3, 1, 2, **F64)
    draws = batch.plan_sample(y0.expand(3, num, 2))
    mean, covariance = (part[:, 0] for part in batch.plan_moments(y0))
    centred = draws - mean[:, None]
    for values, expected in ((centred, 0.0), (centred[..., :, None] * centred[..., None, :], covariance)):
        z = (values.mean(1) - expected) / values.std(1) * math.sqrt(num)
        assert z.abs().max() < 4


def test_draws_of_the_plan_have_its_distribution_function():
    # Kolmogorov-Smirnov against the density summed on a grid: the gates and the components' widths both enter
    num, potential, y0 = 20_000, random_potential(1, low=0.05, high=0.4), torch.tensor([0.7], **F64)
    points, cell = grid(1)
    cdf = (cell * potential.plan_log_prob(points, y0.expand_as(points)).exp()).cumsum(0)
    draws = potential.plan_sample(y0.expand(num, 1))[:, 0].sort().values
    at = torch.tensor(np.interp(draws.numpy(), points[:, 0].numpy() + cell / 2, cdf.numpy()))
    ranks = (torch.arange(num, **F64) + 0.5) / num
    assert (at - ranks).abs().max() * math.sqrt(num) < 1.95  # p = .001


def test_the_units_of_space_are_free():
    # y -> 3 y with epsilon -> 9 epsilon: r -> 3 r, S as it was; drift -> 3 drift, log density less d log 3
    one = random_potential(2, full=True)
    three = MixturePotential(one.log_weights, 3 * one.locs, one.scales, 9 * one.epsilon)
    y0, y1 = torch.randn(2, 6, 2, **F64)
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(three.drift(t, 3 * y0), 3 * one.drift(t, y0), rtol=1e-12, atol=1e-12)
    shifted = one.plan_log_prob(y1, y0) - 2 * math.log(3)
    torch.testing.assert_close(three.plan_log_prob(3 * y1, 3 * y0), shifted, rtol=1e-12, atol=1e-12)
