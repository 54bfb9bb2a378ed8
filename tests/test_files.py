"""Files are written whole or not at all, and none is written elsewhere."""

import ast
import os
from pathlib import Path

import pytest
import torch

from pyro_sb.bridges import DSB, VSDM, Bridge, KernelLangevinBridge, LatentBridge, LightSB, PCACodec, TailMatched
from pyro_sb.files import read_file, write_file
from tests.test_layers import PACKAGE

QUICK = {"num_updates": 5, "progress": False}


class Killed(BaseException):
    """As a signal: nothing of ours catches it."""


def tear(monkeypatch, after=0):
    """From the write after so many on, `torch.save` leaves a piece of its file and does not return."""
    real, calls = torch.save, []

    def torn(value, file, *args, **kwargs):
        real(value, file, *args, **kwargs)
        calls.append(file)
        if len(calls) > after:
            os.truncate(file if isinstance(file, (str, Path)) else file.name, 100)
            raise Killed

    monkeypatch.setattr(torch, "save", torn)


def test_a_write_that_is_cut_short_leaves_the_file_before_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "values.pt"
    write_file({"x": torch.ones(3)}, path)
    tear(monkeypatch)
    with pytest.raises(Killed):
        write_file({"x": torch.zeros(3)}, path)
    assert torch.equal(read_file(path)["x"], torch.ones(3)) and list(tmp_path.iterdir()) == [path]


def test_through_a_link_the_file_behind_it_is_written(tmp_path):
    behind, link = tmp_path / "behind.pt", tmp_path / "link.pt"
    link.symlink_to(behind)
    write_file([1, 2], link)
    assert link.is_symlink() and read_file(behind) == [1, 2]


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(Path("code"), tmp_path / "code.pt")
    with pytest.raises(Exception, match="cannot be read as tensors and plain values"):
        read_file(tmp_path / "code.pt")


FITS = {
    "light": (lambda: LightSB(2, num_components=3), QUICK),
    "vsdm": (lambda: VSDM(2, hidden=(8,), covariance_hidden=(8,)), QUICK),
    "dsb": (lambda: DSB(2, hidden=(8,), num_steps=3), QUICK | {"num_iterations": 1, "num_pairs": 50}),
    "langevin": (lambda: KernelLangevinBridge(2), {"progress": False}),
    "latent": (lambda: LatentBridge(LightSB(2, num_components=3), PCACodec(2)), QUICK),
    "tails": (lambda: TailMatched(LightSB(2, num_components=3), df=3.0), QUICK),
}


@pytest.mark.filterwarnings("ignore:.*has not converged")
@pytest.mark.parametrize("name", FITS)
def test_a_fit_cut_short_in_any_of_its_writes_leaves_a_whole_bridge(name, tmp_path, monkeypatch):
    make, options = FITS[name]
    path, draws = tmp_path / "bridge.pt", torch.randn(60, 2)
    make().fit(draws, checkpoint=path, **options)
    for after in range(50):
        with monkeypatch.context() as patch:
            tear(patch, after)
            try:
                make().fit(draws, checkpoint=path, **options)
            except Killed:
                assert Bridge.load(path)().sample((3,)).shape == (3, 2)
            else:
                break
    assert after > 0  # at least one write was cut short, and the last was not


def test_nothing_but_files_writes_or_reads_tensors():
    found = [
        f"{path}: torch.{node.attr}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "files.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("save", "load")
        if isinstance(node.value, ast.Name) and node.value.id == "torch"
    ]
    assert not found, "\n".join(found)
