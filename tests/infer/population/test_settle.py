"""Chains that settle: exact normal laws on Gaussians, mixtures along what is bent, regions without a maximum."""

import math

import pyro
import pytest
import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.ascent import quasi_newton_ascent
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.settle import fitted_laws, joined, settle, walked
from pyro_sb.infer.population.sources import law_of_points
from pyro_sb.infer.population.subspace import bent, mixture_along
from pyro_sb.ops.student_mixture import StudentMixture

F64 = torch.float64


def normal_joint(mean: Tensor, covariance: Tensor) -> LogJoint:
    precision = torch.linalg.inv(covariance)

    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * ((x - mean) @ precision * (x - mean)).sum(-1)

    return LogJoint.from_batched(log_prob, len(mean))


def law(mean: Tensor, scale: Tensor) -> StudentMixture:
    one = torch.ones(1, dtype=F64)
    return StudentMixture(one.log(), mean[None], scale[None], math.inf * one)


def autoregression(dim: int, rho: float = 0.9) -> Tensor:
    index = torch.arange(dim, dtype=F64)
    return rho ** (index[:, None] - index).abs()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_normal_target_is_known_exactly_after_two_short_windows_in_any_unit(scale: float) -> None:
    pyro.set_rng_seed(0)
    covariance = scale**2 * autoregression(30)
    mean = scale * torch.linspace(-3, 3, 30, dtype=F64)
    joint = normal_joint(mean, covariance)
    start = law(mean + scale, 0.3 * scale * torch.eye(30, dtype=F64))  # neither its place nor its shape
    found = settle(joint, start)
    torch.testing.assert_close(found.core.locs[0] / scale, mean / scale, rtol=0, atol=1e-6)
    fitted = found.core.scale_trils[0] @ found.core.scale_trils[0].T
    torch.testing.assert_close(fitted / scale**2, covariance / scale**2, rtol=0, atol=1e-6)
    assert 0.3 < found.step_size < 1.5 and joint.evaluations.gradient < 64 * 60 * 9


def banana(x: Tensor) -> Tensor:
    """A normal law of 25 dimensions, sheared: x1 - .4 (x0^2 - 1), and an exponential tail along x2."""
    first, second, third, rest = x[..., 0], x[..., 1], x[..., 2], x[..., 3:]
    tail = third - third.exp()  # log of an exponential law
    return -0.5 * (first.square() + (second - 0.4 * (first.square() - 1)).square() + rest.square().sum(-1)) + tail


@pytest.mark.slow
def test_mixtures_along_bent_directions_fit_what_a_normal_law_cannot() -> None:
    pyro.set_rng_seed(0)
    dim, num = 25, 4000
    x = torch.randn(num, dim, dtype=F64)
    x[:, 1] += 0.4 * (x[:, 0].square() - 1)
    x[:, 2] = torch.empty(num, dtype=F64).exponential_().log()
    joint = LogJoint.from_batched(banana, dim)
    log_density, grad = joint.value_and_grad(x)
    normal = law(x.mean(0), torch.linalg.cholesky(x.T.cov()))
    shape = bent(normal, x, grad)
    assert shape is not None and shape.directions.shape == (dim, 2)
    white = shape.directions.square().sum(1)
    assert float(white[:3].sum()) > 0.95  # nothing is bent along the others
    _, proposal = mixture_along(shape, x)

    def share(mixture: StudentMixture) -> float:
        y = mixture.sample(20_000)
        log_w = joint.log_prob(y) - mixture.log_prob(y)
        return float(torch.softmax(log_w, 0).square().sum().reciprocal()) / len(y)

    assert share(normal) < 0.55 and share(proposal) > 0.8
    # it is a law: its own density integrates to one under the normal law's wide cousin
    wide = normal._replace(df=torch.full((1,), 8.0, dtype=F64))
    y = wide.sample(200_000)
    ratio = (proposal.log_prob(y) - wide.log_prob(y)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(y))


def test_a_normal_law_has_no_bent_direction() -> None:
    pyro.set_rng_seed(0)
    covariance = autoregression(25)
    factor = torch.linalg.cholesky(covariance)
    x = torch.randn(500, 25, dtype=F64) @ factor.T
    grad = -torch.linalg.solve(covariance, x.T).T
    assert bent(law(torch.zeros(25, dtype=F64), factor), x, grad) is None


def test_ascents_without_hessians_end_in_the_maximum_whatever_the_units() -> None:
    pyro.set_rng_seed(0)
    units = 10 ** torch.linspace(-4, 4, 40, dtype=F64)
    covariance = units[:, None] * autoregression(40) * units
    joint = normal_joint(units, covariance)
    starts = units * (1 + 5 * torch.randn(16, 40, dtype=F64))
    ends, values = quasi_newton_ascent(joint, starts, units.expand(16, 40))
    torch.testing.assert_close(values, torch.zeros(16, dtype=F64), rtol=0, atol=0.02)
    assert joint.evaluations.gradient < 16 * 100
    assert float(((ends - units) / units).abs().max()) < 0.2  # .02 nats are .2 sds


def slab_and_spike(dim: int, share: float) -> tuple[LogJoint, float]:
    """A narrow correlated law inside a wide one that has no maximum of its own, and its log normaliser."""
    spike = torch.linalg.inv(autoregression(dim))
    log_det = float(torch.linalg.slogdet(spike)[1])
    width = torch.linspace(0.5, 2.0, dim, dtype=F64)
    centre = torch.full((dim,), 1.6 / math.sqrt(dim), dtype=F64)

    def log_prob(x: Tensor) -> Tensor:
        inner = math.log(1 - share) - 0.5 * ((x + centre) @ spike * (x + centre)).sum(-1) + 0.5 * log_det
        outer = math.log(share) - 0.5 * ((x - centre) / width).square().sum(-1) - width.log().sum()
        return torch.logaddexp(inner, outer)

    return LogJoint.from_batched(log_prob, dim), 0.5 * dim * math.log(2 * math.pi)


@pytest.mark.parametrize(("dim", "share"), [(30, 0.7), (60, 0.4)])
def test_a_wide_region_without_a_maximum_of_its_own_is_met(dim: int, share: float) -> None:
    pyro.set_rng_seed(1)
    joint, log_evidence = slab_and_spike(dim, share)
    population = populate(joint)
    assert population.num_modes == 1  # every ascent ends in the spike
    assert abs(population.log_evidence - log_evidence) < 4 * population.log_evidence_error
    assert population.log_evidence_error < 0.05
    wide = population.weights @ (population.points.square().mean(1) > 1.35).to(F64)
    reference = torch.linspace(0.5, 2.0, dim, dtype=F64) * torch.randn(20_000, dim, dtype=F64)
    expected = share * float(((reference + 1.6 / math.sqrt(dim)).square().mean(1) > 1.35).to(F64).mean())
    inner = torch.randn(20_000, dim, dtype=F64) @ torch.linalg.cholesky(autoregression(dim)).T
    expected += (1 - share) * float(((inner - 1.6 / math.sqrt(dim)).square().mean(1) > 1.35).to(F64).mean())
    assert abs(float(wide) - expected) < 0.08
    assert (
        population.jump is not None
        and abs(float(population.jump.shares.log_shares.exp().max()) - max(share, 1 - share)) < 0.03
    )


def test_chains_of_two_regions_joined_go_on_in_both() -> None:
    pyro.set_rng_seed(0)
    eye = torch.eye(24, dtype=F64)
    centre = torch.full((24,), 4.0, dtype=F64)

    def log_prob(x: Tensor) -> Tensor:
        return torch.logaddexp(-0.5 * (x - centre).square().sum(-1), -0.5 * (x + centre).square().sum(-1))

    joint = LogJoint.from_batched(log_prob, 24)
    both = joined(
        settle(joint, law(centre, eye)), settle(joint, law_of_points(torch.randn(99, 24, dtype=F64) - centre))
    )
    assert both.core.num_components == 2
    torch.testing.assert_close(both.core.log_weights.exp(), torch.full((2,), 0.5, dtype=F64))
    points = walked(joint, both, None, 8).points
    assert abs(float((points[:, 0] > 0).to(F64).mean()) - 0.5) < 1e-9  # local moves cross no barrier


def test_a_region_that_no_draw_is_of_keeps_its_law() -> None:
    pyro.set_rng_seed(0)
    eye = torch.eye(22, dtype=F64)
    laws = StudentMixture(
        torch.full((2,), math.log(0.5), dtype=F64),
        torch.stack([0 * eye[0], 1e3 * eye[0]]),
        torch.stack([2 * eye, 3 * eye]),
        torch.full((2,), math.inf, dtype=F64),
    )
    x = torch.randn(100, 22, dtype=F64)
    fitted = fitted_laws(laws, x, -x)
    torch.testing.assert_close(fitted.scale_trils, torch.stack([eye, 3 * eye]), rtol=0, atol=1e-8)
    torch.testing.assert_close(fitted.locs[1], laws.locs[1])
    assert torch.equal(fitted_laws(laws, x[:20], -x[:20]).locs, laws.locs)  # too few for 22 dimensions
