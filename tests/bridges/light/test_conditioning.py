"""Conditioning a bridge on joint draws, against integrals of its own joint density."""

import math

import pytest
import torch

from pyro_sb.bridges import LightSB, LightSBBM
from pyro_sb.bridges.light.laws import condition_mixture

F64 = {"dtype": torch.float64}


def joint_draws(num=800):
    """Three correlated coordinates with two modes."""
    z = torch.randn(num, 3, **F64) @ torch.tensor([[1.0, 0.6, -0.3], [0.0, 0.8, 0.4], [0.0, 0.0, 0.5]], **F64)
    return z + 2 * torch.randint(2, (num, 1)) * torch.tensor([1.0, -1.0, 0.5], **F64)


def fitted(covariance="full", source=None):
    bridge = LightSB(3, num_components=3, covariance=covariance)
    bridge.fit(joint_draws(), source, solver="moments", num_updates=30, progress=False)
    return bridge


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("axes", [[1], [-1], [2, 0]], ids=str)
def test_the_conditional_is_the_joint_over_its_integral(covariance, axes):
    bridge = fitted(covariance)
    observed = 0.7 * torch.randn(5, len(axes), **F64)
    law = bridge.condition(axes, observed)
    rest = [i for i in range(3) if i not in [a % 3 for a in axes]]
    assert (tuple(law.batch_shape), tuple(law.event_shape)) == ((5,), (len(rest),))
    nodes = torch.linspace(-9, 9, 241, **F64)
    grid = torch.cartesian_prod(*[nodes] * len(rest)).reshape(-1, len(rest))
    points = torch.zeros(len(grid), 5, 3, **F64)
    points[..., [a % 3 for a in axes]] = observed
    points[..., rest] = grid[:, None, :]
    joint = bridge().log_prob(points)
    cell = (18 / 240) ** len(rest)
    expected = joint - (torch.logsumexp(joint, 0) + math.log(cell))
    likely = expected > -25
    torch.testing.assert_close(law.log_prob(grid[:, None, :])[likely], expected[likely], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_it_conditions_the_plan_from_a_given_point():
    bridge = fitted(source=torch.randn(500, 3, **F64))
    x0, observed = torch.tensor([0.5, -1.0, 0.2], **F64), torch.tensor([0.3, 0.1], **F64)
    law = bridge.condition([0, 1], observed, x0)
    nodes = torch.linspace(-9, 9, 2001, **F64)
    points = torch.cat([observed.expand(2001, 2), nodes[:, None]], 1)
    joint = bridge.plan(x0).log_prob(points)
    expected = joint - torch.logsumexp(joint, 0) - math.log(18 / 2000)
    torch.testing.assert_close(law.log_prob(nodes[:, None]), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="x0 must be given"):
        bridge.condition([0], [0.0])


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("axes", [[], [0, 1, 2], [3], [1, 1], [-4]], ids=str)
def test_bad_axes_are_refused(axes):
    with pytest.raises(ValueError, match="axes must be distinct"):
        fitted().condition(axes, torch.zeros(len(axes)))


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_what_has_no_closed_form_is_refused():
    with pytest.raises(ValueError, match=r"shape \(\*batch, 2\), got \(3,\)"):
        fitted().condition([0, 1], torch.zeros(3))
    bass = LightSBBM(3, num_components=2, beta=5.0)
    bass.fit(joint_draws(), num_updates=5, progress=False)
    with pytest.raises(NotImplementedError, match="beta = 5"):
        bass.condition([0], [0.0])


def test_independent_coordinates_learn_nothing():
    law = condition_mixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2), [0], torch.tensor([[3.0]]))
    assert law.mean.item() == 0 and law.variance.item() == 1
