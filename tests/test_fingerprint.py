"""Fingerprints tell models, arguments and data apart, and nothing else."""

import functools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sb.fingerprint import differences, fingerprint, named

SCALE = 1.0


def model():
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), SCALE))


def shifted(by):
    def inner():
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)) + by, 1.0))

    return inner


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self):
        pyro.sample("y", dist.Normal(0.0, self.scale))

    def method(self):
        return self()


def linear(bias):
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, 1.0)
    nn.init.constant_(net.bias, bias)
    return net


PAIRS = {
    "closure": lambda by: shifted(by),
    "closed-over tensor": lambda by: shifted(torch.tensor([by])),
    "partial": lambda by: functools.partial(lambda x: x, x=by),
    "object": lambda by: Scaled(by),
    "method": lambda by: Scaled(by).method,
    "module": lambda by: linear(by),
    "conditioned": lambda by: pyro.condition(model, {"y": torch.tensor(by)}),
    "tensor": lambda by: torch.tensor([0.0, by]),
    "array": lambda by: np.array([0.0, by]),
    "frame": lambda by: pd.DataFrame({"a": [0.0, by]}),
    "dict": lambda by: {"a": 1, "b": by},
    "order": lambda by: [0.0, by] if by < 1.5 else [by - 1.0, 0.0],
    "law": lambda by: dist.Normal(by, 1.0),
    "default": lambda by: eval(f"lambda x={by}: x"),
    "code": lambda by: eval(f"lambda: {by}"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_what_is_alike_has_one_fingerprint_and_what_is_not_another(kind):
    make = PAIRS[kind]
    assert fingerprint(make(1.0)) == fingerprint(make(1.0))
    assert fingerprint(make(1.0)) != fingerprint(make(2.0))


def test_a_value_that_a_model_finds_in_its_module_counts(monkeypatch):
    before = fingerprint(model)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert fingerprint(model) != before


def test_types_and_shapes_count():
    values = [1, 1.0, True, "1", torch.ones(()), torch.ones(1), torch.ones(1).double(), np.ones(1), [1.0], (1.0,)]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_loops_end():
    loop = []
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


def test_differences_name_both():
    assert differences({"model": "a", "n": "1"}, {"model": "b", "n": "1"}) == "model is a there and b here"
    assert differences({"n": "1"}, {"n": "1"}) == ""
    assert "not named" in differences({}, {"n": "1"}) and differences("text", {"n": "1"})
    assert named(model).startswith("model (")
