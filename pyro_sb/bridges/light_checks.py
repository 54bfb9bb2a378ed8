"""How a conditional light bridge is judged on its way: early too, and aloud where nothing was learnt."""

import warnings
from collections.abc import Callable

from torch import nn

from pyro_sb.training import Best, FitHistory

SHARES = (2, 4, 8, 16)  # of the way to the loop's first check
TOLERANCE = 0.05  # nats


class EarlyChecks:
    """Held-out losses of the start, of the loop, and between them: a network may overfit few draws in a dozen updates.

    The loop looks at its start and then every ``every`` updates. Here are looks after a sixteenth, an eighth, a quarter
    and a half of the first ``every`` updates, and the best of those parameters.

    Args:
        parameters: What the loop learns.
        validate: Held-out loss of their present values, in nats.
        every: Updates between checks of the loop.
    """

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float], every: int) -> None:
        self.best, self._validate = Best(parameters), validate
        self._steps = {every // share for share in SHARES} - {0}
        self._updates, self._losses = 0, list[float]()

    def validate(self) -> float:
        """The held-out loss, noted: the first one is the start's."""
        self._losses.append(self._validate())
        return self._losses[-1]

    def look(self) -> None:
        """To be called before every update: a check where one is due."""
        if self._updates in self._steps:
            self.best.offer(self.validate())
        self._updates += 1

    def settle(self, history: FitHistory) -> None:
        """Go back to an early look where none of the loop's checks is as low."""
        if self.best.loss < min(self._losses[:1] + history.validation_losses):
            self.best.restore()

    def warn_if_start(self, history: FitHistory, name: str, rows: int, knobs: str, stacklevel: int) -> None:
        """Say so where the start, which ignores the context, was the best of all, and by far that of the loop.

        A loop that stays as good as its start has met a context that tells nothing: there is nothing to say.
        """
        start, *later = self._losses
        if not later or min(later) < start or min(history.validation_losses, default=start) <= start + TOLERANCE:
            return
        warnings.warn(
            f"{name} kept its start, which does not use the context: its held-out loss of {start:.4g} nats was never "
            f"reached again at {len(later)} checks, at best {min(later):.4g}. Unless the context tells nothing about "
            f"the target, {rows} draws are too few for the network ({knobs}): give more draws, raise dropout, or lower "
            "learning_rate or num_steps.",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
