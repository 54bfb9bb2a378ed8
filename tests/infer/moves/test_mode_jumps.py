"""Shapes and shares of modes fitted before sampling; chains that start in wrong shares and end in the right ones."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.mode_jumps import ModeJump, fit_jump, mode_mixture
from pyro_sb.infer.moves.moves import HamiltonianMove, adapted
from pyro_sb.ops.student_mixture import StudentMixture

F64 = {"dtype": torch.float64}
Law = Callable[[Tensor], Tensor]


class Modes(NamedTuple):
    """A target of well-separated modes: log density, shares, where searches would end, and which mode a point is in."""

    log_density: Law
    shares: Tensor
    maxima: Tensor
    laws: list[Law]

    def mode_of(self, x: Tensor) -> Tensor:
        return torch.stack([law(x) for law in self.laws], -1).argmax(-1)

    @property
    def log_joint(self) -> LogJoint:
        return LogJoint.from_batched(self.log_density, self.maxima.shape[-1])


def mixed(shares: list[float], maxima: list[Tensor], laws: list[Law]) -> Modes:
    share = torch.tensor(shares, **F64)
    return Modes(
        lambda x: torch.logsumexp(torch.stack([law(x) for law in laws], -1) + share.log(), -1),
        share,
        torch.stack(maxima),
        laws,
    )


def normal(mean: Tensor, covariance: Tensor) -> Law:
    root = torch.linalg.cholesky(covariance)
    inverse = torch.linalg.inv(root)
    log_det = root.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
    return lambda x: -0.5 * ((x - mean) @ inverse.T).square().sum(-1) - log_det


def unlike_covariances(dim: int) -> Modes:
    """Sheet's T2: AR(1) of correlation .9, and independent coordinates of deviations from .3 to 2."""
    lag = (torch.arange(dim)[:, None] - torch.arange(dim)).abs()
    means = [torch.zeros(dim, **F64), torch.zeros(dim, **F64)]
    means[1][0] = 10.0
    covariances = [0.9 ** lag.double(), torch.diag(torch.linspace(0.3, 2, dim, **F64) ** 2)]
    return mixed([0.3, 0.7], means, [normal(*pair) for pair in zip(means, covariances, strict=True)])


def three_rotations(dim: int) -> Modes:
    """Sheet's T3: condition 1,000, each mode in its own rotation."""
    values = torch.logspace(-1.5, 1.5, dim, **F64)
    means, laws = [], []
    for k in range(3):
        axes = torch.linalg.qr(torch.randn(dim, dim, **F64)).Q
        covariance = axes * values @ axes.T
        means.append(12.0 * torch.eye(dim, **F64)[k])
        laws.append(normal(means[-1], 0.5 * (covariance + covariance.T)))
    return mixed([0.2, 0.3, 0.5], means, laws)


def unlike_shapes(dim: int) -> Modes:
    """Sheet's Skew: a normal, and the logarithm of a gamma of shape 5 in every coordinate."""
    gamma = lambda x: (5 * x - x.exp()).sum(-1) - dim * math.lgamma(5.0)  # noqa: E731
    low, high = torch.full((dim,), -3.0, **F64), torch.full((dim,), math.log(5.0), **F64)
    return mixed([0.3, 0.7], [low, high], [normal(low, torch.eye(dim, **F64)), gamma])


def window(log_joint: LogJoint, mixture: StudentMixture, x: Tensor, steps: int, eps: float) -> tuple[Tensor, float]:
    """States of local HMC, each mode in its own metric, ``(steps, C, d)``, and the step adapted on the way."""
    move = HamiltonianMove(mixture, 4, eps)
    log_density, kept = log_joint.log_prob(x), []
    for n in range(steps):
        move.num_steps = min(8, max(1, round(1.6 / move.step_size)))
        moved = move.step(log_joint, x, log_density)
        x, log_density = moved.x, moved.log_density
        move.step_size = min(1.6, adapted(move.step_size, moved.accept_prob, 0.8, 2.0 * (n + 1) ** -0.6))
        kept.append(x)
    return torch.stack(kept), move.step_size


def warm_up(target: Modes, starts: Tensor) -> tuple[ModeJump, Tensor, float]:
    """Local windows in every mode, in the wrong shares of the starts ``(64,)``; then the jump."""
    log_joint, (num, dim) = target.log_joint, target.maxima.shape
    near = torch.arange(num).repeat_interleave(2 * dim + 20)
    points = target.maxima[near] + 0.1 * torch.randn(len(near), dim, **F64)
    mixture = mode_mixture(points, log_joint.value_and_grad(points)[1], near)
    x, eps = target.maxima[starts] + 0.1 * torch.randn(len(starts), dim, **F64), 0.5 * (50 / dim) ** 0.25
    for steps in (20, 20):
        states, eps = window(log_joint, mixture, x, steps, eps)
        x, points = states[-1], states.flatten(0, 1)
        modes = mixture.log_responsibilities(points).argmax(-1)
        mixture = mode_mixture(points, log_joint.value_and_grad(points)[1], modes)
    jump = fit_jump(log_joint, points, modes)
    if jump.lengthen:
        states, eps = window(log_joint, jump.mixture, x, 150, eps)
        points = states.flatten(0, 1)
        jump = fit_jump(log_joint, points, jump.mixture.log_responsibilities(points).argmax(-1))
    return jump, points[torch.multinomial(jump.weights, len(starts), replacement=True)], eps


def shares_of(target: Modes, x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(target.mode_of(x), len(target.shares)).double().mean(0)


def variation(shares: Tensor, truth: Tensor) -> float:
    return 0.5 * float((shares - truth).abs().sum())


def starts_of(target: Modes, wrong: list[float]) -> Tensor:
    counts = torch.tensor([round(64 * share) for share in wrong])
    counts[-1] = 64 - counts[:-1].sum()
    return torch.arange(len(wrong)).repeat_interleave(counts)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [50, 100, 200])
@pytest.mark.parametrize("make", [unlike_covariances, three_rotations, unlike_shapes])
def test_shares_come_out_right_from_wrong_ones_in_seconds(make: Callable[[int], Modes], dim: int) -> None:
    target = make(dim)
    starts = starts_of(target, [0.6, 0.4] if len(target.shares) == 2 else [0.4, 0.35, 0.25])
    begin = time.process_time()
    jump, x, eps = warm_up(target, starts)
    warm = time.process_time() - begin
    log_joint = target.log_joint
    local = HamiltonianMove(jump.mixture, min(8, max(1, round(1.6 / eps))), eps)
    log_density, total, rate, steps = log_joint.log_prob(x), torch.zeros_like(target.shares), 0.0, 150
    for _ in range(steps):
        for move in (local, jump.move):
            moved = move.step(log_joint, x, log_density)
            x, log_density = moved.x, moved.log_density
        rate += float(moved.accept_prob.mean()) / steps
        total += shares_of(target, x) / steps
    seconds = time.process_time() - begin
    estimate, found = variation(jump.shares.log_shares.exp(), target.shares), variation(total, target.shares)
    print(
        f"\n{make.__name__} {dim}: {jump.move.name}, accepts {rate:.2f} of {jump.ceiling:.2f}, TV of the estimate"
        f" {estimate:.4f} (error {float(jump.shares.error.max()):.4f}), of the draws {found:.4f},"
        f" CPU s {warm:.1f} + {seconds - warm:.1f}"
    )
    assert found <= 0.02


@pytest.mark.parametrize("dim", [5, 50])
def test_shares_of_gaussian_modes_are_exact_whatever_the_draws(dim: int) -> None:
    # draws of twice the width, in wrong shares: neither the fit nor the shares depend on them
    target = unlike_covariances(dim)
    modes = torch.tensor([1, 0, 0]).repeat(2 * dim)
    points = target.maxima[modes] + 0.4 * torch.randn(len(modes), dim, **F64)
    jump = fit_jump(target.log_joint, points, 7 * modes)
    torch.testing.assert_close(jump.shares.log_shares.exp(), target.shares, rtol=0, atol=1e-4)
    assert jump.acceptance == pytest.approx(0.6, abs=0.08) and jump.ceiling == pytest.approx(0.6, abs=1e-3)
    assert jump.move.name == "warp" and not jump.lengthen
    assert torch.equal(jump.modes, modes)
    drawn = torch.zeros(2, **F64).index_add(0, modes, jump.weights)
    torch.testing.assert_close(drawn, target.shares, rtol=0, atol=1e-4)


def test_given_gradients_are_used_and_one_mode_is_refused() -> None:
    target = unlike_covariances(5)
    modes = torch.arange(2).repeat(40)
    points = target.maxima[modes] + 0.4 * torch.randn(80, 5, **F64)
    log_joint = target.log_joint
    value, grad = log_joint.value_and_grad(points)
    before = log_joint.evaluations.gradient
    fit_jump(log_joint, points, modes, gradients=grad, log_density=value)
    assert log_joint.evaluations.gradient == before
    with pytest.raises(ValueError, match="two modes"):
        fit_jump(log_joint, points, torch.zeros(80))


def test_few_draws_make_a_diagonal_fit() -> None:
    x, g = torch.randn(30, 20, **F64), torch.randn(30, 20, **F64)
    rho = mode_mixture(x, g, torch.arange(30) // 25)  # 25 and 5 draws
    assert (rho.scale_trils[0].tril(-1) != 0).any() and (rho.scale_trils[1].tril(-1) == 0).all()
