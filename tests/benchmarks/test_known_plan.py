"""Known entropic plans: against the Gaussian closed form, quadrature, a Sinkhorn on a grid, and their own draws."""

import math
from dataclasses import replace
from functools import cache

import ot
import pytest
import torch
from torch.distributions import MultivariateNormal

from benchmarks.lib.known_plan import KnownPlan, balanced_log_weights, make_pair
from pyro_sb.ops.closed_form import cross_covariance

F64 = {"dtype": torch.float64}
EPSILONS = [0.1, 1.0, 10.0]
SIZES = [(2, 0.1), (2, 1.0), (2, 10.0), (16, 1.0), (128, 0.1)]  # (dim, epsilon)
pair = cache(make_pair)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def jacobian(function, x):
    return torch.func.jacrev(lambda point: function(point[None])[0])(x)


@pytest.mark.parametrize(("dim", "epsilon"), [(1, 1.0), *SIZES])
def test_one_component_is_the_gaussian_bridge(dim, epsilon):
    plan = pair(dim, epsilon, seed=1, num_components=1)
    factor = torch.randn(dim, dim, **F64) / math.sqrt(dim)
    cov0 = factor @ factor.T + 0.2 * torch.eye(dim, **F64)
    plan = replace(plan, source=MultivariateNormal(torch.ones(dim, **F64), cov0))
    slope = jacobian(lambda x: plan.conditional_moments(x)[0], plan.source.loc)
    within = plan.conditional_moments(plan.source.loc[None])[1][0]
    cov1 = slope @ cov0 @ slope.T + within
    torch.testing.assert_close(cov0 @ slope.T, cross_covariance(cov0, cov1, epsilon), rtol=0, atol=1e-12)
    x0, x1 = plan.sample_plan(5, generator())
    expected = MultivariateNormal(*plan.conditional_moments(x0)).log_prob(x1)
    torch.testing.assert_close(plan.conditional_log_prob(x1, x0), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_total_mass_and_source_by_quadrature(epsilon):
    plan, line = pair(1, epsilon, seed=1, num_components=3), torch.linspace(-40, 40, 8001, **F64)
    for x0 in (-2.0, 0.1, 3.0):
        density = plan.conditional_log_prob(line[:, None], torch.full_like(line, x0)[:, None]).exp()
        mass, mean = torch.trapezoid(density, line), torch.trapezoid(density * line, line)
        expected, covariance = plan.conditional_moments(torch.full((1, 1), x0, **F64))
        variance = torch.trapezoid(density * (line - mean) ** 2, line)
        torch.testing.assert_close(
            torch.stack([mass, mean, variance]), torch.cat([torch.ones(1, **F64), expected[0], covariance[0, 0]])
        )


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_sinkhorn_finds_the_plan_from_its_marginals_alone(epsilon):
    plan, grid = pair(1, epsilon, seed=1, num_components=2), torch.linspace(-10, 10, 400, **F64)
    starts = grid.repeat_interleave(400)[:, None]
    joint = plan.conditional_log_prob(grid.repeat(400)[:, None], starts) + plan.source.log_prob(starts)
    joint = torch.softmax(joint, 0).view(400, 400)
    cost = (grid[:, None] - grid).square()
    found = ot.sinkhorn(joint.sum(1), joint.sum(0), cost, 2 * epsilon, numItermax=20_000, stopThr=1e-12)
    assert 0.5 * (found - joint).abs().sum() < 1e-9


@pytest.mark.parametrize(("dim", "epsilon"), SIZES)
def test_potentials_couple_by_the_reference_alone(dim, epsilon):
    # log pi(y|x) = u(y) + v(x) + x.y / epsilon: a mixed second difference leaves the last term
    plan = pair(dim, epsilon, seed=1)
    (x0, x1), (z0, z1) = (plan.sample_plan(20, generator(seed)) for seed in (1, 2))
    log_prob = plan.conditional_log_prob
    mixed = log_prob(x1, x0) - log_prob(x1, z0) - log_prob(z1, x0) + log_prob(z1, z0)
    torch.testing.assert_close(mixed, ((x1 - z1) * (x0 - z0)).sum(-1) / epsilon, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("dim", "epsilon"), SIZES)
def test_drift_leads_to_the_expected_end(dim, epsilon):
    plan = pair(dim, epsilon, seed=1)
    x = plan.sample_source(9, generator())
    times = torch.linspace(0, 0.9, 9, **F64)
    drifts = plan.drift(times, x)
    for i, t in enumerate(times):
        rest = replace(plan, epsilon=epsilon * float(1 - t))  # from t on: a bridge of what is left of the reference
        expected = (rest.conditional_moments(x[i : i + 1])[0] - x[i : i + 1]) / (1 - t)
        torch.testing.assert_close(drifts[i : i + 1], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plan.drift(float(t), x[i : i + 1]), drifts[i : i + 1])
    assert plan.drift(1.0, x).isfinite().all()
    a = jacobian(lambda point: plan.drift(0.5, point), x[0])
    torch.testing.assert_close(a, a.T, rtol=1e-10, atol=1e-10 * float(a.abs().max()))


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_conditional_covariance_is_the_derivative_of_the_mean(epsilon):
    # x.y / epsilon makes pi(.|x) an exponential family in x
    plan = pair(3, epsilon, seed=1)
    for x in plan.sample_source(4, generator()):
        covariance = plan.conditional_moments(x[None])[1][0]
        derivative = jacobian(lambda point: plan.conditional_moments(point)[0], x)
        torch.testing.assert_close(epsilon * derivative, covariance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_conditional_draws_have_the_conditional_moments(epsilon):
    plan, num = pair(4, epsilon, seed=1), 40_000
    x0 = plan.sample_source(3, generator())
    draws = plan.conditional_sample(x0, num, generator())
    mean, covariance = plan.conditional_moments(x0)
    offsets = draws - mean
    assert (offsets.mean(0).abs() * math.sqrt(num) / offsets.std(0)).max() < 4
    products = offsets[..., :, None] * offsets[..., None, :]
    z = (products.mean(0) - covariance) * math.sqrt(num) / products.std(0)
    assert z.abs().max() < 4.5


def test_conditional_density_is_that_of_the_draws():
    # E exp(log q - log p) over draws of p is the mass of q, here a narrower Gaussian
    plan, num = pair(2, 1.0, seed=1), 20_000
    x0 = plan.sample_source(1, generator())
    mean, covariance = plan.conditional_moments(x0)
    draws = plan.conditional_sample(x0, num, generator())[:, 0]
    narrow = MultivariateNormal(mean[0], 0.3 * covariance[0])
    ratio = (narrow.log_prob(draws) - plan.conditional_log_prob(draws, x0.expand_as(draws))).exp()
    assert abs(ratio.mean() - 1) * math.sqrt(num) / ratio.std() < 4
    assert ratio.std() < 20


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_euler_with_the_exact_drift_reaches_the_target(epsilon):
    plan, num, steps = pair(2, epsilon, seed=1), 4_000, 400
    noise = generator()
    x = plan.sample_source(num, noise)
    start, size = x, math.sqrt(epsilon / steps)
    for i in range(steps):
        x = x + plan.drift(i / steps, x) / steps + size * torch.randn(num, 2, generator=noise, **F64)
    exact = plan.sample_plan(num, generator(6))

    def features(x0, x1):
        pairs = torch.cat([x0, x1], 1)
        return torch.cat([x1, (pairs[:, :, None] * pairs[:, None, :])[:, :, 2:].flatten(1), x1.sin()], 1)

    left, right = features(start, x), features(*exact)
    z = (left.mean(0) - right.mean(0)) * math.sqrt(num) / (left.var(0) + right.var(0)).sqrt()
    assert z.abs().max() < 4


@pytest.mark.parametrize(("dim", "epsilon"), SIZES)
def test_components_take_equal_masses(dim, epsilon):
    plan, num = pair(dim, epsilon, seed=1), 5_000
    gates = plan.log_gates(plan.sample_source(num, generator())).exp()
    z = (gates.mean(0) - 0.2) / gates.std(0) / math.sqrt(1 / num + 1 / 50_000)
    assert z.abs().max() < 4
    assert gates.isfinite().all()


def test_balancing_where_gates_are_nearly_hard():
    log_gates = 300 * torch.randn(20_000, 5, **F64)
    log_gates = torch.log_softmax(log_gates + torch.tensor([0.0, 400.0, -900.0, 50.0, 800.0], **F64), -1)
    masses = torch.softmax(log_gates + balanced_log_weights(log_gates, tol=1e-4), -1).mean(0)
    torch.testing.assert_close(masses, torch.full_like(masses, 0.2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 16])
def test_target_variance_is_that_of_draws(dim):
    plan, num = pair(dim, 1.0, seed=1), 50_000
    draws = plan.sample_target(num, generator(8))
    squares = (draws - draws.mean(0)).square().sum(-1)
    assert abs(squares.mean() - plan.target_variance) * math.sqrt(num) / squares.std() < 4
    assert plan.target_variance > 1


@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_drift_solves_burgers_equation(epsilon):
    # s = epsilon (log h)' of a heat flow h: s_t + s s' + epsilon s'' / 2 = 0, here with variances that differ
    plan = replace(pair(1, epsilon, seed=1, num_components=3), variances=torch.tensor([[0.1], [0.6], [2.0]], **F64))
    plan = replace(plan, locs=torch.tensor([[-2.0], [0.5], [3.0]], **F64))

    def drift(t, x):
        return plan.drift(t, x.reshape(1, 1)).squeeze()

    slope = torch.func.grad(drift, 1)
    for x in torch.linspace(-4, 4, 9, **F64):
        t = torch.tensor(0.4, **F64)
        flux = drift(t, x) * slope(t, x) + epsilon / 2 * torch.func.grad(slope, 1)(t, x)
        torch.testing.assert_close(torch.func.grad(drift, 0)(t, x), -flux, rtol=1e-10, atol=1e-10)


def test_another_source_is_drawn_from():
    cov, num = torch.tensor([[2.0, 0.9], [0.9, 1.0]], **F64), 20_000
    plan = replace(pair(2, 1.0, seed=1), source=MultivariateNormal(torch.tensor([3.0, -1.0], **F64), cov))
    draws = plan.sample_source(num, generator())
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (draws - plan.source.loc).T, upper=False)
    assert (whitened.mean(1).abs() * math.sqrt(num)).max() < 4
    assert ((whitened.cov() - torch.eye(2, **F64)).abs() * math.sqrt(num / 2)).max() < 4


def test_a_pair_is_its_seed():
    first, again, other = make_pair(3, 0.5, 0), make_pair(3, 0.5, 0), make_pair(3, 0.5, 1)
    assert isinstance(first, KnownPlan)
    assert torch.equal(first.sample_target(7, generator()), again.sample_target(7, generator()))
    assert not torch.equal(first.locs, other.locs)
    torch.testing.assert_close(first.locs.norm(dim=1), torch.full((5,), 5.0, **F64))
    assert first.source.log_prob(first.sample_source(2)).dtype == torch.float64
