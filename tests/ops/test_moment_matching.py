"""Moment steps: the Gaussian bridge at one go, scikit-learn's EM from a point, stationary where the likelihood is."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from pyro_sb.ops.closed_form import gaussian_bridge
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, equal_weights, matching_scale, moment_step
from tests.ops.potentials import F64, random_potential

full_or_not = pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])


def clusters(num, dim=2):
    """Draws of three rotated clusters."""
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]], **F64)[:, :dim]
    shear = torch.eye(dim, **F64) + 0.5 * torch.ones(dim, dim, **F64).triu(1)
    return centres[torch.randint(3, (num,))] + 0.6 * torch.randn(num, dim, **F64) @ shear


def sides(num=400):
    return equal_weights(torch.randn(num, 2, **F64) + 0.3), equal_weights(clusters(num))


def loss(potential, source, target):
    left = source.weights @ potential.normaliser().value(source.points)
    return left - target.weights @ potential.adjusted().value(target.points)


def moments(side):
    mean = side.weights @ side.points
    centred = side.points - mean
    return mean, (side.weights[:, None] * centred).T @ centred


def spd(dim, rank, batch=()):
    factor = torch.randn(*batch, dim, rank, **F64)
    return factor @ factor.mT / rank


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("rank", [0, 1, 3], ids=["point", "singular", "regular"])
def test_matching_scale_carries_one_covariance_to_the_other(dim, epsilon, rank):
    cov0 = spd(dim, max(rank, 1), (4,)) * (rank > 0)
    cov1 = spd(dim, dim + 1, (4,))
    scale = matching_scale(cov0, cov1, epsilon)
    torch.testing.assert_close(scale @ cov0 @ scale + epsilon * scale, cov1, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(scale, scale.mT, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(scale).min() >= -1e-12
    zero = torch.zeros(dim, **F64)
    for i in range(4):
        oracle = gaussian_bridge(zero, cov0[i], zero, cov1[i], epsilon).gain
        torch.testing.assert_close(scale[i], oracle, rtol=1e-9, atol=1e-11)


def test_matching_scale_takes_a_singular_target():
    cov0, cov1 = spd(3, 3), spd(3, 1)
    scale = matching_scale(cov0, cov1, 0.5)
    torch.testing.assert_close(scale @ cov0 @ scale + 0.5 * scale, cov1, rtol=1e-7, atol=1e-7)


def test_matching_scale_of_diagonals_is_that_of_diagonal_matrices():
    cov0, cov1 = torch.rand(2, 5, 3, **F64)
    cov0[0] = 0
    thick = matching_scale(torch.diag_embed(cov0), torch.diag_embed(cov1), 0.3)
    thin = matching_scale(cov0, cov1, 0.3, diagonal=True)
    torch.testing.assert_close(torch.diag_embed(thin), thick, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("epsilon", [0.1, 2.0])
@full_or_not
def test_one_component_is_the_gaussian_bridge_after_one_step(full, epsilon, seed):
    source = Side(torch.randn(50, 2, **F64) + 1, torch.rand(50, **F64))
    source = Side(source.points, source.weights / source.weights.sum())
    target = equal_weights(clusters(60))
    potential = random_potential(2, 1, full=full, epsilon=epsilon, seed=seed)
    found = moment_step(potential, source, target, floor=1e-9)
    (mean0, cov0), (mean1, cov1) = moments(source), moments(target)
    if not full:
        cov0, cov1 = (torch.diag(cov.diagonal()) for cov in (cov0, cov1))
    bridge = gaussian_bridge(mean0, cov0, mean1, cov1, epsilon)
    scale = found.scales[0] if full else torch.diag(found.scales[0])
    torch.testing.assert_close(scale, bridge.gain, rtol=1e-10, atol=1e-10)
    x0 = torch.randn(6, 2, **F64)
    torch.testing.assert_close(found.plan_moments(x0)[0], bridge.conditional(x0)[0], rtol=1e-10, atol=1e-10)
    again = moment_step(found, source, target, floor=1e-9)
    for a, b in zip(again[:3], found[:3]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@full_or_not
def test_from_a_point_a_step_is_scikit_learns_em_step(full):
    epsilon, points = 0.4, clusters(300)
    weights = torch.tensor([0.2, 0.5, 0.3], **F64)
    scales = random_potential(2, 3, full=full).scales
    potential = MixturePotential(weights.log(), torch.randn(3, 2, **F64), scales, epsilon)
    precisions = torch.linalg.inv(epsilon * scales) if full else 1 / (epsilon * scales)
    oracle = GaussianMixture(
        3,
        covariance_type="full" if full else "diag",
        max_iter=1,
        reg_covar=0.0,
        weights_init=weights.numpy(),
        means_init=potential.locs.numpy(),
        precisions_init=precisions.numpy(),
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        oracle.fit(points.numpy())
    found = moment_step(potential, equal_weights(torch.zeros(1, 2, **F64)), equal_weights(points), floor=1e-9)
    for ours, theirs in (
        (torch.softmax(found.log_weights, 0), oracle.weights_),
        (found.locs, oracle.means_),
        (epsilon * found.scales, oracle.covariances_),
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-10)


@full_or_not
def test_where_steps_stand_still_the_likelihood_is_stationary(full):
    source, target = sides()
    potential = random_potential(2, 3, full=full)
    for _ in range(1500):
        new = moment_step(potential, source, target, floor=1e-9)
        moved = max(float((a - b).abs().max()) for a, b in zip(new[:3], potential[:3]))
        potential = new
        if moved < 1e-11:
            break
    assert moved < 1e-8
    leaves = [part.clone().requires_grad_() for part in potential[:3]]
    slopes = list(torch.autograd.grad(loss(MixturePotential(*leaves, potential.epsilon), source, target), leaves))
    if full:  # S is symmetric: only so much of its slope counts
        slopes[2] = slopes[2] + slopes[2].mT
    assert max(float(s.abs().max()) for s in slopes) < 1e-7


@full_or_not
def test_steps_lower_the_loss(full):
    source, target = sides()
    potential = random_potential(2, 3, full=full)
    losses = []
    for _ in range(20):
        losses.append(float(loss(potential, source, target)))
        potential = moment_step(potential, source, target, floor=1e-9)
    assert losses[-1] < losses[0] - 0.1 and losses[-1] <= min(losses) + 1e-6


@full_or_not
def test_weights_are_duplicated_rows(full):
    (source, target), potential = sides(60), random_potential(2, 3, full=full)
    counts = torch.randint(1, 4, (60,))
    weighted = Side(target.points, counts / counts.sum().double())
    repeated = equal_weights(target.points.repeat_interleave(counts, 0))
    found, expected = (moment_step(potential, source, side, floor=1e-9, min_count=0) for side in (weighted, repeated))
    for a, b in zip(found[:3], expected[:3]):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@full_or_not
def test_the_floor_holds_and_lost_components_stay_put(full):
    potential = random_potential(2, 3, full=full)
    lost = potential._replace(locs=potential.locs + torch.tensor([[0.0], [0.0], [1e3]], **F64))
    source, target = sides()
    found = moment_step(lost, source, target, floor=0.25)
    scales = found.scales if full else torch.diag_embed(found.scales)
    assert torch.linalg.eigvalsh(scales[:2]).min() >= 0.25 - 1e-12
    assert torch.equal(found.locs[2], lost.locs[2]) and torch.equal(found.scales[2], lost.scales[2])
    assert not torch.equal(found.locs[0], lost.locs[0])
    assert all(bool(torch.isfinite(part).all()) for part in found[:3])
