"""The laws that every kernel of ours must pass, over one registry: a new kernel costs one line in `KERNELS`."""

import functools
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import KernelLangevinBridge, LightSB
from pyro_sb.diagnostics import report
from pyro_sb.infer import MCMC, AmortizedPosterior, BridgeMH, KernelLangevin
from pyro_sb.infer.mcmc import saved
from pyro_sb.infer.mcmc.walk import ROLES
from pyro_sb.infer.mcmc.walking import WalkingKernel
from pyro_sb.infer.moves.proposals import ProposalMove
from pyro_sb.stages import listening

Y = torch.tensor([0.9, 0.2, 0.7], dtype=torch.float64)
NUM_CHAINS, NUM_SAMPLES = 8, 20


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def model(y=None):
    """A mean and its observations."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    with pyro.plate("rows", 3):
        return pyro.sample("y", dist.Normal(mu[..., None], 0.5), obs=y)


@functools.cache
def amortized() -> AmortizedPosterior:
    """Fitted once."""
    fitted = AmortizedPosterior(model, bridge="light")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted.fit(num_simulations=300, num_copies=0, num_updates=60, progress=False)
    return fitted


def refreshed(y: torch.Tensor) -> WalkingKernel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return amortized().condition(y).mcmc(4, num_chains=4, num_proposals=64).kernel


def marginal() -> LightSB:
    bridge = LightSB(1, num_components=1)
    bridge.fit(0.5 + 0.4 * torch.randn(200, 1), solver="moments", progress=False)
    return bridge


def sourced() -> LightSB:
    bridge = LightSB(1, num_components=1)
    source = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    bridge.fit(0.5 + 0.4 * torch.randn(200, 1), source, solver="moments", progress=False)
    return bridge


def path() -> KernelLangevinBridge:
    bridge = KernelLangevinBridge(1, scheme="plain", num_steps=3)
    bridge.fit(0.5 + 0.4 * torch.randn(60, 1), progress=False)
    return bridge


def bridge_mh(make: Callable, **options: object) -> Callable[[], WalkingKernel]:
    return lambda: BridgeMH(model, make(), num_particles=100, **options)


KERNELS: dict[str, Callable[[], WalkingKernel]] = {
    "KernelLangevin, hmc": lambda: KernelLangevin(model, num_particles=100),
    "KernelLangevin, mala": lambda: KernelLangevin(model, num_particles=100, local="mala"),
    "KernelLangevin, no local": lambda: KernelLangevin(model, num_particles=100, local=None),
    "BridgeMH, marginal": bridge_mh(marginal),
    "BridgeMH, paths": bridge_mh(path),
    "BridgeMH, shared sources": bridge_mh(sourced),
    "BridgeMH, no local": bridge_mh(marginal, local=None),
    "BridgeMH, fitted in warm-up": bridge_mh(lambda: None),
    "BridgeMH, a posterior": lambda: BridgeMH(bridge=amortized().condition(Y), num_particles=100),
    "BridgeRefresh, one observation": lambda: refreshed(Y),
    "BridgeRefresh, many": lambda: refreshed(torch.stack([Y, Y + 1, Y - 2])),
}
STILL = [name for name in KERNELS if name.endswith("no local")]
WITH_TRAJECTORIES = [name for name in KERNELS if name not in STILL]


def run(kernel: WalkingKernel, **options: object) -> MCMC:
    defaults = {"warmup_steps": 5, "num_chains": NUM_CHAINS, "disable_progbar": True}
    mcmc = MCMC(kernel, NUM_SAMPLES, **(defaults | options))
    mcmc.run(*([Y] if kernel.model is model else []))
    return mcmc


def set_step(kernel: WalkingKernel, *_: object) -> None:
    kernel.step_size = torch.full_like(kernel.step_size, 1e4)


@pytest.mark.parametrize("name", WITH_TRAJECTORIES)
def test_trajectories_that_diverge_are_flagged_and_the_report_says_so(name):
    kernel = KERNELS[name]()
    if isinstance(kernel, KernelLangevin):
        kernel.options["probabilities"] = {"bridge": 0.2, "index": 0.2, "local": 0.6}
    if isinstance(kernel, BridgeMH):
        kernel.bridge_probability = 0.4
    mcmc = run(kernel, hook_fn=set_step)
    flagged = mcmc.sample_stats["diverging"]
    assert flagged.shape == (NUM_CHAINS, NUM_SAMPLES) and int(flagged.sum()) > 0
    if "move" in mcmc.sample_stats and isinstance(kernel, KernelLangevin | BridgeMH):
        assert torch.equal(flagged, mcmc.sample_stats["move"] == 2)  # at that step each trajectory diverges
    else:
        assert bool(flagged.all())
    listed = mcmc.diagnostics()["divergences"]
    assert listed == {f"chain {i}": row.nonzero().flatten().tolist() for i, row in enumerate(flagged)}
    (line,) = (line for line in report(mcmc, audit=None).lines if line.name == "divergences")
    assert line.verdict == "bad" and line.value.startswith(str(int(flagged.sum())))
    assert f"divergences: {int(flagged.sum())} (" in repr(mcmc)


@pytest.mark.parametrize("name", STILL)
def test_without_trajectories_there_is_no_step_to_set_and_nothing_diverges(name):
    kernel = KERNELS[name]()
    mcmc = run(kernel)
    with pytest.raises(AttributeError, match=r'step_size is that of trajectories.*Write local="hmc"'):
        set_step(kernel)
    assert not bool(mcmc.sample_stats["diverging"].any())
    (line,) = (line for line in report(mcmc, audit=None).lines if line.name == "divergences")
    assert line.verdict == "ok"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_keeps_the_contract(name):
    kernel = KERNELS[name]()
    assert isinstance(kernel, WalkingKernel) and 1 <= len(repr(kernel).splitlines()) <= 10
    before = MCMC(kernel, NUM_SAMPLES, num_chains=NUM_CHAINS)
    assert "not run" in repr(before) and type(kernel).__name__ in repr(before)
    mcmc = run(kernel)
    frozen = kernel.frozen
    assert frozen is not None and {"acceptance_rate", "diverging", "energy", "lp", "move", "step_size"} <= set(
        mcmc.sample_stats
    )
    assert all(value.shape == (NUM_CHAINS, NUM_SAMPLES) for value in mcmc.sample_stats.values())
    kept = kernel.diagnostics()  # of the run that ended, after cleanup
    assert all(len(kept[f"acceptance {role}"]) == NUM_CHAINS for role in frozen.moves)
    assert sum(frozen.probabilities.values()) == pytest.approx(1)
    assert 1 <= len(repr(mcmc).splitlines()) <= 10 and "mu" in repr(mcmc) and "not run" not in repr(mcmc)
    assert mcmc._repr_html_().count("<tr>") == 1 + mcmc.get_samples()["mu"][0].numel()
    assert 1 <= len(repr(kernel).splitlines()) <= 10


@pytest.mark.parametrize("name", KERNELS)
def test_a_state_keeps_the_log_density_of_its_own_path_until_another_move(name, monkeypatch):
    kernel, accept, accepted, ends = KERNELS[name](), ProposalMove.accept, [], set()
    if isinstance(kernel, BridgeMH) and kernel.local is not None:
        kernel.bridge_probability = 0.6

    def spied(move, x, log_density, log_q, ahead):
        moved = accept(move, x, log_density, log_q, ahead)
        accepted.append((x, log_q, ahead, moved))
        return moved

    monkeypatch.setattr(ProposalMove, "accept", spied)
    kernel.num_chains = NUM_CHAINS
    kernel.setup(0, *([Y] if kernel.model is model else []))
    params = kernel.initial_params
    kernel._prepare()
    accepted.clear()
    for _ in range(25):
        block = kernel.sample_block(params, 1)
        params = {site: value[-1] for site, value in block.draws.items()}
        walk, last = kernel.walk, (ROLES[int(block.stats["move"][0, 0])], *kernel.frozen.then)[-1]
        if not isinstance(kernel.frozen.moves[last], ProposalMove):
            ends.add("another move")
            assert walk.log_q is None
            continue
        ends.add("bridge")
        x, log_q, ahead, moved = accepted[-1]
        taken = (moved.x != x).any(-1).nonzero().flatten().tolist()
        for chain in taken:
            (own,) = (ahead.x[:, chain] == walk.x[chain]).all(-1).nonzero().flatten().tolist()
            assert float(walk.log_q[chain]) == float(ahead.log_q[own, chain])
        stayed = [chain for chain in range(len(x)) if chain not in taken]
        assert log_q is None or torch.equal(walk.log_q[stayed], log_q[stayed])
    proposing = isinstance(kernel.frozen.moves.get("bridge"), ProposalMove)
    assert bool(accepted) == proposing and ends == (
        {"bridge"}
        if proposing and name in STILL
        else {"bridge", "another move"}
        if isinstance(kernel, BridgeMH)
        else {"another move"}
    )
    if kernel.frozen.then:  # each refresh follows a trajectory: the state's path is drawn again
        assert all(log_q is None for _, log_q, _, _ in accepted)


def like(kernel: WalkingKernel) -> object:
    """What a run of this kernel is loaded into, in a process that has its model and its bridge."""
    if isinstance(kernel, KernelLangevin) or (isinstance(kernel, BridgeMH) and kernel.bridge is None):
        return kernel.model
    if isinstance(kernel, BridgeMH):
        own = kernel.model if isinstance(kernel.bridge, LightSB | KernelLangevinBridge) else None
        return BridgeMH(own, kernel.bridge, num_particles=100, local=kernel.local)
    return amortized().condition(Y if kernel.starts.shape[1] == 1 else torch.stack([Y, Y + 1, Y - 2]))


def same_draws(a: MCMC, b: MCMC) -> None:
    torch.testing.assert_close(a.get_samples(), b.get_samples(), rtol=0, atol=0)
    torch.testing.assert_close(a.sample_stats, b.sample_stats, rtol=0, atol=0)
    assert a.evaluations == b.evaluations


@pytest.mark.parametrize("name", KERNELS)
def test_a_run_from_a_file_goes_on_bit_for_bit_as_the_run_itself(name, tmp_path):
    mcmc = run(KERNELS[name]())
    mcmc.save(tmp_path / "run.pt")
    there = MCMC.load(tmp_path / "run.pt", like(mcmc.kernel))
    same_draws(there, mcmc)
    assert there.diagnostics().keys() == mcmc.diagnostics().keys()
    for one in (mcmc, there):
        pyro.set_rng_seed(3)
        one.extend(30)
    same_draws(there, mcmc)
    assert there.num_samples == NUM_SAMPLES + 30


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("BridgeRefresh")])
def test_a_run_that_was_killed_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SHARE", 1e9)  # written after every block
    pyro.set_rng_seed(1)
    whole, first = (KERNELS[name]() for _ in range(2))
    second = like(first)
    second = KernelLangevin(model, num_particles=100, local=first.local) if second is model else second
    if isinstance(first, BridgeMH):
        second = BridgeMH(first.model, first.bridge, num_particles=100, local=first.local)
        whole = BridgeMH(first.model, first.bridge, num_particles=100, local=first.local)
    pyro.set_rng_seed(2)
    expected = run(whole)
    real, calls = first.sample_block, []

    def sample_block(params, num):
        calls.append(num)
        if len(calls) == 3:
            raise SystemExit
        return real(params, num)

    first.sample_block = sample_block
    pyro.set_rng_seed(2)
    with pytest.raises(SystemExit):
        run(first, checkpoint=tmp_path / "run.pt")
    pyro.set_rng_seed(4)
    same_draws(run(second, checkpoint=tmp_path / "run.pt"), expected)


def test_a_run_of_another_posterior_is_refused(tmp_path):
    mcmc = amortized().condition(Y).mcmc(4, num_chains=4, num_proposals=64)
    mcmc.save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"the posterior is [0-9a-f]{16} there and [0-9a-f]{16} here"):
        MCMC.load(tmp_path / "run.pt", amortized().condition(Y + 1))
    with pytest.raises(ValueError, match=r"MCMC.load\(path, amortized.condition\(y\)\)"):
        MCMC.load(tmp_path / "run.pt", model)


def test_a_bridge_that_was_fitted_in_an_interrupted_warm_up_is_not_fitted_again():
    kernel, fits = BridgeMH(model, num_particles=100), []

    def begin(stage):
        fits.append(stage)
        if fits.count("moves") == 1 and stage == "moves":
            raise KeyboardInterrupt

    with listening(begin):
        with pytest.raises(KeyboardInterrupt, match="goes on from it"):
            run(kernel)
        bridge = kernel.proposals.bridge
        run(kernel)
    assert fits.count("bridge") == fits.count("search") == 1 and kernel.proposals.bridge is bridge


@pytest.mark.parametrize("name", KERNELS)
def test_exact_starts_stay_exact(name):
    # 4,000 chains from the posterior itself, three steps: mean and variance stay, whatever the tuning
    kernel = KERNELS[name]()
    num, precision = 4000, 0.25 + 3 / 0.25
    y = kernel.joint.rows.observations if name.endswith("many") else Y[None]
    mean = y.sum(1) / 0.25 / precision
    starts = mean + torch.randn(num, len(y)) / precision**0.5
    start = {"mu": starts if name.endswith("many") else starts[:, 0]}
    draws = run(kernel, initial_params=start, num_chains=num, warmup_steps=0)
    last = draws.get_samples(group_by_chain=True)["mu"][:, 2].reshape(num, -1)
    white = (last - mean) * precision**0.5
    for values in (white, white.square() - 1):
        assert (values.mean(0) / values.std(0) * num**0.5).abs().max() < 4.5
    assert (last != starts).double().mean() > 0.2
