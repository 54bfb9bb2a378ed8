"""A linear-Gaussian inverse problem with a known posterior: draws, flow density and path weights of VSDM and SGM.

Run as `python -m benchmarks.linear_gaussian`. Finished cells are kept in the cache, and a second call goes on from it.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from benchmarks.report import RESULTS, header, table, write
from benchmarks.store import Store
from pyro_sb.bridges import SGM, VSDM, Bridge, Sampler
from pyro_sb.metrics import c2st

DIM, NUM_PAIRS, NUM_STEPS, BATCH = 4, 20_000, 2000, 256
DEVIATIONS = (0.10, 0.25, 0.55, 0.96)  # of the posterior, along its axes
NUM_OBSERVED, EVALUATIONS = 4, 10
NUM_JUDGED, NUM_POINTS = 2000, 500
PATH_STEPS, NUM_REPLICATES, NUM_WEIGHTED = (4, 10, 50), 25, 500
GOAL_C2ST, GOAL_LOG = 0.53, 0.1


class Problem:
    r"""theta ~ N(0, I), y = G theta + noise ~ N(0, I), in four dimensions each, G's axes turned at random."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        left, right = (torch.linalg.qr(torch.randn(DIM, DIM))[0] for _ in range(2))
        gains = torch.tensor([math.sqrt(1 / sd**2 - 1) for sd in DEVIATIONS])
        self.slope = left * gains @ right.T
        self.covariance = right * torch.tensor(DEVIATIONS).square() @ right.T
        self.theta, self.y = self.sample(NUM_PAIRS)
        self.observed = self.sample(NUM_OBSERVED)[1]

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        theta = torch.randn(num, DIM)
        return theta, theta @ self.slope.T + torch.randn(num, DIM)

    def posterior(self, y: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.covariance @ self.slope.T @ y, self.covariance)

    def log_joint(self, theta: Tensor, y: Tensor) -> Tensor:
        gap = y - theta @ self.slope.T
        squares = theta.square().sum(-1) + gap.square().sum(-1)
        return -0.5 * squares - DIM * math.log(2 * math.pi)

    def log_evidence(self, y: Tensor) -> Tensor:
        marginal = self.slope @ self.slope.T + torch.eye(DIM)
        return MultivariateNormal(torch.zeros(DIM), marginal).log_prob(y)


class Blind(nn.Module):
    """Passes contexts on to the networks and shows the regression their squares, which theta has no covariance with."""

    out_dim = DIM

    def forward(self, context: Tensor) -> Tensor:
        """Shapes ``(n, 4)`` to ``(n, 4)``."""
        return context

    def summary(self, context: Tensor) -> Tensor:
        """Shapes ``(n, 4)`` to ``(n, 4)``."""
        return context.square()


@dataclass(frozen=True)
class Model:
    name: str
    make: Callable[..., VSDM]
    arguments: dict[str, Any] = field(default_factory=dict)
    blind: bool = False

    def build(self) -> VSDM:
        return self.make(DIM, context_dim=DIM, embedding=Blind() if self.blind else None, **self.arguments)


MODELS = [
    Model("VSDM", VSDM),
    Model("SGM", SGM),
    Model("VSDM, no regression", VSDM, blind=True),
    Model("SGM, no regression, b_max 20", SGM, {"b_max": 20.0}, blind=True),
]


def fitted(model: Model, problem: Problem, seed: int, folder: Path) -> tuple[VSDM, float]:
    """The fit and its CPU seconds; kept in a file beside the cache."""
    path = folder / f"linear_gaussian, {model.name}, {seed}.pt"
    bridge, begun = model.build(), time.process_time()
    torch.manual_seed(100 + seed)
    if path.exists():
        bridge.load_state_dict(torch.load(path, weights_only=True))
    else:
        bridge.fit(problem.theta, context=problem.y, num_updates=NUM_STEPS, batch_size=BATCH, progress=False)
        torch.save(bridge.state_dict(), path)
    return bridge, time.process_time() - begun


def of_draws(bridge: Bridge | None, problem: Problem, index: int, test: bool) -> dict[str, float]:
    """Mean, covariance and C2ST of the draws; of exact draws where there is no bridge."""
    torch.manual_seed(1000 + index)
    y = problem.observed[index]
    law = problem.posterior(y)
    exact = law.sample((NUM_JUDGED,))
    if bridge is None:
        x = law.sample((NUM_JUDGED,))
    else:
        bridge.sampler = Sampler(EVALUATIONS)
        x = bridge(y).sample((NUM_JUDGED,))
    z = torch.linalg.solve_triangular(law.scale_tril, (x - law.mean).T, upper=False).double()
    row = {
        "mean": float(z.mean(1).norm()) / math.sqrt(DIM),
        "covariance": float((z.cov() - torch.eye(DIM)).norm()) / math.sqrt(DIM),
    }
    return row | ({"c2st": float(c2st(x, exact))} if test else {})


def of_density(bridge: VSDM, problem: Problem, index: int) -> dict[str, float]:
    """Error of the flow's log density at exact draws."""
    torch.manual_seed(2000 + index)
    y = problem.observed[index]
    law = problem.posterior(y)
    x = law.sample((NUM_POINTS,))
    bridge.sampler = Sampler(EVALUATIONS)
    gap = bridge(y).log_prob(x) - law.log_prob(x)
    return {"median": float(gap.abs().median()), "bias": float(gap.mean())}


def of_weights(bridge: VSDM, problem: Problem, index: int, steps: int) -> dict[str, list[float]]:
    """Each replicate's estimate of the evidence, as a share of it, and its ESS/N."""
    torch.manual_seed(3000 + index)
    y = problem.observed[index]
    bridge.sampler = Sampler(path_steps=steps)
    value, log_q = bridge(y).draws((NUM_REPLICATES, NUM_WEIGHTED))
    weights = (problem.log_joint(value, y) - log_q - problem.log_evidence(y)).double().exp()
    ess = weights.sum(1).square() / weights.square().sum(1) / NUM_WEIGHTED
    return {"evidence": weights.mean(1).tolist(), "ess": ess.tolist()}


def run_all(store: Store, seed: int) -> None:
    """The floor and the models, one after the other; the cheap figures before the classifiers."""
    problem = Problem(seed)
    bridges: dict[str, VSDM] = {}
    for model in MODELS:
        bridge, seconds = fitted(model, problem, seed, store.path.parent)
        store.once(f"{model.name}, fit", lambda seconds=seconds: {"seconds": seconds})
        bridges[model.name] = bridge
        for index in range(NUM_OBSERVED):
            store.once(f"{model.name}, {index}, density", partial(of_density, bridge, problem, index))
            for steps in PATH_STEPS:
                name = f"{model.name}, {index}, weights {steps}"
                store.once(name, partial(of_weights, bridge, problem, index, steps))
        print(model.name, f"{seconds:.0f} s", flush=True)
    for index in range(NUM_OBSERVED):
        for name, one in [*bridges.items(), ("floor", None)]:
            key = f"{name}, {index}, draws"
            print(key, store.once(key, partial(of_draws, one, problem, index, True)), flush=True)


class Report:
    """Tables and verdicts of the cells that are there."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def of(self, name: str, kind: str) -> list[dict[str, Any]]:
        keys = [f"{name}, {index}, {kind}" for index in range(NUM_OBSERVED)]
        return [self.store.rows[key] for key in keys if key in self.store.rows]

    def average(self, name: str, kind: str, score: str) -> float:
        values = [row[score] for row in self.of(name, kind)]
        return mean(values) if values else math.nan

    def draws(self) -> str:
        rows = []
        for name in ["floor", *(model.name for model in MODELS)]:
            cells = [self.average(name, "draws", score) for score in ("mean", "covariance", "c2st")]
            cells += [self.average(name, "density", score) for score in ("median", "bias")]
            seconds = self.store.rows.get(f"{name}, fit", {}).get("seconds", math.nan)
            rows.append([name, len(self.of(name, "draws")), *(f"{cell:.3f}" for cell in cells), f"{seconds:.0f}"])
        columns = ["", "observations", "mean error", "cov error", "C2ST", "median |log q - log p|", "bias", "CPU s"]
        return table(columns, rows)

    def weights(self, name: str, steps: int) -> tuple[float, float, float, float, int]:
        """ESS/N; the evidence's estimate, its z-score over all replicates; the largest of one observation; how many."""
        rows = self.of(name, f"weights {steps}")
        every = [value for row in rows for value in row["evidence"]]
        largest = max((abs(z_score(row["evidence"])) for row in rows), default=math.nan)
        ess = [value for row in rows for value in row["ess"]]
        if not every:
            return (math.nan,) * 4 + (0,)
        return mean(ess), mean(every), z_score(every), largest, len(every)

    def corrections(self) -> str:
        rows = []
        for model in MODELS:
            for steps in PATH_STEPS:
                ess, value, z, largest, num = self.weights(model.name, steps)
                rows.append([model.name, steps, f"{ess:.3f}", f"{value:.4f}", f"{z:+.2f}", f"{largest:.2f}", num])
        return table(["", "steps", "ESS/N", "evidence / exact", "z", "largest |z|", "replicates"], rows)

    def verdicts(self) -> str:
        lines = []
        for model in MODELS:
            test = self.average(model.name, "draws", "c2st")
            log = self.average(model.name, "density", "median")
            scores = [self.weights(model.name, steps)[2] for steps in PATH_STEPS]
            lines += [
                f"{said(test <= GOAL_C2ST)}  {model.name}: C2ST {test:.3f} <= {GOAL_C2ST} at {EVALUATIONS} evaluations",
                f"{said(log <= GOAL_LOG)}  {model.name}: flow's median |log q - log p| {log:.4f} <= {GOAL_LOG} nat",
                f"{said(max(map(abs, scores)) < 3)}  {model.name}: path weights unbiased for the evidence, z "
                + ", ".join(f"{z:+.1f} at {steps} steps" for z, steps in zip(scores, PATH_STEPS, strict=True)),
            ]
        return "\n".join(["Goals", *lines])


def said(good: bool) -> str:
    return "met    " if good else "NOT met"


def z_score(shares: Sequence[float]) -> float:
    """Of the mean of independent estimates of 1."""
    values = torch.tensor(shares, dtype=torch.float64)
    return float((values.mean() - 1) / values.std() * math.sqrt(len(values)))


NOTE = f"""theta ~ N(0, I) in R^4, y = G theta + N(0, I) in R^4; the posterior's deviations are
{", ".join(map(str, DEVIATIONS))} along turned axes. {NUM_PAIRS:,} pairs, {NUM_STEPS:,} updates of {BATCH} (half as
many for the covariance head), b_max 10 where not said, one fit each.
Draws: {EVALUATIONS} evaluations, {NUM_JUDGED:,} a side, means over the observations. With the exact mean m and
covariance L L', mean error is |L^-1 (m^ - m)| / sqrt(4) and cov error |L^-1 S L^-T - I|_F / sqrt(4). C2ST as the
benchmarks define it (5 folds, two layers of 40). Flow density: 20 Heun steps at {NUM_POINTS} exact draws. Path
weights: {NUM_REPLICATES} replicates of {NUM_WEIGHTED} draws an observation; evidence / exact is their mean estimate of
p(y) by p(y); z over all replicates, and the largest of one observation.
The regression of theta on y is exact here, so the default models (regression folded in) are near a ceiling. "no
regression": it is shown the squares of y alone, of which it learns nothing, and the networks must learn all; VSDM's D
is then I, the prior's.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="linear_gaussian", help="JSON file without its ending")
    parser.add_argument("--report", action="store_true", help="of the cells that have finished, without a new one")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    asked = arguments()
    RESULTS.mkdir(exist_ok=True)
    store = Store(asked.cache)
    if not asked.report:
        run_all(store, 0)
    report = Report(store)
    title = header("Linear-Gaussian inverse problem", 0)
    write("linear_gaussian", "\n".join([title, NOTE, report.verdicts(), "", report.draws(), "", report.corrections()]))


if __name__ == "__main__":
    main()
