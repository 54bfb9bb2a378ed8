"""What beta does: a point to N(0, 1), the published sweep, and the laws on which a finite beta beats beta = inf.

Run by `make bench`, or

    python -m benchmarks.beta_sweep [PART ...] [--cache FILE] [--short]

The cache keeps each result as soon as it is measured, so that a run that was cut off goes on from there. Given parts
(normal, sweep, auto, search, confirm, distance), those alone are measured, into the cache, and nothing is written.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution, constraints

from benchmarks.planar_pairs import PAIRS, Pair, cpu_seconds, published_cloud, steps_within
from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import LightSBBM
from pyro_sb.datasets import Checkerboard, EightGaussians, Moons, SCurve, SwissRoll
from pyro_sb.metrics import sliced_wasserstein2, wasserstein2

SEED, INF = 0, math.inf
BETAS = [1.5, 10.0, 50.0, 100.0, 1000.0, INF]
PAPER = {  # 2601.19312, table 3: W2 at 10,000 draws and its standard deviation over 5 seeds, in the order of PAIRS
    10.0: [(0.241, 0.083), (0.603, 0.048), (0.372, 0.032)],
    50.0: [(0.277, 0.096), (0.243, 0.029), (0.152, 0.024)],
    100.0: [(0.330, 0.077), (0.201, 0.034), (0.109, 0.014)],
    1000.0: [(0.462, 0.091), (0.232, 0.025), (0.171, 0.037)],
    INF: [(0.489, 0.084), (0.334, 0.058), (0.229, 0.019)],
}
SEARCH_J, SEARCH_BETAS = [2, 5, 20], [2.0, 5.0, 20.0, 100.0, INF]
SWEEP_SEEDS = (0,)
CLEAR = 3.0  # standard errors that a gain must exceed to be called one, on both seeds
FULL = {
    "seconds": 6.0,
    "normal": 1000,
    "search": 600,
    "held": 5000,
    "cloud": 200_000,
    "exact": 4000,
    "paths": 20_000,
}
BRIEF = {"seconds": 1.0, "normal": 100, "search": 60, "held": 500, "cloud": 5000, "exact": 500, "paths": 1000}
SIZE = dict(FULL)


class Kept:
    """Results by name, a line of JSON each, written as soon as it is measured; a file that is there is gone on with."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.values = path, {}
        for line in path.read_text().splitlines() if path and path.exists() else []:
            self.values.update(json.loads(line))

    def __call__(self, measure: Callable[..., Any], *arguments: object, **unnamed: object) -> Any:
        """The value of ``measure(*arguments, **unnamed)``, kept under its name and arguments."""
        name = " ".join([measure.__name__, *map(str, arguments)])
        if name not in self.values:
            self.values[name] = measure(*arguments, **unnamed)
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps({name: self.values[name]}) + "\n")
        return self.values[name]


class Ring(dist.TorchDistribution):
    """Uniform on the annulus of radii .8 and 1."""

    support, has_rsample = constraints.real_vector, False

    def __init__(self) -> None:
        super().__init__(event_shape=torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        angle = 2 * math.pi * torch.rand(sample_shape)
        radius = (0.64 + 0.36 * torch.rand(sample_shape)).sqrt()
        return radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)


def twice(law: Distribution) -> Distribution:
    """Two independent coordinates of a scalar law."""
    return law.expand([2]).to_event(1)


def two_points(sd: float) -> Distribution:
    """Half N(-2, sd^2), half N(2, sd^2)."""
    parts = dist.Normal(torch.tensor([[-2.0], [2.0]]), sd).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


LAWS: dict[str, Distribution] = {
    "moons": Moons(),
    "checkerboard": Checkerboard(),
    "swiss roll": SwissRoll(),
    "s-curve": SCurve(),
    "square": twice(dist.Uniform(-1.0, 1.0)),
    "ring": Ring(),
    "exponential": twice(dist.Exponential(1.0)),
    "log-normal": twice(dist.LogNormal(0.0, 0.5)),
    "Laplace": twice(dist.Laplace(0.0, 1.0)),
    "two points": two_points(0.1),
}


def rounded(values: Tensor) -> list[Any]:
    return values.double().mul(1e4).round().div(1e4).tolist()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def gain(score: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Nats a held-out draw that a fit is ahead by, and the standard error: both were judged by the same draws."""
    return mean_and_error(torch.tensor(score["log_prob"]).double() - torch.tensor(base["log_prob"]).double())


def paragraph(text: str) -> str:
    return "\n" + textwrap.fill(text, 120)


def signed(value: tuple[float, float]) -> str:
    return f"{value[0]:+.3f} +-{value[1]:.3f}"


def beta_name(beta: float) -> str:
    return f"{beta:g}"


# delta_0 -> N(0, 1)


def zero_to_normal(num_components: int, solver: str, seed: int) -> dict[str, float]:
    """The controls along 20,000 paths."""
    law = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    steps = SIZE["normal"] if solver == "dual" else 200
    torch.manual_seed(seed)
    bridge = LightSBBM(1, num_components=num_components, beta=10.0)
    seconds = cpu_seconds(partial(bridge.fit, law, torch.zeros(1), solver=solver, num_updates=steps, progress=False))
    times, states = bridge.paths(SIZE["paths"], 20)
    alpha = torch.stack([bridge.drift(t, x) for t, x in zip(times, states)])
    sigma = torch.stack([bridge.volatility(t, x) for t, x in zip(times, states)])
    return {
        "start": float(alpha[0].mean()),
        "mean": float(alpha.mean()),
        "rms": float(alpha.square().mean().sqrt()),
        "sigma": float(sigma.mean()),
        "sd": float(sigma.std()),
        "seconds": seconds,
    }


def normal_runs(kept: Kept) -> dict[tuple[int, str], list[dict[str, float]]]:
    cases = [(j, solver) for j in (1, 50) for solver in ("dual", "batch")]
    return {case: [kept(zero_to_normal, *case, seed) for seed in range(5)] for case in cases}


def normal_text(kept: Kept) -> str:
    rows: list[list[object]] = []
    for (num, solver), runs in normal_runs(kept).items():
        column = {name: torch.tensor([run[name] for run in runs]).double() for name in runs[0]}
        spread = {name: f"{values.mean():.4f} +-{values.std():.4f}" for name, values in column.items()}
        names = ("start", "mean", "rms", "sigma", "sd")
        rows.append([f"J = {num}, {solver}", *(spread[name] for name in names), float(column["seconds"].mean())])
    rows.append(["paper", "0.002", "-", "-", "1.001", "-", "-"])
    rows.append(["truth", 0, 0, 0, 1, 0, "-"])
    columns = ["beta = 10", "alpha at t = 0", "mean alpha", "rms alpha", "mean sigma", "sd of sigma"]
    return "\n".join(
        [
            paragraph(
                "1. delta_0 -> N(0, 1). Means and standard deviations over 5 seeds; alpha and sigma along paths, at 21 "
                "times. The batch solver has 20,000 draws of N(0, 1), whose mean is off by .007; the dual solver has "
                "fresh ones."
            ),
            table([*columns, "CPU s"], rows),
        ]
    )


# the published sweep


def pair_named(name: str) -> Pair:
    return next(pair for pair in PAIRS if pair.name == name)


def fit_to_pair(bridge: LightSBBM, pair: Pair, num_steps: int) -> None:
    bridge.fit(pair.target, pair.source, num_updates=num_steps, progress=False)


def affordable_steps(kind: str) -> int:
    """Updates in the sweep's CPU time, on the first pair: a finite beta pays for inverses."""
    pair = PAIRS[0]
    bridge = LightSBBM(2, num_components=50, epsilon=pair.epsilon, beta=10.0 if kind == "finite" else INF)
    return steps_within(SIZE["seconds"], partial(fit_to_pair, bridge, pair))


def judged(bridge: LightSBBM, pair: Pair, seed: int) -> dict[str, Any]:
    """Sliced W2 and held-out log likelihood, by the same draws for every beta."""
    torch.manual_seed(1000 + seed)
    held_out, target = pair.target.sample((SIZE["held"],)), published_cloud(pair.target, SIZE["cloud"])
    reference, source = pair.target.sample((SIZE["cloud"],)), pair.source.sample((SIZE["cloud"],))
    draws = bridge.transport(source)
    sliced = sliced_wasserstein2(draws, target, reference=reference, num_projections=16)
    log_prob = bridge.marginal_log_prob(held_out)
    some = rounded(draws[: SIZE["exact"]]) if seed == SEED else None
    return {"sliced": float(sliced), "floor": sliced.floor, "log_prob": rounded(log_prob), "draws": some}


def swept(name: str, beta: float, seed: int, num_steps: int) -> dict[str, Any]:
    """One fit of the sweep."""
    pair = pair_named(name)
    torch.manual_seed(seed)
    bridge = LightSBBM(2, num_components=50, epsilon=pair.epsilon, beta=beta)
    seconds = cpu_seconds(fit_to_pair, bridge, pair, num_steps)
    return judged(bridge, pair, seed) | {"seconds": seconds, "steps": num_steps}


def chosen(name: str, num_steps: int) -> dict[str, Any]:
    """The fit that chooses its own beta."""
    pair = pair_named(name)
    torch.manual_seed(SEED)
    bridge = LightSBBM(2, num_components=50, epsilon=pair.epsilon, beta="auto")
    seconds = cpu_seconds(fit_to_pair, bridge, pair, num_steps)
    units = 2 * float(bridge.scale.log())
    scores = [[beta, score - units] for beta, score in bridge.scores.items()]
    found = {"beta": bridge.beta, "scores": scores, "seconds": seconds, "steps": num_steps}
    return judged(bridge, pair, SEED) | found


def exact_distance(name: str, num: int, model: object, draws: Tensor) -> float:
    """W2 between draws of a model and one cloud of the target, the same for all."""
    pair = pair_named(name)
    torch.manual_seed(2000)
    target = published_cloud(pair.target, num)
    return float(wasserstein2(draws[:num], target, reference=target[:2]))  # no floor: it is a model of its own


def sweep_run(kept: Kept, pair: Pair, beta: float, seed: int) -> dict[str, Any]:
    return kept(swept, pair.name, beta, seed, kept(affordable_steps, "inf" if math.isinf(beta) else "finite"))


def sweep_runs(kept: Kept) -> dict[tuple[str, float], list[dict[str, Any]]]:
    cases = [(pair, beta) for pair in PAIRS for beta in BETAS]
    for seed in SWEEP_SEEDS:  # the first seed of all before the second of any
        for pair, beta in cases:
            sweep_run(kept, pair, beta, seed)
    return {(pair.name, beta): [sweep_run(kept, pair, beta, seed) for seed in SWEEP_SEEDS] for pair, beta in cases}


def auto_runs(kept: Kept) -> dict[str, dict[str, Any]]:
    steps = kept(affordable_steps, "finite")
    return {pair.name: kept(chosen, pair.name, steps) for pair in PAIRS}


def distances(kept: Kept, pair: Pair) -> tuple[list[float], list[float]]:
    """W2 of the first seed's draws for each beta, and its floor: that of three clouds of the target itself."""
    num, floor = SIZE["exact"], []
    draws = [torch.tensor(sweep_run(kept, pair, beta, SEED)["draws"]) for beta in BETAS]
    found = [kept(exact_distance, pair.name, num, beta, draws=some) for beta, some in zip(BETAS, draws)]
    for seed in range(3):
        torch.manual_seed(3000 + seed)
        floor.append(kept(exact_distance, pair.name, num, f"floor-{seed}", draws=pair.target.sample((num,))))
    return found, floor


def refusal(beta: float) -> str:
    try:
        LightSBBM(2, beta=beta)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"beta = {beta} was not refused")


def log_prob_cell(score: dict[str, Any]) -> str:
    mean, error = mean_and_error(torch.tensor(score["log_prob"]))
    return f"{mean:.4f} +-{error:.4f}"


def both(runs: list[dict[str, Any]], name: str) -> str:
    return ", ".join(f"{run[name]:.4f}" for run in runs)


def sweep_rows(kept: Kept, pair: Pair) -> Iterable[list[object]]:
    runs, exact, auto = sweep_runs(kept), distances(kept, pair)[0], auto_runs(kept)[pair.name]
    base = runs[pair.name, INF]
    for beta, distance in zip(BETAS, exact):
        fits, paper = runs[pair.name, beta], PAPER.get(beta)
        cells = [both(fits, "sliced"), f"{distance:.3f}", log_prob_cell(fits[0])]
        gains = ["-" if math.isinf(beta) else ", ".join(signed(gain(*two)) for two in zip(fits, base))]
        paper_cell = "{:.3f} +-{:.3f}".format(*paper[PAIRS.index(pair)]) if paper else "-"
        yield [f"beta = {beta_name(beta)}", *cells, *gains, paper_cell, fits[0]["steps"], fits[0]["seconds"]]
    label = f"auto: beta = {beta_name(auto['beta'])}"
    gains = [signed(gain(auto, base[0]))]
    yield [label, f"{auto['sliced']:.4f}", "-", log_prob_cell(auto), *gains, "-", auto["steps"], auto["seconds"]]


def floors(kept: Kept, pair: Pair) -> tuple[str, list[float], list[float]]:
    """A line about the floors, and those of sliced W2 and of W2."""
    sliced = [run["floor"] for run in sweep_runs(kept)[pair.name, INF]]
    exact = distances(kept, pair)[1]
    line = f"floors: sliced W2 {', '.join(f'{v:.4f}' for v in sliced)}; W2 {', '.join(f'{v:.3f}' for v in exact)}"
    if isinstance(pair.target, EightGaussians):
        torch.manual_seed(1000)
        truth = {"log_prob": pair.target.log_prob(pair.target.sample((SIZE["held"],))).tolist()}
        line += f"; log likelihood of the truth {log_prob_cell(truth)}"
    return line, sliced, exact


def scores_line(auto: dict[str, Any]) -> str:
    best = max(score for _, score in auto["scores"])
    scores = ", ".join(f"{beta_name(beta)}: {score - best:+.4f}" for beta, score in auto["scores"])
    return f"auto's scores, nats from the best: {scores}; it takes beta = {beta_name(auto['beta'])}"


def sweep_text(kept: Kept) -> str:
    lines = [
        paragraph(
            f"2. The published sweep. J = 50, about {SIZE['seconds']:g} CPU seconds of training each, "
            f"{len(SWEEP_SEEDS)} seed(s). Sliced W2 at {SIZE['cloud']:,} draws; W2 at {SIZE['exact']:,} (the paper's: "
            f"10,000, mean and sd of 5 seeds). Log likelihood of {SIZE['held']:,} held-out draws, with the error of "
            "its mean; the gain over beta = inf is paired, with its own standard error."
        )
    ]
    columns = ["sliced W2", "W2", "log likelihood", "gain", "paper's W2", "steps", "CPU s"]
    for pair in PAIRS:
        rows = table([f"{pair.name}, epsilon {pair.epsilon:g}", *columns], sweep_rows(kept, pair))
        lines += ["", rows, floors(kept, pair)[0], scores_line(auto_runs(kept)[pair.name])]
    lines.append(f"\nbeta = 1 (the paper's first row: 4.103, 2.312, .927) is refused: {refusal(1.0)}")
    return "\n".join(lines)


# where does a finite beta win?


@cache
def variance(name: str) -> float:
    """Mean variance of a law's axes: the reference's, so that beta means the same for all laws."""
    torch.manual_seed(SEED)
    return float(LAWS[name].sample((100_000,)).var(0).mean())


def fitted(name: str, num_components: int, beta: float, seed: int, num_steps: int) -> LightSBBM:
    """A bridge from the point at a law's mean."""
    law = LAWS[name]
    epsilon = variance(name)
    torch.manual_seed(seed)
    bridge = LightSBBM(law.event_shape[0], num_components=num_components, epsilon=epsilon, beta=beta)
    bridge.fit(law, num_updates=num_steps, progress=False)
    return bridge


def searched(name: str, num_components: int, beta: float, seed: int, num_steps: int) -> dict[str, Any]:
    """Held-out log likelihood of one fit, by the same draws for every beta and J."""
    made: list[LightSBBM] = []
    seconds = cpu_seconds(lambda: made.append(fitted(name, num_components, beta, seed, num_steps)))
    torch.manual_seed(1000 + seed)
    held_out = LAWS[name].sample((2 * SIZE["held"],))
    return {"log_prob": rounded(made[0].marginal_log_prob(held_out)), "seconds": seconds}


def search(kept: Kept, name: str, num: int, beta: float, seed: int = SEED, longer: int = 1) -> dict[str, Any]:
    return kept(searched, name, num, beta, seed, longer * SIZE["search"])


def gain_over_inf(kept: Kept, name: str, num: int, beta: float, seed: int = SEED, longer: int = 1) -> Any:
    """Nats a draw that a finite beta gains, with its standard error."""
    return gain(*(search(kept, name, num, b, seed, longer) for b in (beta, INF)))


CELLS = [(name, num) for num in SEARCH_J for name in LAWS]


def search_gains(kept: Kept) -> dict[tuple[str, int], dict[float, tuple[float, float]]]:
    """Gains of the first seed, by law and J, then by beta."""
    return {cell: {beta: gain_over_inf(kept, *cell, beta) for beta in SEARCH_BETAS[:-1]} for cell in CELLS}


def clear(value: tuple[float, float]) -> int:
    """1 for a clear gain, -1 for a clear loss, else 0."""
    return int(value[0] > CLEAR * value[1]) - int(value[0] < -CLEAR * value[1])


def confirmed(kept: Kept, pick: Callable[..., float]) -> dict[tuple[str, int], tuple[float, tuple[float, float]]]:
    """By law and J: the best (or worst) beta of the first seed and its gain on the second, where it was clear."""
    found = {}
    for cell, gains in search_gains(kept).items():
        beta = pick(gains, key=lambda beta: gains[beta][0])
        if clear(gains[beta]) == (1 if pick is max else -1):
            found[cell] = (beta, gain_over_inf(kept, *cell, beta, seed=1))
    return found


def second_seed(found: tuple[float, tuple[float, float]] | None, sign: int) -> str:
    if found is None:
        return "-"
    beta, value = found
    return f"{beta_name(beta)}: {signed(value)} {('not so', 'wins', 'loses')[sign if clear(value) == sign else 0]}"


def search_rows(kept: Kept) -> Iterable[list[object]]:
    best, worst = confirmed(kept, max), confirmed(kept, min)
    for cell, first in search_gains(kept).items():
        base = mean_and_error(torch.tensor(search(kept, *cell, INF)["log_prob"]))[0]
        gains = [signed(first[beta]) for beta in SEARCH_BETAS[:-1]]
        yield [*cell, f"{base:.3f}", *gains, second_seed(best.get(cell), 1), second_seed(worst.get(cell), -1)]


def ranking(kept: Kept) -> list[tuple[float, str, int, float]]:
    """Cells by the second seed's gain at the first seed's best beta, largest first."""
    rows = [(value[0], *cell, beta) for cell, (beta, value) in confirmed(kept, max).items()]
    return sorted(rows, reverse=True)


def best_small(kept: Kept) -> tuple[str, int, float]:
    """The picture's case: law, J of at most 5, and beta. The s-curve has no density, so its gain has no bound."""
    return next(row[1:] for row in ranking(kept) if row[2] <= 5 and row[1] not in ("s-curve", "two points"))


def longer_rows(kept: Kept) -> Iterable[list[object]]:
    for value, name, num, beta in [row for row in ranking(kept) if row[2] <= 5][:4]:
        yield [name, num, beta_name(beta), f"{value:+.3f}", signed(gain_over_inf(kept, name, num, beta, 1, longer=4))]


def search_text(kept: Kept) -> str:
    rows, longer = list(search_rows(kept)), list(longer_rows(kept))
    columns = ["law", "J", "beta = inf", *(f"beta = {beta_name(beta)}" for beta in SEARCH_BETAS[:-1])]
    wins, losses = (sum(row[place].endswith(word) for row in rows) for place, word in ((7, "wins"), (8, "loses")))
    return "\n".join(
        [
            paragraph(
                "3. Does a finite beta beat beta = inf? From the point at the law's mean X_1 = (1 + 1/beta) y + "
                "(epsilon/beta) grad log v(y), y from the mixture v: as many parameters as at beta = inf and a step up "
                "the mixture's own density, which sharpens it. Epsilon is the law's mean variance, "
                f"{SIZE['search']} updates each. Log likelihood of {2 * SIZE['held']:,} held-out draws at beta = inf, "
                "and what a finite beta gains, in nats a draw with paired standard errors. Where the first seed's best "
                f"beta gained, or its worst lost, more than {CLEAR:g} standard errors, it was fitted again on a second "
                "seed: it wins or loses where that is so there too. Where components are wide (J = 2), beta = 100 is "
                "nearly inf: a gain as large there is a better start's or optimum's, not volatility's."
            ),
            table([*columns, "second seed: best", "worst"], rows),
            f"\nOf {len(rows)} laws and sizes a finite beta wins in {wins} and a badly chosen one loses in {losses}.",
            "\nThe four largest gains of J up to 5 on the second seed, and the same with four times the updates:",
            table(["law", "J", "beta", "gain", "four times"], longer),
        ]
    )


# the picture


def points_for_picture(name: str, num: int, beta: float) -> list[Any]:
    return rounded(fitted(name, num, beta, SEED, SIZE["search"]).transport(torch.zeros(4000, 2)))


def place(beta: float) -> float:
    """Where a beta stands on the logarithmic axis."""
    return 1e4 if math.isinf(beta) else beta


def beta_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_xticks([place(beta) for beta in BETAS], [beta_name(beta) for beta in BETAS])
    axis.minorticks_off()


def band(axis: Axes, values: list[float], label: str) -> None:
    axis.axhspan(min(values), max(values), color="0.85", label=label)


def sweep_panels(axes: list[Axes], kept: Kept, pair: Pair) -> None:
    """A column: W2 beside the paper's, sliced W2, log likelihood."""
    runs, exact, auto = sweep_runs(kept), distances(kept, pair)[0], auto_runs(kept)[pair.name]
    _, sliced_floor, exact_floor = floors(kept, pair)
    places, index = [place(beta) for beta in BETAS], PAIRS.index(pair)
    band(axes[0], exact_floor, "floor")
    axes[0].plot(places, exact, "o-", label=f"ours, {SIZE['exact']:,} draws")
    value, error = zip(*(row[index] for row in PAPER.values()))
    axes[0].errorbar(
        [place(b) for b in PAPER], value, error, fmt="s--", color="tab:red", capsize=3, label="paper, 10,000"
    )
    axes[0].set(title=f"{pair.name}, $\\epsilon$ = {pair.epsilon:g}", ylabel="$W_2$", ylim=(0, None))
    band(axes[1], sliced_floor, "floor")
    for seed, style in zip(SWEEP_SEEDS, ("o-", "^:")):
        fits = [runs[pair.name, beta][seed] for beta in BETAS]
        axes[1].plot(places, [fit["sliced"] for fit in fits], style, color="tab:blue", label=f"seed {seed}")
        gains = [gain(fit, runs[pair.name, INF][seed]) for fit in fits]
        value, error = zip(*gains)
        axes[2].errorbar(places, value, error, fmt=style, color="tab:blue", capsize=3)
    axes[1].set(ylabel=f"sliced $W_2$, {SIZE['cloud']:,} draws", ylim=(0, None))
    marks = [(axes[1], auto["sliced"]), (axes[2], gain(auto, runs[pair.name, INF][0])[0])]
    for axis, height in marks:
        axis.plot(place(auto["beta"]), height, "*", color="tab:orange", ms=16, label=f"auto: {beta_name(auto['beta'])}")
    axes[2].axhline(0, color="k", lw=0.8)
    axes[2].set(ylabel="gain in log likelihood over\n$\\beta = \\infty$, nats a draw", xlabel="$\\beta$")
    for axis in axes:
        beta_axis(axis)
        axis.legend(fontsize=7)


def best_panels(axes: list[Axes], kept: Kept) -> None:
    """The law on which a finite beta gains most with few components: its draws, those at beta = inf, at that beta."""
    name, num, beta = best_small(kept)
    torch.manual_seed(SEED)
    clouds = [LAWS[name].sample((4000,))]
    clouds += [torch.tensor(kept(points_for_picture, name, num, b)) for b in (INF, beta)]
    gains = signed(gain_over_inf(kept, name, num, beta, seed=1))
    titles = [f"{name}: the law", f"J = {num}, $\\beta = \\infty$", f"J = {num}, $\\beta$ = {beta:g}: {gains} nats"]
    low, high = clouds[0].quantile(0.002, 0), clouds[0].quantile(0.998, 0)
    margin = 0.25 * (high - low)
    for axis, cloud, title in zip(axes, clouds, titles):
        axis.plot(*cloud.T, ".", ms=1.2, color="tab:green", alpha=0.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(float(low[0] - margin[0]), float(high[0] + margin[0]))
        axis.set_ylim(float(low[1] - margin[1]), float(high[1] + margin[1]))


def picture(kept: Kept) -> Figure:
    figure, axes = plt.subplots(3, 4, figsize=(17, 11), layout="constrained")
    for column, pair in enumerate(PAIRS):
        sweep_panels(list(axes[:, column]), kept, pair)
    best_panels(list(axes[:, 3]), kept)
    return figure


MEASURES: dict[str, Callable[[Kept], object]] = {
    "normal": normal_runs,
    "sweep": sweep_runs,
    "auto": auto_runs,
    "search": search_gains,
    "confirm": search_text,
    "distance": lambda kept: [distances(kept, pair) for pair in PAIRS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*MEASURES, []], help="measure these alone, and write nothing")
    parser.add_argument("--cache", type=Path, help="keep results in this file of JSON lines, and go on from there")
    parser.add_argument("--short", action="store_true", help="small sizes, to try the script; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    SIZE.update(BRIEF if options.short else FULL)
    kept = Kept(options.cache)
    for part in options.parts or MEASURES:
        MEASURES[part](kept)
    if options.parts:
        return
    text = "\n".join(
        [
            header("The price of volatility: LightSBB-M over beta", SEED),
            normal_text(kept),
            sweep_text(kept),
            search_text(kept),
        ]
    )
    figure = picture(kept)
    if options.short:
        print(text)
        return
    write("beta_sweep", text)
    figure.savefig(RESULTS / "beta_sweep.png", dpi=110)


if __name__ == "__main__":
    main()
