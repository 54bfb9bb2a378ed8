"""Metrics: invariances that hold exactly, other libraries' values, and floors that perfect samplers do score."""

import functools
import math
import pickle
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import rbf_kernel

from pyro_sb.metrics import (
    Moments,
    Score,
    bw2_uvp,
    cbw2_uvp,
    mmd,
    mode_share_tv,
    mode_shares,
    sliced_wasserstein2,
    wasserstein2,
)

F64 = {"dtype": torch.float64}
CLOUD_METRICS = [wasserstein2, sliced_wasserstein2, mmd]
DISTANCES = [wasserstein2, sliced_wasserstein2]


def by_name(function):
    return function.__name__


def spd(d, *batch, least=0.2):
    a = torch.randn(*batch, d, d, **F64)
    return a @ a.mT / d + least * torch.eye(d, **F64)


# --- Score ---------------------------------------------------------------------------------------------------------


def test_a_score_is_a_float_that_shows_its_floor():
    score = Score(0.0312, floor=0.024)
    assert score == 0.0312
    assert score + 1 == 1.0312
    assert isinstance(score, float)
    assert repr(score) == score.describe() == "0.0312 (floor 0.024)"
    assert f"{score:.2f}" == "0.03"
    assert score.excess == pytest.approx(0.0072, abs=1e-15)
    copy = pickle.loads(pickle.dumps(score))
    assert (copy, copy.floor) == (score, score.floor)


# --- between clouds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7])
def test_a_monotone_map_is_the_optimal_coupling(d):
    # x -> T x + s with T positive definite is the gradient of a convex function, so no other pairing is cheaper
    x = torch.randn(150, d, **F64)
    y = x @ spd(d) + torch.randn(d, **F64)
    moved = (y - x).square().sum(-1).mean().sqrt()
    assert wasserstein2(x, y[torch.randperm(150)]) == pytest.approx(float(moved), rel=1e-10)


def test_exact_transport_agrees_with_an_assignment():
    x, y = torch.randn(80, 3, **F64), 2 * torch.randn(80, 3, **F64)
    cost = cdist(x, y, "sqeuclidean")
    assert wasserstein2(x, y) == pytest.approx(math.sqrt(cost[linear_sum_assignment(cost)].mean()), rel=1e-10)


def test_between_gaussian_clouds_w2_is_the_closed_form_within_the_floors():
    # the triangle inequality: each cloud is about its floor away from its own law
    t, shift = torch.tensor([[1.5, 0.4], [0.4, 0.6]]), torch.tensor([2.0, 0.0])
    source = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    target = dist.MultivariateNormal(shift, t @ t)
    exact = math.sqrt(float((t - torch.eye(2)).square().sum() + shift.square().sum()))
    score = wasserstein2(source.sample((700,)), target)
    assert abs(score - exact) < 2 * score.floor
    assert 0.05 < score.floor < 0.5


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("m", [60, 41])
def test_a_translation_moves_every_direction_by_its_projection(d, m):
    shift = torch.arange(3.0, 3 + d, **F64)
    x = torch.randn(60, d, **F64)
    y = torch.cat([x, x])[torch.randperm(120)] + shift
    assert wasserstein2(x, y) == pytest.approx(float(shift.norm()), rel=1e-10)
    assert sliced_wasserstein2(x, y, num_projections=m) == pytest.approx(float(shift.norm()) / d**0.5, rel=1e-10)


def test_random_directions_see_a_share_of_one_over_d_of_a_translation():
    d, num = 10, 4000
    x, shift = torch.randn(20, d, **F64), torch.ones(d, **F64)
    squared = sliced_wasserstein2(x, x + shift, num_projections=num) ** 2
    share = stats.beta(0.5, (d - 1) / 2)  # of a unit vector's squared length along one axis
    assert abs(squared / d - share.mean()) < 4 * share.std() / num**0.5


def test_the_generator_makes_the_directions():
    x, y = torch.randn(30, 5), torch.randn(30, 5)
    one, again, other = (
        sliced_wasserstein2(x, y, floor_draws=x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert (one, one.floor) == (again, again.floor)
    assert one != other


@pytest.mark.parametrize("m", [50, 73])
def test_sliced_agrees_with_pot(m):
    ot = pytest.importorskip("ot")
    x, y = torch.randn(50, 2, **F64), torch.randn(m, 2, **F64) * 2 + 1
    angle = np.arange(64) * np.pi / 64
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=np.stack([np.cos(angle), np.sin(angle)]))
    assert sliced_wasserstein2(x, y) == pytest.approx(float(theirs), rel=1e-8)


def test_on_the_line_sliced_is_exact():
    x, y = torch.randn(50, 1, **F64), torch.randn(35, 1, **F64).exp()
    assert sliced_wasserstein2(x, y) == pytest.approx(wasserstein2(x, y), rel=1e-10)


@pytest.mark.parametrize("num_projections", [2, 3, 64])
def test_in_the_plane_sliced_is_at_most_w2_over_root_two(num_projections):
    x, y = torch.randn(90, 2, **F64), torch.randn(90, 2, **F64) @ spd(2)
    assert sliced_wasserstein2(x, y, num_projections=num_projections) <= wasserstein2(x, y) / 2**0.5


@pytest.mark.parametrize("metric", DISTANCES, ids=by_name)
def test_copies_of_every_draw_are_the_same_law(metric):
    x, y = torch.randn(40, 2, **F64), torch.randn(31, 2, **F64)
    assert metric(torch.cat([x, x]), torch.cat([y, y, y])) == pytest.approx(metric(x, y), rel=1e-10)


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_metrics_ignore_the_order_of_draws_and_a_common_shift(metric):
    x, y = torch.randn(60, 2, **F64), 2 * torch.randn(60, 2, **F64)
    other = metric(x[torch.randperm(60)] + 3, y[torch.randperm(60)] + 3)
    assert other == pytest.approx(metric(x, y), rel=1e-9)


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_distances_scale_with_the_unit_and_mmd_does_not_see_it(metric):
    x, y, y1 = torch.randn(60, 2, **F64), 2 * torch.randn(60, 2, **F64), 2 * torch.randn(60, 2, **F64)
    one, scaled = metric(x, y, floor_draws=y1), metric(7 * x, 7 * y, floor_draws=7 * y1)
    factor = 1 if metric is mmd else 7
    assert scaled == pytest.approx(factor * one, rel=1e-9)
    assert scaled.floor == pytest.approx(factor * one.floor, rel=1e-9)


@pytest.mark.parametrize("metric", DISTANCES, ids=by_name)
def test_distances_are_symmetric_and_zero_from_a_cloud_to_itself(metric):
    x, y = torch.randn(50, 2, **F64), torch.randn(37, 2, **F64)
    assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-10)
    assert metric(x, x) == 0


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_the_floor_is_the_metric_between_the_target_and_the_reference(metric):
    x, y, other = torch.randn(30, 2) + 5, torch.randn(40, 2), torch.randn(50, 2)
    score = metric(x, y, floor_draws=other)
    assert score.floor == pytest.approx(metric(other, y), rel=1e-9)
    assert score.excess == score - score.floor


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_a_distribution_is_drawn_afresh_for_score_and_floor(metric):
    law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    x = torch.randn(25, 2)
    torch.manual_seed(3)
    score = metric(x, law)
    torch.manual_seed(3)
    y, y1 = law.sample((25,)), law.sample((25,))
    by_hand = metric(x, y, floor_draws=y1)
    assert (score, score.floor) == (by_hand, by_hand.floor)


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_draws_alone_give_a_floor_at_half_the_size(metric):
    x, y = torch.randn(20, 2), torch.randn(41, 2)
    torch.manual_seed(0)
    score = metric(x, y)
    torch.manual_seed(0)
    order = torch.randperm(41)
    first, second = y[order[:20]], y[order[20:]]
    if metric is not mmd:  # its bandwidth is that of all of y
        assert score.floor == pytest.approx(metric(first, second), rel=1e-12)
    assert math.isfinite(score.floor)
    assert score == metric(x, y, floor_draws=x)


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_arrays_and_float32_are_taken(metric):
    x, y = torch.randn(30, 2), torch.randn(30, 2, requires_grad=True)
    assert metric(x.numpy(), y.detach().numpy(), floor_draws=x) == metric(x, y, floor_draws=x)


# --- mmd -----------------------------------------------------------------------------------------------------------


def test_mmd_agrees_with_sklearns_affinity_over_several_blocks():
    x, y = torch.randn(1100, 2, **F64), torch.randn(1303, 2, **F64) + 0.3
    gamma = 1 / (2 * np.median(pdist(y.numpy())) ** 2)
    xx, yy, xy = (rbf_kernel(a, b, gamma=gamma) for a, b in ((x, x), (y, y), (x, y)))
    off = [matrix[~np.eye(len(matrix), dtype=bool)].mean() for matrix in (xx, yy)]
    assert mmd(x, y) == pytest.approx(sum(off) - 2 * xy.mean(), rel=1e-9, abs=1e-14)


def test_mmd_estimates_the_population_value_without_bias():
    # mean affinity of N(m, A), N(0, B): a Gaussian density of covariance A + B + h^2 I at m, times (2 pi h^2)^(d/2)
    bandwidth2, shift = (
        4 * math.log(2),
        np.array([0.5, 0.0]),
    )  # |y - y'|^2 / 2 is chi-squared of 2 degrees: median 2 ln 2

    def affinity(mean, covariance):
        return stats.multivariate_normal.pdf(mean, cov=covariance + bandwidth2 * np.eye(2)) * 2 * np.pi * bandwidth2

    exact = 2 * affinity(np.zeros(2), 2 * np.eye(2)) - 2 * affinity(shift, 2 * np.eye(2))
    pairs = [(torch.randn(400, 2) + torch.tensor(shift), torch.randn(400, 2)) for _ in range(60)]
    scores = [mmd(x, y) for x, y in pairs]
    assert abs(np.mean(scores) - exact) < 4 * np.std(scores) / 60**0.5
    floors = [score.floor for score in scores]
    assert abs(np.mean(floors)) < 4 * np.std(floors) / 60**0.5


def test_mmd_survives_far_outliers():
    x, y = torch.randn(100, 5, **F64), torch.randn(100, 5, **F64)
    wild = torch.cat([x[:80], 1e11 * torch.randn(20, 5, **F64)])
    # they are out of reach of one another too, so where exactly they lie does not matter
    tamed = torch.cat([x[:80], 1e3 * (3 + torch.arange(20.0, **F64))[:, None] * torch.ones(5, **F64)])
    assert mmd(wild, y) == pytest.approx(mmd(tamed, y), rel=1e-9)
    stuck = torch.cat([x[:20], (1e11 * torch.randn(40, 5, **F64)).repeat(2, 1)])  # each twice
    assert mmd(stuck, y) <= 2


# --- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 20])
def test_bures_is_the_cost_of_the_gaussian_optimal_map(d):
    # T positive definite takes N(0, A) to N(0, T A T) optimally, at the cost E |T x - x|^2
    a, t, shift = spd(d), spd(d), torch.randn(d, **F64)
    move = t - torch.eye(d, **F64)
    cost = (move @ a @ move).trace() + shift.square().sum()
    target = t @ a @ t
    score = bw2_uvp(Moments(torch.zeros(d), a), Moments(shift, target))
    assert score == pytest.approx(float(100 * cost / target.trace()), rel=1e-10)
    assert score.floor == 0


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_moments_that_agree_score_zero_even_if_singular(rank):
    factor = torch.randn(5, rank, **F64)
    a = factor @ factor.T + (1.0 if rank == 0 else 0.0) * torch.eye(5, **F64)
    law = Moments(1e3 * torch.ones(5, **F64), a)
    assert 0 <= bw2_uvp(law, law) <= 1e-10


def test_bures_keeps_its_digits_near_zero():
    # scaling a covariance by (1 + e)^2 costs e^2 of its trace: far below the rounding of the three traces
    a = spd(4)
    for e in (1e-3, 1e-6, 1e-9):
        score = bw2_uvp(Moments(torch.zeros(4), a * (1 + e) ** 2), Moments(torch.zeros(4), a))
        assert score == pytest.approx(100 * e**2, rel=1e-4)


def test_the_constant_at_the_mean_scores_100_and_singular_covariances_do():
    target = Moments(torch.ones(3), spd(3))
    assert bw2_uvp(Moments(torch.ones(3), torch.zeros(3, 3)), target) == pytest.approx(100, rel=1e-12)
    draws = torch.zeros(10, 3)
    assert bw2_uvp(draws, target) == pytest.approx(100 * (1 + 3 / float(target.covariance.trace())), rel=1e-12)


def test_draws_are_scored_by_their_sample_moments():
    x, y = np.random.default_rng(0).normal(size=(2, 50, 3))
    ours = bw2_uvp(x, y + 1)
    exact = [Moments(torch.tensor(z.mean(0)), torch.tensor(np.cov(z.T))) for z in (x, y + 1)]
    assert ours == pytest.approx(bw2_uvp(*exact), rel=1e-10)
    batch = cbw2_uvp(torch.tensor(x)[None], Moments(*(part[None] for part in exact[1])), variance=2.0)
    assert batch == pytest.approx(ours * exact[1].covariance.trace().item() / 2, rel=1e-10)


def test_conditional_scores_average_over_source_points():
    num, d = 70, 3
    model, target = (Moments(torch.randn(num, d, **F64), spd(d, num)) for _ in range(2))
    one_by_one = [
        bw2_uvp(Moments(model.mean[p], model.covariance[p]), Moments(target.mean[p], target.covariance[p]))
        * target.covariance[p].trace().item()
        for p in range(num)
    ]
    score = cbw2_uvp(model, target, variance=5.0)
    assert score == pytest.approx(np.mean(one_by_one) / 5, rel=1e-10)
    assert score.floor == 0


@pytest.mark.parametrize(("n", "d"), [(400, 2), (400, 4)])
def test_a_perfect_sampler_scores_the_floor(n, d):
    num, group = 1500, 50
    target = Moments(torch.randn(num, d, **F64), spd(d, num))
    draws = dist.MultivariateNormal(*target).sample((n,)).movedim(0, 1)
    groups = zip(draws.split(group), target.mean.split(group), target.covariance.split(group))
    excess = [cbw2_uvp(rows, Moments(mean, covariance), 100.0).excess for rows, mean, covariance in groups]
    assert abs(np.mean(excess)) < 4 * np.std(excess, ddof=1) / (num / group) ** 0.5
    # two samples of a law are twice as far apart in expectation
    one = Moments(target.mean[0], target.covariance[0])
    assert bw2_uvp(draws[0], draws[0]).floor == pytest.approx(2 * bw2_uvp(draws[0], one).floor, rel=0.05)


def test_the_floor_of_a_round_law_is_that_of_the_sheet():
    # conditional share x 100 (1/n + d / 4n), here with d + 1 for d and n - 1 for n in the second term
    n, d, share = 1000, 128, 0.3
    eye = torch.eye(d).expand(2, d, d)
    score = cbw2_uvp(torch.zeros(2, n, d), Moments(torch.zeros(2, d), eye), variance=d / share)
    assert score.floor == pytest.approx(100 * share * (1 / n + d / (4 * n)), rel=0.01)


# --- modes ---------------------------------------------------------------------------------------------------------


def test_shares_count_the_nearest_centre():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centres[torch.tensor([0, 0, 0, 2])] + 0.1 * torch.randn(4, 2)
    assert mode_shares(x, centres).tolist() == [0.75, 0.0, 0.25]
    assert mode_share_tv(x, centres, [0.5, 0.5, 0.0]) == pytest.approx(0.5, abs=1e-15)
    assert mode_share_tv(x, centres, [0.75, 0.0, 0.25]) == 0


@pytest.mark.parametrize("k", [2, 8])
def test_all_draws_in_one_of_k_modes_are_one_less_one_kth_off(k):
    centres = torch.arange(float(k))[:, None]
    assert mode_share_tv(centres[:1].expand(100, 1), centres) == pytest.approx(1 - 1 / k, abs=1e-12)


@pytest.mark.parametrize("shares", [[0.125] * 8, [0.7, 0.2, 0.1]], ids=["equal", "unequal"])
def test_a_multinomial_sample_scores_the_floor_of_the_shares(shares):
    centres = torch.arange(float(len(shares)))[:, None]
    truth = torch.tensor(shares)
    scores = [
        mode_share_tv(centres[torch.multinomial(truth, 2000, replacement=True)], centres, truth) for _ in range(500)
    ]
    assert abs(np.mean(scores) - scores[0].floor) < 4 * np.std(scores) / 500**0.5


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", CLOUD_METRICS, ids=by_name)
def test_unfit_clouds_are_refused(metric):
    x = torch.randn(10, 2)
    with pytest.raises(
        ValueError, match=r"x must be at least two draws of shape \(n, d\), got \(10,\).*\[\.\.\., None\]"
    ):
        metric(x[:, 0], x)
    with pytest.raises(ValueError, match="x and y must have one dimension, got 2 and 3"):
        metric(x, torch.randn(10, 3))
    with pytest.raises(ValueError, match="x and floor_draws must have one dimension, got 2 and 1"):
        metric(x, x, floor_draws=x[:, :1])
    with pytest.raises(ValueError, match="y must be finite, got NaN or infinity in 1 of 20"):
        metric(x, torch.where(x == x[3, 1], math.nan, x))
    with pytest.raises(ValueError, match="at least 4 draws to be halved for the floor, got 3. Pass more, or floor"):
        metric(x, x[:3])
    with pytest.raises(TypeError, match=r"x must be draws of shape \(n, d\), got a distribution. Write x.sample"):
        metric(dist.Normal(0.0, 1.0), x)


def test_a_constant_target_has_no_bandwidth():
    with pytest.raises(ValueError, match="positive median distance"):
        mmd(torch.randn(10, 2), torch.zeros(10, 2))


def test_no_direction_is_refused():
    with pytest.raises(ValueError, match="num_projections must be at least 1, got 0"):
        sliced_wasserstein2(torch.randn(4, 2), torch.randn(4, 2), num_projections=0)


def test_without_pot_the_error_names_the_extra_and_the_others_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    x = torch.randn(10, 2)
    with pytest.raises(ImportError, match=r'pip install "pyro-sb\[metrics\]", or use sliced_wasserstein2'):
        wasserstein2(x, x)
    assert sliced_wasserstein2(x, x) == 0


def test_a_solver_that_gives_up_is_an_error(monkeypatch):
    ot = pytest.importorskip("ot")
    solver = ot.emd2
    monkeypatch.setattr(ot, "emd2", functools.wraps(solver)(lambda *a, **k: solver(*a, **{**k, "numItermax": 1})))
    with pytest.raises(RuntimeError, match="must reach its optimum, got from POT: numItermax reached.*Use fewer draws"):
        wasserstein2(torch.randn(50, 2), torch.randn(50, 2))


def test_unfit_moments_are_refused():
    good = Moments(torch.zeros(2), torch.eye(2))
    batch = Moments(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    with pytest.raises(
        ValueError, match=r"moments of model must have shapes \(d,\) and \(d, d\), got \(2,\) and \(3, 3\)"
    ):
        bw2_uvp(Moments(torch.zeros(2), torch.eye(3)), good)
    with pytest.raises(ValueError, match="covariance of model must be positive semi-definite"):
        bw2_uvp(Moments(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0]))), good)
    with pytest.raises(ValueError, match=r"means of one shape, got \(3,\) and \(2,\)"):
        bw2_uvp(torch.randn(10, 3), good)
    with pytest.raises(ValueError, match="positive total variance"):
        bw2_uvp(good, Moments(torch.zeros(2), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"of shape \(num_points, n, d\), got \(10, 2\)"):
        cbw2_uvp(torch.randn(10, 2), batch, 1.0)
    with pytest.raises(ValueError, match=r"means of one shape, got \(4, 2\) and \(3, 2\)"):
        cbw2_uvp(torch.randn(4, 10, 2), batch, 1.0)
    with pytest.raises(ValueError, match="variance must be positive and finite, got 0"):
        cbw2_uvp(torch.randn(3, 10, 2), batch, 0.0)
    with pytest.raises(TypeError, match="target must be the exact conditional Moments, got Tensor"):
        cbw2_uvp(torch.randn(3, 10, 2), torch.randn(3, 10, 2), 1.0)


def test_unfit_shares_are_refused():
    x, centres = torch.randn(10, 2), torch.randn(3, 2)
    with pytest.raises(ValueError, match="shares must be 3 numbers of at least 0 that sum to 1, got .* sum 1.5"):
        mode_share_tv(x, centres, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="shares must be 3 numbers"):
        mode_share_tv(x, centres, [0.5, 0.5])
    with pytest.raises(ValueError, match="x and centres must have one dimension, got 2 and 1"):
        mode_shares(x, centres[:, :1])


@pytest.mark.parametrize("dim", [2, 3])
def test_a_generator_reaches_every_draw_of_a_metric(dim):
    x, y = torch.randn(60, dim), torch.randn(60, dim)
    law = torch.distributions.MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    for target in (y, law):
        scores = []
        for seed in (1, 2):
            torch.manual_seed(seed)  # the global generator plays no part
            before = torch.get_rng_state()
            scores.append(sliced_wasserstein2(x, target, generator=torch.Generator().manual_seed(0)))
            assert torch.equal(torch.get_rng_state(), before)
        assert float(scores[0]) == float(scores[1]) and scores[0].floor == scores[1].floor
