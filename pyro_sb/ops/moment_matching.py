"""Closed-form steps towards the Gaussian-mixture bridge between two weighted samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.mixture import MixturePotential


class Side(NamedTuple):
    """Weighted points at one end of time.

    Args:
        points: Shape ``(n, d)``.
        weights: Non-negative, sum to one. Shape ``(n,)``.
    """

    points: Tensor
    weights: Tensor


def equal_weights(points: Tensor) -> Side:
    """Points that all weigh the same."""
    return Side(points, points.new_full((len(points),), 1 / len(points)))


def matching_scale(cov0: Tensor, cov1: Tensor, epsilon: float, *, diagonal: bool = False) -> Tensor:
    r"""The S with which a Gaussian potential carries covariance :math:`C_0` to :math:`C_1`.

    It is the root of :math:`S C_0 S + \epsilon S = C_1`. With :math:`N = C_1^{1/2} C_0 C_1^{1/2}`

    .. math:: S = 2\, C_1^{1/2} \big(\epsilon I + (\epsilon^2 I + 4 N)^{1/2}\big)^{-1} C_1^{1/2} ,

    which inverts neither covariance: both may be singular.

    Args:
        cov0: Source covariances: matrices ``(*, d, d)``, or their diagonals ``(*, d)``.
        cov1: Target covariances, of the same form.
        epsilon: Reference variance over [0, 1], positive.
        diagonal: Whether diagonals are given.

    Returns:
        S, of the same form.

    Example:
        >>> matching_scale(torch.zeros(1), torch.full((1,), 3.0), 1.5, diagonal=True)
        tensor([2.])
    """
    if diagonal:
        return 2 * cov1 / (epsilon + (epsilon**2 + 4 * cov0 * cov1).sqrt())
    root = _spectral(cov1, lambda values: values.clamp_min(0.0).sqrt())
    inner = _spectral(root @ cov0 @ root, lambda n: 2 / (epsilon + (epsilon**2 + 4 * n.clamp_min(0.0)).sqrt()))
    return root @ inner @ root


def moment_step(
    potential: MixturePotential, source: Side, target: Side, *, floor: float, min_count: float = 5.0
) -> MixturePotential:
    r"""One EM-like step: every component's moments on the two sides are made to agree.

    With the gates :math:`w_j(y_0)` on the source side and the responsibilities :math:`\gamma_j(y_1)` under v on the
    target's, a stationary point of the likelihood has equal masses :math:`\bar w_j = \bar \gamma_j`,
    :math:`\mu_1 = r + S \mu_0` and :math:`C_1 = \epsilon S + S C_0 S` per component. Each is solved as it stands; the
    masses by one pass of iterative scaling, :math:`\log a_j \mathrel{+}= \log \bar\gamma_j - \log \bar w_j`. A point
    at 0 as source makes it the EM step of a Gaussian mixture; a single component, the exact Gaussian bridge.

    Args:
        potential: Where to start; without a batch.
        source: Points at time 0, in the bridge's space.
        target: Points at time 1, in the bridge's space.
        floor: Smallest eigenvalue that S may have, positive.
        min_count: A component with less than the mass of this many points on a side keeps its r and S; for full
            matrices so many for every axis.

    Example:
        >>> potential = MixturePotential(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1), 1.0)
        >>> ends = equal_weights(torch.zeros(1, 1)), equal_weights(torch.tensor([[-1.0], [3.0]]))
        >>> moment_step(potential, *ends, floor=1e-6, min_count=1).scales
        tensor([[4.]])
    """
    gates0 = source.weights[:, None] * potential.normaliser().gates(source.points)
    gates1 = target.weights[:, None] * potential.adjusted().gates(target.points)
    mass0, mean0, cov0 = _component_moments(gates0, source.points, potential.diagonal)
    mass1, mean1, cov1 = _component_moments(gates1, target.points, potential.diagonal)
    scales = _clamped(
        matching_scale(cov0, cov1, potential.epsilon, diagonal=potential.diagonal), floor, potential.diagonal
    )
    locs = mean1 - (scales * mean0 if potential.diagonal else (scales @ mean0[..., None])[..., 0])
    min_count = min_count if potential.diagonal else min_count * potential.locs.shape[-1]
    alive = mass1 * _effective(target) >= min_count
    if len(source.points) > 1:  # a point has all the mass in every component
        alive = alive & (mass0 * _effective(source) >= min_count)
    ratio = (mass1.log() - mass0.log()).clamp(-2.0, 2.0)
    return MixturePotential(
        potential.log_weights + ratio,
        torch.where(alive[:, None], locs, potential.locs),
        torch.where(alive.view(-1, *[1] * (scales.dim() - 1)), scales, potential.scales),
        potential.epsilon,
    )


def _component_moments(gates: Tensor, points: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, mean and covariance of each component under weighted gates ``(n, J)``, summed in float64."""
    dtype, gates, points = points.dtype, gates.double(), points.double()
    centre = points.mean(0)
    points = points - centre
    mass = gates.sum(0).clamp_min(torch.finfo(points.dtype).tiny)
    share = gates / mass
    mean = share.T @ points
    if diagonal:
        covariance = (share.T @ points.square() - mean.square()).clamp_min(0.0)
    else:
        squares = (points[:, :, None] * points[:, None, :]).flatten(1)
        covariance = (share.T @ squares).unflatten(1, mean.shape[-1:] * 2) - mean[:, :, None] * mean[:, None, :]
    return mass.to(dtype), (mean + centre).to(dtype), covariance.to(dtype)


def _effective(side: Side) -> Tensor:
    return 1 / side.weights.square().sum()


def _clamped(scales: Tensor, floor: float, diagonal: bool) -> Tensor:
    """Eigenvalues raised to the floor."""
    return scales.clamp_min(floor) if diagonal else _spectral(scales, lambda values: values.clamp_min(floor))


def _spectral(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of symmetric matrices ``(*, d, d)`` through their eigenvalues."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * function(values)[..., None, :]) @ vectors.mT
