"""Objects taken apart and put together again; what a file cannot hold, or must not ask for, is refused by name."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from pyro_sb.files import read_file, write_file
from pyro_sb.infer.model.log_joint import Evaluations
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.plain import from_plain, is_plain, to_plain


def mixture():
    return StudentMixture(torch.zeros(1), torch.ones(1, 2), torch.eye(2)[None], torch.tensor([5.0]))


VALUES = {
    "plain": {"a": [1, 2.5, "x", None, True], "b": (math.inf, ())},
    "numpy": [np.float64(2.5), np.float64("nan")],
    "ordered": OrderedDict(b=1, a=2),
    "named tuple": mixture(),
    "object": Evaluations(3, 4),
    "nest": {"role": [(mixture(), {"e": Evaluations(1, 2)})]},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_nest_comes_back_from_a_file_as_it_was(name, tmp_path):
    value = VALUES[name]
    write_file(to_plain(value), tmp_path / "value.pt")
    back = from_plain(read_file(tmp_path / "value.pt"))
    assert repr(back) == repr(
        dict(value) if name == "ordered" else [float(x) for x in value] if name == "numpy" else value
    )


def test_what_both_have_is_named_and_not_written():
    shared = nn.Linear(1, 1)
    saved = to_plain({"net": shared}, {"net": shared})
    assert is_plain(saved) and from_plain(saved, {"net": shared})["net"] is shared
    with pytest.raises(ValueError, match="asks for 'net', which is not at hand"):
        from_plain(saved)


@pytest.mark.parametrize(
    "value", [print, nn.Linear(1, 1), {1: 2}, {"~class": "x"}, object(), torch.distributions.Normal(0, 1)]
)
def test_what_is_neither_is_refused_with_its_place(value):
    with pytest.raises(ValueError, match=r"moves\['local'\]\[1\] must be tensors, plain values and objects of this"):
        to_plain({"local": [1, value]}, name="moves")


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "pyro_sb.files:write_file",
        "pyro_sb.files:os.system",
        "pyro_sb.plain:torch.nn.Linear",
        "pyro_sb.bridges.light.light:LightSB",
        "pyro_sb.none:Nothing",
        "pyro_sb.ops.student_mixture:",
        "",
        3,
    ],
)
def test_a_file_may_ask_for_nothing_but_classes_of_this_package(name):
    with pytest.raises(ValueError, match="which is no class of this version that a file may hold"):
        from_plain({"~class": name, "~state": {}})


def test_no_constructor_is_called(monkeypatch):
    saved = to_plain(Evaluations(1, 2))
    monkeypatch.setattr(Evaluations, "__init__", lambda *_: pytest.fail("called"))
    assert from_plain(saved).gradient == 2


def test_tensors_and_plain_values_are_told_from_others():
    assert is_plain({"a": [1, (2.0, "x", None, torch.ones(2))], 3: {}})
    for value in (np.float64(1.0), nn.Parameter(torch.ones(1)), [print], {(1, 2): 3}, mixture()):
        assert not is_plain(value)
