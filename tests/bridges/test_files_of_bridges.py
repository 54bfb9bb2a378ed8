"""A file that is torn, altered, hollow, or of something else is refused in words, and nothing of it is used."""

import copy
import os
import zipfile

import pytest
import torch

from pyro_sb.bridges import Bridge, LatentBridge, LightSB, PCACodec, SmoothedBridge
from pyro_sb.files import read_file, write_file
from tests.laws import BRIDGES, fitted


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "bridge.pt"
    fitted(BRIDGES["vsdm"], False).save(path)
    return path


def test_a_file_cut_at_any_place_is_refused(saved):
    whole = saved.read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        saved.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="must be a whole file that this package wrote"):
            Bridge.load(saved)


def test_a_flipped_bit_is_refused_or_harms_nothing(saved):
    whole, before = saved.read_bytes(), Bridge.load(saved).state_dict()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        saved.write_bytes(bytes(data))
        try:
            after = Bridge.load(saved).state_dict()
        except ValueError as error:
            refused += 1
            assert "bridge.pt" in str(error)
        else:
            assert all(torch.equal(v, after[k]) for k, v in before.items() if torch.is_tensor(v))
    assert refused > 20


def test_other_programs_files_are_refused(saved):
    for data in (b"", b"text", b"PK\x05\x06" + 18 * b"\0", os.urandom(300)):
        saved.write_bytes(data)
        with pytest.raises(ValueError, match="whole file that this package wrote"):
            Bridge.load(saved)
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="compressed"):
        Bridge.load(saved)
    with pytest.raises(FileNotFoundError, match="which is none"):
        Bridge.load(saved.with_name("absent.pt"))


def with_value(contents, path, value):
    """The contents with the entry at a path replaced."""
    contents = copy.copy(contents)
    first, *rest = path
    contents[first] = with_value(contents[first], rest, value) if rest else value
    return contents


ATTACKS = {
    "size of a network": (("config", "hidden"), (10**6, 10**6)),
    "dimension": (("config", "dim"), 3),
    "huge dimension": (("config", "dim"), 10**8),
    "no number": (("config", "dim"), "two"),
    "unknown argument": (("config", "width"), 3),
    "class": (("class",), "Elsewhere"),
    "class of no text": (("class",), ["VSDM"]),
    "version": (("format",), 99),
    "older version": (("format",), 0),
    "config": (("config",), None),
    "state": (("state",), [1, 2]),
    "missing": (("state",), {}),
    "shape of a buffer": (("state", "basis"), torch.zeros(3, 3)),
    "shape of a parameter": (("state", "net.mean.head.bias"), torch.zeros(9)),
    "no tensor": (("state", "location"), "here"),
    "extra state": (("state", "_extra_state"), {"num_steps": -1}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_contents_that_do_not_fit_are_refused_before_memory_is_taken(attack, saved):
    place, value = ATTACKS[attack]
    write_file(with_value(read_file(saved), place, value), saved)
    with pytest.raises((ValueError, TypeError)) as caught:
        Bridge.load(saved)
    assert len(str(caught.value)) > 30


def test_a_tensor_of_more_entries_than_the_file_holds_is_refused(saved):
    contents = read_file(saved)
    contents["state"]["location"] = torch.zeros(1).expand(10**10)
    torch.save(contents, saved)
    assert saved.stat().st_size < 10**6
    with pytest.raises(ValueError, match="fewer numbers"):
        Bridge.load(saved)


def test_views_are_written_whole(tmp_path):
    write_file({"x": torch.ones(1).expand(5)}, tmp_path / "x.pt")
    assert torch.equal(read_file(tmp_path / "x.pt")["x"], torch.ones(5))


def test_latent_sizes_are_checked_before_an_inner_bridge_is_made(tmp_path):
    bridge = LatentBridge(codec=PCACodec(2))
    bridge.fit(torch.randn(60, 3), num_updates=2, progress=False)
    assert isinstance(bridge.bridge, SmoothedBridge)
    contents = bridge.contents()
    contents["state"]["codec._extra_state"] = {"data_dim": 3, "latent_dim": 10**8}
    write_file(contents, tmp_path / "latent.pt")
    with pytest.raises(ValueError, match="shape"):
        Bridge.load(tmp_path / "latent.pt")


@pytest.mark.parametrize("name", ["light", "langevin-plain", "tails-light-bass", "vsdm", "dsb", "latent-light"])
def test_a_file_of_something_else_is_not_overwritten_by_a_checkpoint(name, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("of great worth")
    with pytest.raises(ValueError, match="notes.txt"):
        BRIDGES[name]().fit(torch.randn(60, 2), progress=False, checkpoint=path)
    assert path.read_text() == "of great worth"


@pytest.mark.parametrize("bad", ["folder", "absent/fit.pt"])
def test_bad_paths_are_found_before_the_work_starts(bad, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="checkpoint must"):  # before the draws, which are none, are looked at
        LightSB(2).fit("no draws", checkpoint=tmp_path / bad)
    with pytest.raises(TypeError, match="checkpoint must be a path"):
        LightSB(2).fit(torch.randn(99, 2), num_updates=1, progress=False, checkpoint=3)
