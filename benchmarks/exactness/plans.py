"""LightSB and LightSBM against entropic plans that are known: the pairs `make_pair` in dimensions 2 to 128.

Run as `python -m benchmarks.exactness.plans [DIM ...]`. Finished fits are kept, and a second call goes on from them;
`--short` tries the script in two dimensions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.fits import quiet, timed
from benchmarks.lib.known_plan import KnownPlan, make_pair
from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import LightSB, LightSBM
from pyro_sb.metrics import Moments, bw2_uvp, cbw2_uvp

SEED, COMPONENTS = 0, 10
DIMS, EPSILONS = (2, 16, 64, 128), (0.1, 1.0, 10.0)
GOALS = {2: 0.02, 16: 0.02, 64: None, 128: 0.2}  # of the conditional BW2-UVP, in percent
POINTS, PAIRS, DRAWS, BLOCK = 1000, 10_000, 50_000, 10_000  # of cBW2-UVP, KL, BW2-UVP; made at a time
METHODS = {"LightSB": LightSB, "LightSBM": LightSBM}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Draws a side, updates of either method (about the same CPU time), and points of each side an update."""

    num_draws: int
    steps: dict[str, int]
    batch_size: int
    dtype: torch.dtype = torch.float32


BUDGETS = {
    2: Budget(4_000_000, {"LightSB": 3000, "LightSBM": 1500}, 2048),
    16: Budget(1_000_000, {"LightSB": 4000, "LightSBM": 2000}, 512),
    64: Budget(300_000, {"LightSB": 1500, "LightSBM": 250}, 512),
    128: Budget(200_000, {"LightSB": 800, "LightSBM": 40}, 512),
}
HARD = {  # more draws, or more updates
    (16, 0.1): Budget(4_000_000, {"LightSB": 3500, "LightSBM": 1500}, 2048),
    (128, 0.1): Budget(400_000, {"LightSB": 2000, "LightSBM": 150}, 512),
}
EM_DRAWS, EM_STEPS = 50_000, 50
SHORT = Budget(20_000, {"LightSB": 100, "LightSBM": 50}, 512)


@dataclass
class Trial:
    """A pair, unpaired draws of its two sides, and the exact answers that a fit is held against."""

    dim: int
    epsilon: float
    budget: Budget

    @cached_property
    def pair(self) -> KnownPlan:
        return make_pair(self.dim, self.epsilon, SEED)

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor]:
        """Source and target, each from source points of its own. Shapes ``(N, d)``."""
        generator = torch.Generator().manual_seed(SEED + 1)
        sides = (self.pair.sample_source, self.pair.sample_target)
        blocks = [BLOCK] * (self.budget.num_draws // BLOCK)
        source, target = (torch.cat([side(num, generator).to(self.budget.dtype) for num in blocks]) for side in sides)
        return source, target

    @cached_property
    def judges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs of the plan for the KL; source and target draws for the marginal score."""
        generator = torch.Generator().manual_seed(SEED + 3)
        blocks = [BLOCK] * (DRAWS // BLOCK)
        sides = (self.pair.sample_source, self.pair.sample_target)
        start, target = (torch.cat([side(num, generator) for num in blocks]) for side in sides)
        return *self.pair.sample_plan(PAIRS, generator), start, target

    @cached_property
    def points(self) -> Tensor:
        return self.pair.sample_source(POINTS, torch.Generator().manual_seed(SEED + 2))

    @cached_property
    def conditional(self) -> Moments:
        return Moments(*self.pair.conditional_moments(self.points))

    def plan_score(self, model: Moments) -> float:
        """Conditional BW2-UVP of closed-form moments, whose floor is 0."""
        return float(cbw2_uvp(model, self.conditional, self.pair.target_variance))

    def independent_score(self) -> float:
        """Of the coupling that forgets where it started, with the target's own moments."""
        target = self.draws[1]
        mean, covariance = target.double().mean(0), torch.cov(target.T).double()
        return self.plan_score(Moments(mean.expand(POINTS, -1), covariance.expand(POINTS, -1, -1)))

    def fitted(self, method: str, covariance: str, most: int | None = None, **options: Any) -> tuple[LightSB, Figures]:
        """A bridge fitted to the draws (``most`` of them a side), and what the fit cost."""
        torch.manual_seed(SEED)
        bridge = METHODS[method](self.dim, COMPONENTS, self.epsilon, covariance=covariance)
        source, target = (side[:most] for side in self.draws)
        with quiet():
            history, seconds = timed(bridge.fit, target, source, progress=False, **options)
        cost = {"seconds": seconds, "updates": history.iterations}
        return bridge, {**cost, "held out": min(history.validation_losses)}

    def scores(self, bridge: LightSB) -> Figures:
        """Conditional and marginal BW2-UVP, and the mean KL from the true conditional law to the model's."""
        torch.manual_seed(SEED + 3)
        x0, x1, start, target = self.judges
        dtype = self.budget.dtype
        model = Moments(*bridge.plan_moments(self.points.to(dtype)))
        gap = self.pair.conditional_log_prob(x1, x0) - bridge.plan(x0.to(dtype)).log_prob(x1.to(dtype))
        marginal = bw2_uvp(bridge.transport(start.to(dtype)), target)
        return {
            "cbw2": self.plan_score(model),
            "kl": float(gap.mean()),
            "kl error": float(gap.std()) / PAIRS**0.5,
            "bw2": float(marginal),
            "bw2 floor": marginal.floor,
        }

    def measure(self, method: str, covariance: str, **options: Any) -> Figures:
        bridge, cost = self.fitted(method, covariance, **options)
        return cost | self.scores(bridge)

    def options(self, method: str) -> Figures:
        return {"num_updates": self.budget.steps[method], "batch_size": self.budget.batch_size}

    def references(self) -> Figures:
        """Scores without training: of the start (one update at a fiftieth of the rate), and of independent ends."""
        start = self.measure("LightSB", "full", num_updates=1)
        return {"start": start, "independent": self.independent_score(), "variance": self.pair.target_variance}


def jobs(trial: Trial) -> dict[str, Callable[[], Figures]]:
    """Measurements on a pair, by name."""
    steps = {"num_updates": min(EM_STEPS, trial.budget.steps["LightSB"]), "most": EM_DRAWS}
    fits = {f"{method}, full": (method, "full", trial.options(method)) for method in METHODS}
    if trial.epsilon == 1 and trial.dim in (16, 64):
        fits["LightSB, diagonal"] = ("LightSB", "diagonal", trial.options("LightSB"))
    if trial.epsilon == 1 and trial.dim <= 16:
        fits["LightSB, full, EM"] = ("LightSB", "full", {"solver": "moments", **steps})
    bound = {name: lambda fit=fit: trial.measure(*fit[:2], **fit[2]) for name, fit in fits.items()}
    return {"references": trial.references, **bound}


def key(dim: int, epsilon: float, name: str) -> str:
    return f"d = {dim}, epsilon {epsilon:g}: {name}"


def trials(short: bool = False) -> Iterator[Trial]:
    """One after the other, as the draws of each are many."""
    for dim, epsilon in product((2,) if short else DIMS, EPSILONS):
        yield Trial(dim, epsilon, SHORT if short else HARD.get((dim, epsilon), BUDGETS[dim]))


def verdict(dim: int, score: float) -> str:
    goal = GOALS[dim]
    return "-" if goal is None else "PASS" if score <= goal else "FAIL"


def fit_row(dim: int, epsilon: float, name: str, found: Figures) -> list[object]:
    kl = f"{found['kl']:.4f} +- {found['kl error']:.4f}"
    marginal = [f"{found[key]:.3f}" for key in ("bw2", "bw2 floor")]
    cost = [found["updates"], f"{found['seconds']:.0f}"]
    passed = verdict(dim, found["cbw2"]) if name.endswith("full") else ""
    return [name, dim, epsilon, f"{found['cbw2']:.4f}", passed, kl, *marginal, f"{found['held out']:.3f}", *cost]


def reference_row(dim: int, epsilon: float, found: Figures) -> list[object]:
    start = found["start"]
    kl = f"{start['kl']:.3f} +- {start['kl error']:.3f}"
    return [dim, epsilon, found["variance"], found["independent"], start["cbw2"], kl, start["held out"]]


def budget_rows() -> list[list[object]]:
    hard = [(*pair, budget) for pair, budget in HARD.items()]
    rest: list[tuple[int, Any, Budget]] = [(dim, "other", budget) for dim, budget in BUDGETS.items()]
    return [
        [dim, epsilon, b.num_draws, b.batch_size, *b.steps.values(), str(b.dtype)[6:], GOALS[dim] or "-"]
        for dim, epsilon, b in sorted(hard + rest, key=lambda row: row[0])
    ]


def report(rows_of: dict[str, Figures], asked: list[Trial]) -> str:
    """The tables. Fits that are not there are left out, and counted."""
    fits = [(one.dim, one.epsilon, name) for one in asked for name in jobs(one) if name != "references"]
    rows = [fit_row(*fit, rows_of[key(*fit)]) for fit in fits if key(*fit) in rows_of]
    starts = [(one.dim, one.epsilon, "references") for one in asked]
    references = [reference_row(*one[:2], rows_of[key(*one)]) for one in starts if key(*one) in rows_of]
    judged = sum(GOALS[one.dim] is not None for one in asked)
    passed = {method: sum(row[4] == "PASS" for row in rows if row[0] == f"{method}, full") for method in METHODS}
    missing = len(fits) - len(rows)
    columns = ["fit", "d", "epsilon", "cBW2-UVP %", "goal", "KL of plans, nats", "BW2-UVP %", "floor"]
    names = ["d", "epsilon", "Var x1", "independent, cBW2-UVP %", "start, cBW2-UVP %", "start, KL", "held-out loss"]
    updates = [f"updates of {method}" for method in METHODS]
    return "\n".join(
        [
            header("Known entropic plans: the family mix5, fitted from unpaired draws", SEED),
            f"{COMPONENTS} components, learning rate 5e-3 falling to 2 %. CPU seconds are of fit, without",
            "making the draws. A tenth of the draws is held out; the parameters of the lowest held-out loss are kept.",
            table(["d", "epsilon", "draws a side", "batch size", *updates, "dtype", "goal %"], budget_rows()),
            f'\nEM: solver="moments" on {EM_DRAWS} draws, at most {EM_STEPS} steps.',
            f"cBW2-UVP: of the model's closed-form conditional moments at {POINTS} source points (floor 0). KL: the",
            f"mean of log pi*(x1|x0) - log pi(x1|x0) over {PAIRS} pairs of the true plan, with its standard error:",
            f"it sees the whole law. BW2-UVP: two moments of {DRAWS} draws against those of as many of the target.",
            table([*columns, "held-out loss", "updates", "CPU s"], rows),
            "\nWithout training:",
            table(names, references),
            "",
            *(f"{method}: {number} of {judged} pairs within the goal." for method, number in passed.items()),
            *([f"Not measured yet: {missing} of {len(fits)} fits."] if missing else []),
        ]
    )


def main() -> None:
    asked = command(
        __doc__,
        cached=True,
        short=True,
        dims={"nargs": "*", "type": int, "metavar": "DIM", "help": "these alone, no table kept"},
    )
    store = Store("known_plans", keep=not asked.short)
    for trial in () if asked.report else trials(asked.short):
        for name, job in jobs(trial).items() if not asked.dims or trial.dim in asked.dims else ():
            one = key(trial.dim, trial.epsilon, name)
            print(one, store.once(one, job), flush=True)
    text = report(store.rows, list(trials(asked.short)))
    write("known_plans", text, keep=not asked.short and not asked.dims)


if __name__ == "__main__":
    main()
