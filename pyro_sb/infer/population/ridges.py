r"""Normal pieces along the ridges of a curved target, each as long as its own quadratic law of the log density holds.

A mixture that is fitted to draws follows a bent ridge as far as the draws go, and needs many of them in each component.
The curvature at a point gives a component's width at once, and how far the log density stays quadratic its length, so
that a ridge can be followed to where no draw has been.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.search import minus_hessian
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = ["follow_ridges"]

MOST_PIECES = 128
LONGEST = 4.0  # sds of the piece before it that a direction without curvature may take
LENGTHS = 10  # tried, each shorter by the square root of two
DEVIATION = 0.25  # nats between the log density and its quadratic law at one sd
BENT = 0.7  # share of the sd that the curvature asks for, below which a direction is bent
APART = 1.6  # sds between neighbours
COVERED = 1.2  # sds from a piece within which there is no need of another
HUGE = 256.0  # times as long as the longest axis of the seeds' frames: a ridge without end
FAINT = 9.0  # nats of mass below the largest piece at which a ridge ends
NEWTON = 6
ROUNDS = 5  # of pieces that begin where draws of the mixture met more than it expects
GUARD, FEW, EXCESS = (0.2, 3.0, 9.0), 4, 1.5  # the law of those draws, how many, and by how many nats
PROBES, SHRINKINGS = 6, 8  # draws across an axis, and times that its length may shrink
SPREAD = 1.0  # nats by which the log density's gap to its quadratic law may differ between those draws
STRONG = 0.25  # curvature in the frame before, above which an axis lies across the ridge
OFF = 0.7  # slope across the ridge, in nats a width, that a piece may have
ROWS_A_DRAW = 64  # evaluations that the pieces may take, over the draws of a round


class Pieces(NamedTuple):
    """Normal pieces of a target.

    Attributes:
        locs: Shape ``(K, d)``.
        axes: Their principal axes, as columns, one sd long. Shape ``(K, d, d)``.
        bent: Along which of them the target leaves its quadratic law before one sd. Shape ``(K, d)``, boolean.
        log_mass: Log density at the middle and log volume. Shape ``(K,)``.
    """

    locs: Tensor
    axes: Tensor
    bent: Tensor
    log_mass: Tensor

    def distance(self, points: Tensor) -> Tensor:
        """In sds, ``(M, d)`` to ``(M, K)``."""
        inverse = torch.linalg.inv(self.axes)
        return torch.einsum("kij,mkj->mki", inverse, points[:, None] - self.locs).norm(dim=-1)


def follow_ridges(joint: LogJoint, seeds: Tensor, factors: Tensor, num: int) -> StudentMixture | None:
    r"""Mixture of pieces from the seeds on, continued at both ends of every bent axis to where little mass is.

    A piece is put onto the ridge by Newton steps across the direction that it came from. In the frame of the one before
    it, the eigenvectors of its Hessian are its axes; an axis ends where the log density differs from its quadratic law
    by a quarter of a nat, or where the widths across it are others (a funnel).

    Args:
        joint: The target.
        seeds: Where to begin. Shape ``(S, d)``.
        factors: Frames there, such as factors of the inverse curvature. Shape ``(S, d, d)``.
        num: Draws of a round, which the cost follows.

    Returns:
        The mixture; None if no seed has a piece, none of them is bent, or the target has no end.
    """
    dim = joint.dim
    longest = HUGE * float(factors.norm(dim=1).max())
    most = min(MOST_PIECES, max(8, ROWS_A_DRAW * num // (2 * dim * (LENGTHS + 3 * NEWTON + PROBES * SHRINKINGS))))
    found, left = Pieces(seeds[:0], factors[:0], factors[:0, 0].bool(), seeds[:0, 0]), most
    begun = Begun(seeds, factors, torch.zeros_like(seeds))
    for _ in range(ROUNDS):
        found, left = _continued(joint, found, begun, left)
        if len(found.locs) and float(found.axes.norm(dim=1).max()) > longest:
            return None  # flat as far as one can see: no normaliser
        if left <= 0 or not bool(found.bent.any()):
            break
        begun = _uncovered(joint, _mixture(found), num // 2)
    return _mixture(found) if bool(found.bent.any()) else None


class Begun(NamedTuple):
    """Points from which pieces are sought, frames there, and the ways that led there: ``(M, d)``, ``(M, d, d)``."""

    points: Tensor
    frames: Tensor
    ways: Tensor


def _continued(joint: LogJoint, found: Pieces, begun: Begun, left: int) -> tuple[Pieces, int]:
    """The pieces that are known and those that follow from some points, at most ``left``; how many may still come."""
    while len(begun.points) and left > 0:
        begun = Begun(*(part[:left] for part in begun))
        left -= len(begun.points)
        found, added = _merged(found, _pieces(joint, *begun))
        begun = _ends(found, added)
    return found, left


def _uncovered(joint: LogJoint, mixture: StudentMixture, num: int) -> Begun:
    """Draws where the target exceeds a mixture most: beyond a kink, or on an arm that branches off."""
    points = mixture.with_guard(*GUARD).sample(num)
    log_weights = joint.log_prob(points) - mixture.log_prob(points)
    high = log_weights.topk(min(FEW, num))
    chosen = high.indices[high.values > log_weights.median() + EXCESS]
    label = mixture.log_responsibilities(points[chosen]).argmax(-1)
    return Begun(points[chosen], mixture.scale_trils[label], torch.zeros_like(points[chosen]))


def _pieces(joint: LogJoint, x: Tensor, frames: Tensor, ways: Tensor) -> Pieces:
    """Pieces at points ``(M, d)`` that are moved onto the ridge first, but not along ``ways`` ``(M, d)``."""
    across = torch.linalg.solve(frames, ways[..., None])[..., 0]  # the way, in the frame
    across = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    units = frames.norm(dim=2)
    for left in range(NEWTON, -1, -1):
        value, grad = joint.value_and_grad(x)
        ok = torch.isfinite(value)
        x, frames, across, units, value, grad = (part[ok] for part in (x, frames, across, units, value, grad))
        curvature = torch.einsum("mji,mjk,mkl->mil", frames, minus_hessian(joint, x, units), frames)
        ok = torch.isfinite(curvature).flatten(1).all(1)
        x, frames, across, units, value, grad, curvature = (
            part[ok] for part in (x, frames, across, units, value, grad, curvature)
        )
        slope = torch.einsum("mji,mj->mi", frames, grad)
        if left == 0 or not len(x):
            break
        x = _onto_ridge(joint, x, frames, across, value, slope, curvature)
    size, basis = torch.linalg.eigh(curvature) if len(x) else (slope, frames)
    along = torch.einsum("mij,mi->mj", basis, slope)
    on = (torch.where(size > STRONG, along, 0.0).abs() < OFF).all(1)  # the others did not arrive on a ridge
    x, frames, value, size, basis, along = (part[on] for part in (x, frames, value, size, basis, along))
    axes = frames @ basis
    asked = size.clamp_min(LONGEST**-2).rsqrt()
    length = _lengths(joint, x, axes, asked, value, along, size)
    length = _steady(joint, x, axes, length, along, size)
    bent = (length < BENT * asked) | (size < LONGEST**-2)
    axes = axes * length[:, None]
    return Pieces(x, axes, bent, value + torch.linalg.slogdet(axes)[1])


def _onto_ridge(
    joint: LogJoint, x: Tensor, frames: Tensor, across: Tensor, value: Tensor, slope: Tensor, curvature: Tensor
) -> Tensor:
    """A step of Newton's in the frame, across the way and along axes that are not weak, if it climbs."""
    dim = x.shape[1]
    project = torch.eye(dim, dtype=x.dtype, device=x.device) - across[:, :, None] * across[:, None, :]
    size, basis = torch.linalg.eigh(project @ curvature @ project)
    along = torch.einsum("mij,mi->mj", basis, (project @ slope[..., None])[..., 0])
    strong = size > STRONG
    step = torch.where(strong, along / size.clamp_min(STRONG), 0.0).clamp(-3.0, 3.0)
    step = torch.einsum("mij,mj->mi", frames @ basis, step)
    tilted = 1.0 + torch.where(strong, 0.0, along).norm(dim=1, keepdim=True)  # as axes turn, a weak slope enters theirs
    trials = x[:, None] + torch.stack([step / tilted, 0.2 * step / tilted], 1)
    best, index = joint.log_prob(trials.flatten(0, 1)).view(len(x), -1).max(1)
    rows = torch.arange(len(x), device=x.device)
    return torch.where((best > value)[:, None], trials[rows, index], x)


def _lengths(
    joint: LogJoint, x: Tensor, axes: Tensor, asked: Tensor, value: Tensor, along: Tensor, size: Tensor
) -> Tensor:
    """Longest of ten lengths of every axis up to which the log density follows its quadratic law. Shape ``(M, d)``."""
    if not len(x):
        return asked
    shrink = 2.0 ** (-0.5 * torch.arange(LENGTHS, dtype=x.dtype, device=x.device))
    s = asked * shrink[:, None, None]  # (lengths, M, d)
    offset = s[..., None] * axes.mT  # (lengths, M, axis, d)
    ends = torch.stack([x[:, None] + offset, x[:, None] - offset])
    seen = joint.log_prob(ends.reshape(-1, x.shape[1])).view(2, *s.shape)
    sign = x.new_tensor([1.0, -1.0])[:, None, None, None]
    due = value[:, None] + sign * along * s - 0.5 * size * s.square()
    good = ((seen - due).abs() < DEVIATION).all(0)
    return asked * torch.where(good.any(0), shrink[good.to(torch.uint8).argmax(0)], shrink[-1])


def _steady(joint: LogJoint, x: Tensor, axes: Tensor, length: Tensor, along: Tensor, size: Tensor) -> Tensor:
    """Shorter lengths ``(M, d)`` where the target across an axis is not the same at its ends as in the middle."""
    num, dim = x.shape
    if not num or dim == 1:
        return length
    one, left = torch.eye(dim, dtype=x.dtype, device=x.device), torch.arange(num, device=x.device)
    ends = x.new_tensor([1.0, -1.0, 0.0])[:, None, None, None] * one
    length = length.clone()
    for _ in range(SHRINKINGS):
        noise = torch.randn(PROBES, 1, dim, dtype=x.dtype, device=x.device) * (1 - one)  # nothing along the axis itself
        at = (noise + ends) * length[left, None, None, None]  # (M, ends, probes, axis, d)
        points = x[left, None, None, None] + torch.einsum("mij,mepaj->mepai", axes[left], at)
        seen = joint.log_prob(points.reshape(-1, dim)).view(at.shape[:-1])
        due = (at * along[left, None, None, None]).sum(-1) - 0.5 * (at.square() * size[left, None, None, None]).sum(-1)
        gap = (seen - due).nan_to_num(nan=-1e6, neginf=-1e6)
        spread = (gap[:, :2] - gap[:, 2:]).std(2).amax(1)  # (M, axis)
        worst = spread.amax(1)
        blamed = (spread > SPREAD) & (spread > 0.7 * worst[:, None])  # what it is coupled to differs as well
        length[left] = torch.where(blamed, 0.7 * length[left], length[left])
        left = left[worst > SPREAD]
        if not len(left):
            break
    return length


def _merged(found: Pieces, fresh: Pieces) -> tuple[Pieces, list[int]]:
    """The pieces that are known and those of the fresh ones that no other covers; rows of the latter."""
    added = []
    for i in fresh.log_mass.argsort(descending=True).tolist():
        one = Pieces(*(part[i : i + 1] for part in fresh))
        if len(found.locs):
            faint = float(one.log_mass) < float(found.log_mass.max()) - FAINT
            if faint or float(found.distance(one.locs).min()) < COVERED:
                continue
        added.append(len(found.locs))
        found = Pieces(*(torch.cat(pair) for pair in zip(found, one, strict=True)))
    return found, added


def _ends(found: Pieces, rows: list[int]) -> Begun:
    """Points beyond both ends of the bent axes of some pieces, the heaviest first; frames, and the ways there."""
    rows = sorted(rows, key=lambda i: -float(found.log_mass[i]))
    piece, axis = found.bent[rows].nonzero(as_tuple=True)
    index = torch.tensor(rows, dtype=torch.long, device=piece.device)[piece]
    way = found.axes.mT[index, axis]
    points = torch.stack([found.locs[index] + APART * way, found.locs[index] - APART * way], 1).flatten(0, 1)
    frames, ways = found.axes[index].repeat_interleave(2, 0), way.repeat_interleave(2, 0)
    fresh = (found.distance(points) >= COVERED).all(1)
    return Begun(points[fresh], frames[fresh], ways[fresh])


def _mixture(found: Pieces) -> StudentMixture:
    """Normal pieces with their masses, of at least .1 / K, and tails that are a little heavier."""
    num, dim = found.locs.shape
    share = torch.softmax(found.log_mass, 0).clamp_min(0.1 / num)
    scales = torch.linalg.cholesky((1.0 + 1.0 / dim) * found.axes @ found.axes.mT)
    return StudentMixture((share / share.sum()).log(), found.locs, scales, torch.full_like(share, 15.0))
