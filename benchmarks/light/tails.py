"""The claim: a light bridge has sub-Gaussian ends whatever beta; inside TailMatched it has a Student-t target's tails.

From a point to t(2), t(3), t(5), t(10): LightSB, LightSB-M and LightSBB-M, each alone, inside TailMatched with the
index read from the draws, and with the true index. Run as `python -m benchmarks.light.tails`.
"""

import textwrap
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

from benchmarks.lib.fits import cpu_seconds
from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.bridges import Bridge, LightSB, LightSBBM, LightSBM, TailMatched

SEED, SEEDS = 0, (0, 1)
NUS = [2.0, 3.0, 5.0, 10.0]
KINDS: dict[str, Callable[..., Bridge]] = {
    "LightSB": LightSB,
    "LightSB-M": LightSBM,
    "LightSBB-M": partial(LightSBBM, beta=10.0),
}
FEW, ONE = "auto, J = 5", "auto, J = 1"
CASES = [
    ("truth", "draws"),
    *((kind, wrap) for wrap in ("alone", "auto") for kind in KINDS),
    *(("LightSB", wrap) for wrap in ("nu", FEW, ONE)),
    ("LightSBB-M", FEW),
]
LEVELS = [0.5, 0.9, 0.95, 0.99, 0.995, 0.999]
FULL = {"steps": 1000, "train": 100_000, "judge": 1_000_000, "held": 100_000}
BRIEF = {"steps": 40, "train": 20_000, "judge": 20_000, "held": 5000}
SIZE = dict(FULL)


def target(nu: float) -> dist.TorchDistribution:
    """Student t, in float64."""
    one = torch.ones(1, dtype=torch.float64)
    return dist.StudentT(nu * one, 0 * one, one).to_event(1)


def built(kind: str, wrap: str, nu: float) -> Bridge:
    bridge = KINDS[kind](1, {FEW: 5, ONE: 1}.get(wrap, 50), 1.0)
    return bridge if wrap == "alone" else TailMatched(bridge, df=nu if wrap == "nu" else "auto")


@cache
def exact_quantiles(nu: float, num: int) -> np.ndarray:
    """The law's quantiles at the middle of each of ``num`` equal shares: what a sorted cloud is held against."""
    half = stats.t.isf((np.arange(num // 2) + 0.5) / num, nu)
    return np.concatenate([-half, half[::-1]])


def hill(size: np.ndarray, share: float) -> float:
    """Tail index by the largest share of sorted absolute values."""
    count = int(share * len(size))
    return 1 / float(np.log(size[-count:] / size[-count - 1]).mean())


def read(draws: Tensor, nu: float) -> dict[str, Any]:
    """Quantiles, tail indices and distances of draws, of a model or of the target itself."""
    x = np.sort(draws.numpy().ravel())
    size, away = np.sort(np.abs(x)), np.abs(x - exact_quantiles(nu, len(x)))
    true = stats.t.ppf(LEVELS, nu)
    found = np.quantile(x, LEVELS)
    relative = (found - true) / np.where(true > 1e-9, true, 1.0)
    return {
        "quantiles": relative.tolist(),
        "hill": [hill(size, 0.01), hill(size, 0.001)],
        "W1": float(away.mean()),
        "W2": float(np.sqrt(np.square(away).mean())),
    }


def measured(kind: str, wrap: str, nu: float, seed: int) -> dict[str, Any]:
    """One fit to draws of the target; its own draws, and the weights that the target's would have."""
    torch.manual_seed(seed)
    law = target(nu)
    data = law.sample((SIZE["train"],))
    if kind == "truth":
        return read(law.sample((SIZE["judge"],)), nu)
    bridge = built(kind, wrap, nu)
    seconds = cpu_seconds(partial(bridge.fit, data, num_updates=SIZE["steps"], progress=False))
    index = [float(v) for v in (bridge.lower, bridge.upper)] if isinstance(bridge, TailMatched) else None
    found = read(bridge().sample((SIZE["judge"],)), nu)
    torch.manual_seed(1000 + seed)
    fresh = law.sample((SIZE["held"],))
    ratio = law.log_prob(fresh) - bridge().log_prob(fresh)
    return found | {"ratio": float(ratio.max()), "kl": float(ratio.mean()), "index": index, "seconds": seconds}


Fits = dict[tuple[str, str], list[dict[str, Any]]]


def runs(store: Store, nu: float) -> Fits:
    """All fits of one target, by kind and wrap."""
    return {
        case: [store.once(f"{nu:g}, {', '.join(case)}, {seed}", partial(measured, *case, nu, seed)) for seed in SEEDS]
        for case in CASES
    }


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def label(kind: str, wrap: str, fits: list[dict[str, Any]]) -> str:
    if kind == "truth":
        return "the target's own draws"
    if wrap == "alone":
        return kind
    index = f"df = {median(v for fit in fits for v in fit['index']):.3g}"
    return f"TailMatched {kind}, {wrap if wrap != 'nu' else 'given'}: {index}"


def row(kind: str, wrap: str, nu: float, fits: list[dict[str, Any]]) -> list[object]:
    """Medians over seeds."""
    centre, *errors = (median(fit["quantiles"][i] for fit in fits) for i in range(len(LEVELS)))
    indices = [f"{median(fit['hill'][i] for fit in fits):.2f}" for i in (0, 1)]
    w2 = f"{median(fit['W2'] for fit in fits):.3f}" if nu > 2 else "-"
    cells = [f"{centre:+.3f}", *(f"{100 * error:+.1f}%" for error in errors), *indices]
    cells += [f"{median(fit['W1'] for fit in fits):.4f}", w2]
    if kind == "truth":
        return [label(kind, wrap, fits), *cells, "-", "-", "-"]
    ratio, kl = (median(fit[name] for fit in fits) for name in ("ratio", "kl"))
    return [label(kind, wrap, fits), *cells, f"{ratio:.3g}", f"{kl:.4f}", median(fit["seconds"] for fit in fits)]


def nu_text(nu: float, fits: Fits) -> str:
    columns = [f"t({nu:g})", *(f"q {level:g}" for level in LEVELS), "Hill 1%", "Hill .1%", "W1", "W2"]
    return "\n" + table([*columns, "max log p/q", "mean", "CPU s"], [row(*case, nu, fits[case]) for case in CASES])


def report(store: Store) -> str:
    notes = (
        f"J = 50 where no other is named, epsilon = 1, beta = 10; {SIZE['train']:,} draws to fit to, {SIZE['steps']:,} "
        f"updates; medians of {len(SEEDS)} seeds, of {SIZE['judge']:,} draws each. Quantiles: relative errors, but "
        "for the one at .5. "
        "Hill: tail index by the largest 1% and .1% of |x|; in the limit the law's own is nu. W1 and W2: against the "
        "law's exact quantiles; the first row is their floor. W2 is infinite at nu = 2. max log p/q and its mean (the "
        f"divergence, in nats): over {SIZE['held']:,} fresh draws of the target. Inside TailMatched the index of the "
        "draws is nu over the variance of the outermost component in z, which narrow components raise."
    )
    title = "Student-t targets: light bridges alone, and inside TailMatched"
    tables = [nu_text(nu, runs(store, nu)) for nu in NUS]
    return "\n".join([header(title, SEED), textwrap.fill(notes, 120), *tables])


def main() -> None:
    asked = command(__doc__, short=True)
    SIZE.update(BRIEF if asked.short else FULL)
    write("tails", report(Store("tails", keep=not asked.short)), keep=not asked.short)


if __name__ == "__main__":
    main()
