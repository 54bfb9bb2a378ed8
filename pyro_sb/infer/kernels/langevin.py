r"""KernelLangevin, exact MCMC by :math:`N(x + c(m(x) - x), (1 - A_\tau^2) K)` of a bridge fitted to a population."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.langevin.setup import MetricTransitions
from pyro_sb.checks import number
from pyro_sb.infer.mcmc.kernel import ModelKernel, check_count
from pyro_sb.infer.mcmc.walk import ROLES, TUNING_CHAINS, Frozen
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import BridgeMove, HamiltonianMove, IndexMove, Move
from pyro_sb.infer.moves.tuning import ChainStates, Tuned, share_moves, trajectory_range, tune, tune_from, tune_local
from pyro_sb.infer.population.population import Population
from pyro_sb.infer.population.rounds import temper_weights
from pyro_sb.infer.population.settle import steps_of
from pyro_sb.infer.population.thrift import thrifty
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance, within_covariance
from pyro_sb.stages import announce
from pyro_sb.warn import warn
from pyro_sb.weights import normalise

__all__ = ["KernelLangevin"]

logger = logging.getLogger(__name__)

LONGEST = 32  # leapfrog steps of a local move


class KernelLangevin(ModelKernel):
    r"""Exact MCMC by the kernel-Langevin bridge of a population, every move Metropolis-corrected.

    Warm-up builds a weighted population of the target (multi-start Newton search, importance check, tempered SMC
    where the check fails), fits a :class:`~pyro_sb.bridges.langevin.bridge.KernelLangevinBridge` to it, chooses its
    bandwidth, tunes steps, trajectory length and, above floors, the mixture of moves by expected squared jump per
    evaluation, and freezes all of it. The chains then run a mixture of three moves, each of which leaves the target
    exactly invariant:

    - ``bridge``: the calibrated local move :math:`N(x + c(m(x) - x), (1 - A_\tau^2) K)` of the bridge, without
      gradients;
    - ``index``: jumps between the components of a normalised mixture, in the limit of a long time independence
      proposals, which cross between separated modes; up to 20 dimensions its guard has heavy tails;
    - ``local``: Hamiltonian Monte Carlo in the population's metric.

    Where chains of the warm-up settled in several regions of more than 20 dimensions, a fourth, ``jump``, follows each:
    an affine map from one region to another, whose shares were estimated by bridge sampling.

    The statistic ``move`` of a draw is 0, 1 or 2 in this order; :meth:`describe` says what warm-up found.

    It runs in ``pyro.infer.MCMC`` (one chain a process) and, with chains as a tensor dimension, in
    ``pyro_sb.infer.MCMC``.

    What it cannot do: a mode that no start found stays missing, and R-hat does not notice. In many dimensions the index
    move accepts where regions are normal but in one or two directions; elsewhere HMC does the work.

    Args:
        model: Pyro model.
        potential_fn: Minus the log joint of one chain's dict of unconstrained tensors, instead of a model; needs
            initial parameters.
        num_particles: Size of the population, at least 50.
        start: Where the population starts: ``"search"``, ``"prior"`` or unconstrained points of shape ``(M, dim)``.
        local: ``"hmc"``, ``"mala"``, or None for the bridge's own moves alone.
        epsilons: Bandwidths to choose from, as variances of the bridge's reference over one step, in units of the
            covariance within the mixture's components or of the whole one, whichever moves chains farther.
            ``math.inf`` is not allowed, but 1e6 is its Gaussian limit (pCN).
        index_time: Steps of the bridge's Markov chain between the mixture's components in an index move; None is the
            limit of infinitely many: independence.
        min_bridge_probability: Smallest probability of the bridge's local move, in [0, 1).
        probabilities: The moves' probabilities by role (``"bridge"``, ``"index"``, ``"local"``), instead of tuning
            them; the jump is then left out.
        reparam: ``"auto"``: chains walk in coordinates in which hierarchies are centred to a degree that each entry of
            each site learns from short chains; draws are the model's own sites either way. None: never.
        init_strategy: Pyro's per-site strategy for the starts of the search.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.
        warmup_budget: Rows of the log joint, a gradient counting 2.5, after which warm-up begins nothing more that may
            be left out: tempering of all particles, refits, walks. A warning says what was, and what follows. None: no
            bound. The choice of coordinates, the search, a scout, one round of chains and the tuning of moves are
            always made, and the choice of coordinates does not count.

    References:
        Stable generative modeling using Schrödinger bridges (Gottwald, Li, Marzouk and Reich, 2024),
        https://arxiv.org/abs/2401.04372

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_sb.infer.mcmc.mcmc import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(KernelLangevin(model), num_samples=50, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.tensor(3.0))
        >>> mcmc.get_samples()["mu"].shape
        torch.Size([800])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        num_particles: int = 1024,
        start: str | Tensor = "search",
        local: str | None = "hmc",
        epsilons: Sequence[float] = (1.0, 4.0, 16.0, 64.0),
        index_time: int | None = None,
        min_bridge_probability: float = 0.1,
        probabilities: Mapping[str, float] | None = None,
        reparam: str | None = "auto",
        init_strategy: Callable[..., Any] | None = None,
        max_plate_nesting: int | None = None,
        transforms: dict[str, Any] | None = None,
        jit_compile: bool = False,
        warmup_budget: float | None = None,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            local=local,
            num_particles=num_particles,
            start=start,
            reparam=reparam,
            init_strategy=init_strategy,
            max_plate_nesting=max_plate_nesting,
            transforms=transforms,
            jit_compile=jit_compile,
            warmup_budget=warmup_budget,
        )
        number("min_bridge_probability", min_bridge_probability, "[0, 1)", "Omit it for the default.")
        self.options: dict[str, Any] = {
            "local": local,
            "epsilons": _checked_epsilons(epsilons),
            "index_time": None if index_time is None else check_count("index_time", index_time, least=1),
            "min_bridge_probability": min_bridge_probability,
            "probabilities": _checked_probabilities(probabilities, local),
        }

    def _options(self) -> dict[str, Any]:
        return super()._options() | self.options

    def __repr__(self) -> str:
        lines = [f"KernelLangevin({self._subject()})"]
        if self.population is None or self.frozen is None:
            return "\n".join(
                [*lines, f"  before its warm-up: a population of {self.num_particles}, start {self._from}"]
            )
        return "\n".join([*lines, *(f"  {line}" for line in self.describe().splitlines()[-3:])])

    @property
    def _from(self) -> str:
        return f"{len(self.start)} given points" if isinstance(self.start, Tensor) else repr(self.start)

    def _facts(self) -> dict[str, Any]:
        """Evidence and quality of the population."""
        assert self.population is not None
        return {
            "log evidence": self.population.log_evidence,
            "log evidence error": self.population.log_evidence_error,
            "population share": self.population.ess_share,
        }

    def describe(self) -> str:
        """Lines on the population's stages, its evidence, the coordinates, moves and threads."""
        if self.population is None or self.frozen is None:
            return "KernelLangevin before its warm-up"
        evidence = f"{self.population.log_evidence:.3f} +- {self.population.log_evidence_error:.3f}"
        lines = [*self.population.stages, f"log evidence: {evidence}", f"coordinates: {self._where()}"]
        return "\n".join([*lines, f"moves: {self.frozen.describe()}", self._target.threads])

    def _prepare(self) -> None:
        """Build the population, and fit, tune and freeze the moves on it, once."""
        if self.frozen is not None:
            return
        population = self._populate()  # which also chooses the coordinates of the target
        self.frozen = freeze(self._target, population, **self.options)
        logger.info("moves: %s", self.frozen.describe())
        crossing = max(self.frozen.acceptance.get("index", 1.0), self.frozen.acceptance.get("jump", 0.0))
        settled = population.settled
        several = population.num_modes != 1 if settled is None else settled.core.num_components > 1
        if crossing < 0.05 and several:
            warn(
                f"The index move accepts {crossing:.3f} < 0.05: chains hardly cross between modes, and shares of modes "
                f"may be off, as the start decides them. Raise num_particles (now {self.num_particles}).",
            )

    def _starts(self, num: int) -> Tensor:
        """Draws of the population by weight, or states of the chains that settled where no mixture serves."""
        assert self.population is not None
        if self.population.states is not None:
            states = self.population.states
            return states[torch.randint(len(states), (num,), device=states.device)]
        enough = min(50.0, 0.5 * len(self.population.points))
        weights = normalise(temper_weights(self.population.log_weights, enough))
        return self.population.points[torch.multinomial(weights, num, replacement=True)]


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
    announce("moves")
    points, weights = population.distinct()
    metric = within_covariance(population.core, points, weights)
    metrics = [metric] if population.core.num_components == 1 else [metric, weighted_covariance(points, weights)]
    scale = torch.linalg.cholesky(metric)
    start = torch.multinomial(weights, thrifty(log_joint, TUNING_CHAINS, 16), replacement=True)
    batch = ChainStates(points[start], log_joint.log_prob(points[start]))
    tuned: dict[str, Tuned] = {}
    roles = set(probabilities) if probabilities is not None else {"bridge", "index"} | ({"local"} if local else set())
    bridges: list[MetricTransitions] = []
    if "bridge" in roles or index_time is not None:
        bridges = [MetricTransitions(points, weights, metric, epsilon) for metric in metrics for epsilon in epsilons]
    if "bridge" in roles:
        candidates = []
        for bridge in bridges:
            candidate, batch = tune(BridgeMove(bridge), log_joint, batch, scale)
            candidates.append(candidate)
        tuned["bridge"] = max(candidates, key=lambda item: item.efficiency)
    if "index" in roles:
        move = index_move(population, bridges[0] if bridges else None, points, index_time)
        tuned["index"], batch = tune(move, log_joint, batch, scale)
    if "local" in roles and local == "hmc" and population.settled is not None:
        settled = population.settled
        first = HamiltonianMove(settled.core, steps_of(settled.step_size), settled.step_size)
        tuned["local"], batch = tune_from(first, log_joint, batch, scale, LONGEST, settled.radius)
    elif "local" in roles:
        fit = tuned["index"].acceptance if "index" in tuned else 0.0
        limit, spread = (1, 1.5) if local == "mala" else trajectory_range(fit)
        tuned["local"], batch = tune_local(population.core, log_joint, batch, scale, max_steps=limit, spread=spread)
    shares = probabilities if probabilities is not None else share_moves(tuned, min_bridge_probability)
    moves: dict[str, Move] = {role: item.move for role, item in tuned.items()}
    acceptance = {role: item.acceptance for role, item in tuned.items()}
    jump = population.jump if probabilities is None else None
    if jump is not None:
        moves, acceptance = moves | {"jump": jump.move}, acceptance | {"jump": jump.acceptance}
    return Frozen(moves, {role: shares[role] for role in tuned}, acceptance, () if jump is None else ("jump",))


def index_move(
    population: Population, bridge: MetricTransitions | None, points: Tensor, index_time: int | None
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


def _checked_epsilons(epsilons: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(value) for value in epsilons) if isinstance(epsilons, Sequence) else ()
    if not values or not all(0.0 < value < math.inf for value in values):
        raise ValueError(
            "epsilons must be a sequence of positive finite bandwidths, at least one, "
            f"got {epsilons!r}. Write epsilons=(1.0, 4.0, 16.0, 64.0)."
        )
    return values


def _checked_probabilities(probabilities: Mapping[str, float] | None, local: str | None) -> dict[str, float] | None:
    if probabilities is None:
        return None
    roles = ROLES[:3] if local is not None else ROLES[:2]
    unknown = set(probabilities) - set(roles)
    total = sum(probabilities.values())
    if unknown or not abs(total - 1.0) <= 1e-6 or min(probabilities.values()) < 0.0:
        raise ValueError(
            f"probabilities must be non-negative, sum to 1 and be named among {roles}, got {dict(probabilities)}. "
            'Write probabilities={"bridge": 0.1, "index": 0.9}.'
        )
    return {role: float(value) for role, value in probabilities.items() if value > 0.0}
