"""Pareto-smoothed importance sampling: ArviZ is the oracle, Pareto weights have a known k."""

import math

import pytest
import torch

from pyro_sb.bridges import LightSB
from pyro_sb.diagnostics import psis
from pyro_sb.distributions import Draws
from pyro_sb.infer.amortized.importance import weigh

az = pytest.importorskip("arviz")
F64 = torch.float64


def pareto(shape, num=2000):
    return torch.distributions.Pareto(torch.ones((), dtype=F64), torch.tensor(shape, dtype=F64)).sample((num,)).log()


@pytest.mark.parametrize("num", [100, 1000, 5000])
@pytest.mark.parametrize("shape", [1.1, 2.0, 5.0])
def test_it_is_arvizs(num, shape):
    log_weights = pareto(shape, num)
    smoothed, k_hat = az.psislw(log_weights.numpy())
    found = psis(log_weights)
    assert found.k_hat == pytest.approx(float(k_hat), abs=1e-10)
    torch.testing.assert_close(found.smoothed, torch.from_numpy(smoothed), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "reading", "verdict"), [(5.0, "good", "ok"), (1.7, "usable", "look"), (1.0, "unreliable", "bad")]
)
def test_a_pareto_tail_is_read_in_words(shape, reading, verdict):  # its k is 1 / shape
    found = psis(pareto(shape, 20_000))
    assert (found.reading, found.verdict) == (reading, verdict)
    assert reading in str(found)


@pytest.mark.parametrize(("num", "threshold"), [(100, 0.5), (1000, 2 / 3), (10_000, 0.7)])
def test_few_draws_ask_for_a_lighter_tail(num, threshold):
    assert psis(pareto(5.0, num)).threshold == pytest.approx(threshold)


def test_a_constant_changes_nothing_but_the_evidence():
    log_weights = pareto(2.0)
    one, other = psis(log_weights), psis(log_weights + 700)
    assert one.k_hat == pytest.approx(other.k_hat, abs=1e-9)
    torch.testing.assert_close(one.smoothed, other.smoothed, rtol=0, atol=1e-9)
    assert other.log_evidence - one.log_evidence == pytest.approx(700)
    assert float(one.weights.sum()) == pytest.approx(1)


def test_equal_weights_are_worth_all_their_draws():
    found = psis(torch.zeros(500, dtype=F64))
    assert found.reading == "good" and found.ess == pytest.approx(500) and found.log_evidence == 0


def test_one_weight_that_has_it_all_is_unreliable():
    log_weights = torch.full((500,), -math.inf, dtype=F64)
    log_weights[3] = 0.0
    found = psis(log_weights)
    assert found.verdict == "bad" and found.ess == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, None], ids=["equal", "normal"])
def test_zero_weights_stay_zero_and_few_positive_ones_are_unreliable(value):
    log_weights = torch.full((1000,), -math.inf, dtype=F64)
    log_weights[:10] = torch.randn(10, dtype=F64) if value is None else value
    found = psis(log_weights)
    assert found.k_hat == math.inf and found.verdict == "bad" and found.ess <= 10 + 1e-9
    assert float(found.weights[10:].sum()) == 0 and float(found.weights[:10].sum()) == pytest.approx(1)
    assert "k-hat inf of 1000 weights, unreliable" in str(found)


@pytest.mark.parametrize("positive", [95, 96, 300])
def test_only_what_entered_the_fit_is_smoothed(positive):
    log_weights = torch.full((1000,), -math.inf, dtype=F64)
    log_weights[:positive] = pareto(4.0, positive)
    found = psis(log_weights)
    assert found.tail_size == 95 and float(found.weights[positive:].sum()) == 0 and 1 <= found.ess <= positive
    below = log_weights[:positive].sort().values[:-95]
    kept = (found.smoothed[:positive].sort().values[:-95] + found.log_weights.logsumexp(0) - below).diff()
    assert bool((kept.abs() < 1e-9).all())  # the rest keep their ratios


@pytest.mark.parametrize("shape", [1.5, 4.0])
def test_k_hats_error_is_its_standard_deviation(shape):
    found = [psis(pareto(shape, 4000)) for _ in range(200)]
    k, error = (torch.tensor([getattr(one, name) for one in found], dtype=F64) for name in ("k_hat", "k_hat_error"))
    ratio = float(k.std() / error.mean()) * (190 + 10) / 190  # the prior counts for ten
    assert abs(ratio - 1) < 4 / math.sqrt(2 * 200)
    assert psis(torch.zeros(100)).k_hat_error == 0


def test_a_bridge_judges_itself_as_exact():
    bridge = LightSB(2, num_components=2)
    bridge.fit(torch.randn(300, 2, dtype=F64), solver="moments", progress=False)
    law = bridge()
    found = psis(law.draws((400,)), law.log_prob)
    assert found.verdict == "ok" and found.ess == pytest.approx(400) and abs(found.log_evidence) < 1e-9


def test_what_carries_log_weights_is_read():
    log_weights = pareto(3.0, 300)
    assert psis(weigh({}, log_weights[:, None], batched=False)).k_hat == psis(log_weights).k_hat


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(10), ValueError, "at least 25 weights, got 10"),
        (torch.zeros(100, 3), ValueError, r"shape \(S,\), got \(100, 3\)"),
        (torch.tensor([math.nan] * 50), ValueError, "must not hold NaN or .inf, got 50"),
        ({"w": 1}, TypeError, "must be log weights"),
        (Draws(torch.zeros(50, 1), torch.zeros(50)), TypeError, r"psis\(draws, log_prob\)"),
    ],
)
def test_bad_input_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        psis(x)


def test_a_density_goes_with_draws_alone():
    with pytest.raises(TypeError, match="goes with Draws alone, got Tensor"):
        psis(torch.zeros(50), lambda z: z[:, 0])
    with pytest.raises(ValueError, match=r"one number a draw, \(50,\), got \(50, 1\)"):
        psis(Draws(torch.zeros(50, 1), torch.zeros(50)), lambda z: z)
