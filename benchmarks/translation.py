"""Unpaired translation of digits, {1, 7} to {4, 9}, by the light bridges in a linear latent space.

Run as `python -m benchmarks.translation`; `--short` fits for a few steps, to try the script.
"""

import math
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property

import matplotlib.pyplot as plt
import numpy as np
import ot
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import LightSB, LightSBBM, LightSBM
from pyro_sb.metrics import bw2_uvp

SEED, F64 = 0, torch.float64
SOURCE, TARGET = (1, 7), (4, 9)
EPSILONS, COMPONENTS, BATCH = (0.1, 1.0), 10, 128
BETAS = {16: (100.0, 10.0, 5.0, 2.0), 32: (10.0, 2.0)}  # by dimension: at 32 a fit takes ten times as long
STEPS, DUAL_STEPS = 5000, 1000  # of beta = inf and of finite beta: about equal times at d = 16
SHOWN = ("LightSB, beta = inf", "LightSBBM, beta = 10", "LightSBBM, beta = 2")
COLUMNS = ["", "eps", "target %", "near", "copies %", "moved", "BW2 %", "log lik.", "steps", "CPU s"]
NOTE = f"""{SOURCE} -> {TARGET}: two modes on either side whose strokes overlap (7 and 9, 1 and 4), so that a
coupling has something to keep, and twice the images of a single class. Images are 8 x 8; latent: PCA of the training
images of all ten digits. J = {COMPONENTS}, diagonal; eps in units of the target's mean latent variance; steps of
{BATCH}, at most {STEPS} where beta = inf (LightSB, LightSBM), {DUAL_STEPS} where it is finite; the parameters with
the lowest held-out loss are kept. Each of {{tests}} test source images is transported once.
target %: share that an SVC, trained on training images of all digits, puts into {TARGET}; s.e. {{spread:.1f}} at 90.
near: median distance to the nearest training target, over that of held-out real targets (1 honest, 0 copies).
copies %: translations nearer to a training target than all but 5 % of held-out real targets are (5 is honest).
moved: mean squared latent distance from source to translation, over that of random pairs of real images.
BW2 %: Bures-Wasserstein to the test targets, share of their variance; of real images: the training targets'.
log lik.: nats an image, of the test targets under the bridge from the training sources."""
READING = """
Reading. At eps = 1 the translations are digits of the target and no copies, and keep as much of the source as the
discrete plan does: 96 to 99 % pass the SVC, the rest of the way to real images is in 'near' and BW2. There finite
beta gains nothing, and beta = 2 loses (fidelity, moments, likelihood). At eps = .1 more of the source is kept and
less of the target: a few components cannot bend a nearly deterministic map. In 16 dimensions that costs moments and
20 nats; in 32 the fit of beta = inf or 10 loses a few images altogether (the black tiles; BW2 above 100 %), which
beta = 2 does not, at the lowest likelihood of all. 'moved' below the optimal pairing's need not be an error: of a
few hundred images in so many dimensions the optimal pairing is far from that of the laws. Finite beta takes 1 to 9
times the CPU time. One split, one seed: differences of 2 or 3 % in the SVC's share are noise."""


@dataclass
class Latent:
    """Both groups in a latent space, with what judges translations there."""

    dim: int

    def __post_init__(self) -> None:
        digits = load_digits()
        x0, x1, y0, y1 = train_test_split(
            digits.data, digits.target, test_size=0.4, stratify=digits.target, random_state=SEED
        )
        self.pca, self.svc = PCA(self.dim, random_state=SEED).fit(x0), SVC(C=10, gamma=0.001).fit(x0, y0)
        self.images, self.labels = x1[np.isin(y1, SOURCE)], y1[np.isin(y1, SOURCE)]
        self.accuracy = 100 * self.is_target(x1[np.isin(y1, TARGET)]).mean()
        groups = [(x0, y0, SOURCE), (x0, y0, TARGET), (x1, y1, SOURCE), (x1, y1, TARGET)]
        self.source, self.target, self.test_source, self.test_target = (
            torch.as_tensor(self.pca.transform(x[np.isin(y, group)]), dtype=F64) for x, y, group in groups
        )
        self.variance = float(self.target.var(0).mean())

    def is_target(self, images: np.ndarray) -> np.ndarray:
        return np.isin(self.svc.predict(images), TARGET)

    def pixels(self, z: Tensor) -> np.ndarray:
        return self.pca.inverse_transform(z.numpy())

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest training target, and that target."""
        distance, index = torch.cdist(z, self.target).min(1)
        return distance, self.target[index]

    @cached_property
    def honest(self) -> Tensor:
        return self.nearest(self.test_target)[0]

    @cached_property
    def random_distance(self) -> float:
        return float(torch.cdist(self.test_source, self.test_target).square().mean())

    def scores(self, z: Tensor) -> list[float]:
        """Classifier's share, nearness, copies, movement and moments of translations of the test sources, in order."""
        near = self.nearest(z)[0]
        paired = len(z) == len(self.test_source)
        moved = float((z - self.test_source).square().sum(-1).mean()) if paired else math.nan
        return [
            100 * float(self.is_target(self.pixels(z)).mean()),
            float(near.median() / self.honest.median()),
            100 * float((near < self.honest.quantile(0.05)).double().mean()),
            moved / self.random_distance,
            float(bw2_uvp(z, self.test_target)),
        ]

    def matched(self) -> Tensor:
        """A real test target for each test source, by optimal transport (rounded to a draw where sizes differ)."""
        cost = torch.cdist(self.test_source, self.test_target).square().numpy()
        return self.test_target[drawn(ot.emd([], [], cost))]

    def entropic(self, epsilon: float) -> Tensor:
        """A training target for each test source, drawn from the discrete entropic plan."""
        cost = 0.5 * torch.cdist(self.test_source, self.target).square().numpy()
        a, b = (np.full(n, 1 / n) for n in cost.shape)
        plan = ot.sinkhorn(a, b, cost, epsilon * self.variance, method="sinkhorn_log", numItermax=2000, warn=False)
        return self.target[drawn(plan)]


def translated(latent: Latent, bridge: LightSB, num_steps: int) -> tuple[Tensor, list[object]]:
    """Translations by a bridge fitted here, and its scores."""
    torch.manual_seed(SEED)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the budget is fixed, converged or not
        history = bridge.fit(latent.target, latent.source, num_updates=num_steps, batch_size=BATCH, progress=False)
    seconds = time.process_time() - begun
    torch.manual_seed(SEED)
    z = bridge.transport(latent.test_source)
    likelihood = float(bridge.marginal_log_prob(latent.test_target).mean())
    return z, [*latent.scores(z), likelihood, history.iterations, seconds]


def drawn(plan: np.ndarray) -> Tensor:
    """A column for each row of a plan."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.multinomial(torch.as_tensor(plan), 1, generator=generator)[:, 0]


def bridges(dim: int, epsilon: float) -> dict[str, LightSB]:
    """All contenders at one epsilon."""
    light = {
        "LightSBM": LightSBM(dim, num_components=COMPONENTS, epsilon=epsilon),
        "LightSB, beta = inf": LightSB(dim, num_components=COMPONENTS, epsilon=epsilon),
    }
    return light | {
        f"LightSBBM, beta = {b:g}": LightSBBM(dim, num_components=COMPONENTS, epsilon=epsilon, beta=b)
        for b in BETAS[dim]
    }


def references(latent: Latent) -> tuple[list[list[object]], dict[str, Tensor]]:
    """What real images score, in any pairing, and the source untouched; and what of it the picture shows."""
    order = torch.randperm(len(latent.test_target), generator=torch.Generator().manual_seed(SEED))
    shuffled = latent.test_target[order[torch.arange(len(latent.test_source)) % len(order)]]
    matched, floor = latent.matched(), float(bw2_uvp(latent.target, latent.test_target))
    rows = [
        ["source untouched", "-", *latent.scores(latent.test_source)],
        ["real, random pairs", "-", *latent.scores(shuffled)[:-1], floor],
        ["real, optimal pairs", "-", *latent.scores(matched)[:-1], floor],
    ]
    rows += [["discrete entropic plan", e, *latent.scores(latent.entropic(e))] for e in EPSILONS]
    return [[*row, math.nan, "-", math.nan] for row in rows], {"source": latent.test_source, "optimal pair": matched}


def studied(latent: Latent, epsilon: float, short: bool) -> tuple[list[list[object]], dict[str, Tensor]]:
    """Rows of the table at one epsilon, and the translations that the picture shows."""
    rows, shown = [], {}
    for name, bridge in bridges(latent.dim, epsilon * latent.variance).items():
        z, scores = translated(latent, bridge, 40 if short else DUAL_STEPS if math.isfinite(bridge.beta) else STEPS)
        rows.append([name, epsilon, *scores])
        print(latent.dim, *rows[-1], flush=True)
        if name in SHOWN:
            shown[f"eps {epsilon:g}, {name.split(', ')[1]}"] = z
    return rows, shown


def mosaic(latent: Latent, shown: dict[str, Tensor], columns: Tensor) -> tuple[np.ndarray, list[str]]:
    """Tiles of 8 x 8 with a line between, and the names of the rows; nearest training targets under some."""
    names, tiles = [], []
    for name, z in shown.items():
        names.append(name)
        tiles.append(latent.images[columns] if name == "source" else latent.pixels(z[columns]))
        if name.endswith(("inf", "= 2")):
            names.append("nearest training image")
            tiles.append(latent.pixels(latent.nearest(z[columns])[1]))
    grid = np.full((9 * len(tiles) + 1, 9 * len(columns) + 1), 8.0)
    for i, row in enumerate(tiles):
        for j, image in enumerate(row):
            grid[9 * i + 1 : 9 * i + 9, 9 * j + 1 : 9 * j + 9] = image.reshape(8, 8)
    return grid, names


def picture(parts: list[tuple[Latent, dict[str, Tensor]]]) -> None:
    fig, axes = plt.subplots(1, len(parts), figsize=(17, 9.5), constrained_layout=True)
    for ax, (latent, shown) in zip(axes, parts, strict=True):
        columns = torch.cat([torch.as_tensor(np.flatnonzero(latent.labels == digit)[:6]) for digit in SOURCE])
        grid, names = mosaic(latent, shown, columns)
        ax.imshow(grid, cmap="gray_r", vmin=0, vmax=16)
        ax.set_xticks([])
        ax.set_yticks(9 * np.arange(len(names)) + 5, names, fontsize=9)
        ax.set_title(f"{SOURCE} -> {TARGET}, d = {latent.dim}")
    fig.savefig(RESULTS / "translation.png", dpi=100)


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    begun, parts, tables = time.process_time(), [], []
    for dim in BETAS:
        latent = Latent(dim)
        rows, shown = references(latent)
        for epsilon in EPSILONS:
            more, pictures = studied(latent, epsilon, "--short" in sys.argv)
            rows, shown = rows + more, shown | pictures
        parts.append((latent, shown))
        kept = 100 * float(latent.pca.explained_variance_ratio_.sum())
        tables += [
            f"\nd = {dim}: {kept:.0f} % of the pixels' variance. {len(latent.source)} source and {len(latent.target)} "
            f"target images to learn from. The SVC puts {latent.accuracy:.1f} %\nof real test targets "
            f"(their pixels) into {TARGET}.",
            table(COLUMNS, rows),
        ]
    picture(parts)
    tests = len(parts[0][0].test_source)
    note = NOTE.format(tests=tests, spread=100 * math.sqrt(0.09 / tests))
    lines = [header("Unpaired translation of digits by the light bridges", SEED), note, *tables, READING]
    write("translation", "\n".join([*lines, f"{time.process_time() - begun:.0f} CPU s in all."]))


if __name__ == "__main__":
    main()
