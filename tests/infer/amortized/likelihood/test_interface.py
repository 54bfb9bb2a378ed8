"""Ways to train a likelihood and to call it, what is kept on disk, and what a user may get wrong."""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import VSDM, LightSB, LightSBBM
from pyro_sb.files import write_file
from pyro_sb.infer import AmortizedLikelihood, LikelihoodDistribution, LikelihoodPairs

QUICK = {"num_simulations": 200, "num_updates": 10, "progress": False}
UNIT = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


@pytest.fixture(autouse=True)
def unfinished_fits_are_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*outside the region", category=RuntimeWarning)
        yield


def sums(theta):
    return theta.sum(1, keepdim=True) + torch.randn(len(theta), 1)


def by_name(level, scale, shift=0.0):
    return level[:, None] + shift + scale[:, None] * torch.randn(len(level), 3)


def one_run(shift=0.0):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    return pyro.sample("y", dist.Normal(level + shift, scale))


def black_box():
    level = pyro.sample("level", dist.Uniform(-1.0, 1.0))
    return {"y": np.random.default_rng(0).normal(float(level), 1.0, 2)}


def mixed(theta):
    return torch.stack([torch.bernoulli(torch.sigmoid(theta[:, 0])), torch.randn(len(theta)).exp()], 1)


def fitted(simulator=sums, observed="y", *args, proposal=UNIT, discrete=(), bridge="light", **options):
    likelihood = AmortizedLikelihood(simulator, observed, proposal=proposal, discrete=discrete, bridge=bridge)
    likelihood.history = likelihood.fit(*args, **(QUICK | options))
    return likelihood


@functools.cache
def quick():
    return fitted()


LAWS = {"level": dist.Normal(0.0, 1.0), "scale": dist.LogNormal(0.0, 0.5)}


def test_parameters_by_name_of_a_function_and_of_a_model():
    for likelihood, event in ((fitted(by_name, proposal=LAWS), (3,)), (fitted(one_run, proposal=None), ())):
        law = likelihood(level=torch.zeros(4, 1), scale=torch.ones(5))
        assert isinstance(law, LikelihoodDistribution) and law.batch_shape == (4, 5) and law.event_shape == event
        same = likelihood({"level": torch.zeros(4, 1), "scale": torch.ones(5)})
        y = law.sample()
        assert torch.equal(law.log_prob(y), same.log_prob(y))
        assert "level" in repr(likelihood) and "level" in repr(law)


def test_arguments_of_the_simulator_reach_it():
    assert float(fitted(by_name, proposal=LAWS, shift=50.0).simulations.y.mean()) > 40
    assert float(fitted(one_run, "y", 50.0, proposal=None).simulations.y.mean()) > 40


def test_a_function_that_returns_its_data_is_a_model_too():
    law = fitted(black_box, proposal=None)(torch.tensor(0.3))
    assert law.event_shape == (2,) and law.batch_shape == ()


def test_pairs_of_any_law_serve_and_earlier_ones_again():
    theta, y = torch.randn(200, 2), torch.randn(200, 3)
    likelihood = AmortizedLikelihood()
    likelihood.fit(simulations=(theta, y), **QUICK)
    assert likelihood(theta[:5]).log_prob(y[:5]).shape == (5,)
    likelihood.fit(simulations=likelihood.simulations, **QUICK)
    assert torch.equal(likelihood.simulations.theta, theta)
    named = AmortizedLikelihood()
    named.fit(simulations=({"a": theta[:, 0].numpy(), "b": theta}, y.numpy()), **QUICK)
    assert named(a=0.0, b=torch.zeros(2)).event_shape == (3,)


def test_held_out_pairs_are_a_tenth_and_score_the_fit():
    likelihood = quick()
    assert len(likelihood.held_out.theta) == 20 and isinstance(likelihood.held_out, LikelihoodPairs)
    score = likelihood(likelihood.held_out.theta).log_prob(likelihood.held_out.y).mean()
    assert likelihood.scores["learnt"] == pytest.approx(float(score), abs=1e-6)
    assert set(likelihood.scores) == {"learnt", "affine Gaussian"}


def test_discrete_columns_are_found_and_said():
    with pytest.warns(RuntimeWarning, match=r"columns \[0\] .* \[2\] different ones, .* Write discrete=\(0,\)"):
        found = fitted(mixed, discrete=None)
    assert found.parts.data.discrete == (0,) and found.parts.data.logged == (0,)
    assert set(found(torch.zeros(2)).sample((200,))[:, 0].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("simulate", [sums, mixed])
def test_saved_and_loaded_it_is_the_same_density(simulate, tmp_path):
    likelihood = fitted(simulate, discrete=(0,) if simulate is mixed else ())
    likelihood.save(tmp_path / "a.pt")
    loaded = AmortizedLikelihood.load(tmp_path / "a.pt")
    theta, y = likelihood.held_out
    assert torch.equal(loaded(theta).log_prob(y), likelihood(theta).log_prob(y))
    assert loaded.scores == likelihood.scores and torch.equal(loaded.simulations.y, likelihood.simulations.y)
    loaded.fit(simulations=loaded.simulations, **QUICK)
    with pytest.raises(ValueError, match="must be given pairs"):
        loaded.fit(**QUICK)


def test_files_of_other_contents_are_refused(tmp_path):
    write_file({"kind": "AmortizedPosterior"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="AmortizedLikelihood.save wrote"):
        AmortizedLikelihood.load(tmp_path / "a.pt")
    write_file({"kind": "AmortizedLikelihood", "format": 99}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="format"):
        AmortizedLikelihood.load(tmp_path / "b.pt")
    write_file({"kind": "AmortizedLikelihood", "format": 1, "observed": "y"}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="this version writes"):
        AmortizedLikelihood.load(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "bridge",
    [LightSB, LightSB(7, num_components=3, hidden=(8,)), lambda d, context_dim: LightSB(d, context_dim=context_dim)],
    ids=["class", "instance", "function"],
)
def test_the_bridge_that_is_asked_for_is_fitted(bridge):
    if bridge is LightSB or not isinstance(bridge, LightSB):
        with pytest.raises(ValueError, match="num_components"):  # the class's 50 components of 200 draws are too many
            fitted(bridge=lambda d, context_dim: LightSB(d, num_components=500, context_dim=context_dim))
    likelihood = fitted(bridge=bridge)
    assert type(likelihood.bridge) is LightSB and likelihood.bridge.dim == 1
    theta = torch.zeros(2, requires_grad=True)
    assert torch.isfinite(likelihood(theta).log_prob(torch.zeros(1)))


def nan_sometimes(theta):
    return torch.where(theta[:, :1] > 1, torch.nan, theta[:, :1] + torch.randn(len(theta), 1))


def test_simulations_that_are_not_finite():
    with pytest.raises(ValueError, match=r"NaN or infinity in \d+ of 200 \(\d+\.\d%\).*keep_finite=True"):
        fitted(nan_sometimes)
    assert 130 < len(fitted(nan_sometimes, keep_finite=True).simulations.y) < 190


WRONG = {
    "simulator": (lambda: AmortizedLikelihood(3), TypeError, "simulator must be a function"),
    "observed": (lambda: AmortizedLikelihood(sums, ("a", "b")), TypeError, "must name one site"),
    "proposal alone": (lambda: AmortizedLikelihood(proposal=UNIT), ValueError, "is for a simulator"),
    "proposal": (lambda: AmortizedLikelihood(sums, proposal=3.0), TypeError, "proposal must be a distribution"),
    "batch": (
        lambda: AmortizedLikelihood(sums, proposal=dist.Normal(torch.zeros(2), 1.0)), ValueError, r"to_event\(1\)",
    ),
    "discrete": (lambda: AmortizedLikelihood(sums, discrete=0), TypeError, "discrete must name columns"),
    "negative column": (lambda: AmortizedLikelihood(sums, discrete=(-1,)), ValueError, "at least 0"),
    "twice": (lambda: AmortizedLikelihood(sums, discrete=(0, 0)), ValueError, "each column once"),
    "bridge": (lambda: AmortizedLikelihood(sums, bridge="vsdm"), ValueError, "density of a point"),
    "diffusion": (lambda: fitted(bridge=VSDM), NotImplementedError, "needs a light bridge"),
    "Bass": (lambda: fitted(bridge=LightSBBM), NotImplementedError, "needs a light bridge"),
    "not fitted": (lambda: AmortizedLikelihood(sums, proposal=UNIT)(torch.zeros(2)), RuntimeError, "must be fitted"),
    "option": (lambda: fitted(num_update=3), TypeError, "no option 'num_update'.*num_updates"),
    "bridge option": (lambda: fitted(bridge_options={"rate": 3}), TypeError, "no option 'rate'"),
    "few": (lambda: fitted(num_simulations=50), ValueError, "at least 100"),
    "held out": (lambda: fitted(held_out=1.0), ValueError, "held_out"),
    "rows": (lambda: fitted(lambda theta: torch.zeros(3)), ValueError, "a row for each of 200 parameters"),
    "constant": (lambda: fitted(lambda theta: torch.ones(len(theta), 1)), ValueError, r"constant ones, \[0\]"),
    "no column": (lambda: fitted(discrete=(4,)), ValueError, "discrete must name columns of 1"),
    "classes": (
        lambda: fitted(lambda theta: torch.randint(0, 5000, (len(theta), 1)).float(), discrete=(0,)),
        ValueError, "at most 64 combinations",
    ),
    "pairs": (lambda: AmortizedLikelihood().fit(simulations=3), TypeError, "must be a pair"),
    "lengths": (
        lambda: AmortizedLikelihood().fit(simulations=(torch.zeros(3), torch.zeros(4))), ValueError, "a row a run",
    ),
    "event": (lambda: quick()(torch.zeros(3)), ValueError, r"theta must have the shape \(\*batch, 2\)"),
    "name": (lambda: quick()(level=torch.zeros(2)), TypeError, r"has the parameters \['theta'\]"),
    "value": (lambda: quick()(torch.zeros(2)).log_prob(torch.zeros(3)), ValueError, "one run's data"),
    "NaN": (lambda: quick()(torch.zeros(2)).log_prob(torch.tensor([torch.nan])), ValueError, "no NaN"),
    "expand": (lambda: quick()(torch.zeros(4, 2)).expand([3]), ValueError, "broadcast"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong):
    call, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call()


def test_a_tensor_for_several_parameters_is_refused():
    likelihood = fitted(one_run, proposal=None)
    with pytest.raises(TypeError, match=r"by name, got a tensor. Write likelihood\(level=..., scale=...\)"):
        likelihood(torch.zeros(2))


def test_shapes_that_change_are_refused():
    sizes = iter([3, 4])

    def changing(theta):
        return torch.randn(len(theta), next(sizes))

    with pytest.raises(ValueError, match=r"one shape at every run, got \(3,\) and \(4,\)"):
        fitted(changing, num_simulations=2000)


def test_data_that_no_simulation_could_be_are_refused():
    law = fitted(mixed, discrete=(0,))(torch.zeros(2))
    with pytest.raises(ValueError, match=r"positive in columns \[1\].*got 1 rows"):
        law.log_prob(torch.tensor([[0.0, -1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"discrete columns \[0\].*got \[2.0\]"):
        law.log_prob(torch.tensor([2.0, 1.0]))


def test_parameters_outside_the_region_are_said_once():
    likelihood = fitted(sums)
    far = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    with pytest.warns(RuntimeWarning, match="0.5 of the parameters lie outside the region") as said:
        likelihood(far)
        likelihood(far)
    assert len(said) == 1 and likelihood.outside(far) == 0.5
