"""Tails against a weighted population: normal quantiles are known, AR chains raise no alarm, lost tails do."""

import math

import pytest
import torch

from pyro_sb.diagnostics.reports.tails import LEVELS, audit_tails
from pyro_sb.ops.student_mixture import StudentMixture

F64 = torch.float64
ENDS = (2.5758, 2.3263, 1.9600, 1.6449)  # a normal law exceeds them with these probabilities


def population(dim=3, num=2**15):
    """Draws of a wider t law, weighted to be standard normal."""
    eye = torch.eye(dim, dtype=F64)
    wide = StudentMixture(torch.zeros(1, dtype=F64), torch.zeros(1, dim, dtype=F64), 1.2 * eye[None], 5 * eye[0, :1])
    points = wide.sample(num)
    return points, -points.square().sum(1) / 2 - wide.log_prob(points)


def chains(rho, num_chains, num_draws, dim=3):
    """Autoregressive chains, each stationary and standard normal."""
    x = torch.randn(num_chains, num_draws, dim, dtype=F64)
    for i in range(1, num_draws):
        x[:, i] = rho * x[:, i - 1] + math.sqrt(1 - rho**2) * x[:, i]
    return x


def audited(draws, **options):
    return audit_tails(*population(draws.shape[2]), draws, tuple("abc")[: draws.shape[2]], **options)


def test_the_points_and_shares_are_those_of_a_normal_law():
    found = audited(chains(0.0, 64, 1000))
    ends = torch.tensor(ENDS, dtype=F64)[:, None].expand(4, 3)
    torch.testing.assert_close(found.points, torch.stack([-ends, ends]), rtol=0, atol=0.15)
    due = torch.tensor(LEVELS, dtype=F64)[:, None].expand(2, 4, 3)
    torch.testing.assert_close(found.shares, due, rtol=0.25, atol=0)
    torch.testing.assert_close(found.ratio, found.shares / due)
    quantiles = torch.tensor([-2.3263, -1.6449, 1.6449, 2.3263], dtype=F64)[:, None].expand(4, 3)
    torch.testing.assert_close(found.population_quantiles, quantiles, rtol=0, atol=0.1)
    torch.testing.assert_close(found.quantiles, quantiles, rtol=0, atol=0.1)
    assert found.verdict == "ok" and 0.6 < float(found.z.std()) < 1.5


@pytest.mark.slow
def test_chains_of_the_right_law_raise_no_alarm():
    alarms = 0
    for seed in range(10):
        torch.manual_seed(seed)
        for rho, num_chains, num_draws in ((0.9, 64, 1000), (0.9, 128, 300), (0.9, 4, 2000), (0.5, 8, 100)):
            alarms += audited(chains(rho, num_chains, num_draws)).verdict != "ok"
    assert alarms <= 2


@pytest.mark.parametrize("side", [0, 1])
def test_a_tail_that_the_draws_lack_is_bad_and_named(side):
    draws = chains(0.5, 64, 1000)
    sign = (-1.0, 1.0)[side]
    draws[..., 1] = torch.where(sign * draws[..., 1] > 1.8, -draws[..., 1], draws[..., 1])
    found = audited(draws)
    assert found.verdict == "bad" and found.flagged[side, :, 1].any() and not found.flagged[:, :, [0, 2]].any()
    assert found.line.value.startswith(f"P(b {'<>'[side]} ") and "hardly enter" in found.line.note
    assert float(found.ratio[side, :3, 1].max()) < 0.1


def test_too_heavy_tails_are_bad_too():
    found = audited(1.3 * chains(0.5, 64, 1000))
    assert found.verdict == "bad" and "too often" in found.line.note and float(found.ratio.min()) > 1.25


def test_a_chain_that_sticks_in_a_tail_is_looked_at_and_called_short_where_chains_disagree():
    draws = chains(0.5, 64, 500, dim=1)
    draws[7, 100:250] = 2.5 + 0.01 * draws[7, 100:250]
    found = audited(draws)
    assert found.verdict == "look" and bool(found.stuck[1, 0]) and not bool(found.stuck[0, 0])
    assert (
        "one chain stayed at a > 2." in found.line.value
        and "of 500 draws" in found.line.value
        and 150 <= float(found.longest[1, 0]) < 170
    )
    assert not found.line.short and audited(draws, converged=False).line.short


def test_a_population_that_misses_tails_itself_is_said_to():
    found = audited(chains(0.5, 64, 500), excess=5.6)
    assert found.verdict == "look" and "misses regions itself (excess 5.6" in found.line.note


def test_too_few_weighted_draws_say_nothing():
    points, log_weights = population(1, 200)
    found = audit_tails(points, log_weights - 6 * points[:, 0].abs(), chains(0.0, 8, 100, 1), ("a",))
    assert found.verdict == "-" and "too few" in found.line.note


@pytest.mark.parametrize("shape", [(1, 3), (1, 40), (3, 5)])
def test_short_runs_have_a_line(shape):
    assert audited(torch.randn(*shape, 2, dtype=F64)).line.verdict in ("ok", "look", "-")
