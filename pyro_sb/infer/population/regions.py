"""Regions of a target in many dimensions as chains know them: without a maximum, bent, and with which shares."""

import math

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.mode_jumps import ModeJump, fit_jump
from pyro_sb.infer.population.rounds import LIGHT_GUARD, Archive
from pyro_sb.infer.population.settle import Settled, joined, settle, walked, widened
from pyro_sb.infer.population.sources import Tempered, laplace_mixture, law_of_points
from pyro_sb.infer.population.subspace import bent, mixture_along
from pyro_sb.infer.population.thrift import Budget
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.stages import announce

__all__ = ["HOPELESS", "chosen_proposal", "improved_regions", "settled_chains", "without_maxima"]

HOPELESS = 0.02
"""Effective share of a mixture in many dimensions under which chains start from their own states."""

OUTSIDE, MAX_REGIONS = 6.0, 4  # nats of weight by which a particle lies outside, and regions that are looked for so
LONG_WINDOW = 120  # steps that chains walk before shapes of regions are fitted once more


def settled_chains(archive: Archive, start: StudentMixture, num: int, stages: list[str]) -> tuple[Settled, float]:
    """Chains that settle in the regions of these laws, and the effective share of the normal laws fitted to them."""
    announce("chains")
    settled = settle(archive.log_joint, start)
    share = archive.add(settled.core, num, LIGHT_GUARD)
    stages += [settled.describe(), f"normal laws of draws and gradients: effective share {share:.3f}"]
    return settled, share


def without_maxima(
    archive: Archive, settled: Settled | None, found: Tempered, num: int, stages: list[str]
) -> Settled | None:
    """The chains, with more in regions that have no maximum of their own.

    Such a region is wide, with a narrow one inside or beside it that every ascent ends in. What reaches it, particles
    or chains from wide starts, has larger weights than the proposal's draws, and chains that start there keep those.
    """
    joint = archive.log_joint
    for name in ("particles", "chains from wide starts"):
        best = _best_for(archive, settled)
        if name == "particles":
            if found.particles is None:
                continue
            points, log_density = found.particles.points[:, 0], found.particles.log_density[:, 0]
        else:
            wide = settle(joint, widened(archive.cores[best]), max_windows=1)
            points, log_density = wide.points, wide.log_density
        for _ in range(MAX_REGIONS):
            other = _elsewhere(archive, settled, points, log_density)
            if other is None:
                break
            if settled is None:
                settled = settle(joint, laplace_mixture(found.optima, df=math.inf, inflation=1.0))
            settled = joined(settled, other)
            share = archive.add(settled.core, num, LIGHT_GUARD)
            stages.append(
                f"{name} settled in a region without a maximum of its own: normal laws of "
                f"{settled.core.num_components} regions, effective share {share:.3f}"
            )
    return settled


def _elsewhere(archive: Archive, settled: Settled | None, points: Tensor, log_density: Tensor) -> Settled | None:
    """Chains that settle where points lie outside, if they stay there; None if there are few, or they come home.

    Outside is where weights are larger than those of the known chains by far.
    """
    best, usual = _best_for(archive, settled), 0.0
    if settled is not None:
        own = archive.weights_beyond(best, settled.points, settled.log_density)
        usual = max(0.0, float(torch.quantile(own, 0.9)))
    out = archive.weights_beyond(best, points, log_density) > usual + OUTSIDE
    if float(out.double().mean()) < 0.01 or int(out.sum()) < 4:
        return None
    other = settle(archive.log_joint, law_of_points(points[out]), points[out])
    excess = float(archive.weights_beyond(best, other.points, other.log_density).median())
    return None if excess < usual + 0.5 * OUTSIDE else other


def _best_for(archive: Archive, settled: Settled | None) -> int:
    return archive.best if settled is None else _serving(archive, settled)[0]


def improved_regions(
    archive: Archive, settled: Settled, good_share: float, num: int, stages: list[str], purse: Budget
) -> tuple[Settled, ModeJump | None, float]:
    """In many dimensions: mixtures along the directions in which a region is not normal, or jumps between regions.

    The chains are the walk. Where they are in several regions, they are drawn by the regions' shares.
    """
    jump = None
    if settled.core.num_components > 1:
        settled, jump = _between_regions(archive.log_joint, settled, stages)
        archive.add(settled.core, num, LIGHT_GUARD)
    elif _bent_mixtures(archive, settled, num, stages) < good_share and purse.allows("more steps of the chains"):
        settled = walked(archive.log_joint, settled, archive.proposals[_serving(archive, settled)[0]])
        _bent_mixtures(archive, settled, num, stages)
    best = chosen_proposal(archive, settled)[0]
    return settled, jump, archive.excess(settled.points, settled.log_density, best)


def _between_regions(joint: LogJoint, settled: Settled, stages: list[str]) -> tuple[Settled, ModeJump | None]:
    """Shares of the regions and the jump between them, from the chains' states; the states, drawn by these shares."""
    for last in (False, True):
        label = settled.core.log_responsibilities(settled.points).argmax(-1)
        if len(label.unique()) < 2:
            return settled, None
        jump = fit_jump(joint, settled.points, label, gradients=settled.grad, log_density=settled.log_density)
        if last or not jump.lengthen:
            break
        settled = walked(joint, settled, None, LONG_WINDOW)
    shares = ", ".join(f"{share:.3f}" for share in jump.shares.log_shares.exp().tolist()[:8])
    stages.append(f"jumps between {jump.mixture.num_components} regions: accept {jump.acceptance:.2f}, shares {shares}")
    index = torch.multinomial(jump.weights, len(settled.points), replacement=True)
    points, log_density, grad = settled.points[index], settled.log_density[index], settled.grad[index]
    return settled._replace(core=jump.mixture, points=points, log_density=log_density, grad=grad), jump


def _bent_mixtures(archive: Archive, settled: Settled, num: int, stages: list[str]) -> float:
    """Mixtures along one and two directions, fitted to the chains' states; the largest effective share."""
    done = 0
    for most in (1, 2):
        shape = bent(settled.core, settled.points, settled.grad, most)
        if shape is None or shape.directions.shape[1] == done:
            break
        done = shape.directions.shape[1]
        core, proposal = mixture_along(shape, settled.points)
        archive.add(core, num, proposal=proposal)
    best, share = _serving(archive, settled)
    if done:
        stages.append(
            f"mixtures along {done} direction{'s' * (done > 1)}: the best has {archive.cores[best].num_components} "
            f"component{'s' * (archive.cores[best].num_components > 1)}, effective share {share:.3f}"
        )
    return share


def chosen_proposal(archive: Archive, settled: Settled | None) -> tuple[int, float]:
    """The proposal that the population is drawn from, and its effective share; that of the chains if none serves."""
    if settled is None:
        return archive.best, max(archive.shares())
    best, share = _serving(archive, settled)
    if share < HOPELESS:
        best = next(i for i, core in enumerate(archive.cores) if core.locs is settled.core.locs)
    return best, share


def _serving(archive: Archive, settled: Settled) -> tuple[int, float]:
    """The proposal that serves chains best, and its effective share."""
    shares = [archive.served(i, settled.points, settled.log_density) for i in range(len(archive.cores))]
    return max(enumerate(shares), key=lambda item: item[1])
