"""Log weights: effective size and evidence as exact algebra, resampling counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_sb.weights import effective_sample_size, log_evidence, normalise, pareto_k, pareto_tail, systematic_resample

F64 = {"dtype": torch.float64}
log_weight_lists = st.lists(st.one_of(st.floats(-700, 700), st.just(-math.inf)), min_size=1, max_size=40)


@pytest.mark.parametrize("num", [1, 7, 1000])
def test_k_equal_weights_among_zeros_are_k_draws(num):
    log_weights = torch.cat([torch.full((num,), 3e4, **F64), torch.full((50,), -math.inf, **F64)])
    assert effective_sample_size(log_weights) == pytest.approx(num, rel=1e-12)


def test_no_weight_is_no_draw():
    nothing = torch.full((5,), -math.inf, **F64)
    assert effective_sample_size(nothing) == 0.0
    assert log_evidence(nothing) == (-math.inf, math.inf)


@given(log_weight_lists)
@settings(deadline=None)
def test_the_effective_size_lies_between_one_and_n(values):
    ess = effective_sample_size(torch.tensor(values, **F64))
    if all(value == -math.inf for value in values):
        assert ess == 0
    else:
        assert 1 - 1e-9 <= ess <= len(values) * (1 + 1e-9)


def test_the_effective_size_is_n_over_one_plus_the_squared_variation():
    weights = torch.rand(100, **F64) ** 3
    variation = weights.var(correction=0) / weights.mean() ** 2
    assert effective_sample_size(weights.log()) == pytest.approx(float(100 / (1 + variation)), rel=1e-12)


def test_the_evidence_is_the_mean_weight_with_the_means_relative_error():
    weights = torch.rand(100, **F64) ** 3
    value, error = log_evidence(weights.log())
    assert value == pytest.approx(math.log(float(weights.mean())), abs=1e-12)
    assert error == pytest.approx(float(weights.std(correction=0) / weights.mean() / 10), rel=1e-10)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_factor_on_the_target_adds_to_the_evidence_alone(shift):
    log_weights = torch.randn(50, **F64)
    (value, error), (moved, same) = log_evidence(log_weights), log_evidence(log_weights + shift)
    assert moved == pytest.approx(value + shift, abs=1e-9)
    assert same == pytest.approx(error, rel=1e-8)
    assert effective_sample_size(log_weights + shift) == pytest.approx(effective_sample_size(log_weights), rel=1e-8)
    torch.testing.assert_close(normalise(log_weights + shift), normalise(log_weights), rtol=1e-8, atol=0)


def test_weights_are_shares():
    log_weights = torch.tensor([math.log(3.0), -math.inf, math.log(1.0)], **F64)
    torch.testing.assert_close(normalise(log_weights), torch.tensor([0.75, 0.0, 0.25], **F64))


def test_the_reported_error_is_the_spread_of_the_evidence():
    # target N(0, 1) from N(0, 1.5^2): the log evidence is 0
    x = 1.5 * torch.randn(2000, 400, **F64)
    log_weights = -(x**2) / 2 + (x / 1.5) ** 2 / 2 + math.log(1.5)
    z = torch.tensor([value / error for value, error in map(log_evidence, log_weights)])
    assert abs(float(z.mean())) < 4 / 2000**0.5 + 0.05  # the logarithm of a mean is biased by half its variance
    assert abs(float(z.var()) - 1) < 4 * (2 / 2000) ** 0.5


@given(log_weight_lists, st.integers(1, 300))
@settings(deadline=None)
def test_systematic_counts_differ_from_their_means_by_less_than_one(values, num):
    if all(value == -math.inf for value in values):
        return
    weights = normalise(torch.tensor(values, **F64))
    index = systematic_resample(weights, num)
    counts = torch.bincount(index, minlength=len(values))
    assert index.shape == (num,)
    assert (counts - num * weights).abs().max() < 1 + 1e-9
    assert bool((index.diff() >= 0).all())


def test_zero_weights_are_never_drawn():
    weights = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], **F64)
    for _ in range(50):
        assert set(systematic_resample(weights, 33).tolist()) <= {1, 3}


def test_systematic_counts_are_unbiased():
    weights = torch.tensor([0.13, 0.29, 0.58], **F64)
    counts = torch.stack([torch.bincount(systematic_resample(weights, 5), minlength=3) for _ in range(4000)]).double()
    assert ((counts.mean(0) - 5 * weights) / counts.std(0) * 4000**0.5).abs().max() < 4


# ---- k-hat ----


@pytest.mark.parametrize("alpha", [1.2, 2.0, 4.0])
def test_k_hat_is_the_inverse_of_the_tails_exponent(alpha):
    # P(w > x) = x^-alpha is generalised Pareto of shape 1 / alpha above every threshold
    k = torch.tensor([pareto_k(-torch.rand(40_000, **F64).log() / alpha) for _ in range(20)])
    assert abs(float((k.mean() - 1 / alpha) / k.std() * 20**0.5)) < 4 + 20**0.5 * 0.02 / float(k.std())  # its prior: .5
    assert abs(float(k.mean()) - 1 / alpha) < 0.05


def test_k_hat_of_light_and_bounded_tails():
    exponential, uniform = torch.rand(40_000, **F64).log().neg().log(), torch.rand(40_000, **F64).log()
    assert abs(pareto_k(exponential)) < 0.15  # shape 0
    assert pareto_k(uniform) < -0.5  # shape -1


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_factor_on_the_weights_leaves_k_hat(shift):
    log_weights = 2 * torch.randn(500, **F64)
    assert pareto_k(log_weights + shift) == pytest.approx(pareto_k(log_weights), abs=1e-6)


def test_k_hat_at_its_ends():
    assert pareto_k(torch.zeros(100, **F64)) == -math.inf
    one = torch.full((100,), -math.inf, **F64)
    one[:3] = 0.0
    assert pareto_k(one) == math.inf  # three weights carry all
    assert pareto_k(torch.full((100,), -math.inf, **F64)) == math.inf
    some = torch.full((1000,), -math.inf, **F64)
    some[:200] = torch.randn(200, **F64)
    assert math.isfinite(pareto_k(some))
    single = torch.zeros(100, **F64)
    single[0] = 50.0
    assert pareto_k(single) == math.inf  # one weight carries all
    with pytest.raises(ValueError, match="at least 25 weights, got 24"):
        pareto_k(torch.zeros(24, **F64))


@pytest.mark.parametrize("rest", [-math.inf, -60.0, -800.0], ids=["zero", "nothing beside", "underflows"])
@pytest.mark.parametrize("positive", [10, 94])
def test_a_tail_that_few_draws_carry_has_no_shape(rest, positive):  # of 1000 weights 95 are the tail
    log_weights = torch.full((1000,), rest, **F64)
    log_weights[:positive] = 0.3 * torch.randn(positive, **F64)
    assert pareto_k(log_weights) == math.inf
    log_weights[:positive] = 0.0
    assert pareto_k(log_weights) == math.inf


def test_zeros_below_the_tail_do_not_count():
    log_weights = -torch.rand(1000, **F64).log() / 3  # k is 1/3 above every threshold
    log_weights[log_weights.argsort()[:500]] = -math.inf
    most = log_weights.clone()
    most[most.argsort()[:905]] = -math.inf  # the 95 that are the tail, alone
    tail = pareto_tail(log_weights)
    assert tail.k == pareto_k(log_weights.clamp_min(0.01)) and len(tail.places) == 95
    assert bool((log_weights[tail.places] > tail.log_threshold + log_weights.max()).all())
    assert math.isfinite(pareto_k(most)) and len(pareto_tail(most).places) == 95


def test_a_very_heavy_tail_keeps_its_k():
    assert 5 < pareto_k(-10 * torch.rand(20_000, **F64).log()) < 15  # its threshold is 1e-26 of the largest


@pytest.mark.parametrize("raised", [1, 3, 4, 6])
def test_rounding_above_equal_weights_is_no_tail(raised):
    """Weights equal but for a thousandth count as all their draws: whatever k is, it is not bad."""
    log_weights = torch.zeros(1000, dtype=torch.float64)
    log_weights[:raised] = 1e-3
    assert pareto_k(log_weights) < 0.0


def test_columns_are_resampled_systematically_each_by_its_own_offset():
    weights = torch.softmax(2 * torch.randn(50, 4, dtype=torch.float64), 0)
    index = systematic_resample(weights, 70)
    assert index.shape == (70, 4)
    for b in range(4):
        counts = torch.bincount(index[:, b], minlength=50)
        assert (counts - 70 * weights[:, b]).abs().max() < 1 + 1e-9
    torch.manual_seed(3)
    one = systematic_resample(weights[:, 0], 70)
    torch.manual_seed(3)
    assert torch.equal(systematic_resample(weights[:, :1], 70)[:, 0], one)
