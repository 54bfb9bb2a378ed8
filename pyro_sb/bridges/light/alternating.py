r"""The published alternation: bridge matching between images of the ends, and a learnt inverse of the Bass map."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_sb.bridges.data import Ends
from pyro_sb.bridges.light.fit import LightOptions, begin, refuse_context, refuse_open_beta
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.light.process import LearnedMap
from pyro_sb.ops.mixture import matching_loss
from pyro_sb.training import FitHistory, train

NUM_STAGES, MAP_LEARNING_RATE = 5, 2e-3


class Alternating:
    r"""Stages of bridge matching and of a learnt inverse: algorithm 1 of arXiv 2601.19312, for comparison.

    From :math:`Z = \mathrm{id}`, ``NUM_STAGES`` times

    1. fit the potential by bridge matching between :math:`Z(0, x_0)` and :math:`Z(1, x_1)`;
    2. fit the network by :math:`|Z(t, X_t(x)) - x|^2` at t = 0 and 1, with x from the two sides.

    With the drift's regular form, and a learning rate that falls within each stage. Half of the steps go to each. It
    has no rule to stop by and no held-out loss, so it never says that it has converged.
    """

    name, num_updates = "alternating", 10_000

    def check(self, bridge: MixtureBridge) -> None:
        """Refuse a context, and a beta that is still to be chosen or infinite."""
        refuse_context(self, bridge)
        refuse_open_beta(self, bridge)
        if math.isinf(bridge.beta):
            raise ValueError('solver="alternating" needs a finite beta, got inf. Use LightSBM.')

    def solve(self, bridge: MixtureBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Give the bridge a network as inverse, start, and make the stages."""
        learned = bridge.learned_map = LearnedMap(bridge.dim).to(bridge.location)
        process, history, batch_size, mapped = begin(bridge, ends), FitHistory(), options.fit.batch_size, False
        steps = max(1, options.fit.num_updates // (2 * NUM_STAGES))

        def matching() -> Tensor:
            x0 = ends.source.batch(batch_size).points.expand(batch_size, -1)
            x1 = ends.target.batch(batch_size).points
            if mapped:
                with torch.no_grad():
                    x0, x1 = learned(torch.tensor(0.0), x0), learned(torch.tensor(1.0), x1)
            return matching_loss(process.potential(), x0, x1)

        def inverting() -> Tensor:
            with torch.no_grad():
                potential = process.potential()
                sides = [ends.source.batch(batch_size).points, ends.target.batch(batch_size).points]
                images = [process.bass(potential, t).forward(x) for t, x in zip((0.0, 1.0), sides, strict=True)]
            errors = [
                (learned(torch.tensor(t), image) - x).square().sum(-1).mean()
                for t, image, x in zip((0.0, 1.0), images, sides, strict=True)
            ]
            return errors[0] + errors[1]

        halves: tuple[tuple[str, nn.Module, Callable[[], Tensor], float, list[float]], ...] = (
            ("matching", process.parameters, matching, options.fit.learning_rate, history.losses),
            ("inverse", learned, inverting, MAP_LEARNING_RATE, history.residuals),
        )
        for stage in range(NUM_STAGES):
            for name, module, loss, rate, record in halves:
                part = train(
                    module.parameters(),
                    loss,
                    num_updates=steps,
                    learning_rate=rate,
                    num_checks=4,
                    tolerance=math.inf,
                    progress=options.fit.progress,
                    description=f"{name}, stage {stage + 1}",
                )
                record += part.losses
                history.iterations += part.iterations
                history.threads = part.threads
                if part.interrupted:
                    history.interrupted = True
                    return history
            mapped = True
        return history
