"""Simultaneous confidence bands of an empirical distribution function of uniform numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Bands", "ecdf_bands", "ecdf_p_values"]

POINTS, SIMULATIONS = 100, 10_000
BLOCK = 2**24  # uniform numbers held at once


class Bands(NamedTuple):
    r"""Where the difference of the ECDF of N uniform numbers from the diagonal lies at all points at once.

    Attributes:
        points: Where the ECDF is looked at, within (0, 1). Shape ``(K,)``.
        lower: Lower limit of ECDF less point. Shape ``(K,)``.
        upper: Upper limit. Shape ``(K,)``.
        level: Probability that uniform numbers stay within, everywhere.
        pointwise: Level of each single interval, which gives that.
    """

    points: Tensor
    lower: Tensor
    upper: Tensor
    level: float
    pointwise: float

    def __repr__(self) -> str:
        widest = float((self.upper - self.lower).max())
        return (
            f"Bands: {len(self.points)} points, {self.level:.0%} of uniform samples within at all of them "
            f"({self.pointwise:.2%} at each), at most {widest:.3f} wide"
        )


def ecdf_bands(num: int, *, level: float = 0.95, num_points: int = POINTS, num_simulations: int = SIMULATIONS) -> Bands:
    r"""Bands for the ECDF of ``num`` uniform numbers, simultaneous over a grid.

    At a point z the count of numbers below is binomial. All points get the interval between its quantiles
    :math:`\gamma / 2` and :math:`1 - \gamma / 2`, with one :math:`\gamma` such that a share ``level`` of simulated
    uniform samples stays within at every point. So the bands are narrow at the ends, where Kolmogorov's are not.

    Args:
        num: Numbers N, at least 2.
        level: In (0, 1).
        num_points: Points :math:`i / (K + 1)`, at least 1.
        num_simulations: Samples that :math:`\gamma` is taken from, at least 100. The level has a standard error of
            .002 with 10,000.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
        Comparison (Sailynoja, Burkner and Vehtari, 2022), https://arxiv.org/abs/2103.10522, algorithm 1.

    Example:
        >>> bands = ecdf_bands(200)
        >>> bool((bands.lower < 0).all() and (bands.upper > 0).all()), 0.95 < bands.pointwise < 1
        (True, True)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}. Write 0.95 for 95 %.")
    if num < 2 or num_points < 1 or num_simulations < 100:
        raise ValueError(
            "num must be at least 2, num_points at least 1 and num_simulations at least 100, got "
            f"{num}, {num_points} and {num_simulations}."
        )
    null = _null(num, num_points, num_simulations).sort().values
    # a hair less, so that counts that are just as rare are within
    gamma = float(null[int((1 - level) * num_simulations)]) * (1 - 1e-9)
    points = _points(num_points)
    law = _binomial(num, points)
    lower, upper = (torch.from_numpy(law.ppf(share)) / num - points for share in (gamma / 2, 1 - gamma / 2))
    return Bands(points, lower, upper, level, 1 - gamma)


def ecdf_p_values(uniforms: Tensor, *, num_points: int = POINTS, num_simulations: int = SIMULATIONS) -> Tensor:
    r"""p-value of the largest departure of each column's ECDF from the diagonal, among uniform samples.

    The departure at a point is the two-sided probability of its binomial count; the statistic is the smallest over the
    grid, so that a column's p is under 1 - level just where it leaves the bands of that level. Tails count as much as
    the middle: a posterior too narrow is found sooner than by Kolmogorov and Smirnov's test.

    Beyond all M null samples p is K times the statistic where that is smaller: by Bonferroni, at least the true p. So p
    can be as small as the smallest of many columns asks for.

    Args:
        uniforms: Numbers in [0, 1]. Shape ``(N, P)``.
        num_points: As in `ecdf_bands`.
        num_simulations: Null samples M: a p from :math:`1 / (M + 1)` on is their share.

    Returns:
        Shape ``(P,)``.

    Example:
        >>> p = ecdf_p_values(torch.stack([torch.rand(300), 0.9 * torch.rand(300)], 1))
        >>> bool(p[0] > 0.01), bool(p[1] < 0.001)
        (True, True)
    """
    table = _two_sided(len(uniforms), num_points)
    found = _least(_counts(uniforms.double().T, num_points), table)
    null = _null(len(uniforms), num_points, num_simulations, table).sort().values
    rarer = torch.searchsorted(null, found, right=True)  # null samples that are as far off or more
    p = (rarer + 1) / (num_simulations + 1.0)
    return torch.where(rarer == 0, torch.minimum(p, (num_points * found).clamp_min(1e-300)), p)


def ecdf(uniforms: Tensor, points: Tensor) -> Tensor:
    """Share of each column that lies at or below each point. ``(N, P)`` and ``(K,)`` to ``(K, P)``."""
    ordered = uniforms.double().sort(0).values.T.contiguous()
    below = torch.searchsorted(ordered, points.expand(len(ordered), -1).contiguous(), right=True)
    return below.T.double() / len(uniforms)


def _points(num_points: int) -> Tensor:
    return torch.arange(1, num_points + 1, dtype=torch.float64) / (num_points + 1)


def _binomial(num: int, points: Tensor) -> Any:
    """SciPy's law of the number of uniform draws, of ``num``, below each point."""
    from scipy.stats import binom

    return binom(num, points.numpy())


def _counts(rows: Tensor, num_points: int) -> Tensor:
    """Number of each row's numbers below each point. ``(M, N)`` to ``(M, num_points)``."""
    cells = (rows * (num_points + 1)).long().clamp_(0, num_points)
    offset = torch.arange(len(rows))[:, None] * (num_points + 1)
    counts = torch.bincount((cells + offset).flatten(), minlength=len(rows) * (num_points + 1))
    return counts.reshape(len(rows), num_points + 1).cumsum(1)[:, :-1]


def _two_sided(num: int, num_points: int) -> Tensor:
    """Twice the smaller of P(n or fewer) and P(n or more) for each count n and point. ``(num + 1, num_points)``."""
    law = _binomial(num, _points(num_points))
    below = law.cdf(torch.arange(num + 1).numpy()[:, None])
    above = law.sf(torch.arange(-1, num).numpy()[:, None])
    return 2 * torch.minimum(torch.from_numpy(below), torch.from_numpy(above))


def _least(counts: Tensor, table: Tensor) -> Tensor:
    """Smallest two-sided probability of each row. Shape ``(M,)``."""
    return table[counts, torch.arange(table.shape[1])].amin(1)


def _null(num: int, num_points: int, num_simulations: int, table: Tensor | None = None) -> Tensor:
    """The statistic of uniform samples. Shape ``(num_simulations,)``."""
    table = _two_sided(num, num_points) if table is None else table
    block = max(1, BLOCK // num)
    sizes = [min(block, num_simulations - start) for start in range(0, num_simulations, block)]
    return torch.cat([_least(_counts(torch.rand(size, num), num_points), table) for size in sizes])
