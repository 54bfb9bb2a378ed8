"""LightSB and LightSBM: known plans, laws and posteriors that they must find."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from benchmarks.lib.known_plan import make_pair
from pyro_sb.bridges import LightSB, LightSBM
from pyro_sb.metrics import Moments, cbw2_uvp
from tests.bridges.light.fits import (
    CENTRES,
    clusters,
    either,
    full_or_not,
    plane,
    quick,
    sources,
    standard_normal,
    z_of_two,
)
from tests.ops.potentials import F64


def same_bridge(a, b, x, tolerance):
    torch.testing.assert_close(a.marginal_log_prob(x), b.marginal_log_prob(x), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("make, steps", [(LightSB, 500), (LightSBM, 500)])
def test_a_known_plan_is_found(make, steps):
    pair = make_pair(2, 1.0, seed=0)
    bridge = make(2, num_components=8, covariance="full", epsilon=1.0)
    history = bridge.fit(
        pair.sample_target(20_000), pair.sample_source(20_000), num_updates=steps, learning_rate=0.02, progress=False
    )
    assert history.converged
    x0 = pair.sample_source(500)
    model, truth = (Moments(*m) for m in (bridge.plan_moments(x0), pair.conditional_moments(x0)))
    assert float(cbw2_uvp(model, truth, pair.target_variance)) < (0.2 if make is LightSB else 0.6)
    t = torch.tensor(0.5, **F64)
    gap = bridge.drift(t, x0) - pair.drift(t, x0)
    error = float((gap.square().sum() / pair.drift(t, x0).square().sum()).sqrt())
    assert error < (0.1 if make is LightSB else 0.2)  # matching is the noisier of the two


def test_draws_of_a_fitted_bridge_are_the_targets():
    target = clusters(10_000)
    bridge = LightSB(2, num_components=6, epsilon=1.0)
    bridge.fit(target, standard_normal(), num_updates=400, learning_rate=0.02, progress=False)
    draws, truth = bridge().sample((5000,)), clusters(5000)
    assert z_of_two(draws, truth).abs().max() < 4
    for k in range(3):
        shares = [(torch.cdist(x, CENTRES).argmin(1, keepdim=True) == k).double() for x in (draws, truth)]
        assert z_of_two(*shares).abs().max() < 4


@pytest.mark.parametrize("kind", ["point", "draws", "law"])
@either
def test_the_fit_is_free_of_units_and_of_the_origin(make, kind):
    # 3 x data with 9 x epsilon gives 3 x draws
    shift = torch.tensor([5.0, -2.0], **F64)
    target, source = clusters(300), sources()[kind]
    moved = source
    if kind == "draws":
        moved = shift + 3 * source
    elif kind == "law":
        moved = MultivariateNormal(shift, 9 * torch.eye(2, **F64))
    draws, drifts, densities, x = [], [], [], torch.randn(20, 2, **F64)
    for factor, origin, data, start in ((1.0, 0.0 * shift, target, source), (3.0, shift, shift + 3 * target, moved)):
        torch.manual_seed(3)
        bridge = quick(make(2, num_components=3, epsilon=factor**2 * 0.5), data, start)
        draws.append((bridge().sample((100,)) - origin) / factor)
        drifts.append(bridge.drift(0.4, origin + factor * x) / factor)
        densities.append(bridge.plan(origin + factor * x).log_prob(origin + factor * x.flip(0)) + 2 * math.log(factor))
    for a, b in (draws, drifts, densities):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@full_or_not
def test_a_linear_gaussian_posterior_is_recovered(covariance):
    # theta ~ N(0, I), y = theta_1 + theta_2 + noise: the posterior is N(y / (2 + s2), I - 11' / (2 + s2))
    noise, num = 0.5, 4000
    theta = torch.randn(num, 2, **F64)
    y = theta.sum(1, keepdim=True) + math.sqrt(noise) * torch.randn(num, 1, **F64)
    bridge = LightSB(
        2,
        num_components=2 if covariance == "full" else 5,
        epsilon=1.0,
        context_dim=1,
        covariance=covariance,
        hidden=(32,),
    )
    bridge.fit(theta, context=y, num_updates=500, learning_rate=5e-3, progress=False)
    given = torch.tensor([[-1.5], [0.0], [2.0]], **F64)
    draws = bridge(given).sample((20_000,))
    cov = torch.eye(2, **F64) - torch.ones(2, 2, **F64) / (2 + noise)
    for i in range(3):
        sample = draws[:, i]
        assert (sample.mean(0) - given[i] / (2 + noise)).abs().max() < 0.08
        assert (sample.T.cov() - cov).abs().max() < 0.08
    points, cell = plane(6.0, 81)
    mass = cell * bridge(given).log_prob(points[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, **F64), rtol=1e-6, atol=1e-6)
    exact = MultivariateNormal(given[1].expand(2) / (2 + noise), cov)
    x = exact.sample((4000,))
    assert (exact.log_prob(x) - bridge(given[1]).log_prob(x)).mean() < 0.03  # KL from the posterior


def test_a_second_fit_forgets_the_first():
    target, bridge = clusters(300), LightSB(2, num_components=3, epsilon=0.5)
    quick(bridge, 100 + 7 * target, standard_normal())
    torch.manual_seed(2)
    quick(bridge, target)
    torch.manual_seed(2)
    fresh = quick(LightSB(2, num_components=3, epsilon=0.5), target)
    assert bridge.density == "marginal"
    same_bridge(bridge, fresh, torch.randn(5, 2, **F64), 1e-12)
