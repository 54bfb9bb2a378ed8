"""Runs of a model on many rows: what a batch reads is what single runs read, and rows know nothing of each other."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.ops.indexing import Vindex

from pyro_sb.infer.model.prototype import Start, run
from pyro_sb.infer.model.runs import ModelRuns, Row, Wanted
from tests.infer.models import CASES, SMALL, X, Y, f64

F64 = torch.float64
MASK = torch.tensor([True, False, True, True, False])


def of_vectors(y):  # events of several dimensions, in a plate
    scale = pyro.sample("scale", dist.LogNormal(f64(0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2, dtype=F64), scale).to_event(1))
        matrix = pyro.sample("matrix", dist.Normal(beta[..., None, :] + torch.zeros(3, 2, dtype=F64), 1.0).to_event(2))
        pyro.deterministic("trace", matrix.sum((-2, -1)))


def masked(y):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 1.0))
    twice = pyro.deterministic("twice", 2 * mu)
    with pyro.plate("rows", 5), poutine.mask(mask=MASK), poutine.scale(scale=7.0):
        pyro.sample("y", dist.Normal(twice, 1.0), obs=y)


def discrete(y):
    loc = pyro.sample("loc", dist.Normal(f64(-1.0, 1.0), 1.0).to_event(1))
    with pyro.plate("rows", 5):
        side = pyro.sample("side", dist.Categorical(f64(0.3, 0.7)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(loc)[..., side], 1.0), obs=y)


def branching(y):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal(pyro.deterministic("centre", mu + 0 * y), scale), obs=y)


def mixing(y):  # under a plate the mean runs over the rows too, without an error
    with pyro.plate("groups", 3):
        loc = pyro.sample("loc", dist.Normal(f64(0.0).squeeze(), 1.0))
    pyro.sample("y", dist.Normal(1e3 + loc.mean(), 1.0), obs=y[0])


OWN = {
    "plate of vectors": (of_vectors, "plate"),
    "mask and deterministic": (masked, "plate"),
    "discrete": (discrete, "plate"),
    "control flow, deterministic": (branching, "loop"),
    "mean over a plate": (mixing, "vmap"),
}
MODELS = {name: (model, (SMALL,), {}, route) for name, (model, route) in OWN.items()}
MODELS |= {
    name: (case.model, case.args, case.kwargs, case.route)
    for name, case in CASES.items()
    if name not in ("improper, ordered", "PyroModule")
}
OTHER_ROUTES = {"mixture, Vindex": "plate", "undeclared batches": "vmap"}


def runs_of(model, args=(SMALL,), kwargs=None):
    kwargs = kwargs or {}
    return ModelRuns.of(run(model, args, kwargs, Start(init_to_sample)), model, args, kwargs)


def everything(runs, resample=False):
    return Wanted(list(runs.shapes), list(runs.batch_shapes), resample)


def drawn(runs, num):
    """Rows of every latent, by single runs."""
    latent = run(runs.model, runs.args, runs.kwargs, Start(init_to_sample)).stochastic_nodes
    names = [name for name in latent if name in runs.batch_shapes]
    return Row(runs.at(Row({}), num, Wanted(names), routes=["loop"]).values)


def by_pyro(runs, row):
    """Values and masked log densities of one run at a row, by Pyro's own trace."""
    trace = poutine.trace(poutine.condition(runs.model, row)).get_trace(*runs.args, **runs.kwargs)
    values = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in runs.shapes}
    log_probs = {}
    for name in runs.batch_shapes:
        site = trace.nodes[name]
        log_prob = site["fn"].log_prob(site["value"])
        log_probs[name] = log_prob if site["mask"] is None else torch.where(site["mask"], log_prob, 0.0)
    return values, log_probs


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_a_single_run(name, caplog):
    model, args, kwargs, _ = MODELS[name]
    runs = runs_of(model, args, kwargs)
    rows = drawn(runs, 7)
    found = runs.at(rows, 7, everything(runs))
    for i in range(7):
        values, log_probs = by_pyro(runs, {site: x[i] for site, x in rows.values.items()})
        for got, expected in ((found.values, values), (found.log_probs, log_probs)):
            assert got.keys() == expected.keys()
            for site in expected:
                torch.testing.assert_close(got[site][i], expected[site], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_move_when_others_change(name):
    model, args, kwargs, _ = MODELS[name]
    runs = runs_of(model, args, kwargs)
    rows, others = drawn(runs, 6), drawn(runs, 6)
    mixed = Row({site: torch.cat([x[:3], others.values[site][3:]]) for site, x in rows.values.items()})
    found, again = (runs.at(some, 6, everything(runs)) for some in (rows, mixed))
    for got, other in zip(found, again):
        for site in got:
            torch.testing.assert_close(got[site][:3], other[site][:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8])  # sizes of the models too
@pytest.mark.parametrize("name", OWN)
def test_the_route_is_the_fastest_that_is_right(name, num, caplog):
    model, args, kwargs, route = MODELS[name]
    runs = runs_of(model, args, kwargs)
    with caplog.at_level(logging.INFO, logger="pyro_sb.infer.model.agreement"):
        runs.at(drawn(runs, num), num, everything(runs))
    failed = [record.args[0] for record in caplog.records]
    slower = ["plate", "vmap", "loop"][: ["plate", "vmap", "loop"].index(route)]
    assert failed == slower or (num == 1 and failed == slower[: len(failed)])  # one row alone may be right by any


@pytest.mark.parametrize("name", ["plate of vectors", "mask and deterministic", "discrete", "nested plates"])
def test_drawn_sites_are_drawn_for_every_row(name):
    model, args, kwargs, _ = MODELS[name]
    runs = runs_of(model, args, kwargs)
    found = runs.at(Row({}), 50, everything(runs, resample=True))
    for site in runs.batch_shapes:
        assert found.values[site].shape == (50, *runs.shapes[site])
        if site not in ("side", "fixed"):
            assert len(found.values[site].reshape(50, -1)[:, 0].unique()) == 50


@pytest.mark.parametrize("unit", [1e-9, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_values_that_mix_rows_are_found_in_any_unit(unit, offset):
    def model(keep):
        with pyro.plate("groups", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.deterministic("mean", unit * (offset + (loc.mean(-1, keepdim=True) if keep else loc.mean())))

    for keep, num in ((True, 5), (False, 5), (False, 2)):
        runs = runs_of(model, (keep,))
        rows = drawn(runs, num)
        found = runs.at(rows, num, everything(runs)).values["mean"].reshape(num)
        expected = unit * (offset + rows.values["loc"].mean(-1))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_missing_entries_have_no_log_density():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mu, 1.0))

    runs = runs_of(model, ())
    runs.event_dims["y"] = 0
    present = torch.tensor([[True, True, True], [True, False, False]])
    rows = Row({"mu": torch.zeros(2), "y": torch.zeros(2, 3)}, {"y": present})
    half = -0.5 * math.log(2 * math.pi)
    expected = present.sum(1) * half + half
    single = torch.stack(
        [
            sum(term.sum() for term in runs.terms(Row({k: v[i] for k, v in rows.values.items()}, {"y": present[i]})))
            for i in range(2)
        ]
    )
    torch.testing.assert_close(single, expected)
    wide = sum(runs.by_row(term) for term in runs.terms(runs.widened(rows)))
    torch.testing.assert_close(wide, expected)


def test_a_row_of_another_models_sites_is_refused_by_name():
    runs = runs_of(masked)
    with pytest.raises(ValueError, match=r"same latent sites at every run, got one without \['other'\]"):
        runs.terms(Row({"mu": Y[0], "other": Y[0]}))
    with pytest.raises(ValueError, match="got a new one, 'mu'"):
        runs.terms(Row({}))


def test_batches_do_not_change_what_is_read(monkeypatch):
    runs = runs_of(CASES["regression, X @ beta"].model, (X, Y[:7]))
    rows = drawn(runs, 20)
    whole = runs.at(rows, 20, everything(runs))
    monkeypatch.setattr("pyro_sb.infer.model.runs.MAX_NUMBERS", 50)
    parts = runs.at(rows, 20, everything(runs))
    torch.testing.assert_close(parts.log_probs["y"], whole.log_probs["y"], rtol=1e-13, atol=1e-13)
