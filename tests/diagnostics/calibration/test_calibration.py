"""Ranks, coverage and simulation-based calibration: exact posteriors pass, wrong ones are caught."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import Calibration, Regions, Run, calibration_draws, coverage, sbc, sbc_ranks, tarp
from pyro_sb.infer import AmortizedPosterior

F64 = torch.float64
S, L = 500, 99


def conjugate(dim=3, num=S):
    """Truths N(0, 1), one observation each with unit noise: the posterior is N(y / 2, 1/2)."""
    theta = torch.randn(num, dim, dtype=F64)
    return theta, theta + torch.randn(num, dim, dtype=F64)


def posterior_draws(y, scale=1.0, shift=0.0, num=L):
    return y / 2 + math.sqrt(0.5) * (shift + scale * torch.randn(num, *y.shape, dtype=F64))


# ---- ranks ----


def test_a_rank_counts_the_draws_below():
    draws = torch.tensor([[3.0], [1.0], [2.0]])
    for truth, rank in [(0.5, 0), (1.5, 1), (2.5, 2), (3.5, 3)]:
        assert sbc_ranks(torch.tensor([truth]), draws).tolist() == [rank]


def test_ranks_keep_the_events_shape_and_go_by_entry():
    latents, draws = torch.randn(7, 2, 3), torch.randn(11, 7, 2, 3)
    ranks = sbc_ranks(latents, draws)
    assert ranks.shape == (7, 2, 3)
    assert ranks[4, 1, 2] == sbc_ranks(latents[4:5, 1, 2], draws[:, 4:5, 1, 2])[0]


def test_ranks_do_not_change_under_a_monotone_map():
    latents, draws = torch.randn(50, 2, dtype=F64), torch.randn(20, 50, 2, dtype=F64)
    assert torch.equal(sbc_ranks(latents, draws), sbc_ranks(latents.exp(), draws.exp()))


def test_a_truth_and_draws_that_all_tie_have_every_rank_alike():
    ranks = sbc_ranks(torch.zeros(11_000), torch.zeros(10, 11_000))
    counts = torch.bincount(ranks, minlength=11).double()
    assert len(counts) == 11
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 25.2  # 99.5 % of chi2 with 10 degrees of freedom


def test_ties_of_a_discrete_posterior_are_broken_uniformly():
    """A coin for truth and draws: without random ties half of the ranks would be 0."""
    truths, draws = torch.randint(0, 2, (S, 2)).double(), torch.randint(0, 2, (L, S, 2)).double()
    assert (Calibration.of(truths, draws).p_values > 0.01).all()


# ---- what calibration catches ----


@pytest.mark.parametrize("num_draws", [1, 4, L])
def test_an_exact_posterior_is_uniform_at_any_number_of_draws(num_draws):
    theta, y = conjugate(dim=8)
    p_values = Calibration.of(theta, posterior_draws(y, num=num_draws)).p_values
    assert (p_values > 0.01).all()


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.5}, {"scale": 2.0}, {"shift": 0.5}], ids=["overconfident", "too wide", "shifted"]
)
def test_a_wrong_posterior_is_caught(wrong):
    theta, y = conjugate()
    assert (Calibration.of(theta, posterior_draws(y, **wrong)).p_values < 1e-4).all()


def test_the_worst_parameter_is_named():
    theta, y = conjugate()
    draws = posterior_draws(y)
    draws[..., 1] += 1.0
    calibration = Calibration.of(theta, draws, names=("a", "b", "c"))
    assert calibration.worst[0] == "b"
    assert calibration.worst[1] == calibration.p_values[1] == calibration.p_values.min()


def test_the_repr_shows_the_worst_first_and_few_of_many():
    theta, y = conjugate(dim=15, num=60)
    draws = posterior_draws(y)
    draws[..., 9] += 3.0
    lines = repr(Calibration.of(theta, draws)).splitlines()
    assert "60 data sets, 99 draws" in lines[0]
    assert lines[2].startswith("[9]")
    assert lines[-1] == "... and 8 more" and len(lines) <= 10


def test_too_narrow_is_seen_in_the_bands_and_named():
    theta, y = conjugate()
    draws = posterior_draws(y)
    draws[..., 2] = posterior_draws(y, scale=0.7)[..., 2]
    calibration = Calibration.of(theta, draws, names=("a", "b", "c"))
    assert calibration.verdict == "bad" and int(calibration.band_p_values.argmin()) == 2
    assert (calibration.band_p_values[:2] > 0.01).all()
    assert Calibration.of(theta, posterior_draws(y)).verdict == "ok"


@pytest.mark.parametrize("dim", [150, 600])
def test_many_parameters_that_are_wrong_are_bad_and_exact_ones_are_not(dim):
    truths, noise = torch.randn(200, dim, dtype=F64), torch.randn(L, 200, dim, dtype=F64)
    assert Calibration.of(truths, 0.3 * noise).verdict == "bad"
    assert Calibration.of(truths, noise).verdict == "ok"
    noise[..., 0] *= 0.3  # one of many
    assert Calibration.of(truths, noise).verdict == "bad"


def test_the_ecdfs_difference_has_the_shape_of_the_error():
    theta, y = conjugate(dim=1, num=2000)
    points = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    narrow = Calibration.of(theta, posterior_draws(y, scale=0.5)).ecdf_difference(points)[:, 0]
    biased = Calibration.of(theta, posterior_draws(y, shift=1.0)).ecdf_difference(points)[:, 0]
    assert narrow[0] > 0.05 > abs(narrow[1]) and narrow[2] < -0.05  # a bowl of ranks
    assert (biased > 0).all() and biased[1] > 0.2  # draws too high: ranks too low


# ---- TARP ----


def test_a_ball_grows_from_its_point_and_an_interval_from_the_middle():
    ranks = torch.tensor([[0], [10], [90], [99]])
    uniforms = (ranks + 0.5).double() / 100
    balls, intervals = (cls(ranks, ("a",), 99, uniforms) for cls in (Regions, Calibration))
    assert balls.coverage([0.5]).item() == 0.5 and intervals.coverage([0.5]).item() == 0.0
    assert balls.coverage([0.95]).item() == 0.75 and intervals.coverage([0.85]).item() == 0.5
    torch.testing.assert_close(balls.credibility, uniforms)
    torch.testing.assert_close(intervals.credibility[:, 0], torch.tensor([0.99, 0.79, 0.81, 0.99], dtype=F64))


def test_balls_cover_as_they_claim_for_an_exact_posterior():
    theta, y = conjugate(num=2000)
    regions = tarp(posterior_draws(y), theta)
    shares = regions.coverage((0.1, 0.5, 0.9))[:, 0]
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    assert (((shares - levels) / (levels * (1 - levels) / 2000).sqrt()).abs() < 3.5).all()
    assert regions.verdict == "ok" and regions.names == ("tarp",)


@pytest.mark.parametrize("wrong", [{"scale": 0.6}, {"scale": 1.6}, {"shift": 0.8}])
def test_balls_see_a_wrong_posterior(wrong):
    theta, y = conjugate(num=1000)
    assert tarp(posterior_draws(y, **wrong), theta).verdict == "bad"


def test_balls_see_a_wrong_correlation_that_ranks_cannot():
    theta, y = conjugate(dim=2, num=1000)
    common, own = torch.randn(L, 1000, 1, dtype=F64), torch.randn(L, 1000, 2, dtype=F64)
    draws = y / 2 + math.sqrt(0.5) * (0.9 * common + math.sqrt(1 - 0.81) * own)
    assert Calibration.of(theta, draws).verdict == "ok"
    assert tarp(draws, theta).verdict == "bad"


def test_points_that_know_the_data_see_a_posterior_that_ignores_them():
    theta, y = conjugate(dim=1, num=1000)
    prior = torch.randn(L, 1000, 1, dtype=F64)
    assert Calibration.of(theta, prior).verdict == "ok" and tarp(prior, theta).verdict == "ok"
    assert tarp(prior, theta, centres=y).verdict == "bad"
    assert tarp(posterior_draws(y), theta, centres=y).verdict == "ok"


def test_the_unit_of_a_parameter_is_no_matter():
    theta, y = conjugate(dim=2, num=100)
    draws, unit = posterior_draws(y), torch.tensor([1.0, 1e4], dtype=F64)
    ranks = [
        tarp(d, t, generator=torch.Generator().manual_seed(3)).ranks
        for d, t in [(draws, theta), (draws * unit, theta * unit)]
    ]
    assert torch.equal(*ranks)


# ---- coverage ----


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_coverage_is_that_of_the_normal(scale):
    """Intervals of N(0, scale^2) hold a N(0, 1) truth with probability 2 Phi(scale z) - 1."""
    num, levels = 4000, (0.5, 0.9)
    truths, draws = torch.randn(num, dtype=F64), scale * torch.randn(999, num, dtype=F64)
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf(torch.tensor([(1 + level) / 2 for level in levels], dtype=F64))
    exact = 2 * normal.cdf(scale * quantiles) - 1
    z = (coverage(draws, truths, levels) - exact) / (exact * (1 - exact) / num).sqrt()
    assert (z.abs() < 3.3).all()


@pytest.mark.parametrize("num_draws", [1, 2, 19, 100])
def test_uniform_ranks_cover_exactly_at_any_number_of_draws(num_draws):
    ranks = torch.arange(num_draws + 1)[:, None]
    levels = (0.1, 0.5, 0.9, 0.99)
    calibration = Calibration(ranks, ("a",), num_draws, torch.zeros_like(ranks).double())
    torch.testing.assert_close(
        calibration.coverage(levels)[:, 0], torch.tensor(levels, dtype=F64), rtol=1e-12, atol=1e-12
    )


def test_truths_in_the_middle_are_covered_and_beyond_the_draws_are_not():
    draws = torch.arange(99.0)[:, None]
    assert coverage(draws, torch.tensor([48.5]), [0.5, 0.9]).tolist() == [1.0, 1.0]
    assert coverage(draws, torch.tensor([1e3]), [0.5, 0.9]).tolist() == [0.0, 0.0]


def test_coverage_keeps_shapes_and_agrees_with_the_calibrations():
    theta, y = conjugate(dim=6, num=80)
    draws = posterior_draws(y)
    shares = coverage(draws.unflatten(-1, (2, 3)), theta.unflatten(-1, (2, 3)), (0.2, 0.5, 0.8))
    assert shares.shape == (3, 2, 3)
    torch.testing.assert_close(shares.flatten(1), Calibration.of(theta, draws).coverage((0.2, 0.5, 0.8)))


# ---- of an amortised posterior ----


def model(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("y", dist.Normal(mu + x, scale[..., None, None]).to_event(2))


class Oracle:
    """A posterior of ``mu`` given y ~ N(mu, 1), whose draws are exact or too narrow."""

    def __init__(self, posterior, scale):
        self.y, self.scale = posterior.observation.values, scale

    def sample(self, num):
        y = self.y
        return {"mu": y / 2 + math.sqrt(0.5) * self.scale * torch.randn(num, *y.shape).to(y)}


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(model, bridge="light")
    amortized.fit(torch.ones(()), num_simulations=300, num_updates=20, num_copies=2, progress=False)
    return amortized


@pytest.mark.parametrize("corrected", [False, "importance", pytest.param(True, marks=pytest.mark.slow)])
def test_every_number_of_every_site_has_a_rank(fitted, corrected, recwarn):
    calibration = sbc(fitted, 20, 25, corrected=corrected)
    assert calibration.names == (*(f"mu[{i}, {j}]" for i in range(2) for j in range(3)), "scale")
    assert calibration.ranks.shape == calibration.uniforms.shape == (20, 7)
    assert calibration.num_draws == 25
    assert 0 <= calibration.ranks.min() <= calibration.ranks.max() <= 25


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (0.5, False)])
def test_sbc_pairs_each_truth_with_its_own_observation(monkeypatch, scale, passes):
    def normal():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1))

    amortized = AmortizedPosterior(normal, bridge="light")
    amortized.fit(num_simulations=50, num_updates=1, num_copies=0, progress=False)
    condition = amortized.condition
    monkeypatch.setattr(amortized, "condition", lambda y: Oracle(condition(y), scale))
    p_values = sbc(amortized, S, L).p_values
    assert (p_values > 0.01).all() if passes else (p_values < 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("corrected", ["importance", "mcmc"])
def test_corrections_calibrate_a_bridge_that_is_wrong(corrected):
    """Made twice too wide, the bridge fails; what the model corrects passes."""

    def normal():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.5))

    amortized = AmortizedPosterior(normal, bridge="light")
    amortized.fit(num_simulations=1000, num_updates=200, progress=False)
    amortized._rows.factor *= 2
    assert sbc(amortized, 400).worst[1] < 1e-4
    assert sbc(amortized, 400, corrected=corrected).worst[1] > 0.01


# ---- of any sampler of a model ----


def one_number():
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0))


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "ok"), (0.5, "bad")])
def test_a_users_sampler_is_judged_on_data_sets_of_the_model(scale, verdict):
    def sampler(y):
        return {"mu": y / 2 + scale * math.sqrt(0.5) * torch.randn(60, dtype=F64)}

    found = sbc(one_number, 200, 50, sampler=sampler)
    assert found.names == ("mu",) and found.num_draws == 50 and found.verdict == verdict


def test_a_samplers_draws_are_thinned_evenly_and_belong_to_their_data():
    offset = torch.randn(39, dtype=F64)
    joint = calibration_draws(one_number, 20, 20, sampler=lambda y: {"mu": y + offset})
    torch.testing.assert_close(joint.draws[:, :, 0], joint.observations[:, 0] + offset[::2, None])


def walk(y, num, rho=0.98):
    """A stationary chain of the exact posterior: right, and as slow as rho."""
    noise, states = torch.randn(num, *y.shape, dtype=F64), [torch.randn(y.shape, dtype=F64)]
    for step in noise[1:]:
        states.append(rho * states[-1] + math.sqrt(1 - rho**2) * step)
    return y / 2 + math.sqrt(0.5) * torch.stack(states)


def test_a_sampler_of_few_effective_draws_is_named_with_their_number():
    with pytest.warns(RuntimeWarning, match=r"autocorrelated: \d\.\d effective ones of 'mu' .*num_draws \(now 50\)"):
        sbc(one_number, 20, 50, sampler=lambda y: {"mu": walk(y, 100)})
    sbc(one_number, 20, 20, sampler=lambda y: {"mu": walk(y, 200, rho=0.7)})  # 35 effective ones


def test_the_chains_of_a_finished_mcmc_are_judged_as_chains():
    far = torch.tensor([-5.0, 5.0], dtype=F64)[:, None]
    with pytest.warns(RuntimeWarning, match="effective ones of 'mu'"):  # each moves, none reaches the other
        stuck = calibration_draws(
            one_number, 20, 20, sampler=lambda y: Run({"mu": far + torch.randn(2, 50, dtype=F64)})
        )
    torch.testing.assert_close(stuck.draws[:10].mean(), torch.tensor(-5.0, dtype=F64), rtol=0, atol=0.5)
    with pytest.warns(RuntimeWarning, match=r"1\.0 effective ones"):
        sbc(one_number, 20, 20, sampler=lambda y: {"mu": y.expand(50)})
    sbc(one_number, 20, 20, sampler=lambda y: Run({"mu": walk(y.expand(50), 2).T}))  # two draws each


def test_a_model_without_observed_sites_is_refused_by_name():
    def prior_alone():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    def returned():
        return pyro.sample("mu", dist.Normal(0.0, 1.0))

    def two():
        pyro.sample("nu", dist.Normal(0.0, 1.0))
        prior_alone()

    for alone in (prior_alone, returned):  # observed=("mu",) would leave no latent
        with pytest.raises(
            ValueError, match=r"must have the observed sites \['y'\], got \['mu'\] alone.*pyro.sample\(.y., "
        ) as caught:
            sbc(alone, sampler=lambda y: {})
        assert "observed=(" not in str(caught.value)
    with pytest.raises(ValueError, match=r"got \['mu', 'nu'\].*Name them in observed="):
        sbc(two, sampler=lambda y: {})
    with pytest.raises(ValueError, match=r"got \['mu'\]"):
        sbc(prior_alone)
    with pytest.raises(ValueError, match="must be open to be simulated, got data at"):
        sbc(lambda: pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=torch.ones(())))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (None, "a model needs the sampler"),
        (lambda y: torch.zeros(50), r"draws by site, \['mu'\], or a finished MCMC, got Tensor"),
        (lambda y: {"nu": torch.zeros(50)}, r"got \['nu'\]"),
        (lambda y: {"mu": torch.zeros(10)}, r"at least 20 draws of 'mu', shape \(20,\), got \(10,\)"),
    ],
)
def test_a_sampler_that_gives_something_else_is_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        sbc(one_number, 20, 20, sampler=sampler)


# ---- errors ----


def test_bad_input_is_refused(fitted):
    with pytest.raises(RuntimeError, match="must be fitted before it can be judged.*: call amortized.fit"):
        sbc(AmortizedPosterior(model))
    with pytest.raises(ValueError, match="num_draws must be at least 20, got 5"):
        sbc(fitted, num_draws=5)
    with pytest.raises(ValueError, match="num_data_sets must be at least 20, got 0"):
        sbc(fitted, num_data_sets=0)
    with pytest.raises(ValueError, match="corrected must be"):
        sbc(fitted, corrected="magic")
    with pytest.raises(ValueError, match=r"shape \(L, S, \*\)"):
        sbc_ranks(torch.zeros(3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="NaN"):
        sbc_ranks(torch.tensor([torch.nan]), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="levels must lie"):
        coverage(torch.zeros(5, 1), torch.zeros(1), [90.0])
    with pytest.raises(ValueError, match="one name for each of 2"):
        Calibration.of(torch.zeros(3, 2), torch.zeros(5, 3, 2), names=("a",))
    with pytest.raises(ValueError, match="is its own sampler"):
        sbc(fitted, sampler=lambda y: {})
    with pytest.raises(TypeError, match="calibration is over data sets, and one posterior has one"):
        sbc(fitted.condition(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"shape \(L, S, parameters\)"):
        tarp(torch.zeros(5, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="one point a data set"):
        tarp(torch.zeros(5, 4, 1), torch.zeros(4, 1), centres=torch.zeros(1))
