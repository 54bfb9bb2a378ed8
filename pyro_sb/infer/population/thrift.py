"""How many rows of a log joint a step may take: as many as it likes, or fewer where a row runs over much data."""

from pyro_sb.infer.model.log_joint import LogJoint

__all__ = ["thrifty"]

CHEAP = 2**14  # numbers that a run of the model may hold for a row to be cheap: some .1 ms


def thrifty(joint: LogJoint, num: int, least: int) -> int:
    """``num`` where a row is cheap; else in proportion to what a row costs, but no fewer than ``least``.

    Args:
        joint: The target.
        num: Rows, starts or chains of a step.
        least: Fewest that serve.
    """
    return max(min(least, num), round(num * min(1.0, CHEAP / joint.run_size)))
