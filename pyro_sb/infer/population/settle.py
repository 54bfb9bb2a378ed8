r"""A normal law in each region, :math:`N(m_k, S_k)`, from short chains: their draws and the gradients there."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import HamiltonianMove, IndexMove, Move, Rows, adapted, hmc_step, jittered
from pyro_sb.ops.sampling.fisher import fisher_fit
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = ["Settled", "fitted_laws", "joined", "settle", "steps_of", "walked", "widened"]

CHAINS = 64
WINDOW, MAX_WINDOWS = 20, 8
DRAWS_A_DIMENSION = 2  # of each region, in the last window: a fit from draws and gradients needs more than d
DRIFT = 0.25  # sds between the means of two windows, above which another follows
MOST_STEPS, LONGER = 8, 4
LENGTH = 1.6  # of a trajectory in units of the metric: a quarter of a normal law's period


class Settled(NamedTuple):
    """Chains that have settled in their regions.

    Attributes:
        core: A normal law a region, with the shares that were given.
        points: States of the last window. Shape ``(M, d)``.
        log_density: The target's log density there. Shape ``(M,)``.
        grad: Its gradient there. Shape ``(M, d)``.
        step_size: Leapfrog step in units of the metric, at an acceptance of .8.
        num_steps: Leapfrog steps of their last trajectories.
        num_windows: Windows that it took.
        drift: Sds between the means of the last two windows, of the coordinate that moved most.
    """

    core: StudentMixture
    points: Tensor
    log_density: Tensor
    grad: Tensor
    step_size: float
    num_steps: int
    num_windows: int
    drift: float

    def radius(self, x: Tensor) -> Tensor:
        """Squared distance from the middle of the likeliest region, in its units. ``(C, d)`` to ``(C,)``."""
        label = self.core.log_responsibilities(x).argmax(-1)
        return self.core.whiten(x).square().sum(-1).gather(1, label[:, None])[:, 0]

    def describe(self) -> str:
        """A stage: what was done, with its figures."""
        windows = f"{self.num_windows} window{'s' * (self.num_windows > 1)}"
        return (
            f"chains of {windows}: {len(self.points)} draws and gradients in the last, "
            f"step {self.step_size:.2f} in units of their metric, means moved by {self.drift:.2f} sd"
        )


def steps_of(step_size: float, longer: int = 1) -> int:
    """Leapfrog steps of a trajectory: a quarter of a period, at most 8; or so many times longer."""
    return longer * min(MOST_STEPS, max(1, round(LENGTH / step_size)))


def settle(
    joint: LogJoint, start: StudentMixture, points: Tensor | None = None, max_windows: int = MAX_WINDOWS
) -> Settled:
    r"""Chains from a normal law in each region, which is fitted anew to every window of theirs.

    The chains run Hamiltonian Monte Carlo in the metric of their region. A window has 20 steps, or as many as give two
    draws a dimension and region; the first quarter of it does not count. Windows end where means no longer move;
    where they still do after two, and after four, trajectories are twice as long.

    Args:
        joint: Target.
        start: Laws of the regions, such as those of Laplace's method: the first metric, and where chains start.
        points: Where they start instead, drawn from these. Shape ``(M, d)``.
        max_windows: Largest number of windows.

    References:
        The Fisher fit of `fisher_fit`.
    """
    num, dim = start.num_components, joint.dim
    label = torch.arange(CHAINS * math.ceil(num / 8), device=joint.device) % num
    laws = start._replace(df=torch.full_like(start.df, math.inf))
    rows = _start(joint, laws, label, points)
    size = max(WINDOW, math.ceil(4 / 3 * DRAWS_A_DIMENSION * dim * num / len(label)))
    step_size, before, drift = min(0.5, dim**-0.25), laws.locs, math.inf
    for window in range(1, max_windows + 1):
        longer = min(LONGER, 2 ** ((window - 1) // 2))
        rows, kept, step_size = _window(joint, laws, label, rows, size, step_size, longer)
        laws = fitted_laws(laws, kept.x, kept.grad)
        scale = laws.scale_trils.square().sum(-1).sqrt()
        drift = float(((laws.locs - before) / scale).abs().max())
        before = laws.locs
        if window > 1 and drift < DRIFT:
            break
    return Settled(laws, *kept, step_size, steps_of(step_size, longer), window, drift)


def _start(joint: LogJoint, laws: StudentMixture, label: Tensor, points: Tensor | None) -> Rows:
    """A draw of its region's law for every chain; the centre, where the log joint is not finite at the draw."""
    if points is None:
        x = laws.sample_components(label)
    else:
        x = points[torch.randint(len(points), label.shape, device=points.device)]
    finite = torch.isfinite(joint.log_prob(x))
    x = torch.where(finite[:, None], x, laws.locs[label])
    value, grad = joint.value_and_grad(x)
    finite = torch.isfinite(value)
    if bool(finite.any()) and not bool(finite.all()):  # nor at the centre: from where another chain starts
        rows = finite.nonzero().squeeze(-1)
        index = torch.where(
            finite, torch.arange(len(x), device=x.device), rows[torch.randint(len(rows), finite.shape, device=x.device)]
        )
        x, value, grad = x[index], value[index], grad[index]
    return Rows(x, value, grad)


def _window(
    joint: LogJoint, laws: StudentMixture, label: Tensor, rows: Rows, size: int, step_size: float, longer: int
) -> tuple[Rows, Rows, float]:
    """The chains after so many steps, the states of the last three quarters, and the step size."""
    scale = laws.scale_trils[label] if laws.num_components > 1 else laws.scale_trils[0]
    kept: list[Rows] = []
    for count in range(1, size + 1):
        step = jittered(step_size, 1.5, rows.x)
        moved = hmc_step(joint.value_and_grad, rows.with_momentum(), scale, step, steps_of(step_size, longer))
        rows, step_size = moved.rows, adapted(step_size, moved.accept_prob, 0.8, 2.0 * count**-0.6)
        kept.append(rows)
    last = kept[len(kept) // 4 :]
    return rows, Rows(*(torch.cat(parts) for parts in zip(*last, strict=True))), step_size


def fitted_laws(laws: StudentMixture, x: Tensor, grad: Tensor) -> StudentMixture:
    """The laws fitted to the draws of their regions and the gradients there; a law of few draws stays as it is.

    Args:
        laws: Normal laws that say whose a draw is.
        x: Draws. Shape ``(M, d)``.
        grad: Gradients of the target's log density there. Shape ``(M, d)``.
    """
    share = laws.log_responsibilities(x).exp()
    known = (share.sum(0) > x.shape[1] + 1).nonzero().squeeze(-1)
    if not len(known):
        return laws
    mean, factor = fisher_fit(x, grad, share[:, known])
    locs, trils = laws.locs.clone(), laws.scale_trils.clone()
    locs[known], trils[known] = mean, factor
    return laws._replace(locs=locs, scale_trils=trils)


def walked(joint: LogJoint, settled: Settled, proposal: StudentMixture | None, num_steps: int = 24) -> Settled:
    """The chains after more steps: their states, and the gradients there.

    Args:
        joint: Target.
        settled: The chains.
        proposal: A mixture from which a jump is tried before each step; None for no jumps.
        num_steps: Steps, of which the first quarter does not count.
    """
    x, log_density = _last(settled)
    moves: list[Move] = [] if proposal is None else [IndexMove(proposal)]
    moves.append(HamiltonianMove(settled.core, settled.num_steps, settled.step_size))
    states = []
    for _ in range(num_steps):
        for move in moves:
            moved = move.step(joint, x, log_density)
            x, log_density = moved.x, moved.log_density
        states.append(x)
    points = torch.cat(states[num_steps // 4 :])
    log_density, grad = joint.value_and_grad(points)
    return settled._replace(points=points, log_density=log_density, grad=grad)


def widened(laws: StudentMixture) -> StudentMixture:
    """The same laws three times as wide: chains that start there come home, or settle in what is wider."""
    return laws._replace(scale_trils=3.0 * laws.scale_trils)


def joined(one: Settled, other: Settled) -> Settled:
    """Chains in the regions of both, as one. Their shares are half and half."""
    parts = [
        StudentMixture(part.log_weights - math.log(2.0), part.locs, part.scale_trils, part.df)
        for part in (one.core, other.core)
    ]
    return Settled(
        StudentMixture(*(torch.cat(values) for values in zip(*parts, strict=True))),
        torch.cat([one.points, other.points]),
        torch.cat([one.log_density, other.log_density]),
        torch.cat([one.grad, other.grad]),
        min(one.step_size, other.step_size),
        max(one.num_steps, other.num_steps),
        max(one.num_windows, other.num_windows),
        max(one.drift, other.drift),
    )


def _last(settled: Settled) -> tuple[Tensor, Tensor]:
    """A state of each chain, equally many in each region, and the log densities there."""
    num = settled.core.num_components
    label = settled.core.log_responsibilities(settled.points).argmax(-1)
    each = CHAINS * math.ceil(num / 8) // num
    index = torch.cat([(label == k).nonzero().squeeze(-1)[-each:] for k in range(num)])
    return settled.points[index], settled.log_density[index]
