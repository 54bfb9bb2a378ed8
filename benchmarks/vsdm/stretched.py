"""Spiral and checkerboard stretched x8: VSDM against SGM, whitened SGM and flow matching at few evaluations.

Run as `python -m benchmarks.vsdm.stretched`. Finished fits are kept, and a second call goes on from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from scipy.stats import t as student
from torch import Tensor

from benchmarks.lib.fits import timed
from benchmarks.lib.pictures import cloud, save
from benchmarks.lib.report import header, spread, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import SGM, VSDM, Sampler
from pyro_sb.datasets.planar import Checkerboard, PlanarLaw, SwissRoll
from pyro_sb.metrics import sliced_wasserstein2, wasserstein2
from pyro_sb.nn import ResidualNet
from pyro_sb.training import train

NUM_STEPS, BATCH, NUM_TRAIN = 2000, 512, 20_000
EVALUATIONS, JUDGED = (6, 10, 20), 10
NUM_EXACT, NUM_SLICED = 2000, 20_000
NUM_PATHS, PATH_STEPS = 1000, 50
SHOWN, SHOWN_PATHS = 1500, 20
GOAL = 0.20


@dataclass(frozen=True)
class Shape:
    """A planar law, each axis times a factor."""

    name: str
    law: PlanarLaw
    factors: tuple[float, float]

    def sample(self, num: int) -> Tensor:
        return self.law.sample((num,)) * torch.tensor(self.factors)


SHAPES = [Shape("spiral", SwissRoll(), (2.5, 20.0)), Shape("checkerboard", Checkerboard(), (8.0, 1.0))]


@dataclass(frozen=True)
class Diffusion:
    """A diffusion and the coordinates that it is fitted in: the user's, or whitened by a Cholesky factor."""

    name: str
    make: Callable[..., VSDM]
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    whiten: bool = False
    starts: tuple[str, ...] = ("conditional", "moment")

    def fit(self, x: Tensor) -> "FittedDiffusion":
        centre = x.mean(0) if self.whiten else torch.zeros(2)
        root = torch.linalg.cholesky(x.T.cov()) if self.whiten else torch.eye(2)
        bridge = self.make(2, step_covariance="analytic", **self.arguments)
        inner = torch.linalg.solve_triangular(root, (x - centre).T, upper=False).T
        options = {"num_updates": NUM_STEPS, "batch_size": BATCH, "progress": False}
        bridge.fit(inner.contiguous(), **(options | self.options))
        return FittedDiffusion(bridge, centre, root)


@dataclass
class FittedDiffusion:
    bridge: VSDM
    centre: Tensor
    root: Tensor

    @property
    def rates(self) -> list[float]:
        return [float(rate) for rate in self.bridge.rates]

    def draws(self, num: int, evaluations: int, start: str) -> Tensor:
        self.bridge.start, self.bridge.sampler = start, Sampler(num_steps=evaluations)
        return self.centre + self.bridge().sample((num,)) @ self.root.T

    def paths(self, num: int, start: str) -> tuple[Tensor, Tensor]:
        self.bridge.start = start
        times, states = self.bridge.paths(num, PATH_STEPS, solver="multistep")
        return times, self.centre + states @ self.root.T


@dataclass(frozen=True)
class FlowMatching:
    """Linear paths from N(0, I) to standardised data: the same net, loop and budget; Heun's method."""

    name: str = "flow matching, Heun"
    starts: tuple[str, ...] = ("standard",)

    def fit(self, x: Tensor) -> "FittedFlow":
        flow = FittedFlow(ResidualNet(2, 2), x.mean(0), x.std(0))
        z = ((x - flow.centre) / flow.scale)[torch.randperm(len(x))]
        held_out, rows = z[: len(z) // 10], z[len(z) // 10 :]
        judge = noised(held_out[torch.randint(len(held_out), (4096,))])

        def validate() -> float:
            with torch.no_grad():
                return float(flow.loss(*judge))

        train(
            flow.net.parameters(),
            lambda: flow.loss(*noised(rows[torch.randint(len(rows), (BATCH,))])),
            num_updates=NUM_STEPS,
            learning_rate=2e-3,
            validate=validate,
            keep_best=True,
            num_checks=40,
            patience=8,
            ema=0.999,
            progress=False,
            description=self.name,
        )
        return flow


def noised(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times, states on the line from noise to a draw, and the velocity."""
    noise, t = torch.randn_like(z), torch.rand(len(z))
    return t, torch.lerp(noise, z, t[:, None]), z - noise


@dataclass
class FittedFlow:
    net: ResidualNet
    centre: Tensor
    scale: Tensor
    rates: tuple[float, ...] = ()

    def loss(self, t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        return 0.5 * (self.net(t, x) - velocity).square().mean()

    def draws(self, num: int, evaluations: int, start: str) -> Tensor:
        return self._heun(num, evaluations // 2)[1][-1]

    def paths(self, num: int, start: str) -> tuple[Tensor, Tensor]:
        return self._heun(num, PATH_STEPS)

    @torch.no_grad()
    def _heun(self, num: int, num_steps: int) -> tuple[Tensor, Tensor]:
        x, times = torch.randn(num, 2), torch.linspace(0, 1, num_steps + 1)
        states = [x]
        for now, then in zip(times[:-1], times[1:], strict=True):
            slope = self.net(now, x)
            x = x + 0.5 * (then - now) * (slope + self.net(then, x + (then - now) * slope))
            states.append(x)
        return times, self.centre + self.scale * torch.stack(states)


# The stochastic rule trains for half as many steps again while A moves: two thirds keep the budget.
STOCHASTIC = {"num_updates": NUM_STEPS * 2 // 3, "num_stages": 30}
CLOSED = Diffusion("VSDM, closed-form D", VSDM)
TOLERANCE = Diffusion("VSDM, tolerance D", VSDM, {"drift_matrix": "tolerance"})
ADAPTED = Diffusion("VSDM, stochastic D", VSDM, {"drift_matrix": "stochastic"}, STOCHASTIC)
SGM10 = Diffusion("SGM, b_max 10", SGM, {"preconditioning": "scalar"})
SGM20 = Diffusion("SGM, b_max 20", SGM, {"preconditioning": "scalar", "b_max": 20.0})
WHITENED = Diffusion("SGM, whitened data", SGM, {"preconditioning": "scalar"}, whiten=True)
Model = Diffusion | FlowMatching
MODELS: list[Model] = [CLOSED, SGM20, WHITENED, TOLERANCE, SGM10, FlowMatching(), ADAPTED]
OURS, PICTURED = [CLOSED, TOLERANCE, ADAPTED], [CLOSED, SGM20, WHITENED]


class Judge:
    """Target draws of a seed, standardised."""

    def __init__(self, shape: Shape, seed: int) -> None:
        torch.manual_seed(10_000 + seed)
        self.scale = shape.sample(200_000).std(0)
        self.cloud, self.other = shape.sample(NUM_SLICED) / self.scale, shape.sample(NUM_SLICED) / self.scale

    def exact(self, x: Tensor) -> float:
        y = self.cloud[:NUM_EXACT]
        return float(wasserstein2(x[:NUM_EXACT], y, floor_draws=y[:2]))  # the floor has a row of its own

    def sliced(self, x: Tensor) -> float:
        return float(sliced_wasserstein2(x, self.cloud, floor_draws=self.cloud[:2]))

    def floors(self) -> dict[str, float]:
        return {"w2": self.exact(self.other), "sliced": self.sliced(self.other)}


def scores(fitted: FittedDiffusion | FittedFlow, judge: Judge, start: str, seed: int) -> dict[str, float]:
    """Distances at each number of evaluations, and straightness; the noise is the same for all models."""
    row = {}
    for evaluations in EVALUATIONS:
        torch.manual_seed(20_000 + seed)
        num = NUM_SLICED if evaluations == JUDGED else NUM_EXACT
        x = fitted.draws(num, evaluations, start) / judge.scale
        row[f"w2 {evaluations}"] = judge.exact(x)
        if evaluations == JUDGED:
            row["sliced"] = judge.sliced(x)
    torch.manual_seed(30_000 + seed)
    times, states = fitted.paths(NUM_PATHS, start)
    return row | straightness(times, states / judge.scale)


def straightness(times: Tensor, states: Tensor) -> dict[str, float]:
    """Mean squared gap of chord and velocity by the mean squared chord; mean arc length by mean chord, less 1."""
    chord, steps = states[-1] - states[0], states.diff(dim=0)
    growth = times.diff()[:, None, None]
    gap = ((steps / growth - chord).square() * growth).sum((0, 2))
    arc, length = steps.norm(dim=-1).sum(0), chord.norm(dim=-1)
    return {
        "straight": float(gap.mean() / chord.square().sum(-1).mean()),
        "arc": float(arc.mean() / length.mean()) - 1,
    }


def run(store: Store, shape: Shape, model: Model, seed: int, judge: Judge) -> None:
    """One fit and all its scores."""
    torch.manual_seed(seed)
    x = shape.sample(NUM_TRAIN)
    fitted, seconds = timed(model.fit, x)
    row: dict[str, Any] = {"seconds": seconds, "rates": list(fitted.rates)}
    row |= {start: scores(fitted, judge, start, seed) for start in model.starts}
    if seed == 0 and model in PICTURED:
        torch.manual_seed(40_000)
        draws = fitted.draws(SHOWN, JUDGED, "moment") / judge.scale
        paths = fitted.paths(SHOWN_PATHS, "moment")[1] / judge.scale
        store.put(f"draws, {shape.name}, {model.name}", rounded(draws))
        store.put(f"paths, {shape.name}, {model.name}", rounded(paths))
    store.put(key(shape, model, seed), row)
    figures = {start: f"{row[start][f'w2 {JUDGED}']:.3f}" for start in model.starts}
    print(key(shape, model, seed), figures, f"{row['seconds']:.0f} s", flush=True)


def rounded(x: Tensor) -> Any:
    """Nested lists to three decimals."""
    return (x.double() * 1000).round().div(1000).tolist()


def key(shape: Shape, model: Model, seed: int) -> str:
    return f"run, {shape.name}, {model.name}, seed {seed}"


def run_all(store: Store, shapes: Sequence[Shape], seeds: int) -> None:
    """A shape after the other, each seed by seed, so that a partial table has all models."""
    for shape, seed in product(shapes, range(seeds)):
        if all(key(shape, model, seed) in store.rows for model in MODELS):
            continue
        judge = Judge(shape, seed)
        store.once(f"floor, {shape.name}, seed {seed}", judge.floors)
        for model in MODELS:
            if key(shape, model, seed) not in store.rows:
                run(store, shape, model, seed, judge)


class Report:
    """Tables and verdicts; every row says how many seeds it holds, and differences are over the seeds of both."""

    def __init__(self, store: Store, shapes: Sequence[Shape], asked: int) -> None:
        self.store, self.asked = store, asked
        self.shapes = [shape for shape in shapes if any(self.seeds(shape, model) for model in MODELS)]

    def seeds(self, shape: Shape, *models: Model) -> list[int]:
        """Those in which all these models have finished."""
        return [s for s in range(self.asked) if all(key(shape, model, s) in self.store.rows for model in models)]

    def of(self, shape: Shape, model: Model, start: str, score: str, seeds: Sequence[int]) -> list[float]:
        rows = [self.store.rows[key(shape, model, seed)] for seed in seeds]
        return [(row if score == "seconds" else row[start])[score] for row in rows]

    def floor(self, shape: Shape, score: str, seeds: Sequence[int]) -> list[float]:
        return [row[score] for row in self.store.found(f"floor, {shape.name}, seed {seed}" for seed in seeds)]

    def table(self, shape: Shape) -> str:
        names = [f"w2 {n}" for n in EVALUATIONS] + ["sliced", "straight", "arc"]
        columns = ["", "start", "seeds", "D", *(f"W2 at {n}" for n in EVALUATIONS), f"sliced at {JUDGED}"]
        exact, sliced = (self.floor(shape, name, range(self.asked)) for name in ("w2", "sliced"))
        cells = [*[spread(exact)] * len(EVALUATIONS), spread(sliced)]
        rows = [["floor: target draws", "", len(exact), "", *cells, "", "", ""]]
        for model in sorted(MODELS, key=lambda model: model.name, reverse=True):
            seeds = self.seeds(shape, model)
            if not seeds:
                rows.append([model.name, "", 0, *["not run"] * 4, *[""] * 4])
                continue
            shown = ", ".join(f"{rate:.2f}" for rate in self.store.rows[key(shape, model, seeds[0])]["rates"]) or "-"
            seconds = f"{mean(self.of(shape, model, '', 'seconds', seeds)):.0f}"
            for start in model.starts:
                cells = [spread(self.of(shape, model, start, name, seeds)) for name in names]
                rows.append([model.name, start, len(seeds), shown, *cells, seconds])
        sd = Judge(shape, 0).scale
        title = f"\n{shape.name}, {self.asked} seeds asked for; sd of the target {sd[0]:.1f} and {sd[1]:.1f}"
        return f"{title}\n{table([*columns, 'S_rf', 'arc-1', 'CPU s'], rows)}"

    def against(
        self, shape: Shape, ours: Diffusion, theirs: Diffusion, start: str, score: str
    ) -> tuple[float, float, float]:
        """Gap by which ours lies below theirs, as a share of theirs; the paired difference and its 95 % half width."""
        seeds = self.seeds(shape, ours, theirs)
        base = self.of(shape, theirs, start, score, seeds)
        gaps = [a - b for a, b in zip(self.of(shape, ours, start, score, seeds), base, strict=True)]
        wide = stdev(gaps) / len(gaps) ** 0.5 * student.ppf(0.975, len(gaps) - 1) if len(gaps) > 1 else float("nan")
        return -mean(gaps) / mean(base), mean(gaps), float(wide)

    def verdicts(self, shape: Shape) -> list[str]:
        """Each goal with its figure, where both models have run."""
        lines, starts, w2 = [], ("conditional", "moment"), f"w2 {JUDGED}"
        for ours, start in product(OURS, starts):
            if seeds := self.seeds(shape, ours, SGM20):
                share, gap, wide = self.against(shape, ours, SGM20, start, w2)
                sliced = self.against(shape, ours, SGM20, start, "sliced")[0]
                lines.append(
                    f"{'met    ' if share >= GOAL else 'NOT met'}  {shape.name}, {ours.name}, {start} start, "
                    f"{counted(seeds)}: W2 {-share:+.0%} of SGM-20's ({within(gap, wide)}), sliced {-sliced:+.0%}"
                )
        for start in starts:
            if seeds := self.seeds(shape, SGM20):
                exact, sliced = (
                    mean(self.floor(shape, floor, seeds)) / mean(self.of(shape, SGM20, start, score, seeds)) - 1
                    for floor, score in (("w2", w2), ("sliced", "sliced"))
                )
                lines.append(
                    f"         fresh target draws, {start} start: W2 {exact:+.0%} of SGM-20's, sliced {sliced:+.0%}"
                )
        for ours, start in product(OURS, starts):
            if seeds := self.seeds(shape, ours, WHITENED):
                _, gap, wide = self.against(shape, ours, WHITENED, start, w2)
                word = "better" if gap < -wide else "unclear" if gap <= wide else "worse" if gap > wide else "?"
                lines.append(
                    f"{word:7}  {shape.name}, {ours.name}, {start} start, {counted(seeds)}, against whitened SGM: "
                    f"W2 {within(gap, wide)}"
                )
        return lines

    def text(self) -> str:
        lines = [line for shape in self.shapes for line in self.verdicts(shape)]
        met, missed = (sum(line.startswith(word) for line in lines) for word in ("met", "NOT met"))
        head = (
            f"Goals and verdicts: the first goal is met by {met} of {met + missed} rows; unclear: within the half width"
        )
        return "\n".join([head, *lines, *(self.table(shape) for shape in self.shapes)])


def counted(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"


def within(gap: float, wide: float) -> str:
    """A difference, with its half width where there is one."""
    return f"{gap:+.3f}" + (f" +- {wide:.3f}" if wide == wide else "")


NOTE = f"""Goals: at {JUDGED} evaluations VSDM's standardised W2 at least {GOAL:.0%} below unwhitened SGM's with b_max
20 and the same start law; level with SGM on whitened data (paired over seeds, 95 % by Student's t).

W2 is exact, {NUM_EXACT:,} draws against {NUM_EXACT:,} of the target, each axis divided by the target's standard
deviation; sliced W2 has {NUM_SLICED:,} draws a side and 64 directions. Means +- standard deviations over seeds; the
floor is what fresh draws of the target score against the same clouds. All models: {NUM_TRAIN:,} training draws, the
same residual net (3 x 128), {NUM_STEPS:,} updates of {BATCH} (stochastic D: a third of them while A moves), Adam 2e-3,
EMA .999, one thread, float32. One axis of each shape is stretched x8.
Evaluations are of the network: the multistep solver has one a step; flow matching has Heun's method, two a step, on
data standardised by axis. b_max is 10 where not said. SGM has one preconditioning for both axes, VSDM one a direction.
start: the source, N(0, Sigma_T) ("conditional") or with the moments of the noised target ("moment"); one fit has both.
S_rf is E|chord - velocity|^2 / E|chord|^2, arc-1 the mean arc by the mean chord, less 1, of {NUM_PATHS:,} ODE paths of
{PATH_STEPS} steps in standardised axes. Small S_rf is no quality by itself: noising that barely moves the draws has
it. Flow matching draws them in and out again where source and target are as wide, so its chords are short and its S_rf
large.
"""


def picture(report: Report) -> None:
    """Draws of seed 0 at the judged evaluations in blue, ODE paths in orange, over target draws in grey."""
    rows = report.store.rows
    shapes = [s for s in report.shapes if all(f"draws, {s.name}, {m.name}" in rows for m in PICTURED)]
    if not shapes:
        return
    size = (3.6 * len(PICTURED), 3.7 * len(shapes))
    fig, grid = plt.subplots(len(shapes), len(PICTURED), figsize=size, squeeze=False)
    for line, shape in zip(grid, shapes, strict=True):
        target = Judge(shape, 0).cloud[: 2 * SHOWN]
        for axes, model in zip(line, PICTURED, strict=True):
            name = f"{shape.name}, {model.name}"
            draws, paths = (torch.tensor(rows[f"{kind}, {name}"]) for kind in ("draws", "paths"))
            cloud(axes, draws, target, name)
            axes.plot(*paths.permute(2, 0, 1), color="tab:orange", lw=0.7)
            axes.plot(*paths[0].T, "o", ms=2.5, color="tab:orange")
    title = f"{JUDGED} evaluations (blue), target (grey), ODE paths (orange); axes in standard deviations"
    fig.suptitle(title, fontsize=9)
    fig.tight_layout()
    save(fig, "stretched")


def main() -> None:
    names = [shape.name for shape in SHAPES]
    shapes = {"nargs": "*", "metavar": "SHAPE", "default": names, "help": f"of {', '.join(names)}"}
    asked = command(__doc__, seeds=5, cached=True, shapes=shapes)
    store = Store("stretched")
    chosen = [shape for shape in SHAPES if shape.name in asked.shapes]
    if not asked.report:
        run_all(store, chosen, asked.seeds)
    report = Report(store, chosen, asked.seeds)
    write("stretched", f"{header('Stretched shapes at few evaluations', 0)}\n{NOTE}\n{report.text()}")
    picture(report)


if __name__ == "__main__":
    main()
