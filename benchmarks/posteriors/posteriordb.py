"""The claim: KernelLangevin agrees with posteriordb's references and gives far more effective draws a second than NUTS.

For each posterior, one after the other on one thread: KernelLangevin (256 chains of 1,000 draws), Pyro's NUTS (one
chain, 300 + 500, the same model) and NumPyro's NUTS (4 vectorised chains, 1,000 + 1,000), warm-up and compilation
counted. Run as `python -m benchmarks.posteriors.posteriordb [NAME ...] [--limit 120]`; with names nothing is kept.
"""

import dataclasses
import math
import time
from collections.abc import Iterable

import numpy as np
import pyro

from benchmarks.lib.peers import BENCH_PYTHON, NUTS_DRAWS, NUTS_WARMUP, numpyro_nuts, pyro_nuts
from benchmarks.lib.report import header, table, write
from benchmarks.lib.scores import Agreement, Row, agreement, score
from benchmarks.lib.store import command
from pyro_sb.datasets import POSTERIORS, PosteriorTask, posterior_task
from pyro_sb.infer import MCMC, KernelLangevin

CHAINS, DRAWS = 256, 1000
MAX_Z, MAX_SD, MIN_ESS, MAX_RHAT = 4.0, 0.05, 10_000, 1.01
PEERS = {"Pyro NUTS": (50.0, 300.0), "NumPyro NUTS": (3.0, 20.0)}  # goals: ratio on one posterior, geometric mean
FIGURES = ["seconds", "draws", "bulk ESS", "tail ESS", "R-hat", "error", "ESS/s", "evaluations", "ESS/1000", "note"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One posterior's runs."""

    task: PosteriorTask
    ours: Row
    compared: list[Agreement]
    peers: list[Row]


def kernel_langevin(task: PosteriorTask, seed: int) -> tuple[Row, np.ndarray]:
    """Our sampler with its defaults, and its draws (chain, draw, p)."""
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
    columns = ["parameter", "mean", "reference", "z", "sd ratio"]
    lines = [f"## {result.task.name} ({len(result.task.parameters)} quantities)", ""]
    lines += [table(columns, [dataclasses.astuple(line) for line in result.compared]), ""]
    lines += [table(["sampler", *FIGURES], [figures(row) for row in (result.ours, *result.peers)]), ""]
    for peer in result.peers:
        value, bound = ratio(result.ours, peer)
        lines.append(f"bulk ESS a second over {peer.sampler}'s: {'at least ' if bound else ''}{value:,.1f}")
    found = failures(result)
    return "\n".join([*lines, "FAIL: " + "; ".join(found) if found else "PASS", ""])


def figures(row: Row) -> list[object]:
    rates = [row.rate, row.evaluations, row.per_thousand]
    return [row.sampler, row.seconds, row.draws, row.bulk, row.tail, row.rhat, row.error, *rates, row.note]


def summary(results: list[Result]) -> str:
    """Geometric means against their goals, then what failed."""
    lines = ["## Summary", ""]
    columns = ["posterior", "max z", "sd ratios", "bulk ESS", "tail ESS", "R-hat", "ESS/s", *[f"x {p}" for p in PEERS]]
    lines += [table([*columns, ""], map(summary_row, results)), ""]
    missed = sum(bool(failures(result)) for result in results)
    for name, (_, goal) in PEERS.items():
        pairs = [ratio(result.ours, peer) for result in results for peer in result.peers if peer.sampler == name]
        if not pairs:
            lines.append(f"{name}: left out")
            continue
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
    ratios += ["left out"] * (len(PEERS) - len(ratios))
    worst = max(line.z for line in result.compared)
    agreed = [worst, f"{min(spread):.3f}-{max(spread):.3f}", ours.bulk, ours.tail, f"{ours.rhat:.4f}", ours.rate]
    return [result.task.name, *agreed, *ratios, "FAIL" if failures(result) else "PASS"]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def measure(name: str, seed: int, limit: float) -> Result:
    """Run the three samplers on one posterior; without NumPyro where its environment is missing."""
    task = posterior_task(name)
    ours, draws = kernel_langevin(task, seed)
    run = pyro_nuts(task, seed, limit)
    note = f"cut at {limit:.0f} s: {run.steps} of {NUTS_WARMUP + NUTS_DRAWS} steps" if run.cut else ""
    peer = score(task, "Pyro NUTS", run.draws, run.seconds, run.evaluations, note)
    others = [numpyro_nuts(task, seed)] if BENCH_PYTHON.exists() else []
    return Result(task, ours, agreement(task, draws), [peer, *others])


def main() -> None:
    names = {"nargs": "*", "metavar": "NAME", "help": f"of {', '.join(POSTERIORS)}; default: all"}
    limit = {"type": float, "default": 150.0, "help": "wall seconds of one run of Pyro's NUTS"}
    asked = command(__doc__, names=names, seed={"type": int, "default": 0}, limit=limit)
    results: list[Result] = []
    texts = [header("posteriordb: KernelLangevin beside Pyro's and NumPyro's NUTS", asked.seed) + NOTES]
    print(texts[0], flush=True)
    if not BENCH_PYTHON.exists():
        print(
            "NumPyro's environment .venv-bench is missing, and NumPyro is left out. Run `make bench-env`.", flush=True
        )
    for name in asked.names or POSTERIORS:
        results.append(measure(name, asked.seed, asked.limit))
        texts.append(section(results[-1]))
        print(texts[-1], flush=True)
    texts.append(summary(results))
    write("posteriors", "\n".join(texts), keep=not asked.names and BENCH_PYTHON.exists())


NOTES = f"""KernelLangevin: {CHAINS} chains of {DRAWS} draws, defaults. Pyro NUTS: one chain, 300 + 500, no JIT, cut at
a wall limit. NumPyro NUTS: 4 vectorised chains of 1,000 + 1,000, float64, one core. Seconds are wall seconds with
warm-up and compilation. ESS, R-hat: ArviZ, worst reference quantity. error: largest |mean - reference| in reference
sds; z: that difference in combined Monte Carlo standard errors. evaluations: of the log joint, with or without its
gradient, one a chain. A sampler that stays in one mode can show a good ESS and R-hat; its error tells (1 on the
unordered mixture).
"""


if __name__ == "__main__":
    main()
