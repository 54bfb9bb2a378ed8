"""Algebra of log weights: effective sample size, evidence and its error, resampling."""

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


def normalise(log_weights: Tensor) -> Tensor:
    """Weights that sum to one. Shape ``(N,)``; entries of ``-inf`` become zero."""
    return torch.softmax(log_weights, -1)


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Kish's effective sample size :math:`(\sum w)^2 / \sum w^2`, between 1 and N; 0 if every weight is zero.

    Example:
        >>> effective_sample_size(torch.zeros(4))
        4.0
    """
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
    num = log_weights.numel()
    ess = effective_sample_size(log_weights)
    if ess == 0.0:
        return -math.inf, math.inf
    value = float(torch.logsumexp(log_weights, -1)) - math.log(num)
    return value, math.sqrt(max(num / ess - 1.0, 0.0) / num)


def systematic_resample(weights: Tensor, num: int) -> Tensor:
    """Indices of ``num`` systematic draws from normalised weights: each count differs from its mean by less than one.

    Shape ``(num,)``.
    """
    offset = torch.rand((), dtype=weights.dtype, device=weights.device)
    positions = (torch.arange(num, dtype=weights.dtype, device=weights.device) + offset) / num
    return torch.searchsorted(weights.cumsum(0), positions).clamp_max(weights.numel() - 1)


def pareto_k(log_weights: Tensor) -> float:
    r"""Shape of the generalised Pareto law of the largest weights: the k-hat of Pareto-smoothed importance sampling.

    Under 0.5 the weights have a variance; above 0.7 neither they nor their effective sample size can be trusted.

    Args:
        log_weights: At draws of the proposal. Shape ``(N,)``, N at least 25; entries of ``-inf`` are weights of zero.

    Returns:
        k-hat; infinity if fewer than five weights are positive.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> pareto_k(torch.zeros(100)) <= 0.0
        True
    """
    num = log_weights.numel()
    if num < 25:
        raise ValueError(f"k-hat needs at least 25 weights, got {num}. Draw more.")
    ordered = log_weights.detach().double().sort().values
    tail = min(num // 5, math.ceil(3 * math.sqrt(num)))
    threshold, top = ordered[-tail - 1], ordered[-tail:]
    if not bool(torch.isfinite(top[-5:]).all()):
        return math.inf
    excess = (top - top[-1]).exp() - (threshold - top[-1]).exp()
    excess = excess[excess > 1e-14]
    if len(excess) < 5:  # equal weights, or nearly
        return -math.inf if float(top[-1] - threshold) < 1e-6 else math.inf
    return float(fit_generalized_pareto(excess)[0])
