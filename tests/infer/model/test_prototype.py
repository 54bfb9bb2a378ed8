import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_sb.infer.model.prototype import Packing

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
sites = st.dictionaries(st.text("abcxyz_", min_size=1, max_size=4), shapes, min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(sites, st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_pack_and_unpack_invert_each_other(sites, batch):
    packing = Packing.like({name: torch.zeros(shape) for name, shape in sites.items()})
    z = torch.arange(float(torch.Size(batch).numel() * packing.dim)).reshape(*batch, packing.dim)
    unpacked = packing.unpack(z)
    assert {name: tuple(value.shape) for name, value in unpacked.items()} == {k: batch + s for k, s in sites.items()}
    assert list(unpacked) == sorted(sites)
    if packing.dim:
        assert packing.batch_shape(unpacked) == batch
        torch.testing.assert_close(packing.pack(unpacked), z)


def test_the_vector_has_the_widest_dtype_and_sites_keep_their_own():
    packing = Packing.like({"a": torch.zeros(2, dtype=torch.float32), "b": torch.zeros((), dtype=torch.float64)})
    z = packing.pack({"a": torch.ones(2), "b": torch.ones(())})
    assert packing.dtype == z.dtype == torch.float64
    assert packing.unpack(z)["a"].dtype == torch.float32


@pytest.mark.parametrize(
    "params, message",
    [
        ({"a": torch.zeros(2)}, r"exactly the sites \['a', 'b'\], got \['a'\]"),
        ({"a": torch.zeros(3), "b": torch.zeros(())}, r"'a' must have shape \(\*batch, 2\), got \(3,\)"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(5)}, r"share their leading dimensions, got \[\(4,\), \(5,\)\]"),
    ],
)
def test_wrong_params_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Packing.like({"a": torch.zeros(2), "b": torch.zeros(())}).pack(params)


def test_a_vector_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="must have 3 numbers"):
        Packing.like({"a": torch.zeros(3)}).unpack(torch.zeros(4))
