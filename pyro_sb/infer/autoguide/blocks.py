r"""Independent blocks of a log joint, :math:`\log p(z) = \sum_b f_b(z_b)`: found, and each as a target of its own."""

from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.model.agreement import NATS
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.search import climb, empty_optima, find_optima
from pyro_sb.infer.population.sources import affordable, temper_and_climb

__all__ = ["adds_up", "block_joint", "differentiable", "independent_blocks", "visited"]

NUM_POINTS = 6
STEPS = (0.3, 1.0, 3.0)  # of a coordinate, in units of the spread of the points
NUM_CLIMBERS = 64
TOLERANCE = 1e-6  # of a slope, by which rounding may move it


class _Density(torch.autograd.Function):
    """A log joint with its gradient, as one node of a graph."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, joint: LogJoint) -> Tensor:
        value, grad = joint.value_and_grad(z)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return upstream[:, None] * grad, None


def differentiable(joint: LogJoint, z: Tensor) -> Tensor:
    """The log joint at ``(C, dim)`` with a graph to z, once differentiable. Shape ``(C,)``."""
    return _Density.apply(z, joint) if z.requires_grad else joint.log_prob(z)


def independent_blocks(joint: LogJoint, points: Tensor) -> list[Tensor]:
    r"""Places of the coordinates of each independent block: the finest partition with :math:`\log p = \sum_b f_b(z_b)`.

    Coordinates i and j are in one block if the slope along j moves when i does, at any of some points and steps. Weak
    dependence between rounding and a step's effect is not seen: whoever uses the blocks weighs draws by the whole
    log joint.

    Args:
        joint: The log joint.
        points: Where it is finite, and apart from each other in every coordinate. Shape ``(M, dim)``, M at least 2.

    Returns:
        Increasing places ``(k,)`` for each block, in the order of their first places.

    Example:
        >>> joint = LogJoint.from_batched(lambda z: -(z[:, 0] * z[:, 2]).square() - z[:, 1] ** 4, dim=3)
        >>> [places.tolist() for places in independent_blocks(joint, torch.randn(4, 3, dtype=torch.float64))]
        [[0, 2], [1]]
    """
    points = points[:NUM_POINTS].to(torch.float64)
    dim, spread = points.shape[1], points.std(0).clamp_min(1e-3)
    depends = torch.eye(dim, dtype=torch.bool, device=points.device)
    base = joint.value_and_grad(points)[1]
    for i, step in enumerate(STEPS * 2):
        sign = 1.0 if i < len(STEPS) else -1.0
        moved = points[:, None] + torch.diag(sign * step * spread)
        value, slopes = joint.value_and_grad(moved.flatten(0, 1))
        slopes, finite = slopes.reshape(moved.shape), torch.isfinite(value).reshape(moved.shape[:2])
        change = (slopes - base[:, None]).abs() > TOLERANCE * (base[:, None].abs() + slopes.abs() + 1e-3)
        depends |= (change & finite[..., None]).any(0)
        outside = ~finite.all(0)  # a support that ends there may depend on the others
        depends |= outside[:, None] & outside
    return _components(depends | depends.T)


def _components(adjacent: Tensor) -> list[Tensor]:
    reach = adjacent
    while True:
        further = (reach.double() @ reach.double()) > 0
        if torch.equal(further, reach):
            break
        reach = further
    labels = reach.to(torch.uint8).argmax(1)
    return [(labels == label).nonzero().flatten() for label in labels.unique()]


def visited(joint: LogJoint, num_particles: int) -> Tensor:
    """Particles tempered to the target, at all temperatures, and maxima that a few of them lead to. ``(M, dim)``."""
    particles = temper_and_climb(joint, None, affordable(joint, True, num_particles)).particles
    if particles is None:
        return find_optima(joint).points
    points, last = particles.visited()[0], particles.points[:, 0]
    return torch.cat([points, climb(joint, empty_optima(joint), last[torch.randperm(len(last))[:NUM_CLIMBERS]]).points])


def adds_up(joint: LogJoint, blocks: list[Tensor], at: Tensor, points: Tensor) -> bool:
    r"""Whether :math:`\log p(z) - \log p(a) = \sum_b [\log p(z_b, a) - \log p(a)]` at all points ``(M, dim)``.

    A narrow region in which blocks depend on each other shows only where it was visited.
    """
    whole = joint.log_prob(points) - joint.log_prob(at[None])
    parts = torch.stack([block_joint(joint, places, at).log_prob(points[:, places]) for places in blocks])
    size = 1.0 + whole.abs() + parts.abs().sum(0) + joint.log_prob(at[None]).abs()
    finite = torch.isfinite(whole)
    eps = torch.finfo(joint.dtype).eps
    off = (whole - parts.sum(0)).abs() > NATS + 64 * len(blocks) * eps * size
    return not bool((off & finite).any())


def block_joint(joint: LogJoint, places: Tensor, at: Tensor) -> LogJoint:
    """The log joint of one block's coordinates, the others held at ``at``, less its value there."""
    level = joint.log_prob(at[None])[0]

    def density(rows: Tensor) -> Tensor:
        z = at.to(rows).repeat(len(rows), 1)
        z = z.index_copy(1, places, rows)
        return differentiable(joint, z) - level.to(rows)

    return LogJoint.from_batched(density, len(places), torch.float64, joint.device)
