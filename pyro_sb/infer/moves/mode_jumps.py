"""The jump between modes of a target, fitted to draws in each: shapes by Fisher fits, shares by bridge sampling."""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.warp import WarpMove
from pyro_sb.ops.sampling.bridge_sampling import Shares, bridge_shares
from pyro_sb.ops.sampling.fisher import fisher_diagonal, fisher_fit
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = ["ModeJump", "fit_jump", "mode_mixture"]

logger = logging.getLogger(__name__)

ANNEALED_STEPS = 16
BRIDGE_DRAWS, ANNEALED_DRAWS = 512, 128  # a mode, for shares
LEAST_HELD = 16  # points of a mode that the fit has not seen
PILOT, ANNEALED_PILOT = 512, 128  # jumps that acceptance is measured on


class ModeJump(NamedTuple):
    """A jump between modes, as warm-up uses it.

    Attributes:
        move: The jump, frozen, with the shares as its weights and in its choice of the next mode: role ``"jump"``.
        acceptance: Acceptance rate, in chains that have the estimated shares, at points that the fit did not see.
        ceiling: The rate between modes of one shape: what unequal shares alone leave.
        shares: Estimated shares of the modes, and their errors.
        weights: Weights of the given points that give the modes these shares, summing to one, ``(n,)``: draw the
            chains' starts by them.
        modes: Which component each point belongs to. Shape ``(n,)``.
        lengthen: Whether the plain jump accepts under half its ceiling, or points were too few to say: fit once more
            on more local draws, 20 d a mode.
    """

    move: WarpMove
    acceptance: float
    ceiling: float
    shares: Shares
    weights: Tensor
    modes: Tensor
    lengthen: bool

    @property
    def mixture(self) -> StudentMixture:
        """A Gaussian a mode, weighted by the shares: also local metrics, and independence proposals."""
        return self.move.mixture


def fit_jump(
    log_joint: LogJoint,
    points: Tensor,
    modes: Tensor,
    *,
    gradients: Tensor | None = None,
    log_density: Tensor | None = None,
) -> ModeJump:
    r"""Fit the jump between the modes of a target to draws of local moves in each, in whatever shares.

    1. A Gaussian a mode, by :func:`~pyro_sb.ops.sampling.fisher.fisher_fit` (diagonal in a mode with n <= d).
    2. Shares by bridge sampling on the warp jump's own ratios: at most 512 (K - 1) draws and as many evaluations each
       way. The shares in which the chains stand do not matter. Ratios are those of the last quarter of each mode's
       points, under a fit to the others: a fit knows its own points too well.
    3. The plain jump's acceptance from such points in these shares. Under half of its ceiling, shares are estimated
       again with annealed jumps (16 steps, at most 128 draws a mode and direction), and the annealed jump is taken if
       it accepts more than 1.5 times as often; ``lengthen`` then says that more draws may improve the fit.

    It takes no local steps: a caller runs chains in every mode (windows of 20 + 20 steps; 2 d draws a mode or more),
    calls this, perhaps lengthens and calls again, and starts the chains at points drawn by ``weights``.

    Args:
        log_joint: Target.
        points: States of chains that moved locally, in the order in which they were drawn, float64. Shape ``(n, d)``.
        modes: The mode of each point: any integers, two different ones at least. Shape ``(n,)``.
        gradients: Gradients of the target there, ``(n, d)``; evaluated if omitted.
        log_density: The target's log density there, ``(n,)``; evaluated if omitted.

    Returns:
        The jump and what is known about it: a move of role ``"jump"``, to be taken once a local step, never alone.
    """
    if gradients is None or log_density is None:
        log_density, gradients = log_joint.value_and_grad(points)
    labels, modes = modes.unique(return_inverse=True)
    if len(labels) < 2:
        raise ValueError("A jump needs points in two modes or more, got points in 1. Leave the move out.")
    mixture = mode_mixture(points, gradients, modes)
    modes = _settled(mixture, points, modes)
    held = _held_out(modes, points.shape[-1])
    states = _States(points[held], log_density[held], modes[held])
    trial = mode_mixture(points[~held], gradients[~held], modes[~held]) if not bool(held.all()) else mixture

    def weighted(shares: Shares, num_steps: int = 0) -> WarpMove:
        return WarpMove(trial._replace(log_weights=shares.log_shares), num_steps=num_steps)

    shares = _bridged(WarpMove(trial), log_joint, states, BRIDGE_DRAWS)
    move = weighted(shares)
    acceptance, ceiling = _pilot(move, log_joint, states, PILOT), move.ceiling
    lengthen = acceptance < 0.5 * ceiling or (bool(held.all()) and acceptance < 0.9 * ceiling)
    if lengthen:
        shares = _bridged(weighted(shares, ANNEALED_STEPS), log_joint, states, ANNEALED_DRAWS)
        move, annealed = weighted(shares), weighted(shares, ANNEALED_STEPS)
        acceptance, ceiling = _pilot(move, log_joint, states, PILOT), move.ceiling
        rate = _pilot(annealed, log_joint, states, ANNEALED_PILOT)
        if rate > 1.5 * acceptance:
            move, acceptance = annealed, rate
    move = WarpMove(mixture._replace(log_weights=shares.log_shares), num_steps=move.num_steps)
    logger.info("%s accepts %.3f of at most %.3f, shares %s", move.name, acceptance, ceiling, shares.log_shares.exp())
    return ModeJump(move, acceptance, ceiling, shares, _weights(modes, shares.log_shares), modes, lengthen)


def mode_mixture(points: Tensor, gradients: Tensor, modes: Tensor) -> StudentMixture:
    """A Gaussian a mode, equally weighted: Fisher fits, diagonal in modes with no more draws than dimensions.

    Args:
        points: Draws ``(n, d)``.
        gradients: Gradients of the target at them ``(n, d)``.
        modes: Modes of the draws, in 0 to K - 1, each at least once. Shape ``(n,)``.
    """
    num, dim = int(modes.max()) + 1, points.shape[-1]
    locs, trils = [], []
    for k in range(num):
        x, g = points[modes == k], gradients[modes == k]
        if len(x) > dim:
            fit = fisher_fit(x, g)
            locs.append(fit.mean)
            trils.append(fit.scale_tril)
        else:
            diagonal = fisher_diagonal(x, g)
            locs.append(diagonal.mean)
            trils.append(torch.diag(diagonal.variance.sqrt()))
    log_weights = torch.full((num,), -math.log(num), dtype=torch.float64, device=points.device)
    return StudentMixture(log_weights, torch.stack(locs), torch.stack(trils), torch.full_like(log_weights, math.inf))


class _States(NamedTuple):
    """Points ``(n, d)``, the target's log density there ``(n,)``, and their modes ``(n,)``."""

    x: Tensor
    log_density: Tensor
    modes: Tensor

    def of(self, mode: int, most: int) -> "_States":
        """At most so many points of a mode, at random."""
        index = (self.modes == mode).nonzero().squeeze(-1)
        index = index[torch.randperm(len(index), device=index.device)[:most]]
        return _States(*(part[index] for part in self))


def _held_out(modes: Tensor, dim: int) -> Tensor:
    """The last quarter of each mode's points, as far as d + 1 are left to fit; all where that is under 16. ``(n,)``."""
    held = torch.zeros_like(modes, dtype=torch.bool)
    for k in range(int(modes.max()) + 1):
        index = (modes == k).nonzero().squeeze(-1)
        num = min(len(index) // 4, len(index) - dim - 1)
        if num < LEAST_HELD:
            return torch.ones_like(held)
        held[index[-num:]] = True
    return held


def _settled(mixture: StudentMixture, points: Tensor, modes: Tensor) -> Tensor:
    """Modes of the points after the fit, by responsibility, as chains may cross; as given if a mode empties."""
    found = torch.multinomial(mixture.log_responsibilities(points).exp(), 1).squeeze(-1)
    return found if bool((found.bincount(minlength=mixture.num_components) > 0).all()) else modes


def _bridged(move: WarpMove, log_joint: LogJoint, states: _States, most: int) -> Shares:
    """Shares by bridge sampling of every mode against the one with most points, in order of the components."""
    num = move.mixture.num_components
    first = int(states.modes.bincount(minlength=num).argmax())
    others = [k for k in range(num) if k != first]
    centre = states.of(first, most)
    forward = torch.stack([_ratios(move, log_joint, centre, first, k) for k in others], 1)
    backward = [_ratios(move, log_joint, states.of(k, most), k, first) for k in others]
    shares = bridge_shares(forward, backward)
    order = torch.tensor([first, *others], device=states.x.device).argsort()
    return Shares(*(part[order] for part in shares))


def _ratios(move: WarpMove, log_joint: LogJoint, states: _States, here: int, there: int) -> Tensor:
    pair = (torch.full_like(states.modes, k) for k in (here, there))
    return move.warped(log_joint, states.x, states.log_density, *pair).log_ratio


def _pilot(move: WarpMove, log_joint: LogJoint, states: _States, num: int) -> float:
    """Acceptance of one jump from points in the move's own shares."""
    weights = _weights(states.modes, move.mixture.log_weights)
    chosen = torch.multinomial(weights, num, replacement=True)
    return float(move.step(log_joint, states.x[chosen], states.log_density[chosen]).accept_prob.mean())


def _weights(modes: Tensor, log_shares: Tensor) -> Tensor:
    """Weights of points that give the modes their shares. ``(n,)``."""
    count = modes.bincount(minlength=len(log_shares)).clamp_min(1)
    weights = log_shares.exp()[modes] / count[modes]
    return weights / weights.sum()
