"""Choice of a Student-t mixture for weighted draws: size, tails and shrinkage by held-out density."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.student_mixture import StudentMixture, em_fit, kernel_start, weighted_covariance
from pyro_sb.threads import chosen_threads
from pyro_sb.weights import systematic_resample

TAILS = (5.0, 15.0, float("inf"))
MAX_COMPONENTS = 256  # more than this many draws can tell apart
MAX_POINTS = 4096
STRENGTHS = (1.0, 16.0)
MANY = 16  # components above which the strength of shrinkage is kept


def fit_mixture(
    points: Tensor,
    weights: Tensor,
    log_density: Tensor,
    num_components: int = 1,
    previous: StudentMixture | None = None,
    groups: Tensor | None = None,
) -> StudentMixture:
    r"""Student-t mixture of a weighted sample, chosen on the half of it that was not fitted.

    A large sample is thinned without bias first. The number of components doubles while the held-out mean log density
    rises by more than .02 nats. At every size EM from k-means clusters competes with EM from slices of the log density
    (which follow a funnel's neck, where k-means does not), at two strengths of shrinkage towards the start; the tails
    are chosen at the first size. With ``previous`` the first size is its own, and EM starts from it, and from it with a
    quarter more components where it lacks mass.

    Args:
        points: Sample. Shape ``(M, d)``, M at least 4.
        weights: Non-negative weights that sum to one. Shape ``(M,)``.
        log_density: Target's log density at the points. Shape ``(M,)``.
        num_components: Smallest number of components tried.
        previous: A mixture to refine.
        groups: Draws that depend on each other, such as those of a chain, have the same number: they are held out
            together. Shape ``(M,)``.

    Example:
        >>> points = torch.randn(400, 2, dtype=torch.float64)
        >>> fit_mixture(points, torch.full_like(points[:, 0], 1 / 400), -0.5 * points.square().sum(-1)).locs.shape[1]
        2
    """
    keep, weights = thinned(weights, min(MAX_POINTS, max(256, 20_000_000 // points.shape[-1] ** 2)))
    points, log_density = points[keep], log_density[keep]
    half = _half(len(points), points.device) if groups is None else _half_of_groups(groups[keep])
    train, test = (points[half], _share(weights[half])), (points[~half], _share(weights[~half]))
    most = max(1, min(MAX_COMPONENTS, len(train[0]) // 2))
    size = min(most, max(1, num_components)) if previous is None else previous.num_components
    starts = [previous] if previous is not None else _starts(*train, log_density[half], size)
    best = _contest(starts, TAILS, STRENGTHS, train, test)
    more = min(max(2, size // 4), _largest_size(weights, points.shape[-1]) - size)
    if previous is not None and size > 1 and more > 0:
        start = split_start(best.mixture, *train, log_density[half], more)
        best = max(
            best,
            _contest([start], (float(best.mixture.df[0]),), (best.strength,), train, test),
            key=lambda fit: fit.score,
        )
    while 2 * size <= _largest_size(weights, points.shape[-1]):
        size *= 2
        starts = _starts(*train, log_density[half], size)
        strengths = STRENGTHS if size <= MANY else (best.strength,)
        rival = _contest(starts, (float(best.mixture.df[0]),), strengths, train, test)
        if rival.score < best.score + 0.02:
            break
        best = rival
    return em_fit(points, weights, best.mixture, float(best.mixture.df[0]), best.strength * (points.shape[-1] + 2))


def _half(num: int, device: torch.device) -> Tensor:
    return torch.randperm(num, device=device) < num // 2


def _half_of_groups(groups: Tensor) -> Tensor:
    kinds, index = groups.unique(return_inverse=True)
    return _half(len(kinds), groups.device)[index]


class Fit(NamedTuple):
    """A fitted mixture, the strength of its shrinkage in units of d + 2 draws, and its held-out mean log density."""

    mixture: StudentMixture
    strength: float
    score: float


def _contest(
    starts: list[StudentMixture],
    tails: tuple[float, ...],
    strengths: tuple[float, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> Fit:
    """Best held-out fit over starts, tails and strengths of shrinkage."""
    fits = []
    for start, df, strength in itertools.product(starts, tails, strengths):
        mixture = em_fit(*train, start, df, strength * (train[0].shape[-1] + 2))
        fits.append(Fit(mixture, strength, float(test[1] @ mixture.log_prob(test[0]))))
    return max(fits, key=lambda fit: fit.score)


def _starts(points: Tensor, weights: Tensor, log_density: Tensor, num: int) -> list[StudentMixture]:
    if num == 1:
        return [cluster_start(points, weights, 1)]
    return [cluster_start(points, weights, num), slice_start(points, weights, log_density, num)]


def cluster_start(points: Tensor, weights: Tensor, num: int) -> StudentMixture:
    """K-means clusters that share their pooled within-cluster covariance.

    The coordinates are whitened first, and the seed comes from torch's generator.
    """
    if num == 1:
        return kernel_start((weights @ points)[None], weighted_covariance(points, weights)[None])
    from sklearn.cluster import KMeans

    scale = torch.linalg.cholesky(weighted_covariance(points, weights))
    chosen = points[systematic_resample(weights, min(len(points), 1024))]
    white = torch.linalg.solve_triangular(scale, chosen.T, upper=False).T.cpu().numpy()
    with chosen_threads():  # scikit-learn's libraries may have come just now
        model = KMeans(num, n_init=2, max_iter=30, random_state=int(torch.randint(2**31 - 1, (), device="cpu"))).fit(
            white
        )
    centres = torch.as_tensor(model.cluster_centers_, dtype=points.dtype, device=points.device) @ scale.T
    residual = chosen - centres[torch.as_tensor(model.labels_, dtype=torch.long, device=points.device)]
    uniform = torch.full_like(residual[:, 0], 1.0 / len(residual))
    return kernel_start(centres, weighted_covariance(residual, uniform).expand(num, -1, -1))


def split_start(
    mixture: StudentMixture, points: Tensor, weights: Tensor, log_density: Tensor, num: int
) -> StudentMixture:
    r"""A mixture with more components where it lacks mass: at points drawn by :math:`w (\log p - \log q - m)_+`.

    m is the weighted mean of the log ratio. The new components lie a unit or more from each other in the metric of the
    nearest one, whose shape they have at .7 of its size, and share a tenth of the weight.

    Args:
        mixture: The mixture q.
        points: Sample. Shape ``(M, d)``.
        weights: That sum to one. Shape ``(M,)``.
        log_density: Of the target p, up to a constant. Shape ``(M,)``.
        num: Largest number of components to add.
    """
    rows = (weights > 0).nonzero().flatten()
    ratio = log_density[rows] - mixture.log_prob(points[rows])
    lack = weights[rows] * (ratio - weights[rows] @ ratio).clamp_min(0.0)
    some = min(8 * num, int((lack > 0).sum()))
    if not some:
        return mixture
    drawn = points[rows[torch.multinomial(lack, some)]]
    label = mixture.log_responsibilities(drawn).argmax(-1)
    chosen: list[int] = []
    for i in range(some):
        gaps = torch.linalg.solve_triangular(
            mixture.scale_trils[label[i]], (drawn[[*chosen]] - drawn[i]).T, upper=False
        )
        if len(chosen) < num and (not chosen or float(gaps.norm(dim=0).min()) > 1.0):
            chosen.append(i)
    fresh = mixture.log_weights.new_full((len(chosen),), math.log(0.1 / len(chosen)))
    return StudentMixture(
        torch.cat([mixture.log_weights + math.log(0.9), fresh]),
        torch.cat([mixture.locs, drawn[chosen]]),
        torch.cat([mixture.scale_trils, 0.7 * mixture.scale_trils[label[chosen]]]),
        torch.cat([mixture.df, mixture.df[label[chosen]]]),
    )


def slice_start(points: Tensor, weights: Tensor, log_density: Tensor, num: int) -> StudentMixture:
    """Equal-weight slices of the sample sorted by log density, each with its own mean and covariance.

    Covariances shrink to the neighbours' by d + 2 draws, so that a slice of few distinct points does not degenerate.
    """
    dim = points.shape[-1]
    order = log_density.argsort()
    bounds = (torch.arange(1, num, dtype=weights.dtype, device=weights.device) / num) * (1 - 1e-12)
    slices = torch.tensor_split(order, torch.searchsorted(weights[order].cumsum(0), bounds).cpu())
    parts = [part for part in slices if len(part) > dim] or [order]
    locs = torch.stack([_share(weights[part]) @ points[part] for part in parts])
    own = torch.stack([weighted_covariance(points[part], _share(weights[part])) for part in parts])
    count = torch.stack([1.0 / _share(weights[part]).square().sum() for part in parts])[:, None, None]
    near = 0.5 * (torch.cat([own[:1], own[:-1]]) + torch.cat([own[1:], own[-1:]]))
    return kernel_start(locs, (count * own + (dim + 2) * near) / (count + dim + 2))


def thinned(weights: Tensor, num: int) -> tuple[Tensor, Tensor]:
    r"""About ``num`` rows of a weighted sample, without bias: row i with probability :math:`\min(1, w_i / \tau)`.

    A row that is kept has the weight :math:`\max(w_i, \tau)`. To keep the heaviest instead would drop regions that are
    drawn densely, whose weights are small.

    Args:
        weights: Non-negative. Shape ``(M,)``.
        num: Rows wanted; all that have weight are kept where there are no more.

    Returns:
        The rows, and their weights, which sum to one.
    """
    rows = (weights > 0).nonzero().flatten()
    weights = weights[rows]
    if len(rows) <= num:
        return rows, _share(weights)
    ordered = weights.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # mass of a row and all that are lighter
    whole = torch.arange(num, device=weights.device)
    level = rest[:num] / (num - whole)  # of tau, if so many of the heaviest are kept for sure
    tau = level[int((ordered[:num] <= level).to(torch.uint8).argmax())]
    kept = torch.rand_like(weights) * tau < weights
    return rows[kept], _share(weights[kept].clamp_min(tau))


def _largest_size(weights: Tensor, dim: int) -> int:
    effective = float(1.0 / weights.square().sum())
    return int(min(MAX_COMPONENTS, max(1.0, effective / (3.0 * (dim + 1)))))


def _share(weights: Tensor) -> Tensor:
    return weights / weights.sum()
