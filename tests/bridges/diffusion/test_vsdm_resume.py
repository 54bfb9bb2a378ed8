"""A fit that was cut short goes on bit for bit; a checkpoint is always a bridge."""

import os
import warnings

import pytest
import torch

from pyro_sb.bridges import VSDM, Bridge
from pyro_sb.bridges.checkpoint import unfinished
from pyro_sb.bridges.diffusion.fit import DiffusionFit
from pyro_sb.nn import SetEmbedding

F64 = {"dtype": torch.float64}
BRIDGES = {
    "closed-form": lambda: VSDM(2, hidden=(8, 8), covariance_hidden=(8,)),
    "stochastic": lambda: VSDM(2, hidden=(8, 8), covariance_hidden=(8,), drift_matrix="stochastic"),
    "conditional": lambda: VSDM(
        2, context_dim=4, hidden=(8, 8), covariance_hidden=(8,), embedding=SetEmbedding(2, 3, hidden=(8,))
    ),
}
STEPS = 80


@pytest.fixture(autouse=True)
def to_the_end(monkeypatch):
    for name, value in (("PATIENCE", 1000), ("HELD_OUT", 256), ("NUM_CHECKS", 8)):
        monkeypatch.setattr(f"pyro_sb.bridges.diffusion.fit.{name}", value)


def data():
    torch.manual_seed(5)
    context = torch.randn(120, 4, **F64)
    return context[:, :2] * torch.tensor([1.0, 4.0], **F64) + torch.randn(120, 2, **F64), context


def fit(bridge, checkpoint=None, seed=7, **options):
    draws, context = data()
    torch.manual_seed(seed)
    options = {
        "num_updates": STEPS,
        "batch_size": 32,
        "num_stages": 8,
        "progress": False,
        "checkpoint": checkpoint,
    } | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return bridge.fit(draws, context=context if bridge.context_dim else None, **options)


def build(kind):
    torch.manual_seed(1)
    return BRIDGES[kind]()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def cut(monkeypatch, error, loss, update):
    """Raise in the given update of a loss."""
    original, calls = getattr(DiffusionFit, loss), iter(range(1, 10_000))

    def broken(self, *args):
        if torch.is_grad_enabled() and next(calls) == update:
            raise error
        return original(self, *args)

    monkeypatch.setattr(DiffusionFit, loss, broken)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")], ids=["ctrl-c", "crash"])
@pytest.mark.parametrize(
    ("kind", "loss", "update"),
    [
        ("closed-form", "_mean_loss", 37),
        ("closed-form", "_covariance_loss", 15),
        ("stochastic", "_mean_loss", 21),
        ("stochastic", "_mean_loss", 63),
        ("conditional", "_mean_loss", 50),
        ("conditional", "_covariance_loss", 2),
    ],
)
def test_a_fit_goes_on_bit_for_bit(kind, loss, update, error, tmp_path, monkeypatch):
    whole, part, path = build(kind), build(kind), tmp_path / "fit.pt"
    reference = fit(whole, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        cut(patch, error, loss, update)
        if isinstance(error, KeyboardInterrupt):
            assert fit(part, path).interrupted
        else:
            with pytest.raises(OSError, match="disk"):
                fit(part, path)
    assert unfinished(path) is not None
    rest = BRIDGES[kind]() if kind != "conditional" else part
    history = fit(rest, path, seed=99)  # whatever the random state is when it goes on
    assert same(rest, whole)
    assert history.losses == reference.losses and history.validation_losses == reference.validation_losses
    assert history.iterations == reference.iterations and not history.interrupted
    assert unfinished(path) is None and same(Bridge.load(path), whole)


def test_an_unfinished_checkpoint_is_a_bridge(tmp_path, monkeypatch):
    part, path = build("closed-form"), tmp_path / "fit.pt"
    cut(monkeypatch, OSError("the disk is full"), "_mean_loss", 37)
    with pytest.raises(OSError, match="disk"):
        fit(part, path)
    loaded = Bridge.load(path)
    assert loaded().sample((3,)).shape == (3, 2) and torch.isfinite(loaded().draws((3,)).log_q).all()
    assert os.listdir(tmp_path) == ["fit.pt"]


def test_a_finished_checkpoint_is_not_resumed(tmp_path):
    first, second = build("closed-form"), build("closed-form")
    fit(first, tmp_path / "fit.pt")
    history = fit(second, tmp_path / "fit.pt", seed=8)
    assert history.iterations > STEPS and not same(first, second)


@pytest.mark.parametrize("change", ["options", "data"])
def test_another_fit_s_checkpoint_is_refused(change, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    with monkeypatch.context() as patch:
        cut(patch, OSError("the disk is full"), "_mean_loss", 37)
        with pytest.raises(OSError, match="disk"):
            fit(build("closed-form"), path)
    bridge = build("closed-form")
    with pytest.raises(ValueError, match="checkpoint must be of this fit.*Delete it"):
        if change == "options":
            fit(bridge, path, batch_size=31)
        else:
            bridge.fit(data()[0] + 1, num_updates=STEPS, batch_size=32, num_stages=8, progress=False, checkpoint=path)
    with pytest.raises(RuntimeError, match="fitted first"):
        bridge()  # it is what it was


def test_ctrl_c_keeps_what_was_learnt_without_a_checkpoint(monkeypatch):
    bridge = build("closed-form")
    cut(monkeypatch, KeyboardInterrupt(), "_mean_loss", 37)
    with pytest.warns(RuntimeWarning, match="36 of 80 updates"):
        torch.manual_seed(7)
        history = bridge.fit(data()[0], num_updates=STEPS, batch_size=32, progress=False)
    assert history.interrupted and history.iterations == 36
    assert torch.isfinite(bridge().draws((5,)).log_q).all()
