"""The claim: KernelLangevin agrees with posteriordb's references and gives far more effective draws a second than NUTS.

For each posterior, one after the other on one thread: KernelLangevin (256 chains of 1,000 draws), Pyro's NUTS (one
chain, 300 + 500, the same model) and NumPyro's NUTS (4 vectorised chains, 1,000 + 1,000), warm-up and compilation
counted.
Run by `make bench`, or

    python -m benchmarks.posteriors [NAME ...] [--seed 0] [--limit 150] [--cache FILE] [--peers-only]
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyro
import torch

from benchmarks.peers import numpyro_nuts, pyro_nuts
from benchmarks.report import header, table, write
from benchmarks.score import Agreement, Row, agreement, score
from pyro_sb.datasets import POSTERIORS, PosteriorTask, posterior_task

CHAINS, DRAWS = 256, 1000
MAX_Z, MAX_SD, MIN_ESS, MAX_RHAT = 4.0, 0.05, 10_000, 1.01
PEERS = {"Pyro NUTS": (50.0, 300.0), "NumPyro NUTS": (3.0, 20.0)}  # goals: ratio on one posterior, geometric mean
FIGURES = ["seconds", "draws", "bulk ESS", "tail ESS", "R-hat", "error", "ESS/s", "evaluations", "ESS/1000", "note"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One posterior's runs."""

    task: PosteriorTask
    ours: Row | None
    compared: list[Agreement]
    peers: list[Row]


def kernel_langevin(task: PosteriorTask, seed: int) -> tuple[Row, np.ndarray]:
    """Our sampler with its defaults, and its draws (chain, draw, p)."""
    from pyro_sb.infer import MCMC, KernelLangevin

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.perf_counter()
    mcmc = MCMC(KernelLangevin(task.model), num_samples=DRAWS, num_chains=CHAINS, disable_progbar=True)
    mcmc.run(*task.args)
    draws = task.columns(mcmc.get_samples(group_by_chain=True)).numpy()
    seconds = time.perf_counter() - began
    evaluations = mcmc.evaluations.density + mcmc.evaluations.gradient
    return score(task, "KernelLangevin", draws, seconds, evaluations), draws


def ratio(ours: Row, peer: Row) -> tuple[float, bool]:
    """Ratio of bulk ESS a second, and whether it is a lower bound only.

    A peer that was cut before it had draws to judge counts as if it had drawn 500 independent ones by then.
    """
    if math.isnan(peer.bulk):
        return ours.rate / (500 / peer.seconds), True
    return ours.rate / peer.rate, False


def failures(result: Result) -> list[str]:
    """The issue's goals that this posterior misses."""
    ours, found = result.ours, []
    for line in result.compared:
        if not line.z < MAX_Z:
            found.append(f"mean of {line.parameter}: z {line.z:.2f}")
        if not abs(line.sd_ratio - 1) < MAX_SD:
            found.append(f"sd of {line.parameter}: ratio {line.sd_ratio:.3f}")
    if not min(ours.bulk, ours.tail) >= MIN_ESS:
        found.append(f"ESS {min(ours.bulk, ours.tail):,.0f} < {MIN_ESS:,}")
    if not ours.rhat < MAX_RHAT:
        found.append(f"R-hat {ours.rhat:.4f}")
    for peer in result.peers:
        if not ratio(ours, peer)[0] >= PEERS[peer.sampler][0]:
            found.append(f"{ratio(ours, peer)[0]:.1f} times {peer.sampler}, goal {PEERS[peer.sampler][0]:.0f}")
    return found


def section(result: Result) -> str:
    """One posterior's text."""
    lines = [f"## {result.task.name} ({len(result.task.parameters)} quantities)", ""]
    if result.compared:
        columns = ["parameter", "mean", "reference", "z", "sd ratio"]
        lines += [table(columns, [dataclasses.astuple(line) for line in result.compared]), ""]
    rows = [row for row in [result.ours, *result.peers] if row is not None]
    lines += [table(["sampler", *FIGURES], [figures(row) for row in rows]), ""]
    if result.ours is not None:
        for peer in result.peers:
            value, bound = ratio(result.ours, peer)
            lines.append(f"bulk ESS a second over {peer.sampler}'s: {'at least ' if bound else ''}{value:,.1f}")
        found = failures(result)
        lines.append("FAIL: " + "; ".join(found) if found else "PASS")
    return "\n".join(lines) + "\n"


def figures(row: Row) -> list[object]:
    rates = [row.rate, row.evaluations, row.per_thousand]
    return [row.sampler, row.seconds, row.draws, row.bulk, row.tail, row.rhat, row.error, *rates, row.note]


def summary(results: list[Result]) -> str:
    """Geometric means against their goals, then what failed."""
    lines = ["## Summary", ""]
    columns = ["posterior", "max z", "sd ratios", "bulk ESS", "tail ESS", "R-hat", "ESS/s", *[f"x {p}" for p in PEERS]]
    lines += [table([*columns, ""], map(summary_row, results)), ""]
    missed = sum(bool(failures(result)) for result in results)
    for i, (name, (_, goal)) in enumerate(PEERS.items()):
        pairs = [ratio(result.ours, result.peers[i]) for result in results]
        finished = geometric_mean(value for value, bound in pairs if not bound)
        everything = geometric_mean(value for value, _ in pairs)
        verdict = "PASS" if finished >= goal else "FAIL"
        missed += verdict == "FAIL"
        lines.append(
            f"geometric mean of the ratios to {name}: {finished:,.1f} where it finished,"
            f" {everything:,.1f} with bounds for the rest; goal {goal:.0f}: {verdict}"
        )
    lines.append("ALL PASS" if not missed else f"{missed} FAILED")
    return "\n".join(lines)


def summary_row(result: Result) -> list[object]:
    ours = result.ours
    spread = [line.sd_ratio for line in result.compared]
    ratios = [
        ("> " if bound else "") + f"{value:,.1f}" for value, bound in (ratio(ours, peer) for peer in result.peers)
    ]
    worst = max(line.z for line in result.compared)
    agreed = [worst, f"{min(spread):.3f}-{max(spread):.3f}", ours.bulk, ours.tail, f"{ours.rhat:.4f}", ours.rate]
    return [result.task.name, *agreed, *ratios, "FAIL" if failures(result) else "PASS"]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


class Cache:
    """Peers' rows kept in a file while developing; the claim itself is measured in one run, without it."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows = json.loads(path.read_text()) if path and path.exists() else {}

    def __call__(self, key: str, compute: Callable[[], Row]) -> Row:
        if key not in self.rows:
            self.rows[key] = dataclasses.asdict(compute())
            if self.path:
                self.path.write_text(json.dumps(self.rows, indent=1))
        return Row(**self.rows[key])


def measure(name: str, options: argparse.Namespace, cache: Cache) -> Result:
    """Run the three samplers on one posterior."""
    task, seed = posterior_task(name), options.seed
    ours, compared = None, []
    if not options.peers_only:
        ours, draws = kernel_langevin(task, seed)
        compared = agreement(task, draws)
    peers = [
        cache(f"{name} pyro {seed}", lambda: pyro_nuts(task, seed, limit=options.limit)),
        cache(f"{name} numpyro {seed}", lambda: numpyro_nuts(task, seed)),
    ]
    return Result(task, ours, compared, peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(POSTERIORS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=150.0, help="wall seconds of one run of Pyro's NUTS")
    parser.add_argument("--cache", type=Path, help="keep the peers' rows in this JSON file (for development)")
    parser.add_argument("--peers-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache, results = Cache(options.cache), []
    texts = [header("posteriordb: KernelLangevin beside Pyro's and NumPyro's NUTS", options.seed) + NOTES]
    print(texts[0], flush=True)
    for name in options.names or POSTERIORS:
        results.append(measure(name, options, cache))
        texts.append(section(results[-1]))
        print(texts[-1], flush=True)
    if not options.peers_only:
        texts.append(summary(results))
        print(texts[-1])
    if not options.names and not options.peers_only:
        write("posteriors", "\n".join(texts), echo=False)


NOTES = f"""KernelLangevin: {CHAINS} chains of {DRAWS} draws, defaults. Pyro NUTS: one chain, 300 + 500, no JIT, cut at
a wall limit. NumPyro NUTS: 4 vectorised chains of 1,000 + 1,000, float64, one core. Seconds are wall seconds with
warm-up and compilation. ESS, R-hat: ArviZ, worst reference quantity. error: largest |mean - reference| in reference
sds; z: that difference in combined Monte Carlo standard errors. evaluations: of the log joint, with or without its
gradient, one a chain. A sampler that stays in one mode can show a good ESS and R-hat; its error tells (1 on the
unordered mixture).
"""


if __name__ == "__main__":
    main()
