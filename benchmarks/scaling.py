"""How the light bridges' work grows with dimension and number of components, and what they reach at 64 and 128.

Run as `python -m benchmarks.scaling`. An interrupted run goes on from `scaling_*.cache.json`; figures of some
dimensions alone, side by side: `python -m benchmarks.scaling 128`. `--short` tries the script, and writes nothing.
"""

import argparse
import math
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.known_plans import cached
from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import LightSB, LightSBBM
from pyro_sb.metrics import sliced_wasserstein2

SEED, EPSILON, BETA, RADIUS = 0, 1.0, 10.0, 5.0
DIMS, SIZES = (2, 8, 32, 64, 128), (5, 10, 20, 50)
SCORED, FULL_SIZES = (64, 128), (5, 10)
TRAIN, DRAWS, PROJECTIONS, BATCH, WARM = 100_000, 50_000, 32, 512, 10
Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A kind of bridge, its size, and the updates that it is given."""

    kind: str
    dim: int
    size: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}, d = {self.dim}, J = {self.size}"

    def bridge(self) -> LightSB:
        covariance = "full" if self.kind.endswith("full") else "diagonal"
        if self.kind.startswith("LightSBBM"):
            return LightSBBM(self.dim, num_components=self.size, epsilon=EPSILON, beta=BETA, covariance=covariance)
        return LightSB(self.dim, num_components=self.size, epsilon=EPSILON, covariance=covariance)


KINDS = {"LightSB": 1000, "LightSBBM": 150, "LightSB, full": 300}  # updates of each
STYLES = {"LightSB": "-", "LightSBBM": "--", "LightSB, full": ":"}


def cases(dim: int) -> list[Case]:
    chosen = {"LightSB": SIZES, "LightSBBM": SIZES, "LightSB, full": FULL_SIZES}
    return [Case(kind, dim, size, KINDS[kind]) for kind, sizes in chosen.items() for size in sizes]


def mixture(dim: int, size: int, num: int, generator: torch.Generator) -> Tensor:
    """Draws of a random mixture: centres at radius 5, diagonal variances log-uniform in [.1, 1], equal weights."""
    own = torch.Generator().manual_seed(SEED)
    locs = RADIUS * torch.nn.functional.normalize(torch.randn(size, dim, generator=own), dim=-1)
    widths = 10 ** (-0.5 * torch.rand(size, dim, generator=own))
    index = torch.randint(size, (num,), generator=generator)
    return locs[index] + widths[index] * torch.randn(num, dim, generator=generator)


def timed_fit(case: Case, target: Tensor, source: Tensor) -> tuple[LightSB, Figures]:
    """A fitted bridge, with CPU seconds from update to update and of the start."""
    bridge, stamps = case.bridge(), []
    loss = bridge.loss

    def clocked(*args: Any) -> Tensor:
        stamps.append(time.process_time())
        return loss(*args)

    begun = time.process_time()
    with mock.patch.object(bridge, "loss", clocked), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the number of updates is fixed, converged or not
        bridge.fit(target, source, num_updates=case.steps, batch_size=BATCH, progress=False)
    gaps = [late - early for early, late in zip(stamps[WARM:-1], stamps[WARM + 1 :])]
    return bridge, {"start": stamps[0] - begun, "median": median(gaps), "mean": fmean(gaps), "updates": len(stamps)}


def measure(case: Case) -> Figures:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED + 1)
    target, source = mixture(case.dim, case.size, TRAIN, generator), torch.randn(TRAIN, case.dim, generator=generator)
    bridge, cost = timed_fit(case, target, source)
    if case.dim not in SCORED:
        return cost
    fresh, other = (mixture(case.dim, case.size, DRAWS, generator) for _ in range(2))
    begun = time.process_time()
    draws = bridge.transport(torch.randn(DRAWS, case.dim, generator=generator))
    cost["draw"] = time.process_time() - begun
    score = sliced_wasserstein2(
        draws, fresh, reference=other, num_projections=PROJECTIONS, generator=torch.Generator().manual_seed(SEED)
    )
    return cost | {"sliced": float(score), "floor": score.floor}


def figures(dims: list[int], folder: Path, steps: int | None = None, kept: bool = False) -> dict[Case, Figures]:
    """Of every case in these dimensions; of an interrupted run what it has ``kept``."""
    found = {}
    for dim in dims:
        for case in cases(dim):
            asked = case if steps is None else replace(case, steps=steps)
            path = folder / f"scaling_{dim}.cache.json"
            found[case] = cached(path, case.name, None if kept else lambda asked=asked: measure(asked))
    return {case: cost for case, cost in found.items() if cost}


def power_law(found: dict[Case, Figures], kind: str, least: int) -> tuple[float, float, float, float]:
    """Seconds an update as c d^p J^q from dimension ``least`` on, and the largest factor that a figure lies off."""
    chosen = [(case, cost["median"]) for case, cost in found.items() if case.kind == kind and case.dim >= least]
    design = torch.tensor([[1.0, math.log(case.dim), math.log(case.size)] for case, _ in chosen], dtype=torch.float64)
    logs = torch.tensor([math.log(seconds) for _, seconds in chosen], dtype=torch.float64)[:, None]
    solution = torch.linalg.lstsq(design, logs).solution
    constant, over_dim, over_size = solution[:, 0].tolist()
    return math.exp(constant), over_dim, over_size, float((design @ solution - logs).abs().max().exp())


def milliseconds(own: dict[int, Figures]) -> list[float]:
    return [1e3 * cost["median"] for cost in own.values()]


def draw(found: dict[Case, Figures], path: Path) -> None:
    """Milliseconds an update against J and d, and the excess of the scores over their floor."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    colours = dict(zip(DIMS, plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(DIMS)).numpy()), strict=True))
    tones = dict(zip(SIZES, plt.get_cmap("plasma")(torch.linspace(0, 0.85, len(SIZES)).numpy()), strict=True))
    for kind, style in STYLES.items():
        for dim in DIMS:
            own = {case.size: cost for case, cost in found.items() if (case.kind, case.dim) == (kind, dim)}
            label = f"d = {dim}" if kind == "LightSBBM" else None
            left.loglog(list(own), milliseconds(own), style, marker="o", ms=4, color=colours[dim], label=label)
            if dim in SCORED:
                ratios = [cost["sliced"] / cost["floor"] for cost in own.values()]
                right.loglog(list(own), ratios, style, marker="o", ms=4, color=colours[dim], label=f"{kind}, d = {dim}")
        for size in SIZES:
            own = {case.dim: cost for case, cost in found.items() if (case.kind, case.size) == (kind, size)}
            label = f"J = {size}" if kind == "LightSBBM" else None
            middle.loglog(list(own), milliseconds(own), style, marker="o", ms=4, color=tones[size], label=label)
    right.axhline(1, color="0.6", lw=1)
    left.set(title="an update (solid LightSB, dashed LightSBBM,\ndotted LightSB full)", xlabel="J", ylabel="CPU ms")
    middle.set(title="the same against dimension", xlabel="d", ylabel="CPU ms")
    right.set(title=f"sliced W2 of {DRAWS:,} draws over its floor", xlabel="J", ylabel="ratio")
    times, ratios = (1, 2, 5, 10, 20, 50, 100), (1, 2, 3, 5)
    for axis, across, up in ((left, SIZES, times), (middle, DIMS, times), (right, SIZES, ratios)):
        axis.set_xticks(across, [str(tick) for tick in across])
        axis.set_yticks(up, [str(tick) for tick in up])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def law_row(found: dict[Case, Figures], kind: str, least: int) -> list[object]:
    constant, over_dim, over_size, off = power_law(found, kind, least)
    return [kind, f"d >= {least}", f"{1e3 * constant:.2g} ms", f"{over_dim:.2f}", f"{over_size:.2f}", f"{off:.2f}"]


def report(found: dict[Case, Figures]) -> str:
    rows = []
    for case, cost in found.items():
        times = [f"{1e3 * cost['median']:.2f}", f"{1e3 * cost['mean']:.2f}", f"{cost['start']:.1f}"]
        score = (
            [f"{cost['sliced']:.4f}", f"{cost['floor']:.4f}", f"{cost['draw']:.1f}"] if "sliced" in cost else [""] * 3
        )
        rows.append([case.kind, case.dim, case.size, *times, cost["updates"], *score])
    missing = sum(len(cases(dim)) for dim in DIMS) - len(found)
    dims = sorted({case.dim for case in found})
    spans = {
        (kind, least): {c.dim for c in found if c.kind == kind and c.dim >= least} for kind in KINDS for least in dims
    }
    laws = [law_row(found, *key) for key, span in spans.items() if key[1] in (dims[0], 32) and len(span) > 1]
    columns = ["bridge", "d", "J", "median ms", "mean ms", "start s", "updates", "sliced W2", "floor", "draws s"]
    return "\n".join(
        [
            header("Growth of the light bridges' work with dimension d and number of components J", SEED),
            f"N(0, I) to a random mixture of J components: centres at radius {RADIUS:g}, variances in [.1, 1];",
            f"epsilon {EPSILON:g}, LightSBBM with beta {BETA:g}, {TRAIN} draws a side, batch size {BATCH}, float32,",
            "diagonal covariances but for the rows that say full. CPU milliseconds from update to update, warm; the",
            "mean holds validation and, for LightSBBM, the exact inverses of every 64th update; the start (clusters,",
            f"ascent) is apart. Sliced W2: {DRAWS} draws against as many of the target, {PROJECTIONS} directions.",
            table(columns, rows),
            "\nLeast squares of log median on log d and log J: seconds an update = c d^p J^q; the last column is the",
            "largest factor by which a figure lies off the law. At small d fixed costs flatten it.",
            table(["bridge", "over", "c", "p (of d)", "q (of J)", "off by"], laws),
            *([f"\nNot measured yet: {missing} cases."] if missing else []),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dims", nargs="*", type=int, default=[], help="measure these dimensions alone, write no table")
    parser.add_argument("--short", action="store_true", help="few updates in small dimensions, to try the script")
    parser.add_argument("--kept", action="store_true", help="measure nothing, write what an interrupted run has kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        with tempfile.TemporaryDirectory() as folder:
            print(report(figures(options.dims or [2, 8], Path(folder), steps=30)))
        return
    folder = Path(__file__).parent
    found = figures(options.dims or list(DIMS), folder, kept=options.kept)
    if options.dims:
        return
    draw(found, RESULTS / "scaling.png")
    write("scaling", report(found))
    if not options.kept:
        for path in folder.glob("scaling_*.cache.json"):
            path.unlink()


if __name__ == "__main__":
    main()
