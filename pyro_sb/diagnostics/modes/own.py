"""The population that a run's own warm-up made, in the model's coordinates, with more draws of its frozen proposal."""

from dataclasses import replace
from typing import Any

import torch

from pyro_sb.infer.model.log_joint import Evaluations, LogJoint
from pyro_sb.infer.model.run import Run
from pyro_sb.infer.population.population import Population, honest_evidence

__all__ = ["MOST", "affordable_draws", "enlarged", "population_of"]

MOST, LEAST = 2**16, 1024  # fresh draws
SHARE = 8  # fresh draws cost at most so small a part of a run
GRADIENT = 3  # an evaluation with gradient, in evaluations of the density
ROWS, NUMBERS = 2**13, 2**24  # of a chunk; numbers that its runs of the model hold


def population_of(run: Run) -> Population | None:
    """What the kernel's warm-up found, if it made a population and still has it."""
    found = getattr(run.kernel, "population", None)
    return found if isinstance(found, Population) and isinstance(run.log_joint, LogJoint) else None


def affordable_draws(evaluations: Evaluations) -> int:
    """Fresh draws of a proposal that a report may take: 65,536, or an eighth of what the run cost."""
    return int(min(MOST, max(LEAST, (evaluations.density + GRADIENT * evaluations.gradient) / SHARE)))


def enlarged(run: Run, population: Population, num: int) -> Population:
    """A run's population with ``num`` fresh draws of its proposal instead of its own, in the model's coordinates.

    The proposal was frozen before, so the draws are independent of its fit, and of those that its evidence rests on.
    """
    joint, coordinates = run.log_joint, getattr(run.kernel, "coordinates", None)
    target = joint if coordinates is None else coordinates.log_joint
    size = max(64, min(ROWS, NUMBERS // max(1, joint.run_size)))
    points = population.proposal.sample(num)
    log_density = torch.cat([target.log_prob(part) for part in points.split(size)])
    log_weights = log_density - torch.cat([population.proposal.log_prob(part) for part in points.split(size)])
    value, error = honest_evidence(log_weights)
    return replace(
        population,
        points=_own(coordinates, points),
        log_weights=log_weights,
        log_density=log_density,
        core=population.core._replace(locs=_own(coordinates, population.core.locs)),
        log_evidence=value,
        log_evidence_error=error,
    )


def _own(coordinates: Any, points: torch.Tensor) -> torch.Tensor:
    return points if coordinates is None else coordinates.forward(points)
