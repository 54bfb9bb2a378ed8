"""Units of a bridge, x = location + scale z with one scale for all axes, and what it asks of its data."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution


class Units(NamedTuple):
    """The affine map to the bridge's units: ``(x - location) / scale``, one number for all axes.

    Args:
        location: Shape ``(dim,)``.
        scale: Positive. Shape ``()``.
    """

    location: Tensor
    scale: Tensor

    def to(self, x: Tensor) -> Tensor:
        """To the bridge's units."""
        return (x - self.location) / self.scale

    def back(self, z: Tensor) -> Tensor:
        """To the user's."""
        return self.location + self.scale * z


def check_law(name: str, law: Distribution, dim: int) -> None:
    """Refuse a distribution whose shapes are not a bridge's."""
    if tuple(law.event_shape) != (dim,) or len(law.batch_shape):
        shapes = f"{tuple(law.batch_shape)} and {tuple(law.event_shape)}"
        raise ValueError(f"{name} must have batch and event shapes () and ({dim},), got {shapes}. Write .to_event(1).")


def read_units(draws: Tensor, weights: Tensor | None) -> tuple[Units, Tensor]:
    """Mean and root mean variance of the axes, and each axis's standard deviation in those units.

    Refused where one is constant, or 1e6 times narrower than another.
    """
    weights = torch.full_like(draws[:, 0], 1 / len(draws)) if weights is None else weights
    location = weights @ draws
    variance = weights @ (draws - location).square()
    flat = draws.amin(0) == draws.amax(0)
    if bool(flat.any()):
        raise ValueError(
            f"target must vary along every axis, got constant axes {flat.nonzero().flatten().tolist()}. "
            "Drop them: they need no bridge."
        )
    if float(variance.min()) < 1e-12 * float(variance.max()):
        narrow = int(variance.argmin())
        raise ValueError(
            f"target's covariance must be well conditioned, got standard deviations from "
            f"{float(variance.min().sqrt()):.2g} (axis {narrow}) to {float(variance.max().sqrt()):.2g}. "
            "Rescale the axes: a bridge has one epsilon for all."
        )
    return Units(location, variance.mean().sqrt()), (variance / variance.mean()).sqrt()


def check_conditioning(draws: Tensor, weights: Tensor | None) -> None:
    """Refuse draws whose covariance is singular, where components have full covariances."""
    if draws.shape[1] == 1:
        return
    if len(draws) <= draws.shape[1]:
        raise ValueError(
            f"full components need more draws than axes, got {len(draws)} draws of {draws.shape[1]} axes. "
            'Write covariance="diagonal".'
        )
    weights = torch.full_like(draws[:, 0], 1 / len(draws)) if weights is None else weights
    centred = (draws - weights @ draws).double()
    covariance = (weights.double()[:, None] * centred).T @ centred
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < 1e-10 * float(values[-1]):
        axes = vectors[:, 0].abs().topk(min(3, draws.shape[1])).indices.tolist()
        raise ValueError(
            f"target's covariance must be well conditioned for full components, got eigenvalues from "
            f"{float(values[0]):.2g} to {float(values[-1]):.2g}: axes {axes} are nearly linear in each other. "
            'Drop one, or write covariance="diagonal".'
        )
