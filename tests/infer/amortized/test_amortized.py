"""AmortizedPosterior: every way to ask for a bridge, what is kept, what is found, and what a user may get wrong."""

import logging
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges.diffusion.vsdm import SGM, VSDM
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.simulator import Simulations
from pyro_sb.nn import SetEmbedding
from tests.infer import open_models as m

QUICK = {"num_simulations": 200, "num_copies": 1, "num_updates": 30, "progress": False}
Y = torch.tensor([0.9, 0.2, 0.7, 1.4, 0.5])
NUMPY = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def unfinished_fits_are_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        yield


def fit(model=m.iid, observed=("y",), *args, bridge="light", embedding=None, **options):
    amortized = AmortizedPosterior(model, observed, bridge=bridge, embedding=embedding)
    amortized.history = amortized.fit(*args, **(QUICK | options))
    return amortized


def black_box():
    mu = pyro.sample("mu", dist.Uniform(-1.0, 1.0))
    return {"y": float(mu) + NUMPY.normal(0.0, 0.5, 5)}


def small_vsdm(dim, context_dim):
    return VSDM(dim, context_dim=context_dim, hidden=(16,), covariance_hidden=(16,))


BRIDGES = {
    "light": ("light", LightSB),
    "vsdm": ("vsdm", VSDM),
    "class": (LightSB, LightSB),
    "instance": (LightSB(7, num_components=3, context_dim=2, hidden=(8,)), LightSB),
    "diffusion": (VSDM(1, context_dim=1, hidden=(8,)), VSDM),
    "function": (small_vsdm, VSDM),
    "another class": (SGM, SGM),
}


@pytest.mark.parametrize("name", BRIDGES)
def test_the_bridge_that_is_asked_for_is_fitted(name):
    bridge, kind = BRIDGES[name]
    amortized = fit(bridge=bridge)
    assert type(amortized.bridge) is kind and amortized.bridge.dim == 1
    assert len(amortized.scores) == 1
    assert amortized.condition(Y).sample(5)["mu"].shape == (5,)
    if name == "instance":  # the options are the user's, the sizes are not, and it is left alone
        assert amortized.bridge is not bridge and amortized.bridge.hidden == (8,)
        assert amortized.bridge.num_components == 3


def test_without_a_bridge_both_are_tried_and_the_better_kept():
    amortized = fit(bridge=None)
    assert set(amortized.scores) == {"light", "vsdm"}
    assert all(math.isfinite(score) for score in amortized.scores.values())
    best = max(amortized.scores, key=amortized.scores.get)
    assert type(amortized.bridge) is {"light": LightSB, "vsdm": VSDM}[best]


@pytest.mark.slow
def test_the_held_out_score_is_near_the_posteriors_own():
    # the mean log density of the exact posterior N(20 / 21 mean, 1 / 21) at its own draws is minus its entropy
    amortized = fit(bridge=None, num_simulations=1000, num_copies=5, num_updates=400)
    entropy = 0.5 * math.log(2 * math.pi * math.e / 21)
    for score in amortized.scores.values():
        assert score == pytest.approx(-entropy, abs=0.15)


def test_what_was_simulated_is_kept_and_serves_again():
    first = fit()
    assert first.simulations.latents.shape == (200, 1) and first.history.seconds > 0
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        m.iid()

    other = AmortizedPosterior(counted, bridge="light")
    other.fit(simulations=first.simulations, num_updates=20, num_copies=0, progress=False)
    assert other.simulations is first.simulations and calls < 100
    assert other.condition(Y).sample(3)["mu"].shape == (3,)


def test_a_second_fit_replaces_the_first():
    amortized = fit()
    bridge = amortized.bridge
    amortized.fit(7, **QUICK)
    assert amortized.bridge is not bridge
    assert amortized.condition(torch.cat([Y, Y[:2]])).sample(2)["mu"].shape == (2,)
    with pytest.raises(ValueError, match=r"trained on, \(7,\)"):
        amortized.condition(Y)


def test_simulations_that_are_not_finite():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.where(mu > 1, torch.nan, mu), 1.0))

    with pytest.raises(ValueError, match=r"NaN or infinity in \d+ of 200, by site \{'y': \d+\}.*keep_finite=True"):
        fit(model)
    kept = fit(model, keep_finite=True)
    assert 140 < len(kept.simulations.latents) < 190
    assert kept.condition(0.3).sample(4)["mu"].shape == (4,)


def test_finite_ones_of_given_simulations_are_kept():
    given = fit().simulations
    given = Simulations(given.latents.clone(), given.observations.clone())
    given.observations[:7, 0] = torch.inf
    kept = fit(simulations=given, keep_finite=True)
    assert len(kept.simulations.latents) == 193


def test_exchangeable_items_are_found_and_their_order_does_not_matter():
    amortized = fit()
    assert amortized.exchangeable == {"y": 5}
    a, b = amortized.condition(Y), amortized.condition(Y.flip(0))
    mu = torch.linspace(-1, 2, 20)
    torch.testing.assert_close(a.log_prob({"mu": mu}), b.log_prob({"mu": mu}), rtol=1e-4, atol=1e-4)
    assert fit(m.poisson, ("y",), torch.linspace(-1, 1, 6)).exchangeable == {}


def test_an_embedding_is_learnt_and_knows_no_order():
    torch.set_default_dtype(torch.float64)
    embedding = SetEmbedding(1, 4, hidden=(16,)).double()
    before = [p.detach().clone() for p in embedding.parameters()]
    amortized = fit(embedding=embedding)
    learnt = amortized.bridge.parameters_of.embedding
    assert any(not torch.equal(a, b) for a, b in zip(before, learnt.parameters()))
    mu = torch.linspace(-1, 2, 20)
    a, b = amortized.condition(Y.double()), amortized.condition(Y.double()[torch.tensor([3, 1, 4, 0, 2])])
    torch.testing.assert_close(a.log_prob({"mu": mu}), b.log_prob({"mu": mu}), rtol=1e-9, atol=1e-9)
    c = amortized.condition(Y.double() + 0.4)
    assert (a.log_prob({"mu": mu}) - c.log_prob({"mu": mu})).abs().max() > 0.1


def test_two_candidates_do_not_share_what_they_learn_of_an_embedding():
    embedding = SetEmbedding(1, 4, hidden=(16,))
    before = [p.detach().clone() for p in embedding.parameters()]
    amortized = fit(bridge=None, embedding=embedding)
    assert all(torch.equal(a, b) for a, b in zip(before, embedding.parameters()))
    assert all(module is not embedding for module in amortized.bridge.modules())


def test_an_embedding_of_the_bridges_own_is_refused():
    with pytest.raises(ValueError, match=r"must not bring an embedding of its own.*AmortizedPosterior\(\.\.\., emb"):
        fit(bridge=LightSB(1, context_dim=5, embedding=SetEmbedding(1, 4)))


@pytest.mark.parametrize(
    "bridge", ["vsdm", LightSB, LightSB(1, num_components=3, context_dim=1)], ids=["vsdm", "class", "instance"]
)
def test_every_bridge_takes_an_embedding(bridge):
    embedding = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh())  # a user's own
    assert fit(bridge=bridge, embedding=embedding).condition(Y).sample(3)["mu"].shape == (3,)


@pytest.mark.filterwarnings("ignore:Pareto k")  # of a quick fit, at some seeds; the mean is right all the same
def test_two_sites_as_a_dict():
    amortized = fit(m.two_sites, ("a", "b"), num_copies=3, num_updates=200, num_simulations=600)
    y = {"b": torch.tensor([1.0, 0.4]), "a": torch.tensor(0.8)}
    posterior = amortized.condition(y)
    # mu given a ~ N(mu, .25) and two b ~ N(mu, 1): precision 1 + 4 + 2
    mean, deviation = (4 * 0.8 + 1.4) / 7, 7**-0.5
    draws = posterior.sample(4000)["mu"]
    assert abs(float(draws.mean()) - mean) < 0.25 * deviation and abs(float(draws.std()) / deviation - 1) < 0.2
    result = posterior.importance(4000)
    error = float(result.expectation(result.sites["mu"])) - mean
    assert abs(error / deviation) * (4000 * result.ess_share) ** 0.5 < 4


def test_a_black_box_with_noise_of_numpy():
    amortized = fit(black_box, num_copies=None)
    assert amortized.exchangeable == {}  # there is no density to ask
    draws = amortized.condition({"y": Y}).sample(500)["mu"]
    assert bool((draws.abs() <= 1).all())
    with pytest.raises(NotImplementedError, match=r"got a black-box simulator that returns its observations"):
        fit(black_box, num_copies=4)


def test_discrete_latents_beside_continuous_ones_are_integrated_out():
    amortized = fit(m.discrete, num_copies=None)
    assert amortized.condition(0.3).sample(5)["mu"].shape == (5,)
    one = amortized.condition(0.3).importance(200)  # by enumeration
    assert one.ess_share > 0.1
    with pytest.raises(NotImplementedError, match=r"no sums over discrete sites, got \['k'\]"):
        amortized.condition(torch.tensor([0.3, 0.5])).importance(200)


def test_where_the_density_runs_row_by_row_nothing_is_rejuvenated(caplog):
    with caplog.at_level(logging.INFO, "pyro_sb"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        amortized = fit(m.needs_loop, num_copies=None)
    assert "not rejuvenated" in caplog.text
    assert amortized.condition(0.5).sample(3)["mu"].shape == (3,)


def test_the_checkpoints_of_two_candidates_have_their_names(tmp_path):
    fit(bridge=None, checkpoint=tmp_path / "fit.pt")
    assert {path.name for path in tmp_path.iterdir()} >= {"fit.pt.light", "fit.pt.vsdm"}
    fit(checkpoint=tmp_path / "one.pt")
    assert (tmp_path / "one.pt").exists()


def test_options_reach_the_bridges_fit():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        fit(bridge_options={"batch_size": 0})
    assert fit(bridge_options={"batch_size": 32, "learning_rate": 1e-3}).history.iterations > 0


# ---- what a user may get wrong ----


def all_discrete():
    pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.5)), 1.0))


BAD_FITS = {
    "no simulation": ({"num_simulations": 0}, "num_simulations must be at least 1, got 0"),
    "too few": ({"num_simulations": 5}, r"at least 20 finite ones for 1 latents, got 5. Write 10_000"),
    "negative copies": ({"num_copies": -1}, "num_copies must be at least 0, got -1"),
    "all missing": ({"missing": 1.0}, r"missing must lie in \[0, 1\), got 1.0"),
    "negative missing": ({"missing": -0.1}, r"missing must lie in \[0, 1\)"),
    "missing NaN": ({"missing": math.nan}, r"missing must lie in \[0, 1\)"),
    "none held out": ({"held_out": 0.0}, r"held_out must lie in \(0, 1\), got 0.0"),
    "all held out": ({"held_out": 1.0}, r"held_out must lie in \(0, 1\), got 1.0"),
    "held out so much that none is left": ({"held_out": 0.999}, "held_out must leave"),
    "simulations of another model": (
        {"simulations": Simulations(torch.randn(50, 3), torch.randn(50, 5))},
        r"simulations must have 1 latents and 5 numbers an observation, got \(50, 3\) and \(50, 5\)",
    ),
    "simulations of another size": (
        {"simulations": Simulations(torch.randn(50, 1), torch.randn(50, 4))},
        r"5 numbers an observation, got \(50, 1\) and \(50, 4\)",
    ),
    "simulations with NaN": (
        {"simulations": Simulations(torch.randn(50, 1), torch.full((50, 5), torch.nan))},
        r"must be finite, got NaN or infinity in 50 of 50",
    ),
    "no step": ({"num_updates": 0}, "num_updates must be at least 1"),
}


@pytest.mark.parametrize("bad", BAD_FITS)
def test_bad_fits_are_refused(bad):
    options, message = BAD_FITS[bad]
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match=r"must have the observed sites \['z'\], got \['mu', 'y'\]"):
        fit(observed=("z",))
    with pytest.raises(ValueError, match=r"continuous latent site, got only discrete ones, \['k'\]"):
        fit(all_discrete)
    with pytest.raises(TypeError, match="model must be a Pyro model, a function, got str"):
        AmortizedPosterior("model")


@pytest.mark.parametrize("bridge", ["flow", 3])
def test_bad_bridges_are_refused(bridge):
    with pytest.raises(ValueError, match='bridge must be "light", "vsdm", a bridge, its class or a function, got'):
        AmortizedPosterior(m.iid, bridge=bridge)


def test_a_bridge_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must give a bridge of these sizes, \(1, \d+\)"):
        fit(bridge=lambda dim, context_dim: LightSB(dim + 1, context_dim=context_dim))


def test_bad_observations_are_refused():
    with pytest.raises(RuntimeError, match=r"condition needs a fitted posterior: call fit\("):
        AmortizedPosterior(m.iid).condition(Y)
    amortized = fit()
    for y, message in (
        (Y[:3], r"trained on, \(5,\).*got \(3,\)"),
        (torch.tensor([0.0, math.nan, 0.0, 0.0, 0.0]), r"fit\(\.\.\., missing=0.5\)"),
        ({"x": Y}, r"sites \['y'\], got \['x'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            amortized.condition(y)
    with pytest.warns(RuntimeWarning, match=r"y lies \d+ standard deviations.*farthest simulation lies"):
        amortized.condition(Y + 100)


def test_a_fit_that_was_refused_leaves_the_posterior_as_it_was():
    amortized = fit()
    bridge = amortized.bridge
    with pytest.raises(ValueError, match="num_updates"):
        amortized.fit(7, **(QUICK | {"num_updates": 0}))
    assert amortized.bridge is bridge
    assert amortized.condition(Y).sample(2)["mu"].shape == (2,)
