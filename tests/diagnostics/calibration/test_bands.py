"""Bands of the ECDF hold their simultaneous level; what leaves them has that p."""

import pytest
import torch
from scipy import stats

from pyro_sb.diagnostics import ecdf_bands, ecdf_p_values
from pyro_sb.diagnostics.calibration.bands import ecdf

F64 = torch.float64
M = 10_000


@pytest.mark.parametrize(("num", "level", "num_points"), [(50, 0.9, 20), (300, 0.95, 100), (1000, 0.5, 100)])
def test_exact_samples_stay_within_everywhere_as_often_as_said(num, level, num_points):
    bands = ecdf_bands(num, level=level, num_points=num_points, num_simulations=M)
    reps = 4000
    found = ecdf(torch.rand(num, reps, dtype=F64), bands.points) - bands.points[:, None]
    inside = (found >= bands.lower[:, None] - 1e-12) & (found <= bands.upper[:, None] + 1e-12)
    share = float(inside.all(0).double().mean())
    # gamma is itself from M samples; counts are whole numbers, so the level may be kept by a little more
    error = (level * (1 - level) * (1 / M + 1 / reps)) ** 0.5
    assert -4 * error < share - level < 4 * error + 0.02
    assert float(inside.double().mean()) > share  # a single point stays within more often


def test_at_one_point_the_band_is_the_binomials_interval():
    bands = ecdf_bands(200, level=0.9, num_points=1, num_simulations=100_000)
    law = stats.binom(200, 0.5)
    low, high = round(200 * float(bands.lower[0] + 0.5)), round(200 * float(bands.upper[0] + 0.5))
    covered = law.cdf(high) - law.cdf(low - 1)
    narrower = law.cdf(high - 1) - law.cdf(low)
    assert narrower < 0.9 < covered + 0.01


def test_the_ecdf_is_the_share_at_or_below():
    columns = torch.tensor([[0.1, 0.9], [0.5, 0.8]], dtype=F64)
    points = torch.tensor([0.05, 0.1, 0.5, 0.85], dtype=F64)
    assert ecdf(columns, points).T.tolist() == [[0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]]


def test_p_values_of_uniform_samples_are_uniform():
    p = ecdf_p_values(torch.rand(200, 1000, dtype=F64))
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    assert 0 < float(p.min()) and float(p.max()) <= 1


def test_a_small_p_is_what_leaves_the_bands():
    columns = torch.rand(150, 800, dtype=F64)
    bands = ecdf_bands(150, level=0.9, num_simulations=50_000)
    found = ecdf(columns, bands.points) - bands.points[:, None]
    outside = ((found < bands.lower[:, None] - 1e-12) | (found > bands.upper[:, None] + 1e-12)).any(0)
    p = ecdf_p_values(columns, num_simulations=50_000)
    clear = (p - 0.1).abs() > 0.01  # two simulations of one null
    assert torch.equal(outside[clear], (p < 0.1)[clear])


def test_beyond_the_null_p_falls_on_and_stays_above_the_true_one():
    # at one point, 1/2, the count is binomial, and its probability known
    for below, num_points in ((60, 1), (90, 1), (90, 100)):
        column = torch.cat([torch.linspace(0.01, 0.49, below), torch.linspace(0.51, 0.99, 100 - below)]).to(F64)
        p = float(ecdf_p_values(column[:, None], num_points=num_points, num_simulations=1000))
        exact = 2 * stats.binom(100, 0.5).sf(below - 1)
        if below == 60:
            assert abs(p - exact) < 4 * (exact / 1000) ** 0.5  # within the null samples' reach
        else:
            assert exact * 0.999 <= p <= 1.001 * num_points * exact < 1e-12


def test_p_does_not_grow_where_the_departure_does():
    scale = torch.linspace(1.0, 0.3, 15, dtype=F64)
    column = (torch.arange(200, dtype=F64)[:, None] + 0.5) / 200 * scale
    assert bool((ecdf_p_values(column, num_simulations=1000).diff() <= 0).all())


def test_tails_are_seen_sooner_than_by_kolmogorov():
    normal = torch.distributions.Normal(0.0, 1.0)
    wide = normal.cdf(torch.randn(400, 50, dtype=F64) / 0.8)
    kolmogorov = torch.tensor([stats.kstest(column, "uniform").pvalue for column in wide.T.numpy()])
    assert (ecdf_p_values(wide) < 0.01).double().mean() > (kolmogorov < 0.01).double().mean() + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 1}, "num must be at least 2.*got 1"),
        ({"num": 50, "level": 95}, r"level must lie in \(0, 1\), got 95"),
        ({"num": 50, "num_simulations": 5}, "num_simulations at least 100, got 50, 100 and 5"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ecdf_bands(**options)
