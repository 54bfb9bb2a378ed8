"""The local classifier test: half for an exact posterior, more for one that is wrong at the observation asked about."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import LocalC2ST, local_c2st
from pyro_sb.infer import AmortizedPosterior

F64 = torch.float64
S = 300


def posterior(y, shift=0.0):
    """Of theta given y = theta + noise, prior and noise N(0, 1); shifted, if asked, where y > 0 alone."""
    return y / 2 + 0.5**0.5 * torch.randn_like(y) + shift * (y > 0)


def judged(shift, at, num_null=9):
    theta = torch.randn(S, 1, dtype=F64)
    y = theta + torch.randn(S, 1, dtype=F64)
    y_at = torch.full((1,), at, dtype=F64)
    there = posterior(y_at.expand(300, 1), shift)
    return LocalC2ST.of(theta, posterior(y, shift), y, y_at, there, num_null=num_null)


def test_an_exact_posterior_scores_near_a_half():
    found = judged(0.0, 1.0)
    assert abs(float(found.score) - 0.5) < 0.05 and abs(found.score.excess) < 0.04
    assert found.p_value > 0.05 and found.verdict != "bad"


def test_a_posterior_that_is_wrong_here_is_caught_here_alone():
    here, there = judged(1.0, 1.5), judged(1.0, -1.5)
    assert here.verdict == "bad" and here.p_value == 1 / 10 and here.tail_p_value < 0.01
    assert here.statistic > 4 * there.statistic


def of_null(statistic, null):
    return LocalC2ST(statistic, torch.as_tensor(null, dtype=F64), torch.zeros(1, dtype=F64))


def test_more_than_every_null_classifier_is_not_bad_by_itself():
    null = (torch.randn(20, dtype=F64).abs() * 0.02) ** 2
    assert of_null(1.01 * float(null.max()), null).p_value == 1 / 21
    assert of_null(1.01 * float(null.max()), null).verdict == "look"
    assert of_null(100 * float(null.max()), null).verdict == "bad"
    assert of_null(float(null.median()), null).verdict == "ok"


@pytest.mark.parametrize(("above", "verdict"), [(0, "bad"), (1, "look"), (3, "look"), (5, "ok")])
def test_ninety_nine_null_classifiers_decide_by_their_shares(above, verdict):
    null = torch.cat([torch.full((99 - above,), 1e-9, dtype=F64), torch.full((above,), 0.25, dtype=F64)])
    assert of_null(1e-3, null).verdict == verdict


@pytest.mark.parametrize("num", [9, 20])
def test_verdicts_are_as_rare_as_they_say_where_the_null_is_what_it_is_taken_for(num):
    reps = 4000
    seen = (0.1 + 0.03 * torch.randn(reps, num + 1, dtype=F64)).clamp_min(0) ** 4  # fourth roots are normal
    p = torch.tensor([of_null(float(row[0]), row[1:]).tail_p_value for row in seen], dtype=F64)
    for level in (0.01, 0.05, 0.5):
        assert abs(float((p < level).double().mean()) - level) < 4 * (level * (1 - level) / reps) ** 0.5


def test_equal_null_classifiers_are_told_from_one_that_sees_more():
    assert of_null(0.1, torch.full((20,), 1e-4)).verdict == "bad"


def test_draws_that_the_posterior_adds_have_the_larger_probability():
    theta = torch.randn(S, 1, dtype=F64)
    y = torch.zeros(S, 1, dtype=F64)
    draws = torch.linspace(-2, 4, 300, dtype=F64)[:, None]
    found = LocalC2ST.of(theta, theta[torch.randperm(S)] + 2, y, y[0], draws, num_null=9)
    assert found.probabilities[:50].mean() < 0.3 and found.probabilities[-50:].mean() > 0.7


def test_the_generator_decides():
    torch.manual_seed(1)
    theta, y = torch.randn(100, 1), torch.randn(100, 1)
    arguments = (theta, theta + 1, y, y[0], theta[:50])
    results = [LocalC2ST.of(*arguments, num_null=9, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert results[0].statistic == results[1].statistic and torch.equal(results[0].null, results[1].null)


def test_an_amortised_posterior_is_judged_at_an_observation():
    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1))

    amortized = AmortizedPosterior(model, bridge="light")
    amortized.fit(num_simulations=300, num_updates=50, num_copies=2, progress=False)
    found = local_c2st(amortized, torch.tensor([0.5, -0.5]), 100, 100, num_null=9)
    assert found.probabilities.shape == (100,) and float(found.score) < 0.65
    assert "LocalC2ST" in repr(found) and "floor" in repr(found) and found.verdict in repr(found)
    with pytest.raises(ValueError, match="one complete observation, got a batch"):
        local_c2st(amortized, torch.zeros(3, 2), 100, 50, num_null=9)


@pytest.mark.parametrize(
    ("shapes", "num_null", "message"),
    [
        (((99, 1), (99, 1), (99, 2), (2,), (50, 1)), 9, "at least 100 data sets, got 99"),
        (((100, 1), (100, 2), (100, 2), (2,), (50, 1)), 9, "one shape"),
        (((100, 1), (100, 1), (100, 2), (3,), (50, 1)), 9, r"y \(data_dim,\)"),
        (((100, 1), (100, 1), (100, 2), (2,), (50, 1)), 5, "num_null must be at least 9, got 5"),
    ],
)
def test_bad_shapes_are_refused(shapes, num_null, message):
    with pytest.raises(ValueError, match=message):
        LocalC2ST.of(*map(torch.zeros, shapes), num_null=num_null)
