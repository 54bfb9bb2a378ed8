"""Two sources of regions: the prior's density, what particles and screening meet, and how both are pooled."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.mixture_fit import fit_mixture, thinned
from pyro_sb.infer.population.population import honest_evidence
from pyro_sb.infer.population.search import find_optima
from pyro_sb.infer.population.sources import (
    Effort,
    affordable,
    laplace_mixture,
    pooled,
    screened,
    temper_and_climb,
)

F64 = {"dtype": torch.float64}


def spike_in_slab(dim, spike, slab=0.1, share=0.9):
    """A narrow normal that holds most of the mass beside a wide one, under a prior that is far wider than both."""
    place = torch.full((dim,), 0.2, **F64)

    def model():
        x = pyro.sample("x", dist.Uniform(-torch.ones(dim, **F64), 1.0).to_event(1))
        parts = [
            math.log(weight) + dist.Normal(loc, sd).log_prob(x).sum(-1)
            for weight, loc, sd in ((share, place, spike), (1 - share, torch.zeros(dim, **F64), slab))
        ]
        pyro.factor("likelihood", torch.logaddexp(*parts))

    joint = log_joint(model)
    return joint, lambda z: ((joint.constrain(z)["x"] - place).square().sum(-1) < 9 * dim * spike**2).double()


def far_modes(dim, num, seed):
    """Normal modes of many widths, far apart."""
    generator = torch.Generator().manual_seed(seed)
    locs = 8 * torch.randn(num, dim, generator=generator, **F64)
    sds = torch.exp(torch.empty(num, **F64).uniform_(math.log(0.3), math.log(1.5), generator=generator))
    weights = torch.rand(num, generator=generator, **F64) + 0.3
    weights = weights / weights.sum()

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(dim, **F64), 10.0).to_event(1))
        gaps = (x[..., None, :] - locs).square().sum(-1) / sds**2
        law = torch.logsumexp(weights.log() - dim * sds.log() - 0.5 * gaps, -1)
        pyro.factor("likelihood", law + 0.5 * (x / 10).square().sum(-1) + dim * math.log(10.0))

    return log_joint(model), locs, weights


def shares(result, labels, num):
    return torch.zeros(num, **F64).index_add(0, labels, result.weights)


# ---- the prior ----


def regression(x, y):
    b = pyro.sample("b", dist.Laplace(x.new_zeros(2), 3.0).to_event(1))
    s = pyro.sample("s", dist.Gamma(x.new_tensor(2.0), 1.0))
    pyro.factor("more", -b.square().sum(-1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x @ b[..., None])[..., 0], s[..., None]), obs=y)


def test_the_density_without_data_is_that_of_the_latents():
    x = torch.randn(30, 2, **F64)
    joint = log_joint(regression, args=(x, x.sum(1)))
    z = torch.randn(7, 3, **F64)
    b, log_s = z[:, :2], z[:, 2]
    two, one = torch.tensor([2.0, 1.0], **F64)
    exact = dist.Laplace(0 * one, 3 * one).log_prob(b).sum(-1) + dist.Gamma(two, one).log_prob(log_s.exp()) + log_s
    torch.testing.assert_close(joint.without_data().log_prob(z), exact, rtol=0, atol=1e-10)


def test_the_density_without_data_takes_no_route_that_the_joint_refused():
    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", len(y)):  # an extra dimension mixes rows of a plate, in the likelihood alone
            pyro.sample("y", dist.Normal(a[..., None] + y.new_zeros(()), 1.0), obs=y)

    joint = log_joint(model, args=(torch.randn(5, **F64),))
    order = ("plate", "vmap", "loop")
    assert order.index(joint.without_data().route) >= order.index(joint.route)


# ---- what is met ----


@pytest.mark.parametrize(("dim", "spike"), [(5, 0.04), (10, 0.06), (10, 0.04)])
def test_a_spike_in_a_slab_is_met_and_weighed(dim, spike):
    joint, inside = spike_in_slab(dim, spike)
    result = populate(joint)
    share = float(result.weights @ inside(result.points))
    error = float((result.weights.square() @ (inside(result.points) - share).square()).sqrt())
    assert abs(share - 0.9) < 4 * error + 0.01  # a ball of three sds times sqrt(d) holds all of the spike
    assert abs(result.log_evidence + dim * math.log(2.0)) < 4 * result.log_evidence_error
    assert [source.name for source in result.sources] == ["search", "prior"]


@pytest.mark.parametrize("seed", [1, 2])
def test_modes_of_many_widths_are_all_met(seed):
    joint, locs, weights = far_modes(5, 10, seed)
    result = populate(joint, 4096)
    labels = torch.cdist(result.points, locs).argmin(1)
    assert 0.5 * (shares(result, labels, 10) - weights).abs().sum() < 0.03
    assert abs(result.log_evidence) < 4 * result.log_evidence_error


@pytest.mark.slow
def test_more_modes_than_any_cap_are_all_met():
    locs = 8.0 * torch.cartesian_prod(*[torch.arange(7.0, **F64) - 3] * 2)

    def log_density(z):
        return torch.logsumexp(-0.5 * (z[:, None] - locs).square().sum(-1), 1) - math.log(2 * math.pi * len(locs))

    result = populate(LogJoint.from_batched(log_density, 2), 4096)
    found = shares(result, torch.cdist(result.points, locs).argmin(1), len(locs))
    assert result.num_modes == len(locs)
    assert 0.5 * (found - 1 / len(locs)).abs().sum() < 0.06  # the sampling error of 49 shares is .03
    assert abs(result.log_evidence) < 4 * result.log_evidence_error


def test_screening_meets_a_basin_that_ascents_of_starts_do_not():
    locs = torch.zeros(3, 8, **F64)
    locs[0, 0], locs[1, 0], locs[2, 1] = -12.0, 12.0, 15.0
    sds = torch.tensor([1.5, 1.5, 0.5], **F64)

    def log_density(z):
        return torch.logsumexp(-0.5 * (z[:, None] - locs).square().sum(-1) / sds**2 - 8 * sds.log(), 1)

    joint = LogJoint.from_batched(log_density, 8)
    met = [0, 0]
    for seed in range(3):
        torch.manual_seed(seed)
        first = find_optima(joint)
        more, _ = screened(joint, first)
        for k, optima in enumerate((first, more)):
            met[k] += len(optima.points) == 3
    assert met[1] == 3 > met[0]


def test_maxima_met_seldom_are_counted_as_a_sign_of_others():
    joint, *_ = far_modes(5, 10, 1)
    optima = find_optima(joint)._replace(hits=torch.tensor([1] + [50] * 9))
    share = torch.softmax(optima.log_laplace, 0)[0]
    assert optima.unmet == pytest.approx(float(share))
    assert optima._replace(hits=torch.tensor([3] + [50] * 9)).rare == pytest.approx(float(share))
    assert optima._replace(hits=torch.tensor([4] + [50] * 9)).rare == 0.0


def test_the_second_source_says_what_it_may_miss():
    joint, _ = spike_in_slab(5, 0.05)
    source = temper_and_climb(joint, find_optima(joint), Effort(512, 0.5, 2, 4)).source
    assert source.capacity == pytest.approx(3 / 512)
    assert "512 particles" in source.describe()
    assert "may be missed" in source.describe()


def test_a_prior_that_the_data_hardly_allow_is_said_with_its_share():
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros((), **F64), 1.0))
        pyro.factor("gate", torch.where(a > 4.5, 0.0, -torch.inf))

    joint = log_joint(model, initial_params={"a": torch.tensor(5.0, **F64)})
    source = temper_and_climb(joint, find_optima(joint), Effort(512, 0.5, 2, 4)).source
    assert source.name == "wide law"
    assert "of 512" in source.instead and source.instead in source.describe()


def test_small_populations_scout_no_less_than_large_ones_in_proportion():
    joint = LogJoint.from_batched(lambda z: -z.square().sum(-1), dim=2)
    small, large = (affordable(joint, True, num) for num in (256, 4096))
    assert (16 * small.num, small[1:]) == (large.num, large[1:])


def test_long_runs_of_a_model_get_fewer_particles():
    def model(num):
        a = pyro.sample("a", dist.Normal(torch.zeros((), **F64), 1.0))
        with pyro.plate("rows", num):
            pyro.sample("y", dist.Normal(a[..., None] if a.dim() else a, 1.0), obs=torch.zeros(num, **F64))

    short, long = (affordable(log_joint(model, args=(num,)), least=True) for num in (5, 2000))
    assert short.num == 4096 >= 8 * long.num


# ---- how both are pooled ----


def test_pooled_particles_and_draws_are_a_sample_of_the_target():
    joint, locs, weights = far_modes(2, 3, 4)
    optima = find_optima(joint)
    tempered = temper_and_climb(joint, optima, Effort(4096, 0.5, 3, 4))
    sample = pooled(joint, tempered.law, tempered.particles, laplace_mixture(tempered.optima), 2048)
    mean = sample.weights @ sample.points
    assert ((mean - weights @ locs) / (sample.points.std(0) / 30)).abs().max() < 4


def test_thinning_is_without_bias():
    weights = torch.rand(3000, **F64) ** 6
    weights = weights / weights.sum()
    values = torch.linspace(0, 1, 3000, **F64)
    means = []
    for _ in range(400):
        keep, kept = thinned(weights, 300)
        assert abs(len(keep) - 300) < 90
        means.append(float(kept @ values[keep]))
    means = torch.tensor(means, **F64)
    assert abs(float(means.mean() - weights @ values)) < 4 * float(means.std()) / 20 + 2e-4


def test_few_rows_are_all_kept():
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2], **F64)
    keep, kept = thinned(weights, 10)
    assert keep.tolist() == [0, 2, 3]
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.3, 0.2], **F64))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_draws_of_a_chain_are_held_out_together():
    # ten chains that never move: any two halves of the draws agree, any two halves of the chains do not
    places = torch.randn(10, 3, **F64)
    points = places.repeat(100, 1)
    uniform, log_density = torch.full((1000,), 1e-3, **F64), -points.square().sum(1) / 2
    apart = fit_mixture(points, uniform, log_density, groups=torch.arange(1000) % 10)
    assert apart.num_components < fit_mixture(points, uniform, log_density).num_components


# ---- evidence ----


def test_the_error_of_the_evidence_is_widened_by_the_tail_of_the_weights():
    light = 0.3 * torch.randn(4000, **F64)
    value, error = honest_evidence(light)
    mean = light.exp()
    assert value == pytest.approx(float(mean.mean().log()))
    assert error == pytest.approx(float(mean.std() / mean.mean()) / math.sqrt(4000), rel=0.01)
    # Pareto weights of k = .9 have no variance: the mean of N is off by some N^(k - 1)
    heavy = torch.distributions.Exponential(torch.tensor(1 / 0.9, **F64)).sample((4000,))
    assert honest_evidence(heavy)[1] > 4000 ** (0.8 - 1)


@pytest.mark.slow
def test_the_evidence_keeps_its_error():
    missed = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        result = populate(far_modes(3, 4, seed)[0])
        missed += abs(result.log_evidence) > 3 * result.log_evidence_error
    assert missed <= 1
