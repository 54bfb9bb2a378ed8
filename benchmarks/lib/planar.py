"""The three pairs of planar laws of the published table, the scores of a bridge on them, and steps for a CPU budget."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from benchmarks.lib.fits import cpu_seconds
from pyro_sb.bridges import LightSB, LightSBBM
from pyro_sb.datasets import EightGaussians, Moons
from pyro_sb.metrics import mode_share_tv, sliced_wasserstein2, wasserstein2

NUM_COMPONENTS = 50
EXACT, SLICED, SHARES, JUDGED, ENDS = 10_000, 200_000, 1_000_000, 5_000, 20_000  # numbers of draws
SHORT, LONG = 64, 640  # steps of the two timed runs; both are whole numbers of the dual solver's pools


@dataclass(frozen=True)
class Pair:
    """A source and a target with the published epsilon and beta."""

    name: str
    source: Distribution
    target: Distribution
    epsilon: float
    beta: float


def standard_normal() -> Distribution:
    """The published source N, in the plane."""
    return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


PAIRS = [
    Pair("N->8gaussians", standard_normal(), EightGaussians(), epsilon=1.0, beta=10.0),
    Pair("moons->8gaussians", Moons(), EightGaussians(), epsilon=5.0, beta=100.0),
    Pair("N->moons", standard_normal(), Moons(), epsilon=1.0, beta=100.0),
]


def published_cloud(law: Distribution, n: int) -> Tensor:
    """Draws of a target as the published scores take them: the moons are stratified."""
    return law.stratified(n) if isinstance(law, Moons) else law.sample(torch.Size([n]))


def steps_within(seconds: float, fit: Callable[[int], object]) -> int:
    """Steps for which ``fit(num_updates)`` takes about so many CPU seconds, its start included, from two short runs."""
    cpu_seconds(fit, SHORT)
    short, long = cpu_seconds(fit, SHORT), cpu_seconds(fit, LONG)
    return max(LONG, int(SHORT + (seconds - short) / (long - short) * (LONG - SHORT)))


def schroedinger_bass(pair: Pair, beta: float | None = None) -> LightSBBM:
    return LightSBBM(2, num_components=NUM_COMPONENTS, epsilon=pair.epsilon, beta=pair.beta if beta is None else beta)


class Judge:
    """The clouds that all methods meet in one seed, and the scores against them."""

    def __init__(self, pair: Pair, seed: int) -> None:
        torch.manual_seed(1000 + seed)
        self.pair, self.seed, self.modes = pair, seed, isinstance(pair.target, EightGaussians)
        self.small, self.large = published_cloud(pair.target, EXACT), published_cloud(pair.target, SLICED)
        self.judged, self.ends = pair.target.sample((JUDGED,)), pair.target.sample((ENDS,))
        self.starts = pair.source.sample((ENDS,))
        self.num = SHARES if self.modes else SLICED

    def draws(self, bridge: LightSB) -> Tensor:
        torch.manual_seed(2000 + self.seed)
        return bridge().sample((self.num,))

    def of_draws(self, x: Tensor) -> dict[str, float]:
        scores = {"sliced": float(sliced_wasserstein2(x[:SLICED], self.large, floor_draws=self.large[:2]))}
        target = self.pair.target
        return scores | ({"tv": float(mode_share_tv(x, target.centres))} if isinstance(target, EightGaussians) else {})

    def of_bridge(self, bridge: LightSB) -> dict[str, float]:
        twin = exact_twin(bridge, self.pair)
        torch.manual_seed(3000 + self.seed)
        density = of_density(twin.marginal_log_prob(self.judged))
        return density | {"dual": twin.dual(self.starts, self.ends)}


def of_density(log_prob: Tensor) -> dict[str, float]:
    """Mean log density, and the standard error that the draws leave."""
    return {"log_prob": float(log_prob.mean()), "error": float(log_prob.std()) / math.sqrt(len(log_prob))}


def exact_twin(bridge: LightSB, pair: Pair) -> LightSBBM:
    """The same parameters with exact inverses; scales below the floor, as alternation leaves them, are raised to it."""
    twin = schroedinger_bass(pair, bridge.beta)
    kept = {key: v for key, v in bridge.state_dict().items() if "extra_state" not in key and "learned_map" not in key}
    twin.load_state_dict(kept, strict=False)
    twin.set_extra_state(twin.get_extra_state() | {"source_kind": "law"})
    twin.source = pair.source
    if getattr(bridge, "learned_map", None) is not None:
        twin.process.take(twin.process.potential())
    return twin


def exact_distance(x: Tensor, y: Tensor) -> float:
    """W2 alone: its floor is measured once a seed."""
    return float(wasserstein2(x, y, floor_draws=y[:2]))
