"""Wasserstein distances between clouds of draws: exact, and sliced for large clouds."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_sb.checks import generator_of, whole
from pyro_sb.metrics.score import Score, clouds


def wasserstein2(x: Any, y: Any, *, floor_draws: Any = None) -> Score:
    r"""Exact Wasserstein distance of order 2 between two clouds.

    .. math:: W_2(x, y) = \Big(\min_{P} \sum_{ij} P_{ij} |x_i - y_j|^2\Big)^{1/2}

    over the couplings P of the two clouds, each point having the mass 1/n or 1/m. Between clouds of one law it is far
    from zero and falls slowly with n, so the score's floor matters. Memory is that of the cost matrix several times
    over: about 4 GB at n = m = 10,000. Beyond that use `sliced_wasserstein2`.

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        y: Draws of the target, shape ``(m, d)``, or a distribution, of which n are drawn.
        floor_draws: For the floor, which is the metric between ``y`` and ``floor_draws``: independent draws of the
            target, or a distribution. Omitted: fresh draws if ``y`` is a distribution; else the floor is that between
            random halves of ``y``, of half the size and so an upper bound.

    Returns:
        The distance, in units of ``x``, with its floor.

    Raises:
        ImportError: POT is not installed.
        RuntimeError: The solver gave up.

    References:
        POT: Python Optimal Transport (Flamary et al., 2021), https://jmlr.org/papers/v22/20-451.html

    Example:
        >>> x = torch.randn(200, 2)
        >>> round(wasserstein2(x, x + torch.tensor([3.0, 4.0])), 4)
        5.0
    """
    x, y, y0, y1 = clouds(x, y, floor_draws)
    return Score(_exact(x, y), floor=_exact(y0, y1))


def sliced_wasserstein2(
    x: Any, y: Any, *, num_projections: int = 64, floor_draws: Any = None, generator: torch.Generator | None = None
) -> Score:
    r"""Sliced Wasserstein distance of order 2: the root mean square of that between projections to lines.

    .. math:: SW_2(x, y) = \Big(\tfrac1K \sum_{k=1}^{K} W_2^2(\langle \theta_k, x \rangle, \langle \theta_k, y \rangle)
        \Big)^{1/2}

    On a line the optimal coupling pairs quantiles, so a direction costs one sort: 200,000 draws take seconds. At most
    :math:`W_2 / \sqrt d` (in the limit of many directions, and for any number above one in the plane).

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        y: Draws of the target, shape ``(m, d)``, or a distribution, of which n are drawn.
        num_projections: K, at least 1. In the plane the directions are equispaced over the half circle, from the first
            axis on; on the line there is one; else they are random.
        floor_draws: For the floor, as in `wasserstein2`. The floor is taken over the same directions.
        generator: Makes the random directions, the draws of a distribution and the halves of ``y`` for the floor.
            Omitted: torch's global generator.

    Returns:
        The distance, in units of ``x``, with its floor.

    References:
        Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
        https://doi.org/10.1007/s10851-014-0506-3

    Example:
        >>> x = torch.randn(1000, 2)
        >>> round(sliced_wasserstein2(x, x + torch.tensor([3.0, 4.0])) ** 2, 4)  # half of |(3, 4)|^2
        12.5
    """
    num_projections, generator = whole("num_projections", num_projections), generator_of(generator)
    x, y, y0, y1 = clouds(x, y, floor_draws, generator)
    directions = _directions(x.shape[-1], num_projections, generator).to(x.device)
    return Score(_sliced(x, y, directions), floor=_sliced(y0, y1, directions))


def _exact(x: Tensor, y: Tensor) -> float:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            'wasserstein2 needs POT. Write pip install "pyro-sb[metrics]", or use sliced_wasserstein2.'
        ) from error
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below, as an error: the value would be no distance
        value, log = ot.emd2([], [], cost, numItermax=1_000_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(
            f"Exact transport must reach its optimum, got from POT: {log['warning']} "
            "Use fewer draws, or sliced_wasserstein2."
        )
    return math.sqrt(max(float(value), 0.0))


def _directions(dim: int, num: int, generator: torch.Generator | None) -> Tensor:
    """Unit vectors, a row each."""
    if dim == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if dim == 2:
        angle = torch.arange(num, dtype=torch.float64) * (math.pi / num)
        return torch.stack([angle.cos(), angle.sin()], -1)
    device = None if generator is None else generator.device
    return torch.nn.functional.normalize(
        torch.randn(num, dim, dtype=torch.float64, generator=generator, device=device), dim=-1
    )


def _sliced(x: Tensor, y: Tensor, directions: Tensor) -> float:
    n, m = len(x), len(y)
    # Both quantile functions are constant between the levels i/n and j/m; counted in units of 1/(n m) to be exact.
    levels = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(x.device)
    share, upper = levels.diff().double() / (n * m), levels[1:] - 1
    i, j = upper // m, upper // n
    squared = [(share * ((x @ d).sort().values[i] - (y @ d).sort().values[j]).square()).sum() for d in directions]
    return float(torch.stack(squared).mean().sqrt())
