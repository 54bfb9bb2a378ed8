"""Steps of a chain: its grid, Brownian bridges, and the law of a state on the way to an end that is known in part."""

import pytest
import torch

from pyro_sb.ops.brownian import SCHEDULES, bridge_gain, pinned, step_times, step_towards

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 51])
def test_a_grid_is_symmetric_and_its_steps_differ_twentyfold_at_most(schedule, num_steps):
    times = step_times(num_steps, schedule)
    assert times[0] == 0 and times[-1] == 1 and len(times) == num_steps + 1
    torch.testing.assert_close(times, 1 - times.flip(0), rtol=0, atol=1e-14)
    sizes = times.diff()
    assert bool((sizes > 0).all()) and sizes.max() / sizes.min() < 20 + 1e-9
    assert (schedule == "constant") == bool(torch.allclose(sizes, sizes.mean())) or num_steps < 3


def test_a_brownian_bridge_has_its_covariance_in_time():
    n, epsilon = 400_000, 0.7
    begin, end = torch.tensor([-1.0], **F64).expand(n, 1), torch.tensor([2.0], **F64).expand(n, 1)
    x = pinned(begin, end, torch.full((n,), 0.3, **F64), epsilon)
    mean, variance = -1 + 0.3 * 3, epsilon * 0.3 * 0.7
    assert abs(x.mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs(x.var() / variance - 1) < 4 * (2 / n) ** 0.5


def test_two_steps_are_one():
    # between them the end's law, given the first state, must give that of the end given the second: Gaussian algebra
    epsilon, u, v, w = 0.8, *torch.tensor([0.1, 0.45, 0.8], **F64)
    spread, guess, x = torch.tensor([0.5], **F64), torch.tensor([[2.0]], **F64), torch.tensor([[-1.0]], **F64)
    once = step_towards(x, guess, spread, u, w, epsilon)
    first = step_towards(x, guess, spread, u, v, epsilon)
    share = (v - u) / (1 - u)
    cross = share * spread  # Cov(state at v, end | x)
    gain = cross / first.scale.square()

    def second(state):
        end = guess + gain * (state - first.mean)
        return step_towards(state, end, (spread - gain * cross)[0], v, w, epsilon)

    at = second(first.mean)
    slope = second(first.mean + 1).mean - at.mean
    torch.testing.assert_close(at.mean, once.mean, rtol=1e-12, atol=1e-12)
    variance = slope.square() * first.scale.square() + at.scale.square()
    torch.testing.assert_close(variance, once.scale.square(), rtol=1e-12, atol=1e-12)


def test_with_the_reference_s_own_end_a_step_is_euler_maruyama_s():
    u, then, epsilon = torch.tensor(0.25, **F64), torch.tensor(0.3, **F64), 2.0
    x, drift = torch.randn(5, 3, **F64), torch.randn(5, 3, **F64)
    law = step_towards(x, x + 0.75 * drift, torch.full((3,), epsilon * 0.75, **F64), u, then, epsilon)
    torch.testing.assert_close(law.mean, x + 0.05 * drift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.scale, torch.full_like(x, (epsilon * 0.05) ** 0.5), rtol=1e-12, atol=1e-12)


def test_a_grid_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        step_times(0)
    with pytest.raises(ValueError, match="schedule must be one of .* 'linear'"):
        step_times(3, "linear")


def test_a_gain_carries_the_source_s_covariance_to_the_target_s_though_either_is_singular():
    root = torch.randn(3, 3, **F64)
    full, flat, zero = root @ root.T + 0.1 * torch.eye(3, **F64), torch.diag(torch.tensor([2.0, 0, 0], **F64)), root * 0
    for cov0, cov1 in ((zero, full), (flat, full), (full, flat), (full, full + flat)):
        slope = bridge_gain(cov0, cov1, 0.7)
        torch.testing.assert_close(slope @ cov0 @ slope + 0.7 * slope, cov1, rtol=1e-12, atol=1e-12)


def test_a_gain_without_a_positive_variance_is_refused():
    with pytest.raises(ValueError, match="epsilon must be positive"):
        bridge_gain(torch.eye(2), torch.eye(2), 0.0)
