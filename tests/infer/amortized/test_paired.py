"""The log joint of pairs: that of the conditioned model row by row, without the entries that are missing."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer.amortized import paired as paired_module
from pyro_sb.infer.amortized.paired import ObservedJoint, paired_joint, refuse_split_events
from pyro_sb.infer.amortized.simulator import simulator
from pyro_sb.infer.model.log_joint import log_joint
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


X = torch.linspace(-1, 1, 6, dtype=torch.float64)
MODELS = {
    "plate": (m.iid, (), "plate"),
    "vector": (m.iid_vector, (), "vmap"),
    "bounded and positive": (m.bounded_and_positive, (), "plate"),
    "vectors": (m.vectors, (), "plate"),
    "plate of vectors": (m.joint_rows, (), "plate"),
    "plate of latents": (m.plate_latents, (), "plate"),
    "poisson": (m.poisson, (X,), "plate"),
    "vmap": (m.needs_vmap, (X.reshape(3, 2),), "vmap"),
    "loop": (m.needs_loop, (), "loop"),
}


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the loop
        return function(*args, **kwargs)


def masked_rows(y, present):
    return torch.cat([y, present.to(y)], -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_log_joint_of_its_conditioned_model(name, masked):
    model, args, route = MODELS[name]
    source = simulator(model, args=args)
    pairs = source.simulate(7)
    joint = quiet(paired_joint, source, pairs, masked)
    assert joint.route == route
    y = masked_rows(pairs.observations, torch.ones_like(pairs.observations)) if masked else pairs.observations
    z = pairs.latents + 0.1 * torch.randn_like(pairs.latents)
    value, grad = quiet(joint.value_and_grad, z, y)
    torch.testing.assert_close(quiet(joint.log_prob, z, y), value, rtol=1e-11, atol=1e-11)
    for i in range(7):
        one = quiet(log_joint, source.conditioned(source.data.unpack(pairs.observations[i])), args=args)
        expected, slope = quiet(one.value_and_grad, z[i : i + 1])
        torch.testing.assert_close(value[i : i + 1], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad[i : i + 1], slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "args"),
    [(m.iid, ()), (m.iid_vector, ()), (m.bounded_and_positive, ()), (m.joint_rows, ())],
    ids=["plate", "to_event", "bounded", "plate of vectors"],
)
def test_missing_entries_are_those_of_a_smaller_model(model, args):
    large, small = partial(model, 4), partial(model, 2)
    source, less = simulator(large), simulator(small)
    pairs = source.simulate(5)
    width = source.data.dim // 4
    kept = torch.tensor([True, False, False, True]).repeat_interleave(width)
    y = pairs.observations.clone()
    y[:, ~kept] = torch.roll(y[:, ~kept], 1, 0)  # what stands in for a missing entry does not matter
    joint, other = paired_joint(source, pairs, True), paired_joint(less, less.simulate(5))
    value, grad = joint.value_and_grad(pairs.latents, masked_rows(y, kept.expand_as(y)))
    expected, slope = other.value_and_grad(pairs.latents, y[:, kept])
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vmap", "loop"])
def test_where_all_is_missing_the_prior_is_left(name):
    model, args, _ = MODELS[name]
    source = simulator(model, args=args)
    pairs = source.simulate(5)
    joint = quiet(paired_joint, source, pairs, True)
    y = masked_rows(pairs.observations, torch.zeros_like(pairs.observations))
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(pairs.latents).sum(-1)
    torch.testing.assert_close(quiet(joint.log_prob, pairs.latents, y), expected, rtol=1e-11, atol=1e-11)


def test_a_set_of_observations_is_repeated_along_blocks_of_rows():
    source = simulator(m.iid)
    pairs = source.simulate(3)
    joint = paired_joint(source, pairs)
    z = torch.randn(12, 1)
    observed = ObservedJoint(joint, pairs.observations)
    expected = torch.cat([joint.log_prob(z[i : i + 1], pairs.observations[i % 3][None]) for i in range(12)])
    torch.testing.assert_close(observed.log_prob(z), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(observed.value_and_grad(z)[0], expected, rtol=1e-11, atol=1e-11)


def test_more_rows_than_a_piece_holds(monkeypatch):
    source = simulator(m.iid)
    pairs = source.simulate(50)
    joint = paired_joint(source, pairs)
    value, grad = joint.value_and_grad(*pairs)
    monkeypatch.setattr(paired_module, "MAX_ROWS", 16)
    again, slope = joint.value_and_grad(*pairs)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(slope, grad)


# ---- what is refused ----


def test_part_of_a_joint_event_is_refused_by_name():
    source = simulator(m.joint_rows)
    whole = torch.tensor([True, True, False, False, True, True])
    refuse_split_events(source, whole)
    with pytest.raises(NotImplementedError, match="missing entries of 'y'.*part of an event.*to_event"):
        refuse_split_events(source, torch.tensor([True, True, False, True, True, True]))
    refuse_split_events(simulator(m.iid_vector), torch.tensor([True, False, True, True, True, True]))


def test_discrete_latents_are_refused_by_name():
    source = simulator(m.discrete)
    with pytest.raises(NotImplementedError, match=r"no sums over discrete sites, got \['k'\]"):
        paired_joint(source, source.simulate(5))


def test_a_black_box_is_refused_by_name():
    def black_box():
        return pyro.sample("mu", dist.Normal(0.0, 1.0)) + torch.randn(())

    source = simulator(black_box)
    with pytest.raises(NotImplementedError, match=r"density of \['y'\].*black-box.*sample\(\)"):
        paired_joint(source, source.simulate(5))
