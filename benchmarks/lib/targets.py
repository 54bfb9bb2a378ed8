"""Unnormalised densities with known moments as Pyro models: an improper uniform site and a factor, no prior to use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sb.datasets import PosteriorTask

FLOAT = torch.float64


def density_task(name: str, log_density: Callable[[Tensor], Tensor], mean: Tensor, sd: Tensor) -> PosteriorTask:
    """The target ``log_density``, ``(*batch, d)`` to ``(*batch,)``, as a task with exact reference moments."""

    def model(zero: Tensor) -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), zero.shape))
        pyro.factor("target", log_density(z))

    parameters = tuple(f"z[{i + 1}]" for i in range(len(mean)))
    nothing = torch.zeros_like(mean)
    return PosteriorTask(name, model, (nothing,), parameters, mean, sd, nothing, mean.new_zeros(0, len(mean)))


@dataclass(frozen=True, eq=False)
class Modes:
    """A mixture of unit-variance Gaussians: centres ``(K, d)`` and weights ``(K,)``."""

    task: PosteriorTask
    locs: Tensor
    weights: Tensor

    def labels(self, draws: np.ndarray) -> np.ndarray:
        """The nearest centre of every draw. ``(chain, draw, d)`` to ``(chain, draw)``."""
        flat = torch.as_tensor(draws, dtype=self.locs.dtype).flatten(0, 1)
        return torch.cdist(flat, self.locs).argmin(-1).view(draws.shape[:2]).numpy()

    def sample(self, num: int, weights: Tensor) -> Tensor:
        """Draws of the components in the given proportions, exact up to one draw. ``(num, d)``."""
        counts = (weights * num).round().long()
        counts[0] = num - counts[1:].sum()
        centres = self.locs.repeat_interleave(counts, 0)
        return centres + torch.randn_like(centres)


def mixture(name: str, locs: Tensor, weights: Tensor) -> Modes:
    """Unit-variance Gaussians at ``locs`` with ``weights``."""
    mean = weights @ locs
    sd = (1.0 + weights @ (locs - mean).square()).sqrt()

    def log_density(z: Tensor) -> Tensor:
        return torch.logsumexp(weights.log() - 0.5 * (z[..., None, :] - locs).square().sum(-1), -1)

    return Modes(density_task(name, log_density, mean, sd), locs, weights)


def two_modes(dim: int, *, at_origin: bool = False, separation: float = 10.0) -> Modes:
    """Weights .3 and .7 along the diagonal: about the origin, or the first at it and the second off."""
    direction = torch.ones(dim, dtype=FLOAT) / math.sqrt(dim)
    first = 0.0 if at_origin else -0.5 * separation
    locs = torch.stack([first * direction, (first + separation) * direction])
    name = f"two modes, {'one at 0' if at_origin else 'about 0'}, d {dim}"
    return mixture(name, locs, torch.tensor([0.3, 0.7], dtype=FLOAT))


def circle(dim: int, num: int = 8, separation: float = 10.0) -> Modes:
    """Equal weights on a circle in the first two coordinates, neighbours ``separation`` apart."""
    angle = torch.arange(num, dtype=FLOAT) * (2 * math.pi / num)
    locs = torch.zeros(num, dim, dtype=FLOAT)
    radius = 0.5 * separation / math.sin(math.pi / num)
    locs[:, 0], locs[:, 1] = radius * angle.cos(), radius * angle.sin()
    return mixture(f"{num} on a circle, d {dim}", locs, torch.full((num,), 1 / num, dtype=FLOAT))


def banana() -> PosteriorTask:
    """z1 ~ N(0, 2^2), z2 given z1 ~ N(z1^2 / 2 - 2, 1): means 0, sds 2 and 3."""

    def log_density(z: Tensor) -> Tensor:
        return -0.125 * z[..., 0].square() - 0.5 * (z[..., 1] - 0.5 * z[..., 0].square() + 2.0).square()

    zero = torch.zeros(2, dtype=FLOAT)
    return density_task("banana", log_density, zero, torch.tensor([2.0, 3.0], dtype=FLOAT))


def funnel(dim: int = 10, scale: float = 3.0) -> PosteriorTask:
    """Neal's funnel: v ~ N(0, 3^2), the other coordinates N(0, e^v); judged by v and by one of them."""

    def model(zero: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(zero, scale))
        pyro.sample("x", dist.Normal(zero.new_zeros(dim - 1), (0.5 * v)[..., None].exp()).to_event(1))

    zero = torch.zeros((), dtype=FLOAT)
    mean, sd = torch.zeros(2, dtype=FLOAT), torch.tensor([scale, math.exp(0.25 * scale**2)], dtype=FLOAT)
    return PosteriorTask(f"funnel {dim}", model, (zero,), ("v", "x[1]"), mean, sd, mean, mean.new_zeros(0, 2))
