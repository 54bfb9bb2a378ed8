r"""Sinkhorn scaling of Gaussian affinities: symmetric with one potential, rectangular with two."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_LIMIT = 8192  # points; above it the affinity matrix (512 MiB in float64) is made strip by strip
STRIP_ELEMENTS = 2**22


class SymmetricScaling(NamedTuple):
    r"""Result of `symmetric_sinkhorn`.

    Attributes:
        log_v: Logarithm of the scaling; ``-inf`` where the weight is zero. Shape ``(M,)``.
        residual: :math:`\sum_i |v_i (T v)_i - w_i|`.
        iterations: Updates made.
        converged: Whether the residual reached the tolerance.
        residuals: The residual before each update, and the last.
    """

    log_v: Tensor
    residual: float
    iterations: int
    converged: bool
    residuals: list[float]


class Scaling(NamedTuple):
    r"""Result of `sinkhorn`: the plan is :math:`\exp(\log u_i + \log T_{ij} + \log v_j)`.

    Attributes:
        log_u: Logarithm of the rows' scaling. Shape ``(N,)``.
        log_v: Logarithm of the columns' scaling. Shape ``(M,)``.
        residual: :math:`\sum_i |\sum_j \Pi_{ij} - a_i|`; the columns hold exactly.
        iterations: Pairs of updates made.
        converged: Whether the residual reached the tolerance.
    """

    log_u: Tensor
    log_v: Tensor
    residual: float
    iterations: int
    converged: bool


def log_affinity(x: Tensor, y: Tensor, scale_x: Tensor | None = None, scale_y: Tensor | None = None) -> Tensor:
    r"""Log of a Gaussian affinity whose squared width is the mean of its two ends'.

    .. math:: \log T_{ij} = -\frac{|x_i - y_j|^2}{\rho(x_i) + \rho(y_j)}, \qquad \rho = 1 \text{ if no scale is given.}

    Args:
        x: Points in units of the bandwidth. Shape ``(N, d)``.
        y: Points in the same units. Shape ``(M, d)``.
        scale_x: :math:`\rho(x_i) > 0`. Shape ``(N,)``.
        scale_y: :math:`\rho(y_j) > 0`; given if and only if ``scale_x`` is. Shape ``(M,)``.

    Returns:
        The logarithms, at most 0. Shape ``(N, M)``.

    Example:
        >>> log_affinity(torch.zeros(1, 1), torch.tensor([[1.0], [2.0]]))
        tensor([[-0.5000, -2.0000]])
    """
    if scale_x is None or scale_y is None:
        log_t = torch.addmm(-0.5 * y.square().sum(-1), x, y.mT)
        return log_t.sub_(0.5 * x.square().sum(-1, keepdim=True)).clamp_(max=0)
    squared = torch.addmm(y.square().sum(-1), x, y.mT, alpha=-2).add_(x.square().sum(-1, keepdim=True)).clamp_(min=0)
    return -squared.div_(scale_x[:, None] + scale_y)


def _strips(points: Tensor, scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the log affinity matrix, as many at a time as `STRIP_ELEMENTS` allow."""
    num = len(points)
    size = max(1, STRIP_ELEMENTS // num)
    for start in range(0, num, size):
        rows = slice(start, start + size)
        yield rows, log_affinity(points[rows], points, None if scale is None else scale[rows], scale)


def _streaming_apply(points: Tensor, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The map ``log_v -> log(T v)``, a strip of T at a time and in the log domain."""

    def apply(log_v: Tensor) -> Tensor:
        return torch.cat([torch.logsumexp(log_t.add_(log_v), dim=1) for _, log_t in _strips(points, scale)])

    return apply


def _dense_apply(points: Tensor, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The same map by one stored T. The diagonal of T is 1, so no row underflows while v is representable."""
    affinity = torch.empty(len(points), len(points), dtype=points.dtype, device=points.device)
    for rows, log_t in _strips(points, scale):
        torch.exp(log_t, out=affinity[rows])

    def apply(log_v: Tensor) -> Tensor:
        return (affinity @ log_v.exp()).log()

    return apply


def default_tolerance(dtype: torch.dtype) -> float:
    """The residual that a Sinkhorn scaling in this dtype is asked for: 1e-9 in float64, 1e-5 in float32."""
    return 1e-9 if dtype == torch.float64 else 1e-5


def symmetric_sinkhorn(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    tolerance: float | None = None,
    max_iter: int = 2000,
    dense: bool | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> SymmetricScaling:
    r"""Positive scaling :math:`v` with :math:`v_i (T v)_i = w_i`, by averaged updates that keep the symmetry.

    .. math:: T_{ij} = \exp\Big(-\frac{|x_i - x_j|^2}{\rho_i + \rho_j}\Big), \qquad
        \log v \leftarrow \tfrac12 \big(\log v + \log w - \log (T v)\big).

    :math:`\Pi = D(v) T D(v)` is then the entropic coupling of the weighted points with themselves, and
    :math:`P = D(w)^{-1} \Pi` a Markov matrix that is reversible with respect to :math:`w`. The fixed point of the
    plain update ``v <- w / T v`` oscillates; its geometric mean with the old value does not. T is stored where it is
    small, and made in strips otherwise (no M x M memory).

    Args:
        points: Points divided by the square root of the bandwidth epsilon. Shape ``(M, d)``.
        weights: Marginal, non-negative; normalised here. Omitted: equal. Shape ``(M,)``.
        scale: :math:`\rho_i > 0` of a variable bandwidth. Omitted: 1. Shape ``(M,)``.
        tolerance: The residual asked for. Omitted: 1e-9 in float64, 1e-5 in float32.
        max_iter: Largest number of updates.
        dense: Whether to store T. Omitted: up to `DENSE_LIMIT` points whose weights' range fits the exponent of the
            dtype.
        callback: Called with the iteration and the residual, for a progress bar.

    Returns:
        The scaling with its residual. A scaling that has not converged says so in ``converged``; the caller warns.

    References:
        Stable generative modeling using Schrödinger bridges (Gottwald, Li, Marzouk and Reich, 2024), section 2,
        https://arxiv.org/abs/2401.04372

    Example:
        >>> points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> log_v, *_ = symmetric_sinkhorn(points, torch.tensor([0.25, 0.75], dtype=torch.float64))
        >>> coupling = (log_v[:, None] + log_affinity(points, points) + log_v).exp()
        >>> coupling.sum(1)
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    num = len(points)
    log_w = points.new_full((num,), -math.log(num)) if weights is None else (weights / weights.sum()).log()
    tolerance = default_tolerance(points.dtype) if tolerance is None else tolerance
    kept = log_w > -math.inf
    if not bool(kept.all()):
        inner = symmetric_sinkhorn(
            points[kept],
            log_w[kept].exp(),
            scale=None if scale is None else scale[kept],
            tolerance=tolerance,
            max_iter=max_iter,
            dense=dense,
            callback=callback,
        )
        return inner._replace(log_v=torch.full_like(log_w, -math.inf).masked_scatter(kept, inner.log_v))

    points = points - points.mean(0)
    if dense is None:
        fits = float(log_w.min()) > 0.5 * math.log(torch.finfo(points.dtype).tiny)
        dense = num <= DENSE_LIMIT and fits
    apply = (_dense_apply if dense else _streaming_apply)(points, scale)

    log_v, residuals = 0.5 * log_w, []
    for iteration in range(max_iter + 1):
        log_tv = apply(log_v)
        residuals.append(float(((log_v + log_tv).exp() - log_w.exp()).abs().sum()))
        if callback is not None:
            callback(iteration, residuals[-1])
        if not residuals[-1] > tolerance or iteration == max_iter:
            break
        log_v = 0.5 * (log_v + log_w - log_tv)
    return SymmetricScaling(log_v, residuals[-1], iteration, residuals[-1] <= tolerance, residuals)


def sinkhorn(
    source: Tensor,
    target: Tensor,
    source_weights: Tensor | None = None,
    target_weights: Tensor | None = None,
    *,
    tolerance: float | None = None,
    max_iter: int = 10_000,
) -> Scaling:
    r"""Entropic coupling of two weighted point sets, by alternating updates in the log domain.

    .. math:: \Pi_{ij} = u_i\, e^{-|x_i - y_j|^2 / 2}\, v_j, \qquad \sum_j \Pi_{ij} = a_i, \quad \sum_i \Pi_{ij} = b_j .

    Args:
        source: Points divided by the square root of epsilon. Shape ``(N, d)``.
        target: Points in the same units. Shape ``(M, d)``.
        source_weights: Positive marginal :math:`a`; normalised here. Omitted: equal. Shape ``(N,)``.
        target_weights: Positive marginal :math:`b`; normalised here. Omitted: equal. Shape ``(M,)``.
        tolerance: The residual asked for. Omitted: 1e-9 in float64, 1e-5 in float32.
        max_iter: Largest number of pairs of updates.

    Returns:
        Both potentials with the residual. Memory is that of the N x M matrix.

    References:
        Sinkhorn Distances (Cuturi, 2013), https://arxiv.org/abs/1306.0895

    Example:
        >>> x, y = torch.zeros(1, 1), torch.tensor([[0.0], [2.0]])
        >>> log_u, log_v, *_ = sinkhorn(x, y)
        >>> (log_u[:, None] + log_affinity(x, y) + log_v).exp()
        tensor([[0.5000, 0.5000]])
    """
    tolerance = default_tolerance(source.dtype) if tolerance is None else tolerance
    centre = target.mean(0)
    log_t = log_affinity(source - centre, target - centre)
    log_a = _log_marginal(source, source_weights)
    log_b = _log_marginal(target, target_weights)
    log_u, log_v, residual = torch.zeros_like(log_a), torch.zeros_like(log_b), math.inf
    iteration = 0
    while iteration < max_iter and not residual <= tolerance:
        iteration += 1
        log_u = log_a - torch.logsumexp(log_t + log_v, dim=1)
        log_v = log_b - torch.logsumexp(log_t + log_u[:, None], dim=0)
        log_rows = log_u + torch.logsumexp(log_t + log_v, dim=1)
        residual = float((log_rows.exp() - log_a.exp()).abs().sum())
    return Scaling(log_u, log_v, residual, iteration, residual <= tolerance)


def _log_marginal(points: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return points.new_full((len(points),), -math.log(len(points)))
    return (weights / weights.sum()).log()
