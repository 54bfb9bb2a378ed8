"""A heteroskedastic series: conditional increments by the light bridges, with and without volatility control.

Run as `python -m benchmarks.heteroskedastic`; `--short` fits and runs for a few steps, to try the script.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cbook import get_sample_data
from scipy import optimize, signal, stats
from torch import Tensor

from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import Bridge, LightSB, LightSBBM, TailMatched

SEED, F64 = 0, torch.float64
DECAYS = torch.tensor([0.8, 0.95], dtype=F64)  # of the two realised variances in the context
BETAS, COMPONENTS, STEPS, WARM, LAGS = (20.0, 5.0, 2.0), 10, 1000, 50, 20
RUNS, LENGTH, REPLICATES, LOST = 200, 500, 8, 100.0
SHOWN = {"LightSB": "tab:blue", "beta = 2": "tab:green", "tails, LightSB": "tab:red"}
NOTE = f"""Context of an increment: the last one, and logs of two averages of squared increments (decays .8 and .95).
Bridges from a point, J = {COMPONENTS}, epsilon = 1 in units of the series' variance, at most {STEPS} steps; beta =
inf is LightSB. 'tails': inside TailMatched, df="auto". GARCH(1,1): v' = .05 + .1 x^2 + .85 v; its truth knows v, the
bridges do not. 10,000 pairs to learn from, 10,000 others to judge. The share price: {{days}} daily log increments
(matplotlib's goog.npz, 2004 to 2008), the first 70 % to learn from; its references are GARCH(1,1) fitted there by
maximum likelihood.
log lik.: nats an increment on held-out pairs, less the first reference's; less LightSB's; +- paired standard error.
KS p: uniformity of the probability transform of held-out increments; of the thirds of smallest and largest v.
slope: of the log quadratic variation of the path to the increment on log v. A diffusion with the day's own variance
has 1; a Schrodinger bridge has 0, its volatility is the reference's whatever the context."""
FREE = f"""Free runs: draws fed back, {RUNS} runs of {LENGTH} after 200. lost %: runs that left {LOST:g} standard
deviations, not counted further. q: quantiles of |x|; Hill: tail index of |x| from the largest 1 % (30 at least); r:
autocorrelation of |x| at a lag, r2 of x^2; gap: mean distance of the autocorrelations of |x| at lags 1 to {LAGS} from
the truth's. Share price: runs of its own length, median over runs [5 %, 95 %]; gap to its own autocorrelations, which
are one noisy path's."""
READING = """
Reading. Volatility control helps a little in one step: on both simulated series beta = 2 is nearer to the truth
than beta = inf, by .001 (t(6): one standard error of the test set) and .003 nats (normal: 2.3), inside TailMatched
by .002 and .005 (2.6 and 3.7); beta = 20 is worse and beta = 5 level. It is one fit each, and spreads of fits of
this size are not measured: a hint, no proof. Where the conditional law is normal no ten-component bridge beats a
single component. What beta changes by design shows in the slope: the volatility inside the step follows the state's
under finite beta, half of the way at beta = 2, and not at all under beta = inf. Free runs do not profit: with and
without volatility control most bridges cluster too much and spread too far, by many standard deviations of the
truth's own noise; finite beta is the best on the normal series (beta = 20) and the worst on t(6), where LightSB
inside TailMatched has the tails and LightSB the clustering. The share price decides nothing: 700 pairs, a crisis
among the held-out ones, and all networks of ten components lose to a GARCH(1,1) there ('tails' is affine then, df =
inf; as its unit is the quartiles', epsilon is another in x, which is why it differs at finite beta)."""


@dataclass
class Garch:
    """x = sqrt(v) z with v' = omega + alpha x^2 + persist v, and z normal (df = inf) or Student's, of unit variance."""

    omega: float = 0.05
    alpha: float = 0.1
    persist: float = 0.85
    df: float = math.inf

    def update(self, v: Tensor, x: Tensor) -> Tensor:
        return self.omega + self.alpha * x.square() + self.persist * v

    def start(self, num: int) -> Tensor:
        return torch.full((num,), self.omega / max(1 - self.alpha - self.persist, 1e-2), dtype=F64)

    def simulate(self, num: int, length: int, burn: int = 200) -> Tensor:
        """Paths ``(length, num)``."""
        v, path = self.start(num), []
        unit = 1.0 if math.isinf(self.df) else math.sqrt((self.df - 2) / self.df)
        law = torch.distributions.StudentT(torch.tensor(self.df, dtype=F64))
        for _ in range(burn + length):
            z = torch.randn(num, dtype=F64) if math.isinf(self.df) else unit * law.sample((num,))
            path.append(v.sqrt() * z)
            v = self.update(v, path[-1])
        return torch.stack(path[burn:])

    def variances(self, x: Tensor) -> Tensor:
        """The variance of each entry given those before. Shape of ``x``, ``(T, num)``."""
        v = self.start(x.shape[1])[None]
        pushed, past = self.omega + self.alpha * x[:-1].square(), self.persist * v
        later = signal.lfilter([1.0], [1.0, -self.persist], pushed.numpy(), axis=0, zi=past.numpy())[0]
        return torch.cat([v, torch.as_tensor(later)])

    def law(self, v: Tensor) -> object:
        if math.isinf(self.df):
            return stats.norm(scale=v.sqrt().numpy())
        return stats.t(self.df, scale=(v * (self.df - 2) / self.df).sqrt().numpy())

    @staticmethod
    def fitted(x: Tensor, student: bool) -> "Garch":
        """By maximum likelihood, from one path ``(T, 1)``."""

        def model(p: np.ndarray) -> Garch:
            a, b, c = np.exp(p[:3]) / (1 + np.exp(p[:3]).sum() - np.exp(p[0]))
            return Garch(float(np.exp(p[0])), float(b), float(c), 2 + float(np.exp(p[3])) if student else math.inf)

        def loss(p: np.ndarray) -> float:
            garch = model(p)
            return -float(garch.law(garch.variances(x)).logpdf(x.numpy())[WARM:].mean())

        start = np.array([-3.0, 0.7, 2.8, 1.5])[: 4 if student else 3]
        return model(optimize.minimize(loss, start, method="Nelder-Mead", options={"maxiter": 400}).x)


@dataclass
class Pairs:
    """Contexts ``(n, 3)``, next increments ``(n, 1)`` and, by each reference, their variances ``(n,)``."""

    context: Tensor
    increment: Tensor
    variances: dict[str, Tensor]

    def keep(self, rows: slice) -> "Pairs":
        return Pairs(self.context[rows], self.increment[rows], {k: v[rows] for k, v in self.variances.items()})


def realised(state: Tensor, x: Tensor) -> Tensor:
    """Averages of squares, updated. Shapes ``(n, 2)`` and ``(n,)``."""
    return DECAYS * state + (1 - DECAYS) * x.square()[:, None]


def context_of(state: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x[:, None], state.log()], 1)


def pairs_of(x: Tensor, references: dict[str, Garch]) -> Pairs:
    """All pairs of paths ``(T, n)`` past the averages' warm-up, in order of time."""
    state, contexts = torch.ones(x.shape[1], 2, dtype=F64), []
    for row in x[:-1]:
        state = realised(state, row)
        contexts.append(context_of(state, row))
    variances = {name: garch.variances(x)[WARM + 1 :].flatten() for name, garch in references.items()}
    return Pairs(torch.cat(contexts[WARM:]), x[WARM + 1 :].reshape(-1, 1), variances)


@dataclass
class Series:
    """A series in units of its standard deviation, with the laws that bridges are held against; the first is the truth
    or the best we have for it."""

    name: str
    references: dict[str, Garch]
    learn: Pairs
    judge: Pairs
    observed: Tensor | None = None
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def simulated(name: str, df: float) -> Series:
    references = {"truth": Garch(df=df)}
    if not math.isinf(df):
        references["normal of the true variance"] = Garch()
    paths = [references["truth"].simulate(10, 1000 + WARM + 1) for _ in range(2)]
    return Series(name, references, *(pairs_of(x, references) for x in paths))


def shares() -> Tensor:
    prices = get_sample_data("goog.npz")["price_data"]["adj_close"]
    return torch.as_tensor(np.diff(np.log(prices)), dtype=F64)[:, None]


def real(name: str) -> Series:
    x = shares()
    early = int(0.7 * len(x))
    x = (x - x[:early].mean()) / x[:early].std()
    references = {f"GARCH, {law}": Garch.fitted(x[:early], law == "t") for law in ("t", "normal")}
    pairs = pairs_of(x, references)
    cut = early - WARM - 1
    return Series(name, references, pairs.keep(slice(cut)), pairs.keep(slice(cut, None)), x)


SERIES: dict[str, Callable[[str], Series]] = {
    "GARCH, normal": lambda name: simulated(name, math.inf),
    "GARCH, t(6)": lambda name: simulated(name, 6.0),
    "share price": real,
}


def bridges() -> dict[str, Bridge]:
    def light(beta: float) -> LightSB:
        if math.isinf(beta):
            return LightSB(1, num_components=COMPONENTS, context_dim=3)
        return LightSBBM(1, num_components=COMPONENTS, beta=beta, context_dim=3)

    contenders: dict[str, Bridge] = {
        "LightSB, J = 1": LightSB(1, num_components=1, context_dim=3),
        "LightSB": light(math.inf),
    }
    contenders |= {f"beta = {b:g}": light(b) for b in BETAS}
    return contenders | {
        "tails, LightSB": TailMatched(light(math.inf)),
        f"tails, beta = {BETAS[-1]:g}": TailMatched(light(BETAS[-1])),
    }


def uniformity(levels: Tensor, v: Tensor) -> list[float]:
    """Kolmogorov-Smirnov p values of all, of the calm third, of the wild third."""
    low, high = v.quantile(1 / 3), v.quantile(2 / 3)
    parts = (levels, levels[v <= low], levels[v >= high])
    return [float(stats.kstest(part.numpy(), "uniform").pvalue) for part in parts]


def levels_of(bridge: Bridge, pairs: Pairs, num_draws: int = 100) -> Tensor:
    """Randomised ranks of the increments among draws: uniform, exactly, if the law is right."""
    draws = bridge(pairs.context).sample((num_draws,))[..., 0]
    below = (draws < pairs.increment[:, 0]).double().sum(0)
    return (below + torch.rand(len(below), dtype=F64)) / (num_draws + 1)


def slope(bridge: Bridge, pairs: Pairs, v: Tensor) -> float:
    """Regression of the log quadratic variation of the bridge's paths on log v."""
    rows = torch.randperm(len(v))[:200]
    states = bridge.paths(8, 64, pairs.context[rows])[1]
    variation = states.diff(dim=0).square().sum((0, -1)).mean(0)
    return float(np.polyfit(v[rows].log().numpy(), variation.log().numpy(), 1)[0])


def runs_of(bridge: Bridge, pairs: Pairs, length: int, burn: int = 200) -> tuple[Tensor, float]:
    """Free runs ``(length, n)`` from contexts of the data, without those that were lost; percent lost."""
    context = pairs.context[torch.randint(len(pairs.context), (RUNS,))]
    state, path, lost = context[:, 1:].exp(), [], torch.zeros(RUNS, dtype=torch.bool)
    for _ in range(burn + length):
        x = bridge(context).sample()[:, 0]
        lost |= ~(x.abs() < LOST)
        x = torch.where(lost, 0.1, x)
        path.append(x)
        state = realised(state, x)
        context = context_of(state, x)
    return torch.stack(path[burn:])[:, ~lost], 100 * float(lost.double().mean())


def autocorrelation(x: Tensor) -> Tensor:
    """At lags 1 to LAGS, over time and paths ``(T, n)``."""
    centred = x - x.mean()
    return torch.stack([(centred[:-k] * centred[k:]).mean() for k in range(1, LAGS + 1)]) / centred.square().mean()


def statistics(x: Tensor, goal: Tensor) -> list[float]:
    """Tails and clustering of paths ``(T, n)``: the columns of the table of free runs."""
    size = x.abs()
    flat = size.flatten().sort(descending=True).values
    k, r = max(30, len(flat) // 100), autocorrelation(size)
    return [
        float(x.std()),
        float(stats.kurtosis(x.flatten().numpy(), fisher=False)),
        *(float(np.quantile(flat.numpy(), q)) for q in (0.99, 0.999)),
        float(1 / (flat[:k] / flat[k]).log().mean()),
        *(float(r[k - 1]) for k in (1, 5, 20)),
        float(autocorrelation(x.square())[0]),
        float((r - goal).abs().mean()),
    ]


def by_path(x: Tensor, goal: Tensor) -> list[str]:
    """Median over paths [5 %, 95 %] of each statistic."""
    values = np.array([statistics(x[:, i : i + 1], goal) for i in range(x.shape[1])])
    return [f"{b:.2f} [{a:.2f}, {c:.2f}]" for a, b, c in np.quantile(values, [0.05, 0.5, 0.95], axis=0).T]


def truth_runs(series: Series, length: int) -> tuple[list[list[object]], Tensor]:
    """Rows of the truth, and its autocorrelations: from independent simulations, or of the one path that there is."""
    if series.observed is not None:
        goal = autocorrelation(series.observed.abs())
        rows = [["observed", "-", *(f"{v:.2f}" for v in statistics(series.observed, goal))]]
        for name, garch in series.references.items():
            rows.append([name, "-", *by_path(garch.simulate(RUNS, length), goal)])
        return rows, goal
    paths = [series.references["truth"].simulate(RUNS, length) for _ in range(REPLICATES)]
    curves = torch.stack([autocorrelation(x.abs()) for x in paths])
    others = [(curves.sum(0) - own) / (REPLICATES - 1) for own in curves]
    values = np.array([statistics(x, goal) for x, goal in zip(paths, others, strict=True)])
    name = f"truth, mean of {REPLICATES}"
    series.curves["truth"] = {"path": paths[0], "acf": curves.mean(0)}
    return [[name, "-", *map(float, values.mean(0))], ["its sd", "-", *map(float, values.std(0, ddof=1))]], curves.mean(
        0
    )


def fitted(bridge: Bridge, pairs: Pairs, num_steps: int) -> float:
    """CPU seconds of the fit."""
    torch.manual_seed(SEED)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the budget is the same for all, converged or not
        bridge.fit(pairs.increment, context=pairs.context, num_updates=num_steps, progress=False)
    return time.process_time() - begun


def studied(name: str, short: bool) -> tuple[Series, list[list[object]], list[list[object]]]:
    """A series, its rows of one-step scores and of free runs."""
    torch.manual_seed(SEED)
    series = SERIES[name](name)
    judge, (best, *_) = series.judge, series.references
    x, v = judge.increment[:, 0], judge.variances[best]
    length = 50 if short else LENGTH if series.observed is None else len(series.observed)
    one_step: list[list[object]] = []
    light: Tensor | None = None
    free, goal = truth_runs(series, length)
    against = torch.as_tensor(series.references[best].law(v).logpdf(x.numpy()))
    for reference, garch in series.references.items():
        law = garch.law(judge.variances[reference])
        levels = torch.as_tensor(law.cdf(x.numpy()))
        one_step.append([reference, compared(torch.as_tensor(law.logpdf(x.numpy())), against), "-"])
        one_step[-1] += [*uniformity(levels, v), math.nan, math.nan]
    one_step[0][1] = f"{float(against.mean()):.4f} itself"
    for label, bridge in bridges().items():
        seconds = fitted(bridge, series.learn, 50 if short else STEPS)
        levels = levels_of(bridge, judge)
        with torch.no_grad():
            score = bridge(judge.context).log_prob(judge.increment)
        light = score if label == "LightSB" else light
        gaps = [compared(score, against), "-" if light is None else compared(score, light)]
        one_step.append([label, *gaps, *uniformity(levels, v), slope(bridge, judge, v), seconds])
        runs, lost = runs_of(bridge, series.learn, length)
        free.append([label, lost, *(statistics if series.observed is None else by_path)(runs, goal)])
        print(name, one_step[-1], free[-1], flush=True)
        if label in SHOWN:
            series.curves[label] = {"path": runs, "acf": autocorrelation(runs.abs()), "levels": levels}
    return series, one_step, free


def compared(score: Tensor, against: Tensor) -> str:
    """Mean difference and its standard error."""
    gap = score - against
    return f"{float(gap.mean()):+.4f} +- {float(gap.std()) / math.sqrt(len(gap)):.4f}"


def survival(ax: Axes, x: Tensor, **style: object) -> None:
    size = x.abs().flatten().sort(descending=True).values
    share = (torch.arange(len(size)) + 1) / len(size)
    ax.loglog(size, share, **style)


def drawn(axes: list[Axes], series: Series) -> None:
    """Paths, autocorrelations, tails and probability transforms of one series."""
    truth = series.observed if series.observed is not None else series.curves["truth"]["path"]
    name = "observed" if series.observed is not None else "truth"
    axes[0].plot(truth[:LENGTH, 0], "k", lw=0.6, label=name)
    axes[1].plot(range(1, LAGS + 1), autocorrelation(truth.abs()), "k.-", label=name)
    survival(axes[2], truth, color="k", lw=2.5, label=name)
    for i, (label, colour) in enumerate(SHOWN.items()):
        curves = series.curves[label]
        axes[0].plot(curves["path"][:LENGTH, 0] - 12 * (i + 1), color=colour, lw=0.6, label=label)
        axes[1].plot(range(1, LAGS + 1), curves["acf"], color=colour, ls="--", label=label)
        survival(axes[2], curves["path"], color=colour, lw=1.2, label=label)
        axes[3].hist(
            curves["levels"], 20, range=(0, 1), density=True, histtype="step", color=colour, lw=1.4, label=label
        )
    noise = 1.96 * math.sqrt(20 / len(series.judge.increment))
    axes[3].axhspan(1 - noise, 1 + noise, color="0.85")
    axes[0].set(title=f"{series.name}: increments (runs shifted)", xlabel="step", ylim=(-48, 14))
    axes[1].set(title="autocorrelation of |x|", xlabel="lag")
    axes[2].set(title="share above", xlabel="|x|, standard deviations", ylim=(1e-5, 1), xlim=(0.3, 60))
    axes[3].set(title="probability transform, held-out", xlabel="level", ylim=(0, 2))
    for ax in axes:
        ax.legend(fontsize=7, loc="lower left" if ax is axes[2] else "upper right")


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    begun = time.process_time()
    fig, axes = plt.subplots(len(SERIES), 4, figsize=(18, 11), constrained_layout=True)
    one_step, free = (
        ["log lik.", "less LightSB's", "KS p", "calm", "wild", "slope", "CPU s"],
        ["lost %", "sd", "kurtosis", "q.99", "q.999"],
    )
    free += ["Hill", "r(1)", "r(5)", "r(20)", "r2(1)", "gap"]
    lines = [header("A heteroskedastic series: conditional increments, with and without volatility control", SEED)]
    lines += [NOTE.format(days=len(shares())), FREE]
    for name, row in zip(SERIES, axes, strict=True):
        series, scores, runs = studied(name, "--short" in sys.argv)
        drawn(list(row), series)
        lines += [f"\n{name}: one step", table([name, *one_step], scores)]
        lines += [f"\n{name}: free runs", table([name, *free], runs)]
    fig.savefig(RESULTS / "heteroskedastic.png", dpi=100)
    lines += [READING, f"{time.process_time() - begun:.0f} CPU s in all."]
    write("heteroskedastic", "\n".join(lines))


if __name__ == "__main__":
    main()
