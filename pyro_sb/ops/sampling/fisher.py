r"""Covariance from draws and gradients, :math:`\Sigma G \Sigma = X`: exact for a Gaussian, whatever the draws' law."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DiagonalFit", "FisherFit", "fisher_diagonal", "fisher_fit"]

RIDGE = 1e-5  # of both covariances, in balanced units, where the sample does not span the space
RANK = 1e-7  # smallest pivot over the largest in a sample that spans it


class FisherFit(NamedTuple):
    r"""A Gaussian, or K of them.

    Attributes:
        mean: Shape ``(d,)`` or ``(K, d)``.
        scale_tril: Cholesky factor L of the covariance :math:`L L^\top`. Shape ``(d, d)`` or ``(K, d, d)``.
    """

    mean: Tensor
    scale_tril: Tensor

    @property
    def covariance(self) -> Tensor:
        r""":math:`L L^\top`. Shape of L."""
        return self.scale_tril @ self.scale_tril.mT


class DiagonalFit(NamedTuple):
    """A Gaussian of independent coordinates, or K of them: mean and variance, shape ``(d,)`` or ``(K, d)`` each."""

    mean: Tensor
    variance: Tensor


class _Centred(NamedTuple):
    """Means ``(d,)``, and deviations ``(n, d)`` times the square roots of weights that sum to one."""

    mean: Tensor
    mean_gradient: Tensor
    points: Tensor
    gradients: Tensor

    @property
    def variance(self) -> Tensor:
        """The diagonal fit, ``(d,)``; a coordinate that stands still, or is flat, has the best that is left."""
        x, g = self.points.square().sum(0), self.gradients.square().sum(0)
        both = (x > 0) & (g > 0)
        one = torch.where(x > 0, x, torch.where(g > 0, 1.0 / g, torch.ones_like(g)))
        return torch.where(both, x.sqrt() / torch.where(both, g, 1.0).sqrt(), one)


def fisher_fit(points: Tensor, gradients: Tensor, weights: Tensor | None = None) -> FisherFit:
    r"""The affine map that brings a law nearest the standard normal in Fisher divergence, from draws and gradients.

    With the covariances X of draws and G of gradients :math:`\nabla \log \pi` at them, it is the geometric mean of X
    and :math:`G^{-1}`,

    .. math:: \Sigma = X \# G^{-1} = G^{-1/2} (G^{1/2} X G^{1/2})^{1/2} G^{-1/2}, \qquad m = \bar x + \Sigma \bar g,

    the solution of :math:`\Sigma G \Sigma = X`. On a Gaussian :math:`G = \Sigma^{-1} X \Sigma^{-1}`, so it is exact as
    soon as n > d, whatever law the draws have: chains need not have converged. For other laws ask for n of 2 d or
    more, 20 d for the last digit of acceptance.

    A sample that does not span the space (n <= d, or repeated draws) gets a ridge of 1e-5 in units that balance X and
    G. The result is then positive definite but poor: use :func:`fisher_diagonal` instead.

    Args:
        points: Draws x. Shape ``(n, d)``, n at least 1.
        gradients: Gradients of the log density at them. Shape ``(n, d)``.
        weights: Non-negative weights, ``(n,)``; or ``(n, K)`` for K fits side by side: responsibilities of K modes.
            Rows of weight 0, and those that are not finite, do not count.

    Returns:
        Mean and Cholesky factor in float64, with K in front where weights have it. Equivariant under
        :math:`x \mapsto c x`, coordinate by coordinate.

    References:
        Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence (Seyboldt, Carlson and Carpenter, 2026),
        https://arxiv.org/abs/2603.18845, its dense form; here from QR factors of the samples, so that no covariance is
        squared, and without a ridge where the sample spans the space.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
        >>> precision = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> fisher_fit(x, -(x - 5.0) @ precision).covariance
        tensor([[ 0.6000, -0.2000],
                [-0.2000,  0.4000]], dtype=torch.float64)
    """
    if weights is not None and weights.ndim == 2:
        return FisherFit(*_stacked([fisher_fit(points, gradients, column) for column in weights.T]))
    sample = _centred(points, gradients, weights)
    units = sample.variance.sqrt()
    x_root, g_root = _roots(sample.points / units, sample.gradients * units)
    # X = A A', G = C C' with C = g_root': C' A = U s V' gives S = C^-T U s U' C^-1, which solves S G S = X
    rotation, values, _ = torch.linalg.svd(g_root @ x_root.mT)
    values = values.clamp_min(torch.finfo(values.dtype).eps * values[0])
    factor = torch.linalg.solve_triangular(g_root, rotation * values.sqrt(), upper=True)
    scale_tril = units[:, None] * _lower(factor)
    mean = sample.mean + scale_tril @ (scale_tril.mT @ sample.mean_gradient)
    return FisherFit(mean, scale_tril)


def fisher_diagonal(points: Tensor, gradients: Tensor, weights: Tensor | None = None) -> DiagonalFit:
    r"""The diagonal form of :func:`fisher_fit`, :math:`v = \sqrt{\operatorname{var} x / \operatorname{var} g}`.

    .. math:: m = \bar x + v\, \bar g

    Exact for independent Gaussian coordinates from two draws on. It is what to use where n <= d.

    Args:
        points: Draws. Shape ``(n, d)``.
        gradients: Gradients of the log density at them. Shape ``(n, d)``.
        weights: As in :func:`fisher_fit`.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
        >>> fisher_diagonal(x, -(x - 5.0) / torch.tensor([9.0, 4.0])).variance
        tensor([9.0000, 4.0000], dtype=torch.float64)
    """
    if weights is not None and weights.ndim == 2:
        return DiagonalFit(*_stacked([fisher_diagonal(points, gradients, column) for column in weights.T]))
    sample = _centred(points, gradients, weights)
    return DiagonalFit(sample.mean + sample.variance * sample.mean_gradient, sample.variance)


def _centred(points: Tensor, gradients: Tensor, weights: Tensor | None) -> _Centred:
    if points.shape != gradients.shape or points.ndim != 2:
        raise ValueError(
            f"points and gradients must have one shape (n, d), got {tuple(points.shape)} and {tuple(gradients.shape)}."
        )
    if weights is None:
        weights = points.new_ones(len(points))
    kept = torch.isfinite(points).all(-1) & torch.isfinite(gradients).all(-1) & (weights > 0)
    if not bool(kept.any()):
        raise ValueError(
            f"A fit needs a finite draw of positive weight, got none of {len(points)}. Leave out modes without draws."
        )
    x, g, share = points[kept].double(), gradients[kept].double(), weights[kept].double()
    share = share / share.sum()
    mean, mean_gradient, root = share @ x, share @ g, share.sqrt()[:, None]
    return _Centred(mean, mean_gradient, root * (x - mean), root * (g - mean_gradient))


def _roots(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    r"""Upper factors R of :math:`X = R^\top R` and G; ridged, both, where either sample does not span the space."""
    roots = [torch.linalg.qr(rows, mode="r").R for rows in (x, g)]
    if all(_spans(root) for root in roots):
        return roots[0], roots[1]
    ridge = RIDGE**0.5 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    ridged = [torch.linalg.qr(torch.cat([root, ridge]), mode="r").R for root in roots]
    return ridged[0], ridged[1]


def _spans(root: Tensor) -> bool:
    pivots = root.diagonal().abs()
    return len(pivots) == root.shape[-1] and bool(pivots.min() > RANK * pivots.max())


def _lower(factor: Tensor) -> Tensor:
    r"""Cholesky factor of :math:`F F^\top`."""
    upper = torch.linalg.qr(factor.mT, mode="r").R
    return (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)[:, None]).mT


def _stacked(fits: list) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*fits, strict=True)]
