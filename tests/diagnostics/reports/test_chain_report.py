"""The report of a run: what is broken, still, or too short is said so, and advice can be followed."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import LightSB
from pyro_sb.diagnostics import Run, mode_audit, report, to_arviz
from pyro_sb.diagnostics.export.container import to_container
from pyro_sb.infer import MCMC, BridgeMH, KernelLangevin

pytest.importorskip("arviz")
F64 = torch.float64


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def of(**sites):
    return report(to_container({"posterior": sites}), audit=None)


def run_by(kernel, figures=None, num_diverging=0):
    """A finished run whose kernel knows these figures."""
    draws = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=F64)
    diverging = torch.arange(800).reshape(4, 200) < num_diverging
    return Run(
        {"mu": draws},
        getattr(kernel, "model", None),
        (torch.tensor(0.0, dtype=F64),),
        sample_stats={"diverging": diverging},
        kernel=kernel,
        figures=lambda: figures or {},
    )


# ---- draws ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_draw_that_is_not_finite_is_bad(value):
    good = np.random.default_rng(0).normal(size=(4, 500, 2))
    broken = good.copy()
    broken[0, 3, 1] = value
    found = of(a=good, b=broken)
    assert found["finite draws"].verdict == "bad" and "1 draw of b[1] is not finite" in found["finite draws"].value
    assert found["R-hat"].verdict == "ok" and "b[1]" not in found["bulk ESS"].value
    nothing = of(b=np.full((4, 500), value))
    assert "2000 draws of b are not finite" in nothing["finite draws"].value
    assert [nothing[name].verdict for name in ("R-hat", "bulk ESS", "tail ESS")] == ["bad"] * 3


def test_a_site_that_stands_still_is_named():
    moving = np.random.default_rng(0).normal(size=(4, 500, 2))
    still = of(a=moving, c=np.ones((4, 500)))
    assert still["constant"].verdict == "look" and still["constant"].value == "c"
    factor = moving.copy()
    factor[..., 0] = 1.0  # as a Cholesky factor of correlations has
    part = of(a=moving, factor=factor)
    assert part["constant"].verdict == "-" and part["constant"].value == "factor[0]" and part.verdict == "ok"
    stuck = of(a=np.repeat(np.arange(4.0)[:, None], 500, 1))
    assert stuck["R-hat"].verdict == "bad" and stuck["R-hat"].value == "> 99 (a)"


def test_a_short_chain_is_called_short_not_still():
    line = of(a=np.random.default_rng(0).normal(size=(1, 6)))["R-hat"]
    assert "too few draws for R-hat" in line.note and "not move" not in line.note


# ---- runs that have not run, or hardly ----


@pytest.mark.parametrize("maker", [pyro.infer.MCMC, MCMC], ids=["Pyro's", "ours"])
@pytest.mark.parametrize("ask", [report, to_arviz, mode_audit], ids=lambda ask: ask.__name__)
def test_a_run_that_has_not_run_is_refused(maker, ask):
    kernel = pyro.infer.NUTS(model) if maker is pyro.infer.MCMC else KernelLangevin(model)
    with pytest.raises(RuntimeError, match=r"Call run\("):
        ask(maker(kernel, num_samples=10))


def test_fewer_draws_than_diagnostics_take_are_refused_in_words_and_exported():
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=3, warmup_steps=5, disable_progbar=True)
    mcmc.run(torch.tensor(0.5, dtype=F64))
    with pytest.raises(ValueError, match="at least 4 draws a chain, got 3"):
        report(mcmc)
    container = to_arviz(mcmc)
    assert container.sample_stats["diverging"].shape == (1, 3)


def test_a_run_of_a_potential_is_audited():
    def potential(params):
        return (params["z"].abs() - 5).square().sum() / 2

    nuts = pyro.infer.NUTS(potential_fn=potential)
    start = {"z": torch.tensor([4.0], dtype=F64)}
    mcmc = pyro.infer.MCMC(nuts, num_samples=60, warmup_steps=30, initial_params=start, disable_progbar=True)
    mcmc.run()
    audit = mode_audit(mcmc)
    assert audit.num_modes == 2 and len(audit.missing) == 1 and audit.chain_shares.max() == 1


def test_why_there_was_no_audit_keeps_its_cure():
    note = report(run_by(None))["modes"].note
    assert "Pass the model" in note and "audit=" in note


# ---- what kernels knew ----


def test_moves_are_called_what_they_are():
    figures = {"acceptance bridge": {"chain 0": 0.9}, "acceptance index": {"chain 0": 0.5}}
    langevin = report(run_by(KernelLangevin(model), figures), audit=None)
    assert "local move" in langevin["acceptance bridge"].note and "whole points" in langevin["acceptance index"].note
    proposals = report(run_by(BridgeMH(model, LightSB), figures), audit=None)["acceptance bridge"]
    assert "whole points" in proposals.note
    assert not any("cross" in line.note for line in [*langevin.lines, proposals] if line.name != "modes")
    idle = report(run_by(KernelLangevin(model), {"acceptance bridge": {"chain 0": 0.004}}), audit=None)
    assert idle["acceptance bridge"].verdict == "look" and "rely on the others" in idle["acceptance bridge"].note


def test_divergences_are_spared_where_steps_are_of_many_lengths():
    ours, nuts = KernelLangevin(model), pyro.infer.NUTS(model)
    assert report(run_by(ours, num_diverging=1), audit=None)["divergences"].verdict == "ok"
    assert report(run_by(nuts, num_diverging=1), audit=None)["divergences"].verdict == "look"
    assert report(run_by(ours, num_diverging=8), audit=None)["divergences"].verdict == "ok"
    some = report(run_by(ours, num_diverging=9), audit=None)["divergences"]
    assert some.verdict == "look" and "num_particles" in some.note and "step" not in some.note
    assert report(run_by(ours, num_diverging=41), audit=None)["divergences"].verdict == "bad"


@pytest.mark.parametrize(("num_chains", "verdict"), [(4, "look"), (64, "ok")])
def test_r_hat_asks_for_as_much_of_each_of_many_chains_as_shows_that_it_left_its_start(num_chains, verdict):
    # normal means of chains, as spread as 37 effective draws in each half of a chain make them
    x = np.random.default_rng(0).normal(size=(num_chains, 2, 500))
    x = (x - x.mean(2, keepdims=True)) / x.std(2, keepdims=True)
    means = np.random.default_rng(1).normal(size=(num_chains, 2, 1))
    x = x + (means - means.mean()) / means.std() / np.sqrt(37)
    line = of(a=x.reshape(num_chains, -1))["R-hat"]
    assert 1.011 < float(line.value.split()[0]) < 1.016 and line.verdict == verdict
    assert of(a=(x + np.arange(num_chains)[:, None, None] % 2).reshape(num_chains, -1))["R-hat"].verdict == "bad"


# ---- options ----


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (LightSB(2), {"num_data_sets": 50}, "LightSB uses target, source, context, got num_data_sets too"),
        (LightSB(2), {"audit": None}, "got audit too"),
        (run_by(None), {"source": torch.zeros(5, 2)}, "Run uses target, args, kwargs, audit, got source"),
        (run_by(None), {"audit": "slow"}, 'audit must be "quick", "full", None or a ModeAudit, got .slow'),
        (run_by(None), {"args": (1,)}, "args and kwargs are the model's, got them without a model"),
        (run_by(None), {"target": model, "audit": None}, "got it together with audit=None"),
    ],
)
def test_an_option_that_would_not_be_used_is_refused_by_name(x, options, message):
    with pytest.raises(ValueError, match=message):
        report(x, **options)


@pytest.mark.parametrize(
    ("x", "cure"),
    [
        (KernelLangevin(model), r"MCMC\(kernel"),
        ({"mu": torch.zeros(4, 100)}, "az.from_dict"),
        (torch.zeros(5), r"psis\(log_weights\)"),
        (3, r"Call run\(\)"),
    ],
    ids=["kernel", "dict", "tensor", "number"],
)
def test_what_has_no_report_is_told_where_to_go(x, cure):
    with pytest.raises(TypeError, match=cure):
        report(x)


def test_a_larger_audit_is_asked_for_in_words_that_the_report_takes():
    half = {"mu": 6 + torch.randn(4, 200, dtype=F64)}

    def mirrored(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 5.0))
        pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)

    y = torch.tensor(6.0, dtype=F64)
    audit = mode_audit(half, mirrored, args=(y,), num_particles=100)
    object.__setattr__(audit.populations[0], "ess_share", 0.001)
    found = report(to_container({"posterior": {"mu": half["mu"].numpy()}}), audit=audit)
    assert "audit=mode_audit(..., num_particles=400)" in found["modes: populations"].note
