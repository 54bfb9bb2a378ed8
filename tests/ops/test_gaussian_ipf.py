"""Exact iterative proportional fitting between Gaussians."""

import pytest
import torch

from pyro_sb.ops.closed_form import gaussian_bridge, gaussian_ipf

F64 = {"dtype": torch.float64}


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
