r"""Moment steps of a light bridge on all draws at once, down L or for finite beta up the dual G."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyro_sb.bridges.data import Ends
from pyro_sb.bridges.light.fit import LightOptions, all_points, begin, held_out_loss, refuse_context, refuse_open_beta
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.light.process import MixtureProcess
from pyro_sb.ops.bass import DualProblem
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss
from pyro_sb.ops.moment_matching import Side, moment_step
from pyro_sb.threads import Pace
from pyro_sb.training import Best, FitHistory, interruptible
from pyro_sb.warn import warn


class MomentSteps:
    r"""Moment steps on all draws at once: down the likelihood loss, or for finite beta up the dual by line search."""

    name, num_updates = "moments", 200

    def check(self, bridge: MixtureBridge) -> None:
        """Refuse a context, and a beta that is still to be chosen."""
        refuse_context(self, bridge)
        refuse_open_beta(self, bridge)

    @torch.no_grad()
    def solve(self, bridge: MixtureBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and step until nothing is gained; the best by the held-out loss is kept."""
        process, name, num_updates = begin(bridge, ends), type(bridge).__name__, options.fit.num_updates
        sides, plain = [all_points(end, options.fit.num_law_draws) for end in ends], math.isinf(process.beta)
        history, best, pace = FitHistory(), Best(list(process.parameters.parameters())), Pace()
        best.offer(held_out_loss(process, ends))
        steps = (likelihood_steps if plain else dual_steps)(process, *sides)
        with interruptible(history, num_updates, name):
            while history.iterations < num_updates and not history.converged:
                with pace.call(device=sides[0].points.device):
                    step = next(steps)
                    process.take(step.potential)
                    history.validation_losses.append(held_out_loss(process, ends))
                history.residuals += [] if step.rise is None else [step.rise]
                history.losses.append(step.loss)
                history.iterations += 1
                best.offer(history.validation_losses[-1])
                history.converged = step.settled
        best.restore()
        history.threads = pace.describe()
        if not history.converged and not history.interrupted:
            reason = "the loss still falls" if plain else f"G still rose by {history.residual:.2g} > 1e-9 nats"
            warn(
                f"{name}'s moment steps have not converged: {reason} after {num_updates}. Raise num_updates.",
            )
        return history


class Step(NamedTuple):
    """Potential after a moment step, its loss in nats, the rise of G if that was measured, and whether to stop."""

    potential: MixturePotential
    loss: float
    rise: float | None
    settled: bool


def likelihood_steps(process: MixtureProcess, source: Side, target: Side) -> Iterator[Step]:
    """Plain moment steps; settled where ten of them change the loss by less than 1e-4."""
    potential, losses = process.potential(), list[float]()
    while True:
        potential = moment_step(potential, source, target, floor=process.floor)
        losses.append(float(likelihood_loss(potential, source.points, target.points, source.weights, target.weights)))
        settled = len(losses) >= 10 and abs(losses[-10] - losses[-1]) < 1e-4  # a rise is no rest
        yield Step(potential, losses[-1], None, settled)


def dual_steps(process: MixtureProcess, source: Side, target: Side) -> Iterator[Step]:
    """Moment steps at inverse points, each as long as G allows; settled where two in a row raise it by nothing."""
    problem, size, quiet = DualProblem(source, target, process.beta), 1.0, 0
    state = problem.at(process.potential())
    while True:
        new, size = problem.ascend(state, size, process.floor)
        rise = (new.dual - state.dual) / process.epsilon
        state, quiet = new, quiet + 1 if rise < 1e-9 else 0
        if quiet:
            size *= 0.5  # a long step may have crossed the top to a point as high
        yield Step(state.potential, -state.dual / process.epsilon, rise, quiet == 2)
