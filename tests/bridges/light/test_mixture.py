"""Mixture bridges: sources and units, data and contexts of every kind, saving, and what a user may get wrong."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from pyro_sb.bridges import Bridge, LightSB, LightSBBM, TailMatched
from pyro_sb.bridges.data import DrawsEnd, read_held_out
from tests.bridges.light.fits import QUICK, either, pairs, quick, quiet_fit, sources, standard_normal
from tests.ops.potentials import F64


@either
def test_the_source_decides_what_the_density_is(make):
    expected = {"point": "marginal", "draws": None, "law": "path"}
    for kind, source in sources().items():
        bridge = quick(make(2, num_components=3, epsilon=0.5), source=source)
        assert bridge.density == expected[kind]
        if kind != "point":
            with pytest.raises(NotImplementedError, match=r"draws\(\)"):
                bridge().log_prob(torch.zeros(2, **F64))
    with pytest.raises(NotImplementedError, match="Give a distribution as source"):
        quick(make(2, num_components=3, epsilon=0.5), source=sources()["draws"])().draws((5,))


@pytest.mark.parametrize("beta", [4.0, float("inf")])
def test_a_point_may_be_named_as_the_source(beta):
    draws, point = torch.randn(400, 2, **F64), torch.tensor([1.5, -0.5], **F64)
    bridge = LightSBBM(2, num_components=3, beta=beta)
    bridge.fit(draws, point, num_updates=50, progress=False)
    assert bridge.density == "marginal"
    times, states = bridge.paths(5, 3)
    assert torch.allclose(states[0], point.expand(5, 2), atol=1e-9)
    x = torch.randn(4, 2, **F64)
    torch.testing.assert_close(bridge().log_prob(x), bridge.plan(point).log_prob(x))
    nodes = torch.linspace(-8, 8, 161, **F64)
    mass = bridge().log_prob(torch.cartesian_prod(nodes, nodes)).exp().sum() * 0.1**2
    assert abs(mass - 1) < 1e-6
    with pytest.raises(ValueError, match="finite"):
        bridge.fit(draws, torch.tensor([float("nan"), 0.0]), progress=False)


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


# Data


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


def test_full_components_ask_for_more_draws_than_axes():
    with pytest.raises(ValueError, match="more draws than axes, got 9 draws of 10 axes"):
        LightSB(10, num_components=2, covariance="full").fit(torch.randn(9, 10), progress=False)


def test_arrays_are_points_too():
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(100, 2), num_updates=5, progress=False)
    assert bridge.transport(np.zeros((3, 2))).shape == bridge.plan(np.zeros((3, 2))).sample().shape == (3, 2)


COLLINEAR = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), **F64)
COLLINEAR[:, 2] = 2 * COLLINEAR[:, 0]
FLAT = COLLINEAR * torch.tensor([1.0, 0.0, 1.0], **F64)


def test_collinear_axes_are_named_where_components_are_full():
    with pytest.raises(ValueError, match=r"well conditioned.*axes \[(0, 2|2, 0).*covariance=\"diagonal\""):
        LightSB(3, num_components=5, covariance="full").fit(COLLINEAR, progress=False)
    quick(LightSB(3, num_components=5), COLLINEAR)  # diagonal components take it


# Held out by a mask


def test_rows_of_a_mask_are_never_learnt_from():
    held = torch.rand(50) < 0.3
    points = torch.arange(50.0, **F64)[:, None]
    end = DrawsEnd(points, None, points, held)
    learnt = torch.cat([end.batch(7).points for _ in range(40)]).flatten().long()
    assert set(learnt.tolist()) == set((~held).nonzero().flatten().tolist()) and end.num_train == int((~held).sum())
    judged = end.held_out(1000)
    assert set(judged.points.flatten().long().tolist()) == set(held.nonzero().flatten().tolist())
    assert torch.equal(judged.points, judged.context)


def test_a_mask_is_of_all_draws_also_where_some_weigh_nothing():
    target, context = pairs()
    weights, held = torch.ones(400), torch.arange(400) % 5 == 0
    weights[::7] = 0.0
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16,))
    history = quiet_fit(bridge, target, context=context, weights=weights, held_out=held, num_updates=200)
    rows = held & (weights > 0)
    mean = float(bridge(context[rows]).log_prob(target[rows]).mean()) + 2 * float(bridge.scale.log())
    assert min(history.validation_losses) == pytest.approx(-mean, abs=1e-6)


BAD_MASKS = {
    "numbers": (torch.ones(400), r"boolean mask of shape \(400,\), got torch.float32 of shape \(400,\)"),
    "another length": (
        torch.ones(3, dtype=torch.bool),
        r"boolean mask of shape \(400,\), got torch.bool of shape \(3,\)",
    ),
    "all": (torch.ones(400, dtype=torch.bool), "held_out must mark some draws and leave some, got 400 of 400"),
    "none": (torch.zeros(400, dtype=torch.bool), "held_out must mark some draws and leave some, got 0 of 400"),
}


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_bad_masks_are_refused(bad):
    target, context = pairs()
    mask, message = BAD_MASKS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(2, num_components=3, context_dim=3).fit(target, context=context, held_out=mask, **QUICK)


def test_a_mask_needs_draws():
    law = torch.distributions.MultivariateNormal(torch.zeros(2, **F64), torch.eye(2, **F64))
    with pytest.raises(ValueError, match="held_out must be a share where the target is a distribution"):
        LightSB(2, num_components=3).fit(law, held_out=torch.tensor([True, False]), **QUICK)
    assert read_held_out([True, False], 2).tolist() == [True, False]
    assert read_held_out(0.3, 10) == 0.3


# Saving


def test_a_loaded_bridge_asks_for_its_source(tmp_path):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5), source=standard_normal())
    bridge.save(tmp_path / "bridge.pt")
    loaded, x = Bridge.load(tmp_path / "bridge.pt"), torch.randn(5, 2, **F64)
    assert loaded.density == "path"
    for ask in (loaded().sample, loaded().draws, lambda: loaded.paths(3, 2)):
        with pytest.raises(RuntimeError, match=r"Write bridge\.source = "):
            ask()
    assert torch.equal(loaded.plan(x).log_prob(x), bridge.plan(x).log_prob(x))
    draws = []
    loaded.source = standard_normal()
    for each in (bridge, loaded):
        torch.manual_seed(5)
        draws.append(each().draws((7,)))
    assert torch.equal(draws[0].value, draws[1].value) and torch.equal(draws[0].log_q, draws[1].log_q)


def test_source_draws_are_saved(tmp_path):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5), source=torch.randn(50, 2, **F64))
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert torch.equal(loaded.source_points, bridge.source_points) and loaded.density is None
    assert loaded().sample((4,)).shape == (4, 2)


def test_numpy_numbers_are_saved_as_plain_ones(tmp_path):
    bridge = LightSBBM(np.int64(2), num_components=np.int64(2), epsilon=np.float64(0.5), beta=np.float64(4.0))
    bridge.fit(np.random.default_rng(0).normal(size=(100, 2)), num_updates=5, progress=False)
    bridge.save(tmp_path / "bridge.pt")
    assert Bridge.load(tmp_path / "bridge.pt").beta == 4.0


def test_a_loaded_bridge_is_given_its_source_in_the_users_units(tmp_path):
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


# What it prints


def test_a_bridge_says_what_it_is_and_what_it_was_fitted_on(tmp_path):
    bridge = LightSBBM(2, num_components=3, epsilon=0.5, beta=5.0, context_dim=1)
    assert repr(bridge) == "LightSBBM(dim=2, context_dim=1)\n  3 diagonal components, epsilon 0.5, beta 5\n  not fitted"
    quick(bridge, context=torch.randn(300, 1, **F64), num_updates=5)
    assert repr(bridge).endswith('\n  fitted to 300 draws from a point, by 5 updates of solver "dual"')
    bridge.save(tmp_path / "bridge.pt")
    assert repr(Bridge.load(tmp_path / "bridge.pt")) == repr(bridge)
    on_a_law = quick(
        LightSB(2, num_components=3), standard_normal(), standard_normal(), solver="moments", num_updates=2
    )
    assert 'fitted to a distribution from a distribution, by 2 updates of solver "moments"' in repr(on_a_law)


def test_a_file_that_does_not_know_its_fit_still_loads():
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5))
    state = bridge.state_dict()
    del state["_extra_state"]["fitted_to"]  # as files were before
    loaded = LightSB(2, num_components=3, epsilon=0.5)
    loaded.load_state_dict(state)
    x = torch.randn(4, 2, **F64)
    assert torch.equal(loaded().log_prob(x), bridge().log_prob(x)) and repr(loaded).endswith("\n  fitted")


# What a user may get wrong


BAD_ARGUMENTS = {
    "epsilon 0": ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0"),
    "epsilon negative": ({"epsilon": -1.0}, "epsilon must be positive"),
    "epsilon NaN": ({"epsilon": math.nan}, "epsilon must be positive"),
    "epsilon infinite": ({"epsilon": math.inf}, "epsilon must be positive and finite"),
    "no component": ({"num_components": 0}, "num_components must be at least 1, got 0"),
    "covariance": ({"covariance": "spherical"}, "covariance must be one of .*'diagonal', 'full'.*spherical"),
    "no axis": ({"dim": 0}, "dim must be at least 1"),
}


BAD_FITS = {
    "constant axis": (
        {"target": torch.randn(100, 3, **F64) * torch.tensor([1.0, 0.0, 1.0], **F64)},
        r"constant axes \[1\]",
    ),
    "constant far axis": (
        {"target": 1e3 + torch.randn(100, 3, **F64) * torch.tensor([1.0, 0.0, 1.0], **F64)},
        r"constant axes \[1\]",
    ),
    "narrow axis": (
        {"target": torch.randn(100, 3, **F64) * torch.tensor([1.0, 1.0, 1e-9], **F64)},
        r"well conditioned.*axis 2.*Rescale",
    ),
    "more components than draws": ({"target": torch.randn(4, 3, **F64)}, "num_components must be at most.*5 for 4"),
    "more components than learnt from": (
        {"target": torch.randn(40, 3, **F64), "held_out": 0.9},
        r"num_components must be at most.*5 for 4 \(of 40; 90% are held out\)",
    ),
    "source of another dimension": ({"source": torch.randn(100, 2, **F64)}, r"source must have shape \(draws, 3\)"),
    "source law of another dimension": ({"source": standard_normal(2)}, r"source .* shapes \(\) and \(3,\)"),
    "source law with a batch": (
        {"source": Normal(torch.zeros(3), torch.ones(3))},
        r"to_event\(1\)",
    ),
    "target law of another dimension": ({"target": standard_normal(2)}, r"target .* shapes \(\) and \(3,\)"),
    "source with NaN": ({"source": torch.full((10, 3), math.nan)}, "source must be finite"),
    "weights for a law": ({"target": standard_normal(3), "weights": torch.ones(5)}, "weights go with draws"),
    "solver": ({"solver": "sgd"}, "solver must be one of .*'likelihood', 'matching', 'moments'.*sgd"),
    "held out all": ({"held_out": 1.0}, r"held_out must lie in \[0, 1\), got 1"),
    "held out less than none": ({"held_out": -0.1}, "held_out must lie in"),
    "held out NaN": ({"held_out": math.nan}, "held_out must lie in"),
    "superfluous context": ({"context": torch.randn(100, 1)}, "context_dim = 0"),
    "no step": ({"num_updates": -1}, "num_updates must be at least 1"),
    "zero steps": ({"num_updates": 0}, "num_updates must be at least 1"),
    "learning rate": ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(bad):
    options, message = BAD_ARGUMENTS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(**({"dim": 3} | options))


@pytest.mark.parametrize("bad", BAD_FITS)
def test_bad_fits_are_refused(bad):
    options, message = BAD_FITS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(3, num_components=5).fit(**({"target": torch.randn(100, 3, **F64), "progress": False} | options))


def test_bad_questions_are_refused():
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5))
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            bridge.drift(t, torch.zeros(2, **F64))
    for ask in (bridge.transport, bridge.plan, bridge.marginal_log_prob, lambda x: bridge.volatility(0.5, x)):
        with pytest.raises(ValueError, match=r"shape \(\*, 2\), got \(5, 3\)"):
            ask(torch.zeros(5, 3, **F64))
