"""The seed paper's first experiments: bandwidth, step and their mismatch on a Gaussian, a mixture and a Swiss roll.

Run as `python -m benchmarks.bridge_experiments`; `benchmarks.bridge_dynamics` is the example from dynamics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import ot
import torch
from matplotlib.axes import Axes
from sklearn.datasets import make_swiss_roll
from torch import Tensor

from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import KernelLangevinBridge

SEED, NUM, STEPS, AMBIENT, THICKNESS = 0, 600, 30, 20, 0.02
ETAS = [10.0**k for k in range(-4, 5)]  # bandwidth = epsilon / 2 = Langevin time of a matched step
FINER = [10.0 ** (k / 2) for k in range(-8, 0)] + ETAS[4:]  # where only the step varies
SCHEMES = dict(zip(["plain", "split-step", "strang", "data-aware"], ["tab:red", "tab:blue", "tab:purple", "tab:green"]))
EXPONENTS = {"fixed": 0.0, "beta -1/4": -0.25, "beta -1/2": -0.5, "beta -1": -1.0}
NOTE = f"""{NUM} training draws, {NUM} chains of {STEPS} steps from smoothed training draws, metric the identity.
W2 is exact, over its floor: the mean between honest samples of this size; +-.15 of it is noise.
'Novelty' is the median distance to the nearest training draw over that of honest draws: 0 repeats the
training set, 1 is honest, more is off the law. The mixture's modes are weighted to a sixth each."""
LOST = 1e6  # a chain farther out than this, or not finite

Draw = Callable[[int], Tensor]
Curves = dict[str, list[tuple[float, float]]]

ANGLES = 2 * math.pi * torch.arange(6, dtype=torch.float64) / 6
CENTRES = 1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WIDTHS = torch.logspace(math.log10(0.04), math.log10(0.4), 6, dtype=torch.float64)
FRAME = torch.linalg.qr(torch.randn(AMBIENT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)))[0]


def gaussian(num: int) -> Tensor:
    return torch.randn(num, 2, dtype=torch.float64) @ torch.tensor([[1.2, 0.8], [0.0, 0.5]], dtype=torch.float64)


def mixture(num: int) -> Tensor:
    """Six equal modes on a circle whose widths differ by ten, with equal counts."""
    mode = torch.arange(num) % 6
    return CENTRES[mode] + WIDTHS[mode, None] * torch.randn(num, 2, dtype=torch.float64)


def swiss_roll(num: int) -> Tensor:
    seed = int(torch.randint(2**31, (1,)))
    return torch.as_tensor(make_swiss_roll(num, noise=0.4, random_state=seed)[0][:, [0, 2]]) / 7.5


TARGETS: dict[str, Draw] = {"Gaussian": gaussian, "mixture": mixture, "Swiss roll": swiss_roll}


def embedded(draw: Draw) -> Draw:
    """The same law in a plane of 20 dimensions, with a little noise around it."""
    return lambda num: draw(num) @ FRAME.T + THICKNESS * torch.randn(num, AMBIENT, dtype=torch.float64)


def mode_weights(x: Tensor, modes: bool) -> Tensor:
    """Equal weights; on the mixture such that every mode has a sixth, since W2 would else be noise of the counts."""
    if not modes:
        return torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    plane = x @ FRAME if x.shape[1] == AMBIENT else x
    nearest = (torch.cdist(plane, CENTRES) / WIDTHS).argmin(1)
    counts = torch.bincount(nearest, minlength=6).double()
    weights = 1 / counts[nearest]
    return weights / weights.sum()


@dataclass
class Case:
    """A target with training draws, test draws and the floors: scores between honest samples of this size."""

    name: str
    draw: Draw

    def __post_init__(self) -> None:
        self.train, self.test, other = self.draw(NUM), self.draw(NUM), self.draw(NUM)
        pairs = [(self.train, self.test), (other, self.test), (other, self.train)]
        self.floor = sum(self.wasserstein(x, y) for x, y in pairs) / 3
        self.near = self.distance(other)

    def wasserstein(self, x: Tensor, y: Tensor) -> float:
        """Exact W2."""
        if not bool(torch.isfinite(x).all()) or x.abs().max() > LOST:
            return math.inf
        a, b = (mode_weights(v, self.name == "mixture").numpy() for v in (x, y))
        return math.sqrt(ot.emd2(a, b, ot.dist(x.numpy(), y.numpy()), numItermax=1_000_000))

    def distance(self, x: Tensor) -> float:
        """Median distance to the nearest training draw."""
        return float(torch.cdist(x, self.train).min(1).values.median())

    def run(self, **options: object) -> tuple[Tensor, float]:
        """Draws of a bridge fitted to the training draws, and its eta."""
        bridge = KernelLangevinBridge(self.train.shape[1], metric="identity", num_steps=STEPS, **options)
        bridge.fit(self.train, progress=False)
        return bridge().sample((NUM,)), bridge.epsilon / 2

    def score(self, draws: Tensor) -> tuple[float, float]:
        """W2 to the test draws and distance to the training draws, both over those of honest draws."""
        return self.wasserstein(draws, self.test) / self.floor, self.distance(draws) / self.near


def matched(case: Case) -> Curves:
    """Bandwidth and step both eta."""
    return {s: [case.score(case.run(scheme=s, epsilon=2 * eta)[0]) for eta in ETAS] for s in SCHEMES}


def mismatched(case: Case, bandwidth: float) -> Curves:
    """The bandwidth stays, the Langevin time of the step is eta."""
    fixed = {"epsilon": 2 * bandwidth}
    return {
        s: [case.score(case.run(scheme=s, step_size=eta / bandwidth, **fixed)[0]) for eta in FINER] for s in SCHEMES
    }


def bandwidths(case: Case) -> Curves:
    """Fixed and variable bandwidths, matched, with the data-aware noise."""
    return {
        name: [case.score(case.run(epsilon=2 * eta, bandwidth_exponent=beta)[0]) for eta in ETAS]
        for name, beta in EXPONENTS.items()
    }


def plot_curves(
    axis: Axes, curves: Curves, colours: dict[str, str], style: str = "-", etas: list[float] = ETAS
) -> None:
    """W2 over eta; what was lost stands as crosses on top, a row a scheme."""
    for rank, (name, scores) in enumerate(curves.items()):
        kept = [(eta, w) for eta, (w, _) in zip(etas, scores) if w < math.inf]
        axis.loglog(*zip(*kept), style, label=name, color=colours[name], lw=1.4, ms=3, marker="o")
        lost = [(eta, 1e4 / 2.2**rank) for eta, (w, _) in zip(etas, scores) if not w < math.inf]
        if lost:
            axis.plot(*zip(*lost), "x", color=colours[name], ms=7)
    axis.axhline(1, color="0.5", lw=0.8, ls=":")


def plot_row(row: list[Axes], case: Case, draws: Tensor, eta: float, curves: dict[str, Curves]) -> None:
    row[0].scatter(*case.train.T, s=3, color="0.7", label="training draws")
    row[0].scatter(*draws.T, s=3, color="tab:green", label="bridge, unattended")
    row[0].set(title=f"{case.name}: W2 {case.score(draws)[0]:.2f} times its floor", aspect="equal")
    row[0].set_ylim(top=row[0].get_ylim()[1] + 0.2 * (row[0].get_ylim()[1] - row[0].get_ylim()[0]))
    row[0].legend(loc="upper right", fontsize=7, markerscale=3)
    plot_curves(row[1], curves["matched"], SCHEMES)
    plot_curves(row[2], curves["mismatched"], SCHEMES, etas=FINER)
    row[2].axvline(eta, color="0.5", lw=0.8, ls=":")
    colours = dict(zip(EXPONENTS, ["black", "tab:olive", "tab:orange", "tab:cyan"]))
    plot_curves(row[3], curves["plane"], colours)
    plot_curves(row[3], curves["space"], colours, "--")
    row[1].set(title="bandwidth = step = $\\eta$", ylabel="W2 over its floor", ylim=(0.5, 2e4))
    row[2].set(title=f"bandwidth {eta:.2g} fixed, step $\\eta$ (x: lost)", ylim=(0.5, 2e4))
    row[3].set(title=f"variable bandwidth (dashed: {AMBIENT}-d)", ylim=(0.5, 20))
    for axis in row[1:]:
        axis.set_xlabel(r"$\eta$")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    RESULTS.mkdir(exist_ok=True)
    fig, axes = plt.subplots(len(TARGETS), 4, figsize=(16, 3.6 * len(TARGETS)), constrained_layout=True)
    unattended, tables = [], {"matched": [], "novelty": [], "mismatched": [], "bandwidths": []}
    for row, (name, draw) in zip(axes, TARGETS.items()):
        plane, space = Case(name, draw), Case(name, embedded(draw))
        (draws, eta), (far, far_eta) = plane.run(), space.run()
        unattended += [[name, 2, eta, *plane.score(draws)], [name, AMBIENT, far_eta, *space.score(far)]]
        curves = {"matched": matched(plane), "mismatched": mismatched(plane, eta)}
        curves |= {"plane": bandwidths(plane), "space": bandwidths(space)}
        plot_row(row, plane, draws, eta, curves)
        for scheme in SCHEMES:
            tables["matched"].append([name, scheme, *(w for w, _ in curves["matched"][scheme])])
            tables["novelty"].append([name, scheme, *(near for _, near in curves["matched"][scheme])])
            tables["mismatched"].append([name, scheme, *(w for w, _ in curves["mismatched"][scheme])])
        for dim, part in ((2, curves["plane"]), (AMBIENT, curves["space"])):
            tables["bandwidths"] += [[name, dim, kind, *(w for w, _ in scores)] for kind, scores in part.items()]
    axes[0, 1].legend(fontsize=8)
    handles, labels = axes[0, 3].get_legend_handles_labels()
    axes[0, 3].legend(handles[: len(EXPONENTS)], labels[: len(EXPONENTS)], fontsize=8)
    fig.savefig(RESULTS / "bridge_experiments.png", dpi=100)

    steps = [f"{eta:g}" for eta in ETAS]
    by_scheme = ["target", "scheme", *steps]
    write(
        "bridge_experiments",
        "\n".join(
            [
                header("Kernel-Langevin bridge: bandwidth, step and their mismatch", SEED),
                NOTE,
                "\nUnattended: data-aware, eta from the draws",
                table(["target", "d", "eta", "W2 / floor", "novelty"], unattended),
                "\nBandwidth = step = eta: W2 / floor (stable at every eta, but not accurate at every eta)",
                table(by_scheme, tables["matched"]),
                "\nThe same runs: novelty",
                table(by_scheme, tables["novelty"]),
                "\nBandwidth unattended, step eta alone varied: W2 / floor (inf: lost)",
                table(["target", "scheme", *(f"{eta:.2g}" for eta in FINER)], tables["mismatched"]),
                "\nBandwidth fixed or variable (rho = density^beta), data-aware: W2 / floor",
                table(["target", "d", "bandwidth", *steps], tables["bandwidths"]),
            ]
        ),
    )


if __name__ == "__main__":
    main()
