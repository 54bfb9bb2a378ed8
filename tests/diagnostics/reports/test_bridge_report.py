"""The bridge report: good fits pass, each planted fault fails its own line, and what does not apply says so."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from pyro_sb.bridges import DSB, SGM, KernelLangevinBridge, LatentBridge, LightSB, LightSBBM, PCACodec
from pyro_sb.diagnostics import bridge_report
from pyro_sb.distributions import Draws

F64 = torch.float64
NAMES = [
    "marginal moments",
    "marginal distance",
    "source residual",
    "Sinkhorn residual",
    "inverse-map residual",
    "forward-backward gap",
    "density",
    "path-weight ESS",
]


def bimodal(num=1000):
    side = torch.where(torch.rand(num, 1) < 0.5, 2.0, -2.0).to(F64)
    return torch.cat([side, torch.zeros_like(side)], 1) + torch.randn(num, 2, dtype=F64) * 0.5


def light(draws, **options):
    bridge = LightSB(2, num_components=4)
    bridge.fit(draws, solver="moments", progress=False, **options)
    return bridge


def plain(draws):
    bridge = KernelLangevinBridge(2, scheme="plain", num_steps=2)
    bridge.fit(draws[:300], progress=False)
    return bridge


@contextmanager
def quiet():
    """Short fits have not converged, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def dsb(target, source=None):
    bridge = DSB(2, hidden=(32, 32), num_steps=8)
    with quiet():
        bridge.fit(target, source, num_iterations=1, num_updates=60, num_pairs=500, progress=False)
    return bridge


def spoil(bridge, monkeypatch, change):
    honest = bridge.draws_rows

    def draws_rows(num, context):
        value, log_q = honest(num, context)
        return Draws(value, change(log_q))

    monkeypatch.setattr(bridge, "draws_rows", draws_rows)


def test_every_promise_has_a_line_and_a_good_fit_is_ok():
    report = bridge_report(light(bimodal()), bimodal())
    assert [line.name for line in report.lines] == NAMES and report.verdict == "ok"
    assert report["Sinkhorn residual"].verdict == "-" and "solves no scaling" in report["Sinkhorn residual"].note
    assert "density is that of the draw" in report["path-weight ESS"].note
    with pytest.raises(KeyError, match="no line of this report"):
        report["nothing"]


def test_another_target_is_seen_by_moments_or_by_distance():
    bridge = light(bimodal())
    shifted = bridge_report(bridge, bimodal() + torch.tensor([0.0, 1.0], dtype=F64))
    assert shifted["marginal moments"].verdict == "bad"
    same_moments = torch.randn(1000, 2, dtype=F64) * bimodal(5000).std(0)
    reshaped = bridge_report(bridge, same_moments)
    assert reshaped["marginal moments"].verdict == "ok" and reshaped["marginal distance"].verdict != "ok"


def test_without_draws_the_bridge_is_judged_by_itself():
    report = bridge_report(light(bimodal()))
    assert report["marginal moments"].value == "not computed" and report["density"].verdict == "ok"


@pytest.mark.parametrize("make", [light, plain], ids=["marginal", "path"])
def test_a_density_that_is_off_is_seen(make, monkeypatch):
    bridge = make(bimodal())
    assert bridge_report(bridge)["density"].verdict == "ok"
    spoil(bridge, monkeypatch, lambda log_q: log_q + 1)
    assert bridge_report(bridge)["density"].verdict == "bad"


def test_paths_cost_what_their_noise_does(monkeypatch):
    bridge = plain(bimodal(300))
    good = bridge_report(bridge, num_draws=400)["path-weight ESS"]
    spoil(bridge, monkeypatch, lambda log_q: log_q + 3 * torch.randn_like(log_q))
    bad = bridge_report(bridge, num_draws=400)["path-weight ESS"]
    assert good.verdict == "ok" and bad.verdict == "bad"


def test_the_sinkhorn_residual_is_the_scalings():
    bridge = KernelLangevinBridge(2)
    bridge.fit(bimodal(300), progress=False)
    assert bridge_report(bridge)["Sinkhorn residual"].verdict == "ok"
    bridge.log_v = bridge.log_v + 0.5 * torch.randn_like(bridge.log_v)
    bridge._cache = None
    assert bridge_report(bridge)["Sinkhorn residual"].verdict == "bad"


def test_the_bass_maps_inverse_is_exact():
    bridge = LightSBBM(2, num_components=3, beta=5.0)
    with quiet():
        bridge.fit(bimodal(300), num_updates=20, progress=False)
    line = bridge_report(bridge)["inverse-map residual"]
    assert line.verdict == "ok" and float(line.value) < 1e-9
    assert bridge_report(light(bimodal()))["inverse-map residual"].verdict == "-"


def test_the_two_chains_of_dsb_are_held_against_each_other():
    source = torch.randn(1000, 2, dtype=F64)
    bridge = dsb(bimodal(), source)
    good = bridge_report(bridge, bimodal(), source=source)
    assert good["source residual"].verdict == "ok" and good["forward-backward gap"].verdict != "-"
    assert good["density"].value == "has none" and good["path-weight ESS"].note == "it has no density"
    bridge.back.load_state_dict(dsb(bimodal(), source + 3).back.state_dict())
    assert bridge_report(bridge, bimodal(), source=source)["forward-backward gap"].verdict == "bad"


def test_a_source_that_is_not_its_own_is_seen():
    law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    bridge = light(bimodal())
    assert bridge_report(bridge, source=law)["source residual"].value == "leaves from a point"
    fitted = dsb(bimodal(), law)
    assert bridge_report(fitted, source=law)["source residual"].verdict == "ok"
    assert bridge_report(fitted, source=torch.randn(500, 2) + 2)["source residual"].verdict == "bad"


def test_a_context_that_is_ignored_is_seen():
    context = torch.randn(800, 1, dtype=F64)
    target = context + 0.3 * torch.randn(800, 1, dtype=F64)
    bridge = KernelLangevinBridge(1, context_dim=1)
    bridge.fit(target, context=context, progress=False)
    assert bridge_report(bridge, target, context=context)["marginal distance"].verdict == "ok"
    shuffled = bridge_report(bridge, target[torch.randperm(800)], context=context)
    assert shuffled["marginal moments"].verdict == "ok" and shuffled["marginal distance"].verdict != "ok"


def test_a_latent_bridges_inner_one_is_looked_at():
    bridge = LatentBridge(LightSBBM(2, num_components=3, beta=5.0), PCACodec(2))
    with quiet():
        bridge.fit(bimodal(300), num_updates=20, progress=False)
    assert bridge_report(bridge)["inverse-map residual"].verdict == "ok"


def test_bad_input_is_refused():
    bridge = light(bimodal())
    with pytest.raises(RuntimeError, match="must be fitted first"):
        bridge_report(LightSB(2))
    with pytest.raises(TypeError, match="must be a Bridge, got Tensor"):
        bridge_report(torch.zeros(3))
    with pytest.raises(ValueError, match=r"target must have shape \(draws, 2\), got \(50, 3\)"):
        bridge_report(bridge, torch.zeros(50, 3))
    with pytest.raises(ValueError, match="num_draws must be at least 100, got 10"):
        bridge_report(bridge, num_draws=10)
    conditional = KernelLangevinBridge(2, context_dim=1)
    conditional.fit(bimodal(100), context=torch.randn(100, 1, dtype=F64), progress=False)
    with pytest.raises(ValueError, match="context must be given for a bridge with context_dim 1"):
        bridge_report(conditional, bimodal(100))
    with pytest.raises(ValueError, match="a row for each of 100 draws of the target, got 50"):
        bridge_report(conditional, bimodal(100), context=torch.zeros(50, 1))


def test_a_source_that_cannot_be_chosen_is_not_asked_for():
    sgm = SGM(2, hidden=(16,))
    with quiet():
        sgm.fit(bimodal(200), num_updates=10, progress=False)
    line = bridge_report(sgm, source=torch.randn(200, 2) + 3)["source residual"]
    assert line.verdict == "-" and "pass source" not in line.note and "LightSB or DSB" in line.note
