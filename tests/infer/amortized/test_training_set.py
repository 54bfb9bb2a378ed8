"""Rows to learn from: what is found exchangeable, what is hidden, who judges."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer.amortized.features import Features
from pyro_sb.infer.amortized.paired import paired_joint
from pyro_sb.infer.amortized.simulator import simulator
from pyro_sb.infer.amortized.training_set import bounded_axes, exchangeable_sites, hide, rejuvenate, training_set
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


X = torch.linspace(-1, 1, 6, dtype=torch.float64)


def setting(model, num=300, args=(), observed=("y",)):
    source = simulator(model, observed, args)
    pairs = source.simulate(num)
    return source, pairs, paired_joint(source, pairs)


def rows_of(model, num=300, copies=None, missing=0.0, held_out=0.1, joint=True):
    source, pairs, density = setting(model, num)
    features = Features(source.data, masked=missing > 0).fit(pairs.observations)
    rows = training_set(
        source,
        pairs,
        features,
        density if joint else None,
        num_copies=copies,
        missing=missing,
        held_out=held_out,
    )
    return rows, pairs, features


# ---- exchangeable items ----


def rare_events(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=slope * x - 7.0))


def random_walk():
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    covariance = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    times = torch.arange(1.0, 4.0)
    pyro.sample("y", dist.MultivariateNormal(drift[..., None] * times, covariance))


def grid_of_rows(rows=3, columns=4):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
    with pyro.plate("rows", rows):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1))


FOUND = {
    "plate": (m.iid, (), {"y": 5}),
    "to_event": (m.iid_vector, (), {"y": 6}),
    "plate of joint events": (m.joint_rows, (), {"y": 3}),
    "first dimension alone": (grid_of_rows, (), {"y": 3}),
    "positive and bounded latents": (m.bounded_and_positive, (), {"y": 4}),
    "regression": (m.poisson, (X,), {}),
    "latents indexed by the plate": (m.plate_latents, (), {}),
    "one joint event": (random_walk, (), {}),
    "regression with rare events": (rare_events, (X,), {}),
    "one item": (partial(m.iid, 1), (), {}),
}


@pytest.mark.parametrize("name", FOUND)
def test_exchangeable_sites_are_those_that_the_log_joint_does_not_order(name):
    model, args, expected = FOUND[name]
    assert exchangeable_sites(*setting(model, 300, args)) == expected


def test_each_site_is_judged_alone():
    source, pairs, joint = setting(m.two_sites, observed=("a", "b"))
    assert exchangeable_sites(source, pairs, joint) == {"b": 2}


def test_a_weak_order_is_an_order_in_float32_too():
    torch.set_default_dtype(torch.float32)

    def model(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0))

    assert exchangeable_sites(*setting(model, 300, (0.2 * torch.linspace(-1, 1, 200),))) == {}


# ---- rows ----


def test_copies_stand_beside_their_own_observation():
    rows, pairs, features = rows_of(m.iid, copies=3)
    assert rows.latents.shape == (1200, 1)
    assert torch.equal(rows.latents[:300], pairs.latents)
    design = features.design(pairs.observations)
    torch.testing.assert_close(rows.features.unflatten(0, (4, 300)), design.expand(4, -1, -1))
    torch.testing.assert_close(rows.context, rows.features)
    # given y, mu is N(20 / 21 mean, 1 / 21) in every copy
    error = rows.latents[:, 0] - 20 / 21 * pairs.observations.mean(1).repeat(4)
    assert error.square().mean() * 21 == pytest.approx(1, abs=0.2)
    assert abs(float(torch.corrcoef(torch.stack([error[:300], error[300:600]]))[0, 1])) < 0.25


def test_all_copies_of_a_simulation_are_judged_or_learnt_from():
    rows, _, _ = rows_of(m.iid, copies=3, held_out=0.2)
    judged = rows.held_out.unflatten(0, (4, 300))
    assert bool((judged == judged[0]).all()) and int(judged[0].sum()) == 60
    assert int(rows_of(m.iid, num=30, copies=0, held_out=0.01)[0].held_out.sum()) == 1  # never none


@pytest.mark.parametrize(("copies", "joint", "expected"), [(0, True, 1), (None, False, 1), (2, True, 3), (2, False, 1)])
def test_number_of_copies(copies, joint, expected):
    assert len(rows_of(m.iid, 50, copies, joint=joint)[0].latents) == 50 * expected


def test_missing_entries_are_hidden_anew_in_four_copies_at_least():
    rows, pairs, _ = rows_of(m.iid, copies=0, missing=0.6)
    assert len(rows.latents) == 1200 and torch.equal(rows.latents[300:600], pairs.latents)
    hidden = rows.features[:, -5:]
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    assert float((hidden[:300] != hidden[300:600]).any(1).double().mean()) > 0.4
    assert float((hidden.sum(1) == 0).double().mean()) > 0.25  # a quarter is whole
    assert 0.1 < float(hidden.mean()) < 0.3  # 3/4 of .3


def test_the_share_that_is_hidden_has_a_limit():
    source, pairs, _ = setting(m.iid, 4000)
    gone = torch.isnan(hide(pairs.observations, source, 0.5)).double().mean(1)
    assert float(gone.mean()) == pytest.approx(0.75 * 0.25, abs=0.02)
    assert float((gone == 0).double().mean()) > 0.25


def test_whole_events_are_hidden():
    source, pairs, _ = setting(m.joint_rows)
    gone = torch.isnan(hide(pairs.observations, source, 0.9)).unflatten(1, (3, 2))
    assert bool((gone[..., 0] == gone[..., 1]).all()) and 0 < float(gone.double().mean()) < 1
    source, pairs, _ = setting(m.iid_vector)
    gone = torch.isnan(hide(pairs.observations, source, 0.9))
    assert bool((gone[:, 0] != gone[:, 1]).any())


def test_bounded_axes_are_named():
    assert bounded_axes(simulator(m.bounded_and_positive)).tolist() == [True, False]
    assert bounded_axes(simulator(m.vectors)).tolist() == [False, False, True]


# ---- rejuvenation ----


def z_scores(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


def test_rejuvenated_copies_are_draws_of_the_joint_law():
    # mu ~ N(0, 1), five y ~ N(mu, .5^2): given y, mu ~ N(20 / 21 mean, 1 / 21)
    source = simulator(m.iid)
    pairs = source.simulate(8000)
    copies = rejuvenate(paired_joint(source, pairs), pairs, torch.full((1, 1), 0.2), 3)
    assert copies.shape == (4, 8000, 1) and torch.equal(copies[0], pairs.latents)
    mean = pairs.observations.mean(1)
    for k, copy in enumerate(copies[..., 0]):
        moments = torch.stack([copy, copy.square(), copy * mean, copy.square() * mean.square()], 1)
        variance = 1 + 0.25 / 5  # of the mean of y
        expected = torch.tensor([0.0, 1.0, 1.0, variance + 2.0])  # the last: Isserlis, E mu^2 ybar^2
        assert z_scores(moments, expected).abs().max() < 4, k
        error = copy - 20 / 21 * mean
        given = torch.stack([error, error.square() - 1 / 21, error * mean], 1)
        assert z_scores(given, torch.zeros(3)).abs().max() < 4, k
    error = copies[..., 0] - 20 / 21 * mean
    correlations = torch.corrcoef(error)[0]
    assert correlations[0] == 1 and correlations[1:].abs().max() < 0.1  # 12 sweeps forget the simulated latent


def test_rejuvenation_keeps_a_bounded_and_a_positive_latent_exact():
    source = simulator(m.bounded_and_positive)
    pairs = source.simulate(4000)
    copies = rejuvenate(paired_joint(source, pairs), pairs, torch.eye(2), 2)
    fresh = source.simulate(4000).latents
    for copy in copies[1:]:
        both = torch.cat([copy, copy.square()], 1), torch.cat([fresh, fresh.square()], 1)
        z = (both[0].mean(0) - both[1].mean(0)) / ((both[0].var(0) + both[1].var(0)) / 4000).sqrt()
        assert z.abs().max() < 4
        assert (copy != pairs.latents).float().mean() > 0.9
