r"""Bandwidths chosen from the draws alone: leave-one-out likelihood over the draws' own dimension.

A Gaussian smoothing of variance :math:`\epsilon` predicts draw i from all others with density
:math:`\sum_{j \ne i} w_j (2 \pi \epsilon)^{-q/2} \exp(-|z_i - z_j|^2 / 2 \epsilon)`; the bandwidth is the one that
predicts best. ``q`` is the dimension that the draws fill, by nearest neighbours, since draws on a manifold have no
density in the space around it. The smoothing that the chain's own bias amounts to (its variance is off by eta =
epsilon / 2) is then of the order of the best smoothing there is. Draws that coincide, as after resampling, do not
predict each other.
"""

import math

import torch
from torch import Tensor

MAX_QUERIES, MAX_KEYS = 512, 4096
NEIGHBOURS = 20


def choose_bandwidth(points: Tensor, weights: Tensor, num_grid: int = 25) -> float:
    """Bandwidth epsilon of the best leave-one-out prediction.

    Args:
        points: Draws in whitened coordinates. Shape ``(M, d)``. At most 4096 of them are used, evenly spaced, from
            512 places.
        weights: Their weights. Shape ``(M,)``.
        num_grid: Number of bandwidths tried, evenly spaced in the logarithm.

    Returns:
        Variance of the smoothing, in squared units of the points.

    References:
        The use of likelihood cross-validation is Habbema, Hermans and van den Broek (1974); the dimension is Levina
        and Bickel (2005), Maximum Likelihood Estimation of Intrinsic Dimension.

    Example:
        >>> points = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
        >>> .001 < choose_bandwidth(points, torch.full((101,), 1 / 101)) < 1
        True
    """
    squared, weight = _pairs(points, weights)
    grid = _grid(squared, num_grid)
    dimension = _dimension(squared, points.shape[1])
    scores = [_log_sum(squared / epsilon, weight[1]) - 0.5 * dimension * math.log(epsilon) for epsilon in grid]
    return grid[_best(scores, weight[0])]


def choose_conditional_bandwidths(
    points: Tensor, context: Tensor, weights: Tensor, num_grid: int = 10
) -> tuple[float, float]:
    r"""Bandwidths of the event and of the context that best predict each draw from the others', given its context.

    The score is :math:`\log \sum_{j \ne i} w_j k_y k_x / \sum_{j \ne i} w_j k_y`; the context's bandwidth is kept
    below the event's, as it acts like a tolerance on the context while the event's only sets the dynamics.

    Args:
        points: Draws in whitened coordinates. Shape ``(M, d)``.
        context: Their standardised contexts. Shape ``(M, k)``.
        weights: Their weights. Shape ``(M,)``.
        num_grid: Number of bandwidths tried on each axis.

    Returns:
        Bandwidth of the event and of the context.

    References:
        Cross-Validation and the Estimation of Conditional Probability Densities (Hall, Racine and Li, 2004); there by
        squared error.
    """
    squared_x, weight = _pairs(points, weights)
    squared_y, _ = _pairs(context, weights)
    joint = _dimension(squared_x + squared_y, points.shape[1] + context.shape[1])
    dimension = min(max(joint - _dimension(squared_y, context.shape[1]), 0.5), points.shape[1])
    grid_x, grid_y = _grid(squared_x, num_grid), _grid(squared_y, num_grid)
    pairs = [(x, y) for x in grid_x for y in grid_y if y < x] or [(grid_x[-1], grid_y[0])]
    alone = {y: _log_sum(squared_y / y, weight[1]) for y in grid_y}
    scores = [
        _log_sum(squared_x / x + squared_y / y, weight[1]) - alone[y] - 0.5 * dimension * math.log(x) for x, y in pairs
    ]
    return pairs[_best(scores, weight[0])]


def _pairs(points: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Squared distances from some draws to some draws, infinite to themselves and their copies, with both weights."""
    queries, keys = _spaced(len(points), MAX_QUERIES), _spaced(len(points), MAX_KEYS)
    points = points.double()
    squared = torch.cdist(points[queries], points[keys], compute_mode="donot_use_mm_for_euclid_dist").square()
    squared[(squared == 0) | (queries[:, None] == keys.to(squared.device))] = math.inf
    return squared, (weights[queries].double(), weights[keys].double())


def _spaced(num: int, most: int) -> Tensor:
    return torch.arange(num) if num <= most else torch.linspace(0, num - 1, most).round().long()


def _grid(squared: Tensor, num: int) -> list[float]:
    """From a nearest neighbour's squared distance to the mean squared distance."""
    finite = squared[torch.isfinite(squared)]
    if not len(finite):
        return [1.0]
    low = float(squared.min(1).values.median())
    low, high = (low if math.isfinite(low) else float(finite.min())) / 10, float(finite.mean())
    return torch.logspace(math.log10(low), math.log10(max(high, 10 * low)), num).tolist()


def _dimension(squared: Tensor, most: int) -> float:
    """Dimension that the draws fill, from the ratios of their nearest neighbours' distances (Levina and Bickel, eq. 8)."""
    k = min(NEIGHBOURS, squared.shape[1] - 1)
    nearest = squared.topk(k, dim=1, largest=False).values
    nearest = nearest[torch.isfinite(nearest).all(1)]
    if k < 3 or not len(nearest):
        return float(most)
    inverse = 0.5 * (nearest[:, -1:].log() - nearest[:, :-1].log()).sum(1) / (k - 2)
    return min(max(1 / max(float(inverse.mean()), 1e-9), 0.5), float(most))


def _log_sum(scaled: Tensor, weights: Tensor) -> Tensor:
    return torch.logsumexp(-0.5 * scaled + weights.log(), dim=1)


def _best(scores: list[Tensor], weights: Tensor) -> int:
    """The grid entry of largest weighted score; draws without any other one at any distance do not vote."""
    table = torch.stack(scores)
    counted = torch.isfinite(table).all(0) & (weights > 0)
    return int((table[:, counted] @ weights[counted]).argmax()) if bool(counted.any()) else len(scores) // 2
