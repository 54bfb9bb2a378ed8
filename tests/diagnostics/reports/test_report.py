"""The report: a wrong posterior that R-hat and ESS call good is not called good here; each kind of object has one."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import LightSB
from pyro_sb.diagnostics import Line, Report, Run, bridge_report, report, to_arviz
from pyro_sb.infer import MCMC, AmortizedPosterior, KernelLangevin

pytest.importorskip("arviz")
F64 = torch.float64
Y = torch.tensor(6.0, dtype=F64)


def mirrored(y):  # |mu| is what the data tell
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 5.0))
    pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def open_model():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1))


def half(num_chains=4, num_draws=500):
    """Exact draws of the positive mode alone."""
    precision = 1 / 25 + 1
    return 6 / precision + torch.randn(num_chains, num_draws, dtype=F64) / math.sqrt(precision)


# ---- chains ----


def test_a_missing_mode_that_r_hat_and_ess_call_good_is_bad_here():
    found = report(Run({"mu": half()}, mirrored, (Y,)))
    assert [found[name].verdict for name in ("R-hat", "bulk ESS", "tail ESS")] == ["ok"] * 3
    assert found["modes: draws"].verdict == "bad" and found.verdict == "bad"
    assert "no draw in mode" in str(found) and str(found).startswith("4 chains of 500 draws, 1 number: bad")
    assert len(found.details["modes"].missing) == 1


def test_our_kernel_is_ok_and_says_what_it_knew():
    mcmc = MCMC(KernelLangevin(mirrored), num_samples=100, num_chains=16, disable_progbar=True)
    mcmc.run(Y)
    found = report(mcmc)
    assert found.verdict == "ok" and found["population"].verdict == "ok" and found["acceptance index"].verdict == "ok"
    seen = report(mcmc, audit=found.details["modes"])
    assert seen.details["modes"] is found.details["modes"]


def test_a_container_needs_the_model_for_its_modes():
    container = to_arviz(Run({"mu": half()}, mirrored, (Y,)))
    without = report(container)
    assert without["modes"].verdict == "look" and "pass model and args" in without["modes"].note
    assert report(container, audit=None)["modes"].verdict == "-"
    assert report(container, mirrored, args=(Y,))["modes: draws"].verdict == "bad"


@pytest.mark.parametrize(
    ("draws", "line"),
    [
        (torch.randn(4, 500, dtype=F64) + torch.arange(4, dtype=F64)[:, None], "R-hat"),
        (torch.randn(4, 500, dtype=F64).cumsum(1), "bulk ESS"),
        (torch.randn(4, 10, dtype=F64), "tail ESS"),
        (torch.ones(4, 500, dtype=F64), "R-hat"),
    ],
    ids=["chains apart", "walks", "few", "constant"],
)
def test_each_fault_has_its_line(draws, line):
    found = report(Run({"mu": draws}))
    assert found[line].verdict == "bad" and found[line].note


def test_divergences_are_counted():
    diverging = torch.zeros(4, 500, dtype=torch.bool)
    assert report(Run({"mu": half()}, sample_stats={"diverging": diverging}))["divergences"].verdict == "ok"
    diverging[0, :3] = True
    line = report(Run({"mu": half()}, sample_stats={"diverging": diverging}))["divergences"]
    assert line.verdict == "look" and line.value.startswith("3 ")
    diverging[0, :50] = True
    assert report(Run({"mu": half()}, sample_stats={"diverging": diverging}))["divergences"].verdict == "bad"


def test_a_run_without_a_model_says_that_modes_were_not_looked_for():
    found = report(Run({"mu": half()}))
    assert found["modes"].verdict == "look" and "know one model" in found["modes"].note


# ---- posteriors and bridges ----


@pytest.fixture(scope="module")
def amortized():
    pyro.set_rng_seed(0)
    made = AmortizedPosterior(open_model, bridge="light")
    made.fit(num_simulations=1000, num_updates=200, progress=False)
    return made


def test_an_amortised_posterior_is_calibrated_or_not(amortized, monkeypatch):
    found = report(amortized)
    assert found.verdict == "ok" and found["SBC ranks"].verdict == "ok" and found["TARP"].verdict == "ok"
    assert "local_c2st" in found["one observation"].note
    monkeypatch.setattr(amortized._rows, "factor", 0.5 * amortized._rows.factor)
    narrow = report(amortized)
    assert {narrow[name].verdict for name in ("SBC ranks", "TARP", "coverage")} == {"bad"}
    assert "too narrow" in narrow["coverage"].note


def test_a_posterior_is_weighed_and_its_modes_compared(amortized, monkeypatch):
    posterior = amortized.condition(torch.tensor([0.5, -0.5]))
    found = report(posterior)
    assert found.verdict == "ok" and found["Pareto k-hat"].verdict == "ok" and found["modes: draws"].verdict == "ok"
    batch = report(amortized.condition(torch.zeros(3, 2)))
    assert "worst of 3 observations" in batch["Pareto k-hat"].value and batch["modes"].verdict == "-"
    monkeypatch.setattr(amortized._rows, "factor", 0.2 * amortized._rows.factor)
    assert report(amortized.condition(torch.tensor([0.5, -0.5])), audit=None)["Pareto k-hat"].verdict == "bad"


def test_a_bridge_has_its_own():
    draws = torch.randn(500, 2, dtype=F64)
    bridge = LightSB(2, num_components=2)
    bridge.fit(draws, solver="moments", progress=False)
    names = [line.name for line in report(bridge, draws).lines]
    assert names == [line.name for line in bridge_report(bridge, draws).lines]


def test_what_is_none_of_these_is_refused():
    with pytest.raises(TypeError, match="finished MCMC, an ArviZ container.*got ndarray"):
        report(np.zeros(3))
    with pytest.raises(RuntimeError, match="fit"):
        report(AmortizedPosterior(open_model))
    with pytest.raises(RuntimeError, match="must be fitted first"):
        report(LightSB(2))
    with pytest.raises(RuntimeError, match="Call run"):
        report(MCMC(KernelLangevin(mirrored), num_samples=10))


# ---- the table ----


def test_the_worst_line_decides_and_html_escapes():
    lines = [Line("a", "1 < 2", "ok"), Line("b", "", "-"), Line("c", "", "look", "do")]
    found = Report("title", lines)
    assert found.verdict == "look" and Report("title", lines[1:2]).verdict == "-"
    assert "1 &lt; 2" in found._repr_html_() and "title: look" in found._repr_html_()
    assert str(found).splitlines()[0] == "title: look, something to look at (c)"
    assert all(len(line) == len(line.rstrip()) for line in str(found).splitlines())
