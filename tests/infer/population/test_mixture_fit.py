"""Choice of a mixture: as good as the truth on fresh draws, and indifferent to what must not matter."""

import math

import pytest
import torch

from pyro_sb.infer.population.mixture_fit import MAX_COMPONENTS, cluster_start, fit_mixture, slice_start, split_start
from pyro_sb.ops.student_mixture import StudentMixture

F64 = {"dtype": torch.float64}


def truth(name):
    eye = torch.eye(2, **F64)
    if name == "gaussian":
        return StudentMixture(
            torch.zeros(1, **F64), torch.ones(1, 2, **F64), eye[None], torch.full((1,), math.inf, **F64)
        )
    if name == "heavy":
        return StudentMixture(torch.zeros(1, **F64), torch.ones(1, 2, **F64), eye[None], torch.full((1,), 4.0, **F64))
    locs = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 8.0]], **F64)
    scales = torch.stack([eye, 0.2 * eye, torch.tensor([[2.0, 0.0], [1.9, 0.3]], **F64)])
    return StudentMixture(torch.tensor([0.2, 0.5, 0.3], **F64).log(), locs, scales, torch.full((3,), math.inf, **F64))


def uniform(points):
    return torch.full_like(points[:, 0], 1 / len(points))


def loss(law, fit, num=20_000):
    """Kullback-Leibler divergence of the fit from the law, and its Monte Carlo error."""
    fresh = law.sample(num)
    gap = law.log_prob(fresh) - fit.log_prob(fresh)
    return float(gap.mean()), float(gap.std() / num**0.5)


@pytest.mark.parametrize("name, limit", [("gaussian", 0.02), ("heavy", 0.04), ("separated", 0.06)])
def test_the_fit_is_near_the_truth_on_fresh_draws(name, limit):
    law = truth(name)
    points = law.sample(1000)
    value, error = loss(law, fit_mixture(points, uniform(points), law.log_prob(points)))
    assert -4 * error < value < limit  # a divergence is never negative


def test_weights_turn_one_law_into_another():
    # draws of a wide Gaussian, weighted to the separated mixture
    law = truth("separated")
    wide = StudentMixture(
        torch.zeros(1, **F64),
        torch.tensor([[0.0, 3.0]], **F64),
        6 * torch.eye(2, **F64)[None],
        torch.full((1,), math.inf, **F64),
    )
    points = wide.sample(20_000)
    weights = torch.softmax(law.log_prob(points) - wide.log_prob(points), 0)
    value, error = loss(law, fit_mixture(points, weights, law.log_prob(points)))
    assert -4 * error < value < 0.15


def test_heavy_tails_are_seen():
    for name, heavy in (("gaussian", False), ("heavy", True)):
        points = truth(name).sample(3000)
        fit = fit_mixture(points, uniform(points), truth(name).log_prob(points))
        assert bool((fit.df < 10).all()) == heavy


def test_separated_modes_get_components_of_their_own():
    law = truth("separated")
    points = law.sample(2000)
    fit = fit_mixture(points, uniform(points), law.log_prob(points))
    assert fit.num_components >= 3
    nearest = torch.cdist(fit.locs, law.locs).argmin(1)
    shares = torch.zeros(3, **F64).index_add(0, nearest, fit.log_weights.exp())
    expected = law.log_weights.exp()
    assert ((shares - expected) / (expected * (1 - expected) / 2000).sqrt()).abs().max() < 4


def test_points_of_no_weight_do_not_matter():
    points = truth("separated").sample(400)
    weights = uniform(points)
    weights[::4] = 0
    weights = weights / weights.sum()
    moved = points.clone()
    moved[::4] = 1e6
    log_density = truth("separated").log_prob(points)
    torch.manual_seed(1)
    fit = fit_mixture(points, weights, log_density)
    torch.manual_seed(1)
    twin = fit_mixture(moved, weights, log_density)
    assert all(torch.equal(a, b) for a, b in zip(fit, twin))


def test_the_fit_follows_a_change_of_units():
    points = truth("separated").sample(400)
    units, shift = torch.tensor([1e-3, 50.0], **F64), torch.tensor([100.0, -7.0], **F64)
    log_density = truth("separated").log_prob(points)
    torch.manual_seed(1)
    fit = fit_mixture(points, uniform(points), log_density)
    torch.manual_seed(1)
    twin = fit_mixture(points * units + shift, uniform(points), log_density - units.log().sum())
    expected = fit.log_prob(points) - units.log().sum()
    torch.testing.assert_close(twin.log_prob(points * units + shift), expected, rtol=0, atol=1e-3)


def test_a_good_previous_mixture_is_kept_up_to_noise():
    law = truth("separated")
    points = law.sample(1000)
    fit = fit_mixture(points, uniform(points), law.log_prob(points), previous=law)
    assert fit.num_components >= law.num_components
    value, error = loss(law, fit)
    assert -4 * error < value < 0.03


@pytest.mark.parametrize("num", [4, 5, 30])
@pytest.mark.parametrize("dim", [1, 6])
def test_few_points_are_enough(num, dim):
    for _ in range(5):
        points = torch.randn(num, dim, **F64)
        fit = fit_mixture(points, uniform(points), -points.square().sum(1))
        assert bool(torch.isfinite(fit.log_prob(points)).all())
        assert float(fit.log_weights.exp().sum()) == pytest.approx(1)
        assert fit.num_components <= max(1, num // (3 * (dim + 1)))


def test_the_size_is_bounded():
    angle = 2 * math.pi * torch.rand(4000, **F64)
    ring = torch.stack([angle.cos(), angle.sin()], 1) * 10 + 0.01 * torch.randn(4000, 2, **F64)
    assert 8 <= fit_mixture(ring, uniform(ring), torch.zeros(4000, **F64)).num_components <= MAX_COMPONENTS


def test_clusters_share_the_covariance_within_them():
    offset = torch.tensor([[-50.0, 0.0], [50.0, 0.0], [0.0, 80.0]], **F64)
    noise = torch.randn(300, 2, **F64)
    label = torch.arange(300) % 3
    noise = noise - torch.stack([noise[label == k].mean(0) for k in range(3)])[label]
    points = noise + offset[label]
    start = cluster_start(points, uniform(points), 3)
    order = torch.cdist(offset, start.locs).argmin(1)
    torch.testing.assert_close(start.locs[order], offset, rtol=0, atol=1e-9)
    expected = torch.cov(noise.T, correction=0).expand(3, 2, 2)
    torch.testing.assert_close(start.scale_trils @ start.scale_trils.mT, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(start.log_weights.exp(), torch.full((3,), 1 / 3, **F64))


def test_slices_follow_a_funnels_neck():
    # log sd v ~ N(0, 2^2): slices of equal mass differ in width by orders of magnitude, as the law does
    v = 2 * torch.randn(4000, **F64)
    points = torch.stack([v, v.exp() * torch.randn(4000, **F64)], 1)
    log_density = -(v**2) / 8 - (points[:, 1] / v.exp()) ** 2 / 2 - v
    start = slice_start(points, uniform(points), log_density, 8)
    widths = start.scale_trils[:, 1].norm(dim=1)
    assert start.num_components == 8
    assert widths[0] > 1e3 * widths[-1]
    assert start.locs[0, 0] > 2 and start.locs[-1, 0] < -2


def test_slices_have_equal_weight():
    points, weights = torch.randn(600, 1, **F64), torch.softmax(torch.randn(600, **F64), 0)
    start = slice_start(points, weights, points[:, 0], 3)  # slices along the axis: the weighted thirds
    order = points[:, 0].argsort()
    third = (weights[order].cumsum(0) * 3).long().clamp_max(2)
    means = torch.stack(
        [(weights[order] * points[order, 0])[third == k].sum() / weights[order][third == k].sum() for k in range(3)]
    )
    torch.testing.assert_close(start.locs[:, 0], means, rtol=0, atol=0.02)


def test_components_are_added_where_a_mixture_lacks_mass():
    # the mixture knows one of two modes, and covers the other by tails alone
    near = truth("heavy")
    locs = torch.tensor([[1.0, 1.0], [12.0, 1.0]], **F64)
    law = StudentMixture(
        torch.tensor([0.8, 0.2], **F64).log(), locs, near.scale_trils.repeat(2, 1, 1), near.df.repeat(2)
    )
    points = law.sample(4000)
    start = split_start(near, points, uniform(points), law.log_prob(points), 4)
    added = start.locs[1:]
    assert 1 <= len(added) <= 4 and float((added - locs[1]).norm(dim=1).max()) < 8.0
    assert float(start.log_weights.exp().sum()) == pytest.approx(1)
    assert torch.cdist(added, added).add(10 * torch.eye(len(added), **F64)).min() > 1.0
    value, error = loss(law, fit_mixture(points, uniform(points), law.log_prob(points), previous=near))
    assert -4 * error < value < 0.03
