r"""The next window of a real series given the past: VSDM and light bridges against a vector autoregression.

Run as `python -m benchmarks.conditional.time_series`; `--short` makes one fold and short fits, to try the script.

The scores are those of gluonts for the sum over the series. With S the sum of draws over the series, s that of the
truth, and sums below over all forecasts and steps,

.. math:: \text{CRPS-sum} = \tfrac{1}{19} \sum_{q = .05, .1, \ldots, .95}
    \frac{\sum 2\, |(Q_q(S) - s)(1[s \le Q_q(S)] - q)|}{\sum |s|} , \quad
    \text{ND-sum} = \frac{\sum |Q_{.5}(S) - s|}{\sum |s|} , \quad
    \text{NRMSE-sum} = \frac{(\text{mean} (E S - s)^2)^{1/2}}{\text{mean} |s|} .
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

from benchmarks.lib.fits import quiet
from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import command
from pyro_sb.bridges import VSDM, Bridge, LightSB

SEED, SEEDS, DRAWS, F64 = 0, 3, 200, torch.float64
LEVELS = torch.arange(1, 20, dtype=F64) / 20
MAX_ORDER = 10
STEPS = {"VSDM": 500, "light": 300}
COLUMNS = ["", "CRPS-sum", "sd", "ND-sum", "sd", "NRMSE-sum", "sd", "in 90 %", "CPU s"]


def crps_sum(draws: Tensor, truth: Tensor) -> float:
    """Mean weighted quantile loss of the sum over the series.

    Args:
        draws: Shape ``(draws, forecasts, steps, series)``.
        truth: Shape ``(forecasts, steps, series)``.
    """
    sums, truth = draws.sum(-1), truth.sum(-1)
    levels = LEVELS.to(sums)[:, None, None]
    quantiles = torch.quantile(sums, LEVELS.to(sums), dim=0)
    losses = 2 * ((quantiles - truth) * ((truth <= quantiles).to(sums) - levels)).abs()
    return float(losses.sum((1, 2)).mean() / truth.abs().sum())


def nd_sum(draws: Tensor, truth: Tensor) -> float:
    """Absolute error of the median of the sum, over the sum's mean size. Shapes as in `crps_sum`."""
    truth = truth.sum(-1)
    return float((torch.quantile(draws.sum(-1), 0.5, dim=0) - truth).abs().sum() / truth.abs().sum())


def nrmse_sum(draws: Tensor, truth: Tensor) -> float:
    """Root mean square error of the mean of the sum, over the sum's mean size. Shapes as in `crps_sum`."""
    truth = truth.sum(-1)
    return float((draws.sum(-1).mean(0) - truth).square().mean().sqrt() / truth.abs().mean())


def cover_sum(draws: Tensor, truth: Tensor) -> float:
    """Share of sums within the draws' central 90 %, in per cent. Shapes as in `crps_sum`."""
    low, high = torch.quantile(draws.sum(-1), torch.tensor([0.05, 0.95]).to(draws), dim=0)
    inside = (truth.sum(-1) >= low) & (truth.sum(-1) <= high)
    return 100 * float(inside.double().mean())


SCORES = (crps_sum, nd_sum, nrmse_sum)


class Series(NamedTuple):
    """A series, how it is split, and what of the past a forecast sees.

    Args:
        values: Shape ``(time, series)``.
        last: How many of the last values are in the context.
        means: Lengths of the windows whose means are in the context.
        horizons: Steps ahead.
        cuts: First times of the folds' test parts: all before is learnt from.
        length: Of a test part.
    """

    name: str
    values: Tensor
    last: int
    means: tuple[int, ...]
    horizons: tuple[int, int]
    cuts: tuple[int, ...]
    length: int

    @property
    def past(self) -> int:
        return max(self.last, *self.means)

    def origins(self, begin: int, end: int, horizon: int) -> Tensor:
        """First steps of all windows within [begin, end), with enough before them."""
        return torch.arange(max(begin, self.past), end - horizon + 1)

    def contexts(self, values: Tensor, origins: Tensor) -> Tensor:
        """Last values, then means. Shape ``(forecasts, (last + len(means)) * series)``."""
        recent = [values[origins - k] for k in range(1, self.last + 1)]
        means = [torch.stack([values[i - length : i].mean(0) for i in origins]) for length in self.means]
        return torch.cat(recent + means, -1)


def windows(values: Tensor, origins: Tensor, horizon: int) -> Tensor:
    """Shape ``(forecasts, horizon, series)``."""
    return torch.stack([values[i : i + horizon] for i in origins])


class Autoregression:
    """Vector autoregression by least squares with a constant and Gaussian residuals; the order by a criterion.

    Args:
        values: The training part. Shape ``(time, series)``.
        criterion: "AIC" or "BIC", compared on the same times for all orders.
    """

    def __init__(self, values: Tensor, criterion: str) -> None:
        count = len(values) - MAX_ORDER
        price = 2.0 if criterion == "AIC" else float(np.log(count))

        def cost(order: int) -> float:
            rest = self._fit(values[MAX_ORDER - order :], order)[1]
            size = values.shape[1]
            return float(torch.logdet(rest.T @ rest / count)) + price * size * (size * order + 1) / count

        self.order = min(range(1, MAX_ORDER + 1), key=cost)
        self.slope, rest = self._fit(values, self.order)
        self.factor = torch.linalg.cholesky(rest.T @ rest / (len(rest) - len(self.slope)))

    @staticmethod
    def _fit(values: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Coefficients, and residuals."""
        count = len(values) - order
        past = [values[order - k : len(values) - k] for k in range(1, order + 1)]
        rows = torch.cat([torch.ones(count, 1).to(values), *past], -1)
        slope = torch.linalg.lstsq(rows, values[order:]).solution
        return slope, values[order:] - rows @ slope

    def draws(self, values: Tensor, origins: Tensor, horizon: int, num: int) -> Tensor:
        """Simulated futures ``(num, forecasts, horizon, series)``."""
        one = torch.ones(num, len(origins), 1).to(values)
        past = [values[origins - k].expand(num, -1, -1) for k in range(1, self.order + 1)]
        steps: list[Tensor] = []
        for _ in range(horizon):
            mean = torch.cat([one, *past], -1) @ self.slope
            steps.append(mean + torch.randn_like(mean) @ self.factor.T)
            past = [steps[-1], *past[:-1]]
        return torch.stack(steps, -2)


class Regression:
    """Least squares of whole windows on contexts: what both light bridges start from, and a row of its own."""

    def __init__(self, contexts: Tensor, targets: Tensor) -> None:
        one = torch.ones(len(contexts), 1).to(contexts)
        self.slope = torch.linalg.lstsq(torch.cat([one, contexts], -1), targets).solution
        self.rest = targets - self.mean(contexts)
        self.factor = torch.linalg.cholesky(self.rest.T @ self.rest / (len(contexts) - len(self.slope)))

    def mean(self, contexts: Tensor) -> Tensor:
        return self.slope[0] + contexts @ self.slope[1:]

    def draws(self, contexts: Tensor, num: int) -> Tensor:
        mean = self.mean(contexts)
        return mean + torch.randn(num, *mean.shape).to(mean) @ self.factor.T


class Fold:
    """Training and test windows of one split, standardised by the training part."""

    def __init__(self, series: Series, cut: int, horizon: int) -> None:
        train = series.values[:cut]
        self.values = (series.values - train.mean(0)) / train.std(0)
        end = min(cut + series.length, len(self.values))
        before, self.origins = series.origins(0, cut, horizon), series.origins(cut, end, horizon)
        self.horizon, self.cut = horizon, cut
        self.train, self.truth = (windows(self.values, o, horizon) for o in (before, self.origins))
        contexts = series.contexts(self.values, before)
        location, scale = contexts.mean(0), contexts.std(0)
        self.contexts = (contexts - location) / scale
        self.asked = (series.contexts(self.values, self.origins) - location) / scale
        self.held_out = (torch.arange(len(before)) // 20) % 7 == 3  # whole blocks: neighbours overlap

    def shaped(self, draws: Tensor) -> Tensor:
        return draws.unflatten(-1, self.truth.shape[1:])


def narrow(context_dim: int) -> nn.Module:
    """Two features of the context, half of it dropped while learning: few draws, and the regression sees it all."""
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(context_dim, 2), nn.Tanh()).to(F64)


def fitted(bridge: Bridge, target: Tensor, fold: Fold, **options: float) -> Bridge:
    with quiet():
        bridge.fit(target, context=fold.contexts, held_out=fold.held_out, progress=False, **options)
    return bridge.eval()


def contenders(short: bool) -> dict[str, Callable[[Fold], Tensor]]:
    """Name to what draws futures ``(draws, forecasts, horizon, series)`` for a fold, fitted there."""
    steps = dict.fromkeys(STEPS, 20) if short else STEPS

    def unconditional(fold: Fold) -> Tensor:
        return fold.train[torch.randint(len(fold.train), (DRAWS, len(fold.truth)))]

    def autoregression(criterion: str) -> Callable[[Fold], Tensor]:
        return lambda fold: Autoregression(fold.values[: fold.cut], criterion).draws(
            fold.values, fold.origins, fold.horizon, DRAWS
        )

    def gaussian(fold: Fold) -> Tensor:
        return fold.shaped(Regression(fold.contexts, fold.train.flatten(1)).draws(fold.asked, DRAWS))

    def vsdm(fold: Fold) -> Tensor:
        target, context_dim = fold.train.flatten(1), fold.contexts.shape[1]
        bridge = VSDM(
            target.shape[1],
            context_dim=context_dim,
            step_covariance="analytic",
            hidden=(64, 64),
            embedding=narrow(context_dim),
        )
        fitted(bridge, target, fold, num_updates=steps["VSDM"], learning_rate=1e-3, ema=0.99, batch_size=256)
        return fold.shaped(bridge(fold.asked).sample((DRAWS,)))

    def light(covariance: str, num_components: int) -> Callable[[Fold], Tensor]:
        def draws(fold: Fold) -> Tensor:
            regression = Regression(fold.contexts, fold.train.flatten(1))
            dim, context_dim = regression.rest.shape[1], fold.contexts.shape[1]
            bridge = LightSB(
                dim,
                num_components=num_components,
                context_dim=context_dim,
                covariance=covariance,
                hidden=(32,),
                dropout=0.3,
            )
            fitted(bridge, regression.rest, fold, num_updates=steps["light"], learning_rate=1e-3, batch_size=256)
            return fold.shaped(regression.mean(fold.asked) + bridge(fold.asked).sample((DRAWS,)))

        return draws

    return {
        "unconditional draws": unconditional,
        "VAR, order by BIC": autoregression("BIC"),
        "VAR, order by AIC": autoregression("AIC"),
        "Gaussian regression": gaussian,
        "VSDM": vsdm,
        "light, diagonal, J = 8": light("diagonal", 8),
    }


def google() -> Series:
    """Log return, log range and log volume of a trading day."""
    prices = np.load(get_sample_data("goog.npz", asfileobj=False))["price_data"]
    returns, spread = np.diff(np.log(prices["adj_close"])), np.log(np.log(prices["high"] / prices["low"]))[1:]
    values = torch.as_tensor(np.column_stack([returns, spread, np.log(prices["volume"])[1:]]))
    return Series("GOOG, trading days", values, 1, (5, 22), (5, 10), (500, 640, 780, 900), 140)


def brain() -> Series:
    """Four channels of an electroencephalogram."""
    with get_sample_data("eeg.dat") as file:
        values = torch.as_tensor(np.fromfile(file, dtype=float).reshape(800, 4))
    return Series("EEG, four channels", values, 2, (8,), (4, 8), (500, 700), 100)


def studied(series: Series, horizon: int, short: bool) -> tuple[list[list[object]], list[list[object]]]:
    """Scores, means over folds with their deviation over seeds; and CRPS-sum of each fold."""
    rows, by_fold = [], []
    for name, draw in contenders(short).items():
        begun, scores, cover = time.process_time(), [], []
        for seed in range(SEED, SEED + (1 if short else SEEDS)):
            folds = []
            for cut in series.cuts[: 1 if short else None]:
                fold = Fold(series, cut, horizon)
                torch.manual_seed(seed)
                draws = draw(fold)
                folds.append([score(draws, fold.truth) for score in SCORES])
                cover.append(cover_sum(draws, fold.truth))
            scores.append(folds)
        figures = torch.tensor(scores, dtype=F64)  # (seeds, folds, scores)
        means, fits = figures.mean(1), figures.shape[0] * figures.shape[1]
        deviations = means.std(0) if len(means) > 1 else torch.full((len(SCORES),), torch.nan)
        cells: list[object] = [name]
        for mean, deviation in zip(means.mean(0), deviations, strict=True):
            cells += [float(mean), float(deviation)]
        rows.append([*cells, float(np.mean(cover)), (time.process_time() - begun) / fits])
        by_fold.append([name, *(float(v) for v in figures[..., 0].mean(0))])
        print(series.name, horizon, *rows[-1], flush=True)
    return rows, by_fold


NOTE = """Forecast: the joint law of the next h steps of all series given the past, at every time of a test part
(windows overlap). Data ship with matplotlib. GOOG: 1,046 trading days from August 2004 to October 2008; log return,
log of the log range (high over low), log volume. EEG: 800 samples of 4 channels. Series are standardised by their
training part, so a sum weighs them alike. Folds: all before the test part is learnt from, nothing is refitted.
Context of the bridges and of 'Gaussian regression' (least squares of the whole window, Gaussian rest): of GOOG the
last day and the means of the last 5 and 22 (day, week, month); of EEG the last two samples and the mean of the last
8; standardised. VSDM regresses on all of it by itself; its net sees two features of it, with dropout. The light
bridges learn what least squares leaves. VAR: order 1 to {most}, chosen on the training part; simulated step by step.
Unconditional: windows of the training part at random. {draws} draws a forecast. Means over folds; sd: of that mean over
{seeds} seeds. in 90 %: truths within the draws' central 90 %. CPU s: a fit and its draws.
How the settings of the bridges were found: by these folds of GOOG at h = 5, seed 0, with some ten settings tried;
first trials also ran h = 10 and EEG, which did not decide."""


def main() -> None:
    short, begun = command(__doc__, short=True).short, time.process_time()
    note = NOTE.format(most=MAX_ORDER, draws=DRAWS, seeds=SEEDS)
    lines = [header("The next window of a series given the past", SEED), note]
    for series in (google(), brain()):
        for horizon in series.horizons:
            rows, by_fold = studied(series, horizon, short)
            orders = [[Autoregression(series.values[:cut], c).order for cut in series.cuts] for c in ("BIC", "AIC")]
            lines += [
                f"\n{series.name}, h = {horizon}. Orders of the VAR in the folds: BIC {orders[0]}, AIC {orders[1]}.",
                table(COLUMNS, rows),
                "CRPS-sum by fold:",
                table(["", *(f"from {cut}" for cut in series.cuts)][: len(by_fold[0])], by_fold),
            ]
    lines += [reading("time_series").rstrip(), f"{time.process_time() - begun:.0f} CPU s in all."]
    write("time_series", "\n".join(lines), keep=not short)


if __name__ == "__main__":
    main()
