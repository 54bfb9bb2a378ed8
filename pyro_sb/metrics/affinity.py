"""Maximum mean discrepancy."""

from typing import Any

import torch
from torch import Tensor

from pyro_sb.metrics.score import Score, clouds

_BLOCK = 1024  # rows of an affinity matrix held at a time
_MEDIAN_OF = 2000  # draws whose distances give the bandwidth


def mmd(x: Any, y: Any, *, floor_draws: Any = None) -> Score:
    r"""Squared maximum mean discrepancy under a Gaussian affinity, by its unbiased estimate.

    .. math:: \mathrm{MMD}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n - 1)}
        + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m - 1)} - \frac{2 \sum_{ij} k(x_i, y_j)}{n m}, \qquad
        k(a, b) = e^{-|a - b|^2 / 2 h^2}

    The bandwidth h is the median distance between two draws of the target (of 2,000, evenly picked, where there are
    more), so that two models are measured by one affinity. The estimate of a perfect sampler has mean zero and may be
    negative; the floor is one such estimate, and shows how large the noise is. Affinities are held a block of rows at a
    time: 5,000 draws a side take a few seconds and 200 MB.

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        y: Draws of the target, shape ``(m, d)``, or a distribution, of which n are drawn.
        floor_draws: For the floor, which is the metric between ``y`` and ``floor_draws``: independent draws of the
            target, or a distribution. Omitted: fresh draws if ``y`` is a distribution; else the floor is that between
            random halves of ``y``, whose noise is that of half the size.

    Returns:
        The squared discrepancy, without unit and at most 2, with its floor.

    Raises:
        ValueError: More than half of the distances within the target are zero.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6, https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> x, y = torch.randn(500, 2), torch.randn(500, 2)
        >>> bool(mmd(x + 1, y) > 20 * abs(mmd(x, y)))
        True
    """
    x, y, y0, y1 = clouds(x, y, floor_draws)
    bandwidth, centre = _median_distance(y), y.mean(0)
    x, y, y0, y1 = ((draws - centre) / bandwidth for draws in (x, y, y0, y1))
    return Score(_unbiased(x, y), floor=_unbiased(y0, y1))


def _median_distance(y: Tensor) -> float:
    some = y[:: -(-len(y) // _MEDIAN_OF)]
    median = float(torch.pdist(some).median())
    if median == 0:
        raise ValueError(
            f"y must have a positive median distance, got 0 over {len(some)} draws: most of them coincide. "
            "A discrete law wants shares, as in mode_share_tv."
        )
    return median


def _unbiased(x: Tensor, y: Tensor) -> float:
    """The estimate at bandwidth 1."""
    n, m = len(x), len(y)
    return _total(x, x) / (n * (n - 1)) + _total(y, y) / (m * (m - 1)) - 2 * _total(x, y) / (n * m)


def _total(a: Tensor, b: Tensor) -> float:
    """Sum of all affinities, without those of points to themselves if ``a is b``."""
    total, half = 0.0, b.square().sum(-1) / 2
    for start in range(0, len(a), _BLOCK):
        rows = a[start : start + _BLOCK]
        log_affinity = rows @ b.mT - half - rows.square().sum(-1, keepdim=True) / 2  # -|a - b|^2 / 2
        if a is b:
            log_affinity.diagonal(start).fill_(-torch.inf)
        # The square of a far outlier, 1e16 and more, would round to an affinity above 1.
        total += float(log_affinity.clamp_(max=0).exp_().sum())
    return total
