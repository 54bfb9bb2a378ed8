"""Where the fit of a Gaussian-mixture potential starts: clusters of the target, carried to the bridge's epsilon."""

import math

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, equal_weights, matching_scale, moment_step

MAX_POINTS = 4096
WIDE = 1.0  # epsilon, in units of the target's variance, at which gates are soft
STEPS_A_STAGE = 2


@torch.no_grad()
def cluster_start(
    source: Tensor, target: Side, num_components: int, epsilon: float, *, floor: float, diagonal: bool
) -> MixturePotential:
    r"""Potential from k-means clusters of the target, by moment steps along a ladder of falling epsilons.

    At small epsilon the gates saturate and a component that begins without source mass stays without; so the ladder
    starts where they are soft, at about the target's variance, and falls by 4 a stage.

    Args:
        source: Points at time 0. Shape ``(n, d)``; a single row is a point source.
        target: Weighted points at time 1, of about unit variance.
        num_components: J, at most the number of target points.
        epsilon: Reference variance in the same units.
        floor: Smallest eigenvalue of S.
        diagonal: Form of the covariances.
    """
    points = target.points
    labels = _clusters(target, num_components)
    gates = torch.nn.functional.one_hot(labels, num_components).to(points) * target.weights[:, None]
    mass = gates.sum(0).clamp_min(1e-8)  # a cluster may be empty
    mean = (gates.T @ points) / mass[:, None]
    centred = points - mean[labels]
    variance = (gates.T @ centred.square()) / mass[:, None] + 1e-3 * _within(centred, target.weights)
    cov1 = variance if diagonal else torch.diag_embed(variance)
    ladder = [epsilon] if len(source) == 1 else _ladder(epsilon)
    potential = _matched(source, ladder[0], mass, mean, cov1, floor, diagonal)
    ends = equal_weights(source), target
    for stage in ladder:
        potential = _carried(potential, ends[0], stage)
        for _ in range(STEPS_A_STAGE):
            potential = moment_step(potential, *ends, floor=floor)
    return potential


def _clusters(target: Side, num: int) -> Tensor:
    if num == 1:
        return torch.zeros(len(target.points), dtype=torch.long, device=target.points.device)
    seed = int(torch.randint(2**31, ()))
    kmeans = KMeans(num, n_init=4, max_iter=30, random_state=seed)  # one start may merge two modes
    labels = kmeans.fit_predict(target.points.cpu().double().numpy(), sample_weight=target.weights.cpu().numpy())
    return torch.as_tensor(labels, dtype=torch.long, device=target.points.device)


def _within(centred: Tensor, weights: Tensor) -> Tensor:
    """Pooled variance within clusters, never zero."""
    return (weights @ centred.square()).clamp_min(1e-6)


def _ladder(epsilon: float) -> list[float]:
    stages = max(0, math.ceil(math.log(WIDE / epsilon, 4))) if epsilon < WIDE else 0
    return [epsilon * 4.0**k for k in range(stages, -1, -1)]


def _matched(
    source: Tensor, epsilon: float, mass: Tensor, mean: Tensor, cov1: Tensor, floor: float, diagonal: bool
) -> MixturePotential:
    """Components that carry the whole source to each cluster."""
    mean0 = source.mean(0)
    variance0 = (source - mean0).square().mean(0)
    cov0 = variance0 if diagonal else torch.diag(variance0)
    scales = matching_scale(cov0, cov1, epsilon, diagonal=diagonal)
    scales = scales.clamp_min(floor) if diagonal else scales + floor * torch.eye(len(mean0)).to(scales)
    locs = mean - (scales * mean0 if diagonal else scales @ mean0)
    return _with_masses(MixturePotential(mass.log(), locs, scales, epsilon), source, mass)


def _with_masses(potential: MixturePotential, source: Tensor, mass: Tensor) -> MixturePotential:
    """Log weights such that the plan puts ``mass`` on each component: iterative scaling."""
    for _ in range(10):
        gates = potential.normaliser().gates(source).mean(0).clamp_min(1e-8)
        potential = potential._replace(log_weights=potential.log_weights + (mass / gates).log().clamp(-5.0, 5.0))
    return potential


def _carried(potential: MixturePotential, source: Side, epsilon: float) -> MixturePotential:
    """The same plan's component moments under another epsilon."""
    if epsilon == potential.epsilon:
        return potential
    gates = potential.normaliser().gates(source.points) * source.weights[:, None]
    mass = gates.sum(0).clamp_min(1e-8)
    mean0 = (gates.T @ source.points) / mass[:, None]
    centred = source.points[:, None, :] - mean0
    if potential.diagonal:
        cov0 = (gates[..., None] * centred.square()).sum(0) / mass[:, None]
        cov1 = potential.epsilon * potential.scales + potential.scales.square() * cov0
        scales = matching_scale(cov0, cov1, epsilon, diagonal=True)
        locs = potential.locs + (potential.scales - scales) * mean0
    else:
        cov0 = torch.einsum("nj,nja,njb->jab", gates, centred, centred) / mass[:, None, None]
        cov1 = potential.epsilon * potential.scales + potential.scales @ cov0 @ potential.scales
        scales = matching_scale(cov0, cov1, epsilon)
        locs = potential.locs + ((potential.scales - scales) @ mean0[..., None])[..., 0]
    return _with_masses(MixturePotential(potential.log_weights, locs, scales, epsilon), source.points, mass)
