"""The three pairs of planar laws of the published table, their clouds, and how many steps a CPU budget buys."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.datasets import EightGaussians, Moons

NUM_COMPONENTS = 50
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


def cpu_seconds(action: Callable[..., object], *arguments: object) -> float:
    """CPU seconds of a fit in this process. That a short fit has not converged is no news."""
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*converged", category=RuntimeWarning)
        action(*arguments)
    return time.process_time() - begun


def steps_within(seconds: float, fit: Callable[[int], object]) -> int:
    """Steps for which ``fit(num_steps)`` takes about so many CPU seconds, its start included, from two short runs."""
    cpu_seconds(fit, SHORT)
    short, long = cpu_seconds(fit, SHORT), cpu_seconds(fit, LONG)
    return max(LONG, int(SHORT + (seconds - short) / (long - short) * (LONG - SHORT)))
