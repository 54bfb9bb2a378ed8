"""Which bridge as a proposal: every bridge in BridgeMH on eleven targets, beside KernelLangevin and Pyro's NUTS.

Bridges come unfitted, so that warm-up finds the population, fits the bridge and freezes it, all of it counted. Run as

    python -m benchmarks.bridge_kernels [--targets NAME ...] [--kernels NAME ...] [--seeds 1] [--limit 60] [--report]

Finished cells are kept in the cache, and a second call goes on from it; `--report` only prints what is there.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.peers import CountingNUTS, OutOfTimeError, Recorder, columns, init_uniform
from benchmarks.report import header, table, write
from benchmarks.score import score
from benchmarks.store import Store
from benchmarks.targets import FLOAT, Modes, banana, two_modes
from pyro_sb.bridges import (
    DSB,
    VSDM,
    Bridge,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    LightSBBM,
    LightSBM,
    PCACodec,
)
from pyro_sb.datasets import PosteriorTask, posterior_task
from pyro_sb.infer import MCMC, BridgeMH, KernelLangevin

CHAINS, DRAWS, NUTS_WARMUP, NUTS_DRAWS = 128, 500, 300, 500
SEEDS, MAX_RHAT, MAX_Z = 1, 1.01, 4.0
REFERENCE = 1e-4  # squared error of a mean of posteriordb's 10,000 reference draws, in their sds
NUTS, KERNEL = "Pyro NUTS", "KernelLangevin"


def funnel(dim: int = 10, scale: float = 3.0) -> PosteriorTask:
    """Neal's funnel: v ~ N(0, 3^2), the other coordinates N(0, e^v); judged by v and by one of them."""

    def model(zero: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(zero, scale))
        pyro.sample("x", dist.Normal(zero.new_zeros(dim - 1), (0.5 * v)[..., None].exp()).to_event(1))

    zero = torch.zeros((), dtype=FLOAT)
    mean, sd = torch.zeros(2, dtype=FLOAT), torch.tensor([scale, math.exp(0.25 * scale**2)], dtype=FLOAT)
    return PosteriorTask(f"funnel {dim}", model, (zero,), ("v", "x[1]"), mean, sd, mean, mean.new_zeros(0, 2))


@dataclass(frozen=True, eq=False)
class Target:
    """A task, and its modes where they are known."""

    name: str
    make: Callable[[], PosteriorTask | Modes]

    def task(self) -> PosteriorTask:
        made = self.make()
        return made.task if isinstance(made, Modes) else made

    def ess(self, draws: np.ndarray) -> float:
        """Smallest bulk ESS of the quantities and of a mode's indicator; NaN if a mode was never seen or never left."""
        bulk = min(float(az.ess(draws[..., j], method="bulk")) for j in range(draws.shape[-1]))
        made = self.make()
        if not isinstance(made, Modes):
            return bulk
        first = (made.labels(draws) == 0).astype(float)
        return math.nan if first.min() == first.max() else min(bulk, float(az.ess(first, method="mean")))


POSTERIORDB = (
    "low_dim_gauss_mix",
    "low_dim_gauss_mix_unordered",
    "arK",
    "logearn_interaction",
    "kidscore_interaction",
)
TARGETS = [
    *(Target(f"two modes, d {dim}", lambda dim=dim: two_modes(dim)) for dim in (2, 10, 20)),
    Target("banana", banana),
    Target("eight schools", lambda: posterior_task("eight_schools_centered")),
    Target("funnel 10", funnel),
    *(Target(name, lambda name=name: posterior_task(name)) for name in POSTERIORDB),
]


@dataclass(frozen=True)
class Proposal:
    """A bridge for `BridgeMH` to fit, and the options of that fit."""

    name: str
    make: Callable[[int], Bridge] | None
    options: dict[str, Any] = field(default_factory=dict)


PROPOSALS = [
    Proposal("LightSB, full", None),
    Proposal("LightSB", LightSB),
    Proposal("LightSBM", LightSBM),
    Proposal("LightSBBM", LightSBBM),
    Proposal("VSDM", VSDM, {"num_updates": 1000, "batch_size": 256}),
    Proposal("DSB", DSB, {"num_iterations": 2, "num_updates": 500, "batch_size": 256}),
    Proposal("LatentBridge", lambda dim: LatentBridge(LightSB(dim, num_components=20), PCACodec(dim))),
    Proposal("KernelLangevinBridge", lambda dim: KernelLangevinBridge(dim, scheme="plain")),
]
KERNELS = [NUTS, KERNEL, *(one.name for one in PROPOSALS)]


class Timed:
    """Notes the processor's time when the warm-up of a batched kernel is over."""

    warm = math.nan
    steps = 0

    def sample_block(self, params: dict[str, Tensor], num_steps: int) -> Any:
        if self.steps >= self.default_warmup_steps and math.isnan(self.warm):  # type: ignore[attr-defined]
            self.warm = time.process_time()
        self.steps += num_steps
        return super().sample_block(params, num_steps)  # type: ignore[misc]


class TimedBridgeMH(Timed, BridgeMH):
    """BridgeMH with its warm-up timed."""


class TimedKernelLangevin(Timed, KernelLangevin):
    """KernelLangevin with its warm-up timed."""


def ours(target: Target, name: str, seed: int) -> dict[str, Any]:
    """A kernel of the package, with its defaults."""
    task = target.task()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    kernel: Any = TimedKernelLangevin(task.model)
    for one in PROPOSALS:
        if one.name == name:
            kernel = TimedBridgeMH(task.model, one.make, fit_options=one.options)
    mcmc = MCMC(kernel, DRAWS, num_chains=CHAINS, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(*task.args)
    seconds = time.process_time() - began
    draws = task.columns(mcmc.get_samples(group_by_chain=True)).numpy()
    evaluations = mcmc.evaluations.density + mcmc.evaluations.gradient
    rates = list(mcmc.diagnostics()["acceptance bridge"].values())
    row = figures(target, task, name, draws, seconds, evaluations)
    return row | {
        "warm": kernel.warm - began,
        "acceptance": float(np.mean(rates)),
        "probability": kernel.frozen.probabilities["bridge"],
        "noncentred": kernel.coordinates is not None,
        "warnings": [str(one.message) for one in caught],
    }


def nuts(target: Target, seed: int, limit: float) -> dict[str, Any]:
    """One chain of Pyro's NUTS, no JIT, Pyro's defaults; ended at a wall limit."""
    task = target.task()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    kernel = CountingNUTS(task.model, init_strategy=init_uniform(FLOAT), max_plate_nesting=1)
    began, recorder, note = time.process_time(), Recorder(limit), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = pyro.infer.MCMC(kernel, NUTS_DRAWS, warmup_steps=NUTS_WARMUP, hook_fn=recorder, disable_progbar=True)
            run.run(*task.args)
        except OutOfTimeError:
            note = f"cut at {limit:.0f} s: {len(recorder.draws)} draws"
    seconds = time.process_time() - began
    made = columns(task, recorder.samples()) if recorder.draws else np.empty((1, 0, len(task.parameters)))
    row = figures(target, task, NUTS, made, seconds, kernel.evaluations)
    return row | {"warm": recorder.warm - began if recorder.draws else math.nan, "note": note}


def figures(
    target: Target, task: PosteriorTask, name: str, draws: np.ndarray, seconds: float, evaluations: int
) -> dict[str, Any]:
    row = score(task, name, draws, seconds, evaluations)
    ess = target.ess(draws[:, draws.shape[1] % 2 :]) if draws.shape[1] >= 20 else math.nan
    return {"seconds": seconds, "evaluations": evaluations, "ess": ess, "rhat": row.rhat, "error": row.error}


def key(target: Target, kernel: str, seed: int) -> str:
    return f"{target.name}, {kernel}, {seed}"


def measure(target: Target, kernel: str, seed: int, limit: float) -> dict[str, Any]:
    return nuts(target, seed, limit) if kernel == NUTS else ours(target, kernel, seed)


def cells(row: dict[str, Any]) -> list[object]:
    """A row of a target's table."""
    ess, error = row["ess"], row["error"]
    words = [row.get("note", "")] + (["non-centred"] if row.get("noncentred") else [])
    words += [word for start, word in NOTED.items() if any(start in said for said in row.get("warnings", []))]
    return [
        float(row["seconds"]),
        float(row["warm"]),
        row["evaluations"],
        float(ess),
        float(ess) / row["seconds"],
        1000 * float(ess) / row["evaluations"],
        f"{row['acceptance']:.3f}" if "acceptance" in row else "",
        f"{row['probability']:.2f}" if "probability" in row else "",
        f"{row['rhat']:.4f}",
        f"{error:.3f}",
        verdict(row),
        "; ".join(word for word in words if word),
    ]


def verdict(row: dict[str, Any]) -> str:
    """What is wrong with a run, if anything."""
    if row["ess"] != row["ess"]:
        return "NO DRAWS" if row["rhat"] != row["rhat"] else "MODE LOST"
    if row["error"] >= MAX_Z * math.sqrt(1 / row["ess"] + REFERENCE):
        return "WRONG"
    return "" if row["rhat"] < MAX_RHAT else "run longer"


NOTED = {"own move accepts": "warned of acceptance", "not converged": "warned of the fit"}
COLUMNS = ["CPU s", "warm-up s", "evaluations", "ESS", "ESS/s", "ESS/1000", "acc.", "prob."]
COLUMNS += ["R-hat", "error", "", "note"]


def section(store: Store, target: Target, seed: int) -> str:
    rows = [
        [kernel, *cells(store.rows[key(target, kernel, seed)])]
        for kernel in KERNELS
        if key(target, kernel, seed) in store.rows
    ]
    return f"## {target.name}, seed {seed}\n\n{table(['', *COLUMNS], rows)}\n" if rows else ""


def overview(store: Store, what: Callable[[dict[str, Any]], str], title: str) -> str:
    """Kernels along, targets down, of the first seed."""
    lines = [
        [target.name, *(what(store.rows[name]) if (name := key(target, k, 0)) in store.rows else "" for k in KERNELS)]
        for target in TARGETS
    ]
    return f"## {title}\n\n{table(['', *KERNELS], lines)}\n"


def rate(row: dict[str, Any]) -> str:
    value = row["ess"] / row["seconds"]
    return "-" if value != value else f"{value:,.0f}" + {"": "", "run longer": "*"}.get(verdict(row), "!")


def thousand(row: dict[str, Any]) -> str:
    value = 1000 * row["ess"] / row["evaluations"]
    return "-" if value != value else f"{value:.3g}"


NOTE = f"""BridgeMH and KernelLangevin: {CHAINS} chains of {DRAWS} draws, library's defaults; bridges unfitted, 1,024
particles. "LightSB, full" is what BridgeMH takes when no bridge is named: a light bridge with full covariances, one a
component of the population's mixture. LightSB, LightSBM, LightSBBM: 50 diagonal components, their own fits. VSDM: 1,000
updates of 256 rows; DSB: 2 iterations of 500; LatentBridge: LightSB of 20 components behind a PCA that drops nothing;
KernelLangevinBridge: scheme "plain". NUTS: Pyro's, one chain, {NUTS_WARMUP} + {NUTS_DRAWS}, no JIT, starts
uniform(-2, 2), cut at a wall limit.
CPU s: process_time of everything; the cores were shared. warm-up s: of it, before the first kept draw, population, fit
and tuning counted. evaluations: of the log joint, with or without its gradient, one a chain; warm-up counted.
ESS: bulk, ArviZ, of the worst reference quantity (of two modes: and of the mode's indicator, - if a mode was never seen
or never left). acc.: the bridge's own move. prob.: its share of the steps. error: largest |mean - reference| in
reference sds. run longer: R-hat >= {MAX_RHAT} (* in the overview). WRONG: error above
{MAX_Z:g} standard errors (!). MODE LOST: - there.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", default="bridge_kernels", help="JSON file without its ending")
    parser.add_argument("--targets", nargs="+", default=[target.name for target in TARGETS])
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--limit", type=float, default=60.0, help="wall seconds of one run of Pyro's NUTS")
    parser.add_argument("--report", action="store_true", help="print what is there")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(FLOAT)
    asked = arguments()
    store = Store(asked.cache)
    for seed, target, kernel in product(range(0 if asked.report else asked.seeds), TARGETS, KERNELS):
        name = key(target, kernel, seed)
        if name in store.rows or target.name not in asked.targets or kernel not in asked.kernels:
            continue
        store.put(name, measure(target, kernel, seed, asked.limit))
        print(name, [f"{x:.4g}" if isinstance(x, float) else x for x in cells(store.rows[name])], flush=True)
    title = "Which bridge as a proposal: BridgeMH beside KernelLangevin and Pyro's NUTS"
    text = [header(title, 0), NOTE, READING, overview(store, rate, "ESS a CPU second")]
    text.append(overview(store, thousand, "ESS for 1,000 evaluations"))
    text += [section(store, target, seed) for seed, target in product(range(SEEDS), TARGETS)]
    write(asked.cache, "\n".join(part for part in text if part))


READING = """
Which to choose. Nothing at hand but a model: `KernelLangevin(model)`, or `BridgeMH(model)` without a bridge. Both
fit a mixture with full covariances to the same population, in about a second, and on ten of the eleven targets one
is within a factor of 1.8 of the other. At 20 dimensions proposals of whole points are accepted less, and
KernelLangevin, whose moves start from the state, is 2.5 times ahead. A bridge or an amortised posterior that is
fitted already: `BridgeMH(model, bridge)`; the fit is spared, and its draws become exact. Fitting a network in
warm-up for one posterior does not pay here: VSDM takes 8 to 16 s and DSB 32 to 72, and even for 1,000 evaluations
of the model they are level with the mixture at best. Of the two VSDM is the first to try, a third of DSB's time, on
curved targets. Light bridges with diagonal components are poor on correlated posteriors (LightSB's acceptance .03
to .53 from five dimensions on) and stick in the banana's tails (R-hat 1.02 to 1.04): put them behind a PCA that
drops nothing, `LatentBridge(LightSB(d, 20), PCACodec(d))`, which is accepted 1.3 to 20 times as often (with 20
components for 50, so that both changes count), though it does not help on the banana, or ask for
`covariance="full"`. KernelLangevinBridge accepts .64 and .67 in two dimensions and less than .25 elsewhere;
KernelLangevin does more with it. Not measured here: one mode in many dimensions, where whole points are hardly
accepted and NUTS is the choice. NumPyro's NUTS beside KernelLangevin: results/posteriors.txt.
"""

if __name__ == "__main__":
    main()
