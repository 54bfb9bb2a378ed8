"""The published algorithm of LightSBB-M: stages of bridge matching and of a learnt inverse, for comparison."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_sb.bridges.ends import Ends
from pyro_sb.bridges.light import matching_loss
from pyro_sb.bridges.light_options import Options
from pyro_sb.nn import TimeNet
from pyro_sb.training import FitHistory, train

if TYPE_CHECKING:
    from pyro_sb.bridges.light_bass import LightSBBM

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
        "num_steps": steps,
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
            if part.interrupted:
                history.interrupted = True
                return history
        mapped = True
    return history
