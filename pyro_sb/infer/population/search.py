"""Batched multi-start Newton search for the maxima of a log joint."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint

STARTS_A_MODE = 12
STEP_LENGTHS = (4.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.005)


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


def find_optima(
    log_joint: LogJoint,
    *,
    batch: int = 32,
    max_starts: int = 256,
    max_iter: int = 60,
    hints: Tensor | None = None,
) -> Optima:
    r"""Maxima of a log joint from overdispersed starts, until no maximum was met only once.

    A quarter of the starts is uniform(-2, 2), half five times as wide, a quarter prior draws where the prior can be
    drawn. A maximum hit once suggests others unseen (Good and Turing), and so do fewer than 12 starts a maximum:
    further batches follow up to ``max_starts``.

    Args:
        log_joint: Target on the unconstrained vector.
        batch: Starts of the first batch; it doubles.
        max_starts: Largest number of starts.
        max_iter: Largest number of Newton iterations of a start.
        hints: Points to start from besides, in the first batch. Shape ``(M, d)``.

    Returns:
        The maxima within 15 nats of the best Laplace evidence; empty (K = 0) if no start ended in one, as on a funnel.
    """
    found = _empty(log_joint)
    while found.num_starts < max_starts:
        ends, log_density, precisions, converged = newton_ascent(
            log_joint, dispersed_starts(log_joint, batch, hints), max_iter
        )
        found = _merge(found, ends[converged], log_density[converged], precisions[converged], len(ends))
        enough = found.num_starts >= STARTS_A_MODE * len(found.points)
        if len(found.points) == 0 or (enough and bool((found.hits > 1).all())):
            break
        batch *= 2
    keep = (found.log_laplace > found.log_laplace.max() - 15.0).nonzero().flatten() if len(found.points) else found.hits
    return _select(found, keep)


def dispersed_starts(log_joint: LogJoint, num: int, hints: Tensor | None = None) -> Tensor:
    """Overdispersed starts with a finite log joint, ``(n, dim)``; raises if there is none.

    Args:
        log_joint: Target.
        num: Number of starts tried besides the hints.
        hints: Points that are tried as they are. Shape ``(M, dim)``.
    """
    parts = [] if hints is None else [hints[:num]]
    quarter = num // 4
    try:
        parts += [log_joint.start(num - 3 * quarter), 5.0 * log_joint.start(2 * quarter)]
        parts.append(_prior_or(log_joint, quarter, 2.5))
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


def _prior_or(log_joint: LogJoint, num: int, scale: float) -> Tensor:
    """Prior draws, or scaled starts where the prior is improper or there is no model."""
    try:
        return log_joint.prior(num)
    except (NotImplementedError, ValueError, RuntimeError):
        return scale * log_joint.start(num)


def newton_ascent(log_joint: LogJoint, starts: Tensor, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Saddle-free Newton ascent of a batch.

    .. math:: x \mathrel{+}= s |H|^{-1} \nabla \log p, \quad \text{s the best of seven lengths.}

    The Hessian is a central difference of the batched gradient: one call of 2 d rows a start, no second derivatives.

    Returns:
        Ends ``(S, d)``, log densities ``(S,)``, minus Hessians ``(S, d, d)``, and which ends are maxima ``(S,)``.

    References:
        Identifying and attacking the saddle point problem (Dauphin et al., 2014), https://arxiv.org/abs/1406.2572
    """
    x = starts.clone()
    num, dim = x.shape
    value, grad = log_joint.value_and_grad(x)
    precisions = torch.zeros(num, dim, dim, dtype=x.dtype, device=x.device)
    converged = torch.zeros(num, dtype=torch.bool, device=x.device)
    active = torch.isfinite(value)
    tolerance, flattest = (1e-8, 1e-8) if log_joint.dtype == torch.float64 else (1e-4, 1e-3)
    lengths = torch.tensor(STEP_LENGTHS, dtype=x.dtype, device=x.device)
    for _ in range(max_iter):
        rows = active.nonzero().squeeze(-1)
        if rows.numel() == 0:
            break
        precision = minus_hessian(log_joint, x[rows])
        usable = torch.isfinite(precision).flatten(1).all(-1)
        active[rows[~usable]] = False
        rows, precision = rows[usable], precision[usable]
        curvature, basis = torch.linalg.eigh(precision)
        size = curvature.abs().clamp_min(1e-10 * curvature.abs().amax(-1, keepdim=True)).clamp_min(1e-300)
        along = torch.einsum("sij,si->sj", basis, grad[rows])
        decrement = (along.square() / size).sum(-1)
        concave = strictly_concave(precision, flattest)
        done = (decrement < tolerance) & concave
        precisions[rows], converged[rows[done]], active[rows[done]] = precision, True, False
        direction = torch.einsum("sij,sj->si", basis, along / size)
        rows, direction, current = rows[~done], direction[~done], value[rows[~done]]
        if rows.numel() == 0:
            continue
        trials = x[rows, None] + lengths[:, None] * direction[:, None]
        best, index = log_joint.log_prob(trials.flatten(0, 1)).view(len(rows), -1).max(-1)
        moved = best > current
        active[rows[~moved]] = False
        stalled = (~moved) & (decrement[~done] < 1e4 * tolerance) & concave[~done]
        converged[rows[stalled]] = True  # rounding, not geometry, ended this ascent
        rows = rows[moved]
        if rows.numel():
            x[rows] = trials[moved, index[moved]]
            value[rows], grad[rows] = log_joint.value_and_grad(x[rows])
    return x, value, precisions, converged


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


def minus_hessian(log_joint: LogJoint, x: Tensor) -> Tensor:
    """Minus the Hessian by central differences of the gradient, symmetrised. ``(S, d)`` to ``(S, d, d)``."""
    num, dim = x.shape
    step = torch.finfo(log_joint.dtype).eps ** (1 / 3) * (1 + x.abs())
    shift = torch.diag_embed(step)
    both = torch.cat([x[:, None] + shift, x[:, None] - shift], 1)
    grad = log_joint.value_and_grad(both.flatten(0, 1))[1].view(num, 2, dim, dim)
    hessian = (grad[:, 0] - grad[:, 1]) / (2 * step[..., None])
    return -0.5 * (hessian + hessian.mT)


def _empty(log_joint: LogJoint) -> Optima:
    dim = log_joint.dim
    zeros = torch.zeros(0, dtype=torch.float64, device=log_joint.device)
    return Optima(zeros.view(0, dim), zeros, zeros.view(0, dim, dim), zeros, zeros.long(), 0)


def _merge(found: Optima, points: Tensor, log_density: Tensor, precisions: Tensor, num_starts: int) -> Optima:
    """Add ends to the distinct maxima; an end within three sds of a known maximum is a hit of it."""
    every = Optima(
        torch.cat([found.points, points]),
        torch.cat([found.log_density, log_density]),
        torch.cat([found.precisions, precisions]),
        torch.cat([found.log_laplace, laplace_evidence(log_density, precisions)]),
        torch.cat([found.hits, torch.ones(len(points), dtype=torch.long, device=points.device)]),
        found.num_starts + num_starts,
    )
    kept: list[int] = []
    for i in every.log_density.argsort(descending=True).tolist():
        gaps = every.points[kept] - every.points[i]
        near = torch.einsum("ki,kij,kj->k", gaps, every.precisions[kept], gaps) < 9.0
        if bool(near.any()):
            every.hits[kept[int(near.nonzero()[0])]] += every.hits[i]
        else:
            kept.append(i)
    return _select(every, torch.tensor(kept, dtype=torch.long, device=points.device))


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
    constant = 0.5 * dim * torch.log(torch.tensor(2 * torch.pi, dtype=log_density.dtype))
    return log_density + constant - 0.5 * torch.linalg.slogdet(precisions)[1]
