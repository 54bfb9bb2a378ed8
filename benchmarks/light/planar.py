"""Light bridges on the published planar pairs: four methods at equal training time, every score beside its floor.

Run as `python -m benchmarks.light.planar`. Finished runs are kept, and a second call goes on from them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from scipy.stats import t as student

from benchmarks.lib.fits import quiet, timed
from benchmarks.lib.pictures import cloud, save
from benchmarks.lib.planar import (
    ENDS,
    EXACT,
    JUDGED,
    NUM_COMPONENTS,
    PAIRS,
    SHARES,
    SLICED,
    Judge,
    Pair,
    exact_distance,
    of_density,
    schroedinger_bass,
    steps_within,
)
from benchmarks.lib.report import header, spread, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import LightSB, LightSBM

SHOWN = 600  # draws a panel of the picture
SCORES = {"w2": "W2 10k", "sliced": "sliced W2 200k", "tv": "mode TV 1M", "dual": "held-out G", "log_prob": "log lik."}
GOAL_SECONDS, GOAL_TV, GOAL_MOONS = 30.0, 0.005, 0.10
PUBLISHED = """
SF2M-Exact 0.275+-0.058 0.726+-0.137 0.124+-0.023
SF2M-I 0.393+-0.054 1.482+-0.151 0.185+-0.028
DSBM-IPF 0.315+-0.079 0.812+-0.092 0.140+-0.006
DSBM-IMF 0.338+-0.091 0.838+-0.098 0.144+-0.024
DSB 0.411+-0.084 0.987+-0.324 0.190+-0.049
LightSB-M 0.339+-0.099 0.295+-0.051 0.201+-0.042
LightSBB-M 0.241+-0.083 0.201+-0.034 0.109+-0.014
OT-CFM 0.303+-0.043 0.601+-0.027 0.130+-0.016
SB-CFM 2.314+-2.112 0.843+-0.079 0.434+-0.594
RF 0.421+-0.071 1.525+-0.330 0.283+-0.045
I-CFM 0.373+-0.103 1.557+-0.407 0.178+-0.014
FM 0.343+-0.058 n/a 0.209+-0.055"""
NOTE = f"""J = {NUM_COMPONENTS} diagonal components, float32, fresh draws of both laws at every step; one thread.
A method's steps are set by short timed runs so that all train for the same CPU time, the start included. Figures are
means +- standard deviations over seeds. Floors are what independent draws of the target score in the same seeds,
against the same clouds.
  W2 10k          exact, {EXACT:,} draws against as many of the target; moons: the published stratified sampler
  sliced W2 200k  {SLICED:,} draws against as many, 64 directions; moons: stratified too
  mode TV 1M      total variation of the mode shares of {SHARES:,} draws
  held-out G      dual at {ENDS:,} fresh points of each side: compare only within one beta
  log lik.        mean marginal log density of the same {JUDGED:,} fresh target draws, averaged over 4,096 source
                  points; "+- (draws)": the standard error that the draws leave; the floor is the target's own density
The alternating solver's draws go through its learnt inverse. It breaks the condition for an exact one, so for its
G and its likelihood the scales are raised to their floor first."""


@dataclass(frozen=True)
class Method:
    """A bridge and the options of its fit."""

    name: str
    make: Callable[[Pair], LightSB]
    options: dict[str, Any] = field(default_factory=dict)

    def fitted(self, pair: Pair, num_steps: int) -> LightSB:
        bridge = self.make(pair)
        bridge.fit(pair.target, pair.source, num_updates=num_steps, progress=False, **self.options)
        return bridge


SB = Method("LightSB", lambda pair: LightSB(2, num_components=NUM_COMPONENTS, epsilon=pair.epsilon))
MATCHING = Method("LightSBM", lambda pair: LightSBM(2, num_components=NUM_COMPONENTS, epsilon=pair.epsilon))
DUAL = Method("LightSBBM dual", schroedinger_bass)
ALTERNATING = Method("LightSBBM alternating", schroedinger_bass, {"solver": "alternating"})
METHODS = [SB, MATCHING, DUAL, ALTERNATING]


def floors(pair: Pair, seed: int) -> dict[str, float]:
    """Scores of the target's own draws."""
    judge = Judge(pair, seed)
    x = pair.target.sample((judge.num,))
    scores = judge.of_draws(x) | {"w2": exact_distance(x[:EXACT], judge.small)}
    return scores | (of_density(pair.target.log_prob(judge.judged)) if judge.modes else {})


def run(store: Store, method: Method, pair: Pair, seed: int, seconds: float) -> dict[str, float]:
    """One fit and its scores; of the first seed some draws are kept for the picture."""
    torch.manual_seed(0)
    find = partial(steps_within, seconds, partial(method.fitted, pair))
    steps = store.once(f"steps, {pair.name}, {method.name}", find)
    torch.manual_seed(seed)
    with quiet():
        bridge, spent = timed(method.fitted, pair, steps)
    judge = Judge(pair, seed)
    x = judge.draws(bridge)
    row = {"seconds": spent, "steps": steps} | judge.of_draws(x) | judge.of_bridge(bridge)
    if seed == 0:
        shown = [[round(value, 2) for value in point] for point in x[:SHOWN].tolist()]
        store.put(f"draws, {pair.name}, {method.name}", shown)
    return row | {"w2": exact_distance(x[:EXACT], judge.small)}


def run_all(store: Store, pairs: Sequence[Pair], seeds: int, seconds: float) -> None:
    """Seed by seed, so that what has finished compares all methods and pairs."""
    for seed, pair in product(range(seeds), pairs):
        store.once(f"floor, {pair.name}, seed {seed}", partial(floors, pair, seed))
        for method in METHODS:
            key = f"run, {pair.name}, {method.name}, seed {seed}"
            row = store.once(key, partial(run, store, method, pair, seed, seconds))
            print(key, {name: float(f"{value:.4g}") for name, value in row.items()}, flush=True)


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


class Report:
    """Tables and judgements of a store's runs: for each pair, of the seeds in which all methods have finished."""

    def __init__(self, store: Store, pairs: Sequence[Pair], seeds: int) -> None:
        self.store, self.asked = store, seeds
        self.seeds = {pair.name: [seed for seed in range(seeds) if self.finished(pair, seed)] for pair in pairs}
        self.pairs = [pair for pair in pairs if self.seeds[pair.name]]

    def finished(self, pair: Pair, seed: int) -> bool:
        return all(f"run, {pair.name}, {method.name}, seed {seed}" in self.store.rows for method in METHODS)

    def of(self, method: Method, pair: Pair, score: str) -> list[float]:
        keys = [f"run, {pair.name}, {method.name}, seed {seed}" for seed in self.seeds[pair.name]]
        return [row[score] for row in self.store.found(keys) if row.get(score) is not None]

    def floor(self, pair: Pair, score: str) -> list[float]:
        """Of every seed that has one: a floor waits for no run."""
        return self.store.scores(f"floor, {pair.name}, seed", score, self.asked)

    def table(self, pair: Pair) -> str:
        columns = ["", "CPU s", "steps", *SCORES.values(), "+- (draws)"]
        digits = {"log_prob": 5, "dual": 5}
        floor = f"floor, {len(self.floor(pair, 'sliced'))} seeds"
        rows = [[floor, "", "", *(spread(self.floor(pair, s), digits.get(s, 3)) for s in [*SCORES, "error"])]]
        for method in METHODS:
            cells = [spread(self.of(method, pair, s), digits.get(s, 3)) for s in ["seconds", *SCORES]]
            steps, error = self.of(method, pair, "steps")[0], mean(self.of(method, pair, "error"))
            rows.append([method.name, cells[0], f"{steps:,}", *cells[1:], f"{error:.4f}"])
        for name, figures in published().items():
            if name.startswith("Light"):
                rows.append([f"published {name}", "", "", figures[pair.name].replace("+-", " +- "), "", "", "", "", ""])
        seeds = f"{len(self.seeds[pair.name])} of {self.asked} seeds"
        title = f"\n{pair.name}, {seeds}, epsilon = {pair.epsilon:g}, beta = {pair.beta:g} (LightSB, LightSBM: inf)"
        return f"{title}\n{table(columns, rows)}"

    def goals(self, method: Method, pair: Pair) -> list[str]:
        """PASS or FAIL of each goal, in words."""
        sliced = {other.name: mean(self.of(other, pair, "sliced")) for other in METHODS}
        ours, noise = sliced[method.name], deviation(self.floor(pair, "sliced"))
        half, matching = sliced[ALTERNATING.name] / 2, sliced[MATCHING.name]
        seconds, w2 = max(self.of(method, pair, "seconds")), mean(self.of(method, pair, "w2"))
        near = f"; the difference is within the floor's sd {noise:.4f}" if abs(ours - matching) < noise else ""
        checks = [
            (seconds <= GOAL_SECONDS, f"longest training {seconds:.1f} <= {GOAL_SECONDS:g} CPU s"),
            (ours <= half, f"sliced W2 {ours:.4f} <= {half:.4f}, half of alternating's"),
            (ours <= matching, f"sliced W2 {ours:.4f} <= {matching:.4f}, LightSBM's{near}"),
        ]
        if self.floor(pair, "tv"):
            share, floor = mean(self.of(method, pair, "tv")), self.floor(pair, "w2")
            top = mean(floor) + deviation(floor)
            checks.append((share <= GOAL_TV, f"mode TV {share:.5f} <= {GOAL_TV}"))
            checks.append((w2 <= top, f"W2 {w2:.4f} <= {top:.4f}, the floor's mean + sd"))
        else:
            checks.append((w2 <= GOAL_MOONS, f"W2 {w2:.4f} <= {GOAL_MOONS:.2f}"))
        return [f"{'PASS' if good else 'FAIL'}  {method.name}, {pair.name}: {claim}" for good, claim in checks]

    def gain(self, other: Method, pair: Pair, score: str) -> str:
        """Gain of the dual solver's finite beta, paired over seeds: mean +- its standard error."""
        sign = 1 if score == "log_prob" else -1
        pairs = zip(self.of(DUAL, pair, score), self.of(other, pair, score), strict=True)
        gains = [sign * (ours - theirs) for ours, theirs in pairs]
        if not gains:
            return "-"
        if len(gains) < 2:
            return f"{gains[0]:+.5f} (one seed)"
        error = stdev(gains) / math.sqrt(len(gains))
        clear = abs(mean(gains)) > error * student.ppf(0.975, len(gains) - 1)
        return f"{mean(gains):+.5f} +- {error:.5f}{('  better' if mean(gains) > 0 else '  worse') if clear else ''}"

    def honest(self) -> str:
        scores = ["w2", "sliced", "tv", "log_prob"]
        rows = [
            [f"{pair.name}, against {other.name}", *(self.gain(other, pair, score) for score in scores)]
            for other in (SB, MATCHING)
            for pair in self.pairs
        ]
        text = """
Does finite beta (LightSBBM dual) beat beta = inf? Gain paired over the seeds, positive where finite beta is better:
mean +- its standard error, with a word where Student's t calls it clear at 5 %. Against LightSB beta alone differs, and
the steps that the budget buys; against LightSBM the loss differs too."""
        return f"{text}\n{table(['gain', *(SCORES[score] for score in scores)], rows)}"

    def text(self) -> str:
        goals = [line for method in (DUAL, SB) for pair in self.pairs for line in self.goals(method, pair)]
        rows = [[name, *(figures[pair.name] for pair in self.pairs)] for name, figures in published().items()]
        return "\n".join(
            [
                *(self.table(pair) for pair in self.pairs),
                "\nPublished W2 at 10,000 draws (table 1 of arXiv 2601.19312)",
                table(["", *(pair.name for pair in self.pairs)], rows),
                "\nGoals",
                *goals,
                self.honest(),
            ]
        )


def published() -> dict[str, dict[str, str]]:
    """W2 of each published method by pair."""
    lines = [line.split() for line in PUBLISHED.split("\n") if line]
    return {name: dict(zip([pair.name for pair in PAIRS], figures, strict=True)) for name, *figures in lines}


def dots(axes: Axes, report: Report, pair: Pair) -> None:
    """Sliced W2 of every seed over the band of its floor."""
    floor = report.floor(pair, "sliced")
    axes.axhspan(min(floor), max(floor), color="0.85")
    for place, method in enumerate(METHODS):
        values = report.of(method, pair, "sliced")
        axes.plot([place] * len(values), values, "o", ms=4, alpha=0.7)
    axes.set_xticks(range(len(METHODS)), ["SB", "SBM", "SBBM\ndual", "SBBM\nalt."], fontsize=8)
    axes.set_yscale("log")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_title("sliced W2 a seed; grey: its floor", fontsize=9)


def picture(report: Report) -> None:
    """Draws of seed 0 in blue over target draws in grey, and the sliced distances."""
    pairs, columns = report.pairs, len(METHODS) + 1
    fig, grid = plt.subplots(len(pairs), columns, figsize=(2.9 * columns, 2.9 * len(pairs)), squeeze=False)
    for row, pair in zip(grid, pairs, strict=True):
        target = Judge(pair, 0).small[: 5 * SHOWN]
        for axes, method in zip(row, METHODS, strict=False):
            draws = torch.tensor(report.store.rows[f"draws, {pair.name}, {method.name}"])
            cloud(axes, draws, target, f"{pair.name}\n{method.name}")
        dots(row[-1], report, pair)
    fig.tight_layout()
    save(fig, "planar")


def main() -> None:
    names = [pair.name for pair in PAIRS]
    asked = command(
        __doc__,
        seeds=5,
        cached=True,
        seconds={"type": float, "default": 20.0, "help": "CPU seconds of each training"},
        pairs={"nargs": "*", "metavar": "PAIR", "default": names, "help": f"of {', '.join(names)}"},
    )
    store = Store("planar")
    pairs = [pair for pair in PAIRS if pair.name in asked.pairs]
    if store.once("seconds", lambda: asked.seconds) != asked.seconds:
        raise SystemExit(f"{store.path} holds runs of {store.rows['seconds']} s. Remove it, or set PYRO_SB_RESULTS.")
    if not asked.report:
        run_all(store, pairs, asked.seeds, asked.seconds)
    report = Report(store, pairs, asked.seeds)
    title = header(f"Light bridges on planar pairs, {asked.seconds:g} CPU s of training", 0)
    write("planar", f"{title}\n{NOTE}\n{report.text()}")
    if report.pairs:  # of a trial that was cut none may be complete
        picture(report)


if __name__ == "__main__":
    main()
