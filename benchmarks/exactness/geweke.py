r"""The joint distribution test of `BridgeMH`: every bridge as the proposal, fitted well and badly on purpose.

    python -m benchmarks.exactness.geweke

``--only NAME`` prints the cells of the bridges whose name begins so, without the stale paths, and keeps nothing;
``--chains`` sets their number.

Geweke's successive-conditional simulator alternates :math:`y \sim p(y | \theta)`, simulated from the model, with the
kernel's transitions of :math:`\theta` given y. If every transition leaves :math:`p(\theta | y)` invariant, the pairs
have the joint law :math:`p(\theta) p(y | \theta)`, whatever the kernel's proposals. Here many chains run side by side,
each with its own data, and each starts at an exact joint draw: the law must then hold from the first step, chains are
independent, and the mean of a test function over a chain's steps is one number a chain. Its mean over chains is
compared with that of fresh joint draws; the z-score's variance is that of these numbers, so each function is scaled by
its own effective size.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.lib.fits import quiet
from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import command
from pyro_sb.bridges import (
    DSB,
    SGM,
    VSDM,
    Bridge,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    LightSBBM,
    LightSBM,
    PairCodec,
    PCACodec,
    Sampler,
    SmoothedBridge,
    TailMatched,
)
from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.infer import AmortizedPosterior, BridgeMH, Posterior, Simulations
from pyro_sb.infer.amortized.refresh import PosteriorProposals
from pyro_sb.infer.mcmc.walk import ROLES, Walk
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import Transition
from pyro_sb.infer.moves.proposals import ProposalMove, Proposals

SIZE = 3  # observations of a chain
SD, LOG_SD = 1.5, 0.4
F64 = torch.float64
TYPICAL = torch.tensor([[1.0, 2.2, 0.7]], dtype=F64)  # what moves are tuned at


def model() -> None:
    r"""Two latents and three observations; the posterior is the same at a and -a, and has two modes for most data.

    .. math:: a \sim N(0, 1.5^2), \quad b \sim N(0, .4^2), \quad y_i \sim N(a^2 / 2, e^{2 b})
    """
    zero = torch.zeros((), dtype=F64)
    a, b = pyro.sample("a", dist.Normal(zero, SD)), pyro.sample("b", dist.Normal(zero, LOG_SD))
    with pyro.plate("rows", SIZE):
        pyro.sample("y", dist.Normal(a[..., None].square() / 2, b[..., None].exp()))


def log_prior(z: Tensor) -> Tensor:
    """Log density of latents ``(n, 2)``, columns a and b."""
    return dist.Normal(0.0, SD).log_prob(z[:, 0]) + dist.Normal(0.0, LOG_SD).log_prob(z[:, 1])


def log_likelihood(z: Tensor, y: Tensor) -> Tensor:
    """Of observations ``(n, SIZE)``, a row each."""
    return dist.Normal(z[:, :1].square() / 2, z[:, 1:].exp()).log_prob(y).sum(1)


def simulate(num: int) -> tuple[Tensor, Tensor]:
    """Exact joint draws: latents ``(num, 2)`` and observations ``(num, SIZE)``."""
    z = torch.tensor([SD, LOG_SD], dtype=F64) * torch.randn(num, 2, dtype=F64)
    return z, observe(z)


def observe(z: Tensor) -> Tensor:
    """Observations given latents."""
    return z[:, :1].square() / 2 + z[:, 1:].exp() * torch.randn(len(z), SIZE, dtype=F64)


def joint_at(y: Tensor) -> LogJoint:
    """The log joint of C chains, each with its own observations: rows have the chain as their fastest index."""
    return LogJoint.from_batched(lambda z: log_prior(z) + log_likelihood(z, y.repeat(len(z) // len(y), 1)), 2)


FUNCTIONS = (
    "a", "b", "a^2", "b^2", "ab", "a > 0", "|a| > 2", "b > .4", "y mean", "log(1 + y mean^2)", "b y mean", "a y mean",
    "log y var", "b log y var", "|a| y mean", "loglik",
)  # fmt: skip


def functions(z: Tensor, y: Tensor) -> Tensor:
    """The test functions at pairs. Shape ``(n, 16)``."""
    a, b, mean, spread = z[:, 0], z[:, 1], y.mean(1), y.var(1).log()
    plain = [a, b, a**2, b**2, a * b, (a > 0).to(F64), (a.abs() > 2).to(F64), (b > 0.4).to(F64)]
    mixed = [mean, (mean**2).log1p(), b * mean, a * mean, spread, b * spread, a.abs() * mean, log_likelihood(z, y)]
    return torch.stack(plain + mixed, 1)


class Score(NamedTuple):
    """z-scores of the test functions, ``(16,)``, and mean acceptance by the moves' roles."""

    z: Tensor
    acceptance: dict[str, float]


def successive(
    kernel: BridgeMH,
    num_chains: int,
    num_rounds: int,
    num_steps: int = 4,
    proposals: Callable[[Tensor], Proposals] | None = None,
) -> Score:
    """The test of a kernel that is warmed up.

    Args:
        kernel: From `warmed`.
        num_chains: Independent chains.
        num_rounds: How often the data are simulated; two transitions each.
        proposals: Of the present observations, where they depend on them.
    """
    z, y = simulate(num_chains)
    total, accepted, tried = torch.zeros(num_chains, len(FUNCTIONS), dtype=F64), {0: 0.0, 2: 0.0}, {0: 0, 2: 0}
    kernel.num_chains = num_chains
    move = kernel.frozen.moves["bridge"] if kernel.frozen is not None else None
    assert isinstance(move, ProposalMove)
    for _ in range(num_rounds):
        kernel.log_joint = joint_at(y)
        if proposals is not None:
            move.proposals = proposals(y)
        kernel.cleanup()  # the chains' own paths and densities were those of other data
        block = kernel.sample_block({"z": z}, num_steps)
        z = block.draws["z"][-1]
        y = observe(z)
        total += functions(z, y) / num_rounds
        for role, rate in zip(block.stats["move"][:, 0].tolist(), block.stats["acceptance_rate"].mean(1).tolist()):
            accepted[role] += rate
            tried[role] += 1
    exact = functions(*simulate(400_000))
    error = (total.var(0) / num_chains + exact.var(0) / len(exact)).sqrt()
    rates = {name: accepted[code] / max(1, tried[code]) for name, code in (("bridge", 0), ("local", 2)) if tried[code]}
    return Score((total.mean(0) - exact.mean(0)) / error, rates)


def warmed(bridge: Bridge | Posterior, local: str | None, **options: object) -> BridgeMH:
    """A kernel whose moves are frozen, on one set of observations."""
    kernel = BridgeMH(potential_fn=lambda sites: sites["z"].square().sum(), local=local, **options)
    kernel.num_chains = 4
    kernel.initial_params = {"z": torch.tensor([[-1.5, 0.1], [1.5, -0.1]], dtype=F64).repeat(2, 1)}
    kernel.setup(0)
    kernel.bridge, kernel.log_joint = bridge, joint_at(TYPICAL)
    with quiet():
        kernel._prepare()
    return kernel


# ---- the matrix ----

NUM_DRAWS = 4000


def good(z: Tensor) -> Tensor:
    """Draws of the prior, the mean of what the chains target over all data."""
    return z


def wide(z: Tensor) -> Tensor:
    """Far too wide."""
    return 2.5 * z


def narrow(z: Tensor) -> Tensor:
    """Far too narrow."""
    return 0.5 * z


def partly_missing(z: Tensor) -> Tensor:
    """One of the two modes thinned to a twentieth."""
    return z[(z[:, 0] < 0) | (torch.rand(len(z), dtype=F64) < 0.05)]


FITS: dict[str, Callable[[Tensor], Tensor]] = {
    "well": good, "untrained": good, "too wide": wide, "too narrow": narrow, "a mode thinned": partly_missing,
}  # fmt: skip
SOURCE = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), 2 * torch.eye(2, dtype=F64))


class Case(NamedTuple):
    """A bridge, its options of ``fit``, for a good fit and for one that is hardly begun, and the kernel's."""

    make: Callable[[], Bridge]
    options: dict[str, object]
    barely: dict[str, object]
    kernel: Mapping[str, object] = MappingProxyType({})


def light(kind: type[LightSB], **options: object) -> Callable[[], Bridge]:
    return lambda: kind(2, num_components=6, epsilon=1.0, covariance="full", **options)


def few_steps(kind: type[VSDM]) -> Callable[[], Bridge]:
    """A diffusion whose paths have six steps, so that many chains are quick."""

    def make() -> Bridge:
        bridge = kind(2, hidden=(64, 64))
        bridge.sampler = Sampler(path_steps=6)
        return bridge

    return make


def stretched() -> PairCodec:
    """A bijection whose determinant is another at each point, as PCA's is not."""
    return PairCodec(torch.asinh, torch.sinh, 2, 2, bijective=True, log_abs_det=lambda z: z.cosh().log().sum(-1))


def latent(make: Callable[[], Bridge], codec: Callable[[], Codec]) -> Callable[[], Bridge]:
    return lambda: LatentBridge(make(), codec())


def pca() -> PCACodec:
    return PCACodec(2)


LIGHT: dict[str, object] = {"num_updates": 400}
NET: dict[str, object] = {"num_updates": 400}
CASES: dict[str, Case] = {
    "LightSB": Case(light(LightSB), {"solver": "moments"}, {"num_updates": 1}),
    "LightSB, Gaussian source": Case(light(LightSB), LIGHT | {"source": SOURCE}, {"num_updates": 1, "source": SOURCE}),
    "LightSBM": Case(light(LightSBM), LIGHT, {"num_updates": 1}),
    "LightSBBM": Case(light(LightSBBM, beta=10.0), {"num_updates": 150}, {"num_updates": 1}),
    "VSDM": Case(few_steps(VSDM), NET, {"num_updates": 5}),
    "SGM": Case(few_steps(SGM), NET, {"num_updates": 5}),
    "DSB": Case(
        lambda: DSB(2, hidden=(64, 64)),
        {"num_updates": 150, "num_iterations": 2},
        {"num_updates": 5, "num_iterations": 1},
    ),
    "DSB, IPF": Case(
        lambda: DSB(2, hidden=(64, 64), method="ipf", num_steps=6),
        {"num_updates": 150, "num_iterations": 2, "num_pairs": 2000},
        {"num_updates": 5, "num_iterations": 1, "num_pairs": 500},
    ),
    "Smoothed": Case(lambda: SmoothedBridge(2, hidden=(64, 64), path_steps=6), NET, {"num_updates": 5}),
    "KernelLangevin, plain": Case(lambda: KernelLangevinBridge(2, scheme="plain", num_steps=5), {}, {}),
    "Latent, LightSB": Case(latent(light(LightSB), pca), {"solver": "moments"}, {"num_updates": 1}),
    "Latent, LightSB, sinh": Case(latent(light(LightSB), stretched), {"solver": "moments"}, {"num_updates": 1}),
    "Latent, VSDM": Case(latent(few_steps(VSDM), pca), NET, {"num_updates": 5}),
    "Latent, VSDM, sinh": Case(latent(few_steps(VSDM), stretched), NET, {"num_updates": 5}),
    "More: LightSB, 4 tries": Case(light(LightSB), {"solver": "moments"}, {"num_updates": 1}, {"num_proposals": 4}),
    "More: VSDM, 3 paths": Case(few_steps(VSDM), NET, {"num_updates": 5}, {"num_paths": 3}),
    "More: TailMatched": Case(lambda: TailMatched(light(LightSB)()), {"solver": "moments"}, {"num_updates": 1}),
}


def fitted(case: Case, fit: str) -> Bridge:
    """The bridge of a cell."""
    draws = FITS[fit](simulate(NUM_DRAWS)[0])
    bridge, barely = case.make(), fit == "untrained"
    if isinstance(bridge, KernelLangevinBridge):
        draws = draws[: 20 if barely else 500]
    with quiet():
        bridge.fit(draws, progress=False, **(case.barely if barely else case.options))
    if barely:
        inner = bridge.bridge if isinstance(bridge, LatentBridge) else bridge
        with torch.no_grad():
            for parameter in bridge.parameters():
                parameter += (0.3 if isinstance(inner, LightSB | LightSBBM) else 0.07) * torch.randn_like(parameter)
    return bridge


POSTERIORS = {"posterior, light": ("light", 400), "posterior, VSDM": ("vsdm", 400)}


def fitted_posterior(name: str, fit: str) -> AmortizedPosterior:
    """An amortised posterior whose simulations were spoilt as `FITS` says: the model corrects it all the same."""
    kind, num_steps = POSTERIORS[name]
    barely = fit == "untrained"
    z, y = simulate(100 if barely else NUM_DRAWS)
    if fit == "a mode thinned":
        rows = (z[:, 0] < 0) | (torch.rand(len(z), dtype=F64) < 0.05)
        pairs = Simulations(z[rows], y[rows])
    else:
        pairs = Simulations(FITS[fit](z), y)
    amortised = AmortizedPosterior(model, bridge=kind)
    with quiet():
        amortised.fit(simulations=pairs, num_copies=0, progress=False, num_updates=5 if barely else num_steps)
    return amortised


def posterior_at(amortised: AmortizedPosterior, y: Tensor) -> PosteriorProposals:
    """Proposals at the observations of all chains, by paths of six steps where it is a diffusion."""
    posterior = amortised.condition(y)
    if isinstance(posterior.bridge, VSDM):
        posterior.bridge.sampler = Sampler(path_steps=6)
    return PosteriorProposals(posterior.law, posterior.law.context)


def scores(name: str, fit: str, num_chains: int, locals_: tuple[str | None, ...] = (None, "hmc")) -> list[Score]:
    """The cells of one bridge and fit: without a local move, and with one."""
    torch.manual_seed(0)
    bridge = fitted_posterior(name, fit) if name in POSTERIORS else fitted(CASES[name], fit)
    found = []
    for local in locals_:
        options: dict[str, object] = {} if local is None else {"bridge_probability": 0.5}
        options |= CASES[name].kernel if name in CASES else {}
        if isinstance(bridge, AmortizedPosterior):
            kernel, each = warmed(bridge.condition(TYPICAL[0]), local, **options), partial(posterior_at, bridge)
            found.append(successive(kernel, num_chains, NUM_ROUNDS, NUM_STEPS, each))
        else:
            found.append(successive(warmed(bridge, local, **options), num_chains, NUM_ROUNDS, NUM_STEPS))
    return found


NUM_ROUNDS, NUM_STEPS = 4, 20
CHAINS, CHAINS_OF_PATHS = 1500, 500
NOTE = f"""{NUM_ROUNDS} simulations of the data, {NUM_STEPS} transitions after each; {CHAINS:,} chains, or
{CHAINS_OF_PATHS:,} where a draw is a walk or asks a network. "largest |z|": of {len(FUNCTIONS)} test functions; below 4
whatever the fit. "accepts": mean acceptance of the bridge's own move and of the local one, each tried with probability
one half. "stale path": the same kernel, but a state keeps its log density when the local move has moved it. That must
be found.

Fits: "well": to the prior, the mean of what the chains target over all data; a posterior to {NUM_DRAWS:,} pairs.
"untrained": one to five updates, then noise on every weight (the plain bridge: 20 draws; a posterior: 100 pairs, five
updates). "too wide", "too narrow": to latents times 2.5 and 0.5. "a mode thinned": to latents of which those with
a > 0 were thinned to a twentieth. "Latent": a `LatentBridge` of that bridge and `PCACodec(2)`, or, "sinh", a pair
x = sinh(z), whose determinant is another at each point. "More": several tries a step, several paths a proposal, and the
light bridge with the draws' own tails.
"""


def stale(kernel: BridgeMH) -> BridgeMH:
    """The kernel with its path refresh broken, to see that the test finds it."""
    kernel.walk_kind = StaleWalk
    return kernel


class StaleWalk(Walk):
    """A walk that keeps the old path after a local move."""

    def _step(self, role: str) -> Transition:
        path = self.log_q
        moved = super()._step(role)
        self.log_q = moved.log_q if role == "bridge" else path
        return moved


def main() -> None:
    asked = command(
        __doc__,
        only={"help": "bridges whose name begins so"},
        chains={"type": int, "help": f"default: {CHAINS}, or {CHAINS_OF_PATHS} of paths"},
    )
    only, begun, rows, worst = asked.only, time.process_time(), [], 0.0
    for name in [*CASES, *POSTERIORS]:
        if only is not None and not name.startswith(only):
            continue
        few = not (name.startswith("Light") or name == "posterior, light")
        num_chains = asked.chains or (CHAINS_OF_PATHS if few else CHAINS)
        for fit in FITS:
            for local, score in zip((None, "hmc"), scores(name, fit, num_chains)):
                largest = int(score.z.abs().argmax())
                worst = max(worst, float(score.z.abs().max()))
                accepts = [f"{score.acceptance[role]:.3f}" if role in score.acceptance else "-" for role in ROLES[::2]]
                rows.append([name, fit, local or "none", f"{score.z.abs().max():.2f}", FUNCTIONS[largest], *accepts])
                print(*rows[-1], sep="  ", flush=True)
    broken = []
    for name, fit in () if only else (("LightSB", "well"), ("LightSB", "too narrow"), ("VSDM", "too narrow")):
        torch.manual_seed(0)
        kernel = stale(warmed(fitted(CASES[name], fit), "hmc", bridge_probability=0.5))
        score = successive(kernel, asked.chains or CHAINS, NUM_ROUNDS, NUM_STEPS)
        broken.append([name, fit, f"{score.z.abs().max():.2f}", FUNCTIONS[int(score.z.abs().argmax())]])
    columns = ["bridge", "fit", "local", "largest |z|", "of", "bridge accepts", "local accepts"]
    parts = [
        header("Joint distribution test of BridgeMH", 0), NOTE, table(columns, rows), "",
        f"largest |z| of all {len(rows)} cells and {len(FUNCTIONS)} functions: {worst:.2f}; "
        f"{time.process_time() - begun:.0f} CPU seconds", "",
        "stale path", table(["bridge", "fit", "largest |z|", "of"], broken),
    ]  # fmt: skip
    write("geweke", "\n".join(parts), keep=only is None)


if __name__ == "__main__":
    main()
