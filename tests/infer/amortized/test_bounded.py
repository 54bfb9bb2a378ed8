"""Probit coordinates: two maps that invert each other in both tails, their slope, and a uniform prior made normal."""

import math

import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_sb.infer.amortized.latent_law import from_probit, is_logit, log_slope, to_probit


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


WIDE = torch.cat([torch.linspace(-500, 500, 401, dtype=torch.float64), torch.linspace(-3, 3, 61, dtype=torch.float64)])


def test_the_maps_invert_each_other_in_both_tails():
    torch.testing.assert_close(from_probit(to_probit(WIDE)), WIDE, rtol=1e-9, atol=1e-9)
    t = torch.linspace(-30, 30, 201)
    torch.testing.assert_close(to_probit(from_probit(t)), t, rtol=1e-9, atol=1e-9)


def test_in_float32_nothing_overflows():
    u = torch.tensor([-1e4, -300.0, -20.0, 0.0, 20.0, 300.0, 1e4], dtype=torch.float32)
    t = to_probit(u)
    assert bool(torch.isfinite(t).all()) and bool((t.diff() > 0).all())
    torch.testing.assert_close(from_probit(t[1:-1]), u[1:-1], rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(log_slope(u)).all())


def test_the_log_slope_is_the_derivative():
    u = WIDE.clone().requires_grad_()  # 0 is among them
    (slope,) = torch.autograd.grad(to_probit(u).sum(), u)
    torch.testing.assert_close(slope.log(), log_slope(WIDE), rtol=1e-7, atol=1e-7)
    assert float(log_slope(torch.tensor(0.0))) == pytest.approx(math.log(math.sqrt(2 * math.pi) / 4), abs=1e-12)


def test_a_uniform_prior_becomes_standard_normal():
    # u = logit of p, p uniform: the distribution function of t at to_probit(u) is p
    p = torch.linspace(0.001, 0.999, 500)
    torch.testing.assert_close(torch.special.ndtr(to_probit(torch.logit(p))), p, rtol=1e-12, atol=1e-12)
    # and the prior's density carried over, sigma' du/dt, is the normal one
    u = torch.linspace(-40, 40, 401)
    log_prior = torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(to_probit(u))
    torch.testing.assert_close(log_prior - log_slope(u), normal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("support", "logit"),
    [
        (constraints.unit_interval, True),
        (constraints.interval(-2.0, 5.0), True),
        (constraints.independent(constraints.interval(torch.zeros(3), torch.ones(3)), 1), True),
        (constraints.positive, False),
        (constraints.greater_than(2.0), False),
        (constraints.real, False),
        (constraints.independent(constraints.real, 1), False),
        (constraints.simplex, False),
    ],
)
def test_logits_are_told_from_other_transforms(support, logit):
    assert is_logit(biject_to(support).inv) is logit
