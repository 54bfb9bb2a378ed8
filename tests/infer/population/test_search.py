"""Newton search: exact on Gaussians however scaled, every mode of a ring, and nothing where there is no maximum."""

import math

import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.search import (
    derivatives,
    dispersed_starts,
    find_optima,
    laplace_evidence,
    minus_hessian,
    newton_ascent,
    strictly_concave,
)

F64 = {"dtype": torch.float64}


def stiff_covariance():
    """Correlations of .99 at scales from .01 to 15."""
    scales = torch.tensor([0.01, 0.3, 2.0, 15.0], **F64)
    correlation = torch.full((4, 4), 0.99, **F64).fill_diagonal_(1.0)
    return correlation * scales * scales[:, None]


def gaussian(loc, covariance, log_factor=0.0):
    law = torch.distributions.MultivariateNormal(loc, covariance)
    return LogJoint.from_batched(lambda z: law.log_prob(z) + log_factor, len(loc))


def modes(locs, scale, weights=None):
    weights = torch.ones(len(locs), **F64) / len(locs) if weights is None else weights

    def log_prob(z):
        squared = (z[:, None] - locs).square().sum(-1) / scale**2
        return torch.logsumexp(weights.log() - squared / 2, 1) - z.shape[1] * math.log(scale * (2 * math.pi) ** 0.5)

    return LogJoint.from_batched(log_prob, locs.shape[1])


def ring(num, radius, dim):
    angle = torch.arange(num, **F64) / num * 2 * math.pi
    return torch.cat([radius * torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(num, dim - 2, **F64)], 1)


def test_a_stiff_gaussian_takes_one_newton_step_to_its_exact_optimum_and_curvature():
    loc, covariance = torch.tensor([0.02, -1.0, 3.0, 8.0], **F64), stiff_covariance()
    target = gaussian(loc, covariance)
    ends, _, precisions, converged = newton_ascent(target, 10 * torch.randn(16, 4, **F64), max_iter=4)
    assert bool(converged.all())
    torch.testing.assert_close(
        (ends - loc) / covariance.diagonal().sqrt(), torch.zeros(16, 4, **F64), rtol=0, atol=1e-4
    )
    whitened = torch.linalg.cholesky(covariance)
    torch.testing.assert_close(
        whitened.T @ precisions @ whitened, torch.eye(4, **F64).expand(16, 4, 4), rtol=0, atol=1e-3
    )
    assert target.evaluations.gradient < 16 * (1 + 4 * (2 * 4 + 1)) + 1


def test_laplace_is_exact_for_gaussians():
    target = gaussian(torch.tensor([0.02, -1.0, 3.0, 8.0], **F64), stiff_covariance(), log_factor=-77.7)
    optima = find_optima(target)
    assert optima.points.shape == (1, 4)
    assert float(optima.log_laplace) == pytest.approx(-77.7, abs=1e-4)
    precision = torch.linalg.inv(stiff_covariance())
    peak = torch.distributions.MultivariateNormal(torch.zeros(4, **F64), precision_matrix=precision)
    exact = laplace_evidence(peak.log_prob(torch.zeros(1, 4, **F64)), precision[None])
    assert abs(float(exact)) < 1e-10


@pytest.mark.parametrize("dim", [2, 10])
def test_all_modes_of_a_ring_are_found(dim):
    locs = ring(8, 4.0, dim)
    optima = find_optima(modes(locs, 0.4))
    assert optima.points.shape == (8, dim)
    nearest = torch.cdist(locs, optima.points).min(1)
    assert nearest.values.max() < 1e-5
    assert set(nearest.indices.tolist()) == set(range(8))
    torch.testing.assert_close(optima.log_laplace.exp(), torch.full((8,), 1 / 8, **F64), rtol=1e-3, atol=0)
    assert 8 <= int(optima.hits.sum()) <= optima.num_starts


def test_more_starts_follow_while_a_maximum_was_met_once():
    assert find_optima(modes(torch.zeros(1, 2, **F64), 1.0)).num_starts == 64
    optima = find_optima(modes(ring(12, 4.0, 2), 0.3))
    assert len(optima.points) == 12
    assert optima.num_starts >= 1984  # two maxima are met: there may be more


def test_mirrored_modes_are_both_found_with_their_evidence():
    locs = torch.tensor([[2.0, -1.0], [-2.0, 1.0]], **F64)
    optima = find_optima(modes(locs, 0.3, torch.tensor([0.3, 0.7], **F64)))
    torch.testing.assert_close(optima.points, locs.flip(0), rtol=0, atol=1e-5)  # best first
    torch.testing.assert_close(optima.log_laplace.exp(), torch.tensor([0.7, 0.3], **F64), rtol=1e-4, atol=0)
    assert bool((optima.log_density.diff() <= 0).all())


def test_a_mode_of_no_mass_is_left_out():
    weights = torch.tensor([1.0, math.exp(-16.0)], **F64)
    locs = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], **F64)
    assert len(find_optima(modes(locs, 0.5, weights)).points) == 1
    assert len(find_optima(modes(locs, 0.5, weights.sqrt())).points) == 2


def test_a_saddle_is_left():
    # symmetric double well, started on the ridge but for 1e-6: plain Newton would run into the saddle at 0
    well = LogJoint.from_batched(lambda z: -((z[:, 0] ** 2 - 1) ** 2) - z[:, 1] ** 2, 2)
    starts = torch.tensor([[1e-6, 0.5], [-1e-6, -0.5]], **F64)
    ends, _, precisions, converged = newton_ascent(well, starts, 60)
    assert bool(converged.all())
    torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0], [-1.0, 0.0]], **F64), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        precisions, torch.diag(torch.tensor([8.0, 2.0], **F64)).expand(2, 2, 2), atol=1e-3, rtol=0
    )


def test_a_funnel_has_no_maximum():
    # centred form, flat on the log scale: the density grows without bound down the neck
    def funnel(z):
        return -(z[:, 1:] ** 2).sum(1) * torch.exp(-2 * z[:, 0]) / 2 - (z.shape[1] - 1) * z[:, 0]

    optima = find_optima(LogJoint.from_batched(funnel, 6))
    assert optima.points.shape == (0, 6)
    assert optima.precisions.shape == (0, 6, 6)
    assert optima.num_starts == 64


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e5])
def test_units_do_not_matter(unit):
    # a least-squares line in coordinates of any unit, far from all starts
    covariate = torch.linspace(60.0, 72.0, 200, **F64)
    answers = -6e4 + 1.3e3 * covariate + 2e4 * torch.randn(200, **F64)
    design = torch.stack([torch.ones_like(covariate), covariate], 1) * unit

    def log_density(z):
        residual = answers - z[:, :2] @ design.T
        return -200 * z[:, 2] - residual.square().sum(1) * torch.exp(-2 * z[:, 2]) / 2

    optima = find_optima(LogJoint.from_batched(log_density, 3))
    best = torch.linalg.lstsq(design, answers[:, None]).solution[:, 0]
    assert len(optima.points) == 1
    assert int(optima.hits) > 0.6 * optima.num_starts
    sd = torch.linalg.inv(optima.precisions[0]).diagonal().sqrt()
    assert ((optima.points[0, :2] - best) / sd[:2]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [2, 8])
def test_a_flat_direction_has_no_maximum(dim, dtype):
    # least squares with more coefficients than the design can tell apart, flat prior; the null direction is oblique
    design = 3 * torch.randn(20, dim, **F64)
    design = (design - design.mean(1, keepdim=True)).to(dtype)
    data = torch.randn(20, **F64).to(dtype)
    oblique = LogJoint.from_batched(lambda z: -(z @ design.T - data).square().sum(1) / 2, dim, dtype)
    assert len(find_optima(oblique).points) == 0
    axis = LogJoint.from_batched(lambda z: -(z[:, 1:] ** 2).sum(1) / 2, dim, dtype)
    assert len(find_optima(axis).points) == 0


def test_curvature_is_judged_without_units():
    stiff = torch.linalg.inv(stiff_covariance())
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], **F64)
    flat = torch.ones(2, 2, **F64)
    assert strictly_concave(stiff[None], 1e-8).tolist() == [True]
    units = torch.diag(torch.logspace(-8, 8, 4, **F64))
    assert strictly_concave((units @ stiff @ units)[None], 1e-8).tolist() == [True]
    tall = torch.diag(torch.tensor([-1.0, 1e300], **F64))
    empty = torch.zeros(2, 2, **F64)
    assert strictly_concave(torch.stack([indefinite, flat, tall, empty]), 1e-8).tolist() == [False] * 4


def test_differences_of_the_gradient_are_the_hessian():
    def log_prob(z):
        return -(z**4).sum(-1) - torch.cosh(z[..., 0] * z[..., 1]) + z[..., 2].sin() * z[..., 0]

    x = torch.randn(5, 3, **F64)
    expected = torch.stack([-torch.autograd.functional.hessian(log_prob, row) for row in x])
    got = minus_hessian(LogJoint.from_batched(log_prob, 3), x)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(got, got.mT)
    value, grad, _ = derivatives(LogJoint.from_batched(log_prob, 3), x)
    torch.testing.assert_close(value, log_prob(x))
    torch.testing.assert_close(grad, torch.func.grad(lambda z: log_prob(z).sum())(x))


def test_hessians_of_many_starts_are_taken_a_few_at_a_time(monkeypatch):
    precision = torch.linspace(1, 2, 40, **F64)
    joint, held = LogJoint.from_batched(lambda z: -(precision * z.square()).sum(-1) / 2, 40), []
    value_and_grad = joint.value_and_grad
    monkeypatch.setattr(joint, "value_and_grad", lambda z: held.append(z.numel()) or value_and_grad(z))
    whole = minus_hessian(joint, torch.randn(9, 40, **F64))
    monkeypatch.setattr("pyro_sb.infer.population.search.HELD", 10_000)
    parts = minus_hessian(joint, torch.randn(9, 40, **F64))
    for found in (whole, parts):
        torch.testing.assert_close(found, torch.diag(precision).expand(9, 40, 40), rtol=1e-7, atol=1e-7)
    assert held[0] == 9 * 81 * 40 and max(held[1:]) <= 10_000 and sum(held[1:]) == held[0]


def test_starts_are_finite_and_overdispersed():
    strip = LogJoint.from_batched(lambda z: torch.where(z[:, 0].abs() < 2.5, -z[:, 0].square(), -torch.inf), 2)
    starts = dispersed_starts(strip, 64)
    assert 8 <= len(starts) < 64  # the wide ones are cut
    assert bool((starts[:, 0].abs() < 2.5).all())
    assert starts[:, 1].abs().max() > 5.5 > 2 > starts[:8, 1].abs().max()


def test_a_target_that_is_nan_everywhere_is_said():
    with pytest.raises(ValueError, match="finite"):
        find_optima(LogJoint.from_batched(lambda z: z.sum(1) * math.nan, 2))
