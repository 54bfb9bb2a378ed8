"""Joint draws of a model: their law, every way to observe, and what is refused by name."""

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer.amortized.simulator import simulator
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


NUMPY = np.random.default_rng(0)  # noise that torch knows nothing of
X = torch.linspace(-1, 1, 6, dtype=torch.float64)


def z_scores(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


def black_box():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return mu + torch.as_tensor(NUMPY.normal(0.0, 0.5, 3))


def black_box_of_a_dict():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return {"a": mu + 0.1 * NUMPY.normal(), "b": NUMPY.normal(size=2), "unused": "text"}


def black_box_of_deterministic_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", mu + torch.as_tensor(NUMPY.normal(0.0, 0.5, 3)))


@pytest.mark.parametrize("model", [m.iid, m.iid_vector, black_box, black_box_of_deterministic_sites])
def test_pairs_have_the_joint_law(model):
    pairs = simulator(model).simulate(4000)
    mu, y = pairs.latents[:, 0], pairs.observations
    noise = y - mu[:, None]
    moments = torch.stack([mu, mu.square(), noise[:, 0], noise[:, 0] ** 2, noise[:, 0] * noise[:, 1], mu * y[:, 1]], 1)
    assert z_scores(moments, torch.tensor([0.0, 1.0, 0.0, 0.25, 0.0, 1.0])).abs().max() < 4


def test_latents_are_unconstrained_and_observations_packed():
    pairs = simulator(m.bounded_and_positive).simulate(3000)
    p = -1 + 4 * torch.sigmoid(pairs.latents[:, 0])
    log_scale = pairs.latents[:, 1]
    white = (pairs.observations - p[:, None]) / log_scale.exp()[:, None]
    moments = torch.stack([p, (p - 1).square(), log_scale, log_scale**2, white[:, 0] ** 2, white[:, 0] * p], 1)
    assert z_scores(moments, torch.tensor([1.0, 16 / 12, 0.0, 0.25, 1.0, 0.0])).abs().max() < 4


def test_arguments_reach_the_model():
    source = simulator(m.poisson, args=(X,))
    pairs = source.simulate(3000)
    rate = (pairs.latents[:, :1] + pairs.latents[:, 1:] * X).exp()
    error = pairs.observations - rate
    assert z_scores(torch.cat([error, error.square() - rate], 1), torch.zeros(12)).abs().max() < 4
    with_keyword = simulator(m.iid, kwargs={"num": 3}).simulate(4)
    assert with_keyword.observations.shape == (4, 3)


def test_two_sites_stand_side_by_side_in_one_order():
    source = simulator(m.two_sites, ("b", "a"))
    pairs = source.simulate(2000)
    sites = source.data.unpack(pairs.observations)
    assert sites["a"].shape == (2000,) and sites["b"].shape == (2000, 2)
    assert abs(float(z_scores((sites["a"] - pairs.latents[:, 0]).square()[:, None], torch.tensor([0.25])))) < 4
    given = simulator(black_box_of_a_dict, ("a", "b"))
    assert given.returned and given.data.unpack(given.simulate(5).observations)["b"].shape == (5, 2)


def test_what_vmap_cannot_run_is_run_one_by_one(caplog):
    with caplog.at_level(logging.INFO, "pyro_sb"):
        pairs = simulator(m.needs_loop).simulate(2000)
    assert "cannot be run by vmap" in caplog.text
    error = (pairs.observations - pairs.latents)[:, 0]
    squares = torch.where(pairs.latents[:, 0] > 0, error**2 - 1, error**2 - 4)
    assert z_scores(torch.stack([error, squares], 1), torch.zeros(2)).abs().max() < 4


def test_batches_join(monkeypatch):
    monkeypatch.setattr("pyro_sb.infer.model.runs.MAX_NUMBERS", 60)
    pairs = simulator(m.iid).simulate(25)
    assert pairs.observations.shape == (25, 5) and len(pairs.latents.unique()) == 25


def test_the_conditioned_model_holds_the_data():
    source = simulator(m.iid)
    trace = pyro.poutine.trace(source.conditioned({"y": torch.arange(5.0)})).get_trace()
    assert trace.nodes["y"]["is_observed"] and torch.equal(trace.nodes["y"]["value"], torch.arange(5.0))


def test_nothing_is_left_in_pyros_store_or_stack():
    def model():
        scale = pyro.param("scale", torch.tensor(2.0))
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale))

    with pyro.poutine.trace() as outer:
        simulator(model).simulate(10)
    assert not any(node["type"] == "sample" for node in outer.trace.nodes.values())


# ---- simulations that are not finite ----


def sometimes_infinite():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(mu, 1.0))
    pyro.sample("b", dist.Normal(torch.where(mu > 1, torch.nan, a), 1.0).expand([2]).to_event(1))


def test_simulations_that_are_not_finite_are_counted_by_site():
    source = simulator(sometimes_infinite, ("a", "b"))
    with pytest.raises(ValueError, match=r"got NaN or infinity in (\d+) of 500, by site \{'b': \1\}.*keep_finite"):
        source.simulate(500)


def test_finite_ones_are_kept_if_the_user_says_so(caplog):
    source = simulator(sometimes_infinite, ("a", "b"))
    pairs = source.simulate(500, keep_finite=True)
    assert 350 < len(pairs.latents) < 480 and bool((pairs.latents < 1).all())
    assert bool(torch.isfinite(pairs.observations).all())
    assert "of 500 simulations are not finite" in caplog.text and "'b'" in caplog.text


# ---- what is refused ----


def held():
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))


def all_discrete():
    pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.5)), 1.0))


def no_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0))


def returns_its_site():
    return pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0))


def returns_its_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return {"y": pyro.sample("x", dist.Normal(mu, 1.0)), "mu": mu}


def returns_half():
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    return {"a": 1.0}


BAD_MODELS = {
    "missing site": (m.iid, ("z",), r"observed sites \['z'\], got \['mu', 'y'\].*observed="),
    "one of two": (m.two_sites, ("a", "c"), r"observed sites \['a', 'c'\], got \['a', 'b', 'mu'\]"),
    "half a dict": (returns_half, ("a", "b"), r"observed sites \['a', 'b'\], got \['mu'\]"),
    "no name": (m.iid, (), "observed must name at least one site"),
    "data held": (held, ("y",), r"must be open to be simulated, got data at \['y'\].*condition\(y\)"),
    "all discrete": (all_discrete, ("y",), r"continuous latent site, got only discrete ones, \['k'\]"),
    "no latent": (no_latent, ("y",), "continuous latent site, got none"),
    "returns a site": (returns_its_site, ("y",), r"returns its sample site 'x'.*observed=\(\"x\",\)"),
    "returns sites": (returns_its_sites, ("y",), r"returns its sample site 'x'"),
}


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_bad_models_are_refused(bad):
    model, observed, message = BAD_MODELS[bad]
    with pytest.raises(ValueError, match=message):
        simulator(model, observed)


def test_one_name_needs_no_tuple():
    assert simulator(m.iid, "y").observed == ("y",)


@pytest.mark.parametrize("num", [0, -3])
def test_no_simulation_is_refused(num):
    with pytest.raises(ValueError, match=f"num_simulations must be at least 1, got {num}"):
        simulator(m.iid).simulate(num)


def test_a_black_box_whose_size_changes_is_refused():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        model.calls = getattr(model, "calls", 0) + 1
        return mu + torch.zeros(3 if model.calls < 5 else 4)

    with pytest.raises(ValueError, match=r"observed 'y' must have one shape at every run, got \(3,\) and \(4,\)"):
        simulator(model).simulate(10)
