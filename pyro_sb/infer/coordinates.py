"""Which coordinates the chains walk in: the model's own, or its non-centred form where that fits better."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_sb.infer.noncentred import NonCentred, non_centred
from pyro_sb.infer.population import FAIR_SHARE, Population, populate
from pyro_sb.infer.potential import LogJoint

logger = logging.getLogger(__name__)


def choose_coordinates(
    log_joint: LogJoint,
    build: Callable[[Callable[..., Any]], LogJoint],
    num_particles: int,
    start: str | Tensor,
    reparam: str | None,
    hints: Tensor | None = None,
) -> tuple[NonCentred | None, Population]:
    """The population of a target, in the coordinates where its mixture fits better.

    The model's own coordinates come first. If the search met no maximum there (a funnel) or the effective share is
    under .6, the non-centred form is tried, where there is one.

    Args:
        log_joint: Log joint of the model.
        build: Makes the log joint of another model with the same arguments.
        num_particles: Size of the population.
        start: As in :func:`~pyro_sb.infer.population.populate`; points are in the model's coordinates.
        reparam: ``"auto"``, or None for the model's own coordinates only.
        hints: Points for the search, in the model's coordinates.

    Returns:
        The non-centred coordinates, or None for the model's own, and the population in them.
    """
    coordinates = non_centred(log_joint, build) if reparam else None
    if coordinates is None:
        return None, populate(log_joint, num_particles, start=start, hints=hints)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The population is poor")  # its rival may be better
        population = populate(log_joint, num_particles, start=start, hints=hints, exploring=False)
    if not _suspect(population):
        return None, population
    moved = coordinates.inverse(start) if isinstance(start, Tensor) else start
    rival = populate(
        coordinates.log_joint,
        num_particles,
        start=moved,
        hints=None if hints is None else coordinates.inverse(hints),
    )
    logger.info("effective share %.3f, non-centred %.3f", population.ess_share, rival.ess_share)
    if (not _suspect(rival), rival.ess_share) > (False, population.ess_share):
        return coordinates, rival
    return None, populate(log_joint, num_particles, start=start, hints=hints)


def _suspect(population: Population) -> bool:
    """Whether a region may be missing: a share cannot see what no draw has met; a search without maximum can."""
    return population.ess_share < FAIR_SHARE or population.funnel
