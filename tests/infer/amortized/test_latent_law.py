"""The law of latents: a density over u, by any route; draws that carry it; residuals that are white."""

import warnings

import pytest
import torch

from pyro_sb.bridges.diffusion.vsdm import VSDM
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.infer.amortized.latent_law import LatentLaw, Residuals, with_ones


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def pairs(dim, bounded, num=400):
    features = torch.randn(num, 2)
    latents = features @ torch.randn(2, dim) + torch.randn(num, dim) @ torch.randn(dim, dim)
    judged = torch.zeros(num, dtype=torch.bool)
    judged[::10] = True
    return Residuals.fit(latents[None], features, torch.tensor(bounded), judged), latents, features


def law_of(dim, bounded, bridge=None, rows=3, **options):
    residuals, latents, features = pairs(dim, bounded)
    bridge = (
        LightSB(dim, num_components=3, context_dim=2, covariance="full", hidden=(16,)) if bridge is None else bridge
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        white = residuals.encode(latents, features)[0]
        bridge.fit(white, context=features, progress=False, num_updates=60, **options)
    return LatentLaw(bridge, residuals, features[:rows], features[:rows])


@pytest.mark.parametrize("bounded", [False, True])
def test_the_density_has_the_integral_one_over_latents(bounded):
    law = law_of(1, [bounded])
    u = torch.linspace(-40, 40, 40_001)
    density = law.log_prob(u[:, None, None].expand(-1, 3, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, u, dim=0), torch.ones(3), rtol=1e-6, atol=1e-6)


def test_the_density_is_the_bridges_by_change_of_variables():
    law = law_of(3, [False, True, True])
    u = torch.randn(5, 3, 3)
    white, slope = law.residuals.encode(u, law.features)
    for i in range(5):
        for b in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, b=b: law.residuals.encode(x, law.features[b])[0], u[i, b]
            )
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], slope[i, b], rtol=1e-10, atol=1e-10)
    expected = law.bridge(law.context).log_prob(white) + slope
    torch.testing.assert_close(law.log_prob(u), expected, rtol=1e-10, atol=1e-10)


def test_decoding_inverts_encoding():
    law = law_of(3, [False, True, False])
    u = 4 * torch.randn(6, 3, 3)
    torch.testing.assert_close(law.residuals.decode(law.residuals.encode(u, law.features)[0], law.features), u)


def test_residuals_are_white_and_know_nothing_of_the_features():
    residuals, latents, features = pairs(3, [False, True, False], num=20_000)
    white = residuals.encode(latents, features)[0]
    torch.testing.assert_close(white.T.cov(), torch.eye(3), rtol=0.08, atol=0.04)  # raised where the judged vary more
    assert (white.T @ with_ones(features) / len(white)).abs().max() < 0.03


def test_copies_of_a_simulation_do_not_count_as_simulations():
    # 200 regressors and 400 simulations: in-sample residuals flatter themselves; what is held out must come out white
    features, judged = torch.randn(400, 200), torch.arange(400) % 4 == 0
    latents = features[:, :1] + torch.randn(400, 2)
    residuals = Residuals.fit(latents.expand(5, 400, 2), features, torch.tensor([False, False]), judged)
    spread = residuals.encode(latents[judged], features[judged])[0].square().mean()
    assert 0.8 < spread < 1.25


def test_draws_carry_the_density_of_their_points():
    law = law_of(2, [False, True])
    u, log_q = law.draws(50)
    assert law.marginal and u.shape == (50, 3, 2) and log_q.shape == (50, 3)
    torch.testing.assert_close(log_q, law.log_prob(u), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(law.path_log_prob(u), log_q, rtol=1e-8, atol=1e-8)
    assert law.sample(7).shape == (7, 3, 2)


def test_the_gradient_is_the_densitys():
    law = law_of(2, [False, True])
    u = torch.randn(4, 3, 2)
    value, grad = law.value_and_grad(u)
    torch.testing.assert_close(value, law.log_prob(u))
    for axis in range(2):
        step = torch.zeros(2)
        step[axis] = 1e-5
        slope = (law.log_prob(u + step) - law.log_prob(u - step)) / 2e-5
        torch.testing.assert_close(grad[..., axis], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True])
def test_path_weights_have_the_mean_one(bounded):
    # For a normalised p, E_q[p / q] over the draws of paths is 1, exactly, at any fit
    law = law_of(1, [bounded], VSDM(1, context_dim=2, hidden=(32,), covariance_hidden=(16,)), rows=1)
    assert not law.marginal
    u, log_q = law.draws(4000)
    centre, spread = u.mean(0), 0.7 * u.std(0)
    log_p = torch.distributions.Normal(centre, spread).log_prob(u).sum(-1)
    weights = (log_p - log_q).exp()
    assert abs(float((weights.mean() - 1) / weights.std() * 4000**0.5)) < 4
    # and the mean weight of paths drawn backwards from points is a density of points
    grid = torch.linspace(float(centre - 7 * spread), float(centre + 7 * spread), 60)
    density = law.path_log_prob(grid[:, None, None], 128).exp()[:, 0]
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=0.05)
