"""The claim: a run is right, or it says that it is not.

Targets with exact answers (modes near and far, alike and unequal, hidden in wider ones, curved, heavy-tailed, without
a maximum, in any unit), each by KernelLangevin with its defaults, 64 chains of 500 draws. A run is right if the shares
of its regions are within .02 in total variation and no moment or tail share is off by four standard errors, from the
spread between chains. A wrong run is silent if it gave no warning and its report says "ok"; a right run that is called
anything else is a false alarm. Run as `python -m benchmarks.posteriors.trust [--seeds 20] [--only WORD]`.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.diagnostics import report
from pyro_sb.infer import MCMC, KernelLangevin

CHAINS, DRAWS = 64, 500
MAX_TV, MAX_Z = 0.02, 4.0
FLOAT = torch.float64
Figure = tuple[Callable[[Tensor], Tensor], float]


@dataclass(frozen=True, eq=False)
class Target:
    """A target with exact answers.

    Attributes:
        name: Of it.
        model: Pyro model; or minus a log density of a dict with one tensor ``x``, where ``dim`` is given.
        draws: The numbers that are looked at, from the sites of many draws: ``(*, d)``.
        log_evidence: Exact, or None.
        labels: Region of each row of ``(N, d)``.
        shares: Exact shares of the regions.
        figures: Functions of ``(N, d)`` with their exact means.
        args: The model's.
        dim: Of a potential.
    """

    name: str
    model: Callable[..., Any]
    draws: Callable[[dict[str, Tensor]], Tensor]
    log_evidence: float | None = None
    labels: Callable[[Tensor], Tensor] | None = None
    shares: Tensor = field(default_factory=lambda: torch.ones(1, dtype=FLOAT))
    figures: dict[str, Figure] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    dim: int = 0

    def run(self) -> MCMC:
        """A finished run with the defaults."""
        if self.dim:
            kernel = KernelLangevin(potential_fn=self.model)
            start = {"x": torch.randn(CHAINS, self.dim, dtype=FLOAT)}
            mcmc = MCMC(kernel, DRAWS, num_chains=CHAINS, initial_params=start, disable_progbar=True)
        else:
            mcmc = MCMC(KernelLangevin(self.model), DRAWS, num_chains=CHAINS, disable_progbar=True)
        mcmc.run(*self.args)
        return mcmc


def of_x(sites: dict[str, Tensor]) -> Tensor:
    """The one site."""
    return sites["x"]


def first(power: int = 1) -> Callable[[Tensor], Tensor]:
    """A power of the first number."""
    return lambda x: x[:, 0] ** power


def beyond(level: float, column: int = 0) -> Callable[[Tensor], Tensor]:
    """Whether a number lies above a level."""
    return lambda x: (x[:, column] > level).to(FLOAT)


def flat(log_density: Callable[[Tensor], Tensor], dim: int) -> Callable[[], None]:
    """A model of a log density: a factor on an improper uniform site, without a prior to draw."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("target", log_density(x))

    return model


def normal_modes(name: str, locs: Tensor, sds: Tensor, weights: Tensor, prior_sd: float | None = None) -> Target:
    """A normalised mixture; under a normal prior that is divided out again if ``prior_sd`` is given."""
    dim = locs.shape[1]
    constant = weights.log() - dim * sds.log() - 0.5 * dim * math.log(2 * math.pi)

    def parts(x: Tensor) -> Tensor:
        return constant - 0.5 * (x[..., None, :] - locs).square().sum(-1) / sds**2

    def under_prior() -> None:
        prior = dist.Normal(torch.zeros(dim, dtype=FLOAT), prior_sd).to_event(1)
        x = pyro.sample("x", prior)
        pyro.factor("target", torch.logsumexp(parts(x), -1) - prior.log_prob(x))

    model = flat(lambda x: torch.logsumexp(parts(x), -1), dim) if prior_sd is None else under_prior
    membership = {"mean": (first(), float(weights @ locs[:, 0]))}
    if len(locs) <= 10:
        return Target(
            name, model, of_x, 0.0, lambda x: parts(x).argmax(-1), nearest(parts, locs, sds, weights), membership
        )
    return Target(name, model, of_x, 0.0, figures=membership)


def nearest(
    parts: Callable[[Tensor], Tensor], locs: Tensor, sds: Tensor, weights: Tensor, num: int = 400_000
) -> Tensor:
    """Shares of the regions in which each component is the largest, by draws of the mixture itself."""
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(weights, num, replacement=True, generator=generator)
    x = locs[index] + sds[index, None] * torch.randn(num, locs.shape[1], generator=generator, dtype=FLOAT)
    return torch.bincount(parts(x).argmax(-1), minlength=len(locs)).to(FLOAT) / num


def two_modes(dim: int) -> Target:
    """Unit normals ten sds apart."""
    locs = torch.zeros(2, dim, dtype=FLOAT)
    locs[:, 0] = torch.tensor([-5.0, 5.0], dtype=FLOAT)
    return normal_modes(f"two modes, d {dim}", locs, torch.ones(2, dtype=FLOAT), torch.tensor([0.3, 0.7], dtype=FLOAT))


def circle() -> Target:
    """Eight unit normals on a circle."""
    angle = torch.arange(8, dtype=FLOAT) * math.pi / 4
    locs = 13.0 * torch.stack([angle.cos(), angle.sin()], 1)
    return normal_modes("eight on a circle", locs, torch.ones(8, dtype=FLOAT), torch.full((8,), 0.125, dtype=FLOAT))


def unequal(dim: int) -> Target:
    """Ten modes of sds .3 to 1.5, far apart."""
    generator = torch.Generator().manual_seed(1)
    locs = 8 * torch.randn(10, dim, generator=generator, dtype=FLOAT)
    sds = torch.exp(torch.empty(10, dtype=FLOAT).uniform_(math.log(0.3), math.log(1.5), generator=generator))
    weights = 0.3 + torch.rand(10, generator=generator, dtype=FLOAT)
    return normal_modes(f"ten unequal modes, d {dim}", locs, sds, weights / weights.sum(), 10.0)


def forty() -> Target:
    """Forty unit normals in a square."""
    locs = 80 * (torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT) - 0.5)
    return normal_modes("forty modes", locs, torch.ones(40, dtype=FLOAT), torch.full((40,), 1 / 40, dtype=FLOAT), 25.0)


def spike(dim: int, ratio: float) -> Target:
    """A spike with 90 % of the mass inside a slab of sd .1, under a uniform prior on (-1, 1)."""
    place, sd, slab = torch.full((dim,), 0.2, dtype=FLOAT), 0.1 * ratio, 0.1

    def parts(x: Tensor) -> Tensor:
        narrow = math.log(0.9) + dist.Normal(place, sd).log_prob(x).sum(-1)
        return torch.stack([math.log(0.1) + dist.Normal(0 * place, slab).log_prob(x).sum(-1), narrow], -1)

    def model() -> None:
        x = pyro.sample("x", dist.Uniform(-torch.ones(dim, dtype=FLOAT), 1.0).to_event(1))
        pyro.factor("likelihood", torch.logsumexp(parts(x), -1))

    locs, sds = torch.stack([0 * place, place]), torch.tensor([slab, sd], dtype=FLOAT)
    shares = nearest(parts, locs, sds, torch.tensor([0.1, 0.9], dtype=FLOAT))
    return Target(
        f"spike in slab, d {dim}, {ratio}", model, of_x, -dim * math.log(2), lambda x: parts(x).argmax(-1), shares
    )


def banana(dim: int) -> Target:
    """A normal law bent along its widest axis."""

    def log_density(x: Tensor) -> Tensor:
        bend = x[..., 1] - 0.1 * (x[..., 0] ** 2 - 100)
        return -0.5 * (x[..., 0] / 10) ** 2 - 0.5 * bend**2 - 0.5 * x[..., 2:].square().sum(-1)

    tails = {
        "P(x > 20)": (beyond(20.0), 0.02275),
        "P(x < -25)": (lambda x: (x[:, 0] < -25).to(FLOAT), 0.00621),
        "second": (first(2), 100.0),
    }
    evidence = math.log(10) + 0.5 * dim * math.log(2 * math.pi)
    return Target(f"banana, d {dim}", flat(log_density, dim), of_x, evidence, figures=tails)


def funnel_model() -> Target:
    """Neal's funnel as people write it."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=FLOAT), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9, dtype=FLOAT), (v / 2).exp()[..., None]).to_event(1))

    return Target("funnel, a model", model, lambda sites: sites["v"][..., None], 0.0, figures=FUNNEL)


FUNNEL: dict[str, Figure] = {
    "mean": (first(), 0.0),
    "second": (first(2), 9.0),
    "P(v < -6)": (lambda x: (x[:, 0] < -6).to(FLOAT), 0.02275),
    "P(v > 6)": (beyond(6.0), 0.02275),
}


def funnel_potential() -> Target:
    """The same funnel without a model to reparametrise."""

    def potential(sites: dict[str, Tensor]) -> Tensor:
        v, x = sites["x"][0], sites["x"][1:]
        return -dist.Normal(0.0, 3.0).log_prob(v) - dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum()

    return Target("funnel, a potential", potential, of_x, 0.0, figures=FUNNEL, dim=10)


def ring() -> Target:
    """A circle of radius 10 and width .5."""
    radius = torch.linspace(0, 30, 300_001, dtype=FLOAT)
    mass = radius * torch.exp(-2 * (radius - 10) ** 2)
    return Target(
        "ring",
        flat(lambda x: -2 * (x.norm(dim=-1) - 10) ** 2, 2),
        of_x,
        math.log(2 * math.pi * float(mass.sum()) * 1e-4),
        lambda x: 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long(),
        torch.full((4,), 0.25, dtype=FLOAT),
        {"radius": (lambda x: x.norm(dim=-1), float((mass * radius).sum() / mass.sum()))},
    )


def student() -> Target:
    """Student's t with two degrees of freedom."""
    dim, nu = 10, 2.0
    evidence = math.lgamma(nu / 2) + 0.5 * dim * math.log(nu * math.pi) - math.lgamma((nu + dim) / 2)
    figures: dict[str, Figure] = {
        "P(x > 10)": (beyond(10.0), 0.5 - 5 / math.sqrt(102)),
        "mean sign": (lambda x: x[:, 0].sign(), 0.0),
    }
    return Target(
        "Student t, nu 2, d 10",
        flat(lambda x: -0.5 * (nu + dim) * torch.log1p(x.square().sum(-1) / nu), dim),
        of_x,
        evidence,
        figures=figures,
    )


def label_switching() -> Target:
    """Three means of a mixture, in any order."""
    generator = torch.Generator().manual_seed(3)
    y = (
        torch.tensor([-4.0, 0.0, 4.0], dtype=FLOAT)[:, None] + torch.randn(3, 40, generator=generator, dtype=FLOAT)
    ).flatten()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=FLOAT), 5.0).to_event(1))
        with pyro.plate("rows", len(y)):
            law = dist.MixtureSameFamily(
                dist.Categorical(torch.ones(3, dtype=FLOAT)), dist.Normal(x[..., None, :], 1.0)
            )
            pyro.sample("y", law, obs=y)

    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])

    def labels(x: Tensor) -> Tensor:
        return (x.argsort(-1)[:, None] == orders).all(-1).long().argmax(-1)

    return Target("label switching", model, of_x, None, labels, torch.full((6,), 1 / 6, dtype=FLOAT), args=(y,))


def schools(name: str, y: Tensor, s: Tensor) -> Target:
    """Effects around a mean, centred; answers by quadrature over the mean and the spread."""
    mu = torch.linspace(-40, 40, 401, dtype=FLOAT)
    log_tau = torch.linspace(-12, 9, 1051, dtype=FLOAT)
    width = (log_tau.exp()[:, None].square() + s**2).sqrt()
    log_mass = dist.Normal(mu[:, None, None], width).log_prob(y).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)[:, None]
    log_mass = log_mass + dist.HalfCauchy(torch.tensor(5.0, dtype=FLOAT)).log_prob(log_tau.exp()) + log_tau
    mass = log_mass.flatten().softmax(0).view_as(log_mass)
    evidence = float(torch.logsumexp(log_mass.flatten(), 0)) + math.log(0.2 * 0.02)

    def model(y: Tensor, s: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    figures: dict[str, Figure] = {
        "mean of mu": (first(), float(mass.sum(1) @ mu)),
        "mean log tau": (lambda x: x[:, 1], float(mass.sum(0) @ log_tau)),
        "P(tau > 10)": (beyond(math.log(10), 1), float(mass.sum(0)[log_tau > math.log(10)].sum())),
        "P(tau < .5)": (
            lambda x: (x[:, 1] < math.log(0.5)).to(FLOAT),
            float(mass.sum(0)[log_tau < math.log(0.5)].sum()),
        ),
    }

    def draws(sites: dict[str, Tensor]) -> Tensor:
        return torch.stack([sites["mu"], sites["tau"].log()], -1)

    return Target(name, model, draws, evidence, figures=figures, args=(y, s))


def line(name: str, x: Tensor, y: Tensor) -> Target:
    """Least squares under flat priors of the coefficients and of the sd: b is multivariate t."""
    num, dim = x.shape
    gram = x.T @ x
    best = torch.linalg.solve(gram, x.T @ y)
    left = float((y - x @ best).square().sum())
    nu = num - dim - 1
    scale = (left / nu * torch.linalg.inv(gram).diagonal()).sqrt()
    evidence = (
        -0.5 * num * math.log(2 * math.pi)
        + 0.5 * dim * math.log(2 * math.pi)
        - 0.5 * float(torch.linalg.slogdet(gram)[1])
        + math.lgamma(nu / 2)
        - math.log(2)
        - 0.5 * nu * math.log(left / 2)
    )

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample(
                "y", dist.Normal((x @ b[..., None])[..., 0] if b.dim() == 1 else (b @ x.T)[..., 0, :], s), obs=y
            )

    def tail(column: int) -> Figure:
        return (lambda b: ((b[:, column] - best[column]) / scale[column] > 2.0).to(FLOAT)), upper_t(2.0, nu)

    figures: dict[str, Figure] = {
        f"mean b{j}": ((lambda b, j=j: (b[:, j] - best[j]) / scale[j]), 0.0) for j in range(dim)
    }
    figures |= {f"tail b{j}": tail(j) for j in range(dim)}
    return Target(name, model, lambda sites: sites["b"], evidence, figures=figures, args=(x, y))


def upper_t(level: float, nu: int) -> float:
    """P(t > level) by quadrature."""
    t = torch.linspace(level, 200.0, 2_000_001, dtype=FLOAT)
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    return float(torch.trapezoid(torch.exp(constant - (nu + 1) / 2 * torch.log1p(t**2 / nu)), t))


def far_line() -> Target:
    """Earnings on height: coefficients at -6e4 and 1.3e3."""
    generator = torch.Generator().manual_seed(0)
    height = 66.5 + 3.8 * torch.randn(1200, generator=generator, dtype=FLOAT)
    earnings = -61_000 + 1262 * height + 18_900 * torch.randn(1200, generator=generator, dtype=FLOAT)
    return line("far regression", torch.stack([torch.ones_like(height), height], 1), earnings)


def collinear() -> Target:
    """Three covariates that are nearly one."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 1, generator=generator, dtype=FLOAT)
    x = common + 0.01 * torch.randn(200, 3, generator=generator, dtype=FLOAT)
    return line("near-collinear regression", x, x.sum(1) + 0.5 * torch.randn(200, generator=generator, dtype=FLOAT))


def targets() -> list[Target]:
    """All of them."""
    effects = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=FLOAT)  # Rubin (1981)
    errors = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=FLOAT)
    return [
        *(two_modes(dim) for dim in (2, 10, 20, 50)),
        circle(),
        unequal(5),
        unequal(10),
        forty(),
        *(spike(dim, ratio) for dim, ratio in ((5, 0.5), (10, 0.6), (10, 0.5), (10, 0.4), (15, 0.6))),
        banana(2),
        banana(10),
        funnel_model(),
        funnel_potential(),
        ring(),
        student(),
        label_switching(),
        schools("eight schools, centred", effects, errors),
        schools("boundary tau", 0.1 * effects, errors),
        far_line(),
        collinear(),
    ]


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    distance: float
    worst: float
    where: str
    evidence: float
    seconds: float
    verdict: str
    warned: str

    @property
    def right(self) -> bool:
        """Whether shares, moments and tails are."""
        return self.distance <= MAX_TV and abs(self.worst) <= MAX_Z

    @property
    def called(self) -> bool:
        """Whether the run or its report says that something is not ok."""
        return bool(self.warned) or self.verdict != "ok"


def outcome(target: Target, seed: int) -> Outcome:
    """One run at one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = time.process_time()
        mcmc = target.run()
        seconds = time.process_time() - begun
        x = target.draws(mcmc.get_samples(group_by_chain=True)).to(FLOAT)
        verdict = report(mcmc).verdict
    rows = x.flatten(0, 1)
    distance = 0.0
    if target.labels is not None:
        found = torch.bincount(target.labels(rows), minlength=len(target.shares)).to(FLOAT) / len(rows)
        distance = 0.5 * float((found - target.shares).abs().sum())
    scores = {name: score(fn(rows).view(x.shape[:2]), exact) for name, (fn, exact) in target.figures.items()}
    where = max(scores, key=lambda name: abs(scores[name]), default="-")
    evidence = math.nan
    if target.log_evidence is not None:
        facts = mcmc.kernel.population
        evidence = (facts.log_evidence - target.log_evidence) / facts.log_evidence_error
    said = next((str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)), "")
    return Outcome(distance, scores.get(where, 0.0), where, evidence, seconds, verdict, said)


def score(values: Tensor, exact: float) -> float:
    """Standard errors between the mean of ``(chain, draw)`` and its exact value, from the spread between chains."""
    means = values.mean(1)
    floor = math.sqrt(max(exact * (1 - exact), 0.0) / values.numel())  # where a tail was not met at all
    error = max(float(means.std()) / math.sqrt(len(means)), float(values.std()) / math.sqrt(values.numel()), floor)
    return (float(means.mean()) - exact) / error


def cell(target: Target, seed: int) -> dict[str, Any]:
    """One run as plain values."""
    return asdict(outcome(target, seed))


def main() -> None:
    """The table, written after every seed."""
    only = {"default": "", "help": "targets whose names hold this word"}
    args = command(__doc__, seeds=20, cached=True, only=only)
    torch.set_default_dtype(FLOAT)
    store = Store("trust", keep=not args.only)
    chosen = [target for target in targets() if args.only in target.name]
    for seed in range(args.seeds):
        for target in [] if args.report else chosen:
            run = Outcome(**store.once(f"{target.name}, seed {seed}", partial(cell, target, seed)))
            state = "right" if run.right else "WRONG"
            told = f"{run.worst:.1f} {run.where}, {run.seconds:.1f} s"
            print(
                f"seed {seed}, {target.name}: {state}, report {run.verdict}, TV {run.distance:.4f}, {told}", flush=True
            )
        if not args.report or seed == args.seeds - 1:
            write("trust", written(store, chosen), keep=not args.only)


def written(store: Store, chosen: list[Target]) -> str:
    """The table of all runs that are there."""
    rows, every = [], list[Outcome]()
    for target in chosen:
        cells = [row for key, row in store.rows.items() if key.startswith(f"{target.name}, seed ")]
        found = [Outcome(**cell) for cell in cells]
        if not found:
            continue
        every += found
        worst = max(found, key=lambda run: abs(run.worst))
        inside = [abs(run.evidence) <= 3 for run in found if not math.isnan(run.evidence)]
        rows.append(
            [
                target.name,
                f"{sum(run.right for run in found)} of {len(found)}",
                sum(not run.right and not run.called for run in found),
                sum(run.right and run.called for run in found),
                f"{mean(run.distance for run in found):.4f}" if target.labels is not None else "-",
                f"{worst.worst:.1f} {worst.where}" if target.figures else "-",
                f"{sum(inside)} of {len(inside)}" if inside else "-",
                median(run.seconds for run in found),
                " ".join(sorted({run.verdict for run in found})),
            ]
        )
    right, silent = sum(run.right for run in every), sum(not run.right and not run.called for run in every)
    alarms = sum(run.right and run.called for run in every)
    lines = [
        header("Runs that are right or say that they are not", 0),
        f"{CHAINS} chains of {DRAWS} draws; seeds 0, 1, ...: as many as a row says.",
        table(COLUMNS, rows),
        f"\n{right} of {len(every)} runs right; {silent} wrong without a word; {alarms} right and called doubtful.",
        reading("trust"),
    ]
    return "\n".join(lines)


COLUMNS = ["target", "right", "silent", "false alarms", "TV, mean", "worst z", "|log Z| <= 3 se", "CPU s", "report"]

if __name__ == "__main__":
    main()
