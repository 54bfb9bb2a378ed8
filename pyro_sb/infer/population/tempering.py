r"""Adaptively tempered sequential Monte Carlo, :math:`\pi_\beta \propto q^{1 - \beta} p^\beta`, B targets at once."""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sb.distributions import Draws
from pyro_sb.infer.moves.moves import Rows, adapted, hmc_step, jittered
from pyro_sb.ops.student_mixture import StudentMixture, within_covariance
from pyro_sb.weights import systematic_resample

__all__ = [
    "Level",
    "MixtureLaw",
    "NormalLaw",
    "Particles",
    "PointLaw",
    "neighbour_factor",
    "next_increment",
    "temper",
    "weighted_factor",
    "within_factor",
]

logger = logging.getLogger(__name__)
TARGET_ACCEPT, GAIN = 0.75, 2.0
NEIGHBOURS = 8
Metric = Callable[[Tensor, Tensor], Tensor]


class PointLaw(Protocol):
    """A start law with a density of points and its gradient, a target a column."""

    def draws(self, num: int) -> Draws:
        """Draws ``(num, B, d)`` with their log density ``(num, B)``."""
        ...

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient. ``(num, B, d)`` to ``(num, B)`` and ``(num, B, d)``."""
        ...


class RowTarget(Protocol):
    """A target of rows that run over the columns fastest."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient. ``(num * B, d)`` to ``(num * B,)`` and ``(num * B, d)``."""
        ...


class NormalLaw:
    r"""Normal laws :math:`N(m_b, L_b L_b^\top)`: a start where a bridge knows the density of paths alone.

    Args:
        mean: m. Shape ``(B, d)``.
        factor: L, lower triangular. Shape ``(B, d, d)``.
    """

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


class MixtureLaw:
    """A Student-t mixture as the start law of one target."""

    def __init__(self, mixture: StudentMixture) -> None:
        self.mixture = mixture

    def draws(self, num: int) -> Draws:
        """Draws ``(num, 1, d)`` with their log density."""
        x = self.mixture.sample(num)
        return Draws(x[:, None], self.mixture.log_prob(x)[:, None])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient."""
        x = u[:, 0]
        return self.mixture.log_prob(x)[:, None], self.mixture.score(x)[:, None]


class Level(NamedTuple):
    """Particles of one temperature.

    Attributes:
        points: Shape ``(N, B, d)``.
        log_start: The start laws' log densities there. Shape ``(N, B)``.
        log_density: The targets' log densities there. Shape ``(N, B)``.
        exponent: Shape ``(B,)``.
        log_evidence: Of the tempered densities. Shape ``(B,)``.
    """

    points: Tensor
    log_start: Tensor
    log_density: Tensor
    exponent: Tensor
    log_evidence: Tensor


class Particles(NamedTuple):
    """Equally weighted draws of B targets.

    Attributes:
        points: Shape ``(N, B, d)``.
        log_density: The targets' log densities there. Shape ``(N, B)``.
        log_evidence: Shape ``(B,)``.
        num_levels: Temperatures that were passed.
        acceptance: Of the last transitions. Shape ``(B,)``.
        levels: The particles of all temperatures, those of the start laws first; only where they were asked for.
    """

    points: Tensor
    log_density: Tensor
    log_evidence: Tensor
    num_levels: int
    acceptance: Tensor
    levels: tuple[Level, ...] = ()

    def visited(self, column: int = 0) -> tuple[Tensor, Tensor]:
        """Particles of one target at all temperatures, and the target's log density there."""
        points = torch.cat([level.points[:, column] for level in self.levels])
        return points, torch.cat([level.log_density[:, column] for level in self.levels])


def weighted_factor(u: Tensor, weights: Tensor) -> Tensor:
    """Cholesky factor of each column's weighted covariance. ``(N, B, d)`` and ``(N, B)`` to ``(B, d, d)``."""
    centred = u - (weights[..., None] * u).sum(0)
    covariance = torch.einsum("nb,nbi,nbj->bij", weights, centred, centred)
    spread = centred.square().mean(0).clamp_min(1e-12)
    return torch.linalg.cholesky(
        covariance
        + 1e-4 * torch.diag_embed(torch.minimum(covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12), spread))
    )


def neighbour_factor(u: Tensor, weights: Tensor, num: int = 512) -> Tensor:
    """Cholesky factor of the covariance of differences between near neighbours: the spread within regions.

    Some particles are drawn by weight, whitened, and each paired with its nearest ones, twice: the second time in the
    metric of the first. For one target: ``(N, 1, d)`` and ``(N, 1)`` to ``(1, d, d)``. It is scaled to the covariance
    of one region where there is but one.
    """
    factor = weighted_factor(u, weights)
    x = u[systematic_resample(weights[:, 0], min(num, len(u))), 0].unique(dim=0)
    if len(x) <= 4 * x.shape[-1] + NEIGHBOURS:
        return factor
    for _ in range(2):
        white = torch.linalg.solve_triangular(factor[0], x.T, upper=False).T
        index = torch.cdist(white, white).topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
        differences = (white[index] - white[:, None]).flatten(0, 1)
        scatter = differences.T @ differences / (2 * len(differences))
        scatter = scatter / _shrunk(white, index)
        ridge = 1e-6 * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device) * scatter.diagonal().mean()
        factor = (factor[0] @ torch.linalg.cholesky(scatter + ridge))[None]
    return factor


def _shrunk(white: Tensor, index: Tensor) -> float:
    """By how much the squared distances to so many neighbours fall short of those of pairs, for a normal law."""
    like = torch.randn_like(white)
    near = torch.cdist(like, like).topk(index.shape[1] + 1, largest=False).values[:, 1:]
    return float(near.square().mean()) / (2 * white.shape[-1])


def within_factor(base: StudentMixture, u: Tensor, weights: Tensor) -> Tensor:
    """Cholesky factor of `within_covariance` for one target. ``(N, 1, d)`` and ``(N, 1)`` to ``(1, d, d)``."""
    return torch.linalg.cholesky(within_covariance(base, u[:, 0], weights[:, 0]))[None]


def temper(
    law: PointLaw,
    target: RowTarget,
    num: int,
    *,
    metric: Metric = weighted_factor,
    ess_share: float = 0.5,
    sweeps: int = 3,
    final_sweeps: int | None = None,
    num_steps: int = 4,
    spread: float = 2.3,
    max_levels: int = 100,
    forgetting: float = 0.0,
    keep_levels: bool = False,
    cure: str = "more particles, or a start law nearer the target",
) -> Particles:
    r"""Particles carried along :math:`q^{1 - \beta} p^\beta`, each of B targets at its own :math:`\beta`.

    A level raises each :math:`\beta` until the incremental weights' effective sample size falls to ``ess_share``,
    resamples systematically, and moves every particle by Hamiltonian Monte Carlo. Step sizes follow the acceptance of
    their own column. The evidence is unbiased but for the levels, which the particles choose: its bias falls as 1 / N.

    Args:
        law: q, normalised.
        target: p, in rows ``(N * B, d)`` that run over the targets fastest.
        num: Particles N a target.
        metric: Factors ``(B, d, d)`` of the metric from points ``(N, B, d)`` and weights ``(N, B)``.
        ess_share: Share of N that the effective sample size falls to in a level, in (0, 1).
        sweeps: HMC transitions a level.
        final_sweeps: HMC transitions of the last level. None: ``sweeps``.
        num_steps: Leapfrog steps a transition.
        spread: Ratio of the largest to the smallest step: modes of many widths ask for a large one.
        max_levels: Largest number of levels; a run that does not reach the targets by then is an error.
        forgetting: Sweeps of a level end when the correlation of the particles' log ratio p / q with its values at the
            resampling falls to this, in every column. 0: all sweeps are made.
        keep_levels: Keep the particles of every temperature, also of a run that does not reach the targets.
        cure: What errors tell the caller to write, in the words of the caller's own options.

    Raises:
        ValueError: The log joint is finite at fewer than d + 2 draws of a start law: too few to know a shape.
        RuntimeError: The targets were not reached.

    References:
        Sequential Monte Carlo samplers (Del Moral, Doucet and Jasra, 2006), section 3.
    """
    u = law.draws(num).value
    batch, levels = u.shape[1], list[Level]()
    beta, log_evidence, acceptance = (u.new_zeros(batch) for _ in range(3))
    step_size = torch.full_like(beta, 0.5)
    for level in range(1, max_levels + 1):
        (log_q, grad_q), (log_p, grad_p) = law.value_and_grad(u), _columns(target, u)
        ratio = torch.where(torch.isfinite(log_p), log_p - log_q, -torch.inf)
        if level == 1:
            _check_finite(ratio, u.shape[-1] + 2, cure)
        if keep_levels:
            levels.append(Level(u, log_q, log_p, beta, log_evidence))
        increment = next_increment(ratio, 1 - beta, ess_share)
        log_weights = _scaled(increment, ratio)
        log_evidence = log_evidence + torch.logsumexp(log_weights, 0) - math.log(num)
        beta = torch.where(increment < 1 - beta, beta + increment, torch.ones_like(beta))
        weights = torch.softmax(log_weights, 0)
        factor = metric(u, weights)
        index = systematic_resample(weights, num)
        u, log_q, log_p, grad_q, grad_p = (_gathered(part, index) for part in (u, log_q, log_p, grad_q, grad_p))
        last = bool((beta >= 1).all())
        rows = _tempered_rows(beta, u, log_p, grad_p, log_q, grad_q)
        scale = factor[0] if batch == 1 else factor.repeat(num, 1, 1)
        before = _gathered(ratio, index)
        for _ in range(final_sweeps if last and final_sweeps is not None else sweeps):
            step = jittered(step_size.repeat(num)[:, None], spread, rows.x)
            moved = hmc_step(_tempered(law, target, beta, num), rows.with_momentum(), scale, step, num_steps)
            rows, acceptance = moved.rows, moved.accept_prob.reshape(num, batch).mean(0)
            step_size = adapted(step_size, moved.accept_prob, TARGET_ACCEPT, GAIN)
            if forgetting and _kept(before, _ratio(rows, beta, law, u.shape)) < forgetting:
                break
        u = rows.x.reshape(u.shape)
        logger.debug("level %d: least beta %.4g, acceptance %.2f", level, float(beta.min()), float(acceptance.mean()))
        if last:  # every exponent is 1, and the rows' density that of the targets
            log_p = rows.log_density.reshape(num, batch)
            if keep_levels:
                levels.append(Level(u, law.value_and_grad(u)[0], log_p, beta, log_evidence))
            return Particles(u, log_p, log_evidence, level, acceptance, tuple(levels))
    if keep_levels:
        return Particles(u, levels[-1].log_density, log_evidence, max_levels, acceptance, tuple(levels))
    raise RuntimeError(
        f"tempering must reach its target, but stands at exponent {float(beta.min()):.3g} of 1 after {max_levels} "
        f"levels. Use {cure}."
    )


def next_increment(ratio: Tensor, remaining: Tensor, ess_share: float = 0.5) -> Tensor:
    """Largest steps of the exponents whose weights keep the effective share, by bisection.

    Args:
        ratio: Log of target over start law at the particles. Shape ``(N, B)``.
        remaining: What the exponents lack of 1. Shape ``(B,)``.
        ess_share: Share of N, in (0, 1).

    Returns:
        Shape ``(B,)``.
    """

    def fair(step: Tensor) -> Tensor:
        return 1 / torch.softmax(_scaled(step, ratio), 0).square().sum(0) >= ess_share * len(ratio)

    low, high = torch.zeros_like(remaining), remaining
    for _ in range(60):
        middle = 0.5 * (low + high)
        good = fair(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(fair(remaining), remaining, low.clamp_min(1e-12).minimum(remaining))


def _scaled(step: Tensor, ratio: Tensor) -> Tensor:
    """Weights of a step: equal ones of a step of zero, also where the ratio is minus infinity."""
    return torch.where(step > 0, step * ratio, torch.zeros_like(ratio))


def _columns(target: RowTarget, u: Tensor) -> tuple[Tensor, Tensor]:
    """Log density and gradient in columns."""
    value, grad = target.value_and_grad(u.reshape(-1, u.shape[-1]))
    return value.reshape(u.shape[:-1]), grad.reshape(u.shape)


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``(N, B)`` of each column of ``(N, B)`` or ``(N, B, d)``."""
    return torch.gather(values, 0, index.reshape(index.shape + (1,) * (values.dim() - 2)).expand_as(values))


def _tempered_rows(beta: Tensor, u: Tensor, log_p: Tensor, grad_p: Tensor, log_q: Tensor, grad_q: Tensor) -> Rows:
    """Points with the value and gradient of their tempered density; at exponent 1 the start law has no say."""
    value = beta * log_p + torch.where(beta < 1, (1 - beta) * log_q, torch.zeros_like(log_q))
    grad = beta[:, None] * grad_p + torch.where(beta[:, None] < 1, (1 - beta[:, None]) * grad_q, 0.0)
    return Rows(u.reshape(-1, u.shape[-1]), value.reshape(-1), grad.nan_to_num(0.0).reshape(-1, u.shape[-1]))


def _tempered(law: PointLaw, target: RowTarget, beta: Tensor, num: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The tempered density of rows."""

    def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
        u = x.reshape(num, len(beta), -1)
        rows = _tempered_rows(beta, u, *_columns(target, u), *law.value_and_grad(u))
        return rows.log_density, rows.grad

    return value_and_grad


def _ratio(rows: Rows, beta: Tensor, law: PointLaw, shape: torch.Size) -> Tensor:
    r"""Log of p / q at rows whose tempered density is known: :math:`(\log \pi_\beta - \log q) / \beta`. ``(N, B)``."""
    log_q = law.value_and_grad(rows.x.reshape(shape))[0]
    return (rows.log_density.reshape(log_q.shape) - log_q) / beta.clamp_min(1e-12)


def _kept(before: Tensor, after: Tensor) -> float:
    """Largest correlation over the columns of ``(N, B)`` between ranks before and after; ranks bear any tail."""
    ranks = [values.argsort(0).argsort(0).double() for values in (before, after)]
    first, second = (rank - rank.mean(0) for rank in ranks)
    return float(((first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))).max())


def _check_finite(ratio: Tensor, least: int, cure: str) -> None:
    """Too few particles to know a shape would collapse to a point, and look perfect. ``(N, B)``."""
    finite = (~torch.isneginf(ratio)).sum(0)
    bad = int((finite < least).sum())
    if bad:
        raise ValueError(
            f"The log joint must be finite at {least} draws of the start law or more, got {int(finite.min())} of "
            f"{len(ratio)} (at {bad} of {len(finite)} observations). Check that the model can have made the data, or "
            f"use {cure}."
        )
