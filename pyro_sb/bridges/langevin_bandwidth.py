r"""Bandwidths chosen from the draws alone: leave-one-out likelihood, and never so small that a chain would stand still.

A Gaussian smoothing of variance :math:`\epsilon` predicts draw i from all others with density
:math:`\sum_{j \ne i} w_j N(z_i; z_j, \epsilon I)`; the bandwidth is the one that predicts best. The smoothing that
the chain's own bias amounts to (its variance is off by eta = epsilon / 2) is then of the order of the best smoothing
there is. On draws near a manifold, and in many dimensions, that bandwidth would leave every draw alone with itself:
it is raised until `PARTNERS` draws take part in the transition from a draw in the middle of the table. Draws that
coincide, as after resampling, do not predict each other.
"""

import math

import torch
from torch import Tensor

MAX_KEYS = 4096
PARTNERS = 10.0  # 1 / sum p^2 over the transition's probabilities


def choose_bandwidth(points: Tensor, weights: Tensor, num_grid: int = 25) -> float:
    """Bandwidth epsilon of the best leave-one-out prediction, or the one at which ten draws take part.

    Args:
        points: Draws in whitened coordinates. Shape ``(M, d)``. At most 4096 of them are used, evenly spaced, from
            512 places.
        weights: Their weights. Shape ``(M,)``.
        num_grid: Number of bandwidths tried, evenly spaced in the logarithm.

    Returns:
        Variance of the smoothing, in squared units of the points.

    References:
        Likelihood cross-validation is Habbema, Hermans and van den Broek (1974), A stepwise discriminant analysis
        program.

    Example:
        >>> points = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
        >>> 0.001 < choose_bandwidth(points, torch.full((101,), 1 / 101)) < 1
        True
    """
    squared, weight = _pairs(points, weights)
    grid, rank = _grid(squared, num_grid), _rank(points)
    scores = [_log_sum(squared / e, weight[1]) - 0.5 * rank * math.log(e) for e in grid]
    for epsilon in grid[_best(scores, weight[0]) :]:
        if _partners(squared / epsilon, weight) >= min(PARTNERS, len(points) / 4):
            return epsilon
    return grid[-1]


def choose_conditional_bandwidths(
    points: Tensor, context: Tensor, weights: Tensor, num_grid: int = 10
) -> tuple[float, float]:
    r"""Bandwidths of the event and of the context that best predict each draw from the others', given its context.

    The score is :math:`\log \sum_{j \ne i} w_j k_y k_x / \sum_{j \ne i} w_j k_y`; the context's bandwidth is kept
    below the event's, as it acts like a tolerance on the context while the event's only sets the dynamics. Both are
    raised until ten draws take part.

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
    squared_x, weight = _pairs(points, weights, queries=256)
    squared_y, _ = _pairs(context, weights, queries=256)
    rank, grid_x, grid_y = _rank(points), _grid(squared_x, num_grid), _grid(squared_y, num_grid)
    pairs = [(x, y) for x in grid_x for y in grid_y if y < x] or [(grid_x[-1], grid_x[-1] / 2)]
    alone = {y: _log_sum(squared_y / y, weight[1]) for _, y in pairs}
    scores = [
        _log_sum(squared_x / x + squared_y / y, weight[1]) - alone[y] - 0.5 * rank * math.log(x) for x, y in pairs
    ]
    x, y = pairs[_best(scores, weight[0])]
    while _partners(squared_x / x + squared_y / y, weight) < min(PARTNERS, len(points) / 4) and x < grid_x[-1]:
        x, y = 1.3 * x, 1.3 * y
    return x, y


def _pairs(points: Tensor, weights: Tensor, queries: int = 512) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Squared distances from some draws to some draws, infinite to themselves and their copies, with both weights."""
    rows, keys = (_spaced(len(points), most).to(points.device) for most in (queries, MAX_KEYS))
    points, weights = points.double(), weights.double()
    squared = torch.cdist(points[rows], points[keys], compute_mode="donot_use_mm_for_euclid_dist").square()
    squared[(squared == 0) | (rows[:, None] == keys)] = math.inf
    return squared, (weights[rows], weights[keys])


def _spaced(num: int, most: int) -> Tensor:
    return torch.arange(num) if num <= most else torch.linspace(0, num - 1, most).round().long()


def _grid(squared: Tensor, num: int) -> list[float]:
    """From a tenth of a near neighbour's squared distance to the mean squared distance."""
    finite = squared[torch.isfinite(squared)]
    if not len(finite):
        return [1.0]
    near = squared.kthvalue(min(int(PARTNERS), squared.shape[1]), dim=1).values
    near = near[torch.isfinite(near)]
    low, high = float(near.median() if len(near) else finite.min()) / 10, float(finite.mean())
    return torch.logspace(math.log10(low), math.log10(max(high, 10 * low)), num).tolist()


def _rank(points: Tensor) -> int:
    """Number of directions in which the draws vary."""
    values = torch.linalg.svdvals((points - points.mean(0))[_spaced(len(points), MAX_KEYS)].double())
    return max(1, int((values > 1e-6 * values[0]).sum()))


def _log_sum(scaled: Tensor, weights: Tensor) -> Tensor:
    return torch.logsumexp(-0.5 * scaled + weights.log(), dim=1)


def _best(scores: list[Tensor], weights: Tensor) -> int:
    """The grid entry of largest weighted score; draws without any other one at any distance do not vote."""
    table = torch.stack(scores)
    counted = torch.isfinite(table).all(0) & (weights > 0)
    return int((table[:, counted] @ weights[counted]).argmax()) if bool(counted.any()) else len(scores) // 2


def _partners(scaled: Tensor, weights: tuple[Tensor, Tensor]) -> float:
    """Median of 1 / sum p^2 over the transitions from some draws, each to itself and the others."""
    own, others = weights[0][:, None], weights[1] * torch.exp(-0.5 * scaled)
    total, squares = own[:, 0] + others.sum(1), own[:, 0].square() + others.square().sum(1)
    return float((total.square() / squares)[own[:, 0] > 0].median())
