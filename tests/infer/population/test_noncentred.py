"""Non-centred coordinates: an exact change of variables, chosen for funnels and invisible in the draws."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.coordinates import NonCentred, learnt_coordinates, misfit, non_centred

ZERO = torch.zeros((), dtype=torch.float64)


def nested() -> None:
    """Two levels of location-scale sites under a scale, beside a site that is neither."""
    tau = pyro.sample("tau", dist.LogNormal(ZERO, 1.0))
    rate = pyro.sample("rate", dist.Gamma(ZERO + 2.0, 1.0))
    mu = pyro.sample("mu", dist.StudentT(5.0, ZERO + 1.0, 2.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu[..., None], tau[..., None]))
        pyro.sample("deep", dist.Laplace(theta * 0.5, rate[..., None] + theta.square()))


def funnel() -> None:
    """Neal's funnel: log-scale v, four coordinates of scale exp(v / 2)."""
    v = pyro.sample("v", dist.Normal(ZERO, 3.0))
    with pyro.plate("coordinates", 4):
        pyro.sample("x", dist.Normal(ZERO, torch.exp(v[..., None] / 2)))


def flat_hierarchy() -> None:
    pyro.sample("a", dist.Normal(ZERO, 3.0))
    pyro.sample("b", dist.Gamma(ZERO + 1.0, 1.0))


def coordinates_of(model) -> NonCentred | None:
    return non_centred(log_joint(model), log_joint)


def test_map_and_inverse_are_exact_through_nested_sites() -> None:
    coordinates = coordinates_of(nested)
    assert coordinates.sites == ["deep", "mu", "theta"]
    u = torch.randn(50, coordinates.log_joint.dim, dtype=torch.float64)
    torch.testing.assert_close(coordinates.inverse(coordinates.forward(u)), u, rtol=1e-9, atol=1e-9)


def test_density_follows_the_change_of_variables() -> None:
    # log p(u) = log p(z(u)) + log |dz / du|, the determinant by autograd-free central differences of the map
    coordinates = coordinates_of(nested)
    dim, h = coordinates.log_joint.dim, 1e-6
    u = torch.randn(20, dim, dtype=torch.float64)
    steps = h * torch.eye(dim, dtype=torch.float64)
    columns = [(coordinates.forward(u + step) - coordinates.forward(u - step)) / (2 * h) for step in steps]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1))[1]
    difference = coordinates.log_joint.log_prob(u) - coordinates.centred.log_prob(coordinates.forward(u))
    torch.testing.assert_close(difference, log_det, rtol=1e-6, atol=1e-6)


def test_a_funnel_is_flat_in_its_coordinates() -> None:
    coordinates = coordinates_of(funnel)
    u = torch.randn(100, 5, dtype=torch.float64)
    names = list(coordinates.log_joint.site_shapes)
    assert names == ["v_decentered", "x_decentered"]
    by_hand = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)  # v and x over their scales: five standard normals
    torch.testing.assert_close(coordinates.log_joint.log_prob(u), by_hand, rtol=1e-10, atol=1e-10)


def test_nothing_to_decentre_is_no_coordinates() -> None:
    assert coordinates_of(flat_hierarchy) is None  # only a rescaling
    centred = LogJoint.from_batched(lambda z: -z.square().sum(-1), 2)
    assert non_centred(centred, log_joint) is None  # no model


def masked_funnel() -> None:
    v = pyro.sample("v", dist.Normal(ZERO, 3.0))
    pyro.sample("x", dist.Normal(ZERO, torch.exp(v / 2)).mask(torch.tensor(True)))


def funnel_about_a_discrete_place() -> None:
    c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    v = pyro.sample("v", dist.Normal(0.0, 3.0))  # float32: Pyro's einsum mixes dtypes on a masked Delta of float64
    pyro.sample("x", dist.Normal(6.0 * c, torch.exp(v / 2)))


@pytest.mark.parametrize("model", [masked_funnel, funnel_about_a_discrete_place])
def test_models_that_cannot_be_decentred_keep_their_coordinates(model) -> None:
    # a mask that Pyro's reparameteriser does not see through; a location that is another draw at every call
    assert coordinates_of(model) is None


def uneven_groups(y: Tensor, noise: Tensor) -> None:
    """Thirty groups: some whose data say all about them, some whose data say nothing."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(ZERO + 2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu[..., None], tau[..., None]))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def uneven_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.tensor([0.02, 20.0], dtype=torch.float64).repeat_interleave(15)
    theta = torch.randn(30, generator=generator, dtype=torch.float64)
    return theta + noise * torch.randn(30, generator=generator, dtype=torch.float64), noise


def test_partly_centred_coordinates_are_an_exact_change_of_variables() -> None:
    y, noise = uneven_data()
    degrees = {"theta": torch.linspace(0, 1, 30, dtype=torch.float64)}
    build = partial(log_joint, args=(y, noise))
    coordinates = non_centred(build(uneven_groups), build, degrees)
    dim, h = coordinates.log_joint.dim, 1e-6
    u = torch.randn(10, dim, dtype=torch.float64)
    torch.testing.assert_close(coordinates.inverse(coordinates.forward(u)), u, rtol=1e-9, atol=1e-9)
    steps = h * torch.eye(dim, dtype=torch.float64)
    columns = [(coordinates.forward(u + step) - coordinates.forward(u - step)) / (2 * h) for step in steps]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1))[1]
    difference = coordinates.log_joint.log_prob(u) - coordinates.centred.log_prob(coordinates.forward(u))
    torch.testing.assert_close(difference, log_det, rtol=0, atol=1e-6)
    assert "theta (degree of centring 0.50)" in coordinates.describe()


def test_each_entry_is_centred_as_far_as_its_own_data_ask() -> None:
    pyro.set_rng_seed(0)
    y, noise = uneven_data()
    build = partial(log_joint, args=(y, noise))
    free = non_centred(build(uneven_groups), build)
    coordinates, laws = learnt_coordinates(free, build)
    degrees = coordinates.degrees["theta"]
    assert float(degrees[:15].min()) >= 0.75 and float(degrees[15:].max()) <= 0.25
    assert laws is not None and laws.locs.shape == (1, 32)


def test_a_law_is_normal_up_to_a_linear_map_where_its_misfit_is_zero() -> None:
    pyro.set_rng_seed(0)
    factor = torch.randn(6, 6, dtype=torch.float64)
    x = torch.randn(40_000, 6, dtype=torch.float64) @ factor.T
    grad = -torch.linalg.solve(factor @ factor.T, x.T).T
    one_region = torch.zeros(len(x), dtype=torch.long)
    assert abs(misfit(x, grad, one_region)) < 0.03  # the logarithms of two sample covariances
    # a logistic law has variance pi^2 / 3, and its score one of 1 / 3: log(pi^2 / 9) a coordinate, by any linear map
    uniform = torch.rand(400_000, 2, dtype=torch.float64)
    z = torch.logit(uniform)
    mixed = z @ factor[:2, :2].T
    slope = torch.linalg.solve(factor[:2, :2].T, (1 - 2 * uniform).T).T
    many = torch.zeros(len(z), dtype=torch.long)
    assert abs(misfit(mixed, slope, many) - 2 * math.log(math.pi**2 / 9)) < 0.02


@pytest.mark.slow
def test_funnel_is_sampled_to_its_neck_and_returned_in_the_models_sites() -> None:
    kernel = KernelLangevin(funnel)
    mcmc = MCMC(kernel, num_samples=300, num_chains=64, disable_progbar=True)
    mcmc.run()
    assert kernel.coordinates is not None
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == {"v", "x"} and draws["x"].shape == (64, 300, 4)
    n_eff = float(mcmc.diagnostics()["v"]["n_eff"])
    assert n_eff > 3000
    v = draws["v"]
    assert abs(float(v.mean())) < 4 * 3 / math.sqrt(n_eff)
    for level in (0.01, 0.05, 0.95, 0.99):  # the neck and the mouth
        share = float((v < 3 * dist.Normal(0.0, 1.0).icdf(torch.tensor(level))).double().mean())
        assert abs(share - level) < 5 * math.sqrt(level * (1 - level) / n_eff)
    standard = draws["x"] * torch.exp(-v / 2)[..., None]
    assert abs(float(standard.square().mean()) - 1) < 4 * math.sqrt(2 / (4 * n_eff))


@pytest.mark.slow
def test_initial_params_are_the_models_own() -> None:
    start = {"v": torch.full((16,), -2.0, dtype=torch.float64), "x": torch.full((16, 4), 0.1, dtype=torch.float64)}
    seen: list[Tensor] = []
    kernel = KernelLangevin(funnel)
    mcmc = MCMC(
        kernel,
        num_samples=5,
        warmup_steps=0,
        num_chains=16,
        initial_params=start,
        hook_fn=lambda kernel, params, stage, i: seen.append(params["v"].clone()),
        disable_progbar=True,
    )
    mcmc.run()
    kept = mcmc.sample_stats["acceptance_rate"][:, 0] < 1  # a chain that may have stayed starts at the given point
    assert kernel.coordinates is not None and len(seen) == 5
    stayed = (seen[0] + 2.0).abs() < 1e-9
    assert bool((~stayed | kept).all())


def test_reparam_none_keeps_the_models_coordinates() -> None:
    kernel = KernelLangevin(flat_hierarchy, reparam=None)
    MCMC(kernel, num_samples=5, num_chains=4, disable_progbar=True).run()
    assert kernel.coordinates is None
    with pytest.raises(ValueError, match="reparam must be"):
        KernelLangevin(funnel, reparam="always")
