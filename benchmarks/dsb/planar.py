"""Diffusion Schrodinger bridges on the published planar pairs: W2, both directions, path weights.

Run as `python -m benchmarks.dsb.planar`. Finished cells are kept, and a second call goes on from them.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_s_curve
from torch import Size, Tensor

from benchmarks.lib.fits import timed
from benchmarks.lib.pictures import save
from benchmarks.lib.planar import Pair, exact_distance, published_cloud, standard_normal
from benchmarks.lib.report import header, reading, spread, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import DSB
from pyro_sb.datasets import EightGaussians, Moons, PlanarLaw
from pyro_sb.metrics import sliced_wasserstein2
from pyro_sb.weights import effective_sample_size, pareto_k

EXACT, DRAWS, JOINT, WEIGHED, SHOWN = 10_000, 10_000, 2000, 10_000, 700
SEEDS, STEPS, FINE = 3, 20, 50
FIT: dict[str, Any] = {"batch_size": 256, "progress": False}
UPDATES = 6000  # of both chains together, in all iterations: the same for all methods


class SmallSCurve(PlanarLaw):
    """scikit-learn's noisy S without its middle axis, times 1.5: the scaling of the published flow-matching tables."""

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        points, _ = make_s_curve(shape.numel(), noise=0.05, random_state=int(torch.randint(2**31 - 1, ())))
        return torch.as_tensor(1.5 * points[:, [0, 2]]).to(self.dtype).reshape(*shape, 2)


PAIRS = [
    Pair("N->8gaussians", standard_normal(), EightGaussians(), epsilon=1.0, beta=math.inf),
    Pair("N->moons", standard_normal(), Moons(), epsilon=1.0, beta=math.inf),
    Pair("moons->8gaussians", Moons(), EightGaussians(), epsilon=5.0, beta=math.inf),
    Pair("N->s-curve", standard_normal(), SmallSCurve(), epsilon=1.0, beta=math.inf),
]
STIFF = Pair("moons->8gaussians, epsilon 1", Moons(), EightGaussians(), epsilon=1.0, beta=math.inf)
PUBLISHED = """
DSB 0.411+-0.084 0.190+-0.049 0.987+-0.324 0.272
DSBM-IPF 0.315+-0.079 0.140+-0.006 0.812+-0.092 0.140
DSBM-IMF 0.338+-0.091 0.144+-0.024 0.838+-0.098 0.145
SF2M-exact 0.275+-0.058 0.124+-0.023 0.726+-0.137 0.128
OT-CFM 0.303+-0.043 0.130+-0.016 0.601+-0.027 0.144
LightSB-M 0.339+-0.099 0.201+-0.042 0.295+-0.051 n/a
LightSBB-M 0.241+-0.083 0.109+-0.014 0.201+-0.034 n/a"""


@dataclass(frozen=True)
class Method:
    """A bridge's method and the options of its fit."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    variance: str = "measured"

    def fitted(self, pair: Pair, seed: int) -> tuple[DSB, float]:
        """IMF may take many uneven steps, as they are no part of what it learns; IPF learns its own."""
        torch.manual_seed(seed)
        steps, schedule = (FINE, "triangular") if self.method == "imf" else (STEPS, "constant")
        shape: dict[str, Any] = {"num_steps": steps, "schedule": schedule, "variance": self.variance}
        bridge = DSB(2, epsilon=pair.epsilon, method=self.method, **shape)
        return bridge, timed(bridge.fit, pair.target, pair.source, **(FIT | self.options))[1]


IMF = Method("IMF, independent", "imf", {"num_iterations": 2, "num_updates": UPDATES // 4})
SINKHORN = Method("IMF, sinkhorn", "imf", {"num_iterations": 2, "num_updates": UPDATES // 4, "pairs": "sinkhorn"})
SAME: dict[str, Any] = {"num_iterations": 6, "num_updates": UPDATES // 12, "num_pairs": 4096}
MORE: dict[str, Any] = {"num_iterations": 12, "num_updates": UPDATES // 12, "num_pairs": 4096, "batch_size": 1024}
IPF, FIXED = Method("IPF", "ipf", SAME), Method("IPF, published steps", "ipf", SAME, "reference")
LONG = Method("IPF, longer", "ipf", MORE)
METHODS = [IMF, SINKHORN, IPF, FIXED, LONG]


def clouds(pair: Pair, seed: int) -> tuple[Tensor, Tensor]:
    """The target's draws that all methods meet in a seed, and others of the law itself."""
    torch.manual_seed(1000 + seed)
    return published_cloud(pair.target, EXACT), pair.target.sample(Size([DRAWS]))


def floors(pair: Pair, seed: int) -> dict[str, float]:
    """Scores of exact draws against the cloud."""
    cloud, draws = clouds(pair, seed)
    return {"w2": exact_distance(draws[:EXACT], cloud), "sliced": sliced(pair, draws)}


def sliced(pair: Pair, x: Tensor) -> float:
    torch.manual_seed(4000)
    y = published_cloud(pair.target, 200_000)
    return float(sliced_wasserstein2(x, y, floor_draws=y[:2]))


def both_ways(bridge: DSB, pair: Pair) -> dict[str, float]:
    """Gaps between (x0, F(x0)) and (B(x1), x1): of cross-covariances, and W2 of the joint clouds."""
    x0, x1 = pair.source.sample(Size([DRAWS])), pair.target.sample(Size([DRAWS]))
    ahead, back = torch.cat([x0, bridge.transport(x0)], 1), torch.cat([bridge.transport_back(x1), x1], 1)
    covariances = [cloud.double().T.cov()[:2, 2:] for cloud in (ahead, back)]
    halves = [half.double().T.cov()[:2, 2:] for half in ahead.chunk(2)]
    size = float(covariances[0].norm())
    three = ahead[:JOINT], ahead[JOINT : 2 * JOINT], back[:JOINT]
    return {
        "cross": float((covariances[0] - covariances[1]).norm()) / size,
        "cross floor": float((halves[0] - halves[1]).norm()) / math.sqrt(2) / size,
        "joint": exact_distance(three[0], three[2]),
        "joint floor": exact_distance(three[0], three[1]),
    }


def weighed(bridge: DSB, pair: Pair) -> dict[str, float]:
    """Effective share and Pareto's k of the path weights."""
    draws = bridge().draws((WEIGHED,))
    logs = (pair.target.log_prob(draws.value) - draws.log_q).double()
    return {"ess": effective_sample_size(logs) / WEIGHED, "k": pareto_k(logs)}


def scores(pair: Pair, method: Method, seed: int, store: Store) -> dict[str, Any]:
    bridge, seconds = method.fitted(pair, seed)
    torch.manual_seed(2000 + seed)
    row: dict[str, Any] = {"seconds": seconds}
    x0, x1 = bridge.coupling(DRAWS)
    cloud, _ = clouds(pair, seed)
    row |= {"w2": exact_distance(x1[:EXACT], cloud), "sliced": sliced(pair, x1)}
    if method.method == "imf":
        fine = bridge.num_steps, bridge.schedule
        bridge.num_steps, bridge.schedule = STEPS, "constant"
        coarse = bridge.coupling(DRAWS)[1]
        row |= {"w2 coarse": exact_distance(coarse[:EXACT], cloud), "sliced coarse": sliced(pair, coarse)}
        bridge.num_steps, bridge.schedule = fine
    torch.manual_seed(3000 + seed)
    row |= both_ways(bridge, pair)
    if isinstance(pair.target, EightGaussians) and not isinstance(pair.source, Moons):
        row |= weighed(bridge, pair)
    if seed == 0 and pair in PAIRS:
        shown = torch.cat([x0[:SHOWN], x1[:SHOWN]], 1)
        store.put(f"shown, {pair.name}, {method.name}", [[round(v, 2) for v in line] for line in shown.tolist()])
    return row


def key(pair: Pair, method: Method, seed: int) -> str:
    return f"run, {pair.name}, {method.name}, {seed}"


def run_all(store: Store, seeds: int, quick: bool) -> None:
    for seed in range(seeds):
        for method, pair in product((IMF, IPF) if quick else METHODS, [*PAIRS, STIFF]):
            if seed > 0 and method is FIXED or pair is STIFF and (method is not SINKHORN or seed > 0):
                continue
            name = key(pair, method, seed)
            if name not in store.rows:
                store.put(name, scores(pair, method, seed, store))
                print(name, {k: round(v, 3) for k, v in store.rows[name].items()}, flush=True)
            if pair is not STIFF:
                store.once(f"floor, {pair.name}, {seed}", partial(floors, pair, seed))


def pair_table(store: Store, pair: Pair) -> str:
    columns = ["", "seeds", "CPU s", "W2 10k", f"W2, {STEPS} st.", "sliced W2 10k", "cross gap", "its floor"]
    names = ["w2", "w2 coarse", "sliced", "cross", "cross floor", "joint", "joint floor", "ess", "k"]
    law = pair.name.split(",")[0]
    floor = {score: store.scores(f"floor, {law},", score, SEEDS) for score in ("w2", "sliced")}
    cells = [spread(floor[score]) for score in ("w2", "w2", "sliced")]
    rows: list[list[object]] = [["floor", len(floor["w2"]), "", *cells, *[""] * 6]]
    for method in METHODS:
        prefix = f"run, {pair.name}, {method.name},"
        seconds = store.scores(prefix, "seconds", SEEDS)
        if seconds:
            cells = [spread(store.scores(prefix, name, SEEDS), 3) for name in names]
            rows.append([method.name, len(seconds), f"{mean(seconds):.0f}", *cells])
    text = table([*columns, "joint W2", "its floor", "ESS/N", "k"], rows)
    return f"{law}, epsilon = {pair.epsilon:g}\n{text}\n"


def goals(store: Store) -> str:
    lines = []
    for column, pair in enumerate(PAIRS):
        published = {line.split()[0]: line.split()[1 + column] for line in PUBLISHED.strip().splitlines()}
        for method in METHODS:
            if values := store.scores(f"run, {pair.name}, {method.name},", "w2", SEEDS):
                words = []
                for name in ("DSB", "DSBM-IMF", "SF2M-exact"):
                    below = mean(values) <= float(published[name].split("+-")[0])
                    words.append(f"{'below' if below else 'ABOVE'} {name} {published[name]}")
                lines.append(f"{pair.name}, {method.name}: {mean(values):.3f}; {', '.join(words)}")
    return "\n".join(lines)


def picture(store: Store) -> None:
    fig, axes = plt.subplots(2, len(PAIRS), figsize=(11, 5.6))
    for column, pair in enumerate(PAIRS):
        for row, method in enumerate((IMF, IPF)):
            ax = axes[row, column]
            shown = store.rows.get(f"shown, {pair.name}, {method.name}")
            ax.set_xticks([])
            ax.set_yticks([])
            if shown is None:
                ax.set_axis_off()
                continue
            x = torch.tensor(shown)
            for line in x[:60]:
                ax.plot(line[[0, 2]], line[[1, 3]], color="0.8", lw=0.5, zorder=0)
            ax.scatter(x[:, 0], x[:, 1], s=1.5, color="C0")
            ax.scatter(x[:, 2], x[:, 3], s=1.5, color="C3")
            ax.set_aspect("equal")
            ax.set_title(f"{pair.name}, {method.name}", fontsize=8)
    fig.tight_layout()
    save(fig, "dsb_planar", dpi=80)


NOTE = f"""Three layers of 128, float32, fresh draws of both laws, batch {FIT["batch_size"]}.
{UPDATES:,} updates in all for every method but "longer": IMF in 2 iterations, from independent pairs or from entropic
transport between minibatches, {FINE} steps, triangular; IPF in 6, {STEPS} equal steps (4,096 paths, new ones every
100 updates), of learnt variances, or of the reference's ("published steps"). "Longer": 12 iterations, batch 1,024.
Mean +- sd over seeds.
  W2 10k       exact, {EXACT:,} draws against as many of the target (moons: the published stratified sampler);
               floor: exact draws against the same clouds
  W2, {STEPS} st.   the same with {STEPS} equal steps: IMF's steps are free after the fit
  sliced W2    {DRAWS:,} draws against 200,000, 64 directions
  cross gap    forward-backward consistency: relative gap between the cross-covariances of (x0, F's end) and of
               (B's end, x1), {DRAWS:,} pairs each; floor: what two halves of the forward pairs give, scaled
  joint W2     exact, {JOINT:,} of these pairs against as many, in four dimensions; floor: two sets of forward pairs
  ESS/N, k     of the weights p(x1) / path density of {WEIGHED:,} draws, where source and target have a density
CPU s: of the fit, by process_time; the cores were shared with other processes.
The published rows are those of the methods sheet (arXiv 2307.03672, and 2601.19312 for light bridges); moons ->
8gaussians is there at its own epsilon."""


def main() -> None:
    quick = {"action": "store_true", "help": "IMF from independent pairs and IPF alone"}
    asked = command(__doc__, seeds=SEEDS, cached=True, quick=quick)
    store = Store("dsb_planar")
    if not asked.report:
        run_all(store, asked.seeds, asked.quick)
    published = [line.split() for line in PUBLISHED.strip().splitlines()]
    text = [
        header("Diffusion Schrodinger bridges on the published planar pairs", 0),
        NOTE,
        reading("dsb_planar"),
        *(pair_table(store, pair) for pair in [*PAIRS, STIFF]),
        "Published W2 at 10,000 draws\n" + table(["", *(pair.name for pair in PAIRS)], published) + "\n",
        "W2 against the published means",
        goals(store),
        "",
    ]
    write("dsb_planar", "\n".join(text))
    picture(store)


if __name__ == "__main__":
    main()
