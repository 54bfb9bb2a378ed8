"""What warm-up learns and freezes: the bridge, the moves and their probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import BridgeMove, HamiltonianMove, IndexMove, Move
from pyro_sb.infer.moves.tuning import Batch, Tuned, share_moves, tune
from pyro_sb.infer.population.population import Population, temper_weights
from pyro_sb.infer.population.tempering import within_covariance
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance
from pyro_sb.weights import normalise, systematic_resample

TUNING_CHAINS = 64


@dataclass(frozen=True)
class Frozen:
    """Frozen moves by role: ``"bridge"``, ``"index"``, ``"local"``.

    Attributes:
        moves: The moves.
        probabilities: Probabilities that sum to one, independent of the state.
        acceptance: Acceptance rates measured while tuning.
        bridge: The fitted bridge behind the bridge move, or None if that move is left out.
    """

    moves: dict[str, Move]
    probabilities: dict[str, float]
    acceptance: dict[str, float]
    bridge: KernelLangevinBridge | None

    def describe(self) -> str:
        """One line: each move with its probability, acceptance rate and step."""
        parts = []
        for role, move in self.moves.items():
            step = f", step {move.step_size:.3g}" if move.step_size else ""
            rate = self.acceptance.get(role, 0.0)
            parts.append(f"{role} ({move.name}) p {self.probabilities[role]:.2f}, accepts {rate:.2f}{step}")
        return "; ".join(parts)


def freeze(
    log_joint: LogJoint,
    population: Population,
    *,
    local: str | None,
    epsilons: tuple[float, ...],
    index_time: int | None,
    min_bridge_probability: float,
    probabilities: dict[str, float] | None,
) -> Frozen:
    """Fit, tune and freeze the moves on a population; the options are KernelLangevin's."""
    points, weights = equal_weights(population)
    metric = within_covariance(population.core, points, weights)
    metrics = [metric] if population.core.num_components == 1 else [metric, weighted_covariance(points, weights)]
    scale = torch.linalg.cholesky(metric)
    start = torch.multinomial(weights, TUNING_CHAINS, replacement=True)
    batch = Batch(points[start], log_joint.log_prob(points[start]))
    tuned: dict[str, Tuned] = {}
    roles = set(probabilities) if probabilities is not None else {"bridge", "index"} | ({"local"} if local else set())
    bridges: list[KernelLangevinBridge] = []
    if "bridge" in roles or index_time is not None:
        bridges = [fit_bridge(points, weights, metric, epsilon) for metric in metrics for epsilon in epsilons]
    if "bridge" in roles:
        candidates = []
        for bridge in bridges:
            candidate, batch = tune(BridgeMove(bridge), log_joint, batch, scale)
            candidates.append(candidate)
        tuned["bridge"] = max(candidates, key=lambda item: item.efficiency)
    if "index" in roles:
        move = index_move(population, bridges[0] if bridges else None, points, index_time)
        tuned["index"], batch = tune(move, log_joint, batch, scale)
    if "local" in roles:
        fit = tuned["index"].acceptance if "index" in tuned else 0.0
        limit, spread = (1, 1.5) if local == "mala" else trajectory_range(fit)
        tuned["local"], batch = tune_local(population.core, log_joint, batch, scale, max_steps=limit, spread=spread)
    shares = probabilities if probabilities is not None else share_moves(tuned, min_bridge_probability)
    bridge_move = tuned["bridge"].move if "bridge" in tuned else None
    return Frozen(
        {role: item.move for role, item in tuned.items()},
        {role: shares[role] for role in tuned},
        {role: item.acceptance for role, item in tuned.items()},
        bridge_move.bridge if isinstance(bridge_move, BridgeMove) else None,
    )


def equal_weights(population: Population, num: int = 1024) -> tuple[Tensor, Tensor]:
    """At most ``num`` distinct points of a population with their weights: systematic draws, multiplicities as weights.

    Weights with fewer than 50 effective draws are flattened first; that costs acceptance, never exactness.
    """
    weights = normalise(
        temper_weights(
            population.log_weights, min(0.5 * len(population.points), 50.0 + 10.0 * population.points.shape[1])
        )
    )
    index, counts = systematic_resample(weights, num).unique(return_counts=True)
    return population.points[index], counts.to(population.points.dtype) / num


def fit_bridge(points: Tensor, weights: Tensor, metric: Tensor, epsilon: float) -> KernelLangevinBridge:
    """The bridge of the weighted points at one bandwidth, in the given metric."""
    bridge = KernelLangevinBridge(points.shape[1], metric=metric, epsilon=epsilon, scheme="plain")
    bridge.fit(points, weights=weights, progress=False)
    return bridge


def index_move(
    population: Population, bridge: KernelLangevinBridge | None, points: Tensor, index_time: int | None
) -> IndexMove:
    r"""The index move of the population's mixture, coupled by ``index_time`` steps of the bridge.

    With responsibilities R of the components at the points and the bridge's coupling :math:`\Pi`, :math:`C = R^\top
    \Pi R` is symmetric; its row sums are the components' weights, :math:`D(w)^{-1} C` is w-reversible, and so are its
    powers.
    """
    if index_time is None or bridge is None:
        return IndexMove(population.proposal)
    share = population.proposal.log_responsibilities(points).exp()
    coupling = share.T @ (bridge.weights[:, None] * bridge.transition_probabilities(points)) @ share
    coupling = 0.5 * (coupling + coupling.T)
    weights = coupling.sum(1)
    mixture: StudentMixture = population.proposal._replace(log_weights=(weights / weights.sum()).log())
    transition = torch.linalg.matrix_power(coupling / weights[:, None], index_time)
    return IndexMove(mixture, transition / transition.sum(1, keepdim=True))


def trajectory_range(fit: float) -> tuple[int, float]:
    """Largest number of leapfrog steps and spread of step sizes, given the index move's acceptance.

    Where the mixture fits, the local move is but a guard. Where it does not, there are regions much narrower than its
    components, which only small steps leave.
    """
    if fit > 0.85:
        return 4, 1.5
    return (8, 10.0) if fit > 0.6 else (32, 30.0)


def tune_local(
    core: StudentMixture, log_joint: LogJoint, batch: Batch, scale: Tensor, max_steps: int, spread: float
) -> tuple[Tuned, Batch]:
    """HMC whose number of leapfrog steps doubles while the efficiency rises."""
    best: Tuned | None = None
    num_steps, step_size = (1, 0.5) if max_steps == 1 else (2, 0.5)
    while num_steps <= max_steps:
        candidate, batch = tune(HamiltonianMove(core, num_steps, step_size, spread), log_joint, batch, scale)
        if best is not None and candidate.efficiency <= best.efficiency:
            break
        best, step_size = candidate, candidate.move.step_size
        num_steps *= 2
    assert best is not None
    return best, batch
