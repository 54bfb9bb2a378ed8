"""The dual of the Schrödinger-Bass problem on fixed draws, and monotone steps up it."""

import math
from typing import NamedTuple

from torch import Tensor

from pyro_sb.ops.bass import BassMap
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, moment_step


class DualState(NamedTuple):
    """A potential with the inverse points of all draws under it, and G."""

    potential: MixturePotential
    y0: Tensor
    y1: Tensor
    dual: float


class DualProblem(NamedTuple):
    """All draws of both sides, and the dual of a potential on them.

    Args:
        source: Points at time 0.
        target: Points at time 1.
        beta: Price of volatility.
    """

    source: Side
    target: Side
    beta: float

    def at(self, potential: MixturePotential, near: DualState | None = None) -> DualState:
        """G and the inverse points, by Newton from those of a state nearby."""
        ends = [BassMap(potential.at(t), potential.epsilon, self.beta) for t in (0.0, 1.0)]
        starts = (None, None) if near is None else (near.y0, near.y1)
        sides = (self.source, self.target)
        inverses = [e.inverse(s.points, y) for e, s, y in zip(ends, sides, starts, strict=True)]
        if not all(i.residual < 1e-4 for i in inverses):
            return DualState(potential, inverses[0].points, inverses[1].points, -math.inf)
        values = [
            float(s.weights @ e.objective(i.points, s.points)) for e, s, i in zip(ends, sides, inverses, strict=True)
        ]
        return DualState(potential, inverses[0].points, inverses[1].points, values[1] - values[0])

    def ascend(self, state: DualState, size: float, floor: float) -> tuple[DualState, float]:
        """A moment step at the inverse points, lengthened while G rises and halved until it does."""
        aim = moment_step(
            state.potential, Side(state.y0, self.source.weights), Side(state.y1, self.target.weights), floor=floor
        )
        for _ in range(30):
            new = self.at(_between(state.potential, aim, size, floor), state)
            if new.dual > state.dual:
                return new, min(1.5 * size, 6.0 if state.potential.diagonal else 1.0)
            size *= 0.5
        return state, size


def _between(here: MixturePotential, aim: MixturePotential, size: float, floor: float) -> MixturePotential:
    """Parameters on the way, or beyond: geometric in diagonal scales, linear in all else."""
    log_weights = here.log_weights + size * (aim.log_weights - here.log_weights)
    locs = here.locs + size * (aim.locs - here.locs)
    if here.diagonal:
        scales = (here.scales.log() + size * (aim.scales / here.scales).log()).exp().clamp_min(floor)
    else:
        scales = here.scales + min(size, 1.0) * (aim.scales - here.scales)
    return MixturePotential(log_weights, locs, scales, here.epsilon)
