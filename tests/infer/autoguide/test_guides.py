"""Both guides under Pyro's hands: SVI, Predictive, Importance, lists, copies, checkpoints, and what is refused."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_sb.bridges import LightSB
from pyro_sb.diagnostics import report, to_arviz
from pyro_sb.infer.autoguide import AutoBridge, AutoLightBridge

F = torch.float64
Y = torch.tensor([0.3, 1.9, 1.2, -0.4], dtype=F)


def conjugate(y):
    """Normal mean and data: the posterior is normal."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def conjugate_answer(y):
    """Mean, sd and log evidence."""
    precision = 0.25 + len(y)
    covariance = torch.eye(len(y), dtype=y.dtype) + 4.0
    return y.sum() / precision, precision**-0.5, dist.MultivariateNormal(0 * y, covariance).log_prob(y)


def two_modes(weight=0.2):
    """Normals of sd .5 at -3 and 3, under a normal prior that is divided out; log evidence 0."""

    def model():
        prior = dist.Normal(torch.zeros((), dtype=F), 5.0)
        x = pyro.sample("x", prior)
        parts = [math.log(w) + dist.Normal(m, 0.5).log_prob(x) for w, m in ((weight, -3.0), (1 - weight, 3.0))]
        pyro.factor("t", torch.logaddexp(*parts) - prior.log_prob(x))

    return model


def bounded(y):
    """A scale and a probability: supports other than the reals."""
    s = pyro.sample("s", dist.Gamma(y.new_tensor(3.0), 2.0))
    p = pyro.sample("p", dist.Beta(y.new_tensor(2.0), 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(p, s), obs=y)


def bounded_evidence():
    """By quadrature."""
    grid = torch.linspace(1e-3, 8, 2001, dtype=F), torch.linspace(5e-4, 1 - 5e-4, 1000, dtype=F)
    s, p = torch.meshgrid(*grid, indexing="ij")
    log_p = dist.Gamma(3.0, 2.0).log_prob(s) + dist.Beta(2.0, 3.0).log_prob(p)
    log_p = log_p + sum(dist.Normal(p, s).log_prob(y) for y in Y)
    return log_p.flatten().logsumexp(0) + math.log((8 - 1e-3) / 2000 * (1 - 1e-3) / 999)


@pytest.fixture(scope="module")
def light():
    pyro.set_rng_seed(0)
    guide = AutoLightBridge(conjugate)
    guide.fit(Y)
    return guide


@pytest.fixture(scope="module")
def annealed():
    pyro.set_rng_seed(0)
    guide = AutoBridge(bounded)
    guide.fit(Y)
    return guide


# ---- the fit ----


def test_a_normal_posterior_is_found(light):
    mean, sd, log_evidence = conjugate_answer(Y)
    law = light.get_posterior(Y)
    x = torch.linspace(-1, 2, 7, dtype=F)[:, None]
    error = (law.log_prob(x) - dist.Normal(mean, sd).log_prob(x[:, 0])).abs()
    assert bool((error * dist.Normal(mean, sd).log_prob(x[:, 0]).exp() < 0.05).all())
    assert abs(light.log_evidence - float(log_evidence)) < max(4 * light.log_evidence_error, 1e-3)
    assert light.fitted.elbo == pytest.approx(float(log_evidence), abs=0.01)


def test_both_modes_get_their_weight():
    pyro.set_rng_seed(0)
    guide = AutoLightBridge(two_modes())
    guide.fit()
    x = guide.get_posterior().sample((4000,))
    assert float((x < 0).double().mean()) == pytest.approx(0.2, abs=0.02)
    assert abs(guide.log_evidence) < 0.02
    assert guide.fitted.k_hat < 0.7 or guide.fitted.ess_share > 0.99


@pytest.mark.slow
def test_independent_pairs_of_modes_get_a_mixture_each():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (5,)))
        pyro.factor("t", torch.logaddexp(-2 * (x - 3).square(), 0.5 - 2 * (x + 3).square()).sum(-1))

    pyro.set_rng_seed(0)
    guide = AutoLightBridge(model, num_particles=512, num_updates=0)
    guide.fit()
    exact = 5 * math.log((1 + math.exp(0.5)) * math.sqrt(math.pi / 2))
    assert guide.num_blocks == 5
    assert guide.log_evidence == pytest.approx(exact, abs=0.1)
    left = (guide.get_posterior().sample((4000,)) < 0).double()
    share = math.exp(0.5) / (1 + math.exp(0.5))
    assert left.mean(0).sub(share).abs().max() < 0.07  # .01 nats of KL, under which a round of the fit ends
    assert torch.corrcoef(left.T).sub(torch.eye(5)).abs().max() < 0.08


def test_a_narrow_region_where_coordinates_depend_keeps_them_together():
    place = torch.full((6,), 0.3, dtype=F)

    def model():
        x = pyro.sample("x", dist.Uniform(-torch.ones(6, dtype=F), 1.0).to_event(1))
        parts = [math.log(0.5) + dist.Normal(m, s).log_prob(x).sum(-1) for m, s in ((place, 0.03), (0 * place, 0.1))]
        pyro.factor("t", torch.logaddexp(*parts))

    pyro.set_rng_seed(0)
    guide = AutoLightBridge(model, num_updates=0)
    guide.fit()
    assert guide.num_blocks == 1
    inside = (guide.importance(4000).sites["x"] - place).norm(dim=-1) < 0.2
    assert float(inside.double().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_the_bridge_is_at_least_as_good_as_its_base():
    def funnel():
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F), 2.0))
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F), (v / 2).exp()[..., None]).to_event(1))

    pyro.set_rng_seed(0)
    base = AutoLightBridge(funnel, num_components=2, num_updates=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.fit()
        guide = AutoBridge(funnel, base=base)
        guide.fit()
    assert guide.fitted.elbo > base.fitted.elbo + 0.05
    assert guide.fitted.elbo < 0.01


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_pyros_guides_serve_as_a_base(kind):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    base = kind(bounded)
    svi = SVI(bounded, base, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(200):
        svi.step(Y)
    guide = AutoBridge(bounded, base=base)
    fit = guide.fit(Y)
    assert fit.log_evidence == pytest.approx(float(bounded_evidence()), abs=max(4 * fit.log_evidence_error, 0.02))
    assert fit.elbo < float(bounded_evidence()) + 0.02


def test_path_weights_are_unbiased_for_the_evidence(annealed):
    with torch.no_grad():
        log_weights = torch.cat([annealed.weighted(4000)[1] for _ in range(5)])
    weights = (log_weights - bounded_evidence()).exp()
    assert abs(float(weights.mean() - 1)) < 4 * float(weights.std()) / math.sqrt(len(weights)) + 1e-3


# ---- Pyro ----


@pytest.mark.slow
def test_svi_trains_the_mixture_from_the_fit():
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    guide = AutoLightBridge(two_modes(), num_updates=0)
    guide.fit()
    with torch.no_grad():
        guide.logits_0.copy_(torch.zeros_like(guide.logits_0))  # equal weights of all components
    svi = SVI(two_modes(), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    losses = [svi.step() for _ in range(300)]
    assert sum(losses[-50:]) / 50 < min(sum(losses[:10]) / 10, 0.05)
    x = guide.get_posterior().sample((4000,))
    assert float((x < 0).double().mean()) == pytest.approx(0.2, abs=0.04)


def test_a_cold_start():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoLightBridge(conjugate, num_components=2)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(Y) for _ in range(400)]
    assert sum(losses[-50:]) / 50 == pytest.approx(-float(conjugate_answer(Y)[2]), abs=0.2)


def test_reweighted_wake_sleep_keeps_the_fit():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoLightBridge(two_modes(), num_updates=0)
    guide.fit()
    loss = ReweightedWakeSleep(num_particles=50, vectorize_particles=True)
    svi = SVI(two_modes(), guide, pyro.optim.Adam({"lr": 0.002}), loss)
    for _ in range(60):
        svi.step()
    x = guide.get_posterior().sample((4000,))
    assert float((x < 0).double().mean()) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceEnum_ELBO])
def test_pyros_losses_have_the_elbos_gradient(loss):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoLightBridge(two_modes(), num_components=2)
    guide()
    with torch.no_grad():
        guide.locs_0.copy_(torch.tensor([[-2.5], [2.8]], dtype=F))
        guide.trils_0.fill_(0.7)
        guide.logits_0.copy_(torch.tensor([0.4, -0.4], dtype=F))
    x = torch.linspace(-9, 9, 8001, dtype=F)[:, None]
    log_p = torch.logaddexp(*(math.log(w) + dist.Normal(m, 0.5).log_prob(x[:, 0]) for w, m in ((0.2, -3), (0.8, 3))))
    log_q = guide.get_posterior().log_prob(x)
    free = [p for p in guide.parameters() if p.requires_grad]
    exact = torch.autograd.grad(torch.trapezoid(log_q.exp() * (log_q - log_p), x[:, 0]), free)
    options = {} if loss is Trace_ELBO else {"strict_enumeration_warning": False}
    elbo, rounds = loss(num_particles=50, vectorize_particles=True, max_plate_nesting=0, **options), []
    for _ in range(300):
        guide.zero_grad()
        elbo.loss_and_grads(two_modes(), guide)
        rounds.append(torch.cat([p.grad.flatten() for p in guide.parameters() if p.requires_grad]))
    rounds = torch.stack(rounds)
    z = (rounds.mean(0) - torch.cat([g.flatten() for g in exact])) / (rounds.std(0) / math.sqrt(len(rounds)))
    assert z.abs().max() < 4


@pytest.mark.parametrize("loss", [TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])
def test_losses_that_cannot_train_a_mixture_are_refused(loss):
    guide = AutoLightBridge(conjugate, num_components=2)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), loss())
    with pytest.raises(NotImplementedError):
        svi.step(Y)


@pytest.mark.parametrize("which", ["light", "annealed"])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(which, parallel, request):
    guide = request.getfixturevalue(which)
    model = conjugate if which == "light" else bounded
    pyro.set_rng_seed(0)
    sites = {"light": ["mu"], "annealed": ["s", "p"]}[which]
    predictive = Predictive(model, guide=guide, num_samples=400, parallel=parallel, return_sites=sites)
    drawn = predictive(Y)
    for name in sites:
        exact = guide.importance(4000)
        mean = exact.expectation(exact.sites[name])
        assert abs(float(drawn[name].mean() - mean)) < 4.5 * float(exact.sites[name].std()) / 20


@pytest.mark.parametrize("which", ["light", "annealed"])
def test_importance(which, request):
    guide = request.getfixturevalue(which)
    model = conjugate if which == "light" else bounded
    pyro.set_rng_seed(0)
    posterior = Importance(model, guide=guide, num_samples=50).run(Y)
    weights = torch.stack([torch.as_tensor(w) for w in posterior.log_weights])
    value = weights.logsumexp(0) - math.log(50)
    assert abs(float(value) - guide.log_evidence) < 0.2
    assert weights.std() < 1.0


@pytest.mark.parametrize("which", ["light", "annealed"])
def test_the_losss_value_is_minus_the_elbo(which, request):
    guide = request.getfixturevalue(which)
    model = conjugate if which == "light" else bounded
    pyro.set_rng_seed(0)
    loss = Trace_ELBO(num_particles=500, vectorize_particles=True).loss(model, guide, Y)
    assert -loss == pytest.approx(guide.fitted.elbo, abs=0.05)


def test_medians_and_quantiles_are_the_laws(light, annealed):
    mean, sd, _ = conjugate_answer(Y)
    assert float(light.median(Y)["mu"]) == pytest.approx(float(mean), abs=0.05)
    low, high = light.quantiles([0.1587, 0.8413], Y)["mu"]
    assert float(high - low) == pytest.approx(2 * sd, rel=0.05)
    found = annealed.quantiles([0.1, 0.9], Y)
    assert bool((found["p"][0] < found["p"][1]) & (found["p"] > 0).all() & (found["p"] < 1).all())


def test_a_guide_of_two_parts():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoGuideList(bounded)
    guide.append(AutoLightBridge(poutine.block(bounded, expose=["s"]), num_components=2))
    guide.append(AutoNormal(poutine.block(bounded, expose=["p"])))
    svi = SVI(bounded, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(Y) for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert set(guide(Y)) == {"s", "p"}


def test_float32_models_get_float32_draws():
    pyro.set_rng_seed(0)
    y = Y.float()
    for kind in (AutoLightBridge, AutoBridge):
        guide = kind(conjugate)
        guide.fit(y)
        assert guide(y)["mu"].dtype == torch.float32
        assert abs(guide.log_evidence - float(conjugate_answer(Y)[2])) < 0.02


# ---- state ----


def test_state_goes_into_a_guide_that_was_never_called(light):
    state = light.state_dict()
    for first in (False, True):
        other = AutoLightBridge(conjugate)
        if first:
            other(Y)
        other.load_state_dict(state)
        x = torch.linspace(-1, 2, 5, dtype=F)[:, None]
        assert torch.equal(other.get_posterior().log_prob(x), light.get_posterior().log_prob(x))
        assert torch.isfinite(other(Y)["mu"])
        assert torch.equal(other.get_posterior().log_prob(x), light.get_posterior().log_prob(x))


def test_a_loaded_bridge_is_the_saved_one(annealed):
    other = AutoBridge(bounded)
    other.load_state_dict(annealed.state_dict())
    assert other.log_evidence == annealed.log_evidence
    other.attach(Y)
    pyro.set_rng_seed(5)
    mine = annealed(Y)
    pyro.set_rng_seed(5)
    assert all(torch.equal(mine[name], value) for name, value in other(Y).items())
    assert abs(other.importance(500).log_evidence - annealed.log_evidence) < 0.05


def test_pyros_store_restores_the_law():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoLightBridge(conjugate, num_components=3, name="stored")
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(Y)
    x, state = torch.linspace(-1, 2, 5, dtype=F)[:, None], pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    other = AutoLightBridge(conjugate, num_components=3, name="stored")
    other(Y)
    assert torch.equal(other.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))


def test_figures_of_a_fit_do_not_outlive_its_law(light):
    other = copy.deepcopy(light)
    other.load_state_dict(AutoLightBridge(conjugate).state_dict(), strict=False)
    assert other.fitted is None


def test_quantiles_rise_where_the_transform_falls():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.less_than(0.0), (), ()))
        pyro.factor("t", x)

    pyro.set_rng_seed(0)
    guide = AutoLightBridge(model, num_updates=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide.fit()
    found = guide.quantiles([0.9, 0.1, 0.5])["x"]
    assert torch.allclose(found, torch.tensor([math.log(0.9), math.log(0.1), math.log(0.5)]), rtol=0.1)


def test_a_given_part_of_the_data_is_refused_by_a_fit():
    def model(y, part):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y), subsample=part):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[part])

    with pytest.raises(NotImplementedError, match="2 rows of 4"):
        AutoLightBridge(model).fit(Y.float(), torch.tensor([0, 1]))


def test_a_fit_without_data_says_so():
    hidden = poutine.block(bounded, expose=["s"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoLightBridge(hidden, num_updates=0).fit(Y)
    assert [w for w in caught if "prior alone" in str(w.message)]


def test_latents_inside_a_subsampled_plate_are_refused():
    def model(y):
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])

    guide = AutoLightBridge(model, num_components=2)
    with pytest.raises(NotImplementedError, match="rows"):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()).step(Y.float())


def test_state_of_more_components_than_allowed_is_refused():
    big, small = (AutoLightBridge(conjugate, num_components=k) for k in (4, 2))
    big(Y), small(Y)
    with pytest.raises((ValueError, RuntimeError), match="components"):
        small.load_state_dict(big.state_dict())


def test_two_guides_share_nothing():
    pyro.clear_param_store()
    one, two = (AutoLightBridge(conjugate, num_components=2) for _ in range(2))
    svi = SVI(conjugate, one, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    two(Y)
    before = two.get_posterior().log_prob(torch.zeros(1, dtype=F)).detach().clone()
    for _ in range(5):
        svi.step(Y)
    assert torch.equal(two.get_posterior().log_prob(torch.zeros(1, dtype=F)), before)
    names = [{f"{g._pyro_name}.{n}" for n, _ in g.named_parameters()} for g in (one, two)]
    assert not names[0] & names[1]


def test_a_copy_leaves_the_original_whole(light):
    other = copy.deepcopy(light)
    x = torch.zeros(1, dtype=F)
    before = light.get_posterior().log_prob(x).detach().clone()
    with torch.no_grad():
        other.logits_0.add_(torch.randn_like(other.logits_0))
        other.shifts_0.add_(1.0)
    assert torch.equal(light.get_posterior().log_prob(x), before)
    assert not torch.equal(other.get_posterior().log_prob(x), before)
    assert light.model is not None and other.model is not None
    assert other(Y).keys() == light(Y).keys()
    pyro.clear_param_store()
    SVI(conjugate, other, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(Y)
    assert torch.equal(light.get_posterior().log_prob(x), before)


def test_training_resumes_bit_for_bit():
    def train(guide, optim, num):
        svi = SVI(conjugate, guide, optim, Trace_ELBO())
        return [svi.step(Y) for _ in range(num)]

    pyro.set_rng_seed(3)
    pyro.clear_param_store()
    guide, optim = AutoLightBridge(conjugate, num_components=2, name="g"), pyro.optim.Adam({"lr": 0.05})
    train(guide, optim, 5)
    guide_state = {k: v.clone() for k, v in guide.state_dict().items()}
    optim_state, seed = copy.deepcopy(optim.get_state()), torch.get_rng_state()
    whole = train(guide, optim, 5)
    pyro.clear_param_store()
    other, fresh = AutoLightBridge(conjugate, num_components=2, name="g"), pyro.optim.Adam({"lr": 0.05})
    other.load_state_dict(guide_state)
    fresh.set_state(optim_state)
    other(Y)
    torch.set_rng_state(seed)
    assert train(other, fresh, 5) == whole


# ---- exports ----


def test_exports_carry_weights_and_k(light):
    pyro.set_rng_seed(0)
    container = to_arviz(light)
    assert container.posterior["mu"].shape == (4, 1000)
    assert {"log_weight", "pareto_k"} <= set(container.sample_stats.data_vars)
    mean, sd, _ = conjugate_answer(Y)
    assert float(container.posterior["mu"].mean()) == pytest.approx(float(mean), abs=5 * sd / math.sqrt(4000))


def test_reports(light, annealed):
    pyro.set_rng_seed(0)
    assert report(light).verdict == "ok"
    assert report(annealed).verdict == "ok"


def test_the_report_of_a_guide_that_misses_a_mode_is_not_ok():
    pyro.set_rng_seed(0)
    guide = AutoLightBridge(two_modes(0.4))
    guide.fit()
    with torch.no_grad():
        guide.logits_0[guide.get_posterior().blocks[0].mixture.locs[:, 0] < 0] = -40.0
    found = report(guide)
    assert found.verdict != "ok"


# ---- refusals ----


def test_discrete_latents_are_named():
    def model():
        k = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0))

    for kind in (AutoLightBridge, AutoBridge):
        with pytest.raises(ValueError, match="kind"):
            kind(model).fit()


def test_subsampled_plates_fit_by_svi_alone():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    y = Y.float()
    with pytest.raises(NotImplementedError, match="SVI"):
        AutoLightBridge(model).fit(y)
    guide = AutoLightBridge(model, num_components=1)
    svi = SVI(
        model,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.999}),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    for _ in range(400):
        svi.step(y)
    mean, sd, _ = conjugate_answer(y)
    law = guide.get_posterior().detached()[0].mixture
    assert float(law.locs[0, 0]) == pytest.approx(float(mean), abs=0.15)
    assert float(law.scale_trils[0, 0, 0]) == pytest.approx(sd, rel=0.25)  # the scale of the full data


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AutoLightBridge(conjugate, num_components=0), "num_components"),
        (lambda: AutoBridge(conjugate, num_steps=1), "num_steps"),
        (lambda: AutoBridge(conjugate, base=AutoDelta(conjugate)), "density"),
        (lambda: AutoBridge(conjugate, base=AutoBridge(conjugate)), "density"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_untrained_base_is_refused():
    with pytest.raises(RuntimeError, match="trained"):
        AutoBridge(conjugate, base=AutoMultivariateNormal(conjugate)).fit(Y)


def test_a_point_mass_is_no_base():
    base = AutoLaplaceApproximation(conjugate)
    base(Y)
    with pytest.raises(ValueError, match="laplace_approximation"):
        AutoBridge(conjugate, base=base).fit(Y)
    guide = AutoBridge(conjugate, base=base.laplace_approximation(Y))
    assert math.isfinite(guide.fit(Y).elbo)


def test_other_arguments_get_draws_of_the_annealed_bridge_and_no_density(annealed):
    assert annealed(Y.clone()).keys() == {"s", "p"}
    drawn = Predictive(bounded, guide=annealed, num_samples=5)(torch.zeros(7, dtype=F))
    assert drawn["s"].shape[0] == 5
    with pytest.raises(ValueError, match="arguments"):
        Trace_ELBO().loss(bounded, annealed, Y + 1)


def test_a_foreign_point_has_no_density(annealed):
    law = annealed.get_posterior(Y)
    x = law.sample()
    assert torch.isfinite(law.log_prob(x))
    with pytest.raises(NotImplementedError, match="own last draw"):
        law.log_prob(x + 1)


def test_a_log_joint_that_is_finite_nowhere_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("t", torch.log(-x.abs() - 1.0))

    with pytest.raises(ValueError, match="finite"):
        AutoLightBridge(model).fit()


def test_a_fit_that_does_not_cover_warns():
    pyro.set_rng_seed(0)

    def model():
        pyro.sample("x", dist.StudentT(torch.full((4,), 1.0, dtype=F), 0.0, 1.0).to_event(1))
        pyro.factor("nothing", torch.zeros(()))

    with pytest.warns(RuntimeWarning, match="does not cover"):
        AutoLightBridge(model, num_components=1, num_updates=0).fit()


def test_unfitted_guides_say_so():
    guide = AutoLightBridge(conjugate)
    assert "not fitted" in repr(guide)
    for read in (
        lambda: guide.log_evidence,
        lambda: guide.importance(100),
        lambda: to_arviz(guide),
        lambda: report(guide),
    ):
        with pytest.raises(RuntimeError, match="fit"):
            read()


def test_a_bridge_without_reparametrised_draws_is_refused_in_a_guide():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    light = LightSB(1)
    light.fit(torch.randn(200, 1), num_updates=10, progress=False)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def guide():
        pyro.module("light", light)
        pyro.sample("x", light())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    with pytest.raises(NotImplementedError, match="push.*fit|fit.*push"):
        svi.step()
    assert math.isfinite(svi.evaluate_loss())
