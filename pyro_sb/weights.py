"""Algebra of log weights: effective sample size, evidence and its error, resampling."""

import math
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_sb.checks import floats, shown, whole

__all__ = [
    "ParetoTail",
    "effective_sample_size",
    "log_evidence",
    "normalise",
    "pareto_k",
    "pareto_tail",
    "smoothed",
    "systematic_resample",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def read_log_weights(log_weights: Any) -> Tensor:
    """Log weights ``(N,)``: numbers, or minus infinity for a weight of zero."""
    read = floats("log_weights", log_weights)
    if read.dim() != 1 or not len(read):
        raise ValueError(
            f"log_weights must have shape (N,), one a draw, got {tuple(read.shape)}. Write log_weights[:, i] for those "
            "of one observation."
        )
    if bool((torch.isnan(read) | (read == math.inf)).any()):
        raise ValueError(
            "log_weights must be numbers or -inf, got NaN or +inf. Write -math.inf where the target's density is zero."
        )
    return read


def normalise(log_weights: Tensor) -> Tensor:
    """Weights that sum to one. Shape ``(N,)``; entries of ``-inf`` become zero."""
    read = read_log_weights(log_weights)
    if bool(torch.isneginf(read).all()):
        raise ValueError("log_weights must not all be -inf: every draw has weight zero. Draw from a wider proposal.")
    return torch.softmax(read, -1)


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Kish's effective sample size :math:`(\sum w)^2 / \sum w^2`, between 1 and N; 0 if every weight is zero.

    Example:
        >>> effective_sample_size(torch.zeros(4))
        4.0
    """
    log_weights = read_log_weights(log_weights)
    if bool(torch.isneginf(log_weights).all()):
        return 0.0
    return float(1.0 / normalise(log_weights).square().sum())


def log_evidence(log_weights: Tensor) -> tuple[float, float]:
    r"""Log of the mean weight and its standard error by the delta method.

    .. math:: \log \hat Z = \log \tfrac1N \sum_i w_i, \qquad \mathrm{se} = \sqrt{\tfrac1N \left(\tfrac{N}{\mathrm{ESS}}
    - 1\right)}

    The estimate of Z itself is unbiased when the draws are independent of the proposal's fit.

    Args:
        log_weights: Log of target over proposal at draws of the proposal. Shape ``(N,)``.

    Returns:
        Log evidence and its standard error, in nats.

    Example:
        >>> log_evidence(torch.zeros(4, dtype=torch.float64))
        (0.0, 0.0)
    """
    log_weights = read_log_weights(log_weights)
    num = log_weights.numel()
    ess = effective_sample_size(log_weights)
    if ess == 0.0:
        return -math.inf, math.inf
    value = float(torch.logsumexp(log_weights, -1)) - math.log(num)
    return value, math.sqrt(max(num / ess - 1.0, 0.0) / num)


def systematic_resample(weights: Tensor, num: int) -> Tensor:
    """Indices of ``num`` systematic draws from normalised weights: each count differs from its mean by less than one.

    Args:
        weights: Non-negative, each column summing to one. Shape ``(N,)``, or ``(N, B)`` for B columns.
        num: Draws of each column.

    Returns:
        Shape ``(num,)`` or ``(num, B)``.
    """
    weights, num = floats("weights", weights), whole("num", num, cure="Write 1000.")
    if weights.dim() not in (1, 2) or not len(weights) or not bool((weights >= 0).all()):
        raise ValueError(
            f"weights must be non-negative, of shape (N,) or (N, B), got {shown(weights)}. Write normalise(log_w)."
        )
    total = weights.sum(0)
    if bool(((total - 1).abs() > 1e-3).any()):
        raise ValueError("weights must sum to one in each column. Write weights / weights.sum(0).")
    offset = torch.rand(weights.shape[1:], dtype=weights.dtype, device=weights.device)
    grid = torch.arange(num, dtype=weights.dtype, device=weights.device)
    positions = (grid + offset[..., None]) / num
    heights = weights.movedim(0, -1).cumsum(-1).contiguous()
    return torch.searchsorted(heights, positions).clamp_max(len(weights) - 1).movedim(-1, 0)


class ParetoTail(NamedTuple):
    """The largest weights, and the generalised Pareto law of their excesses over a threshold.

    Attributes:
        k: Its shape, k-hat; infinite where there is no tail to fit (`pareto_tail`).
        sigma: Its scale, in units of the largest weight; NaN where k is infinite.
        places: Of the weights that entered the fit, the smallest first. Shape ``(M,)``.
        log_threshold: Log of the largest weight below the tail, less that of the largest weight.
    """

    k: float
    sigma: float
    places: Tensor
    log_threshold: float


def pareto_tail(log_weights: Tensor) -> ParetoTail:
    r"""The tail of weights: the largest :math:`\min(N / 5, 3 \sqrt N)`, those that tie with the threshold left out.

    Weights of zero, and equal ones under 1e-14 of the largest, have no place in a tail: where it cannot be filled
    without them, a few draws carry everything, and k is infinity. Where nearly all weights of the tail tie with a
    threshold of at least half of the largest, there is none, and k is minus infinity.

    Args:
        log_weights: As for `pareto_k`.

    Example:
        >>> log_weights = torch.full((1000,), -math.inf)
        >>> log_weights[:10] = 0.0  # ten draws in the support
        >>> pareto_tail(log_weights).k
        inf
    """
    log_weights = read_log_weights(log_weights)
    num = log_weights.numel()
    if num < 25:
        raise ValueError(f"k-hat needs at least 25 weights, got {num}. Draw more.")
    size = min(num // 5, math.ceil(3 * math.sqrt(num)))
    ordered, order = log_weights.detach().double().sort()
    threshold, top = float(ordered[-size - 1] - ordered[-1]), ordered[-size:] - ordered[-1]
    nothing = order[:0]
    if not bool(torch.isfinite(top).all()):
        return ParetoTail(math.inf, math.nan, nothing, -math.inf)
    excess = top.exp() - math.exp(threshold)
    inside = excess > 1e-14 * math.exp(max(threshold, -600.0))  # more than rounding
    least = size if threshold < math.log(1e-14) else 5  # where nothing is left below it, a tail must be whole
    if int(inside.sum()) < least:
        return ParetoTail(-math.inf if threshold > math.log(0.5) else math.inf, math.nan, nothing, threshold)
    k, sigma = fit_generalized_pareto(excess[inside])
    return ParetoTail(float(k), float(sigma), order[-size:][inside], threshold)


def pareto_k(log_weights: Tensor) -> float:
    r"""Shape of the generalised Pareto law of the largest weights: the k-hat of Pareto-smoothed importance sampling.

    Under 0.5 the weights have a variance; above 0.7 neither they nor their effective sample size can be trusted.

    Args:
        log_weights: At draws of the proposal. Shape ``(N,)``, N at least 25; entries of ``-inf`` are weights of zero.

    Returns:
        k-hat; infinity if fewer weights are positive than the tail has, :math:`\min(N / 5, 3 \sqrt N)`; minus infinity
        if nearly all of the tail is equal.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> pareto_k(torch.zeros(100)) <= 0.0
        True
    """
    return pareto_tail(log_weights).k


def smoothed(log_weights: Tensor, tail: ParetoTail | None = None) -> Tensor:
    r"""Pareto-smoothed log weights, in units of the largest one given.

    The weights of the tail are replaced by the expected order statistics of their Pareto law, none larger than the
    largest weight given. A weight of zero stays zero; where there is no tail to fit, all stay as they are.

    Args:
        log_weights: Shape ``(N,)``, N at least 25.
        tail: Theirs, if it is known.

    Returns:
        Log weights less the largest. Shape ``(N,)``, float64.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), algorithm 1, https://arxiv.org/abs/1507.02646

    Example:
        >>> smoothed(torch.zeros(30)).unique()
        tensor([0.], dtype=torch.float64)
    """
    tail = pareto_tail(log_weights) if tail is None else tail
    relative = (log_weights - log_weights.max()).double()
    num = len(tail.places)
    if not (math.isfinite(tail.k) and num):
        return relative
    part = (torch.arange(num, dtype=torch.float64, device=relative.device) + 0.5) / num
    rate = -torch.log1p(-part)
    excess = tail.sigma * (torch.expm1(tail.k * rate) / tail.k if abs(tail.k) > 1e-12 else rate)
    value = torch.log(excess + math.exp(tail.log_threshold)).clamp_max(0.0)
    return relative.index_copy(0, tail.places, value)
