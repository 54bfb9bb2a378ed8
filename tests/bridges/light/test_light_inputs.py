"""What users hand over: narrow axes, zero weights, repeated draws, other dtypes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import pyro_sb.bridges.light.parameters as mixture_start
from pyro_sb.bridges import Bridge, LightSB, LightSBBM, TailMatched

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("width", [1e-2, 1e-4])
def test_a_narrow_axis_keeps_its_width(covariance, width):
    draws = torch.randn(400, 2, **F64) * torch.tensor([1.0, width], **F64)
    bridge = LightSB(2, num_components=4, covariance=covariance)
    bridge.fit(draws, num_updates=200, progress=False)
    ratio = bridge().sample((20_000,)).std(0) / draws.std(0)
    assert bool((ratio - 1).abs().max() < 0.1)


def test_an_axis_too_narrow_for_beta_is_named():
    draws = torch.randn(400, 2, **F64) * torch.tensor([1.0, 1e-4], **F64)
    with pytest.warns(RuntimeWarning, match=r"narrowest axis .* beta = 10 no component is narrower.* Raise beta"):
        LightSBBM(2, num_components=2).fit(draws, num_updates=5, progress=False)


@pytest.mark.parametrize("conditional", [False, True])
def test_draws_of_no_weight_are_no_draws(conditional):
    draws, context = torch.randn(200, 1, **F64), torch.randn(200, 1, **F64)
    weights = torch.ones(200, **F64)
    weights[:80], draws[:80] = 0.0, 1e6
    bridge = LightSB(1, num_components=3, context_dim=int(conditional))
    bridge.fit(draws, context=context if conditional else None, weights=weights, num_updates=20, progress=False)
    sample = bridge(torch.zeros(1, **F64)) if conditional else bridge()
    assert sample.sample((1000,)).abs().max() < 100


def test_repeated_draws_are_counted_once():
    with pytest.raises(ValueError, match="distinct draws, got 5 for 4"):
        LightSB(2, num_components=5).fit(torch.randn(4, 2).repeat(50, 1), progress=False)


def test_a_constant_context_is_no_news():
    context = torch.full((200, 1), 1000.1)
    bridge = LightSB(1, num_components=2, context_dim=1)
    bridge.fit(torch.randn(200, 1), context=context, num_updates=20, progress=False)
    assert bool((bridge(context[:1]).sample((500,)).abs() < 10).all())


def test_points_of_another_dtype_are_taken():
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2), num_updates=5, progress=False)
    x = torch.randn(3, 2, **F64)
    torch.testing.assert_close(bridge().log_prob(x), bridge().log_prob(x.float()))


def test_numpy_numbers_are_saved_as_plain_ones(tmp_path):
    bridge = LightSBBM(np.int64(2), num_components=np.int64(2), epsilon=np.float64(0.5), beta=np.float64(4.0))
    bridge.fit(np.random.default_rng(0).normal(size=(100, 2)), num_updates=5, progress=False)
    bridge.save(tmp_path / "bridge.pt")
    assert Bridge.load(tmp_path / "bridge.pt").beta == 4.0


@pytest.mark.parametrize("options", [{"num_updates": 0}, {"learning_rate": 0.0}, {"batch_size": 0}], ids=str)
def test_a_refused_fit_leaves_the_bridge_as_it_was(options):
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2), num_updates=5, progress=False)
    before = {key: value.clone() for key, value in bridge.state_dict().items() if torch.is_tensor(value)}
    with pytest.raises(ValueError, match=next(iter(options))):
        bridge.fit(5 + torch.randn(100, 2), progress=False, **options)
    assert all(torch.equal(before[key], bridge.state_dict()[key]) for key in before)


@pytest.mark.parametrize("beta", [5.0, float("inf")])
@pytest.mark.parametrize("offset", [30.0, 1e5])
def test_a_far_source_costs_nothing(beta, offset):
    # a shift of one side moves the drift by a constant, the dual by half its square, and nothing else
    draws, start = 2 * torch.randn(600, 1, **F64), torch.randn(600, 1, **F64)
    seen = []
    for shift in (0.0, offset):
        torch.manual_seed(0)
        bridge = LightSBBM(1, num_components=4, beta=beta)
        bridge.fit(draws, start + shift, num_updates=60, progress=False)
        gap = float(bridge.location - bridge.source_location)
        torch.manual_seed(1)
        ends = bridge.transport(start + shift)
        x = bridge.units(0.3).back(torch.linspace(-2, 2, 5, **F64)[:, None])
        times, states = bridge.paths(4, 3)
        centred = states[1] - bridge.units(times[1]).location
        dual = bridge.dual(start + shift, draws)
        moved = dual - gap * float(draws.mean() - start.mean() - shift - gap / 2)
        drift, volatility = bridge.drift(0.3, x) - gap, bridge.volatility(0.3, x)
        seen.append((ends, drift, volatility, centred, torch.tensor(moved), bridge.plan(start + shift).log_prob(draws)))
    for near, far in zip(*seen):
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-9 * offset)


def test_a_saturated_epsilon_warns():
    with pytest.warns(RuntimeWarning, match=r"epsilon is .* below 0.001: gates saturate.*Raise epsilon"):
        LightSB(1, num_components=2, epsilon=1e-5).fit(
            torch.randn(99, 1), torch.randn(99, 1), num_updates=2, progress=False
        )


@pytest.mark.parametrize("epsilon", [1e-2, 1e-8])
def test_one_component_is_exact_at_any_epsilon(epsilon):
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(400, **F64) + 0.5) / 400)[:, None]
    bridge = LightSB(1, num_components=1, epsilon=epsilon)
    with pytest.warns(RuntimeWarning) if epsilon < 1e-3 else nullcontext():
        bridge.fit(2 * z, z, solver="moments", held_out=0.0, progress=False)
    assert abs(bridge.transport(z).std() / (2 * z).std() - 1) < 0.02


def test_a_fit_that_fails_before_it_learns_leaves_the_bridge_as_it_was(monkeypatch):
    bridge = LightSBBM(2, num_components=2, beta=4.0)
    bridge.fit(torch.randn(100, 2, **F64), num_updates=5, progress=False)
    x = torch.randn(4, 2, **F64)
    before = bridge().log_prob(x)

    def fails(*args, **kwargs):
        raise RuntimeError("no clusters")

    monkeypatch.setattr(mixture_start, "_clusters", fails)
    with pytest.raises(RuntimeError, match="no clusters"):
        bridge.fit(7 + torch.randn(100, 2, **F64), torch.randn(100, 2, **F64), progress=False)
    assert bridge.density == "marginal"
    torch.testing.assert_close(bridge().log_prob(x), before, rtol=0, atol=0)


def test_a_loaded_bridge_is_told_its_source_in_the_users_units(tmp_path):
    source = torch.distributions.Independent(torch.distributions.Normal(torch.full((1,), 3.0, **F64), 0.1), 1)
    bridge = TailMatched(LightSB(1, num_components=2), df=2.0)
    bridge.fit(torch.randn(200, 1, **F64), source, num_updates=5, progress=False)
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    with pytest.raises(RuntimeError, match=r"bridge.source = "):
        loaded().sample()
    loaded.source = source
    times, states = loaded.paths(2000, 2)
    assert abs(states[0].mean() - 3) < 4 * 0.1 / 2000**0.5 and abs(states[0].std() - 0.1) < 0.01


def test_full_components_ask_for_more_draws_than_axes():
    with pytest.raises(ValueError, match="more draws than axes, got 9 draws of 10 axes"):
        LightSB(10, num_components=2, covariance="full").fit(torch.randn(9, 10), progress=False)


def test_arrays_are_points_too():
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2), num_updates=5, progress=False)
    assert bridge.transport(np.zeros((3, 2))).shape == bridge.plan(np.zeros((3, 2))).sample().shape == (3, 2)
