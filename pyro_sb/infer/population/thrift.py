"""How many rows of a log joint a step may take, fewer where a row runs over much data, and all of a warm-up."""

from dataclasses import replace

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.warn import warn

__all__ = ["Budget", "thrifty"]

CHEAP = 2**14  # numbers that a run of the model may hold for a row to be cheap: some .1 ms


def thrifty(joint: LogJoint, num: int, least: int) -> int:
    """``num`` where a row is cheap; else in proportion to what a row costs, but no fewer than ``least``.

    Args:
        joint: The target.
        num: Rows, starts or chains of a step.
        least: Fewest that serve.
    """
    return max(min(least, num), round(num * min(1.0, CHEAP / joint.run_size)))


class Budget:
    """Rows of a log joint that may be spent, and what was left out when they were.

    Args:
        log_joint: The log joint whose evaluations count, from now on.
        rows: The bound, a gradient counting 2.5; None for none.
    """

    def __init__(self, log_joint: LogJoint, rows: float | None) -> None:
        self.log_joint, self.rows, self.left_out = log_joint, rows, list[str]()
        self._before = replace(log_joint.evaluations)

    @property
    def spent(self) -> float:
        """Rows so far."""
        done = self.log_joint.evaluations.since(self._before)
        return done.density + 2.5 * done.gradient

    @property
    def left(self) -> float | None:
        """Rows that may still be spent; None where there is no bound."""
        return None if self.rows is None else max(0.0, self.rows - self.spent)

    def allows(self, work: str) -> bool:
        """Whether more may be begun; what may not is noted."""
        if self.rows is None or self.spent < self.rows:
            return True
        self.left_out.append(work)
        return False

    def describe(self) -> tuple[str, ...]:
        """A stage, if something was left out."""
        if not self.left_out:
            return ()
        return (f"the budget of {self.rows:,.0f} rows was spent: left out {', '.join(self.left_out)}",)

    def say(self, share: float) -> None:
        """What follows where something was left out, given the effective share that was reached."""
        if self.left_out:
            warn(
                f"Warm-up ended by its budget of {self.rows:,.0f} rows, without {', '.join(self.left_out)}: its "
                f"effective share is {share:.3f}, and regions and tails that these would have met may be missed. "
                f"Raise warmup_budget (spent: {self.spent:,.0f})."
            )
