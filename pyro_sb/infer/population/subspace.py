r"""A mixture along the few directions in which a region is not normal, with what lies across it following along.

In units of a normal law, :math:`x = m + L w`, a draw is split into :math:`a = V^\top w` and the rest :math:`b`. Given
a, the rest is taken as :math:`N(c(a), v(a))`. Components at the nodes of a grid in a, with the slope of c there, make a
mixture in all dimensions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.student_mixture import StudentMixture

__all__ = ["Bent", "bent", "mixture_along"]

MOST_DIRECTIONS = 2
LEAST = 0.1  # mean square of the score's residual along a direction, above which the region is not normal there
SPACING, WIDTH, BEYOND = 0.75, 0.6, 8.0  # of nodes, of components, and of nodes past the draws, in sds
MOST_NODES = 64
LEAST_FALL = 0.3  # nats by which the density falls over an sd past the draws, at least
RELEVANT = 10.0  # nats below the highest node at which one is left out
GUARD = 0.1  # share of the weight that all nodes divide between them
UPDATES = 50
PRIOR = 0.05  # weight of the masses at the nodes beside that of the draws
RIDGE = 1e-3


class Bent(NamedTuple):
    """A region along the directions in which it is not normal.

    Attributes:
        law: The normal law, a mixture of one component.
        directions: V, orthonormal, in its units. Shape ``(d, r)``.
        nodes: Grid in a. Shape ``(K, r)``.
        centres: c at the nodes. Shape ``(K, d)``.
        slopes: Derivatives of c there. Shape ``(K, d, r)``.
        widths: The square roots of v there. Shape ``(K,)``.
        log_mass: Log density along the directions at the nodes, up to a constant. Shape ``(K,)``.
        spread: Standard deviations of a component along the directions. Shape ``(r,)``.
    """

    law: StudentMixture
    directions: Tensor
    nodes: Tensor
    centres: Tensor
    slopes: Tensor
    widths: Tensor
    log_mass: Tensor
    spread: Tensor


def bent(law: StudentMixture, points: Tensor, grad: Tensor, most: int = MOST_DIRECTIONS) -> Bent | None:
    r"""Directions along which a region is not normal, and what lies across; None where it is normal in all.

    The directions are the leading eigenvectors of :math:`E[s s^\top]`, :math:`s = L^\top \nabla \log p + w` the
    residual of the score, at most two of them. As :math:`b + \nabla_b \log p` is the middle of the rest where that is
    normal, a cubic in a is fitted to it, which needs few draws in many dimensions; v is the root of the ratio of the
    rest's variance to that of its gradients.

    Args:
        law: The normal law, a mixture of one component.
        points: Draws. Shape ``(M, d)``.
        grad: Gradients of the target's log density there. Shape ``(M, d)``.
        most: Largest number of directions, 1 or 2.
    """
    white, score = law.whiten(points)[:, 0], grad @ law.scale_trils[0]
    directions = _directions(score + white, most)
    if not directions.shape[1]:
        return None
    a = white @ directions
    across = white - a @ directions.T
    pull = score - score @ directions @ directions.T
    centre, sd = a.mean(0), a.std(0)
    low, high = (torch.quantile(a, q, dim=0) for q in (0.005, 0.995))
    features = _features((a - centre) / sd)
    target = across + pull
    ridge = RIDGE * len(a) * torch.eye(features.shape[1], dtype=a.dtype, device=a.device)
    coefficients = torch.linalg.solve(features.T @ features + ridge, features.T @ target)
    rest = (across - features @ coefficients).square().sum(-1)
    ratio = 0.5 * (rest.clamp_min(1e-9) / pull.square().sum(-1).clamp_min(1e-9)).log()
    flat = features[:, : 1 + 2 * directions.shape[1]]
    trend = torch.linalg.solve(flat.T @ flat + ridge[: flat.shape[1], : flat.shape[1]], flat.T @ ratio)
    nodes = _nodes(a, sd)
    inside = ((nodes.clamp(low, high) - centre) / sd)[:, None]  # past the draws the rest stays as it is at their edge
    moved = torch.cat([inside + 1e-3 * step for step in _steps(directions.shape[1], a)], 1)
    middles = _features(moved.flatten(0, 1)).unflatten(0, moved.shape[:2]) @ coefficients  # (K, 1 + r, d)
    free = ((nodes >= low) & (nodes <= high)).to(a.dtype)
    slopes = (middles[:, 1:] - middles[:, :1]).mT / (1e-3 * sd) * free[:, None]
    width = (0.5 * (_features(inside[:, 0])[:, : flat.shape[1]] @ trend)).exp().clamp(0.3, 3.0)
    log_mass = _log_mass(a / sd, score @ directions * sd, nodes / sd, low / sd, high / sd)
    index = log_mass.topk(min(MOST_NODES, len(log_mass))).indices
    near = torch.cdist(nodes[index] / sd, a / sd).amin(1) < SPACING
    index = index[(log_mass[index] > log_mass.max() - RELEVANT) | near]
    rows = nodes[index], middles[index, 0], slopes[index], width[index], log_mass[index]
    return Bent(law, directions, *rows, WIDTH * sd)


def _log_mass(a: Tensor, force: Tensor, nodes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log density along the directions, up to a constant: the mean force is its gradient. Past the draws it is linear.

    A quartic is fitted whose gradient is nearest the forces. All is in units of an sd.

    Args:
        a: Draws along the directions. Shape ``(M, r)``.
        force: The score along them. Shape ``(M, r)``.
        nodes: Where it is wanted. Shape ``(K, r)``.
        low: Where the draws end. Shape ``(r,)``.
        high: The same on the other side. Shape ``(r,)``.
    """
    with torch.enable_grad():
        inside = a.detach().requires_grad_()
        slopes = torch.stack(
            [torch.autograd.grad(column.sum(), inside, retain_graph=True)[0] for column in _quartic(inside).T], -1
        )  # (M, r, p)
        edge = nodes.clamp(low, high).requires_grad_()
        rows = slopes.flatten(0, 1)
        coefficients = torch.linalg.lstsq(rows, force.flatten()[:, None]).solution
        value = (_quartic(edge) @ coefficients)[:, 0]
        slope = torch.autograd.grad(value.sum(), edge)[0]
        past = nodes - edge
        fall = torch.minimum((slope * past).sum(-1), -LEAST_FALL * past.norm(dim=-1))
    return (value + fall).detach()


def _quartic(a: Tensor) -> Tensor:
    """All monomials of degrees 1 to 4. ``(M, r)`` to ``(M, p)``."""
    if a.shape[1] == 1:
        return torch.cat([a**degree for degree in range(1, 5)], 1)
    x, y = a.unbind(1)
    return torch.stack([x**i * y**j for i in range(5) for j in range(5 - i) if i + j], 1)


def mixture_along(shape: Bent, points: Tensor) -> tuple[StudentMixture, StudentMixture]:
    """The mixture whose weights fit given draws along the directions, without and with a share for all nodes.

    Args:
        shape: The region.
        points: Draws of the target. Shape ``(M, d)``.
    """
    a = shape.law.whiten(points)[:, 0] @ shape.directions
    log_kernel = -0.5 * ((a[:, None] - shape.nodes) / shape.spread).square().sum(-1)
    prior = torch.softmax(shape.log_mass, 0)
    share = prior
    for _ in range(UPDATES):
        share = torch.softmax(share.log() + log_kernel, -1).mean(0)
        share = (share + PRIOR * prior) / (1.0 + PRIOR)
    even = (1.0 - GUARD) * share + GUARD / len(share)
    return _lifted(shape, share), _lifted(shape, even)


def _lifted(shape: Bent, share: Tensor) -> StudentMixture:
    """The mixture in all dimensions; nodes that have hardly any weight are left out."""
    keep = share > 1e-6
    scale, directions = shape.law.scale_trils[0], shape.directions
    others = torch.eye(len(scale), dtype=scale.dtype, device=scale.device) - directions @ directions.T
    ahead = (directions + shape.slopes[keep]) * shape.spread
    inflated = (1.0 + 1.0 / len(scale)) * shape.widths[keep].square()
    covariance = ahead @ ahead.mT + inflated[:, None, None] * others
    factors = torch.linalg.cholesky(scale @ covariance @ scale.T)
    locs = shape.law.locs + (shape.nodes[keep] @ directions.T + shape.centres[keep]) @ scale.T
    log_weights = torch.log_softmax(share[keep].log(), 0)
    return StudentMixture(log_weights, locs, factors, torch.full_like(log_weights, math.inf))


def _directions(residual: Tensor, most: int) -> Tensor:
    size = residual.square().sum(-1)
    bounded = residual[size <= torch.quantile(size, 0.98)]  # a single steep point would be a direction of its own
    values, vectors = torch.linalg.eigh(bounded.T @ bounded / len(bounded))
    num = int((values > LEAST).sum().clamp_max(most))
    return vectors[:, len(values) - num :]


def _features(a: Tensor) -> Tensor:
    """1, a and squares; then products and cubes. ``(M, r)`` to ``(M, p)``."""
    parts = [torch.ones_like(a[:, :1]), a, a.square() - 1.0, a**3 - 3.0 * a]
    if a.shape[1] == 2:
        parts.append(a[:, :1] * a[:, 1:])
    return torch.cat(parts, 1)


def _steps(num: int, like: Tensor) -> list[Tensor]:
    return [
        torch.zeros(num, dtype=like.dtype, device=like.device),
        *torch.eye(num, dtype=like.dtype, device=like.device),
    ]


def _nodes(a: Tensor, sd: Tensor) -> Tensor:
    """A grid that covers the draws and a good deal more."""
    axes = []
    for column, unit in zip(a.T, sd, strict=True):
        low, high = float(column.min() - BEYOND * unit), float(column.max() + BEYOND * unit)
        axes.append(torch.arange(low, high, float(SPACING * unit), dtype=a.dtype, device=a.device))
    grid = torch.cartesian_prod(*axes).view(-1, len(axes))
    return grid
