"""Paths redrawn backwards, proposals, the accept step: normalised both ways and reversible, before any chain runs."""

import math
from functools import cache

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_sb.bridges import DSB, SGM, VSDM, KernelLangevinBridge, LightSB, LightSBBM, LightSBM, Sampler, TailMatched
from pyro_sb.bridges.codecs.pair import PairCodec
from pyro_sb.bridges.codecs.pca import PCACodec
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.proposals import HeldSources, MappedLaw
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.proposals import BridgeProposals, ProposalMove, choose

F64 = torch.float64
SOURCE = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))


def small(kind, **options):
    bridge = kind(2, hidden=(16, 16), **options)
    bridge.sampler = Sampler(path_steps=5)
    return bridge


def asinh():
    """A bijection x = asinh(z), whose determinant is another at each point."""
    return PairCodec(
        torch.sinh, torch.asinh, 2, 2, bijective=True, log_abs_det=lambda z: -0.5 * z.square().log1p().sum(-1)
    )


BRIDGES = {
    "LightSB": (lambda **kw: LightSB(2, num_components=3, covariance="full", **kw), {"num_updates": 30}),
    "LightSB, source": (
        lambda **kw: LightSB(2, num_components=3, covariance="full", **kw),
        {"num_updates": 30, "source": SOURCE},
    ),
    "LightSBM": (lambda **kw: LightSBM(2, num_components=3, **kw), {"num_updates": 30}),
    "LightSBBM": (lambda **kw: LightSBBM(2, num_components=3, beta=5.0, **kw), {"num_updates": 20}),
    "LightSBBM, source": (
        lambda **kw: LightSBBM(2, num_components=3, beta=5.0, **kw),
        {"num_updates": 20, "source": SOURCE},
    ),
    "tails around a source": (
        lambda: TailMatched(LightSB(2, num_components=3), df=20.0),
        {"num_updates": 30, "source": SOURCE},
    ),
    "latent, source": (
        lambda: LatentBridge(LightSB(2, num_components=3), PCACodec(2)),
        {"num_updates": 30, "source": SOURCE},
    ),
    "latent, VSDM": (lambda: LatentBridge(small(VSDM), PCACodec(2)), {"num_updates": 100}),
    "latent, asinh": (lambda: LatentBridge(LightSB(2, num_components=3), asinh()), {"num_updates": 30}),
    "latent, VSDM, asinh": (lambda: LatentBridge(small(VSDM), asinh()), {"num_updates": 100}),
    "VSDM": (lambda **kw: small(VSDM, **kw), {"num_updates": 100}),
    "SGM": (lambda **kw: small(SGM, **kw), {"num_updates": 100}),
    "DSB": (
        lambda **kw: DSB(2, hidden=(16, 16), num_steps=20, schedule="constant", **kw),
        {"num_updates": 50, "num_iterations": 2},
    ),
    "plain": (lambda **kw: KernelLangevinBridge(2, scheme="plain", num_steps=3, **kw), {}),
    "plain, variable": (
        lambda **kw: KernelLangevinBridge(2, scheme="plain", num_steps=3, bandwidth_exponent=-0.3, **kw),
        {},
    ),
    "plain, source": (lambda **kw: KernelLangevinBridge(2, scheme="plain", num_steps=3, **kw), {"source": SOURCE}),
}
CONDITIONAL = [name for name in BRIDGES if not name.startswith(("tails", "latent"))]


@cache
def fitted(name, context_dim=0):
    """A bridge on draws of N(0, I), or of N((y, -y), I) given y; fitted once, at a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bridge = fit(*BRIDGES[name], context_dim)
        noise = {"VSDM": 0.03, "SGM": 0.03, "DSB": 0.1}.get(name, 0.0)  # a good fit would hide a wrong path
        with torch.no_grad():
            for parameter in bridge.parameters():
                parameter += noise * torch.randn_like(parameter)
        return bridge


def fit(make, options, context_dim):
    draws = torch.randn(400, 2, dtype=F64)
    if not context_dim:
        bridge = make()
        bridge.fit(draws, progress=False, **options)
        return bridge
    bridge, context = make(context_dim=1), torch.randn(400, 1, dtype=F64)
    bridge.fit(draws + context * torch.tensor([1.0, -1.0], dtype=F64), context=context, progress=False, **options)
    return bridge


def law(scale, mean=0.0):
    return Independent(Normal(torch.full((2,), mean, dtype=F64), scale), 1)


def z_of_mean_one(log_ratio):
    """z-score of E[exp(log_ratio)] = 1, with a share of the draws that makes it a test."""
    ratio = log_ratio.exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.1
    return abs(float(ratio.mean()) - 1) / error


@pytest.mark.parametrize("name", BRIDGES)
def test_paths_are_normalised_both_ways(name):
    proposals = BridgeProposals(fitted(name))
    target = law(0.6)  # narrow: the draws cover it
    value, log_q = proposals.draws(2500)
    assert z_of_mean_one(target.log_prob(value) - log_q) < 4
    target = law(1.8)  # wide: it covers the draws
    x = target.sample((2500,))
    assert z_of_mean_one(proposals.redraw(x) - target.log_prob(x)) < 4


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_paths_are_normalised_both_ways(name):
    y = torch.tensor([0.7], dtype=F64)
    proposals = BridgeProposals(fitted(name, context_dim=1), y)
    target = MultivariateNormal(torch.tensor([0.7, -0.7], dtype=F64), 0.36 * torch.eye(2, dtype=F64))
    value, log_q = proposals.draws(2500)
    assert z_of_mean_one(target.log_prob(value) - log_q) < 4
    target = MultivariateNormal(torch.tensor([0.7, -0.7], dtype=F64), 4.0 * torch.eye(2, dtype=F64))
    x = target.sample((2500,))
    assert z_of_mean_one(proposals.redraw(x) - target.log_prob(x)) < 4


@pytest.mark.parametrize("name", ["VSDM", "DSB"])
def test_more_paths_stay_normalised_and_vary_less(name):
    bridge = fitted(name)
    narrow, wide = law(0.6), law(1.8)
    x, spreads = wide.sample((2500,)), []
    for num_paths in (1, 4):
        proposals = BridgeProposals(bridge, num_paths=num_paths)
        value, log_q = proposals.draws(2500)
        assert z_of_mean_one(narrow.log_prob(value) - log_q) < 4
        again = torch.stack([proposals.redraw(x) for _ in range(2)])
        assert z_of_mean_one(again[0] - wide.log_prob(x)) < 4
        spreads.append(float((again[0] - again[1]).std()))
    assert 0 < spreads[1] < 0.7 * spreads[0]


def test_a_marginal_density_has_nothing_to_redraw():
    bridge = fitted("LightSB")
    proposals = BridgeProposals(bridge, num_paths=5)
    value, log_q = proposals.draws(100)
    assert torch.equal(proposals.redraw(value), log_q)
    torch.testing.assert_close(log_q, bridge().log_prob(value))


@pytest.mark.parametrize("name", ["LightSB, source", "LightSBBM, source", "tails around a source", "latent, source"])
def test_held_source_points_give_a_density_that_integrates_to_one(name):
    proposals = BridgeProposals(fitted(name))
    assert isinstance(proposals.law, HeldSources | MappedLaw)
    axis = torch.linspace(-12, 12, 121, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    assert abs(float(proposals.redraw(grid).exp().sum()) * 0.2**2 - 1) < 1e-3
    value, log_q = proposals.draws(50)
    torch.testing.assert_close(proposals.redraw(value), log_q)
    proposals.renew()
    assert not torch.allclose(proposals.redraw(value), log_q)


def test_source_draws_alone_and_schemes_without_density_are_refused():
    light = LightSB(2, num_components=3)
    light.fit(torch.randn(100, 2), torch.randn(100, 2), num_updates=2, progress=False)
    split = KernelLangevinBridge(2, scheme="split-step")
    split.fit(torch.randn(100, 2), progress=False)
    for bridge in (light, split):
        with pytest.raises(NotImplementedError, match="no density"):
            bridge.redraw_rows(torch.zeros(1, 2), None)


# ---- the accept step ----


@pytest.mark.parametrize("num", [1, 2, 5])
def test_choice_among_tries_is_reversible(num):
    # the flow from x to its try J, with the other tries, is w(x) q(x) q(x_1) ... q(x_N) times what is below
    weight, tries = 2 * torch.randn(20_000, dtype=F64), 2 * torch.randn(num, 20_000, dtype=F64)
    index, log_ratio = choose(weight, tries)
    chosen = tries.gather(0, index[None])[0]
    flow = weight + chosen - tries.logsumexp(0) + log_ratio.clamp_max(0)
    swapped = tries.scatter(0, index[None], weight[None])
    again, log_back = choose(chosen, swapped)
    back = weight + chosen - swapped.logsumexp(0) + log_back.clamp_max(0)
    same = again == index
    assert int(same.sum()) > 1000
    torch.testing.assert_close(flow[same], back[same], rtol=1e-12, atol=1e-12)
    resampling = weight + chosen - torch.logaddexp(tries.logsumexp(0), weight)  # i-SIR moves there less often
    assert bool((flow >= resampling - 1e-12).all())


def test_tries_are_chosen_by_weight():
    index, _ = choose(torch.zeros(40_000), torch.tensor([[0.1], [0.6], [0.3], [0.0]]).log().expand(4, 40_000))
    share = torch.bincount(index, minlength=4) / 40_000
    error = (torch.tensor([0.1, 0.6, 0.3]) * torch.tensor([0.9, 0.4, 0.7]) / 40_000).sqrt()
    assert bool(((share[:3] - torch.tensor([0.1, 0.6, 0.3])).abs() < 4 * error).all()) and int(share[3]) == 0


def test_impossible_tries_are_never_taken():
    bad = torch.tensor([[-math.inf, math.nan, -math.inf], [-math.inf, -math.inf, 0.0]])
    index, log_ratio = choose(torch.zeros(3), bad)
    probability = log_ratio.clamp_max(0).exp().nan_to_num(0.0)
    assert probability[:2].tolist() == [0.0, 0.0] and int(index[2]) == 1 and float(probability[2]) == 1.0
    _, stuck = choose(torch.tensor([math.inf]), torch.zeros(2, 1))  # a state that the bridge cannot reach stays
    assert float(stuck.exp()) == 0.0


@pytest.mark.parametrize("num_proposals", [1, 4])
@pytest.mark.parametrize("name", ["LightSB", "LightSB, source", "VSDM", "plain"])
def test_exact_starts_stay_exact_and_moves_are_reversible(name, num_proposals):
    target = law(0.8, mean=0.6)  # the bridge is at 0 with sd 1
    joint = LogJoint.from_batched(target.log_prob, 2)
    move = ProposalMove(BridgeProposals(fitted(name)), num_proposals)
    start = target.sample((6000,))
    moved = move.step(joint, start, target.log_prob(start))
    assert 0.2 < float(moved.accept_prob.mean()) < 0.95
    torch.testing.assert_close(moved.log_density, target.log_prob(moved.x))
    white = (moved.x - 0.6) / 0.8
    for value in (white, white.square() - 1, start.square() * moved.x - start * moved.x.square()):
        assert (value.mean(0) / value.std(0) * math.sqrt(len(value))).abs().max() < 4


def test_proposals_of_many_steps_are_scored_in_few_calls_chains_fastest():
    calls = []

    def log_prob(z):
        calls.append(len(z))
        return -0.5 * z.square().sum(-1)

    ahead = ProposalMove(BridgeProposals(fitted("LightSB")), 3).ahead(LogJoint.from_batched(log_prob, 2), 40, 100)
    assert len(ahead) == 40 and ahead[0].x.shape == (3, 100, 2) and ahead[0].log_q.shape == (3, 100)
    calls = [rows for rows in calls if rows > 1]  # one row tells what a run of the model costs
    assert sum(calls) == 40 * 3 * 100 and len(calls) == 6 and all(rows % 100 == 0 for rows in calls)
