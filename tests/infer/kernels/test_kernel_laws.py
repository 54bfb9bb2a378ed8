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
from pyro_sb.infer.mcmc.kernel import WalkingKernel

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
    (line,) = (line for line in report(mcmc, modes=False).lines if line.name == "divergences")
    assert line.verdict == "bad" and line.value.startswith(str(int(flagged.sum())))
    assert f"divergences: {int(flagged.sum())} (" in repr(mcmc)


@pytest.mark.parametrize("name", STILL)
def test_without_trajectories_there_is_no_step_to_set_and_nothing_diverges(name):
    kernel = KERNELS[name]()
    mcmc = run(kernel)
    with pytest.raises(AttributeError, match=r'step_size is that of trajectories.*Write local="hmc"'):
        set_step(kernel)
    assert not bool(mcmc.sample_stats["diverging"].any())
    (line,) = (line for line in report(mcmc, modes=False).lines if line.name == "divergences")
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
