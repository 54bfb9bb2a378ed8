"""Adaptively tempered sequential Monte Carlo from a mixture to a log joint."""

import logging
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sb.distributions import Draws
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.hamiltonian import TARGET_ACCEPTANCE, Rows, hmc_step
from pyro_sb.ops.leapfrog import PhasePoint, ValueAndGrad, leapfrog
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance
from pyro_sb.weights import effective_sample_size, normalise, systematic_resample

__all__ = ["NormalLaw", "Particles", "temper_bridge", "weighted_factor"]

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


# Tempered SMC from a bridge's density to the model's joint, for a batch of observations side by side


SWEEPS, FINAL_SWEEPS, NUM_STEPS, MAX_LEVELS = 8, 20, 6, 60


class PointLaw(Protocol):
    """A law with a density of points and its gradient, an observation a column."""

    def draws(self, num: int) -> Draws:
        """Draws ``(num, B, d)`` with their log density ``(num, B)``."""
        ...

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient."""
        ...


class NormalLaw:
    """Normal laws with given moments, to start from where a bridge knows the density of paths alone."""

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        self.mean, self.factor = mean, factor

    def draws(self, num: int) -> Draws:
        """Draws ``(num, B, d)`` with their log density."""
        noise = torch.randn(num, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        u = self.mean + (self.factor @ noise[..., None])[..., 0]
        return Draws(u, self.value_and_grad(u)[0])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient."""
        white = torch.linalg.solve_triangular(self.factor, (u - self.mean)[..., None], upper=False)
        grad = -torch.linalg.solve_triangular(self.factor.mT, white, upper=True)[..., 0]
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * u.shape[-1] * math.log(2 * math.pi)
        return -0.5 * white[..., 0].square().sum(-1) - log_det - constant, grad


class Particles(NamedTuple):
    """Equally weighted points ``(N, B, d)``, log evidence ``(B,)``, number of levels, last acceptance rate ``(B,)``."""

    points: Tensor
    log_evidence: Tensor
    num_levels: int
    acceptance: Tensor


def temper_bridge(law: PointLaw, target: Any, num: int) -> Particles:
    r"""Particles carried along :math:`q^{1 - \beta} p^\beta`, each observation at its own :math:`\beta`.

    A level raises each :math:`\beta` until half of the effective particles are left, resamples, and moves by
    Hamiltonian Monte Carlo in the particles' covariance, with steps spread over a decade: modes of many widths.

    Args:
        law: q.
        target: p, ``value_and_grad`` of rows ``(N * B, d)``.
        num: Particles N an observation.

    References:
        Sequential Monte Carlo samplers (Del Moral, Doucet and Jasra, 2006), section 3.
    """
    u = law.draws(num).value
    _, batch, dim = u.shape
    like = u.new_zeros(batch)
    beta, log_evidence, step = like.clone(), like.clone(), torch.full_like(like, 0.5)
    acceptance = like
    for level in range(1, MAX_LEVELS + 1):
        log_q, log_p = law.value_and_grad(u)[0], target.value_and_grad(u.reshape(-1, dim))[0].reshape(num, batch)
        ratio = torch.where(torch.isfinite(log_p), log_p - log_q, -torch.inf)
        if level == 1:
            _check_particles(ratio)
        increment = next_increment(ratio, 1 - beta)
        log_weights = torch.where(increment > 0, increment * ratio, torch.zeros_like(ratio))
        log_evidence = log_evidence + torch.logsumexp(log_weights, 0) - math.log(num)
        beta = beta + increment
        weights = torch.softmax(log_weights, 0)
        factor = weighted_factor(u, weights)
        u = torch.gather(u, 0, systematic(weights)[..., None].expand_as(u))
        last = bool((beta >= 1 - 1e-9).all())
        u, step, acceptance = sweep(law, target, u, beta, factor, step, FINAL_SWEEPS if last else SWEEPS)
        logger.debug(
            "level %d: smallest beta %.3g, acceptance %.2f", level, float(beta.min()), float(acceptance.mean())
        )
        if last:
            return Particles(u[torch.randperm(num, device=u.device)], log_evidence, level, acceptance)
    raise RuntimeError(
        f"tempering must reach the posterior, but stands at exponent {float(beta.min()):.3g} of 1 after {MAX_LEVELS} "
        "levels. Fit the bridge on more simulations, or sample the conditioned model by KernelLangevin."
    )


def _check_particles(ratio: Tensor) -> None:
    """Some particle of each observation must have a weight. ``(N, B)``."""
    bad = int(torch.isneginf(ratio).all(0).sum())
    if bad:
        raise RuntimeError(
            f"no particle of {len(ratio)} has a finite log joint at {bad} of {ratio.shape[1]} observations. Check that "
            "the model can have made the data, raise num_proposals, or fit on more simulations."
        )


def sweep(
    law: PointLaw, target: Any, u: Tensor, beta: Tensor, factor: Tensor, step: Tensor, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """HMC moves of all particles at their temperatures; the steps follow the acceptance of their observation."""
    num, batch, dim = u.shape
    weight = beta.expand(num, batch)

    def tempered(x: Tensor) -> tuple[Tensor, Tensor]:
        points = x.reshape(num, batch, dim)
        log_p, grad_p = (a.reshape(num, batch, *a.shape[1:]) for a in target.value_and_grad(x))
        log_q, grad_q = law.value_and_grad(points)
        value = weight * log_p + (1 - weight) * torch.where(weight < 1, log_q, torch.zeros_like(log_q))
        grad = weight[..., None] * grad_p + (1 - weight[..., None]) * grad_q
        return value.reshape(-1), grad.nan_to_num(0.0).reshape(-1, dim)

    rows = Rows(u.reshape(-1, dim), *tempered(u.reshape(-1, dim)))
    scale = factor.expand(num, batch, dim, dim).reshape(-1, dim, dim)
    acceptance = torch.zeros_like(step)
    for _ in range(sweeps):
        each = step.expand(num, batch).reshape(-1, 1)
        rows, probability = hmc_step(tempered, rows, scale, each, num_steps=NUM_STEPS, spread=10.0)
        acceptance = probability.reshape(num, batch).mean(0)
        step = step * (1.5 * (acceptance - TARGET_ACCEPTANCE)).exp()
    return rows.x.reshape(num, batch, dim), step, acceptance


def next_increment(ratio: Tensor, remaining: Tensor) -> Tensor:
    """Largest steps of the exponents whose weights keep half of the effective particles, by bisection. ``(B,)``."""
    goal = 0.5 * len(ratio)

    def fair(step: Tensor) -> Tensor:
        scaled = torch.where(step > 0, step * ratio, torch.zeros_like(ratio))
        return 1 / torch.softmax(scaled, 0).square().sum(0) >= goal

    low, high = torch.zeros_like(remaining), remaining
    for _ in range(40):
        middle = 0.5 * (low + high)
        good = fair(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(fair(remaining), remaining, low.clamp_min(1e-9).minimum(remaining))


def systematic(weights: Tensor) -> Tensor:
    """Systematic resampling of every column: indices ``(N, B)``."""
    num, batch = weights.shape
    offset = torch.rand(batch, 1, dtype=weights.dtype, device=weights.device)
    grid = (torch.arange(num, dtype=weights.dtype, device=weights.device) + offset) / num
    return torch.searchsorted(weights.T.cumsum(1).contiguous(), grid).clamp_max(num - 1).T


def weighted_factor(u: Tensor, weights: Tensor) -> Tensor:
    """Cholesky factor of the weighted covariance of every observation. ``(N, B, d)`` to ``(B, d, d)``."""
    mean = (weights[..., None] * u).sum(0)
    centred = u - mean
    covariance = torch.einsum("nb,nbi,nbj->bij", weights, centred, centred)
    spread = centred.square().mean(0).clamp_min(1e-12)
    return torch.linalg.cholesky(
        covariance
        + 1e-4 * torch.diag_embed(torch.minimum(covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12), spread))
    )
