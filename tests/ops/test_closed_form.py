"""Gaussian bridges and exact IPF: optimality, marginal flows, a Sinkhorn on a grid, duality; no formula again."""

import math

import numpy as np
import ot
import pytest
import torch

from pyro_sb.ops.brownian import bridge_gain
from pyro_sb.ops.closed_form import (
    alternating_bass_scalar,
    bass_dual_value,
    bass_gain,
    commuting_bass_bridge,
    cross_covariance,
    gaussian_bridge,
    gaussian_ipf,
)

F64 = {"dtype": torch.float64}
PAIRS = [(s2, beta) for s2 in (0.01, 0.1, 0.5, 2.0, 10.0, 100.0) for beta in (1.05, 1.5, 2.0, 5.0, 10.0, 100.0)]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)
TIMES, QUADRATURE = torch.tensor((NODES + 1) / 2), torch.tensor(WEIGHTS / 2)  # Gauss-Legendre on [0, 1]


def real(value):
    return torch.tensor(value, **F64)


def spd(dim, seed):
    factor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), **F64)
    return factor @ factor.T / dim + 0.1 * torch.eye(dim, **F64)


def rotation(dim, seed=3):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), **F64)).Q


def general_bridge(dim, epsilon):
    mean0, mean1 = torch.randn(2, dim, **F64)
    return gaussian_bridge(mean0, spd(dim, 0), mean1, spd(dim, 1), epsilon)


def derivative(function, t, width=1e-2):
    """Six-point central difference, exact for polynomials of degree six."""
    return sum(c * (function(t + i * width) - function(t - i * width)) for i, c in ((1, 45), (2, -9), (3, 1))) / (
        60 * width
    )


@pytest.mark.parametrize("dim", [1, 2, 20])
@pytest.mark.parametrize("epsilon", [0.05, 0.7, 10.0])
def test_bridge_tilts_the_reference_by_separable_potentials(dim, epsilon):
    # pi(x0, x1) = f(x0) g(x1) exp(-|x0 - x1|^2 / 2 eps): the reference alone couples, off-diagonal precision -I / eps
    cov0, cov1 = spd(dim, 0), spd(dim, 1)
    c = cross_covariance(cov0, cov1, epsilon)
    precision = torch.linalg.inv(torch.cat([torch.cat([cov0, c], 1), torch.cat([c.T, cov1], 1)], 0))
    torch.testing.assert_close(precision[:dim, dim:], -torch.eye(dim, **F64) / epsilon, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 20])
@pytest.mark.parametrize("epsilon", [0.05, 0.7, 10.0])
def test_conditional_and_source_make_the_target(dim, epsilon):
    bridge = general_bridge(dim, epsilon)
    x0 = torch.randn(6, dim, **F64)
    mean, covariance = bridge.conditional(x0)
    slope = torch.func.jacrev(lambda x: bridge.conditional(x)[0])(x0[0])
    torch.testing.assert_close(slope @ bridge.cov0 @ slope.T + covariance, bridge.cov1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bridge.conditional(bridge.mean0)[0], bridge.mean1)
    torch.testing.assert_close(mean[1] - mean[0], slope @ (x0[1] - x0[0]))
    torch.testing.assert_close(bridge.cross_covariance, bridge.cov0 @ slope.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_cross_covariance_is_that_of_sinkhorn_on_a_grid(epsilon):
    variance0, variance1, grid = 0.6, 1.3, torch.linspace(-9, 9, 400, **F64)
    marginals = [torch.softmax(-(grid**2) / (2 * v), 0) for v in (variance0, variance1)]
    cost = (grid[:, None] - grid).square()
    plan = ot.sinkhorn(*marginals, cost, 2 * epsilon, numItermax=5000, stopThr=1e-13)
    expected = (grid @ plan @ grid).reshape(1, 1)
    got = cross_covariance(real([[variance0]]), real([[variance1]]), epsilon)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("epsilon", [0.3, 3.0])
def test_marginals_flow_along_the_drift(epsilon, t):
    bridge = general_bridge(4, epsilon)
    mean, cov = bridge.marginal(t)
    a = bridge.drift_matrix(t)
    flow = a @ cov + cov @ a.T + epsilon * torch.eye(4, **F64)
    torch.testing.assert_close(derivative(lambda s: bridge.marginal(s)[1], t), flow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(derivative(lambda s: bridge.marginal(s)[0], t), bridge.drift(t, mean))


@pytest.mark.parametrize("epsilon", [0.1, 3.0])
def test_drift_leads_to_the_expected_end(epsilon):
    bridge = general_bridge(4, epsilon)
    x = torch.randn(5, 4, **F64)
    torch.testing.assert_close(bridge.drift(0.0, x), bridge.conditional(x)[0] - x, rtol=1e-11, atol=1e-11)
    for t in (0.0, 0.4, 1.0):
        a = bridge.drift_matrix(t)
        torch.testing.assert_close(a, a.T, rtol=1e-12, atol=1e-12)  # the drift is a gradient
    for t, mean, cov in ((0.0, bridge.mean0, bridge.cov0), (1.0, bridge.mean1, bridge.cov1)):
        torch.testing.assert_close(bridge.marginal(t), (mean, cov))


def test_drift_of_the_remaining_bridge_is_the_drift():
    # From time t on the bridge is a bridge of reference variance (1 - t) epsilon.
    bridge, t, x = general_bridge(3, 0.8), 0.35, torch.randn(7, 3, **F64)
    rest = gaussian_bridge(*bridge.marginal(t), bridge.mean1, bridge.cov1, 0.8 * (1 - t))
    torch.testing.assert_close(bridge.drift(t, x), (rest.conditional(x)[0] - x) / (1 - t), rtol=1e-11, atol=1e-11)


def test_a_point_is_uncorrelated_with_its_end():
    zero = torch.zeros(3, 3, **F64)
    assert torch.equal(cross_covariance(zero, spd(3, 1), 0.7), zero)


def test_batches_are_the_bridges_one_by_one():
    mean0, mean1 = torch.randn(2, 5, 3, **F64)
    cov0, cov1 = (torch.stack([spd(3, 10 * k + i) for i in range(5)]) for k in range(2))
    times, x = torch.rand(5, **F64), torch.randn(5, 3, **F64)
    batch = gaussian_bridge(mean0, cov0, mean1, cov1, 0.4)
    for i in range(5):
        single = gaussian_bridge(mean0[i], cov0[i], mean1[i], cov1[i], 0.4)
        torch.testing.assert_close(batch.drift(times, x)[i], single.drift(float(times[i]), x[i]))
        torch.testing.assert_close(batch.marginal(times)[1][i], single.marginal(float(times[i]))[1])
    low = gaussian_bridge(*(part.float() for part in (mean0, cov0, mean1, cov1)), 0.4)
    assert low.drift(times, x.float()).dtype == low.marginal(times)[1].dtype == torch.float32


def axes(v0, s2, epsilon, beta):
    return commuting_bass_bridge(real([[v0]]), real([[s2]]), epsilon, beta)


@pytest.mark.parametrize("v0", [0.0, 0.3, 4.0])
@pytest.mark.parametrize(
    ("epsilon", "s2", "beta"), [(1.0, 0.1, 1.5), (0.2, 0.1, 10.0), (3.0, 7.0, 0.5), (1.0, 2.0, 80.0)]
)
def test_bass_variance_flows_between_its_ends(v0, epsilon, s2, beta):
    bridge = axes(v0, s2, epsilon, beta)
    torch.testing.assert_close(bridge.variance(0.0), real([v0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(bridge.variance(1.0), real([s2]), rtol=1e-12, atol=0)
    for t in (0.1, 0.5, 0.9):
        flow = 2 * bridge.drift_coefficient(t) * bridge.variance(t) + bridge.diffusion_coefficient(t) ** 2
        torch.testing.assert_close(derivative(bridge.variance, t, 1e-3), flow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("epsilon", "s2", "beta"), [(1.0, 0.1, 1.5), (0.2, 0.1, 10.0), (3.0, 7.0, 0.5)])
def test_bass_coupling_is_carried_by_the_drift(epsilon, s2, beta):
    # d/dt Cov(X0, Xt) = a(t) Cov(X0, Xt)
    bridge = axes(1.3, s2, epsilon, beta)
    growth = (QUADRATURE * bridge.drift_coefficient(TIMES)[:, 0]).sum().exp()
    torch.testing.assert_close(bridge.cross_covariance, 1.3 * growth.reshape(1, 1), rtol=1e-9, atol=0)


def cost_of(variance, change, diffusion, epsilon, beta):
    """Price of affine controls at the quadrature's times, for a variance path, its derivative and a diffusion."""
    drift = (change - diffusion**2) / (2 * variance)  # what the flow of the variance asks for
    running = 0.5 * drift**2 * variance + 0.5 * beta * (diffusion - math.sqrt(epsilon)) ** 2
    return (QUADRATURE * running).sum(-1)


def optimal_path(bridge):
    variance, diffusion = bridge.variance(TIMES)[:, 0], bridge.diffusion_coefficient(TIMES)[:, 0]
    return variance, 2 * bridge.drift_coefficient(TIMES)[:, 0] * variance + diffusion**2, diffusion


CASES = [
    (1.0, 1.0, 0.1, 10.0),
    (1.0, 1.0, 10.0, 10.0),
    (0.4, 0.7, 0.3, 1.2),
    (2.0, 0.5, 6.0, 0.4),
    (0.3, 3.0, 2.0, 5.0),
]


@pytest.mark.parametrize(("v0", "epsilon", "s2", "beta"), CASES)
def test_no_duality_gap(v0, epsilon, s2, beta):
    bridge = axes(v0, s2, epsilon, beta)
    cost = cost_of(*optimal_path(bridge), epsilon, beta)
    torch.testing.assert_close(bass_dual_value(bridge.gain, real(v0), real(s2), epsilon, beta)[0], cost)
    others = bridge.gain * torch.linspace(0.5, 2.0, 101, **F64)
    duals = bass_dual_value(others, real(v0), real(s2), epsilon, beta)
    assert (duals <= cost * (1 + 1e-12)).all() and (duals > -math.inf).any()


@pytest.mark.parametrize(("v0", "epsilon", "s2", "beta"), CASES)
def test_other_controls_with_the_same_ends_cost_more(v0, epsilon, s2, beta):
    variance, change, diffusion = optimal_path(axes(v0, s2, epsilon, beta))
    least = cost_of(variance, change, diffusion, epsilon, beta)
    powers = torch.arange(4, **F64)
    waves, slopes = TIMES[:, None] ** powers, powers * TIMES[:, None] ** (powers - 1)
    bump, rise = waves.T * TIMES * (1 - TIMES), slopes.T * TIMES * (1 - TIMES) + waves.T * (1 - 2 * TIMES)
    for size in (1e-4, 0.1):  # Var e^(size z), the same at both ends; sigma e^(size z')
        z, w = size * torch.randn(2, 50, 4, **F64)
        varied = variance * (z @ bump).exp()
        excess = cost_of(
            varied, varied * (change / variance + z @ rise), diffusion * (w @ waves.T).exp(), epsilon, beta
        )
        excess = excess - least
        assert (excess > 0).all()
        assert size > 1e-3 or (excess < 1e3 * size**2).all()  # of second order: the controls are stationary


def argmax(function, low, high):
    """The place of the maximum of a unimodal function: grids that close in."""
    for _ in range(12):
        grid = torch.linspace(low, high, 101, **F64)
        best = int(function(grid).argmax())
        low, high = float(grid[max(best - 2, 0)]), float(grid[min(best + 2, 100)])
    return (low + high) / 2


@pytest.mark.parametrize(("s2", "beta"), PAIRS)
def test_the_dual_has_its_maximum_at_the_moment_solution(s2, beta):
    gain = axes(1.0, s2, 1.0, beta).gain
    place = argmax(lambda log_gain: bass_dual_value(log_gain.exp(), real(1.0), real(s2), 1.0, beta), -6.0, 6.0)
    torch.testing.assert_close(real([math.exp(place)]), gain, rtol=1e-6, atol=0)  # a maximum is that flat


@pytest.mark.parametrize(("s2", "gain", "cross"), [(0.1, 0.2085, 0.1405), (10.0, 2.8928, 2.5916)])
def test_published_scalar_values(s2, gain, cross):
    bridge = axes(1.0, s2, 1.0, 10.0)
    torch.testing.assert_close(bridge.gain, real([gain]), rtol=0, atol=5e-5)
    torch.testing.assert_close(bridge.cross_covariance, real([[cross]]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("s2", [0.1, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("beta", [1.5, 2.0, 5.0, 10.0, 100.0, math.inf])
def test_where_the_plain_alternation_converges(s2, beta):
    gains = alternating_bass_scalar(real(1.0), real(s2), 1.0, beta, 200)
    diverges = {(0.1, 1.5), (0.1, 2.0), (0.1, 5.0), (0.1, 10.0), (0.5, 1.5), (0.5, 2.0)}
    gap = (gains / bass_gain(real(1.0), real(s2), 1.0, beta) - 1).abs()
    if (s2, beta) in diverges:
        assert gap[-20:].amin() > 1e-2
        assert gains.amin() >= 1.05 / (1 + beta) * (1 - 1e-12)
    else:
        assert gap[-1] < 1e-12


def test_bass_limits_and_units():
    v0, s2 = torch.rand(2, 50, **F64) * 3
    c = 7.0
    torch.testing.assert_close(bass_gain(c**2 * v0, c**2 * s2, c**2 * 0.6, 2.5), bass_gain(v0, s2, 0.6, 2.5))
    schroedinger = bridge_gain(torch.diag(v0), torch.diag(s2), 0.6)
    torch.testing.assert_close(torch.diag(bass_gain(v0, s2, 0.6, math.inf)), schroedinger, rtol=1e-12, atol=1e-12)
    free = bass_gain(v0, v0 + 0.6, 0.6, 0.3)  # the reference itself: no control at all
    torch.testing.assert_close(free, torch.ones_like(free), rtol=1e-13, atol=0)


def test_where_diffusion_is_free_the_drift_is_least():
    # beta -> 0: a martingale towards the wider target (Bass), optimal transport without noise to the narrower one
    v0, s2 = torch.rand(2, 50, **F64) * 3 + 0.1
    bridge = commuting_bass_bridge(torch.diag(v0), torch.diag(s2), 0.6, 1e-5)
    expected = torch.diag((v0 * torch.minimum(v0, s2)).sqrt())
    torch.testing.assert_close(bridge.cross_covariance, expected, rtol=0, atol=1e-4)


def test_commuting_covariances_are_solved_axis_by_axis():
    basis = rotation(4)
    # repeated eigenvalues on both sides, distinguished by the pair alone
    v0, s2 = real([1.0, 1.0, 0.0, 0.0]), real([2.0, 0.1, 0.1, 1.0])
    cov0, cov1 = (basis * v @ basis.T for v in (v0, s2))
    bridge = commuting_bass_bridge(cov0, cov1, 0.8, 3.0)
    for t in (0.0, 0.3, 1.0):
        single = torch.stack([axes(float(a), float(b), 0.8, 3.0).variance(t)[0] for a, b in zip(v0, s2)])
        torch.testing.assert_close(bridge.matrix(bridge.variance(t)), basis * single @ basis.T, rtol=1e-11, atol=1e-11)
    cross = torch.stack([axes(float(a), float(b), 0.8, 3.0).cross_covariance[0, 0] for a, b in zip(v0, s2)])
    torch.testing.assert_close(bridge.cross_covariance, basis * cross @ basis.T, rtol=1e-11, atol=1e-11)
    batch = commuting_bass_bridge(torch.stack([cov0, cov1]), torch.stack([cov1, cov1]), 0.8, 3.0)
    torch.testing.assert_close(batch.cross_covariance[0], bridge.cross_covariance, rtol=1e-11, atol=1e-11)
    general = commuting_bass_bridge(cov0, cov1, 0.8, math.inf).cross_covariance
    torch.testing.assert_close(general, cross_covariance(cov0, cov1, 0.8), rtol=1e-11, atol=1e-11)


def test_eigenvalues_that_meet_in_a_simple_combination():
    for v0, s2 in (([1.0, 0.0], [1.0, 2 + 3**0.5]), ([1.0, 1.0, 0.0], [1e-3, 1e-3, 1.0])):
        basis = rotation(len(v0))
        cov0, cov1 = (basis * real(v) @ basis.T for v in (v0, s2))
        bridge = commuting_bass_bridge(cov0, cov1, 1.0, 2.0)
        for got, cov in ((bridge.variance0, cov0), (bridge.variance1, cov1)):
            torch.testing.assert_close(bridge.matrix(got), cov, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: commuting_bass_bridge(spd(3, 0), spd(3, 1), 1.0, 5.0), "cov0 and cov1 must commute, got"),
        (
            lambda: commuting_bass_bridge(torch.diag(real([1.0, 2.0])), real([[1.0, 1e-9], [1e-9, 2.0]]), 1.0, 5.0),
            "e-10",
        ),
        (lambda: commuting_bass_bridge(torch.eye(2), torch.zeros(2, 2), 1.0, 5.0), "positive \\(target\\)"),
        (lambda: bass_gain(torch.ones(1), torch.ones(1), 1.0, 0.0), "got beta=0.0"),
        (lambda: bass_gain(-torch.ones(1), torch.ones(1), 1.0, 1.0), "non-negative \\(source\\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- exact iterative proportional fitting -----------------------------------------------------------------------------


def shifted(dim=5):
    eye, one = torch.eye(dim, **F64), torch.ones(dim, **F64)
    return gaussian_bridge(-0.1 * one, eye, 0.1 * one, eye, epsilon=1.0)


def unlike(dim=4, epsilon=1.0):
    a, b = torch.randn(2, dim, dim, **F64)
    return gaussian_bridge(
        torch.zeros(dim, **F64),
        a @ a.T + torch.eye(dim),
        torch.ones(dim, **F64),
        b @ b.T + 0.3 * torch.eye(dim),
        epsilon,
    )


def test_errors_fall_as_the_published_recursion_s():
    # mean, covariance and cross-covariance of the start, iterations 1 to 4, from an independent computation
    expected = [[0.224, 0.250, 0.191], [0.089, 0.040, 0.029], [0.034, 0.0059, 0.0043], [0.013, 8.7e-4, 6.3e-4]]
    bridge = shifted()
    for plan, row in zip(gaussian_ipf(bridge, 4, first="source")[::2], expected):
        errors = [
            (plan.mean0 - bridge.mean0).norm(),
            (plan.cov0 - bridge.cov0).norm() / bridge.cov0.norm(),
            (plan.cross - bridge.cross_covariance).norm() / bridge.cross_covariance.norm(),
        ]
        torch.testing.assert_close(torch.stack(errors), torch.tensor(row, **F64), rtol=0.05, atol=0)


@pytest.mark.parametrize("first", ["source", "target"])
def test_it_ends_at_the_schroedinger_bridge(first):
    bridge = unlike()
    plan = gaussian_ipf(bridge, 200, first=first)[-1]
    for got, want in [
        (plan.mean0, bridge.mean0),
        (plan.mean1, bridge.mean1),
        (plan.cov0, bridge.cov0),
        (plan.cov1, bridge.cov1),
        (plan.cross, bridge.cross_covariance),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("first", ["source", "target"])
def test_each_half_step_makes_one_end_right_and_keeps_the_law_given_it(first):
    bridge = unlike()
    plans = gaussian_ipf(bridge, 3, first=first)
    for k, (before, after) in enumerate(zip(plans[:-1], plans[1:])):
        at_source = (first == "source") == (k % 2 == 0)
        if not at_source:
            before, after = before.reversed(), after.reversed()
        end = bridge.cov0 if at_source else bridge.cov1
        torch.testing.assert_close(after.cov0, end)
        kept = [torch.linalg.solve(plan.cov0, plan.cross) for plan in (before, after)]
        torch.testing.assert_close(kept[0], kept[1])


def test_an_unknown_end_is_refused():
    with pytest.raises(ValueError, match="'source' or 'target', got 'prior'"):
        gaussian_ipf(shifted(), 1, first="prior")
