"""Modes of a target among draws: Gaussian-mixture clusters, joined where no barrier of density lies between them."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_sb.infer.joint import LogJoint

__all__ = ["Modes", "find_modes"]

BARRIER = 2.0  # nats below the lower middle that separate two modes
STEPS = 21  # points between two middles
FULL_DIM = 30  # largest dimension in which clusters have full covariances
LEAST = 8  # draws a cluster


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


def find_modes(log_joint: LogJoint, points: Tensor, max_modes: int) -> Modes:
    r"""Modes among points of a target.

    Args:
        log_joint: The target; asked for the density between the clusters' middles.
        points: Shape ``(n, dim)``, float64 on the CPU.
        max_modes: Largest number of clusters.
    """
    location, scale = points.mean(0), points.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    rows = ((points - location) / scale).numpy()
    mixture = _fitted(rows, max_modes)
    cluster = mixture.predict(rows)
    present = np.flatnonzero(np.bincount(cluster, minlength=mixture.n_components))
    middles = _middles(log_joint, points, cluster, present)
    num, joined = connected_components(_open(log_joint, middles), directed=False)
    mode_of_cluster = np.zeros(mixture.n_components, dtype=int)
    mode_of_cluster[present] = joined
    for empty in set(range(mixture.n_components)) - set(present.tolist()):  # no point: whichever is nearest
        gaps = np.square(mixture.means_[present] - mixture.means_[empty]).sum(1)
        mode_of_cluster[empty] = joined[int(gaps.argmin())]
    sizes = np.bincount(cluster, minlength=mixture.n_components)[present]
    largest = [int(np.where(joined == k, sizes, -1).argmax()) for k in range(num)]
    return Modes(middles[largest], num, location, scale, mixture, mode_of_cluster)


def _fitted(rows: np.ndarray, max_modes: int) -> GaussianMixture:
    """The mixture with the lowest BIC; the number of clusters rises until that has not fallen three times."""
    kind = "full" if rows.shape[1] <= FULL_DIM else "diag"
    best, stale = None, 0
    for num in range(1, min(max_modes, max(1, len(rows) // LEAST)) + 1):
        state = int(torch.randint(2**31 - 1, ()))
        mixture = GaussianMixture(num, covariance_type=kind, reg_covar=1e-6, n_init=2, random_state=state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            score = mixture.fit(rows).bic(rows)
        stale = 0 if best is None or score < best[0] else stale + 1
        best = (score, mixture) if stale == 0 else best
        if stale == 3:
            break
    assert best is not None
    return best[1]


def _middles(log_joint: LogJoint, points: Tensor, cluster: np.ndarray, present: np.ndarray) -> Tensor:
    """Each cluster's mean, or its densest point where the mean lies lower (a bent cluster). Shape ``(K, dim)``."""
    found = []
    for k in present:
        members = points[torch.from_numpy(cluster == k)]
        tried = torch.cat([members.mean(0, keepdim=True), members])
        found.append(tried[int(log_joint.log_prob(tried.to(log_joint.device)).argmax())])
    return torch.stack(found)


def _open(log_joint: LogJoint, middles: Tensor) -> np.ndarray:
    """Whether two middles see each other over no barrier. Shape ``(K, K)``, boolean."""
    num = len(middles)
    first, second = torch.triu_indices(num, num, 1)
    share = torch.linspace(0, 1, STEPS, dtype=middles.dtype)[:, None, None]
    line = (1 - share) * middles[first] + share * middles[second]
    values = log_joint.log_prob(line.reshape(-1, middles.shape[1]).to(log_joint.device)).reshape(STEPS, -1).cpu()
    dip = torch.minimum(values[0], values[-1]) - values.amin(0)
    seen = np.eye(num, dtype=bool)
    seen[first.numpy(), second.numpy()] = (dip <= BARRIER).numpy()
    return seen | seen.T
