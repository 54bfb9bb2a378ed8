"""What each move is worth: the full kernel, the bridge's moves alone, and the baselines that they must beat.

A Gaussian, AR(1) at d = 10, 20, 50, a banana, two modes 10 sds apart, eight schools in both forms, arK: eight ways to
move on each, one seed, the same warm-up before each. Losing rows are printed as readily. Run by `make bench`, or

    python -m benchmarks.moves [NAME ...] [--seed 0]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import torch

from benchmarks.report import header, table, write
from benchmarks.score import Row, score
from benchmarks.targets import FLOAT, autoregression, banana, gaussian, two_modes
from pyro_sb.datasets import PosteriorTask, posterior_task
from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.kernels.langevin import fit_bridge
from pyro_sb.infer.mcmc.walk import ROLES, Frozen
from pyro_sb.infer.moves.moves import BridgeMove
from pyro_sb.infer.moves.tuning import Batch, tune
from pyro_sb.ops.student_mixture import weighted_covariance

CHAINS, DRAWS = 64, 250
TARGETS: dict[str, Callable[[], PosteriorTask]] = {
    "gaussian": gaussian,
    "ar10": lambda: autoregression(10),
    "ar20": lambda: autoregression(20),
    "ar50": lambda: autoregression(50),
    "banana": banana,
    "two_modes": lambda: two_modes(10).task,
    "schools": lambda: posterior_task("eight_schools_noncentered"),
    "schools_centred": lambda: posterior_task("eight_schools_centered"),
    "arK": lambda: posterior_task("arK"),
}
NOISE = 0.1  # ESS of two runs of one sampler differ by as much
FIGURES = ["acceptance", "bulk ESS", "ESS/1000", "all/1000", "ESS/s", "R-hat", "error"]


class CrankNicolson(KernelLangevin):
    """Preconditioned Crank-Nicolson with the population's mean and whole covariance: the bridge at epsilon = 1e6."""

    def __init__(self, model: Callable) -> None:
        super().__init__(model, epsilons=(1e6,), probabilities={"bridge": 1.0})

    def _prepare(self) -> None:
        if self.frozen is not None:
            return
        super()._prepare()
        points, weights = self.population.distinct()
        covariance = weighted_covariance(points, weights)
        move = BridgeMove(fit_bridge(points, weights, covariance, 1e6))
        start = points[torch.multinomial(weights, CHAINS, replacement=True)]
        batch = Batch(start, self._target.log_prob(start))
        tuned, _ = tune(move, self._target, batch, torch.linalg.cholesky(covariance))
        self.frozen = Frozen({"bridge": move}, {"bridge": 1.0}, {"bridge": tuned.acceptance})


WAYS: dict[str, Callable[[Callable], KernelLangevin]] = {
    "all moves": KernelLangevin,
    "bridge's moves (local=None)": lambda model: KernelLangevin(model, local=None),
    "bridge's local move": lambda model: KernelLangevin(model, probabilities={"bridge": 1.0}),
    "bridge's index move, one step": lambda model: KernelLangevin(model, index_time=1, probabilities={"index": 1.0}),
    "- pCN, sample covariance": CrankNicolson,
    "- independence, same mixture": lambda model: KernelLangevin(model, probabilities={"index": 1.0}),
    "- batched MALA": lambda model: KernelLangevin(model, local="mala", probabilities={"local": 1.0}),
    "- batched HMC": lambda model: KernelLangevin(model, probabilities={"local": 1.0}),
}
BASELINES = [name for name in WAYS if name.startswith("-")]


@dataclass(frozen=True)
class Way:
    """One way to move on one target: its row, evaluations of the kept draws alone, acceptance by move."""

    row: Row
    kept_evaluations: int
    acceptance: str

    @property
    def per_thousand(self) -> float:
        """Bulk ESS for 1,000 evaluations of the kept draws, warm-up left out."""
        return 1000 * self.row.bulk / self.kept_evaluations

    def cells(self) -> list[object]:
        """The table's row."""
        row = self.row
        rates = [self.per_thousand, row.per_thousand, row.rate]
        return [row.sampler, self.acceptance, row.bulk, *rates, f"{row.rhat:.4f}", f"{row.error:.3f}"]


def measure(task: PosteriorTask, name: str, seed: int) -> Way:
    """Run one way to move on one target."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    kernel = WAYS[name](task.model)
    began = time.perf_counter()
    mcmc = MCMC(kernel, num_samples=DRAWS, num_chains=CHAINS, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(*task.args)
    draws = task.columns(mcmc.get_samples(group_by_chain=True)).numpy()
    seconds = time.perf_counter() - began
    evaluations = mcmc.evaluations.density + mcmc.evaluations.gradient
    report = mcmc.diagnostics()
    rates = {role: np.mean(list(report[f"acceptance {role}"].values())) for role in kernel.frozen.moves}
    return Way(
        score(task, name, draws, seconds, evaluations),
        kept_evaluations(kernel.frozen, mcmc.sample_stats["move"][0]),
        " ".join(f"{role[0]} {rate:.2f}" for role, rate in rates.items()),
    )


def kept_evaluations(frozen: Frozen, schedule: torch.Tensor) -> int:
    """Rows that the kept draws cost: 1 a bridge or index move, number of leapfrog steps + 1 a local move."""
    rows = {ROLES.index(role): getattr(move, "num_steps", 0) + 1 for role, move in frozen.moves.items()}
    return CHAINS * sum(rows[role] for role in schedule.tolist())


def section(task: PosteriorTask, seed: int) -> str:
    """One target's table, and in one line where the bridge loses."""
    ways = {name: measure(task, name, seed) for name in WAYS}
    lines = [f"## {task.name} (d {len(task.parameters)})", ""]
    lines += [table(["moves", *FIGURES], [way.cells() for way in ways.values()]), "", *verdicts(ways)]
    return "\n".join(lines) + "\n"


def verdicts(ways: dict[str, Way]) -> list[str]:
    """For the kernel, the bridge's moves and its local move: how the baselines' ESS for 1,000 evaluations compares."""
    lines = []
    for name in list(WAYS)[:3]:
        ratios = {other[2:]: ways[other].per_thousand / ways[name].per_thousand for other in BASELINES}
        ordered = sorted(ratios.items(), key=lambda item: -item[1])
        better = ", ".join(f"{other} ({value:.2f} times)" for other, value in ordered if value > 1 + NOISE)
        level = ", ".join(other for other, value in ordered if 1 / (1 + NOISE) <= value <= 1 + NOISE)
        words = [f"LOSES to {better}"] if better else []
        words += [f"level with {level}"] if level else []
        lines.append(f"{name}: " + ("; ".join(words) if words else "beats every baseline"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(FLOAT)
    began = time.perf_counter()
    texts = [header("What each move is worth", options.seed) + NOTES]
    print(texts[0], flush=True)
    for name in options.names or TARGETS:
        texts.append(section(TARGETS[name](), options.seed))
        print(texts[-1], flush=True)
    texts.append(f"{time.perf_counter() - began:.0f} s in all.")
    print(texts[-1])
    if not options.names:
        write("moves", "\n".join(texts), echo=False)


NOTES = f"""{CHAINS} chains of {DRAWS} draws, started from the population. Rows with "-" are baselines on it:
pCN with its mean and covariance, independence proposals from its mixture (the index move in the limit of many steps),
MALA and HMC in its metric. "bridge's moves": the local move and independence, shares tuned; "one step": the index move
through the mixture's components by one step of the bridge. acceptance: b(ridge), i(ndex), l(ocal). ESS/1000: smallest
bulk ESS for 1,000 evaluations of the kept draws; all/1000 counts the warm-up too. A gradient counts once, as a density
(it costs 2 to 3 times as much): that favours MALA and HMC. ESS/s: wall, warm-up counted. R-hat: largest. error: largest
|mean - truth| in sds of the target. Chains that start in the population look converged when they hardly move: there
R-hat is the honest column. Below each table: ESS/1000 beside the baselines', level within {NOISE:.0%}.
"""


if __name__ == "__main__":
    main()
