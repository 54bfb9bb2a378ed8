"""Rates at which diagnostics are right: SBC, TARP, local C2ST on planted errors, the mode audit on a missing mode.

Exact posteriors in closed form and the same spoilt on purpose, many repetitions each; then chains that all miss a mode
of their target, with R-hat under 1.01, and chains that do not. Run as
`python -m benchmarks.calibration.rates`; `--short` tries the script, `--only` runs one part.
"""

import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import command
from pyro_sb.diagnostics import Calibration, LocalC2ST, mode_audit, sbc, tarp
from pyro_sb.diagnostics.export.container import chain_figures, to_container
from pyro_sb.infer.model.log_joint import LogJoint

SEED, L, F64 = 0, 99, torch.float64
CHAINS, DRAWS, THIN, STEP = 8, 500, 25, 1.0  # of the random walk
PARTS = ("mode_audit_rates", "calibration_rates", "local_c2st_rates")
NOTE = """Truths theta ~ N(0, I_P), data y = theta + N(0, I_P), exact posterior N(y / 2, I / 2); {draws} draws for each
of S data sets. Planted: every posterior sd 20 % too small; a shift of a quarter of a posterior sd; correlation .6
between the P parameters' draws, with exact marginals. Shares of {reps} repetitions, s.e. at most {error:.3f}.
KS, bands: p of at least one parameter under .05 / P (Bonferroni), by Kolmogorov and Smirnov and by the ECDF's
simultaneous bands. look, bad: verdicts of `Calibration.verdict` (bands, p P under .05 and under .01). TARP: p of the
bands under .05. An exact posterior should give .05, .05, .05, .01, .05."""
LOCAL_NOTE = """Local C2ST at y = (0, 0), P = 2, {sets} data sets, 300 draws at y, 19 null classifiers: shares of {reps}
repetitions. look, bad: verdicts (`tail_p_value` up to .05 and up to .01). An exact posterior should give .05 and .01.
score: median of 1/2 + root mean square of d - 1/2; floor: the same of the null."""
MODES_NOTE = """Two unit normals 16 sds apart with weights .3 and .7; {chains} chains of {draws} draws (of {thin} steps
each) by a random walk, all started in the heavier mode ("stuck"), and independent draws of the target ("exact").
R-hat < 1.01: share of runs whose largest rank-normalised split R-hat is. found: verdict "bad", the missing mode named,
among the runs that R-hat passes. alarm: verdict "bad"; look: verdict "look". {reps} repetitions, 95 % interval of a
share in brackets (Wilson); populations of 1,024."""


def spoilt(y: Tensor, what: str, num: int = L) -> Tensor:
    """Posterior draws ``(num, *y.shape)``, wrong as asked."""
    noise = torch.randn(num, *y.shape, dtype=F64)
    if what == "sd 20 % too small":
        noise *= 0.8
    if what == "shift of .25 sd":
        noise += 0.25
    if what == "correlation .6":
        common = torch.randn(num, *y.shape[:-1], 1, dtype=F64)
        noise = math.sqrt(0.4) * noise + math.sqrt(0.6) * common
    return y / 2 + math.sqrt(0.5) * noise


def calibration_rates(what: str, sets: int, dim: int, reps: int) -> list[float]:
    """Shares of repetitions in which each test speaks."""
    ks, bands, joint = [], [], []
    for _ in range(0, reps, 50):
        theta = torch.randn(sets, 50, dim, dtype=F64)
        draws = spoilt(theta + torch.randn(sets, 50, dim, dtype=F64), what)
        made = Calibration.of(theta.flatten(1), draws.flatten(2))  # repetitions as parameters: one null for all
        ks.append(made.p_values.reshape(50, dim).amin(1) * dim)
        bands.append(made.band_p_values.reshape(50, dim).amin(1) * dim)
        balls = [tarp(draws[:, :, r], theta[:, r]).uniforms for r in range(50)]
        columns = torch.cat(balls, 1)
        joint.append(Calibration(columns.long(), ("",) * 50, L, columns).band_p_values)
    p = [torch.cat(part)[:reps] for part in (ks, bands, joint)]
    shares = [p[0] < 0.05, p[1] < 0.05, p[1] <= 0.05, p[1] <= 0.01, p[2] < 0.05]
    return [float(share.double().mean()) for share in shares]


def through_sbc(scale: float, reps: int) -> float:
    """Share of verdicts "bad" of `sbc` on a Pyro model with a user's sampler, 200 data sets."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0))

    def sampler(y: Tensor) -> dict[str, Tensor]:
        return {"mu": y / 2 + scale * math.sqrt(0.5) * torch.randn(L)}

    return float(np.mean([sbc(model, 200, L, sampler=sampler).verdict == "bad" for _ in range(reps)]))


def local_rates(what: str, sets: int, reps: int) -> list[object]:
    """Shares of "look" or "bad" and of "bad", and the median score with its floor."""
    found = []
    for _ in range(reps):
        theta = torch.randn(sets, 2, dtype=F64)
        y = theta + torch.randn(sets, 2, dtype=F64)
        at = torch.zeros(2, dtype=F64)
        there = spoilt(at.expand(300, 2), what, 1)[0]
        found.append(LocalC2ST.of(theta, spoilt(y, what, 1)[0], y, at, there, num_null=19))
    return [
        float(np.mean([one.verdict != "ok" for one in found])),
        float(np.mean([one.verdict == "bad" for one in found])),
        float(np.median([float(one.score) for one in found])),
        float(np.median([one.score.floor for one in found])),
    ]


def two_modes(dim: int) -> tuple[LogJoint, Tensor]:
    """The target, and where its heavier mode lies; the other lies opposite."""
    centre = torch.zeros(dim, dtype=F64)
    centre[0] = 8.0
    logs = torch.tensor([0.7, 0.3], dtype=F64).log()[:, None]

    def log_prob(z: Tensor) -> Tensor:
        squares = torch.stack([(z - centre).square().sum(-1), (z + centre).square().sum(-1)])
        return torch.logsumexp(logs - squares / 2, 0)

    return LogJoint.from_batched(log_prob, dim), centre


def walk(joint: LogJoint, start: Tensor) -> Tensor:
    """Random-walk Metropolis from exact draws of one mode. Shape ``(chain, draw, dim)``."""
    x, kept = start, []
    value = joint.log_prob(x)
    for step in range(DRAWS * THIN):
        proposal = x + min(STEP, 2.4 / math.sqrt(x.shape[1])) * torch.randn_like(x)
        new = joint.log_prob(proposal)
        accept = torch.rand_like(value).log() < new - value
        x, value = torch.where(accept[:, None], proposal, x), torch.where(accept, new, value)
        if step % THIN == THIN - 1:
            kept.append(x)
    return torch.stack(kept, 1)


def interval(hits: int, num: int) -> str:
    """A share with Wilson's 95 % interval."""
    if num == 0:
        return "-"
    z, p = 1.96, hits / num
    middle, half = p + z * z / (2 * num), z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    low, high = (middle - half) / (1 + z * z / num), (middle + half) / (1 + z * z / num)
    return f"{hits}/{num} = {p:.2f} [{low:.2f}, {high:.2f}]"


def mode_rates(dim: int, reps: int) -> list[list[object]]:
    """A row for stuck chains, and one for exact draws."""
    joint, centre = two_modes(dim)
    rows: list[list[object]] = []
    for what in ("stuck", "exact"):
        pyro.set_rng_seed(SEED)
        if what == "stuck":  # all repetitions' chains walk side by side
            runs = walk(joint, centre + torch.randn(reps * CHAINS, dim, dtype=F64)).split(CHAINS)
        else:
            side = torch.where(torch.rand(reps * CHAINS, DRAWS, 1) < 0.7, 1.0, -1.0).to(F64)
            runs = (side * centre + torch.randn(reps * CHAINS, DRAWS, dim, dtype=F64)).split(CHAINS)
        passed, found, alarm, look, begun = 0, 0, 0, 0, time.process_time()
        for draws in runs:
            quiet = bool((chain_figures(to_container({"posterior": {"z": draws.numpy()}})).r_hat < 1.01).all())
            audit = mode_audit(joint, draws, progress=False)
            passed += quiet
            found += quiet and audit.verdict == "bad" and len(audit.missing) > 0
            alarm += audit.verdict == "bad"
            look += audit.verdict == "look"
        spent = (time.process_time() - begun) / reps
        hit = interval(found, passed) if what == "stuck" else "-"
        rows.append([what, dim, interval(passed, reps), hit, interval(alarm, reps), interval(look, reps), spent])
        print(rows[-1], flush=True)
    return rows


def modes_table(reps: int) -> list[str]:
    """The mode audit's half."""
    rows = [row for dim in (2, 10) for row in mode_rates(dim, reps)]
    columns = ["chains", "dim", "R-hat < 1.01", "found", "alarm", "look", "CPU s"]
    return [MODES_NOTE.format(chains=CHAINS, draws=DRAWS, thin=THIN, reps=reps), "", table(columns, rows)]


def local_tables(sets: int, reps: int) -> list[str]:
    """The part of local C2ST."""
    local = [[what, *local_rates(what, sets, reps)] for what in ("exact", "sd 20 % too small", "correlation .6")]
    columns = ["posterior", "look or bad", "bad", "score", "floor"]
    return [LOCAL_NOTE.format(sets=sets, reps=reps), "", table(columns, local)]


def calibration_tables(reps: int, through: int) -> list[str]:
    """The part of SBC and TARP."""
    rows: list[list[object]] = []
    for what in ("exact", "sd 20 % too small", "shift of .25 sd", "correlation .6"):
        for dim, num in ((1, 200), (1, 500), (1, 1000), (4, 500)):
            if dim > 1 or what != "correlation .6":
                rows.append([what, dim, num, *calibration_rates(what, num, dim, reps)])
                print(rows[-1], flush=True)
    columns = ["posterior", "P", "S", "KS", "bands", "look or bad", "bad", "TARP"]
    parts = [NOTE.format(draws=L, reps=reps, error=0.5 / math.sqrt(reps)), "", table(columns, rows)]
    shares = [through_sbc(scale, through) for scale in (1.0, 0.8)]
    parts.append(
        f'\nThrough `sbc(model, sampler=...)`, one parameter, 200 data sets, {through} repetitions: verdict "bad"\n'
        f"for the exact sampler {shares[0]:.2f}, for sd 20 % too small {shares[1]:.2f}."
    )
    return parts


def main() -> None:
    """Run the parts, write a table each."""
    asked = command(__doc__, short=True, only={"choices": PARTS, "help": "one part"})
    short = asked.short
    for name, title, parts in (
        ("mode_audit_rates", "How often the mode audit is right", lambda: modes_table(2 if short else 100)),
        (
            "calibration_rates",
            "How often calibration's tests are right",
            lambda: calibration_tables(*((50, 2) if short else (1000, 100))),
        ),
        (
            "local_c2st_rates",
            "How often the local classifier test is right",
            lambda: local_tables(*((200, 2) if short else (500, 30))),
        ),
    ):
        if asked.only in (None, name):
            pyro.set_rng_seed(SEED)
            write(name, "\n".join([header(title, SEED), *parts()]), keep=not short)


if __name__ == "__main__":
    main()
