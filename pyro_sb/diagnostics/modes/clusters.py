"""Modes of a target among draws: Gaussian-mixture clusters, joined where no barrier of density lies between them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.threads import chosen_threads

__all__ = ["Modes", "find_modes"]

BARRIER = 2.0  # nats below the lower middle that separate two modes
STEPS = 21  # points between two middles
FULL_DIM = 30  # largest dimension in which clusters have full covariances
LEAST = 8  # draws a cluster
NEAREST = 16  # draws of a cluster that a pass to its neighbour is taken from
Candidate = tuple[float, Any, Tensor]  # BIC, a scikit-learn GaussianMixture, scale


@dataclass(frozen=True, eq=False)
class Modes:
    r"""A partition of the unconstrained space into K modes.

    Attributes:
        centres: A point in the middle of each: that of its largest cluster. Shape ``(K, dim)``.
        num: K.
    """

    centres: Tensor
    num: int
    location: Tensor
    scale: Tensor
    mixture: Any
    mode_of_cluster: np.ndarray

    def labels(self, z: Tensor) -> Tensor:
        """The mode of each row ``(n, dim)``. Shape ``(n,)``, on the CPU."""
        rows = (z.double().cpu() - self.location) / self.scale
        return torch.from_numpy(self.mode_of_cluster[self.mixture.predict(rows.numpy())]).long()


def find_modes(log_joint: LogJoint, points: Tensor, max_modes: int, hints: Sequence[Tensor] = ()) -> Modes:
    r"""Modes among points of a target.

    Args:
        log_joint: The target; asked for the density between the clusters' middles.
        points: Shape ``(n, dim)``, float64 on the CPU.
        max_modes: Largest number of clusters.
        hints: Centres to start clusters from, a set each. Shape ``(K, dim)``.
    """
    from scipy.sparse.csgraph import connected_components

    location, deviations = points.mean(0), points.std(0)
    deviations = torch.where(deviations > 0, deviations, 1.0)
    one = torch.full_like(deviations, float(deviations.square().mean().sqrt()))
    alike = bool(deviations.max() < 1.5 * deviations.min())
    scales = (deviations,) if alike else (deviations, one)  # either may hide clusters
    tried = [_fitted(points, location, scale, max_modes) for scale in scales]
    tried += [_started(points, location, deviations, centres[:max_modes]) for centres in hints]
    _, mixture, scale = min(tried, key=lambda candidate: candidate[0])
    rows = ((points - location) / scale).numpy()
    cluster = mixture.predict(rows)
    present = np.flatnonzero(np.bincount(cluster, minlength=mixture.n_components))
    middles = _middles(log_joint, points, cluster, present)
    passes = _passes((points - location) / scale, cluster, present) * scale + location
    num, joined = connected_components(_open(log_joint, middles, passes), directed=False)
    mode_of_cluster = np.zeros(mixture.n_components, dtype=int)
    mode_of_cluster[present] = joined
    for empty in set(range(mixture.n_components)) - set(present.tolist()):  # no point: whichever is nearest
        gaps = np.square(mixture.means_[present] - mixture.means_[empty]).sum(1)
        mode_of_cluster[empty] = joined[int(gaps.argmin())]
    sizes = np.bincount(cluster, minlength=mixture.n_components)[present]
    largest = [int(np.where(joined == k, sizes, -1).argmax()) for k in range(num)]
    return Modes(middles[largest], num, location, scale, mixture, mode_of_cluster)


def _fitted(points: Tensor, location: Tensor, scale: Tensor, max_modes: int) -> Candidate:
    """The mixture with the lowest BIC; the number of clusters rises until that has not fallen three times."""
    best, stale = _started(points, location, scale, 1), 0
    for num in range(2, min(max_modes, max(1, len(points) // LEAST)) + 1):
        found = _started(points, location, scale, num)
        stale = 0 if found[0] < best[0] else stale + 1
        best = found if stale == 0 else best
        if stale == 3:
            break
    return best


def _started(points: Tensor, location: Tensor, scale: Tensor, start: int | Tensor) -> Candidate:
    """A mixture from so many clusters of k-means, or from given centres, with its BIC in the points' own units."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rows = ((points - location) / scale).numpy()
    means = None if isinstance(start, int) else ((start.double().cpu() - location) / scale).numpy()
    mixture = GaussianMixture(
        start if isinstance(start, int) else len(start),
        covariance_type="full" if rows.shape[1] <= FULL_DIM else "diag",
        means_init=means,
        reg_covar=1e-6,
        random_state=int(torch.randint(2**31 - 1, ())),
    )
    with warnings.catch_warnings(), chosen_threads():  # scikit-learn's libraries may have come just now
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        score = float(mixture.fit(rows).bic(rows))
    return score + 2 * len(rows) * float(scale.log().sum()), mixture, scale


def _middles(log_joint: LogJoint, points: Tensor, cluster: np.ndarray, present: np.ndarray) -> Tensor:
    """Each cluster's mean, or its densest point where the mean lies lower (a bent cluster). Shape ``(K, dim)``."""
    found = []
    for k in present:
        members = points[torch.from_numpy(cluster == k)]
        tried = torch.cat([members.mean(0, keepdim=True), members])
        found.append(tried[int(log_joint.log_prob(tried.to(log_joint.device)).argmax())])
    return torch.stack(found)


def _passes(rows: Tensor, cluster: np.ndarray, present: np.ndarray) -> Tensor:
    """Where each pair of clusters comes closest: the mean of both sides' nearest points. Shape ``(pairs, dim)``."""
    members = [rows[torch.from_numpy(cluster == k)] for k in present]
    found = [rows[:0]]
    for i, j in torch.triu_indices(len(present), len(present), 1).T.tolist():
        gaps = torch.cdist(members[i], members[j])
        a, b = divmod(int(gaps.argmin()), gaps.shape[1])
        between = 0.5 * (members[i][a] + members[j][b])
        sides = [
            side[(side - between).square().sum(1).argsort()[:NEAREST]].mean(0) for side in (members[i], members[j])
        ]
        found.append(0.5 * (sides[0] + sides[1])[None])
    return torch.cat(found)


def _open(log_joint: LogJoint, middles: Tensor, passes: Tensor) -> np.ndarray:
    """Whether two middles see each other over no barrier, straight or by their pass. Shape ``(K, K)``, boolean."""
    num = len(middles)
    first, second = torch.triu_indices(num, num, 1)
    share = torch.linspace(0, 1, STEPS, dtype=middles.dtype)[:, None, None]
    a, b = middles[first], middles[second]
    legs = torch.stack([torch.lerp(start, end, share) for start, end in ((a, b), (a, passes), (passes, b))])
    flat = legs.reshape(-1, middles.shape[1]).to(log_joint.device)
    values = log_joint.log_prob(flat).reshape(3, STEPS, -1).cpu()
    lowest = values.amin(1)
    highest_way = torch.maximum(lowest[0], torch.minimum(lowest[1], lowest[2]))
    dip = torch.minimum(values[0, 0], values[0, -1]) - highest_way
    seen = np.eye(num, dtype=bool)
    seen[first.numpy(), second.numpy()] = (dip <= BARRIER).numpy()
    return seen | seen.T
