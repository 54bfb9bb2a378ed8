"""The latent bridge where the latents are known: error against rows, steps, pre-training rows and their shift.

Run as `python -m benchmarks.latent_rates`. Finished cells are kept in the cache, and a second call goes on from it;
`--report` only prints what is there.
"""

import math
import time
import warnings
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from benchmarks.report import RESULTS, header, spread, table, write
from benchmarks.store import Store, arguments_of
from pyro_sb.bridges import AutoencoderCodec, LatentBridge, SmoothedBridge
from pyro_sb.metrics import sliced_wasserstein2, wasserstein2

SEEDS, AMBIENT, UNITS, BETA = 3, 64, 32, 1
DIMS, ROWS = (2, 4, 8), (100, 316, 1000, 3162, 10_000)
NUM_STEPS, HIDDEN, FEWER = 3000, (128, 128), 1200
STEPS, CHAINS, EPSILONS = (5, 10, 20, 40, 80, 160), 20_000, (100.0, 4.0)
PRETRAINING, SHIFTS, DIM, TARGET, MANY = (50, 200, 1000, 5000), (0.5, 1.0, 2.0, 4.0), 4, 2000, 5000
EXACT = 1000
KNOTS = 20
NODES = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def density(u: Tensor) -> Tensor:
    """A triangle wave on [0, 1] with peaks 1.8 at 1/4 and 3/4 and valleys .2: Lipschitz, bounded away from 0."""
    return 1 + 0.8 * (1 - 4 * ((2 * u) % 1 - 0.5).abs())


MASS = density(NODES) / density(NODES).sum()
SD = float((MASS @ (NODES - 0.5).square()).sqrt())


class Waves(Distribution):
    """Independent triangle waves, ``dim`` of them."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, dim: int) -> None:
        super().__init__(event_shape=torch.Size([dim]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.event_shape
        index = torch.multinomial(MASS, math.prod(shape), replacement=True).reshape(shape)
        return (NODES[index] + (torch.rand(shape) - 0.5) / len(NODES)).float()


def posterior_mean(y: Tensor, s: float) -> Tensor:
    """E[Z | Z + s noise = y] of each axis, by quadrature on a grid of y, interpolated: y + s^2 times the score."""
    grid = torch.linspace(float(y.min()), float(y.max()), 800, dtype=torch.float64)
    weights = (MASS.log() - (grid[:, None] - NODES).square() / (2 * s * s)).softmax(1)
    return torch.as_tensor(np.interp(y.double().numpy(), grid.numpy(), (weights @ NODES).numpy()))


class Decoder:
    """A smooth injection of [0, 1]^d into R^64: x = A tanh(B (2 z - 1)), with 32 units."""

    def __init__(self, dim: int) -> None:
        draw = torch.Generator().manual_seed(100 + dim)
        self.inner = torch.randn(dim, UNITS, generator=draw) / math.sqrt(dim)
        self.outer = torch.randn(UNITS, AMBIENT, generator=draw) / math.sqrt(UNITS)

    def __call__(self, z: Tensor) -> Tensor:
        return ((2 * z - 1) @ self.inner).tanh() @ self.outer


def excess(x: Tensor, y: Tensor, reference: Tensor, sliced: bool) -> float:
    """A distance with its floor taken out in squares; negative if it lies below the floor."""
    if sliced:
        score = sliced_wasserstein2(x, y, reference=reference, generator=torch.Generator().manual_seed(0))
    else:
        score = wasserstein2(x[:EXACT], y[:EXACT], reference=reference[:EXACT])
    square = float(score) ** 2 - score.floor**2
    return math.copysign(math.sqrt(abs(square)), square)


def path_error(bridge: SmoothedBridge, dim: int) -> float:
    """Root of the path law's divergence KL(exact | learnt) down to s = .05 sd: the score's error, with no floor."""
    assert bridge.epsilon is not None
    levels = torch.logspace(math.log10(0.05 * SD), math.log10(math.sqrt(bridge.epsilon)), KNOTS + 1)[:-1].tolist()
    values = []
    for s in levels:
        y = Waves(dim).sample((2000,)) + s * torch.randn(2000, dim)
        exact = (posterior_mean(y, s) - y) / s**2
        with torch.no_grad():
            learnt = bridge.drift(1 - s * s / bridge.epsilon, y) / bridge.epsilon
        values.append(s * s * float((learnt - exact).square().sum(1).mean()))  # d(s^2)/2 = s^2 d log s
    return math.sqrt(float(np.trapezoid(values, np.log(levels))))


def fit(bridge: Any, target: Any, num_steps: int = NUM_STEPS, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the budget is fixed, converged or not
        bridge.fit(target, num_updates=num_steps, progress=False, **options)
    return bridge


def rows_cell(dim: int, num: int | None, seed: int) -> dict[str, float]:
    """(a) The bridge of n latents, or of fresh ones at every update, decoded by the known decoder."""
    torch.manual_seed(seed)
    begun = time.process_time()
    law, decode = Waves(dim), Decoder(dim)
    bridge = fit(SmoothedBridge(dim, hidden=HIDDEN), law if num is None else law.sample((num,)))
    spent = time.process_time() - begun
    torch.manual_seed(1000 + seed)
    x, y, more = decode(bridge().sample((CHAINS,))), decode(law.sample((CHAINS,))), decode(law.sample((CHAINS,)))
    found = {"path": path_error(bridge, dim), "sliced": excess(x, y, more, True), "w2": excess(x, y, more, False)}
    found |= {"floor": float(wasserstein2(y[:EXACT], more[:EXACT])), "seconds": spent}
    if num is not None:
        some = law.sample((num,))
        found["learnt from"] = excess(decode(some[torch.randint(num, (EXACT,))]), y, more, False)
    return found


def steps_cell(epsilon: float, seed: int) -> dict[str, list[float]]:
    """(b) Euler-Maruyama with the exact score; "denoised": the last step goes to the mean, without noise."""
    torch.manual_seed(seed)
    law = Waves(DIM)
    y, more = law.sample((CHAINS,)) / SD, law.sample((CHAINS,)) / SD
    first, last = math.sqrt(epsilon) * SD, 0.01 * SD
    found: dict[str, list[float]] = {}
    for num in STEPS:
        uniform = torch.linspace(first**2, last**2, num + 1, dtype=torch.float64).sqrt().tolist()
        geometric = torch.logspace(math.log10(first), math.log10(last), num + 1, dtype=torch.float64).tolist()
        for name, levels in (("uniform", uniform), ("geometric", geometric)):
            z = (law.sample((CHAINS,)) + first * torch.randn(CHAINS, DIM)).double()
            for s, after in zip(levels, levels[1:]):
                gap, before = s * s - after * after, z
                z = z + gap / s**2 * (posterior_mean(z, s) - z) + math.sqrt(gap) * torch.randn_like(z)
            found.setdefault(name, []).append(excess(z / SD, y, more, True))
            found.setdefault(f"{name}, denoised", []).append(excess(posterior_mean(before, s) / SD, y, more, True))
    return found


def codec_cell(num: int, shift: float, seed: int) -> dict[str, float]:
    """(c), (d) Autoencoder of M pre-training rows, shifted by so many sd, then a bridge of 2,000 rows of the target."""
    torch.manual_seed(seed)
    begun = time.process_time()
    law, decode = Waves(DIM), Decoder(DIM)
    bridge = LatentBridge(SmoothedBridge(DIM, hidden=HIDDEN), AutoencoderCodec(DIM, hidden=(128, 128)))
    pretraining = decode(law.sample((num,)) + shift * SD)
    rows = decode(law.sample((TARGET,)))
    fit(bridge, rows, FEWER, pretrain=pretraining, codec_options={"num_updates": FEWER})
    spent = time.process_time() - begun
    torch.manual_seed(1000 + seed)
    y, more, fresh = (decode(law.sample((CHAINS,))) for _ in range(3))
    x = bridge().sample((CHAINS,))
    with torch.no_grad():
        back = bridge.codec.decode(bridge.codec.encode(fresh))
        home = decode(law.sample((CHAINS,)) + shift * SD)
        known = bridge.codec.decode(bridge.codec.encode(home)) - home
    return {
        "rmse": float((back - fresh).square().sum(1).mean().sqrt()),
        "rmse at home": float(known.square().sum(1).mean().sqrt()),
        "bound": excess(back, y, more, False),
        "w2": excess(x, y, more, False),
        "bound sliced": excess(back, y, more, True),
        "sliced": excess(x, y, more, True),
        "seconds": spent,
    }


def run_all(store: Store, minutes: float) -> None:
    begun = time.process_time()
    cells: list[tuple[str, Any]] = []
    for seed in range(SEEDS):
        cells += [(f"steps {EPSILONS[0]} {seed}", lambda seed=seed: steps_cell(EPSILONS[0], seed))]
        for dim in DIMS:
            cells += [
                (f"rows {dim} {num} {seed}", lambda dim=dim, num=num, seed=seed: rows_cell(dim, num, seed))
                for num in (*ROWS, None)
            ]
        cells += [(f"M {num} {seed}", lambda num=num, seed=seed: codec_cell(num, 0.0, seed)) for num in PRETRAINING]
        cells += [(f"shift {s} {seed}", lambda s=s, seed=seed: codec_cell(MANY, s, seed)) for s in SHIFTS]
        cells += [(f"steps {e} {seed}", lambda e=e, seed=seed: steps_cell(e, seed)) for e in EPSILONS[1:]]
    for key, make in cells:
        if time.process_time() - begun > 60 * minutes:
            print("the time is up; call again to go on", flush=True)
            return
        if key not in store.rows:
            print(key, store.once(key, make), flush=True)


def found(store: Store, key: str) -> list[Any]:
    return [store.rows[f"{key} {seed}"] for seed in range(SEEDS) if f"{key} {seed}" in store.rows]


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Of log error on log n by least squares, and its standard error; NaN for fewer than three positive errors."""
    kept = [(math.log(n), math.log(e)) for n, e in points if e > 0]
    if len({n for n, _ in kept}) < 3:
        return math.nan, math.nan
    x, y = (np.array(column) for column in zip(*kept))
    lever = np.square(x - x.mean()).sum()
    b = float(((x - x.mean()) * y).sum() / lever)
    rest = y - y.mean() - b * (x - x.mean())
    return b, float(np.sqrt(np.square(rest).sum() / (len(x) - 2) / lever))


def rows_tables(store: Store) -> str:
    lines: list[list[object]] = []
    slopes: list[list[object]] = []
    for dim in DIMS:
        best = found(store, f"rows {dim} None")
        if not best:
            continue
        networks = mean(row["path"] for row in best) ** 2
        points: dict[str, list[tuple[float, float]]] = {"path": [], "net": [], "w2": [], "sliced": []}
        for num in (*ROWS, None):
            cells = found(store, f"rows {dim} {num}")
            if not cells:
                continue
            shown = [spread([cell[key] for cell in cells], 2) for key in ("path", "w2", "sliced")]
            sampled = spread([c["learnt from"] for c in cells], 2) if num else "0"
            floor = spread([c["floor"] for c in cells], 2)
            lines.append([f"d* = {dim}, n = {num or 'fresh'}", len(cells), *shown, sampled, floor])
            if num:
                for key in ("path", "w2", "sliced"):
                    points[key] += [(num, cell[key]) for cell in cells]
                points["net"] += [(num, math.sqrt(max(0.0, cell["path"] ** 2 - networks))) for cell in cells]
        fitted = [slope(points[key]) for key in ("path", "net", "w2", "sliced")]
        slopes.append(
            [
                f"d* = {dim}",
                f"{-BETA / (dim + 2 * BETA):.3f}",
                *("-" if b != b else f"{b:.3f} +- {se:.3f}" for b, se in fitted),
            ]
        )
    columns = ["", "seeds", "path error", "W2", "sliced W2", "W2 of the rows", "floor of W2"]
    names = ["slope", "theorem", "path error", "less network's", "W2", "sliced W2"]
    return table(columns, lines) + "\n\n" + table(names, slopes)


def steps_table(store: Store) -> str:
    parts = []
    for epsilon in EPSILONS:
        cells = found(store, f"steps {epsilon}")
        if not cells:
            continue
        lines = [
            [f"N = {num}", *(spread([cell[name][i] for cell in cells], 2) for name in cells[0])]
            for i, num in enumerate(STEPS)
        ]
        parts.append(table([f"epsilon = {epsilon:g} variances", *cells[0]], lines))
    return "\n\n".join(parts)


CODEC_SCORES = ("rmse at home", "rmse", "bound", "w2", "bound sliced", "sliced")


def codec_table(store: Store, kind: str, values: tuple[float, ...]) -> str:
    lines = []
    for value in values:
        cells = found(store, f"{kind} {value}")
        if cells:
            lines.append([f"{kind} = {value:g}", len(cells), *(spread([c[k] for c in cells], 2) for k in CODEC_SCORES)])
    names = ["rmse, pre-training", "rmse, target", "W2 reconstructed", "W2 bridge", "sliced rec.", "sliced bridge"]
    return table(["", "seeds", *names], lines)


def report(store: Store) -> str:
    title = header("Latent bridge: error where the latents are known", 0)
    parts = [
        "\n".join([title, NOTE]),
        "(a) Rows, the codec known\n" + rows_tables(store),
        "(b) Steps, the score known\n" + steps_table(store),
        "(c) Rows of pre-training, no shift\n" + codec_table(store, "M", PRETRAINING),
        f"(d) Shift of the pre-training data, in sd of each latent; M = {MANY:,}, whose row above is no shift\n"
        + codec_table(store, "shift", SHIFTS),
    ]
    return "\n\n".join(parts) + "\n" + READING


def picture(store: Store) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")
    for colour, dim in zip(("tab:blue", "tab:orange", "tab:green"), DIMS):
        cells = {num: found(store, f"rows {dim} {num}") for num in (*ROWS, None)}
        shown = [num for num in ROWS if cells[num]]
        errors = [mean(c["path"] for c in cells[num]) for num in shown]
        axes[0].loglog(shown, errors, "o-", c=colour, ms=4, label=f"d* = {dim}")
        rate = [errors[0] * (num / shown[0]) ** (-BETA / (dim + 2 * BETA)) for num in shown]
        axes[0].loglog(shown, rate, ":", c=colour)
        if cells[None]:
            axes[0].axhline(mean(c["path"] for c in cells[None]), c=colour, lw=0.6, ls="--")
    axes[0].set(title="(a) path error; dotted: theorem's slope,\ndashed: fresh rows at every update", xlabel="rows n")
    for name, style in (("uniform, denoised", "s-"), ("geometric", "^--"), ("geometric, denoised", "o-")):
        cells = found(store, f"steps {EPSILONS[0]}")
        if cells:
            values = [max(1e-3, mean(c[name][i] for c in cells)) for i in range(len(STEPS))]
            axes[1].loglog(STEPS, values, style, ms=4, label=name)
    axes[1].set(title="(b) exact score: sliced W2, in sd", xlabel="steps N")
    for axis, kind, values in ((axes[2], "M", PRETRAINING), (axes[3], "shift", SHIFTS)):
        for name, label in (
            ("sliced", "bridge"),
            ("bound sliced", "reconstructed"),
            ("rmse", "rmse of reconstruction"),
        ):
            kept = [v for v in values if found(store, f"{kind} {v}")]
            axis.plot(kept, [mean(c[name] for c in found(store, f"{kind} {v}")) for v in kept], "o-", ms=4, label=label)
    axes[2].set(xscale="log", yscale="log", title="(c) sliced W2 in data space", xlabel="pre-training rows M")
    axes[3].set(yscale="log", title="(d) the same, M = 5,000", xlabel="shift, sd")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(RESULTS / "latent_rates.png", dpi=80)
    plt.close(figure)


NOTE = f"""Latents z of d* independent triangle waves on [0, 1] (density 1 + .8 wave, from .2 to 1.8, two peaks an
axis: 2^d* peaks): Lipschitz and bounded away from 0 on its support, so beta = {BETA}, as the theorem asks. Data
x = A tanh(B (2 z - 1)) in R^{AMBIENT}, {UNITS} units, A and B Gaussian. Bridges: SmoothedBridge, net {HIDDEN},
{NUM_STEPS} updates of 256 ({FEWER} in (c) and (d), as for their autoencoders), the network of the lowest held-out loss
kept, 20 steps of the flow. Mean +- sd over seeds.
path error  sqrt of KL(exact path law | learnt one) down to s = .05 sd, by the score that quadrature gives: it bounds
            that of the end law, and the theorem's proof goes by it. No draws are compared, so it has no floor
W2          of decoded draws, exact, {EXACT:,} a side, in R^{AMBIENT}; sliced W2: {CHAINS:,} a side, 64 directions. Both
            with the floor of as many exact draws taken out: sign(e) sqrt|e|, e = score^2 - floor^2; negative is below
            the floor. A sliced distance sees lines alone, where rows are n^(-1/2) away whatever the dimension"""
READING = """
Reading (three seeds).
(a) The theorem's order in d* is seen: at one n the path error is larger the more latents there are. Its slope, an
upper bound, is exceeded at d* = 4, and at d* = 8 by the first three sizes (some -.2): from 1,000 rows on the error
there is the network's, as with fresh rows at every update 3,000 updates leave 1.2, and over all five the slope is
-.07. At d* = 2 the curve flattens near the network's error (.18) from 1,000 rows on, so its raw slope, -.16, is below
the theorem's -.25; what is above the network's falls as n^(-.28), and at d* = 4 nearly as n^(-1/2), faster than the
theorem. W2 of draws agrees in order, but its floor at 1,000 draws is as large as the errors, so its slopes say
little. Draws are nearer to the law than the rows learnt from are with up to 1,000 rows at d* = 4 and 316 at d* = 8,
and further with more: this net and budget then do worse than the rows themselves. At d* = 2 they are never clearly
nearer.
(b) With the exact score 20 geometric steps reach .04 sd, which the uniform grid does not with 160; 80 leave .009, 160
nothing that is seen. Uniform steps leave the noise of their last step, epsilon / N in variance. The denoising step
matters there alone: the geometric grid ends at a hundredth of a sd anyway. A small epsilon is easier: at 4 variances
40 uniform steps do nearly what 20 geometric ones do. (In the picture what lies below the floor is drawn at .001.)
(c) 200 rows bring the reconstruction error near to that of 5,000; from there on the bridge of 2,000 rows is what is
wrong (sliced .02 against .01). The theorem asks for M > n^(2 beta (d + 2) / (d* + 2 beta)) = n^22 rows here.
(d) A shift is paid in full: from one sd on, the bridge's error is that of the reconstructions, which nothing in the
latent space can see. On its own data the codec stays as good as before: compute the error on the target's rows.
"""


def main() -> None:
    torch.set_num_threads(1)
    asked = arguments_of(__doc__, "latent_rates").parse_args()
    store = Store(asked.cache)
    if not asked.report:
        run_all(store, asked.minutes)
    write(asked.cache, report(store))
    picture(store)


if __name__ == "__main__":
    main()
