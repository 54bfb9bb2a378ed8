"""Distances from draws to a target: each metric returns a `Score`, which carries the score of a perfect sampler."""

from pyro_sb.metrics.affinity import mmd
from pyro_sb.metrics.bures import Moments, bw2_uvp, cbw2_uvp
from pyro_sb.metrics.classifier import c2st
from pyro_sb.metrics.modes import mode_share_tv, mode_shares
from pyro_sb.metrics.score import Score
from pyro_sb.metrics.transport import sliced_wasserstein2, wasserstein2

__all__ = [
    "Moments",
    "Score",
    "bw2_uvp",
    "c2st",
    "cbw2_uvp",
    "mmd",
    "mode_share_tv",
    "mode_shares",
    "sliced_wasserstein2",
    "wasserstein2",
]


def __dir__() -> list[str]:
    return sorted(__all__)
