"""Sheared coordinates: an exact change of variables in which a funnel and a banana are normal."""

import math

import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.population import populate
from pyro_sb.infer.population.sheared import Sheared, sheared
from tests.infer.population.test_ridges import banana, funnel

F64 = {"dtype": torch.float64}
DIM = 6


def some_map(joint):
    bend, slopes = torch.randn(3, DIM, **F64), torch.randn(DIM, **F64)
    bend[:, 2], slopes[2] = 0.0, 0.0
    return Sheared(joint, 2, torch.tensor([0.3, 2.0], **F64), bend, slopes)


def normal(z):
    return -0.5 * (z - 1).square().sum(1)


def test_the_map_is_undone_and_the_density_changes_by_its_jacobian():
    torch.manual_seed(0)
    joint = LogJoint.from_batched(normal, DIM)
    moved = some_map(joint)
    u = torch.randn(5, DIM, **F64)
    torch.testing.assert_close(moved.inverse(moved.forward(u)), u)
    jacobians = torch.func.vmap(torch.func.jacrev(moved.forward))(u)
    exact = normal(moved.forward(u)) + torch.linalg.slogdet(jacobians)[1]
    torch.testing.assert_close(moved.log_joint.log_prob(u), exact)
    leaf = u.clone().requires_grad_()
    mean, log_scale = moved._moments(leaf)
    (normal(mean + log_scale.exp() * leaf) + log_scale.sum(1)).sum().backward()
    torch.testing.assert_close(moved.log_joint.value_and_grad(u)[1], leaf.grad)


@pytest.mark.parametrize(("law", "dim"), [(funnel, 10), (banana(6, 0.1, 10.0), 6)])
def test_draws_of_a_bent_law_are_nearly_normal_there(law, dim):
    torch.manual_seed(0)
    x = torch.randn(4000, dim, **F64)
    if law is funnel:
        x[:, 0] *= 3
        x[:, 1:] *= (x[:, :1] / 2).exp()
    else:
        x[:, 0] *= 10
        x[:, 1] += 0.1 * (x[:, 0].square() - 100)

    class Drawn:
        def distinct(self):
            return x, torch.full_like(x[:, 0], 1 / len(x))

    joint = LogJoint.from_batched(law, dim)
    moved = sheared(joint, Drawn())
    assert moved.column == 0
    result = populate(moved.log_joint)
    assert result.ess_share > 0.75 and abs(result.log_evidence) < 4 * result.log_evidence_error + 0.01


def test_the_opening_of_a_funnel_is_known_from_few_draws_of_its_mouth():
    # log sd of x given v is v / 2, whatever v is met: an eighth of the draws, none of them in the neck
    torch.manual_seed(0)
    v = 3 * torch.randn(2000, **F64)
    v = v[v > -3][:250]
    x = torch.cat([v[:, None], (v / 2).exp()[:, None] * torch.randn(len(v), 9, **F64)], 1)

    class Drawn:
        def distinct(self):
            return x, torch.full_like(v, 1 / len(v))

    moved = sheared(LogJoint.from_batched(funnel, 10), Drawn())
    assert moved.column == 0
    rates = moved.slopes[1:] / moved.place[1]
    assert abs(float(rates.mean()) - 0.5) < 0.03 and float((rates - 0.5).abs().max()) < 0.12


def test_what_is_normal_is_left_alone():
    torch.manual_seed(0)
    factor = torch.randn(DIM, DIM, **F64)
    x = torch.randn(2000, DIM, **F64) @ factor

    class Drawn:
        def distinct(self):
            return x, torch.full_like(x[:, 0], 1 / len(x))

    assert sheared(LogJoint.from_batched(normal, DIM), Drawn()) is None
    assert math.isfinite(float(normal(x).sum()))
