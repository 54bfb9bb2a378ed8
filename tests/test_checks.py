"""The one gate: whatever holds real numbers passes as numpy reads it, and the rest is refused by name."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pyro_sb.bridges import VSDM, Bridge, LightSB, LightSBBM
from pyro_sb.checks import (
    as_draws,
    broadcast,
    flag,
    floats,
    number,
    one_time,
    points,
    sample_size,
    whole,
    widths,
)

ROWS = np.random.default_rng(0).normal(size=(12, 2))
FRAME = pd.DataFrame(ROWS, columns=["a", "b"])

ALIKE = {
    "array": ROWS,
    "frame": FRAME,
    "frame's index": FRAME.set_index(np.arange(12)[::-1]),
    "reversed": ROWS[::-1].copy()[::-1],
    "transposed": ROWS.T.copy().T,
    "strided": np.repeat(ROWS, 3, axis=0)[::3],
    "fortran": np.asfortranarray(ROWS),
    "big endian": ROWS.astype(">f8"),
    "long double": ROWS.astype(np.longdouble),
    "masked nowhere": np.ma.masked_greater(ROWS, 1e9),
    "read-only": np.broadcast_to(ROWS, (1, 12, 2))[0],
    "tensors": [torch.tensor(row) for row in ROWS],
    "tuple of arrays": tuple(ROWS),
    "list of series": [pd.Series(row) for row in ROWS],
    "nested tensors": [[torch.tensor(x) for x in row] for row in ROWS],
    "sparse": torch.tensor(ROWS).to_sparse(),
    "column by column": pd.DataFrame({"a": ROWS[:, 0], "b": ROWS[:, 1]}),
}


@pytest.mark.parametrize("form", ALIKE)
def test_whatever_holds_real_numbers_is_read_as_numpy_reads_it(form):
    read = floats("target", ALIKE[form])
    assert read.dtype == torch.float64
    assert torch.equal(read, torch.tensor(ROWS))


@pytest.mark.parametrize("value", [[[1.0, 2.0]], ((1, 2),), [[np.float32(1), 2.0]], [1, 2], 3.5, True])
def test_numbers_of_python_take_the_default_dtype(value):
    read = floats("x", value)
    assert read.dtype in (torch.float32, torch.float64) and read.shape == np.asarray(value).shape
    assert np.array_equal(read.numpy(), np.asarray(value, dtype=float))


REFUSED = {
    "complex": torch.tensor(ROWS) + 1j,
    "complex array": ROWS * 1j,
    "masked": np.ma.masked_greater(ROWS, 0.5),
    "objects": np.array([[1.0, None]] * 3, dtype=object),
    "mixed frame": FRAME.assign(c="text"),
    "text": np.array([["1.0", "2.0"]]),
    "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    "records": np.zeros(3, dtype=[("a", "f8")]),
    "ragged": [[1.0, 2.0], [3.0]],
    "ragged tensors": [torch.zeros(2), torch.zeros(3)],
    "none": None,
    "word": "words",
    "words": ["a", "b"],
    "dict": {"a": 1.0},
    "set": {1.0, 2.0},
    "law": torch.distributions.Normal(0.0, 1.0),
    "function": len,
    "generator": (x for x in [1.0, 2.0]),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_holds_no_real_numbers_is_refused_by_name(form):
    with pytest.raises((TypeError, ValueError), match=r"^target must .*got ") as caught:
        floats("target", REFUSED[form])
    assert str(caught.value).count(". ") >= 1  # and says what to write instead


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_said(dtype):
    with pytest.warns(RuntimeWarning, match=f"{str(dtype)[6:]}.*raised to float32"):
        assert floats("target", torch.zeros(3, 2, dtype=dtype)).dtype == torch.float32
    assert floats("x", torch.zeros(3, dtype=dtype), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_a_series_is_a_column_of_draws():
    assert as_draws("target", FRAME["a"], 1).shape == (12, 1)
    with pytest.raises(ValueError, match=r"target\[:, None\]"):
        as_draws("target", ROWS[:, 0], 1)


@pytest.mark.parametrize("value", [3, 3.0, np.int32(3), np.float64(3), torch.tensor(3), Fraction(3), Decimal(3)])
def test_a_whole_number_is_one_whatever_its_type(value):
    assert whole("num", value) == 3 and type(whole("num", value)) is int
    assert number("x", value, "(0, 4)") == 3.0 and type(number("x", value)) is float


NO_COUNT = [math.inf, -math.inf, math.nan, 2.5, 0, -1, 1e300, True, "3", None, [3], torch.ones(2), 3 + 0j, 3j, len]


@pytest.mark.parametrize("value", NO_COUNT, ids=repr)
def test_what_is_no_count_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match="^num must be at least 1"):
        whole("num", value)


@pytest.mark.parametrize(
    ("value", "interval", "message"),
    [
        (1, "[0, 1)", r"lie in \[0, 1\)"),
        (-1e-9, "[0, 1]", r"lie in \[0, 1\]"),
        (0, "(0, inf)", "be positive and finite"),
        (math.inf, "(0, inf)", "be positive and finite"),
        (math.nan, "(-inf, inf)", "be finite"),
        ("0.5", "[0, 1]", "a number"),
        (True, "[0, 1]", "a number"),
        (np.bool_(True), "[0, 1]", "a number"),
    ],
)
def test_what_is_no_number_of_the_interval_is_refused_by_name(value, interval, message):
    with pytest.raises((TypeError, ValueError), match=f"^share must .*{message}.*got"):
        number("share", value, interval)


def test_infinity_is_a_number_where_the_interval_says_so():
    assert number("beta", math.inf, "(1, inf]") == math.inf


@pytest.mark.parametrize("shape", [5, 2.5, None, "ab", [-1], (2.5,), (math.inf,), {"a": 1}])
def test_a_shape_is_a_tuple_of_whole_numbers(shape):
    with pytest.raises((TypeError, ValueError), match="sample_shape"):
        sample_size(shape)


def test_shapes_widths_flags_and_times():
    assert sample_size([2, np.int64(3)]) == torch.Size([2, 3]) and sample_size(()) == torch.Size()
    assert widths("hidden", [64, np.int64(32)]) == (64, 32)
    assert flag("x", np.bool_(True)) is True and one_time(torch.tensor(0.5)) == 0.5
    for call in (lambda: widths("hidden", ()), lambda: widths("hidden", 64), lambda: widths("hidden", (0,))):
        with pytest.raises((TypeError, ValueError), match="hidden"):
            call()
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match="x must be True or False"):
            flag("x", value)
    for t in (-0.1, 1.1, math.nan, "0.5", torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="^t must"):
            one_time(t)
    with pytest.raises(ValueError, match="x and context must have batch shapes that broadcast"):
        broadcast("x and context", torch.Size([3]), torch.Size([4]))


def test_points_keep_their_gradients_and_are_finite():
    x = torch.zeros(3, 2, requires_grad=True)
    assert points("x", x, 2, torch.zeros(1, dtype=torch.float64)).requires_grad
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="x must be finite, got NaN or infinity in 1 of 2"):
            points("x", [0.0, bad], 2, torch.zeros(1))


KINDS = npst.scalar_dtypes() | npst.byte_string_dtypes() | npst.unicode_string_dtypes()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()


@given(npst.arrays(KINDS, npst.array_shapes(min_dims=0, max_dims=3, max_side=3)), st.booleans(), st.booleans())
def test_an_array_of_any_kind_is_read_or_refused_in_words(array, backwards, turned):
    array = array[::-1] if backwards and array.ndim else array
    array = array.T if turned else array
    try:
        read = floats("target", array)
    except (TypeError, ValueError) as error:
        assert array.dtype.kind not in "biuf" and str(error).startswith("target must")
    except RuntimeWarning as warning:  # half precision
        assert array.dtype == np.float16 and "raised to float32" in str(warning)
    else:
        assert array.dtype.kind in "biuf" and read.shape == array.shape
        with np.errstate(over="ignore"):
            wanted = array.astype(read.numpy().dtype)
        assert np.array_equal(read.numpy(), wanted, equal_nan=True)


@given(SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(), SCALARS, max_size=2))
def test_any_value_is_a_number_or_refused_in_words(value):
    for reader in (whole, number, floats, flag, lambda name, value: sample_size(value, name)):
        try:
            reader("num", value)
        except (TypeError, ValueError) as error:
            assert "num" in str(error) and "must" in str(error)


# ---- bridges read through it ----


@pytest.mark.filterwarnings("ignore:.*has not converged")
@pytest.mark.parametrize("form", ["frame", "reversed", "big endian", "tensors", "long double"])
def test_a_bridge_fitted_to_any_form_is_the_same(form):
    laws = []
    for value in (ROWS, ALIKE[form]):
        torch.manual_seed(0)
        bridge = LightSB(2, num_components=2)
        bridge.fit(value, weights=pd.Series(np.ones(12)), num_updates=3, progress=False)
        laws.append(bridge().log_prob(value))
    assert torch.equal(laws[0], laws[1])


def test_an_infinite_batch_does_not_loop_for_ever():
    for kind in (LightSB, LightSBBM, VSDM):
        with pytest.raises(ValueError, match="batch_size must be at least 1, a whole number, got inf"):
            kind(2).fit(ROWS, batch_size=math.inf, progress=False)


def test_components_that_no_memory_holds_are_refused():
    with pytest.raises(ValueError, match="num_components must fit in memory, got 1000000000, .* GiB"):
        LightSB(2, num_components=10**9)


@pytest.mark.parametrize("kind", [LightSB, LightSBBM, VSDM, Bridge])
@pytest.mark.parametrize("size", [0, -1, 2.5, math.inf, math.nan, "2", None, True])
def test_sizes_are_whole_numbers(kind, size):
    for options in ({"dim": size}, {"dim": 2, "context_dim": -1 if size == 0 else size}):
        with pytest.raises((TypeError, ValueError), match="^(dim|context_dim) must be at least"):
            kind(**options)
