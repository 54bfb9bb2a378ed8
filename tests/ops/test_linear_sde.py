"""Linear noising processes: the matrix fraction, composition, limits, grids, roots, and unit variances."""

import math

import pytest
import torch

from pyro_sb.ops.linear_sde import (
    LinearSDE,
    Schedule,
    brownian,
    fixed_point_rates,
    preconditioning,
    share_left,
    start_covariance,
    tolerance_rates,
    variance_exploding,
    variance_preserving,
)

F64 = {"dtype": torch.float64}
SCHEDULES = [Schedule(), Schedule(0.5, 4.0, 1.0), Schedule(2.0, 2.0, 0.0)]
TIMES = torch.tensor([0.01, 0.2, 0.6, 1.0], **F64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_integral_is_that_of_the_rate_and_time_is_its_inverse(schedule):
    tau = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.integral(tau).sum(), tau)
    torch.testing.assert_close(slope, schedule.rate(TIMES), rtol=1e-12, atol=0)
    assert schedule.total == pytest.approx(float(schedule.integral(torch.ones((), **F64))), rel=1e-12)
    torch.testing.assert_close(schedule.time(schedule.integral(TIMES)), TIMES, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_transition_is_the_matrix_fraction(schedule):
    # d/dtau [C; H] = beta [[-D/2, I], [0, D/2]] [C; H] from (0, I), Sigma = C H^-1: exact for a static D
    root = torch.randn(3, 3, **F64)
    matrix = root @ root.T / 3 + 0.1 * torch.eye(3, **F64)
    rates, basis = torch.linalg.eigh(matrix)
    eye = torch.eye(3, **F64)
    for tau in TIMES:
        block = torch.cat([torch.cat([-matrix / 2, eye], 1), torch.cat([0 * eye, matrix / 2], 1)])
        c, h = (torch.linalg.matrix_exp(schedule.integral(tau) * block) @ torch.cat([0 * eye, eye])).split(3)
        law = LinearSDE(rates, schedule).at(tau)
        torch.testing.assert_close(basis * law.variance @ basis.T, c @ torch.linalg.inv(h), rtol=1e-8, atol=1e-9)
        factor = torch.linalg.matrix_exp(-0.5 * schedule.integral(tau) * matrix)
        torch.testing.assert_close(basis * law.factor @ basis.T, factor, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_intervals_make_one(schedule):
    sde = LinearSDE(torch.tensor([0.0, 0.4, 1.0, 3.0], **F64), schedule)
    for middle in TIMES[:-1]:
        first, second, whole = sde.at(middle), sde.between(middle, TIMES[-1]), sde.at(TIMES[-1])
        torch.testing.assert_close(first.factor * second.factor, whole.factor, rtol=1e-12, atol=0)
        variance = second.factor**2 * first.variance + second.variance
        torch.testing.assert_close(variance, whole.variance, rtol=1e-12, atol=0)


def test_a_rate_of_zero_is_the_limit():
    at = [LinearSDE(torch.tensor([rate], **F64), Schedule()).at(TIMES) for rate in (0.0, 1e-9, -1e-9)]
    for near in at[1:]:
        torch.testing.assert_close(near.factor, at[0].factor, rtol=1e-8, atol=0)
        torch.testing.assert_close(near.variance, at[0].variance, rtol=1e-8, atol=0)
    assert share_left(torch.tensor([1e-12], **F64)).item() == pytest.approx(1.0, abs=1e-11)


def test_brownian_vp_and_ve_are_members():
    motion = brownian(2, 0.7).at(TIMES.float())
    torch.testing.assert_close(motion.variance, (0.7 * TIMES.float())[:, None].expand(4, 2))
    assert bool((motion.factor == 1).all())
    kept = variance_preserving(2).at(TIMES.float())
    torch.testing.assert_close(kept.factor**2 + kept.variance, torch.ones(4, 2))
    noised = variance_exploding(1, 50.0).at(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(noised.variance[:, 0], torch.tensor([50.0 * 0.5**2.7, 50.0]))


def test_the_grid_is_uniform_in_mean_log_snr():
    sde = LinearSDE(torch.tensor([0.5, 3.0], **F64), Schedule())
    times = sde.grid(12, 1e-4)
    assert times[0] == 1 and times[-2] == 1e-4 and times[-1] == 0 and len(times) == 13
    gaps = sde.log_snr(times[:-1]).mean(-1).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(11), rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.time_at(sde.log_snr(TIMES).mean(-1)), TIMES, rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.grid(1, 1e-4), torch.tensor([1.0, 0.0], **F64))


def test_log_snr_is_half_the_log_of_the_ratio_of_variances():
    sde = LinearSDE(torch.tensor([0.5, 3.0], **F64), Schedule())
    law = sde.at(TIMES)
    torch.testing.assert_close((2 * sde.log_snr(TIMES)).exp(), law.factor**2 / law.variance, rtol=1e-10, atol=0)


def test_fixed_points_keep_unit_variance_and_have_the_known_values():
    v = torch.tensor([1e-8, 0.05, 1.0, 4.37, 350.0, 1e12], **F64)
    rates = fixed_point_rates(v, Schedule().total)
    law = LinearSDE(rates, Schedule()).at(torch.ones((), **F64))
    torch.testing.assert_close(law.factor**2 * v + law.variance, torch.ones_like(v), rtol=1e-9, atol=0)
    known = torch.tensor([0.976, 1.0, 1.066, 1.778], **F64)  # shared trial figures; theirs agree to .003
    torch.testing.assert_close(rates[1:5], known, rtol=0, atol=4e-3)
    assert float(rates[2]) == pytest.approx(1.0, abs=1e-12)


def test_a_wider_direction_has_a_higher_rate():
    v = torch.logspace(-4, 6, 50, **F64)
    assert bool((fixed_point_rates(v, 3.77).diff() > 0).all())


def test_the_tolerance_rule_leaves_the_tolerance():
    deviations = torch.tensor([0.3, 2.0, 20.0], **F64)
    law = LinearSDE(tolerance_rates(deviations, Schedule().total), Schedule()).at(torch.ones((), **F64))
    torch.testing.assert_close(law.factor * deviations, torch.full_like(deviations, 0.05), rtol=1e-10, atol=0)
    assert tolerance_rates(torch.tensor(1e-3), 3.77) == torch.tensor(0.3)  # narrow: still contracting


def test_preconditioning_gives_the_network_unit_variance_and_news_alone():
    v = torch.tensor([0.01, 1.0, 300.0], **F64)
    law = LinearSDE(fixed_point_rates(v, Schedule().total), Schedule()).at(TIMES)
    skip, out, inner = preconditioning(law, v)
    of_target, of_noise = (1 - skip * law.factor) / out * v.sqrt(), -skip * law.variance.sqrt() / out
    torch.testing.assert_close(of_target**2 + of_noise**2, torch.ones_like(skip), rtol=1e-8, atol=0)
    x_target, x_noise = inner * law.factor * v.sqrt(), inner * law.variance.sqrt()
    torch.testing.assert_close(x_target**2 + x_noise**2, torch.ones_like(skip), rtol=1e-12, atol=0)
    assert (of_target * x_target + of_noise * x_noise).abs().max() < 1e-8  # skip takes all that is linear
    posterior = 1 / (1 / v + law.factor**2 / law.variance)
    torch.testing.assert_close(out**2, posterior, rtol=1e-9, atol=0)


def test_the_start_covariance_is_that_of_the_noised_target():
    sde = LinearSDE(torch.tensor([0.5, 2.0], **F64), Schedule())
    root = torch.tensor([[1.0, 0.0], [3.0, 0.5]], **F64)
    law = sde.at(torch.ones((), **F64))
    joint = torch.cat([law.factor[:, None] * root, law.variance.sqrt().diag()], 1)
    torch.testing.assert_close(start_covariance(sde, root @ root.T), joint @ joint.T, rtol=1e-12, atol=0)


def test_a_transition_s_density_is_that_of_its_draws():
    law = LinearSDE(torch.ones(1, **F64), Schedule()).at(torch.tensor(0.3, **F64))
    grid = torch.linspace(-8, 8, 4001, **F64)[:, None]
    density = law.log_prob(grid, torch.full((1,), 0.7, **F64)).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=1e-10)
    mean = float(torch.trapezoid(density * grid[:, 0], grid[:, 0]))
    draws = law.sample(torch.full((40_000, 1), 0.7, **F64))
    assert abs(float(draws.mean()) - mean) < 4 * float(draws.std()) / math.sqrt(40_000)
    assert float(draws.var()) == pytest.approx(float(law.variance), rel=0.03)
