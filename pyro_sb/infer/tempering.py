"""Adaptively tempered sequential Monte Carlo from a mixture to a log joint."""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.potential import LogJoint
from pyro_sb.ops.leapfrog import PhasePoint, ValueAndGrad, leapfrog
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance
from pyro_sb.weights import effective_sample_size, normalise, systematic_resample

logger = logging.getLogger(__name__)


class Tempered(NamedTuple):
    """Equally weighted points ``(N, d)``, log p there, log evidence, number of levels, last acceptance rate."""

    points: Tensor
    log_density: Tensor
    log_evidence: float
    num_levels: int
    acceptance_rate: float


def temper(
    log_joint: LogJoint,
    base: StudentMixture,
    num_particles: int,
    *,
    ess_share: float = 0.5,
    sweeps: int = 3,
    num_steps: int = 4,
    max_levels: int = 100,
) -> Tempered:
    r"""Particles carried from a mixture :math:`q` to the target along :math:`\pi_\beta \propto q^{1 - \beta} p^\beta`.

    Each level raises :math:`\beta` until the incremental weights' effective sample size falls to ``ess_share``,
    resamples systematically, and moves every particle by Hamiltonian Monte Carlo preconditioned with the
    within-component covariance.

    Args:
        log_joint: Target.
        base: Normalised start law with a density.
        num_particles: Number of particles N.
        ess_share: Share of N that the effective sample size falls to in a level, in (0, 1).
        sweeps: HMC transitions a level.
        num_steps: Leapfrog steps a transition.
        max_levels: Largest number of levels; a run that does not reach the target by then is an error.

    References:
        Sequential Monte Carlo samplers (Del Moral, Doucet and Jasra, 2006), section 3.
    """
    x = base.sample(num_particles)
    log_p, grad_p = log_joint.value_and_grad(x)
    num_finite = int(torch.isfinite(log_p).sum())
    if num_finite < log_joint.dim + 2:  # too few to tell a shape: they would collapse to a point and look perfect
        raise ValueError(
            f"The log joint must be finite at {log_joint.dim + 2} draws of the start law or more, but is NaN or "
            f"infinite at all but {num_finite} of {num_particles}. Raise num_particles, or give points inside the "
            "support by start=."
        )
    beta, log_evidence, step_size, acceptance = 0.0, 0.0, 0.5, 0.0
    for level in range(1, max_levels + 1):
        log_ratio = log_p - base.log_prob(x)
        increment = _next_increment(log_ratio, 1.0 - beta, ess_share)
        log_weights = increment * log_ratio
        log_evidence += float(torch.logsumexp(log_weights, 0)) - math.log(num_particles)
        beta = min(1.0, beta + increment)
        scale = torch.linalg.cholesky(within_covariance(base, x, normalise(log_weights)))
        index = systematic_resample(normalise(log_weights), num_particles)
        x, log_p, grad_p = x[index], log_p[index], grad_p[index]
        for _ in range(sweeps):
            x, log_p, grad_p, acceptance = _hmc_sweep(
                log_joint, base, beta, x, log_p, grad_p, scale, step_size, num_steps
            )
            step_size *= min(2.0, max(0.2, 2.0 ** (4.0 * (acceptance - 0.75))))
        logger.debug("level %d: beta %.4g, acceptance %.2f, step %.3g", level, beta, acceptance, step_size)
        if beta >= 1.0:
            return Tempered(x, log_p, log_evidence, level, acceptance)
    raise RuntimeError(
        f"Tempering must reach the target, but stands at exponent {beta:.3g} of 1 after {max_levels} levels. "
        "Raise num_particles, or start nearer the target by start=."
    )


def within_covariance(base: StudentMixture, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted covariance about the mean of each point's likeliest component of ``base``. Shape ``(d, d)``."""
    label = base.log_responsibilities(points).argmax(-1)
    onehot = torch.nn.functional.one_hot(label, base.num_components).to(points.dtype) * weights[:, None]
    means = (onehot.T @ points) / onehot.sum(0).clamp_min(torch.finfo(points.dtype).tiny)[:, None]
    return weighted_covariance(points - means[label], weights)


def _next_increment(log_ratio: Tensor, remaining: float, ess_share: float) -> float:
    """Largest step of the temperature exponent whose weights keep the effective share, by bisection."""
    goal = ess_share * log_ratio.numel()
    if effective_sample_size(remaining * log_ratio) >= goal:
        return remaining
    low, high = 0.0, remaining
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective_sample_size(middle * log_ratio) >= goal else (low, middle)
    return max(low, 1e-12)


def _tempered(log_joint: LogJoint, base: StudentMixture, beta: float) -> ValueAndGrad:
    def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad_p = log_joint.value_and_grad(x)
        return beta * log_p + (1 - beta) * base.log_prob(x), beta * grad_p + (1 - beta) * base.score(x)

    return value_and_grad


def _hmc_sweep(
    log_joint: LogJoint,
    base: StudentMixture,
    beta: float,
    x: Tensor,
    log_p: Tensor,
    grad_p: Tensor,
    scale: Tensor,
    step_size: float,
    num_steps: int,
) -> tuple[Tensor, Tensor, Tensor, float]:
    start_value = beta * log_p + (1 - beta) * base.log_prob(x)
    start_grad = beta * grad_p + (1 - beta) * base.score(x)
    start = PhasePoint(x, torch.randn_like(x), start_value, start_grad)
    jitter = step_size * (0.6 + 0.8 * torch.rand(len(x), 1, dtype=x.dtype, device=x.device))
    end = leapfrog(start, _tempered(log_joint, base, beta), scale, jitter, num_steps)
    probability = torch.exp((start.energy - end.energy).clamp_max(0.0)).nan_to_num(0.0)
    accept = torch.rand_like(probability) < probability
    x = torch.where(accept[:, None], end.x, x)
    if beta > 0:  # recover p's own value and gradient from the tempered ones: no further evaluation
        end_log_p = (end.log_density - (1 - beta) * base.log_prob(end.x)) / beta
        end_grad_p = (end.grad - (1 - beta) * base.score(end.x)) / beta
        log_p = torch.where(accept, end_log_p, log_p)
        grad_p = torch.where(accept[:, None], end_grad_p, grad_p)
    return x, log_p, grad_p, float(probability.mean())
