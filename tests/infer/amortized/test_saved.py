"""A fit that was cut off goes on with its own model alone; what was fitted is saved and loaded with its model."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.files import read_file, write_file
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from tests.infer import open_models as m

QUICK = {"num_simulations": 120, "num_copies": 1, "num_updates": 10, "progress": False}


@pytest.fixture(autouse=True)
def unfinished_fits_are_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        yield


def upward():
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 0.1))


def downward():
    pyro.sample("y", dist.Normal(-pyro.sample("mu", dist.Normal(0.0, 1.0)), 0.1))


def scaled(scale):
    def inner():
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale))

    return inner


def given(x, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mu * x, scale))


def cut_off(amortized, path, monkeypatch, *args, **options):
    """A fit that ends as it begins to train."""

    def killed(*_, **__):
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(AmortizedPosterior, "_fit_candidates", killed)
        with pytest.raises(SystemError):
            amortized.fit(*args, checkpoint=path, **(QUICK | options))


OTHERS = {
    "model": (upward, (), {}, downward, (), {}, "the model is upward .* there and downward .* here"),
    "value closed over": (scaled(1.0), (), {}, scaled(2.0), (), {}, "the model is inner"),
    "bound argument": (
        functools.partial(given, torch.ones(2)), (), {}, functools.partial(given, torch.zeros(2)), (), {}, "the model",
    ),
    "argument": (given, (torch.ones(2),), {}, given, (2 * torch.ones(2),), {}, "its arguments"),
    "option": (upward, (), {}, upward, (), {"num_simulations": 130}, "num_simulations is 120 there and 130 here"),
    "copies": (upward, (), {}, upward, (), {"num_copies": 2}, "num_copies is 1 there and 2 here"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_cut_off_fit_is_not_gone_on_with_by_another(other, tmp_path, monkeypatch):
    model, args, options, model2, args2, options2, message = OTHERS[other]
    cut_off(AmortizedPosterior(model, bridge="light"), tmp_path / "fit.pt", monkeypatch, *args, **options)
    with pytest.raises(ValueError, match=f"must be of this fit.*{message}"):
        AmortizedPosterior(model2, bridge="light").fit(*args2, checkpoint=tmp_path / "fit.pt", **(QUICK | options2))


def test_its_own_fit_goes_on_with_the_simulations(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    first = AmortizedPosterior(given, bridge="light")
    cut_off(first, path, monkeypatch, torch.ones(2))
    second = AmortizedPosterior(given, bridge="light")
    second.fit(torch.ones(2), checkpoint=path, **QUICK)
    assert torch.equal(second.simulations.latents, first.simulations.latents)
    assert not (tmp_path / "fit.pt.simulations").exists()


def test_a_torn_store_is_refused_in_words(tmp_path, monkeypatch):
    cut_off(AmortizedPosterior(upward, bridge="light"), tmp_path / "fit.pt", monkeypatch)
    store = tmp_path / "fit.pt.simulations"
    store.write_bytes(store.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must be a whole file"):
        AmortizedPosterior(upward, bridge="light").fit(checkpoint=tmp_path / "fit.pt", **QUICK)


SAVED = {
    "one number": (upward, (), torch.tensor(0.3), {}),
    "items": (m.iid, (), torch.tensor([0.9, 0.2, 0.7, 1.4, 0.5]), {}),
    "arguments": (given, (torch.ones(3), 0.5), torch.tensor([0.9, 0.2, 0.7]), {}),
    "missing": (given, (torch.ones(3),), torch.tensor([0.9, torch.nan, 0.7]), {"missing": 0.5}),
    "vsdm": (upward, (), torch.tensor(0.3), {"bridge": "vsdm"}),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_it_is_the_same_posterior(name, tmp_path):
    model, args, y, options = SAVED[name]
    amortized = AmortizedPosterior(model, bridge=options.get("bridge", "light"))
    amortized.fit(*args, **(QUICK | {k: v for k, v in options.items() if k != "bridge"}))
    amortized.save(tmp_path / "fit.pt")
    loaded = AmortizedPosterior.load(tmp_path / "fit.pt", model)
    draws = []
    for each in (amortized, loaded):
        torch.manual_seed(0)
        posterior = each.condition(y)
        draws.append((posterior.sample(20)["mu"], posterior.importance(50).log_weights))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert repr(loaded) == repr(amortized) and loaded.exchangeable == amortized.exchangeable
    assert torch.equal(loaded.simulations.observations, amortized.simulations.observations)


def test_it_is_loaded_with_its_own_model_alone(tmp_path):
    amortized = AmortizedPosterior(upward, bridge="light")
    with pytest.raises(RuntimeError, match="save needs a fitted posterior"):
        amortized.save(tmp_path / "fit.pt")
    amortized.fit(**QUICK)
    amortized.save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="the model is upward .* there and downward .* here"):
        AmortizedPosterior.load(tmp_path / "fit.pt", downward)
    saved = read_file(tmp_path / "fit.pt")
    for change, message in (
        ({"format": 7}, "format 1, got 7.*update pyro_sb"),
        ({"kind": "MCMC"}, "other contents"),
        ({"pairs": [torch.zeros(3, 2), torch.zeros(3, 1)]}, "latents of shape"),
        ({"residuals": [torch.zeros(1), torch.zeros(3, 1), torch.zeros(2, 2)]}, "factor of the residuals"),
        ({"features": {}}, "one that differs|must hold"),
    ):
        write_file(saved | change, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            AmortizedPosterior.load(tmp_path / "other.pt", upward)


def test_arguments_that_no_file_holds_are_refused(tmp_path):
    amortized = AmortizedPosterior(lambda net: upward(), bridge="light")
    amortized.fit(torch.nn.Identity(), **QUICK)
    with pytest.raises(ValueError, match="the model's arguments must be tensors and plain values"):
        amortized.save(tmp_path / "fit.pt")
