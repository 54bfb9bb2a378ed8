"""Surprise: false alarms come as often as they say, and data of another world are seen."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer import AmortizedPosterior, Simulations

NUM = 200


SCALES = torch.tensor([1.0, 0.5, 2.0, 1.0])  # of the noise: the numbers are not exchangeable


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, SCALES).to_event(1))


def items():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Normal(mu, 1.0))


@functools.cache
def fitted(model=model):
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(model, bridge="light")
    amortized.fit(num_simulations=800, num_copies=0, num_updates=20, progress=False)
    return amortized


pytestmark = pytest.mark.filterwarnings("ignore:.*has not converged")


def own(num=NUM):
    return torch.randn(num, 1) + SCALES * torch.randn(num, 4)


def test_on_the_models_own_data_p_is_uniform():
    # the rank of y among simulations that it is exchangeable with: P(p <= a) = a for any summaries and any kernel
    p = fitted().surprise(own(400)).p_value
    for level in (0.05, 0.25, 0.5):
        share, sd = float((p <= level).double().mean()), (level * (1 - level) * (1 / 400 + 1 / 400)) ** 0.5
        assert abs(share - level) < 3.5 * sd  # 400 observations, ranked among 400 simulations


@pytest.mark.parametrize(
    ("wrong", "least"),
    [(lambda y: y + 6, 0.9), (lambda y: 4 * (y - y.mean(1, keepdim=True)), 0.8)],
    ids=["shift", "spread"],
)
def test_data_of_another_world_are_seen(wrong, least):
    p = fitted().surprise(wrong(own())).p_value
    assert float((p < 0.05).double().mean()) > least


def test_a_gap_between_the_simulations_is_seen_without_an_outlier():
    # data on a ring: the middle is no outlier of any coordinate, and no simulation is near
    def ring():
        angle = pyro.sample("angle", dist.Uniform(0.0, 6.283))
        y = torch.stack([angle.cos(), angle.sin()], -1)
        pyro.sample("y", dist.Normal(y, 0.05).to_event(1))

    found = fitted(ring).surprise(torch.zeros(2))
    assert found.p_value < 0.01 and not found.standing_out


def test_the_number_that_stands_out_is_named():
    y = torch.tensor([0.3, -0.2, 9.0, 0.1])
    found = fitted().surprise(y)
    assert list(found.standing_out) == ["y[2]"] and found.verdict == "bad"
    assert "y[2]" in repr(found) and "widen the prior" in repr(found)
    assert fitted().surprise(torch.zeros(4)).verdict == "ok"


def test_a_batch_is_judged_together_too():
    # each of thirty is unremarkable; that all have one mean is not
    some = fitted().surprise(0.9 + SCALES * torch.randn(30, 4))
    assert some.group_p_value < 0.01 and 30 * float(some.p_value.min()) > 0.05
    assert fitted().surprise(own(30)).group_p_value > 0.01
    assert some.verdict == "bad" and some.p_value.shape == (30,) and some.column_p_values.shape == (30, 4)


def test_sets_are_judged_by_their_summaries():
    found = fitted(items).surprise(torch.tensor([8.0, -8.0, 8.0, -8.0, 8.0, -8.0]))
    assert found.verdict == "bad" and found.columns[0] == "summary 0 of y"
    assert found.column_p_values.shape == (len(found.columns),)


def test_a_conditioned_posterior_knows_it_too():
    posterior = fitted().condition(torch.tensor([0.3, -0.2, 0.4, 0.1]))
    assert posterior.surprise().verdict == "ok" and posterior.surprise().num_simulations == 256


def test_what_it_refuses():
    with pytest.raises(RuntimeError, match="surprise needs a fitted posterior"):
        AmortizedPosterior(model).surprise(torch.zeros(4))
    few = AmortizedPosterior(model, bridge="light")
    pairs = fitted().simulations
    few.fit(simulations=Simulations(*(x[:30] for x in pairs)), num_copies=0, num_updates=5, progress=False)
    with pytest.raises(ValueError, match="at least 40 simulations"):
        few.surprise(torch.zeros(4))
    masked = AmortizedPosterior(model, bridge="light")
    masked.fit(simulations=pairs, num_copies=0, num_updates=5, missing=0.5, progress=False)
    with pytest.raises(NotImplementedError, match="whole observations"):
        masked.surprise(torch.tensor([torch.nan, 0.0, 0.0, 0.0]))
