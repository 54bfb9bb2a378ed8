"""The claim: separated modes get their shares, and R-hat agrees; a chain of NUTS stays in one mode.

Two unit-variance Gaussians 10 sds apart with weights .3/.7 (d = 2, 10, 20) and eight on a circle, neighbours 10 sds
apart (d = 2, 10): KernelLangevin with its defaults and Pyro's NUTS on the same Pyro model, a factor on an improper
uniform site, so that no prior gives the modes away. Then warm-ups that start wrong. Run as
`python -m benchmarks.posteriors.modes [--seeds 3] [--limit 60]`.
"""

import time
from dataclasses import dataclass

import arviz as az
import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.lib.peers import pyro_nuts
from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import command
from benchmarks.lib.targets import FLOAT, Modes, circle, two_modes
from pyro_sb.infer import MCMC, KernelLangevin

CHAINS, DRAWS = 128, 500
MAX_TV, MAX_RHAT = 0.02, 1.01
MOSTLY_WRONG, FIRST_MISSING = torch.tensor([0.95, 0.05], dtype=FLOAT), torch.tensor([0.0, 1.0], dtype=FLOAT)
FIGURES = ["shares", "TV", "R-hat", "bulk ESS", "mode ESS", "seconds", "ESS/s", "ESS/1000", "acc b/i/l", "note"]


@dataclass(frozen=True, eq=False)
class Run:
    """One sampler's run on one target."""

    target: Modes
    sampler: str
    seed: int
    draws: np.ndarray  # (chain, draw, d)
    seconds: float  # wall, warm-up counted
    evaluations: int  # of the log joint, with or without its gradient, one a chain
    acceptance: str = "-"
    note: str = ""

    @property
    def shares(self) -> np.ndarray:
        """Each mode's share of the draws: nearest centre."""
        labels = self.target.labels(self.draws).ravel()
        return np.bincount(labels, minlength=len(self.target.weights)) / len(labels)

    @property
    def distance(self) -> float:
        """Total variation between the shares and the weights."""
        return float(0.5 * np.abs(self.shares - self.target.weights.numpy()).sum())

    @property
    def rhat(self) -> float:
        """Largest rank-normalised split R-hat over coordinates; a single chain is judged by its halves."""
        draws = self.draws[:, self.draws.shape[1] % 2 :]
        halves = draws if len(draws) > 1 else draws.reshape(2, -1, draws.shape[-1])
        return max(float(az.rhat(halves[..., j])) for j in range(draws.shape[-1]))

    @property
    def bulk(self) -> float:
        """Smallest bulk ESS over coordinates."""
        return min(float(az.ess(self.draws[..., j], method="bulk")) for j in range(self.draws.shape[-1]))

    @property
    def mode_ess(self) -> float:
        """Smallest ESS of a mode's indicator; NaN if one was never seen or never left."""
        labels = self.target.labels(self.draws)
        indicators = [(labels == k).astype(float) for k in range(len(self.target.weights))]
        if any(x.min() == x.max() for x in indicators):
            return float("nan")
        return min(float(az.ess(x, method="mean")) for x in indicators)

    def cells(self) -> list[object]:
        """The table's row."""
        shares, mode_ess = self.shares, self.mode_ess
        ess = float(np.nanmin([self.bulk, mode_ess]))
        shown = shares if len(shares) == 2 else [shares.min(), shares.max()]
        return [
            self.target.task.name,
            self.sampler,
            self.seed,
            ("/" if len(shares) == 2 else "..").join(f"{share:.3f}" for share in shown),
            f"{self.distance:.4f}",
            f"{self.rhat:.4f}",
            self.bulk,
            mode_ess,
            self.seconds,
            ess / self.seconds,
            1000 * ess / self.evaluations,
            self.acceptance,
            self.note,
        ]


def kernel_langevin(
    target: Modes, seed: int, *, population: Tensor | None = None, chains: Tensor | None = None, name: str = "ours"
) -> Run:
    """KernelLangevin with its defaults.

    With ``population`` its population starts from 1,024 points that have the modes in these proportions, not from the
    search; with ``chains`` the chains start in these proportions.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = "search" if population is None else target.sample(1024, population)
    params = None if chains is None else {"z": target.sample(CHAINS, chains)}
    kernel = KernelLangevin(target.task.model, start=start)
    began = time.perf_counter()
    mcmc = MCMC(kernel, num_samples=DRAWS, num_chains=CHAINS, initial_params=params, disable_progbar=True)
    mcmc.run(*target.task.args)
    draws = target.task.columns(mcmc.get_samples(group_by_chain=True)).numpy()
    seconds = time.perf_counter() - began
    report = mcmc.diagnostics()
    rates = [np.mean(list(report[f"acceptance {role}"].values())) for role in ("bridge", "index", "local")]
    return Run(
        target,
        name,
        seed,
        draws,
        seconds,
        mcmc.evaluations.density + mcmc.evaluations.gradient,
        "/".join(f"{rate:.2f}" for rate in rates),
        f"search found {kernel.population.num_modes}" if population is None else "",
    )


def nuts(target: Modes, seed: int, limit: float, num_chains: int = 1) -> Run:
    """Pyro's NUTS with its defaults."""
    run = pyro_nuts(target.task, seed, limit, num_chains, max_plate_nesting=0)
    name = "NUTS" if num_chains == 1 else f"NUTS, {num_chains} chains"
    note = f"cut at {limit:.0f} s" if run.cut else ""
    return Run(target, name, seed, run.draws, run.seconds, run.evaluations, note=note)


def verdict(runs: list[Run]) -> str:
    """Whether every run met the goals, else which did not."""
    missed = [
        f"{run.target.task.name}, {run.sampler}, seed {run.seed}: TV {run.distance:.4f}, R-hat {run.rhat:.4f}"
        for run in runs
        if not (run.distance < MAX_TV and run.rhat < MAX_RHAT)
    ]
    goal = f"TV < {MAX_TV} and R-hat < {MAX_RHAT} in {len(runs)} runs"
    return f"{goal}: " + ("PASS" if not missed else f"{len(missed)} FAILED\n" + "\n".join(missed))


def shares_section(seeds: list[int], limit: float) -> tuple[str, list[Run]]:
    """Ours at every seed with NUTS at the first beside it."""
    ours, rows = [], []
    for target in [two_modes(2), two_modes(10), two_modes(20), circle(2), circle(10)]:
        runs = [kernel_langevin(target, seed) for seed in seeds]
        ours += runs
        rows += [*runs, nuts(target, seeds[0], limit)]
    rows.append(nuts(two_modes(2), seeds[0], limit, num_chains=4))
    for dim in (2, 10, 20):
        target, seed = two_modes(dim, at_origin=True), seeds[-1] + 1  # ours is translation equivariant: a seed of the
        ours.append(kernel_langevin(target, seed))  # rows above would repeat them once the search has found both modes
        rows += [ours[-1], nuts(target, seed, limit)]
    return f"## Shares of the modes\n\n{_table(rows)}\n\n{verdict(ours)}\n", ours


def repair_section(seeds: list[int]) -> tuple[str, list[Run]]:
    """Warm-ups that start with 95 % in the wrong mode."""
    rows = []
    for target in [two_modes(2), two_modes(10), two_modes(20)]:
        name = "population .95 wrong"
        rows += [kernel_langevin(target, seed, population=MOSTLY_WRONG, name=name) for seed in seeds]
        rows.append(kernel_langevin(target, seeds[0], chains=MOSTLY_WRONG, name="chains .95 wrong"))
    text = (
        "## Starts with 95 % in the wrong mode (that of weight .3)\n\n" + _table(rows) + "\n\n" + verdict(rows) + "\n"
    )
    return text, rows


def missing_section(seed: int) -> str:
    """A population that starts without one of the modes."""
    targets = [two_modes(2), two_modes(10), two_modes(20)]
    rows = [kernel_langevin(target, seed, population=FIRST_MISSING, name="population without it") for target in targets]
    title = "## The limit: a mode (of weight .3) that the population does not have"
    silent = [run for run in rows if run.distance > MAX_TV and run.rhat < MAX_RHAT]
    lost = ", ".join(f"d {run.draws.shape[-1]}" for run in silent) or "none of these"
    return (
        f"{title}\n\n{_table(rows)}\n\nWrong shares that R-hat does not notice: {lost}. "
        "Chains that stumble on the mode get lost in it; only a start that finds it helps.\n"
    )


def _table(runs: list[Run]) -> str:
    return table(["target", "sampler", "seed", *FIGURES], [run.cells() for run in runs])


def main() -> None:
    limit = {"type": float, "default": 60.0, "help": "wall seconds of one run of Pyro's NUTS"}
    asked = command(__doc__, seeds=3, limit=limit, seed={"type": int, "default": 0, "help": "the first seed"})
    torch.set_default_dtype(FLOAT)
    seeds = list(range(asked.seed, asked.seed + asked.seeds))
    began = time.perf_counter()
    texts = [header("Separated modes: KernelLangevin beside Pyro's NUTS", asked.seed) + NOTES]
    claims: list[Run] = []
    for section in (lambda: shares_section(seeds, asked.limit), lambda: repair_section(seeds)):
        text, runs = section()
        claims += runs
        texts.append(text)
        print(text, flush=True)
    texts.append(missing_section(asked.seed))
    texts.append(f"All: {verdict(claims).splitlines()[0]}. {time.perf_counter() - began:.0f} s in all.")
    write("modes", "\n".join(texts))


NOTES = f"""Model: pyro.factor on an ImproperUniform site (no prior to draw from), float64.
Ours: {CHAINS} chains of {DRAWS} draws, defaults. NUTS: one chain, 300 + 500, no JIT, starts uniform(-2, 2).
"about 0": the modes lie 5 sds either side of the origin along the diagonal; "one at 0": the mode of weight .3 is at the
origin, the other 10 sds off. shares: first/second mode, or smallest..largest of eight (truth .125). TV: total variation
between shares and weights. R-hat, ESS: ArviZ, worst coordinate; one chain's R-hat compares its halves. mode ESS: worst
indicator of a mode, - if one was never seen. seconds: wall, warm-up counted. ESS/s, ESS/1000 (for 1,000 evaluations,
warm-up counted, a gradient counted once): of the smaller ESS. acc b/i/l: acceptance of the bridge, index, local move.
"""


if __name__ == "__main__":
    main()
