r"""Ratios of normalising constants from draws on both sides, :math:`D = \log (w_j / w_i)`, and shares of modes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Shares", "bridge_shares", "log_ratio_of"]

BISECTIONS = 200


class Shares(NamedTuple):
    """Estimated shares of K modes.

    Attributes:
        log_shares: Logarithms of shares that sum to one. Shape ``(K,)``.
        error: Standard error of the shares, for independent draws; ``inf`` if some mode met no other. Shape ``(K,)``.
    """

    log_shares: Tensor
    error: Tensor


def log_ratio_of(forward: Tensor, backward: Tensor) -> float:
    r"""Bennett's acceptance ratio: D with as much accepted one way as the other.

    For a map that takes draws of law i towards law j, with log ratio :math:`W_{ij}(x)` of what it makes of
    :math:`w_j` times law j to :math:`w_i` times law i, and its inverse with :math:`W_{ji}`, D solves

    .. math:: \sum_{x \sim i} \sigma(W_{ij}(x) - D - q) = \sum_{x \sim j} \sigma(W_{ji}(x) + D + q), \qquad
              q = \log (n_i / n_j),

    the estimate of least variance among those from both samples. The map may be random, as annealed paths are, as long
    as its log ratio is that of the paths. Where nothing crosses, the answer is :math:`-q`: the draws' own counts.

    Args:
        forward: :math:`W_{ij}` at draws of i; NaN counts as ``-inf``. Shape ``(n_i,)``, at least 1.
        backward: :math:`W_{ji}` at draws of j. Shape ``(n_j,)``, at least 1.

    References:
        Efficient estimation of free energy differences from Monte Carlo data (Bennett, 1976), equation 12. For paths:
        Crooks, Path-ensemble averages in systems driven far from equilibrium (2000). With maps: Warp bridge sampling
        (Meng and Schilling, 2002).

    Example:
        >>> round(log_ratio_of(torch.full((3,), 1.5), torch.full((2,), -1.5)), 6)
        1.5
    """
    forward, backward = (_clean(part) for part in (forward, backward))
    offset = math.log(len(forward) / len(backward))
    known = torch.cat([forward[torch.isfinite(forward)], -backward[torch.isfinite(backward)]]) - offset
    if not len(known) or not _crosses(forward) or not _crosses(backward):
        return -offset
    low, high = float(known.min()) - 60.0, float(known.max()) + 60.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        there = logsigmoid(forward - middle - offset).logsumexp(0)
        back = logsigmoid(backward + middle + offset).logsumexp(0)
        low, high = (middle, high) if bool(there > back) else (low, middle)
        if high - low <= 1e-12 * max(1.0, abs(middle)):
            break
    return 0.5 * (low + high)


def bridge_shares(forward: Tensor, backward: Sequence[Tensor]) -> Shares:
    r"""Shares of K modes by :func:`log_ratio_of` of each mode against the first.

    Errors are those of the estimating equations: with :math:`f_j = \sigma(W_{1j} - D_j - q_j)` at draws of the first
    mode and :math:`g_j` at those of mode j,

    .. math:: \operatorname{cov}(D_j, D_k) = \frac{\operatorname{cov}(f_j, f_k)}{n_1 \bar f_j \bar f_k} +
              \delta_{jk} \frac{\operatorname{var} g_j}{n_j\, \bar g_j^2} ,

    and shares are the softmax of D. Draws of one chain depend on each other: then the error is too small by the root of
    draws over effective draws.

    Args:
        forward: Log ratios from the first mode's draws to each other mode. Shape ``(n_1, K - 1)``.
        backward: Log ratios from the other modes' draws to the first, ``(n_j,)`` each.

    Example:
        >>> bridge_shares(torch.full((4, 1), 2.0), [torch.full((4,), -2.0)]).log_shares.exp()
        tensor([0.1192, 0.8808], dtype=torch.float64)
    """
    count = len(forward)
    log_ratios, back_variance, flows = [0.0], [], []
    for ahead, back in zip(forward.T, backward, strict=True):
        log_ratio = log_ratio_of(ahead, back)
        shift = log_ratio + math.log(count / len(back))
        flows.append(_scaled(_clean(ahead) - shift))
        back_variance.append(_scaled(_clean(back) + shift).var(correction=0) / len(back))
        log_ratios.append(log_ratio)
    there = torch.stack(flows, 1)
    there = there - there.mean(0)
    covariance = torch.zeros(len(log_ratios), len(log_ratios), dtype=there.dtype, device=there.device)
    covariance[1:, 1:] = there.T @ there / count**2 + torch.diag(torch.stack(back_variance))
    log_shares = torch.log_softmax(torch.tensor(log_ratios, dtype=there.dtype, device=there.device), 0)
    share = log_shares.exp()
    slope = torch.diag(share) - share[:, None] * share
    error = (slope @ covariance @ slope).diagonal().clamp_min(0.0).sqrt()
    return Shares(log_shares, torch.where(torch.isfinite(error), error, math.inf))


def _clean(log_ratio: Tensor) -> Tensor:
    return log_ratio.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _crosses(log_ratio: Tensor) -> bool:
    return bool((log_ratio > -math.inf).any())


def _scaled(log_odds: Tensor) -> Tensor:
    r""":math:`f / \bar f`, f the logistic function; infinite where nothing crosses."""
    log_flow = logsigmoid(log_odds)
    total = log_flow.logsumexp(0)
    if not bool(total > -math.inf):
        return torch.full_like(log_flow, math.inf)
    return torch.exp(log_flow - total) * len(log_flow)
