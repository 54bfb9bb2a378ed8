"""Simulation-based calibration of amortised posteriors, alone and corrected, on a Gaussian and a Poisson regression.

Run as `python -m benchmarks.calibration.posteriors`; `--short` tries the script.
"""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.lib.fits import timed
from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import command
from pyro_sb.datasets import gaussian_linear
from pyro_sb.diagnostics import Calibration, sbc
from pyro_sb.infer import AmortizedPosterior
from pyro_sb.infer.amortized.simulator import simulator

SEED, SIMULATIONS, DATA_SETS, DRAWS = 0, 10_000, 500, 100
FEW = 200  # data sets where each draw is dear
WAYS: tuple[tuple[str, str, bool | str, int], ...] = (
    ("light", "bridge alone", False, DATA_SETS),
    ("light", "importance", "importance", DATA_SETS),
    ("light", "mcmc", "mcmc", FEW),
    ("vsdm", "bridge alone", False, DATA_SETS),
    ("vsdm", "importance", "importance", FEW),
)
LEVELS = (0.5, 0.9)
COLUMNS = ["fit", "draws", "sets", "worst KS p", "parameter", "p of each parameter", "in 50 %", "in 90 %", "s"]
NOTE = """Fresh data sets of the model, {draws} posterior draws for each, ranks of the true parameters among them.
{simulations} simulations a fit, defaults, one thread; seed {fit_seed} before each fit, {sbc_seed} before each SBC,
whose data sets are so the same for all rows of a table (their noise is common: compare with the row `exact`).
KS p: Kolmogorov-Smirnov of (rank + U) / {bins} against the uniform law, for every parameter in the model's order.
In 50 %, 90 %: smallest and largest share over the parameters of the truths that lie in the central interval;
s.e. {half:.3f} and {ninety:.3f} of one at {data_sets} sets.
bridge alone: uncorrected draws. importance: resampled from 2,000 weighted draws a data set. mcmc: last states of
{draws} chains a data set. s: CPU seconds of drawing for all data sets.
gaussian_linear: 10 latents, known posterior N(y / 2, .05 I), whose own draws are the row `exact`.
poisson_regression: 50 counts, rate exp(intercept + x . slope), three covariates given as a model argument, priors
N(1, .5) and N(0, .4)."""


def poisson_regression(x: Tensor) -> None:
    """Fifty counts with a log-linear rate: an intercept and three slopes."""
    intercept = pyro.sample("intercept", dist.Normal(1.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 0.4).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson(torch.exp(intercept[..., None] + (x * slope[..., None, :]).sum(-1))))


def covariates() -> Tensor:
    """Three standardised covariates of fifty rows, two of them correlated. Shape ``(50, 3)``."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(50, 3, generator=generator)
    x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
    return (x - x.mean(0)) / x.std(0)


def exact_gaussian(num: int, draws: int) -> Calibration:
    """The known posterior of gaussian_linear, on the data sets that `sbc` makes of the same seed."""
    theta, y = simulator(gaussian_linear).simulate(num)
    return Calibration.of(theta, y / 2 + 0.05**0.5 * torch.randn(draws, num, 10), [f"theta[{i}]" for i in range(10)])


def line(fit: str, way: str, calibration: Calibration, seconds: float) -> list[Any]:
    """A row of the table."""
    name, p = calibration.worst
    spans = [f"{float(row.min()):.3f}-{float(row.max()):.3f}" for row in calibration.coverage(LEVELS)]
    each = " ".join(f"{float(value):.2f}".removeprefix("0") for value in calibration.p_values)
    return [fit, way, len(calibration.ranks), p, name, each, *spans, seconds]


def main() -> None:
    """Fit, calibrate, write the tables."""
    short = command(__doc__, short=True).short
    simulations, share = (500, 0.1) if short else (SIMULATIONS, 1.0)
    more: dict[str, Any] = {"num_updates": 50} if short else {}
    tables = []
    for name, model, args in (
        ("gaussian_linear", gaussian_linear, ()),
        ("poisson_regression", poisson_regression, (covariates(),)),
    ):
        rows, notes, fits = [], [], {}
        if name == "gaussian_linear":
            pyro.set_rng_seed(SEED + 1)
            rows.append(line("-", "exact", *timed(exact_gaussian, int(share * DATA_SETS), DRAWS)))
        for bridge, way, corrected, num in WAYS:
            if bridge not in fits:
                pyro.set_rng_seed(SEED)
                fits[bridge] = AmortizedPosterior(model, bridge=bridge)
                _, fitted = timed(fits[bridge].fit, *args, num_simulations=simulations, progress=False, **more)
                notes.append(f"fit of {bridge}: {fitted:.0f} CPU s")
            pyro.set_rng_seed(SEED + 1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = timed(sbc, fits[bridge], int(share * num), DRAWS, corrected=corrected)
            rows.append(line(bridge, way, *made))
            said = sorted({str(warning.message) for warning in caught})
            notes += [f"{bridge}, {way}: {len(said)} warnings, the last: {said[-1]}"] if said else []
            print(rows[-1], flush=True)
        tables.append("\n".join([f"\n{name}", table(COLUMNS, rows), *notes]))
    se = [(level * (1 - level) / DATA_SETS) ** 0.5 for level in LEVELS]
    note = NOTE.format(
        data_sets=DATA_SETS,
        draws=DRAWS,
        simulations=f"{simulations:,}",
        bins=DRAWS + 1,
        half=se[0],
        ninety=se[1],
        fit_seed=SEED,
        sbc_seed=SEED + 1,
    )
    text = [header("Calibration of amortised posteriors", SEED), note, *tables, reading("calibration")]
    write("calibration", "\n".join(text), keep=not short)


if __name__ == "__main__":
    main()
