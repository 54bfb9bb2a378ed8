"""A learned likelihood beside the exact one: drift-diffusion choices and times, density by density and in a hierarchy.

Runs in .venv-bench for sbi's MNLE (without sbi its row is left out), on one thread:
`.venv-bench/bin/python -m benchmarks.amortised.likelihood`; `--short` tries it. Finished cells are in
results/likelihood.json.
"""

import math
import time
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.infer import AmortizedLikelihood

SEED, SUBJECTS, TRIALS, TESTED = 0, 20, 100, 20_000
LOW, HIGH = torch.tensor([-3.0, 0.4, 0.05]), torch.tensor([4.0, 3.0, 0.8])  # drift, boundary, non-decision time
PROPOSAL = dist.Uniform(LOW, HIGH).to_event(1)
GROUP = {"drift": (1.0, 0.5), "boundary": (0.2, 0.2), "delay": (-1.2, 0.15)}  # mean and sd; the last two by logarithm
START = {"mean_drift": 1.0, "mean_boundary": 0.2, "mean_delay": -2.0}  # a delay below every time: else no density
TERMS = 8
NOTE = """Drift-diffusion between two boundaries from the middle: drift v, boundary a, non-decision time t0; one trial
is a choice and a time. Exact density: the series of Navarro and Fuss (2009), {terms} terms a side. Simulations: the
series' own law, by its distribution function on a grid; parameters uniform on v [-3, 4], a [.4, 3], t0 [.05, .8].
KL: mean of exact less learned log density over {tested:,} fresh trials, nats a trial, with its standard error; seconds:
of the fit, CPU. MNLE: sbi's mixed likelihood estimator with its defaults on the same simulations.
Hierarchy: {subjects} subjects x {trials} trials, v ~ N(mu, s), log a and log t0 alike, NUTS (Pyro, one chain, {warmup}
+ {draws}) with the exact density and with the learned one at the site: the group's parameters, and their difference in
posterior deviations."""


def log_first_passage(time: Tensor, drift: Tensor, boundary: Tensor, upper: Tensor) -> Tensor:
    """Log density of reaching a boundary at a time, starting in the middle; both boundaries' shapes are the same."""
    s = (time / boundary.square()).clamp_min(1e-6)
    k = torch.arange(-TERMS, TERMS + 1, dtype=s.dtype)
    ends = 0.5 + 2 * k
    early = (ends * torch.exp(-(ends.square() - 0.25) / (2 * s[..., None].clamp_max(1.0)))).sum(-1)
    early = early.clamp_min(1e-30).log() - 1 / (8 * s) - 0.5 * math.log(2 * math.pi) - 1.5 * s.log()
    n = torch.arange(1, 2 * TERMS, dtype=s.dtype)
    slow = s[..., None].clamp_min(0.2)
    late = (n * torch.sin(0.5 * math.pi * n) * torch.exp(-(n.square() - 1) * math.pi**2 * slow / 2)).sum(-1)
    late = math.log(math.pi) + late.clamp_min(1e-30).log() - math.pi**2 * s / 2
    shape = torch.where(s < 0.35, early, late)
    sign = torch.where(upper > 0.5, 1.0, -1.0)
    return shape - 2 * boundary.log() + sign * drift * boundary / 2 - drift.square() * time / 2


class DriftDiffusion(dist.TorchDistribution):
    """Exact law of a choice and a time."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector

    def __init__(self, theta: Tensor, batch_shape: torch.Size | None = None) -> None:
        self.theta = theta
        super().__init__(theta.shape[:-1] if batch_shape is None else batch_shape, torch.Size([2]), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "DriftDiffusion":
        return DriftDiffusion(self.theta, torch.Size(batch_shape))

    def log_prob(self, y: Tensor) -> Tensor:
        drift, boundary, delay = self.theta.unbind(-1)
        time = y[..., 1] - delay
        value = log_first_passage(time.clamp_min(1e-4), drift, boundary, y[..., 0])
        return torch.where(time > 1e-4, value, value - 1e3 * (1e-4 - time))  # a slope back to where there is a density


def simulate(theta: Tensor) -> Tensor:
    """A trial a row."""
    return torch.cat([some_trials(rows) for rows in theta.split(500)])


def some_trials(theta: Tensor) -> Tensor:
    drift, boundary, delay = theta.double().unbind(-1)
    upper = torch.bernoulli(torch.sigmoid(drift * boundary))
    grid = torch.exp(torch.linspace(math.log(0.004), math.log(12.0), 600, dtype=torch.float64))
    at = grid * boundary[:, None].square()  # given the choice the time has one law
    log_p = log_first_passage(at, drift[:, None], boundary[:, None], torch.ones_like(at))
    mass = torch.cumulative_trapezoid(log_p.exp(), at, dim=1)
    cdf = torch.cat([torch.zeros_like(mass[:, :1]), mass], 1) / mass[:, -1:]
    u = torch.rand(len(theta), 1, dtype=torch.float64)
    i = torch.searchsorted(cdf, u).clamp(1, len(grid) - 1)
    low, high = cdf.gather(1, i - 1), cdf.gather(1, i)
    share = (u - low) / (high - low).clamp_min(1e-12)
    time = at.gather(1, i - 1) + share * (at.gather(1, i) - at.gather(1, i - 1))
    return torch.stack([upper, time[:, 0] + delay], 1).to(theta)


def hierarchy(y: Tensor, law: Any) -> None:
    """Subjects whose three parameters vary about a group's."""
    found = {}
    for name, wide in (("drift", 2.0), ("boundary", 1.0), ("delay", 1.0)):
        centre = {"drift": 0.0, "boundary": 0.0, "delay": -1.0}[name]
        mean = pyro.sample(f"mean_{name}", dist.Normal(centre, wide))
        spread = pyro.sample(f"spread_{name}", dist.LogNormal(-1.2, 0.5))
        with pyro.plate(f"subjects_{name}", len(y), dim=-2):
            found[name] = pyro.sample(f"each_{name}", dist.Normal(mean, spread))
    theta = torch.stack([found["drift"], found["boundary"].exp(), found["delay"].exp()], -1)
    with pyro.plate("all", len(y), dim=-2), pyro.plate("trials", y.shape[1], dim=-1):
        pyro.sample("y", law(theta), obs=y)


def subjects(num: int, trials: int) -> Tensor:
    """Data of a group."""
    z = torch.randn(num, 3)
    rows = torch.stack([mean + sd * z[:, i] for i, (mean, sd) in enumerate(GROUP.values())], 1)
    theta = torch.stack([rows[:, 0], rows[:, 1].exp(), rows[:, 2].exp()], 1)
    return simulate(theta.repeat_interleave(trials, 0)).reshape(num, trials, 2)


def tested() -> tuple[Tensor, Tensor, Tensor]:
    """Fresh trials, away from the region's edge, with their exact log density."""
    pyro.set_rng_seed(SEED + 100)
    theta = LOW + (HIGH - LOW) * (0.05 + 0.9 * torch.rand(TESTED, 3))
    y = simulate(theta)
    return theta, y, DriftDiffusion(theta.double()).log_prob(y.double())


def divergence(log_q: Tensor, exact: Tensor) -> dict[str, float]:
    gap = exact - log_q.double()
    return {"kl": float(gap.mean()), "error": float(gap.std()) / len(gap) ** 0.5}


def fitted(num: int) -> tuple[AmortizedLikelihood, float]:
    pyro.set_rng_seed(SEED)
    likelihood = AmortizedLikelihood(simulate, proposal=PROPOSAL, discrete=(0,))
    pairs = PROPOSAL.sample((num,))
    y = simulate(pairs)
    begun = time.process_time()
    likelihood.fit(simulations=(pairs, y), progress=False)
    return likelihood, time.process_time() - begun


def ours(num: int) -> dict[str, float]:
    likelihood, seconds = fitted(num)
    theta, y, exact = tested()
    return divergence(likelihood(theta).log_prob(y), exact) | {"seconds": seconds}


def mnle(num: int) -> dict[str, float] | None:
    """sbi's own, where it is installed."""
    try:
        from sbi.inference import MNLE
        from sbi.utils import BoxUniform
    except ModuleNotFoundError:
        return None
    pyro.set_rng_seed(SEED)
    pairs = PROPOSAL.sample((num,))
    y = simulate(pairs)
    begun = time.process_time()
    trainer = MNLE(prior=BoxUniform(LOW, HIGH), show_progress_bars=False)
    network = trainer.append_simulations(pairs, y.flip(1)).train()  # the discrete column last
    seconds = time.process_time() - begun
    theta, y, exact = tested()
    with torch.no_grad():
        log_q = network.log_prob(y.flip(1)[None], condition=theta)[0]
    return divergence(log_q, exact) | {"seconds": seconds}


def group(law: Any, y: Tensor, warmup: int, draws: int) -> dict[str, Any]:
    pyro.set_rng_seed(SEED + 1)
    start = {name: torch.tensor(value) for name, value in START.items()}
    start |= {f"spread_{name[5:]}": torch.tensor(0.3) for name in START}
    start |= {f"each_{name[5:]}": torch.full((len(y), 1), value) for name, value in START.items()}
    kernel = NUTS(hierarchy, max_tree_depth=5, init_strategy=init_to_value(values=start))
    mcmc = MCMC(kernel, draws, warmup, disable_progbar=True)
    begun = time.process_time()
    mcmc.run(y, law)
    found, facts = mcmc.get_samples(), mcmc.diagnostics()
    rows = {
        name: [float(value.mean()), float(value.std()), float(facts[name]["n_eff"])]
        for name, value in found.items()
        if name.startswith(("mean", "spread"))
    }
    return {"seconds": time.process_time() - begun, "rows": rows}


def main() -> None:
    asked = command(__doc__, cached=True, short=True)
    sizes, warmup, draws = ((1000,), 20, 20) if asked.short else ((5000, 20_000), 150, 250)
    store, began = Store("likelihood", keep=not asked.short), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not asked.report:
            for num in sizes:
                store.once(f"ours {num}", lambda num=num: ours(num))
                store.once(f"MNLE {num}", lambda num=num: mnle(num))
            pyro.set_rng_seed(SEED + 7)
            y = subjects(*((4, 20) if asked.short else (SUBJECTS, TRIALS)))
            store.once("hierarchy exact", lambda: group(DriftDiffusion, y, warmup, draws))
            learned = fitted(sizes[-1])[0]
            store.once("hierarchy learned", lambda: group(learned, y, warmup, draws))
    named = {"ours": "AmortizedLikelihood", "MNLE": "sbi MNLE"}
    rows = [
        (f"{named[who]}, {num:,}", f"{row['kl']:.4f} +- {row['error']:.4f}", f"{row['seconds']:.0f}")
        for num in sizes
        for who in named
        if (row := store.rows.get(f"{who} {num}"))
    ]
    exact, learned = (store.rows[f"hierarchy {name}"] for name in ("exact", "learned"))
    beside = []
    for name, (mean, sd, n) in exact["rows"].items():
        own, deviation, m = learned["rows"][name]
        beside.append(
            (name, f"{mean:.3f} ({sd:.3f})", f"{own:.3f} ({deviation:.3f})", f"{(own - mean) / sd:+.2f}",
             f"{(1 / n + (deviation / sd) ** 2 / m) ** 0.5:.2f}")
        )  # fmt: skip
    text = [
        header("A learned likelihood beside the exact one: drift diffusion", SEED),
        NOTE.format(terms=TERMS, tested=TESTED, subjects=SUBJECTS, trials=TRIALS, warmup=warmup, draws=draws),
        "\n## One trial\n",
        table(["likelihood, simulations", "KL, nats a trial", "seconds"], rows),
        "\n## A hierarchy: posterior mean (sd) of the group\n",
        table(["", "exact density", "learned", "difference, sd", "its MC error"], beside),
        f"\nNUTS: {exact['seconds']:.0f} s exact, {learned['seconds']:.0f} s learned (CPU).",
        reading("likelihood"),
        f"\n{time.process_time() - began:,.0f} CPU s in all",
    ]
    write("likelihood", "\n".join(text), keep=not asked.short)


if __name__ == "__main__":
    main()
