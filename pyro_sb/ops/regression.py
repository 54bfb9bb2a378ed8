"""Affine regression with a ridge chosen by generalised cross-validation."""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = 25  # candidates on a log grid


class Affine(NamedTuple):
    """Affine regression of the target on features of the context.

    Args:
        location: Shape ``(dim,)``.
        slope: Shape ``(dim, num_features)``; no columns without context.
    """

    location: Tensor
    slope: Tensor

    def __call__(self, features: Tensor | None) -> Tensor:
        """Mean of the target: ``(*, dim)``."""
        return self.location if features is None else self.location + features @ self.slope.T


def regress(points: Tensor, features: Tensor | None, weights: Tensor) -> Affine:
    """Ridge regression on rows of features, the ridge chosen by generalised cross-validation.

    Args:
        points: Shape ``(N, dim)``.
        features: Shape ``(N, num_features)``; None for the mean alone.
        weights: Normalised. Shape ``(N,)``.

    Example:
        >>> x = torch.randn(500, 1)
        >>> round(regress(2 * x + 1, x, torch.full((500,), 1 / 500)).slope.item(), 3)
        2.0
    """
    y, w = points.double(), weights.double()
    centre = w @ y
    if features is None:
        return Affine(centre.to(points), points.new_empty(points.shape[1], 0))
    x = features.double()
    x_centre = w @ x
    x_scale = (w @ (x - x_centre).square()).sqrt()
    x_scale = torch.where(x_scale > 0, x_scale, 1.0)
    x, y = (x - x_centre) / x_scale, y - centre
    gram, basis = torch.linalg.eigh((w[:, None] * x).T @ x)
    gram = gram.clamp_min(0)
    moments = basis.T @ (w[:, None] * x).T @ y
    ridges = gram.max() * torch.logspace(-10, 2, RIDGES, dtype=gram.dtype, device=gram.device)
    shrink = 1 / (gram + ridges[:, None])  # (R, F)
    fitted = moments.square().sum(1)
    left = w @ y.square().sum(1) - ((2 * shrink - gram * shrink.square()) * fitted).sum(1)
    freedom = 1 - (1 + (gram * shrink).sum(1)) * w.square().sum()
    scores = torch.where(freedom > 0, left.clamp_min(0) / freedom.square(), torch.inf)
    slope = (basis @ (shrink[scores.argmin()][:, None] * moments)).T / x_scale
    return Affine((centre - slope @ x_centre).to(points), slope.to(points))
