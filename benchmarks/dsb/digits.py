"""Real images, dataset to dataset: even digits carried to odd ones, judged by classifiers after every iteration.

Run as `python -m benchmarks.dsb.digits`. Finished cells are kept, and a second call goes on from them.
"""

from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from benchmarks.lib.classifiers import told_apart
from benchmarks.lib.fits import Watch, quiet
from benchmarks.lib.pictures import mosaic, save
from benchmarks.lib.report import header, reading, spread, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import DSB

SEEDS, TEST, DIM = 3, 0.3, 64
SHOWN, DRAWS = (0, 2, 4, 6, 8), 3
SCORES = {
    "odd": "odd, %",
    "sure": "P(odd), %",
    "c2st": "C2ST mlp",
    "linear": "C2ST linear",
    "moved": "moved",
    "independent": "independent",
    "optimal": "optimal",
}


class Split:
    """Even and odd digits, dequantised, in [-1, 1], some held out; and a classifier of the ten digits."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        x0, x1, y0, y1 = train_test_split(
            digits.data, digits.target, test_size=TEST, stratify=digits.target, random_state=seed
        )
        self.classifier = MLPClassifier((128,), alpha=1e-3, max_iter=400, random_state=seed).fit(x0, y0)
        self.accuracy = float(self.classifier.score(x1, y1))
        noise = np.random.default_rng(seed)
        x0, x1 = (torch.as_tensor((x + noise.random(x.shape)) / 8.5 - 1, dtype=torch.float32) for x in (x0, x1))
        even0, even1 = (torch.as_tensor(y % 2 == 0) for y in (y0, y1))
        self.source, self.target = x0[even0], x0[~even0]
        self.evens, self.odds = x1[even1], x1[~even1]
        self.labels = torch.as_tensor(y1)[even1]

    @property
    def variance(self) -> float:
        """The target's, mean over the pixels."""
        return float(self.target.var(0).mean())

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the ten digits, of images on this scale. Shape ``(*, 64)`` to ``(*, 10)``."""
        grey = ((x + 1) * 8.5 - 0.5).clamp(0, 16).reshape(-1, DIM).numpy()
        return torch.as_tensor(self.classifier.predict_proba(grey)).reshape(*x.shape[:-1], 10)

    def odd(self, x: Tensor) -> dict[str, float]:
        """Share read as odd, and the mean probability of that, in per cent."""
        odd = self.probabilities(x)[..., 1::2].sum(-1)
        return {"odd": 100 * float((odd > 0.5).double().mean()), "sure": 100 * float(odd.mean())}

    def scores(self, x: Tensor, seed: int) -> dict[str, float]:
        """Of the held-out evens' ends ``(n, 64)``, in their order."""
        cost = torch.cdist(self.evens, x).square()
        rows, columns = linear_sum_assignment(cost.numpy())
        return self.odd(x) | {
            "c2st": told_apart(x, self.odds, MLPClassifier((64,), alpha=1.0, max_iter=300, random_state=seed), seed),
            "linear": told_apart(x, self.odds, LogisticRegression(C=0.1, max_iter=2000), seed),
            "moved": float((x - self.evens).square().sum(-1).mean()),
            "independent": float(cost.mean()),
            "optimal": float(cost[rows, columns].mean()),
        }


@dataclass(frozen=True)
class Method:
    """A bridge, its epsilon as a share of the target's variance, and the options of its fit."""

    name: str
    share: float
    method: str = "imf"
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, split: Split, seed: int, store: Store) -> dict[str, Any]:
        """Scores of the held-out evens' ends after every iteration; CPU seconds without the measuring."""
        torch.manual_seed(seed)
        bridge = DSB(DIM, epsilon=self.share * split.variance, method=self.method)

        def measure() -> dict[str, float]:
            torch.manual_seed(1000 + seed)
            row = split.scores(bridge.transport(split.evens), seed)
            back = split.probabilities(bridge.transport_back(split.odds))[..., ::2].sum(-1)
            return row | {"even": 100 * float((back > 0.5).double().mean())}

        watch = Watch(measure)
        with quiet():
            bridge.fit(split.target, split.source, progress=False, on_iteration=watch, **self.options)
        if seed == 0:
            store.put(f"shown, {self.name}", shown(bridge, split))
        return {"iterations": watch.rows, "epsilon": bridge.epsilon}


def shown(bridge: DSB, split: Split) -> list[list[list[float]]]:
    """A row a held-out digit: itself, and ends of several paths."""
    torch.manual_seed(7)
    x0 = torch.cat([split.evens[split.labels == digit][:2] for digit in SHOWN])
    images = torch.stack([x0, *(bridge.transport(x0) for _ in range(DRAWS))], 1)
    return [[[round(v, 2) for v in image] for image in row] for row in images.tolist()]


BASE = {"num_iterations": 6, "num_updates": 500}
METHODS = [
    Method("IMF, .1", 0.1, options=BASE),
    Method("IPF, .1", 0.1, "ipf", BASE | {"num_pairs": 2048}),
    Method("IMF, .05", 0.05, options=BASE),
    Method("IMF, .3", 0.3, options=BASE),
    Method("IMF, .1, sinkhorn", 0.1, options=BASE | {"pairs": "sinkhorn"}),
]
CHOSEN = METHODS[:2]


def floors(split: Split, seed: int) -> dict[str, dict[str, float]]:
    """Scores of real odd digits, those learnt from against those held out; and of the evens, left as they are."""
    torch.manual_seed(seed)
    real = split.target[torch.randperm(len(split.target))[: len(split.evens)]]
    rows = {"real odd digits": split.scores(real, seed), "left as they are": split.scores(split.evens, seed)}
    lines = linear_sum_assignment(torch.cdist(split.evens, real).square().numpy())[1]
    rows["real odd digits, optimal pairing"] = split.scores(real[torch.as_tensor(lines)], seed)
    return rows | {
        "facts": {
            "accuracy": split.accuracy,
            "variance": split.variance,
            "train": len(split.source),
            "train odd": len(split.target),
            "test": len(split.evens),
            "test odd": len(split.odds),
        }
    }


def run_all(store: Store, seeds: int) -> None:
    for seed in range(seeds):
        split = Split(seed)
        store.once(f"floor, {seed}", partial(floors, split, seed))
        for one in METHODS if seed == 0 else CHOSEN:
            name = f"{one.name}, {seed}"
            if name not in store.rows:
                store.put(name, one.run(split, seed, store))
                last = store.rows[name]["iterations"][-1]
                print(name, {k: round(v, 3) for k, v in last.items()}, flush=True)


def report(store: Store) -> str:
    columns = ["", "seeds", *SCORES.values(), "back: even, %", "CPU s"]
    floor = store.seeded("floor,", SEEDS)
    rows: list[list[object]] = [
        [name, len(floor), *(spread([row[name][score] for row in floor], 3) for score in SCORES), "", ""]
        for name in floor[0]
        if name != "facts"
    ]
    for one in METHODS:
        found = store.seeded(f"{one.name},", SEEDS)
        for i in range(len(found[0]["iterations"]) if found else 0):
            lines = [row["iterations"][i] for row in found]
            cells = [spread([line[score] for line in lines], 3) for score in [*SCORES, "even"]]
            rows.append(
                [f"{one.name}: iteration {i + 1}", len(found), *cells, f"{mean(r['seconds'] for r in lines):.0f}"]
            )
    facts = floor[0]["facts"]
    note = NOTE.format(**{k.replace(" ", "_"): v for k, v in facts.items()})
    title = header("Even digits to odd digits by a diffusion Schrodinger bridge", 0)
    return "\n".join([title, note, reading("dsb_digits"), table(columns, rows)])


def picture(store: Store) -> None:
    names = [one.name for one in CHOSEN if f"shown, {one.name}" in store.rows]
    fig, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 6.4), squeeze=False, constrained_layout=True)
    for ax, name in zip(axes[0], names, strict=True):
        rows = [[row[0], *row[-DRAWS:]] for row in store.rows[f"shown, {name}"]]
        mosaic(ax, rows, black=1.0, white=-1.0)
        ax.set_title(f"{name}: an even digit, {DRAWS} ends", fontsize=8)
    save(fig, "dsb_digits", dpi=80)


NOTE = """scikit-learn's digits, 64 pixels, dequantised by uniform noise and scaled to [-1, 1]. Learnt from {train} even
and {train_odd} odd images, no pairs; judged on {test} held-out evens carried by the forward chain, and {test_odd}
held-out odds. The number behind a method is epsilon as a share of the target's variance a pixel ({variance:.3f}).
Library's settings but 500 updates a half iteration and, for IPF, 2,048 paths at a time; mean +- sd over seeds (split,
fit).
  odd, %, P(odd)   by a classifier of the ten digits trained on the real training images ({accuracy:.3f} right on
                   held-out real ones): share read as odd, mean probability
  C2ST             accuracy of a fresh classifier between carried and held-out real odd digits, five folds: a network of
                   64 units, and a logistic regression; .5 is chance; floor: real training images
  moved            mean squared displacement of an image; "independent": between all evens and all ends, as if paired at
                   random; "optimal": the optimal pairing of the same evens and ends
  back: even       share of held-out odds, carried back, that is read as even"""


def main() -> None:
    asked = command(__doc__, seeds=SEEDS, cached=True)
    store = Store("dsb_digits")
    if not asked.report:
        run_all(store, asked.seeds)
    write("dsb_digits", report(store))
    picture(store)


if __name__ == "__main__":
    main()
