"""Which bridge as a proposal: every bridge in BridgeMH on eleven targets, beside KernelLangevin and Pyro's NUTS.

Bridges come unfitted, so that warm-up finds the population, fits the bridge and freezes it, all of it counted. Run as
`python -m benchmarks.posteriors.proposals [TARGET ...] [--kernels NAME ...] [--limit 60]`.
"""

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
import torch
from torch import Tensor

from benchmarks.lib.peers import NUTS_DRAWS, NUTS_WARMUP, pyro_nuts
from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.scores import score
from benchmarks.lib.store import Store, command
from benchmarks.lib.targets import FLOAT, Modes, banana, funnel, two_modes
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

CHAINS, DRAWS = 128, 500
SEEDS, MAX_RHAT, MAX_Z = 1, 1.01, 4.0
REFERENCE = 1e-4  # squared error of a mean of posteriordb's 10,000 reference draws, in their sds
NUTS, KERNEL = "Pyro NUTS", "KernelLangevin"


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

    def sample_block(self, params: dict[str, Tensor], num_transitions: int) -> Any:
        if self.steps >= self.default_warmup_steps and math.isnan(self.warm):  # type: ignore[attr-defined]
            self.warm = time.process_time()
        self.steps += num_transitions
        return super().sample_block(params, num_transitions)  # type: ignore[misc]


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
    """One chain of Pyro's NUTS, ended at a wall limit."""
    task = target.task()
    run = pyro_nuts(task, seed, limit)
    note = f"cut at {limit:.0f} s: {run.draws.shape[1]} draws" if run.cut else ""
    return figures(target, task, NUTS, run.draws, run.cpu, run.evaluations) | {"warm": run.warm, "note": note}


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
    """A run's fault, if it has one."""
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


def main() -> None:
    asked = command(
        __doc__,
        seeds=SEEDS,
        cached=True,
        targets={"nargs": "*", "metavar": "TARGET", "help": f"of {', '.join(target.name for target in TARGETS)}"},
        kernels={"nargs": "+", "default": KERNELS},
        limit={"type": float, "default": 60.0, "help": "wall seconds of one run of Pyro's NUTS"},
    )
    torch.set_default_dtype(FLOAT)
    store = Store("bridge_kernels")
    for seed, target, kernel in product(range(0 if asked.report else asked.seeds), TARGETS, KERNELS):
        name = key(target, kernel, seed)
        if name in store.rows or asked.targets and target.name not in asked.targets or kernel not in asked.kernels:
            continue
        store.put(name, measure(target, kernel, seed, asked.limit))
        print(name, [f"{x:.4g}" if isinstance(x, float) else x for x in cells(store.rows[name])], flush=True)
    title = "Which bridge as a proposal: BridgeMH beside KernelLangevin and Pyro's NUTS"
    text = [header(title, 0), NOTE, reading("bridge_kernels"), overview(store, rate, "ESS a CPU second")]
    text.append(overview(store, thousand, "ESS for 1,000 evaluations"))
    text += [section(store, target, seed) for seed, target in product(range(SEEDS), TARGETS)]
    write("bridge_kernels", "\n".join(part for part in text if part))


if __name__ == "__main__":
    main()
