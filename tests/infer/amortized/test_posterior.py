"""Posteriors from a bridge: against conjugate ones, corrected, as guides, in batches, with entries missing."""

import copy
import functools
import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch

from pyro_sb.diagnostics import to_arviz
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


NUMPY = np.random.default_rng(0)
X = torch.linspace(-1, 1, 6, dtype=torch.float64)
HIGH = torch.tensor([3.2, 2.6, 3.0, 3.5], dtype=torch.float64)  # leans on the bound, 3
Y = torch.tensor([0.9, 0.2, 0.7, 1.4, 0.5], dtype=torch.float64)


def black_box():
    return pyro.sample("mu", dist.Normal(0.0, 1.0)) + torch.as_tensor(NUMPY.normal(0.0, 0.5, 5))


@functools.cache
def fitted(model, bridge="light", num_steps=300, missing=0.0, args=(), observed=("y",)):
    """A small fit, once for all tests; the tests' own seed is set after it."""
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(model, observed, bridge=bridge)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        copies = None if model is black_box else 4
        amortized.fit(
            *args, num_simulations=800, num_copies=copies, num_updates=num_steps, missing=missing, progress=False
        )
    return amortized


def condition(y, *args, **kwargs):
    posterior = fitted(*args, **kwargs).condition(y)
    pyro.set_rng_seed(1)
    return posterior


def exact(y):
    """Mean and deviation of mu given those entries of `iid` that are there, and their log evidence."""
    y = y[~torch.isnan(y)]
    precision = 1 + len(y) / 0.25
    law = torch.distributions.MultivariateNormal(torch.zeros(len(y)), 0.25 * torch.eye(len(y)) + 1)
    return float(y.sum() / 0.25 / precision), precision**-0.5, float(law.log_prob(y))


def batch_of(num):
    mu = torch.randn(num, 1)
    return mu + 0.5 * torch.randn(num, 5)


def biased(posterior, shift):
    """The same posterior by a bridge that is off by some of its own deviations."""
    other = copy.copy(posterior)
    weights = posterior.law.residuals.weights.clone()
    weights[0] += shift * posterior.law.residuals.factor.diagonal()
    other.law = copy.copy(posterior.law)
    other.law.residuals = copy.copy(posterior.law.residuals)
    other.law.residuals.weights = weights
    return other


# ---- the bridge alone ----


@pytest.mark.parametrize("bridge", ["light", pytest.param("vsdm", marks=pytest.mark.slow)])
def test_draws_are_nearly_the_conjugate_posterior(bridge):
    mean, deviation, _ = exact(Y)
    draws = condition(Y, m.iid, bridge).sample(8000)["mu"]
    assert draws.shape == (8000,)
    assert abs(float(draws.mean()) - mean) < 0.1 * deviation
    assert abs(float(draws.std()) / deviation - 1) < 0.1


def test_draws_never_leave_the_support():
    for y in (Y[:4], HIGH, 2 - HIGH):
        draws = condition(y, m.bounded_and_positive).sample(5000)
        assert bool(((draws["p"] >= -1) & (draws["p"] <= 3)).all()) and bool((draws["scale"] > 0).all())


def test_the_density_has_the_integral_one_over_the_sites():
    posterior = condition(Y, m.iid)
    grid = torch.linspace(-6, 6, 2001)
    assert float(torch.trapezoid(posterior.log_prob({"mu": grid}).exp(), grid)) == pytest.approx(1, abs=1e-6)
    posterior = condition(Y[:4], m.bounded_and_positive)
    p, log_scale = torch.linspace(-0.9999, 2.9999, 401), torch.linspace(-6, 4, 401)
    pp, ss = torch.meshgrid(p, log_scale, indexing="ij")
    density = posterior.log_prob({"p": pp, "scale": ss.exp()}).exp() * ss.exp()
    assert density.shape == (401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, log_scale, dim=1), p)) == pytest.approx(1, abs=2e-3)


def test_a_batch_is_its_observations():
    ys = batch_of(3)
    batch = condition(ys, m.iid)
    draws = batch.sample(2000)["mu"]
    assert draws.shape == (2000, 3)
    values = batch.log_prob({"mu": draws})
    for b in range(3):
        single = condition(ys[b], m.iid)
        torch.testing.assert_close(single.log_prob({"mu": draws[:, b]}), values[:, b], rtol=1e-9, atol=1e-9)
        own = single.sample(2000)["mu"]
        z = (own.mean() - draws[:, b].mean()) / ((own.var() + draws[:, b].var()) / 2000).sqrt()
        assert abs(float(z)) < 4
    one = condition(ys[:1], m.iid)
    assert one.sample(7)["mu"].shape == (7, 1)  # a batch of one is a batch
    vectors = condition(torch.randn(3, 2), m.vectors)
    sites = vectors.sample(5)
    assert sites["beta"].shape == (5, 3, 2) and sites["share"].shape == (5, 3)
    assert vectors.log_prob(sites).shape == (5, 3)


# ---- importance ----


@pytest.mark.parametrize("bridge", ["light", pytest.param("vsdm", marks=pytest.mark.slow)])
def test_the_evidence_of_every_observation_is_unbiased(bridge):
    ys = batch_of(16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Pareto k", category=RuntimeWarning)  # the worst of sixteen
        result = condition(ys, m.iid, bridge).importance(2000)
    truth = torch.tensor([exact(y)[2] for y in ys])
    z = (result.log_evidence - truth) / result.log_evidence_error
    assert z.abs().max() < 4 and abs(float(z.mean())) < 4 / 16**0.5
    assert result.ess_share.min() > 0.3 and result.k_hat.median() < 0.7
    mean = torch.tensor([exact(y)[0] for y in ys])
    error = (result.expectation(result.sites["mu"]) - mean) / exact(ys[0])[1]
    assert (error * (2000 * result.ess_share).sqrt()).abs().max() < 4


def test_one_observation_has_numbers_for_figures():
    result = condition(Y, m.iid).importance(4000)
    mean, deviation, evidence = exact(Y)
    assert isinstance(result.log_evidence, float)
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_error
    draws = result.resample(4000)["mu"]
    assert draws.shape == (4000,)
    assert abs(float(draws.mean()) - mean) < 0.1 * deviation and abs(float(draws.std()) / deviation - 1) < 0.1


def test_weights_are_the_model_over_the_bridge():
    posterior = condition(Y[:4], m.bounded_and_positive)
    result = posterior.importance(30)
    for i in range(30):
        sites = {name: x[i] for name, x in result.sites.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(m.bounded_and_positive, sites | {"y": Y[:4]})).get_trace()
        expected = trace.log_prob_sum() - posterior.log_prob(sites)
        torch.testing.assert_close(result.log_weights[i], expected, rtol=1e-8, atol=1e-8)


def test_a_wrong_bridge_is_told_by_its_weights():
    wrong = biased(condition(Y, m.iid), 7.0)
    with pytest.warns(RuntimeWarning, match=r"Pareto k of the importance weights is above 0.7.*Use mcmc\(\)"):
        result = wrong.importance(2000)
    assert result.k_hat > 0.7


# ---- chains ----


def test_chains_are_right_for_one_and_for_a_batch():
    mean, deviation, evidence = exact(Y)
    mcmc = condition(Y, m.iid).mcmc(60, num_chains=64)
    draws = mcmc.get_samples()["mu"]
    assert draws.shape == (3840,)
    assert abs(float(draws.mean()) - mean) < 0.1 * deviation and abs(float(draws.std()) / deviation - 1) < 0.07
    facts = mcmc.kernel.diagnostics()
    assert facts["start"] == "weighted draws" and facts["k_hat"] < 0.7 and facts["effective share"] > 0.3
    assert facts["log evidence"] == pytest.approx(evidence, abs=0.1)
    assert 0.3 < facts["refresh acceptance"] <= 1

    ys = batch_of(5)
    mcmc = condition(ys, m.iid).mcmc(60, num_chains=48)
    draws = mcmc.get_samples()["mu"]
    assert draws.shape == (2880, 5) and mcmc.get_samples(group_by_chain=True)["mu"].shape == (48, 60, 5)
    for b in range(5):
        assert abs(float(draws[:, b].mean()) - exact(ys[b])[0]) < 0.12 * deviation
        assert abs(float(draws[:, b].std()) / deviation - 1) < 0.1
    assert bool(torch.isfinite(mcmc.diagnostics()["mu"]["r_hat"]).all())
    assert len(mcmc.kernel.diagnostics()["log evidence"]) == 5


@pytest.mark.parametrize("bridge", ["light", pytest.param("vsdm", marks=pytest.mark.slow)])
def test_a_wrong_bridge_is_tempered_and_its_chains_are_right(bridge):
    mean, deviation, evidence = exact(Y)
    wrong = biased(condition(Y, m.iid, bridge), 7.0)
    with pytest.warns(
        RuntimeWarning, match=r"weights are poor.*at 1 of 1 observations.*tempered sequential Monte Carlo"
    ):
        mcmc = wrong.mcmc(40, num_chains=64, num_proposals=2048)
    draws = mcmc.get_samples()["mu"]
    facts = mcmc.kernel.diagnostics()
    assert facts["start"] == "tempered" and facts["levels"] > 1
    assert facts["log evidence"] == pytest.approx(evidence, abs=0.3)
    assert abs(float(draws.mean()) - mean) < 0.15 * deviation and abs(float(draws.std()) / deviation - 1) < 0.1


def test_chains_stay_inside_the_support():
    mcmc = condition(HIGH, m.bounded_and_positive).mcmc(20, num_chains=32, num_proposals=1024)
    draws = mcmc.get_samples()
    assert bool(((draws["p"] >= -1) & (draws["p"] <= 3)).all()) and bool((draws["scale"] > 0).all())


def test_a_poisson_regression_with_covariates():
    y = torch.tensor([0.0, 1.0, 1.0, 2.0, 4.0, 5.0])
    posterior = condition(y, m.poisson, args=(X,))
    a, b = torch.meshgrid(torch.linspace(-3, 4, 301), torch.linspace(-3, 4, 301), indexing="ij")
    log_rate = a[..., None] + b[..., None] * X
    log_joint = (y * log_rate - log_rate.exp() - torch.lgamma(y + 1)).sum(-1) - 2 * (a - 0.5) ** 2 - 2 * b**2
    log_joint = log_joint - math.log(2 * math.pi * 0.25)
    weight = torch.softmax(log_joint.flatten(), 0)
    means = torch.stack([weight @ a.flatten(), weight @ b.flatten()])
    evidence = torch.logsumexp(log_joint.flatten(), 0) + 2 * math.log(7 / 300)
    result = posterior.importance(4000)
    assert abs(result.log_evidence - float(evidence)) < 4 * result.log_evidence_error
    found = torch.stack([result.expectation(result.sites[name]) for name in ("a", "b")])
    assert ((found - means) / 0.3 * (4000 * result.ess_share) ** 0.5).abs().max() < 4
    assert found[1] > 0.4  # the covariates reached the model


# ---- missing entries ----


@pytest.mark.filterwarnings("ignore:.*Pareto k")  # of an effective share of .95: a tail by chance
def test_a_part_of_the_observation():
    part = Y.clone()
    part[1], part[4] = torch.nan, torch.nan
    mean, deviation, evidence = exact(part)
    posterior = condition(part, m.iid, missing=0.6)
    draws = posterior.sample(4000)["mu"]
    assert abs(float(draws.mean()) - mean) < 0.3 * deviation and abs(float(draws.std()) / deviation - 1) < 0.2
    result = posterior.importance(4000)
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_error
    error = (float(result.expectation(result.sites["mu"])) - mean) / deviation
    assert abs(error) * (4000 * result.ess_share) ** 0.5 < 4
    mcmc = posterior.mcmc(40, num_chains=64, num_proposals=1024)
    chains = mcmc.get_samples()["mu"]
    assert chains.shape == (2560,) and abs(float(chains.mean()) - mean) < 0.12 * deviation
    assert to_arviz(mcmc).posterior["mu"].shape == (64, 40)

    both = torch.stack([part, Y])
    batch = condition(both, m.iid, missing=0.6).importance(2000)
    for b in range(2):
        assert abs(float(batch.log_evidence[b]) - exact(both[b])[2]) < 4 * float(batch.log_evidence_error[b])


def test_part_of_a_joint_event_has_draws_alone():
    y = torch.randn(3, 2)
    y[1, 0] = torch.nan
    posterior = condition(y, m.joint_rows, missing=0.5)
    assert posterior.sample(10)["beta"].shape == (10, 2)
    with pytest.raises(NotImplementedError, match="missing entries of 'y' must be independent"):
        posterior.importance(100)
    y[1] = torch.nan
    assert condition(y, m.joint_rows, missing=0.5).importance(200).ess_share > 0.05


# ---- guides ----


@pytest.mark.parametrize("bridge", ["light", pytest.param("vsdm", marks=pytest.mark.slow)])
def test_importance_by_pyro_has_the_same_evidence(bridge):
    posterior = condition(Y, m.iid, bridge)
    model = pyro.poutine.condition(m.iid, {"y": Y})
    found = pyro.infer.Importance(model, guide=posterior, num_samples=144).run()
    weights = torch.stack([torch.as_tensor(w) for w in found.log_weights]).exp()
    truth = math.exp(exact(Y)[2])
    assert abs(float((weights.mean() - truth) / weights.std() * 12)) < 4


def test_pyros_weights_are_ours():
    posterior = condition(Y[:4], m.bounded_and_positive)
    model = pyro.poutine.condition(m.bounded_and_positive, {"y": Y[:4]})
    found = pyro.infer.Importance(model, guide=posterior, num_samples=20).run()
    for trace, weight in zip(found.exec_traces, found.log_weights):
        sites = {name: trace.nodes[name]["value"] for name in ("p", "scale")}
        expected = pyro.poutine.trace(pyro.poutine.condition(model, sites)).get_trace().log_prob_sum()
        torch.testing.assert_close(torch.as_tensor(weight), expected - posterior.log_prob(sites), rtol=1e-8, atol=1e-8)


def test_the_guide_serves_predictive_and_the_elbo():
    mean, deviation, evidence = exact(Y)
    posterior = condition(Y, m.iid)
    draws = pyro.infer.Predictive(m.iid, guide=posterior, num_samples=100)()
    assert draws["y"].shape == (100, 5)
    assert abs(float(draws["y"].mean()) - mean) < 0.2
    elbo = -pyro.infer.Trace_ELBO(num_particles=100).loss(pyro.poutine.condition(m.iid, {"y": Y}), posterior)
    assert evidence - 0.1 < elbo < evidence + 0.02
    plates = condition(torch.tensor([0.3, -0.4, 2.0]), m.plate_latents)
    draws = pyro.infer.Predictive(m.plate_latents, guide=plates, num_samples=20)()
    assert draws["theta"].shape == (20, 3) and draws["y"].shape == (20, 3)


@pytest.mark.slow
def test_rows_of_a_plate_get_the_amortised_posterior_inside_a_larger_guide():
    y = torch.tensor([0.4, 2.0, -0.7])

    def row():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.25**0.5))
        pyro.sample("y", dist.Normal(z, 1.0))

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 0.5))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(row)
    amortized.fit(num_simulations=4000, num_updates=500, progress=False)
    rows = amortized.condition(y).in_plate("rows")

    def of_mu():
        pyro.sample("mu", dist.Normal(torch.tensor(0.25), 0.45))

    guide = pyro.infer.autoguide.AutoGuideList(model)
    guide.append(of_mu)
    guide.append(rows)
    guide()
    found = [pyro.poutine.trace(guide).get_trace() for _ in range(600)]
    models = [pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace() for trace in found]
    log_weights = torch.stack([m.log_prob_sum() - g.log_prob_sum() for m, g in zip(models, found)]).double()
    truth = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 0.25).log_prob(y)
    weights = (log_weights - truth).exp()
    assert abs(float(weights.mean() - 1)) < 4 * float(weights.std()) / 600**0.5
    assert float(weights.std()) < 1.5
    assert found[0].nodes["z"]["value"].shape == (3,)
    with pytest.raises(ValueError, match="batch"):
        amortized.condition(y[0]).in_plate("rows")


def test_draws_serve_predictive_as_posterior_samples():
    posterior = condition(Y, m.iid)
    samples = posterior.get_samples(50)
    assert samples["mu"].shape == (50,)
    assert pyro.infer.Predictive(m.iid, posterior_samples=samples)()["y"].shape == (50, 5)


@pytest.mark.slow
def test_a_posterior_of_paths_knows_the_density_of_its_last_draw_alone():
    posterior = condition(Y, m.iid, "vsdm")
    with pytest.raises(NotImplementedError, match='VSDM has no exact density.*importance.*bridge="light"'):
        posterior.log_prob({"mu": torch.tensor(0.0)})
    trace = pyro.poutine.trace(posterior).get_trace()
    law, value = trace.nodes["_posterior_latent"]["fn"], trace.nodes["_posterior_latent"]["value"]
    assert bool(torch.isfinite(law.log_prob(value)).all())
    with pytest.raises(NotImplementedError, match="its own last draw alone"):
        law.log_prob(value + 1)


# ---- ArviZ ----


def test_to_arviz_of_draws_and_of_chains():
    one, batch = condition(Y, m.iid), condition(batch_of(3), m.iid)
    idata = to_arviz(one)
    assert idata.posterior["mu"].shape == (4, 1000)
    np.testing.assert_allclose(idata.observed_data["y"], Y.numpy())
    full = to_arviz(one, log_likelihood=True)
    assert full.log_likelihood["y"].shape == (4, 1000, 5)
    assert to_arviz(batch).posterior["mu"].shape == (4, 1000, 3)
    chains = to_arviz(one.mcmc(10, num_chains=8, num_proposals=512))
    assert chains.posterior["mu"].shape == (8, 10) and chains.sample_stats["acceptance_rate"].shape == (8, 10)
    np.testing.assert_allclose(chains.observed_data["y"], Y.numpy())
    many = to_arviz(batch.mcmc(10, num_chains=8, num_proposals=512))
    assert many.posterior["mu"].shape == (8, 10, 3)
    assert arviz.summary(many, kind="stats").shape[0] == 3


# ---- what is refused ----


def test_a_black_box_has_draws_and_no_corrections():
    posterior = condition(Y, black_box)
    mean, deviation, _ = exact(Y)
    draws = posterior.sample(4000)["mu"]
    assert abs(float(draws.mean()) - mean) < 0.3 * deviation and abs(float(draws.std()) / deviation - 1) < 0.3
    for ask in (posterior.importance, posterior.mcmc):
        with pytest.raises(NotImplementedError, match=r"density of \['y'\].*black-box simulator.*sample\(\)"):
            ask()
    assert to_arviz(posterior).posterior["mu"].shape == (4, 1000)


def test_bad_questions_are_refused():
    posterior = condition(Y, m.iid)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        posterior.sample(0)
    with pytest.raises(ValueError, match="num_samples must be at least 25, got 10"):
        posterior.importance(10)
    with pytest.raises(ValueError, match=r"a guide has one observation, got 3. Write condition\(y\[i\]\)"):
        condition(batch_of(3), m.iid)()
    with pyro.plate("outer", 2), pytest.raises(NotImplementedError, match="cannot stand in a plate"):
        posterior()
