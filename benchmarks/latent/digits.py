"""Digits: latent bridges against data space at equal training time.

Run as `python -m benchmarks.latent.digits`. Finished cells are kept, and a second call goes on from them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.distributions import Independent, Normal

from benchmarks.lib.classifiers import told_apart
from benchmarks.lib.fits import cpu_seconds, timed
from benchmarks.lib.pictures import mosaic, save
from benchmarks.lib.report import header, reading, spread, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import AutoencoderCodec, Bridge, Codec, LatentBridge, LightSB, PCACodec, SmoothedBridge
from pyro_sb.metrics import c2st, mmd, wasserstein2

SEEDS, TRAIN, DIM = 3, 1200, 64
BUDGETS = (8, 60)  # CPU seconds of codec and bridge; some 3 of them are the bridge's measuring of its denoiser
CODEC_SHARE = 0.5  # of the budget, for an autoencoder
MOST = 3000  # the library's number of updates, of codec and latent bridge: more gained nothing on seed 0
STEPS = (20, 60, 200)
SHOWN = 12
ROWS = ("data space", "PCA-8", "PCA-16", "autoencoder-12")
MIXTURE = "autoencoder-12, LightSB"
CODECS: dict[str, Callable[[], Codec]] = {
    "PCA-8": lambda: PCACodec(8),
    "PCA-16": lambda: PCACodec(16),
    "autoencoder-12": lambda: AutoencoderCodec(12),
    MIXTURE: lambda: AutoencoderCodec(12),
}
SCORES = {
    "c2st": "C2ST",
    "small": "C2ST small",
    "mmd": "MMD^2",
    "frechet": "Frechet",
    "w2": "W2",
    "sure": "confidence",
    "nearest": "nearest",
    "near": "too near, %",
    "rmse": "rmse",
    "codec": "codec s",
    "bridge": "bridge s",
}


def as_images(x: Tensor) -> Tensor:
    """Whole grey values 0 to 16, dequantised by fresh noise, in [0, 1]: every cloud is judged so."""
    grey = (x * 17).floor().clamp(0, 16)
    return (grey + torch.rand_like(grey)) / 17


class Split:
    """Digits, dequantised, in [0, 1]: 1,200 to learn from, 597 to judge by; and a classifier of the ten digits."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.data))
        torch.manual_seed(seed)
        x = as_images(torch.as_tensor(digits.data[order] / 17 + 0.5 / 17, dtype=torch.float32))
        self.train, self.test = x[:TRAIN], x[TRAIN:]
        labels = digits.target[order]
        self.classifier = MLPClassifier((64, 16), alpha=1e-3, max_iter=400, random_state=seed)
        self.classifier.fit(self.train.numpy(), labels[:TRAIN])
        self.accuracy = float(self.classifier.score(self.test.numpy(), labels[TRAIN:]))
        self.gaps = torch.cdist(self.test, self.train).min(1).values

    def features(self, x: Tensor) -> np.ndarray:
        """The classifier's last hidden layer. Shape ``(n, 16)``."""
        out = x.numpy()
        for weight, bias in list(zip(self.classifier.coefs_, self.classifier.intercepts_))[:-1]:
            out = np.maximum(out @ weight + bias, 0)
        return out

    def frechet(self, x: Tensor) -> float:
        """Squared Frechet distance between Gaussians with the moments of the features."""
        a, b = self.features(x), self.features(self.test)
        first, second = np.cov(a.T), np.cov(b.T)
        values, vectors = np.linalg.eigh(first)
        half = vectors * np.sqrt(values.clip(0)) @ vectors.T  # units that never fire make it singular
        roots = np.sqrt(np.linalg.eigvalsh(half @ second @ half).clip(0))
        return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second) - 2 * roots.sum())

    def scores(self, x: Tensor, seed: int, package: bool) -> dict[str, float]:
        """Of 597 rows on the data's scale; the package's C2ST, half a minute, where asked for."""
        torch.manual_seed(500 + seed)
        x = as_images(x)
        gaps = torch.cdist(x, self.train).min(1).values
        found = {
            "small": told_apart(x, self.test, MLPClassifier((64,), alpha=1.0, max_iter=200, random_state=seed), seed),
            "mmd": float(mmd(x, self.test)),
            "frechet": self.frechet(x),
            "w2": float(wasserstein2(x, self.test)),
            "sure": float(self.classifier.predict_proba(x.numpy()).max(1).mean()),
            "nearest": float(gaps.median() / self.gaps.median()),
            "near": 100 * float((gaps < self.gaps.quantile(0.05)).double().mean()),
        }
        return found | ({"c2st": float(c2st(x, self.test))} if package else {})


def speeds(split: Split) -> dict[str, list[float]]:
    """CPU seconds of a fit as a + b x steps, from two short ones; of fresh draws, as those never stop early."""
    found = {}
    for name, dim in (("data space", DIM), ("latent", 12)):
        law = Independent(Normal(torch.zeros(dim), 1.0), 1)
        found[name] = speed_of(lambda n, law=law, dim=dim: SmoothedBridge(dim).fit(law, num_updates=n, progress=False))
    found["autoencoder-12"] = speed_of(lambda n: AutoencoderCodec(12).fit(split.train, num_updates=n, progress=False))
    return found


def speed_of(fit: Callable[[int], Any]) -> list[float]:
    cpu_seconds(fit, 20)
    short, long = cpu_seconds(fit, 50), cpu_seconds(fit, 350)
    return [max(0.0, short - (long - short) / 6), (long - short) / 300]


def steps_for(speed: list[float], budget: float) -> int:
    return max(50, int((budget - speed[0]) / speed[1]))


@dataclass
class Fitted:
    bridge: Bridge
    codec: Codec | None
    times: dict[str, float]

    @property
    def inner(self) -> SmoothedBridge:
        bridge = self.bridge.bridge if isinstance(self.bridge, LatentBridge) else self.bridge
        assert isinstance(bridge, SmoothedBridge)
        return bridge


def fitted(name: str, budget: float, split: Split, speed: dict[str, list[float]], seed: int) -> Fitted:
    torch.manual_seed(seed)
    if name == "data space":
        bridge: Bridge = SmoothedBridge(DIM)
        steps = steps_for(speed[name], budget)
        spent = cpu_seconds(bridge.fit, split.train, num_updates=steps, progress=False)
        return Fitted(bridge, None, {"codec": 0.0, "bridge": spent, "steps": steps})
    codec, options = CODECS[name](), {}
    if isinstance(codec, AutoencoderCodec):
        options = {"num_updates": min(MOST, steps_for(speed[ROWS[-1]], CODEC_SHARE * budget))}
    first = cpu_seconds(codec.fit, split.train, progress=False, **options)
    if name == MIXTURE:
        bridge, steps = LatentBridge(LightSB(12, num_components=20, covariance="full"), codec), 2000
    else:
        bridge = LatentBridge(codec=codec)
        steps = min(MOST, steps_for(speed["latent"], budget - first))
    spent = cpu_seconds(bridge.fit, split.train, num_updates=steps, progress=False)
    times = {"codec": first, "bridge": spent, "steps": steps}
    return Fitted(bridge, codec, times | ({"codec_steps": options["num_updates"]} if options else {}))


def run(name: str, budget: int, seed: int, split: Split, store: Store) -> None:
    """One bridge and its codec's reconstructions, scored."""
    key = f"{name}, {budget} s, {seed}"
    if key in store.rows:
        return
    num = len(split.test)
    one = fitted(name, budget, split, store.once("speeds", lambda: speeds(split)), seed)
    x = one.bridge().sample((num,))
    images = {"draws": x}
    if one.codec is not None:
        with torch.no_grad():
            images["reconstructions"] = one.codec.decode(one.codec.encode(split.train[:num]))
            error = one.codec.decode(one.codec.encode(split.test)) - split.test
        judged = seed == 0 and budget == BUDGETS[-1] and name == ROWS[-1]
        bound = split.scores(images["reconstructions"], seed, package=judged)
        bound = without_gaps(bound) | {"rmse": float(error.square().mean().sqrt()), "codec": one.times["codec"]}
        store.put(f"{name}: reconstructions, {budget} s, {seed}", bound)
    if seed == 0:
        for kind, rows in images.items():
            grey = (rows[:SHOWN] * 17).floor().clamp(0, 16).to(torch.int).tolist()
            store.put(f"shown, {name}, {budget} s, {kind}", grey)
        if name == ROWS[-1] and budget == BUDGETS[-1]:
            for steps in STEPS:
                torch.manual_seed(seed)
                one.inner.sampler.num_steps = steps
                drawn, spent = timed(one.bridge().sample, (num,))
                row = split.scores(drawn, seed, package=False)
                store.put(f"{name}, {budget} s, {steps} steps", row | {"bridge": spent})
    store.put(
        key,
        split.scores(x, seed, package=budget == BUDGETS[-1] and not name.startswith("PCA")) | one.times,
    )
    print(key, {k: round(v, 4) for k, v in store.rows[key].items()}, flush=True)


def floor(split: Split, seed: int) -> dict[str, float]:
    row = split.scores(split.train[: len(split.test)], seed, package=seed == 0)
    return without_gaps(row) | {"accuracy": split.accuracy}


def without_gaps(row: dict[str, float]) -> dict[str, float]:
    """Scores of training images, which are nearest to themselves."""
    return {key: value for key, value in row.items() if key not in ("nearest", "near")}


ORDER = [
    *((name, 60, seed) for seed in (0, 1) for name in (ROWS[0], ROWS[-1], MIXTURE)),
    *((name, 60, 0) for name in ("PCA-16", "PCA-8")),
    *((name, 8, 0) for name in ROWS),
    *((name, 60, 2) for name in (ROWS[0], ROWS[-1], MIXTURE)),
    *((name, 8, seed) for seed in (1, 2) for name in ROWS),
    *((name, 60, seed) for seed in (1, 2) for name in ("PCA-16", "PCA-8")),
]


def run_all(store: Store, minutes: float) -> None:
    splits: dict[int, Split] = {}
    begun = time.process_time()
    for name, budget, seed in ORDER:
        if time.process_time() - begun > 60 * minutes:
            print("the time is up; call again to go on", flush=True)
            return
        if f"{name}, {budget} s, {seed}" in store.rows:
            continue
        if seed not in splits:
            splits[seed] = Split(seed)
        split = splits[seed]
        store.once(f"floor, {seed}", lambda split=split, seed=seed: floor(split, seed))
        run(name, budget, seed, split, store)


def line(store: Store, title: str, key: str) -> list[object] | None:
    rows = store.seeded(f"{key},", SEEDS)
    if not rows:
        return None
    cells = []
    for score in SCORES:
        values = [row[score] for row in rows if score in row]
        short = score in ("codec", "bridge", "near")
        cells.append((f"{mean(values):.1f}" if short else spread(values, 3)) if values else "")
    return [title, len(rows), *cells]


def report(store: Store) -> str:
    rows = [line(store, "real training images (floor)", "floor")]
    for budget in BUDGETS:
        for name in (*ROWS, MIXTURE):
            rows.append(line(store, f"{budget} s, {name}", f"{name}, {budget} s"))
            if name == MIXTURE:
                continue
            rows.append(line(store, f"{budget} s, {name}: reconstructed", f"{name}: reconstructions, {budget} s"))
    for steps in STEPS:
        row = store.rows.get(f"{ROWS[-1]}, {BUDGETS[-1]} s, {steps} steps")
        if row:
            cells = [f"{row[score]:.3g}" if score in row else "" for score in SCORES]
            rows.append([f"60 s, {ROWS[-1]}, {steps} steps of the sampler", 1, *cells])
    accuracy = mean(store.scores("floor,", "accuracy", SEEDS))
    text = table(["", "seeds", *SCORES.values()], [row for row in rows if row])
    title = header("Digits: latent bridges against data space at equal training time", 0)
    return "\n".join([title, NOTE.format(accuracy=100 * accuracy), verdicts(store), reading("latent_digits"), text])


def verdicts(store: Store) -> str:
    """The goals, in words."""
    lines = []
    for name in (ROWS[-1], MIXTURE):
        seeds = [i for i in range(SEEDS) if all(f"{n}, 60 s, {i}" in store.rows for n in (name, ROWS[0]))]
        best, plain = ([store.rows[f"{n}, 60 s, {i}"] for i in seeds] for n in (name, ROWS[0]))
        if not seeds:
            continue
        scores = [row["c2st"] for row in best]
        met = "met" if mean(scores) <= 0.6 else "NOT met"
        lines.append(f"Goal {met}: {name}, within 60 CPU s, at C2ST <= .60: {spread(scores)} over {len(seeds)} seeds.")
        for score, word in (("c2st", "C2ST"), ("mmd", "MMD^2"), ("frechet", "Frechet distance")):
            wins = sum(a[score] < b[score] for a, b in zip(best, plain))
            met = "met" if wins == len(seeds) else "NOT met"
            values = f"{mean(r[score] for r in best):.3g} against {mean(r[score] for r in plain):.3g}"
            lines.append(f"Goal {met}: better than data space in {word}: {values}, on {wins} of {len(seeds)} seeds.")
    return "\n".join(lines or ["Goals: not judged yet."])


def picture(store: Store) -> None:
    budget = max(b for b in BUDGETS if f"shown, {ROWS[-1]}, {b} s, draws" in store.rows)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))[:SHOWN]
    lines = [("real", digits.data[order].astype(int).tolist())]
    for name in (*ROWS, MIXTURE):
        for kind, word in (("reconstructions", "of these"), ("draws", "draws")):
            key = f"shown, {name}, {budget} s, {kind}"
            if key in store.rows and (name, kind) != (MIXTURE, "reconstructions"):
                lines.append((f"{name}: {word}", store.rows[key]))
    figure, axis = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    mosaic(axis, [images for _, images in lines], black=16, white=0)
    axis.set_yticks([9 * i + 4.5 for i in range(len(lines))], [name for name, _ in lines], fontsize=7)
    axis.set_title(f"At most {budget} CPU seconds of training each", fontsize=9)
    save(figure, "latent_digits")


NOTE = """scikit-learn's digits, 1,200 to learn from and 597 to judge by; 597 draws. Learnt from are grey values
dequantised by uniform noise, (g + u) / 17, in [0, 1], as some corner pixels never vary, which data space refuses. Every
cloud that is judged (draws, reconstructions, real images) is treated alike: rounded to whole grey values, clipped to
0..16, dequantised afresh. All bridges are SmoothedBridge with the library's settings (20 steps of the flow on the
geometric grid; 3 x 256 net, the network with the lowest held-out loss kept), but for one row, whose inner bridge is a
LightSB of 20 full components. Equal training time: updates are set from short timed fits so that codec and bridge take
the CPU seconds named, one thread; an autoencoder gets half of them. A fit stops early where its held-out loss no
longer falls, and latent bridges and codecs make 3,000 updates at most, so the seconds spent are fewer.
  C2ST        the package's c2st: two hidden layers of 640 units, Adam until its loss no longer falls, five folds,
              pixels standardised; .5 is chance (half a minute each, so not everywhere)
  C2ST small  the same with one hidden layer of 64 units and a penalty of 1
  MMD^2       unbiased, Gaussian affinity, median bandwidth
  Frechet     squared, in the 16 units of the last hidden layer of a digit classifier ({accuracy:.1f} % right on the
              test images); confidence: its mean highest probability
  W2          exact, between 597 and 597
  nearest     median distance of a draw to its nearest training image, over that of a test image to its: below 1 is
              memorising. too near: share of draws nearer to a training image than 95 % of the test images are; 5
              where nothing is memorised
  rmse        of the reconstructed test images, their dequantising noise included
"reconstructed" rows: 597 training images encoded and decoded, against the test images, unpaired as draws are. They
are the bound of the row above. Mean +- sd over seeds (split, fit).
"""


def main() -> None:
    minutes = {"type": float, "default": 60.0, "help": "CPU minutes after which no cell is begun"}
    asked = command(__doc__, cached=True, minutes=minutes)
    store = Store("latent_digits")
    if not asked.report:
        run_all(store, asked.minutes)
    write("latent_digits", report(store))
    picture(store)


if __name__ == "__main__":
    main()
