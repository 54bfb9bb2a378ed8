"""VSDM's Gaussian check: paths against the closed-form Schrödinger bridge, and A on its way to its fixed point.

Run as `python -m benchmarks.vsdm_gaussian`. Finished fits are kept in the cache, and a second call goes on from it.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.report import RESULTS, header, table, write
from benchmarks.store import Store
from benchmarks.stretched import SHAPES
from pyro_sb.bridges import VSDM
from pyro_sb.bridges.diffusion.adapt import best_matrix, project, step_size
from pyro_sb.bridges.pairs import Reading
from pyro_sb.ops.closed_form import GaussianBridge, gaussian_bridge
from pyro_sb.ops.linear_sde import LinearSDE, Schedule, fixed_point_rates, preconditioning
from pyro_sb.ops.solvers import Conditional

MEAN, COVARIANCE = torch.tensor([-8.0, 2.0]), torch.tensor([[1.0, 1.0], [1.0, 5.0]])
CHECK: dict[str, Any] = {"b_max": 4.0, "b_min": 4.0, "power": 0.0}
NUM_DRAWS, NUM_STEPS, BATCH, NUM_STAGES = 20_000, 1000, 512, 60
NUM_PATHS, PATH_STEPS, SHOWN = 20_000, 40, (0, 2, 4, 7, 11, 16, 24, 40)
NUM_EXACT, NUM_PARTICLES = 1000, 1024  # stages and particles with the exact score


class FromZero(VSDM):
    """The stochastic approximation from A = 0 on, as published; `VSDM` starts it at the closed form."""

    def _adopt(self, read: Reading) -> None:
        super()._adopt(read)
        self._turn(torch.eye(self.dim), torch.ones(self.dim), read.covariance)


@dataclass
class Law:
    """Gaussian marginals at noising times. Shapes ``(K, 2)`` and ``(K, 2, 2)``."""

    means: Tensor
    covariances: Tensor

    def mean_gap(self, other: "Law") -> Tensor:
        return (self.means - other.means).norm(dim=-1)

    def covariance_gap(self, other: "Law") -> Tensor:
        """In the Frobenius norm, as a share of the other's."""
        gap = self.covariances - other.covariances
        return gap.norm(dim=(-2, -1)) / other.covariances.norm(dim=(-2, -1))


def closed_form(taus: Tensor, mean: Tensor) -> Law:
    r"""The bridge between the data and N(0, I) over the VP process.

    With a constant rate, :math:`y = e^{W \tau / 2} x` is a Brownian motion in the clock :math:`e^{W \tau} - 1`.
    """
    total = Schedule(**CHECK).total
    end = math.exp(total)
    zero, eye = torch.zeros(2).double(), torch.eye(2).double()
    bridge: GaussianBridge = gaussian_bridge(mean.double(), COVARIANCE.double(), zero, end * eye, end - 1)
    clock = (total * taus.double()).exp()
    means, covariances = bridge.marginal((clock - 1) / (end - 1))
    return Law(means / clock.sqrt()[:, None], covariances / clock[:, None, None])


def noised(taus: Tensor, mean: Tensor, basis: Tensor, rates: Tensor) -> Law:
    """The data noised by VSDM's linear process, exactly."""
    law = LinearSDE(rates.double(), Schedule(**CHECK)).at(taus.double())
    factors = basis.double() @ torch.diag_embed(law.factor) @ basis.T.double()
    rest = basis.double() @ torch.diag_embed(law.variance) @ basis.T.double()
    return Law(factors @ mean.double(), factors @ COVARIANCE.double() @ factors + rest)


def generated(bridge: VSDM) -> tuple[Tensor, Law]:
    """Noising times, and moments of paths of the generating SDE."""
    times, states = bridge.paths(NUM_PATHS, PATH_STEPS)
    states = states.double()
    covariances = torch.stack([state.T.cov() for state in states])
    return 1 - times, Law(states.mean(1), covariances)


def fitted(kind: type[VSDM], target: Tensor, **arguments: Any) -> VSDM:
    torch.manual_seed(0)
    bridge = kind(2, drift="stochastic", covariance="analytic", **arguments)
    bridge.fit(target, num_updates=NUM_STEPS, batch_size=BATCH, num_stages=NUM_STAGES, zeta=1.0, progress=False)
    return bridge


@dataclass
class Approach:
    """A stochastic approximation: its rates by stage, ``(stages + 1, 2)``, the closed form's, and D at the end."""

    name: str
    history: Tensor
    fixed: Tensor
    drift_matrix: Tensor

    @property
    def last(self) -> Tensor:
        """Mean rates over the last twentieth of the stages."""
        return self.history[-max(1, len(self.history) // 20) :].mean(0)

    @property
    def gap(self) -> float:
        """Of the rates to the closed form, the largest over directions."""
        return float((self.last - self.fixed).abs().max())

    @property
    def share(self) -> float:
        """Of the way from the first rates to the closed form that is done, in the direction with the longest way."""
        way = (self.fixed - self.history[0]).abs()
        index = int(way.argmax())
        return 1 - float((self.last - self.fixed).abs()[index] / way[index])


def learnt(kind: type[VSDM], target: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The approach as a row of the cache, with the paths' moments."""
    bridge = fitted(kind, target, **arguments)
    taus, law = generated(bridge)
    values = torch.linalg.eigvalsh(target.double().T.cov(correction=0))
    rows = {
        "history": bridge.rates_history,
        "fixed": fixed_point_rates(values, bridge.schedule.total),
        "drift_matrix": bridge.drift_matrix,
        "basis": bridge.basis,
        "taus": taus,
        "means": law.means,
        "covariances": law.covariances,
    }
    return {name: value.tolist() for name, value in rows.items()}


def exact(target: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same stages with the exact score of a Gaussian that has the target's variances, along its axes alone."""
    torch.manual_seed(0)
    variances = torch.linalg.eigvalsh(target.double().T.cov(correction=0))
    sde = LinearSDE(torch.ones(2).double(), Schedule(**arguments))
    history = [sde.rates]
    for stage in range(NUM_EXACT):

        def model(tau: Tensor, x: Tensor, sde: LinearSDE = sde) -> Conditional:
            scale = preconditioning(sde.at(tau), variances)
            return Conditional(scale.skip * x, scale.out.square().expand_as(x))

        best = best_matrix(model, sde, sde.grid(30, 1e-3), torch.randn(NUM_PARTICLES, 2).double())
        _, rates = project(torch.lerp(0.5 * (1 - sde.rates), best.diagonal(), step_size(stage)).diag())
        sde = LinearSDE(rates, sde.schedule)
        history.append(rates)
    rows = {
        "history": torch.stack(history),
        "fixed": fixed_point_rates(variances, sde.schedule.total),
        "drift_matrix": sde.rates.diag(),
    }
    return {name: value.tolist() for name, value in rows.items()}


def approach(store: Store, name: str, make: Callable[[], dict[str, Any]]) -> Approach:
    row = store.once(name, make)
    print(name, flush=True)
    return Approach(name, *(torch.tensor(row[key]).double() for key in ("history", "fixed", "drift_matrix")))


def along_time(row: dict[str, Any]) -> tuple[Tensor, Law, Law, str]:
    """Times, the generated law, the closed form, and their table."""
    taus, basis, rates = (torch.tensor(row[key]).double() for key in ("taus", "basis", "history"))
    ours = Law(torch.tensor(row["means"]).double(), torch.tensor(row["covariances"]).double())
    exact, linear = closed_form(taus, MEAN), noised(taus, MEAN, basis, rates[-1])
    plain = noised(taus, MEAN, basis, torch.ones(2))
    gaps = [
        ours.covariance_gap(exact),
        linear.covariance_gap(exact),
        plain.covariance_gap(exact),
        ours.mean_gap(linear),
        linear.mean_gap(exact),
        plain.mean_gap(exact),
    ]
    rows = []
    for k in SHOWN:
        cells = [
            vector(exact.means[k]),
            vector(ours.means[k]),
            matrix(exact.covariances[k]),
            matrix(ours.covariances[k]),
        ]
        rows.append([f"{1 - float(taus[k]):.3f}", *cells, *(f"{float(gap[k]):.3f}" for gap in gaps)])
    columns = ["t", "mean, bridge", "mean, paths", "covariance, bridge", "covariance, paths"]
    columns += ["cov gap", "noising's", "D = I's", "mean, paths - noising", "noising - bridge", "D = I - bridge"]
    return taus, ours, exact, table(columns, rows)


def vector(x: Tensor) -> str:
    return ", ".join(f"{float(value):.2f}" for value in x)


def matrix(x: Tensor) -> str:
    return f"{float(x[0, 0]):.2f}, {float(x[0, 1]):.2f}, {float(x[1, 1]):.2f}"


def picture(taus: Tensor, ours: Law, exact: Law, approaches: list[Approach]) -> None:
    fig, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    t = 1 - taus
    for index in range(2):
        axes[0].plot(t, exact.means[:, index], color=f"C{index}", label=f"mean {index + 1}")
        axes[0].plot(t, ours.means[:, index], ".", color=f"C{index}")
    for color, (i, j) in enumerate([(0, 0), (0, 1), (1, 1)]):
        axes[1].plot(t, exact.covariances[:, i, j], color=f"C{color}", label=f"cov {i + 1}{j + 1}")
        axes[1].plot(t, ours.covariances[:, i, j], ".", color=f"C{color}")
    for ax, title in zip(axes, ["means", "covariances"], strict=False):
        ax.set_title(f"{title}: bridge (lines), paths (dots)", fontsize=9)
        ax.set_xlabel("t, from source to target")
        ax.legend(fontsize=8)
    rates_by_stage(axes[2], approaches[:2])
    rates_by_stage(axes[3], approaches[2:])
    axes[3].set_xscale("symlog", linthresh=1)
    axes[3].set_xlim(0, NUM_EXACT)
    axes[3].legend(fontsize=7, loc="lower left")
    fig.tight_layout()
    fig.savefig(RESULTS / "vsdm_gaussian.png", dpi=100)


def rates_by_stage(ax: Axes, group: list[Approach]) -> None:
    """Eigenvalues of A = (I - D) / 2 by stage, over those of the closed form."""
    for style, one in zip(("-", ":"), group, strict=False):
        for index in range(2):
            label = f"from {one.name.split('from ')[1]}" if not index else None
            ax.plot((1 - one.history[:, index]) / 2, style, color=f"C{index}", label=label)
    for value in (1 - group[0].fixed) / 2:
        ax.axhline(float(value), color="0.4", lw=0.8, dashes=(4, 4))
    ax.set_title(f"A, {group[0].name.split(',')[0]}; dashed: fixed point", fontsize=9)
    ax.set_xlabel("stage")
    ax.legend(fontsize=8)


NOTE = f"""Target N((-8, 2), [[1, 1], [1, 5]]), source N(0, I), constant rate 4 over unit time, zeta = 1: the paper's
check (there a figure, no numbers). {NUM_DRAWS:,} draws, {NUM_STEPS // 2:,} updates while A moves in {NUM_STAGES}
stages, {NUM_STEPS:,} more; float32. The bridge is the exact Schroedinger bridge over the VP process. Paths:
{NUM_PATHS:,} of the generating SDE, {PATH_STEPS} steps, from the moment-matched source. Covariances are listed as 11,
12, 22; their gaps are in the Frobenius norm, as shares of the bridge's. "cov gap": paths to bridge; "noising's" and "D
= I's": the exact noised law with VSDM's D and with D = I to the bridge. A linear score A x has no intercept: the
noising takes the mean to M_T mu, not to 0, so its mean leaves the bridge's towards the source (last columns). On
centred data both are 0. "way done": how far the mean of the last twentieth of the stages is on the way from the first
rates to the closed form. With steps as Robbins and Monro ask for, A nears its fixed point slowly where the target is
wide, with the exact score too; VSDM starts at the closed form.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="vsdm_gaussian", help="JSON file without its ending")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    store = Store(arguments().cache)
    torch.manual_seed(0)
    target = MEAN + torch.randn(NUM_DRAWS, 2) @ torch.linalg.cholesky(COVARIANCE).T
    spiral = SHAPES[0].sample(NUM_DRAWS)
    approaches = [
        approach(store, "Gaussian check, from A = 0", partial(learnt, FromZero, target, CHECK)),
        approach(store, "Gaussian check, from the closed form", partial(learnt, VSDM, target, CHECK)),
        approach(store, "spiral x8, from A = 0", partial(learnt, FromZero, spiral, {})),
        approach(store, "spiral x8, from A = 0 with the exact score of a Gaussian", partial(exact, spiral, {})),
    ]
    taus, ours, oracle, along = along_time(store.rows[approaches[0].name])
    columns = ["D's eigenvalues", "stages", "first", "last", "closed form", "gap", "way done", "D in the user's axes"]
    rows = [
        [
            one.name,
            len(one.history) - 1,
            *(", ".join(f"{float(v):.3f}" for v in rates) for rates in (one.history[0], one.last, one.fixed)),
            f"{one.gap:.3f}",
            f"{one.share:.0%}" if "from A" in one.name else "",
            str([[round(float(v), 3) for v in row] for row in one.drift_matrix]),
        ]
        for one in approaches
    ]
    ratio = max(float(one.history[-1].max() / one.history[-1].min()) for one in approaches)
    verdicts = "\n".join(
        [
            f"largest covariance gap of the paths to the bridge, over all {PATH_STEPS + 1} times: "
            f"{float(ours.covariance_gap(oracle).max()):.3f}",
            *(
                f"largest gap of A's eigenvalues to the fixed point: {one.gap / 2:.3f}, {one.name}"
                for one in approaches
            ),
            f"D is no multiple of I: largest ratio of its eigenvalues {ratio:.2f}",
        ]
    )
    title = header("VSDM's Gaussian check", 0)
    write("vsdm_gaussian", "\n".join([title, NOTE, verdicts, "", along, "", table(columns, rows)]))
    picture(taus, ours, oracle, approaches)


if __name__ == "__main__":
    main()
