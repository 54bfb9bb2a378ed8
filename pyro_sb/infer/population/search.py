r"""Maxima of a log joint by Newton ascents of many starts: what they met, and how much evidence is still unmet."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.ascent import quasi_newton_ascent
from pyro_sb.infer.population.thrift import thrifty
from pyro_sb.stages import announce

__all__ = [
    "MANY_DIMENSIONS",
    "UNMET",
    "Optima",
    "climb",
    "derivatives",
    "dispersed_starts",
    "empty_optima",
    "find_optima",
    "newton_ascent",
    "prior_draws",
    "relevant",
]

STARTS_A_MODE = 12
MANY_STARTS = 2048  # where two maxima are met: a third may be as far from both as they are from each other
FIRST_BATCH, LARGEST_BATCH = 64, 4096
STEP_LENGTHS = (16.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.005)
FLATTEST = 1e-7  # curvature over the largest, in coordinates of unit curvature, below which a direction is flat
FEW = 3
MANY_DIMENSIONS = 20  # above which a Hessian is not taken at every step
MAX_FAILURES = 4  # ends that are no maxima, before the search of a batch ends
UNMET = 0.01  # share of the evidence in maxima met once, above which the search goes on
ROWS = 500_000  # of gradients that the search may take, counted for ascents of ten steps of a model of no size
STEPS, NUMBERS = 10, 50  # a run of the model that holds so many numbers costs twice as much
HELD = 2**21  # coordinates of shifted starts that are held at a time
RELEVANT = 15.0  # nats of Laplace evidence below the best at which a maximum is left out


class Optima(NamedTuple):
    """Distinct maxima, best first.

    Args:
        points: Locations. Shape ``(K, d)``.
        log_density: Log joint there. Shape ``(K,)``.
        precisions: Minus the Hessian, positive definite. Shape ``(K, d, d)``.
        log_laplace: Laplace's log evidence of every maximum. Shape ``(K,)``.
        hits: How many starts ended in each. Shape ``(K,)``.
        num_starts: Starts tried in all; the others ended without a maximum.
    """

    points: Tensor
    log_density: Tensor
    precisions: Tensor
    log_laplace: Tensor
    hits: Tensor
    num_starts: int

    @property
    def unmet(self) -> float:
        """Estimate of the evidence in maxima not met yet, as a share: that of the maxima met once (Good and Turing)."""
        return float(torch.softmax(self.log_laplace, 0)[self.hits == 1].sum())

    @property
    def rare(self) -> float:
        """Share of the evidence in maxima that three ascents or fewer met: more of their kind may be unmet."""
        return float(torch.softmax(self.log_laplace, 0)[self.hits <= FEW].sum())


def find_optima(log_joint: LogJoint, *, hints: Tensor | None = None, max_iter: int = 60) -> Optima:
    r"""Maxima of a log joint from overdispersed starts, until little evidence is left unmet.

    An eighth of the starts is uniform on (-2, 2), an eighth five times as wide, the rest prior draws times a half, 1
    and 2, or where the prior cannot be drawn wider starts. Batches double until the maxima that one start alone met
    hold less than 1 % of the evidence by Laplace's method, there are twelve starts a maximum, and, once two maxima are
    met, 2,048 starts; fewer, but 128, where there are many dimensions or a run of the model is long, and fewer still,
    but 24, where it runs over much data.

    Args:
        log_joint: Target on the unconstrained vector.
        hints: Points to start from besides, in the first batch. Shape ``(M, d)``.
        max_iter: Largest number of Newton iterations of a start.

    Returns:
        The maxima within 15 nats of the best Laplace evidence; empty (K = 0) if no start ended in one, as on a funnel.

    References:
        The population frequencies of species and the estimation of population parameters (Good, 1953).
    """
    announce("search")
    found, fewest = empty_optima(log_joint), thrifty(log_joint, FIRST_BATCH, STARTS_A_MODE)
    cost = (1 + log_joint.run_size / NUMBERS) * STEPS * (2 * log_joint.dim + 3)
    affordable = max(2 * fewest, min(MANY_STARTS, round(ROWS / cost)))
    batch = fewest
    while True:
        found = climb(log_joint, found, dispersed_starts(log_joint, batch, hints), max_iter)
        num = len(found.points)
        wanted = STARTS_A_MODE * num if num < 2 else max(STARTS_A_MODE * num, affordable)
        if num == 0 or (found.num_starts >= wanted and found.unmet < UNMET) or found.num_starts >= 4 * affordable:
            return relevant(found)
        hints, batch = None, min(2 * batch, LARGEST_BATCH, max(fewest, affordable - found.num_starts))


def climb(log_joint: LogJoint, found: Optima, starts: Tensor, max_iter: int = 60) -> Optima:
    """The maxima that are known and those in which ascents from ``starts`` ``(S, d)`` end."""
    if log_joint.dim > MANY_DIMENSIONS:
        return _climb_without_hessians(log_joint, found, starts, max_iter)
    ends, log_density, precisions, converged = newton_ascent(log_joint, starts, max_iter)
    return _merge(found, ends[converged], log_density[converged], precisions[converged], len(ends))


def _climb_without_hessians(log_joint: LogJoint, found: Optima, starts: Tensor, max_iter: int) -> Optima:
    """Quasi-Newton ascents, and Newton's method from the best end that lies at no known maximum, until there is none.

    A Hessian takes 2 d gradients: in many dimensions it is spent on ends and not on every step of every start.
    """
    units = curvature_units(minus_hessian(log_joint, starts[:1])).expand_as(starts)
    ends, log_density = quasi_newton_ascent(log_joint, starts, units)
    left = torch.isfinite(log_density)
    num_starts, failed = found.num_starts + len(starts), 0
    while bool(left.any()) and failed < MAX_FAILURES:
        best = int(log_density.where(left, -math.inf).argmax())
        end, value, precision, converged = newton_ascent(log_joint, ends[best : best + 1], max_iter)
        left[best] = False
        if not bool(converged[0]):
            failed += 1
            continue
        found = _merge(found, end, value, precision, 1)
        for i in left.nonzero().squeeze(-1).tolist():
            near = _near(found, ends[i], max(9.0, 0.25 * log_joint.dim))
            if len(near):
                found.hits[near[0]] += 1
                left[i] = False
    return found._replace(num_starts=num_starts)


def relevant(optima: Optima) -> Optima:
    """The maxima within 15 nats of the best Laplace evidence."""
    if not len(optima.points):
        return optima
    keep = optima.log_laplace > optima.log_laplace.max() - RELEVANT
    return _select(optima, keep.nonzero().flatten())


def dispersed_starts(log_joint: LogJoint, num: int, hints: Tensor | None = None) -> Tensor:
    """Overdispersed starts with a finite log joint, ``(n, dim)``; raises if there is none.

    Args:
        log_joint: Target.
        num: Number of starts tried besides the hints.
        hints: Points that are tried as they are. Shape ``(M, dim)``.
    """
    parts = [] if hints is None else [hints[:num]]
    eighth, quarter = num // 8, num // 4
    try:
        usual = log_joint.start(min(num, LARGEST_BATCH // 8)).to(torch.float64)
        parts += [_repeated(usual, num - 3 * quarter - eighth), 5.0 * _repeated(usual, eighth)]
        drawn = prior_draws(log_joint, 3 * quarter)
        wide = 5.0 * _repeated(usual, 3 * quarter) if drawn is None else drawn
        scales = wide.new_tensor([0.5, 1.0, 2.0]).repeat_interleave(quarter)[:, None]
        parts.append(scales * wide)
    except ValueError:  # no start of its own is finite: the hints must do
        if hints is None:
            raise
    points = torch.cat([part.to(torch.float64) for part in parts])
    finite = torch.isfinite(log_joint.log_prob(points))
    if not bool(finite.any()):
        raise ValueError(
            f"The log joint must be finite somewhere, but it is NaN or infinite at all of {len(points)} starts. "
            "Check the data and the support of every site, or pass initial points by start= or initial_params=."
        )
    return points[finite]


def _repeated(points: Tensor, num: int) -> Tensor:
    """So many starts: the points in turn, each but the first round moved by the difference of two others."""
    index = torch.arange(num, device=points.device) % len(points)
    if num <= len(points):
        return points[index]
    pick = torch.randint(len(points), (2, num), device=points.device)
    fresh = (torch.arange(num, device=points.device) >= len(points))[:, None]
    return points[index] + 0.5 * fresh * (points[pick[0]] - points[pick[1]])


def prior_draws(log_joint: LogJoint, num: int) -> Tensor | None:
    """Prior draws, unconstrained, ``(num, dim)``; None where the prior is improper or there is no model."""
    try:
        return log_joint.prior(num).to(torch.float64)
    except (NotImplementedError, ValueError, RuntimeError):
        return None


def newton_ascent(log_joint: LogJoint, starts: Tensor, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Saddle-free Newton ascent of a batch, in coordinates that have unit curvature along each axis.

    .. math:: x \mathrel{+}= s\, U |U H U|^{-1} U \nabla \log p, \quad U = |\operatorname{diag} H|^{-1/2}, \quad s
              \text{ the best of eight lengths.}

    So units do not matter: coefficients at -6e4 are met like those at 1. The Hessian is a central difference of the
    batched gradient, which one call gives with it: 2 d + 1 rows a start, no second derivatives.

    Returns:
        Ends ``(S, d)``, log densities ``(S,)``, minus Hessians ``(S, d, d)``, and which ends are maxima ``(S,)``.

    References:
        Identifying and attacking the saddle point problem (Dauphin et al., 2014), https://arxiv.org/abs/1406.2572
    """
    x = starts.clone()
    num, dim = x.shape
    precisions = torch.zeros(num, dim, dim, dtype=x.dtype, device=x.device)
    converged = torch.zeros(num, dtype=torch.bool, device=x.device)
    active, units = ~converged, torch.full_like(x, torch.nan)
    value = torch.full_like(x[:, 0], -torch.inf)
    tolerance, flattest = (1e-8, 1e-8) if log_joint.dtype == torch.float64 else (1e-4, 1e-3)
    lengths = torch.tensor(STEP_LENGTHS, dtype=x.dtype, device=x.device)
    for _ in range(max_iter):
        rows = active.nonzero().squeeze(-1)
        if rows.numel() == 0:
            break
        value[rows], grad, precision = derivatives(log_joint, x[rows], units[rows])
        usable = torch.isfinite(precision).flatten(1).all(-1) & torch.isfinite(value[rows])
        active[rows[~usable]] = False
        rows, grad, precision = rows[usable], grad[usable], precision[usable]
        unit = curvature_units(precision)
        units[rows] = unit
        direction, decrement = newton_direction(precision, unit, grad)
        concave = strictly_concave(precision, flattest)
        done = (decrement < tolerance) & concave
        precisions[rows], converged[rows[done]], active[rows[done]] = precision, True, False
        rows, direction, current = rows[~done], direction[~done], value[rows[~done]]
        if rows.numel() == 0:
            continue
        trials = x[rows, None] + lengths[:, None] * direction[:, None]
        best, index = log_joint.log_prob(trials.flatten(0, 1)).view(len(rows), -1).max(-1)
        moved = best > current
        active[rows[~moved]] = False
        stalled = (~moved) & (decrement[~done] < 1e4 * tolerance) & concave[~done]
        converged[rows[stalled]] = True  # rounding, not geometry, ended this ascent
        x[rows[moved]], value[rows[moved]] = trials[moved, index[moved]], best[moved]
    return x, value, precisions, converged


def newton_direction(precision: Tensor, unit: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Saddle-free Newton steps ``(S, d)`` and what they would gain, in nats ``(S,)``."""
    curvature, basis = torch.linalg.eigh(unit[:, :, None] * precision * unit[:, None, :])
    size = curvature.abs().clamp_min(1e-300)
    size = torch.maximum(size, FLATTEST * size.amax(-1, keepdim=True))
    along = torch.einsum("sij,si->sj", basis, unit * grad)
    return unit * torch.einsum("sij,sj->si", basis, along / size), (along.square() / size).sum(-1)


def curvature_units(precision: Tensor) -> Tensor:
    """Lengths over which the log density bends by one nat along each axis; 1 where it is flat. ``(S, d)``."""
    diagonal = precision.diagonal(dim1=-2, dim2=-1).abs()
    return torch.where(diagonal > 1e-300, diagonal.clamp_min(1e-300).rsqrt(), torch.ones_like(diagonal))


def strictly_concave(precision: Tensor, flattest: float) -> Tensor:
    """Whether minus a Hessian is positive definite beyond the noise of its differences.

    Judged by the smallest eigenvalue of the matrix scaled to a unit diagonal, so that units do not matter: flat
    directions that lie oblique to the axes have curvature of either sign and of the size of the noise.

    Args:
        precision: Minus Hessians. Shape ``(S, d, d)``.
        flattest: Smallest eigenvalue that is not called flat, in (0, 1).

    Returns:
        Shape ``(S,)``.
    """
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    unit = (scale[:, :, None] * precision * scale[:, None, :]).clamp(-2.0, 2.0)  # beyond 1 is indefinite, however far
    return torch.linalg.eigvalsh(unit)[:, 0] > flattest


def minus_hessian(log_joint: LogJoint, x: Tensor, units: Tensor | None = None) -> Tensor:
    """Minus the Hessian, as `derivatives` has it. ``(S, d)`` to ``(S, d, d)``."""
    return derivatives(log_joint, x, units)[2]


def derivatives(log_joint: LogJoint, x: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient, and minus the Hessian by central differences of the gradient, symmetrised.

    Args:
        log_joint: Target.
        x: Points. Shape ``(S, d)``.
        units: Lengths over which the target varies along each axis, NaN where unknown. Shape ``(S, d)``. Differences
            are taken over a small share of them, else of 1 + abs(x).

    Returns:
        Shapes ``(S,)``, ``(S, d)`` and ``(S, d, d)``.
    """
    dim = x.shape[1]
    epsilon, size = torch.finfo(log_joint.dtype).eps, 1 + x.abs()
    step = epsilon ** (1 / 3) * size
    if units is not None:
        known = (epsilon**0.25 * units).clamp_min(64 * epsilon * x.abs())  # no less than x can resolve
        step = torch.where(torch.isnan(units), step, torch.minimum(known, size))
    few, parts = max(1, HELD // (2 * dim * dim)), list[tuple[Tensor, Tensor]]()
    for point, move in zip(x.split(few), step.split(few)):
        shift = torch.diag_embed(move)
        rows = torch.cat([point[:, None], point[:, None] + shift, point[:, None] - shift], 1)
        value, grad = log_joint.value_and_grad(rows.flatten(0, 1))
        parts.append((value.view(len(point), 1 + 2 * dim)[:, 0], grad.view(len(point), 1 + 2 * dim, dim)))
    values, grads = (torch.cat(column) for column in zip(*parts))
    hessian = (grads[:, 1 : 1 + dim] - grads[:, 1 + dim :]) / (2 * step[..., None])
    return values, grads[:, 0], -0.5 * (hessian + hessian.mT)


def empty_optima(log_joint: LogJoint) -> Optima:
    """No maximum, from no start."""
    dim = log_joint.dim
    zeros = torch.zeros(0, dtype=torch.float64, device=log_joint.device)
    return Optima(zeros.view(0, dim), zeros, zeros.view(0, dim, dim), zeros, zeros.long(), 0)


def _merge(found: Optima, points: Tensor, log_density: Tensor, precisions: Tensor, num_starts: int) -> Optima:
    """Add ends to the distinct maxima; an end within three sds of a known maximum is a hit of it."""
    found = found._replace(num_starts=found.num_starts + num_starts)
    for i in log_density.argsort(descending=True).tolist():
        near = _near(found, points[i])
        if len(near):
            found.hits[near[0]] += 1
        else:
            laplace = laplace_evidence(log_density[i], precisions[i])
            found = Optima(
                torch.cat([found.points, points[i : i + 1]]),
                torch.cat([found.log_density, log_density[i : i + 1]]),
                torch.cat([found.precisions, precisions[i : i + 1]]),
                torch.cat([found.log_laplace, laplace[None]]),
                torch.cat([found.hits, found.hits.new_ones(1)]),
                found.num_starts,
            )
    return _select(found, found.log_density.argsort(descending=True))


def _near(found: Optima, point: Tensor, squared: float = 9.0) -> Tensor:
    """Indices of the maxima within three of their sds of a point, or another squared distance."""
    gaps = found.points - point
    return (torch.einsum("ki,kij,kj->k", gaps, found.precisions, gaps) < squared).nonzero().flatten()


def _select(optima: Optima, rows: Tensor) -> Optima:
    return Optima(
        optima.points[rows],
        optima.log_density[rows],
        optima.precisions[rows],
        optima.log_laplace[rows],
        optima.hits[rows],
        optima.num_starts,
    )


def laplace_evidence(log_density: Tensor, precisions: Tensor) -> Tensor:
    r"""Laplace's log evidence :math:`\log p(\hat x) + \tfrac d2 \log 2\pi - \tfrac12 \log\det(-H)` of every maximum.

    Shape ``(K,)``.
    """
    dim = precisions.shape[-1]
    constant = 0.5 * dim * math.log(2 * math.pi)
    return log_density + constant - 0.5 * torch.linalg.slogdet(precisions)[1]
