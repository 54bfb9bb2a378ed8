"""Lines on a run's population: what a source missed, the evidence, warm-up; the verdict in words."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import Line, Report, mode_audit, report
from pyro_sb.diagnostics.reports.population_lines import evidence_line, sources_line, warmup_line
from pyro_sb.infer import MCMC, BridgeMH, KernelLangevin
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.sources import Source

pytest.importorskip("arviz")
F64 = torch.float64
Y = torch.tensor(6.0, dtype=F64)


def mirrored(y):  # |mu| is what the data tell
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 5.0))
    pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def known(rare=0.0, **last):
    sources = (Source("search", 64, maxima=2), Source("prior", 4096, 3, 1, **({"num_levels": 5} | last)))
    return SimpleNamespace(sources=sources, rare=rare)


# ---- lines ----


def test_what_the_sources_met_and_could_miss():
    line = sources_line(known())
    assert line.verdict == "ok" and line.value == "search 2 maxima, prior 1 more"
    assert line.note == "a region under 0.0007 of 4096 particles at every temperature may be missed"
    assert sources_line(SimpleNamespace(sources=())) is None


@pytest.mark.parametrize(
    ("population", "word"),
    [
        (known(exponent=0.2), "exponent 0.2 of 1"),
        (known(rare=0.04), "4.0% of the evidence lies in maxima met three times or less"),
        (known(failure="the support is thin"), "no second source.*the support is thin"),
    ],
    ids=["unfinished", "rare", "failed"],
)
def test_what_is_left_open_is_looked_at(population, word):
    line = sources_line(population)
    assert line.verdict == "look"
    assert re.search(word, line.note)


def test_two_evidences_agree_or_do_not():
    assert evidence_line({"one": (-3.0, 0.02)}).verdict == "ok"
    agree = evidence_line({"one": (-3.0, 0.02), "another": (-3.05, 0.02)})
    assert agree.verdict == "ok" and agree.value == "-3.000 +- 0.020" and "another agrees" in agree.note
    assert evidence_line({"one": (-3.0, 0.02), "another": (-3.5, 0.02)}).verdict == "bad"
    assert evidence_line({"one": (-3.0, 0.02), "another": (-3.5, 0.02)}, k_hat=0.9).verdict == "look"
    vague = evidence_line({"one": (-3.0, 0.3)})
    assert vague.verdict == "ok" and "known to 0.3 nats" in vague.note
    assert evidence_line({"one": (-3.0, 0.6)}).verdict == "look"


def test_the_share_of_warm_up():
    assert warmup_line({"warmup": 3.0, "sampling": 1.0}).value == "75% of 4.0 s"
    assert warmup_line({}) is None


# ---- words of the verdict ----


def test_wrong_and_too_short_are_told_apart():
    short = Line("tail ESS", "90", "bad", "draw more", short=True)
    wrong, doubt = Line("modes: draws", "", "bad"), Line("tails", "", "look")
    assert Report("a", [Line("x", "", "ok")]).reason == "nothing found"
    assert Report("a", [short]).verdict == "bad" and Report("a", [short]).reason == "not enough draws yet"
    assert Report("a", [short, wrong]).reason == "wrong (modes: draws)"
    assert Report("a", [short, doubt]).reason == "not enough draws yet, and something to look at (tails)"
    assert Report("a", [doubt]).reason == "something to look at (tails)"
    assert str(Report("a", [short])).startswith("a: bad, not enough draws yet\n")


# ---- runs ----


@pytest.fixture(scope="module")
def run():
    pyro.set_rng_seed(0)
    mcmc = MCMC(KernelLangevin(mirrored), num_samples=400, num_chains=32, disable_progbar=True)
    mcmc.run(Y)
    return mcmc


def test_a_run_with_a_population_makes_no_other(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a population was made")

    monkeypatch.setattr("pyro_sb.diagnostics.modes.mode_audit.populate", refuse)
    before = run.kernel.log_joint.evaluations.gradient
    found = report(run)
    assert found.verdict == "ok" and found["modes: draws"].value.startswith("mode ")
    assert len(found.details["modes"].populations) == 1 and found.details["modes"].num_modes == 2
    assert run.kernel.log_joint.evaluations.gradient == before  # evaluations of the density alone
    assert {"tails", "sources", "evidence", "warm-up"} <= {line.name for line in found.lines}
    exact = dist.Normal(torch.zeros((), dtype=F64), 26.0**0.5).log_prob(Y) + torch.tensor(2.0, dtype=F64).log()
    evidence, error = (float(part) for part in found["evidence"].value.split(" +- "))
    assert abs(evidence - float(exact)) < 4 * error + 0.02  # the other sign of mu has as much, but for e^-17


def test_a_mode_that_all_chains_lost_is_bad_by_the_runs_own_population(run, monkeypatch):
    draws = run.get_samples(group_by_chain=True)["mu"].abs()
    monkeypatch.setattr(run, "_drawn", replace(run._drawn, samples={"mu": draws}))
    found = report(run)
    assert found.verdict == "bad" and found["modes: draws"].verdict == "bad" and found["R-hat"].verdict == "ok"
    assert "the population sees" in found["modes: draws"].note and found.reason.startswith("wrong (modes: draws")


def test_the_full_audit_holds_two_kinds_against_each_other(run):
    found = report(run, audit="full", progress=False)
    assert (
        found.details["modes"].kinds == ("search", "prior") and "search and prior" in found["modes: populations"].note
    )
    assert "tails" in found.details and found.verdict == "ok"


def test_a_bridges_evidence_stands_beside_the_populations():
    mcmc = MCMC(BridgeMH(mirrored), num_samples=200, num_chains=32, disable_progbar=True)
    mcmc.run(Y)
    assert "agrees" in report(mcmc)["evidence"].note


def test_non_centred_walks_are_compared_in_the_models_own_coordinates():
    def funnel():
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F64), 3.0))
        with pyro.plate("many", 4):
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), (v / 2).exp()))

    mcmc = MCMC(KernelLangevin(funnel), num_samples=300, num_chains=32, disable_progbar=True)
    mcmc.run()
    assert mcmc.kernel.coordinates is not None
    found = report(mcmc)
    assert found["tails"].verdict == "ok" and found["modes: draws"].verdict == "ok"
    ends = found.details["tails"].population_quantiles[:, 0] / 3  # v is normal
    torch.testing.assert_close(ends, torch.tensor([-2.3263, -1.6449, 1.6449, 2.3263], dtype=F64), rtol=0, atol=0.3)


# ---- two kinds ----


def kinds(monkeypatch, **options):
    starts = []
    from pyro_sb.infer.population.build import populate

    def seen(joint, num, **given):
        starts.append(given.get("start", "search"))
        return populate(joint, num, **given)

    monkeypatch.setattr("pyro_sb.diagnostics.modes.mode_audit.populate", seen)
    return mode_audit(num_particles=200, progress=False, **options), starts


def test_an_audit_never_compares_two_seeds_of_one_kind(monkeypatch):
    audit, starts = kinds(monkeypatch, target=mirrored, args=(Y,))
    assert starts == ["search", "prior"] == list(audit.kinds) and audit.num_modes == 2


def test_where_there_is_no_prior_the_second_starts_from_a_wide_law(monkeypatch):
    joint = LogJoint.from_batched(lambda z: -(z.abs() - 5).square().sum(-1) / 2, 1)
    audit, starts = kinds(monkeypatch, target=joint)
    assert starts[0] == "search" and audit.kinds[1] == "wide law" and audit.num_modes == 2 and audit.verdict == "ok"
    first = audit.populations[0]
    assert starts[1].std() > 1.5 * (first.weights @ first.points.square()).sqrt()


def test_given_points_near_a_far_mode_are_met_by_both():
    def log_prob(z):
        return torch.logsumexp(torch.stack([-z.square().sum(-1), -(z - 300).square().sum(-1)]) / 2, 0)

    points = torch.cat([torch.randn(50, 2, dtype=F64), 300 + torch.randn(50, 2, dtype=F64)])
    audit = mode_audit(LogJoint.from_batched(log_prob, 2), start=points, progress=False)
    assert audit.kinds == ("search", "given points") and audit.num_modes == 2
    assert (audit.shares > 0.4).all()
