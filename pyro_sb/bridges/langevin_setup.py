"""What a Langevin bridge sets up in `fit`: metric factors, keys in units of their bandwidths, the scaling."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_sb.bridges.langevin_schemes import Pilot
from pyro_sb.ops.sinkhorn import DENSE_LIMIT, SymmetricScaling, default_tolerance, symmetric_sinkhorn


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
    pilot: Pilot | None
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
    pilot = Pilot.fit(points * units, weights, exponent)
    return Keys(points, pilot, units, pilot(points * units))


def solve(keys: Keys, weights: Tensor, epsilon: float, progress: bool, **options: Any) -> SymmetricScaling:
    """The symmetric scaling, with a bar where it is slow and a warning where it has not converged."""
    with tqdm(desc="Sinkhorn", unit="it", disable=not progress or len(weights) <= DENSE_LIMIT) as bar:

        def show(iteration: int, residual: float) -> None:
            bar.set_postfix_str(f"residual {residual:.1e}", refresh=False)
            bar.update()

        result = symmetric_sinkhorn(keys.points, weights, scale=keys.scale, callback=show, **options)
    if not result.converged:
        tolerance = options.get("tolerance") or default_tolerance(weights.dtype)
        warnings.warn(
            f"Sinkhorn stopped at residual {result.residual:.1e} > {tolerance:.1e} "
            f"after {result.iterations} iterations. Raise epsilon (now {epsilon:.3g}), max_iter or tolerance.",
            RuntimeWarning,
            stacklevel=5,
        )
    return result


def check_metric(name: str, matrix: Any, dim: int) -> None:
    """Refuse what is neither a known name nor a symmetric positive definite matrix."""
    if isinstance(matrix, str) and matrix in ("identity", "covariance"):
        return
    if not isinstance(matrix, Tensor):
        raise ValueError(f'{name} must be "covariance", "identity" or a tensor ({dim}, {dim}), got {matrix!r}.')
    if matrix.shape != (dim, dim):
        raise ValueError(
            f"{name} must have shape ({dim}, {dim}), got {tuple(matrix.shape)}. Write torch.diag(variances)."
        )
    symmetric = bool(torch.isfinite(matrix).all()) and torch.allclose(matrix, matrix.mT)
    if not symmetric or torch.linalg.cholesky_ex(matrix).info > 0:
        raise ValueError(
            f"{name} must be symmetric positive definite. Write matrix + 1e-6 * torch.eye({dim}) if it is singular."
        )


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
    covariance = (weights[:, None] * centred).mT @ centred
    floor = 100 * dim * torch.finfo(points.dtype).eps * float(covariance.diagonal().mean())
    if bool((points == points[0]).all()):
        raise ValueError("target must vary: all draws are equal and have no covariance. Add draws, or give a metric.")
    return torch.linalg.cholesky(covariance + floor * eye)
