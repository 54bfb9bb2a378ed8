"""Fit of a Langevin bridge: metric factors, bandwidths, keys in their units, the scaling."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_sb.bridges.langevin.schemes import VariableBandwidth
from pyro_sb.checks import floats, number
from pyro_sb.ops.attention import Transitions
from pyro_sb.ops.sinkhorn import DENSE_LIMIT, SymmetricScaling, default_tolerance, symmetric_sinkhorn
from pyro_sb.threads import Pace
from pyro_sb.warn import warn


class Bandwidths(NamedTuple):
    """Bandwidths in use, in squared units of the whitened axes.

    Attributes:
        epsilon: Of the event.
        context: Of the context; 1 without one.
        pilot: Of the density estimate behind a variable bandwidth; 1 without one.
    """

    epsilon: float
    context: float = 1.0
    pilot: float = 1.0


class Keys(NamedTuple):
    """The draws as attention sees them.

    Attributes:
        points: (context, z), each axis in units of its bandwidth. Shape ``(M, k + d)``.
        pilot: Variable bandwidth, or None for a fixed one.
        units: Factor from these units to the pilot's. Shape ``(k + d,)``.
        scale: The variable bandwidth at the draws, or None. Shape ``(M,)``.
    """

    points: Tensor
    pilot: VariableBandwidth | None
    units: Tensor
    scale: Tensor | None


def make_keys(z: Tensor, y: Tensor | None, weights: Tensor, bandwidths: Bandwidths, exponent: float) -> Keys:
    """Keys of whitened draws ``(M, d)`` and standardised contexts ``(M, k)``; exponent 0 is a fixed bandwidth."""
    joint = z if y is None else torch.cat([y, z], dim=1)
    squared = [bandwidths.context] * (joint.shape[1] - z.shape[1]) + [bandwidths.epsilon] * z.shape[1]
    width = joint.new_tensor(squared).sqrt()
    points, units = joint / width, width / math.sqrt(bandwidths.pilot)
    if exponent == 0:
        return Keys(points, None, units, None)
    pilot = VariableBandwidth.fit(points * units, weights, exponent)
    return Keys(points, pilot, units, pilot(points * units))


def solve(keys: Keys, weights: Tensor, epsilon: float, progress: bool, **options: Any) -> tuple[SymmetricScaling, str]:
    """The symmetric scaling and its threads, with a bar where it is slow and a warning where it has not converged."""
    with tqdm(desc="Sinkhorn", unit="it", disable=not progress or len(weights) <= DENSE_LIMIT) as bar:
        pace = Pace()

        def show(iteration: int, residual: float) -> None:
            pace.lap(device=weights.device)
            bar.set_postfix_str(f"residual {residual:.1e}", refresh=False)
            bar.update()

        try:
            result = symmetric_sinkhorn(keys.points, weights, scale=keys.scale, callback=show, **options)
        finally:
            pace.stop()
    if not result.converged:
        tolerance = options.get("tolerance") or default_tolerance(weights.dtype)
        warn(
            f"Sinkhorn stopped at residual {result.residual:.1e} > {tolerance:.1e} "
            f"after {result.iterations} iterations. Raise epsilon (now {epsilon:.3g}), max_iter or tolerance.",
        )
    return result, pace.describe()


def read_bandwidths(context_dim: int, epsilon: Any, context_epsilon: Any) -> tuple[float | None, float | None]:
    """Bandwidths that were asked for; refused where not positive, or of a context that is not there."""
    if context_epsilon is not None and context_dim == 0:
        raise ValueError("context_epsilon is the bandwidth of a context, got context_dim = 0. Omit one of them.")
    read = [
        None if value is None else number(name, value, "(0, inf)", "Omit it for the default.")
        for name, value in (("epsilon", epsilon), ("context_epsilon", context_epsilon))
    ]
    return read[0], read[1]


def read_metric(name: str, matrix: Any, dim: int) -> str | Tensor:
    """A known name, or a symmetric positive definite matrix."""
    if isinstance(matrix, str) or matrix is None:
        if matrix not in ("identity", "covariance"):
            raise ValueError(f'{name} must be "covariance", "identity" or a tensor ({dim}, {dim}), got {matrix!r}.')
        return matrix
    matrix = floats(name, matrix)
    if matrix.shape != (dim, dim):
        raise ValueError(
            f"{name} must have shape ({dim}, {dim}), got {tuple(matrix.shape)}. Write torch.diag(variances)."
        )
    symmetric = bool(torch.isfinite(matrix).all()) and torch.allclose(matrix, matrix.mT)
    if not symmetric or torch.linalg.cholesky_ex(matrix).info > 0:
        raise ValueError(
            f"{name} must be symmetric positive definite. Write matrix + 1e-6 * torch.eye({dim}) if it is singular."
        )
    return matrix


def whiten(centred: Tensor, factor: Tensor) -> Tensor:
    """L^-1 applied to rows ``(*, d)``."""
    rows = torch.linalg.solve_triangular(factor, centred.reshape(-1, centred.shape[-1]).mT, upper=False)
    return rows.mT.reshape(centred.shape)


def metric_factor(matrix: str | Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Lower Cholesky factor ``(d, d)`` of a metric; a covariance's empty directions get a small share."""
    dim = points.shape[1]
    eye = torch.eye(dim, dtype=points.dtype, device=points.device)
    if isinstance(matrix, Tensor):
        return torch.linalg.cholesky(matrix.detach().to(points))
    if matrix == "identity":
        return eye
    centred = points - weights @ points
    if bool((points == points[0]).all()):
        raise ValueError("target must vary: all draws are equal and have no covariance. Add draws, or give a metric.")
    floor = 100 * dim * torch.finfo(points.dtype).eps
    scale = (weights @ centred.square()).sqrt()  # of each axis: those of other units keep their digits
    scale = torch.where(scale > 0, scale, math.sqrt(floor) * scale.mean())
    correlation = (weights[:, None] * centred / scale).mT @ (centred / scale)
    return scale[:, None] * torch.linalg.cholesky(correlation + floor * eye)


MAX_KEYS = 4096
PARTNERS = 10.0  # 1 / sum p^2 over the transition's probabilities


def choose_bandwidths(
    z: Tensor, y: Tensor | None, weights: Tensor, asked: tuple[float | None, float | None], *, variable: bool
) -> Bandwidths:
    """Bandwidths of whitened draws and standardised contexts: those asked for, the rest from the draws.

    Args:
        z: Shape ``(M, d)``.
        y: Shape ``(M, k)``, or None.
        weights: Shape ``(M,)``.
        asked: Of the event and of the context.
        variable: Whether the bandwidth is to vary, by a density estimate of its own.
    """
    epsilon, context = asked
    if y is not None and (epsilon is None or context is None):
        chosen = choose_conditional_bandwidths(z, y, weights)
        epsilon, context = epsilon or chosen[0], context or chosen[1]
    joint = z if y is None else torch.cat([y, z], dim=1)
    pilot = choose_bandwidth(joint, weights) if variable else 1.0
    return Bandwidths(epsilon or choose_bandwidth(z, weights), context or 1.0, pilot)


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


class MetricTransitions:
    r"""The bridge's transition law :math:`p_j(x)` and mean m(x) at one bandwidth and in a given metric, nothing more.

    Where draws come from a kernel's own warm-up, there is nothing else to check, to choose or to keep.

    Args:
        points: Draws. Shape ``(M, d)``.
        weights: Their weights, positive. Shape ``(M,)``.
        metric: K. Shape ``(d, d)``.
        epsilon: Bandwidth, in units of the metric.

    Example:
        >>> law = MetricTransitions(torch.tensor([[-1.0], [1.0]]), torch.ones(2), torch.eye(1), 1.0)
        >>> law.conditional_mean(torch.zeros(1, 1))
        tensor([[0.]])
    """

    def __init__(self, points: Tensor, weights: Tensor, metric: Tensor, epsilon: float) -> None:
        weights = weights / weights.max()
        self.weights, self.epsilon = weights / weights.sum(), epsilon
        self.location, self.metric_cholesky = self.weights @ points, metric_factor(metric, points, weights)
        z = whiten(points - self.location, self.metric_cholesky)
        keys = make_keys(z, None, self.weights, Bandwidths(epsilon), exponent=0)
        scaling, _ = solve(keys, self.weights, epsilon, progress=False)
        self._law = Transitions(keys.points, z, scaling.log_v)

    def conditional_mean(self, x: Tensor) -> Tensor:
        """m(x). Shapes ``(C, d)`` to ``(C, d)``."""
        return self._law.mean(self._query(x)) @ self.metric_cholesky.mT + self.location

    def transition_probabilities(self, x: Tensor) -> Tensor:
        """p_j(x). Shapes ``(C, d)`` to ``(C, M)``."""
        return self._law.probabilities(self._query(x))

    def _query(self, x: Tensor) -> Tensor:
        return whiten(x - self.location, self.metric_cholesky) / math.sqrt(self.epsilon)
