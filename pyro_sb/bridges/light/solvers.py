"""The published algorithm of LightSBB-M: stages of bridge matching and of a learnt inverse, for comparison."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_sb.bridges.ends import Ends
from pyro_sb.bridges.light.light import matching_loss
from pyro_sb.bridges.options import Options
from pyro_sb.nn import TimeNet
from pyro_sb.ops.bass import BassMap
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, moment_step
from pyro_sb.training import FitHistory, train

if TYPE_CHECKING:
    from pyro_sb.bridges.light.bass import LightSBBM

NUM_STAGES = 5
MAP_LEARNING_RATE = 2e-3


class LearnedMap(TimeNet):
    """Network in place of the inverse :math:`Y_t(x)`."""


def alternate(bridge: "LightSBBM", ends: Ends, options: Options) -> FitHistory:
    r"""Algorithm 1 of arXiv 2601.19312.

    From :math:`Z = \mathrm{id}`, ``NUM_STAGES`` times

    1. fit the potential by bridge matching between :math:`Z(0, x_0)` and :math:`Z(1, x_1)`;
    2. fit the network by :math:`|Z(t, X_t(x)) - x|^2` at t = 0 and 1, with x from the two sides.

    With the drift's regular form, and a learning rate that falls within each stage. Half of the steps go to each. It
    has no rule to stop by and no held-out loss, so it never says that it has converged.
    """
    learned, history = bridge.learned_map, FitHistory()
    assert learned is not None
    mapped, batch_size = False, options.batch_size
    steps = max(1, options.steps(10_000) // (2 * NUM_STAGES))
    shared: dict[str, Any] = {
        "num_updates": steps,
        "progress": options.progress,
        "tolerance": float("inf"),
        "num_checks": 4,
    }

    def matching() -> Tensor:
        x0 = ends.source.batch(batch_size).points.expand(batch_size, -1)
        x1 = ends.target.batch(batch_size).points
        if mapped:
            with torch.no_grad():
                x0, x1 = learned(torch.tensor(0.0), x0), learned(torch.tensor(1.0), x1)
        return matching_loss(bridge.parameters_of(None, bridge._epsilon), x0, x1)

    def inverting() -> Tensor:
        with torch.no_grad():
            potential = bridge.parameters_of(None, bridge._epsilon)
            sides = [ends.source.batch(batch_size).points, ends.target.batch(batch_size).points]
            images = [bridge._bass(potential, t).forward(x) for t, x in zip((0.0, 1.0), sides, strict=True)]
        errors = [
            (learned(torch.tensor(t), image) - x).square().sum(-1).mean()
            for t, image, x in zip((0.0, 1.0), images, sides, strict=True)
        ]
        return errors[0] + errors[1]

    halves = (
        ("matching", bridge.parameters_of, matching, options.rate(5e-3), history.losses),
        ("inverse", learned, inverting, MAP_LEARNING_RATE, history.residuals),
    )
    for stage in range(NUM_STAGES):
        for name, module, loss, rate, record in halves:
            part = train(
                module.parameters(), loss, learning_rate=rate, description=f"{name}, stage {stage + 1}", **shared
            )
            record += part.losses
            history.iterations += part.iterations
            history.threads = part.threads
            if part.interrupted:
                history.interrupted = True
                return history
        mapped = True
    return history


# The dual of the Schrödinger-Bass problem on fixed draws, and monotone steps up it


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


# Pairs of points and inverses that follow the parameters from minibatch to minibatch


class Pairs(NamedTuple):
    """Points x of both sides with their inverses y, in the shapes that a potential takes."""

    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    context: Tensor | None

    def rows(self, index: Tensor) -> "Pairs":
        """Some of the pairs; a single source point serves all."""
        x0, y0 = (v if len(v) == 1 else v[index] for v in (self.x0, self.y0))
        context = None if self.context is None else self.context[index]
        return Pairs(x0, y0, self.x1[index], self.y1[index], context)


class Pool:
    """Pairs to take minibatches from, whose inverses follow the parameters by a Newton step a use."""

    def __init__(self, pairs: Pairs) -> None:
        own = {name: getattr(pairs, name).clone(memory_format=torch.contiguous_format) for name in ("y0", "y1")}
        self.pairs, self.used = pairs._replace(**own), 0  # an inverse may be the very tensor that was inverted
        self._queue = torch.empty(0, dtype=torch.long, device=pairs.x1.device)

    def next(self, num: int) -> Tensor:
        """Indices of a minibatch, each once a round."""
        if len(self._queue) < num:
            self._queue = torch.randperm(len(self.pairs.x1), device=self._queue.device)
        index, self._queue = self._queue[:num], self._queue[num:]
        self.used += num
        return index

    def put(self, index: Tensor, y0: Tensor, y1: Tensor) -> None:
        """Take better inverses."""
        if len(self.pairs.y0) == 1:
            self.pairs.y0.copy_(y0)
        else:
            self.pairs.y0[index] = y0
        self.pairs.y1[index] = y1
