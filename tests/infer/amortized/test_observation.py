"""Observations as they are asked for: shapes and batches read, and a message for what a user may get wrong."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

from pyro_sb.infer.amortized.features import Features, read_observation
from pyro_sb.infer.amortized.simulator import simulator
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def setting(model=m.iid, observed=("y",), masked=False):
    source = simulator(model, observed)
    return source, Features(source.data, masked=masked).fit(source.simulate(500).observations)


def test_one_observation_and_a_batch():
    one = read_observation(torch.ones(5), *setting())
    assert one.values.shape == (1, 5) and not one.batched and not one.missing
    many = read_observation(torch.ones(3, 5), *setting())
    assert many.values.shape == (3, 5) and many.batched
    assert read_observation(torch.ones(1, 5), *setting()).batched  # a batch of one is a batch


@pytest.mark.parametrize("y", [[0, 1, 0, 1, 0], np.array([0, 1, 0, 1, 0]), torch.tensor([0, 1, 0, 1, 0])])
def test_lists_arrays_and_integers_are_observations(y):
    found = read_observation(y, *setting())
    assert found.values.tolist() == [[0, 1, 0, 1, 0]] and found.values.dtype == torch.float64


def test_a_number_alone():
    source, features = setting(m.needs_loop)
    assert read_observation(0.5, source, features).values.tolist() == [[0.5]]
    assert read_observation([0.5, 1.0], source, features).values.tolist() == [[0.5], [1.0]]


def test_sites_are_packed_in_the_simulations_order_whatever_the_dicts():
    source, features = setting(m.two_sites, ("b", "a"))
    y = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}
    found = read_observation(y, source, features)
    back = source.data.unpack(found.values)
    assert torch.equal(back["a"], y["a"]) and torch.equal(back["b"], y["b"])
    swapped = read_observation(dict(reversed(y.items())), source, features)
    assert torch.equal(swapped.values, found.values)


def test_missing_entries_stay():
    found = read_observation([0.0, math.nan, 1.0, math.nan, 0.0], *setting(masked=True))
    assert found.missing and torch.isnan(found.values).sum() == 2


BAD = {
    "another size": (
        m.iid,
        ("y",),
        torch.ones(4),
        r"trained on, \(5,\), or \(B, \*shape\).*got \(4,\) for 'y'.*Fit again",
    ),
    "another size in a batch": (m.iid, ("y",), torch.ones(5, 3), r"trained on, \(5,\).*got \(5, 3\)"),
    "two batches": (m.iid, ("y",), torch.ones(2, 3, 5), r"got \(2, 3, 5\)"),
    "an empty batch": (m.iid, ("y",), torch.ones(0, 5), r"got \(0, 5\)"),
    "too few dimensions": (m.iid, ("y",), 1.0, r"got \(\) for 'y'"),
    "a tensor for two sites": (
        m.two_sites,
        ("a", "b"),
        torch.ones(3),
        r"sites \['a', 'b'\], got \['a'\].*dict by site",
    ),
    "wrong names": (m.iid, ("y",), {"x": torch.ones(5)}, r"sites \['y'\], got \['x'\]"),
    "a name too many": (m.iid, ("y",), {"y": torch.ones(5), "z": 1.0}, r"got \['y', 'z'\]"),
    "batches that differ": (
        m.two_sites,
        ("a", "b"),
        {"a": torch.ones(3), "b": torch.ones(2, 2)},
        r"share their batch, got \{'a': \(3,\), 'b': \(2,\)\}",
    ),
    "one batch and none": (
        m.two_sites,
        ("a", "b"),
        {"a": torch.ones(3), "b": torch.ones(2)},
        r"share their batch, got \{'a': \(3,\), 'b': \(\)\}",
    ),
    "infinite": (m.iid, ("y",), [0.0, math.inf, 0.0, -math.inf, 0.0], "finite, got 2 infinite entries. NaN marks"),
    "NaN unasked": (m.iid, ("y",), [0.0, math.nan, 0.0, 0.0, 0.0], r"NaN, got 1.*fit\(\.\.\., missing=0.5\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_observations_are_refused(bad):
    model, observed, y, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        read_observation(y, *setting(model, observed))


def test_an_observation_far_outside_is_told_its_distance():
    source, features = setting()
    mean, spread, farthest = (float(x[2]) for x in (features.location, features.scale, features.farthest))
    y = torch.zeros(2, 5)
    y[1, 2] = mean - 30 * spread
    with pytest.warns(RuntimeWarning, match=r"y lies 30 standard deviations") as caught:
        read_observation(y, source, features)
    found = re.search(r"the farthest simulation lies ([\d.]+) away", str(caught[0].message))
    assert float(found[1]) == pytest.approx(farthest, rel=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y[1, 2] = mean + (1.4 * farthest + 0.9) * spread
        read_observation(y, source, features)
