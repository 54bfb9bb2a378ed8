"""KernelLangevin: an exact MCMC kernel from a population and the kernel-Langevin bridge fitted to it."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.mcmc.frozen import freeze
from pyro_sb.infer.mcmc.kernel import WalkingKernel
from pyro_sb.infer.mcmc.walk import ROLES
from pyro_sb.infer.population.coordinates import choose_coordinates
from pyro_sb.infer.population.population import temper_weights
from pyro_sb.weights import normalise

logger = logging.getLogger(__name__)


class KernelLangevin(WalkingKernel):
    r"""Exact MCMC by the kernel-Langevin bridge of a population, every move Metropolis-corrected.

    Warm-up builds a weighted population of the target (multi-start Newton search, importance check, tempered SMC
    where the check fails), fits a :class:`~pyro_sb.bridges.langevin.bridge.KernelLangevinBridge` to it, chooses its
    bandwidth, tunes steps, trajectory length and, above floors, the mixture of moves by expected squared jump per
    evaluation, and freezes all of it. The chains then run a mixture of three moves, each of which leaves the target
    exactly invariant:

    - ``bridge``: the calibrated local move :math:`N(x + c(m(x) - x), (1 - A_\tau^2) K)` of the bridge, without
      gradients;
    - ``index``: jumps between the components of a normalised mixture with heavy-tailed guard, in the limit of a long
      time independence proposals, which cross between separated modes;
    - ``local``: Hamiltonian Monte Carlo in the population's metric.

    The statistic ``move`` of a draw is 0, 1 or 2 in this order; :meth:`describe` says what warm-up found.

    It runs in ``pyro.infer.MCMC`` (one chain a process) and, with chains as a tensor dimension, in
    ``pyro_sb.infer.MCMC``.

    What it cannot do: a mode that no start found stays missing, and R-hat does not notice; above some 50 dimensions
    the bridge and index moves hardly accept and HMC does the work.

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
            them.
        reparam: ``"auto"``: where the population fits poorly (a funnel), chains walk in the model's non-centred
            coordinates if the population fits better there; draws are the model's own sites either way. None: never.
        init_strategy: Pyro's per-site strategy for the starts of the search.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.

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
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            init_strategy=init_strategy,
            max_plate_nesting=max_plate_nesting,
            transforms=transforms,
            jit_compile=jit_compile,
        )
        self.options: dict[str, Any] = {
            "local": _checked_local(local),
            "epsilons": _checked_epsilons(epsilons),
            "index_time": _checked_index_time(index_time),
            "min_bridge_probability": _checked_share(min_bridge_probability),
            "probabilities": _checked_probabilities(probabilities, local),
        }
        if reparam not in ("auto", None):
            raise ValueError(
                f'reparam must be "auto" or None, got {reparam!r}. For your own, use pyro.poutine.reparam.'
            )
        self.num_particles = _checked_count("num_particles", num_particles, 50)
        self.start = _checked_start(start)
        self.reparam = reparam

    def _facts(self) -> dict[str, Any]:
        """Evidence and quality of the population."""
        assert self.population is not None
        return {
            "log evidence": self.population.log_evidence,
            "log evidence error": self.population.log_evidence_error,
            "population share": self.population.ess_share,
        }

    def describe(self) -> str:
        """What warm-up found and froze, in lines: the population, its evidence, coordinates, moves, threads."""
        if self.population is None or self.frozen is None:
            return "KernelLangevin before its warm-up"
        coordinates = "the model's own" if self.coordinates is None else f"non-centred in {self.coordinates.sites}"
        evidence = f"{self.population.log_evidence:.3f} +- {self.population.log_evidence_error:.3f}"
        lines = [*self.population.stages, f"log evidence: {evidence}", f"coordinates: {coordinates}"]
        return "\n".join([*lines, f"moves: {self.frozen.describe()}", self._target.threads])

    def _prepare(self) -> None:
        """Build the population, and fit, tune and freeze the moves on it, once."""
        if self.frozen is not None:
            return
        reparam = self.reparam if self._joint_options["transforms"] is None else None
        self.coordinates, self.population = choose_coordinates(
            self.log_joint, self._build, self.num_particles, self.start, reparam, self._hints()
        )
        self.frozen = freeze(self._target, self.population, **self.options)
        logger.info("moves: %s", self.frozen.describe())
        index = self.frozen.acceptance.get("index", 1.0)
        if index < 0.05:
            warnings.warn(
                f"The index move accepts {index:.3f} < 0.05: chains hardly cross between modes, and the start decides "
                f"the modes' shares. Raise num_particles (now {self.num_particles}), or reparametrise the model.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _starts(self, num: int) -> Tensor:
        """Draws of the population by weight."""
        assert self.population is not None
        weights = normalise(temper_weights(self.population.log_weights, 50.0))
        return self.population.points[torch.multinomial(weights, num, replacement=True)]


def _checked_local(local: str | None) -> str | None:
    if local not in ("hmc", "mala", None):
        raise ValueError(f'local must be "hmc", "mala" or None, got {local!r}.')
    return local


def _checked_epsilons(epsilons: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(value) for value in epsilons) if isinstance(epsilons, Sequence) else ()
    if not values or not all(0.0 < value < math.inf for value in values):
        raise ValueError(
            "epsilons must be a sequence of positive finite bandwidths, at least one, "
            f"got {epsilons!r}. Write epsilons=(1.0, 4.0, 16.0, 64.0)."
        )
    return values


def _checked_count(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be at least {least} and whole, got {value!r}. Write {name}={max(least, 1024)}.")
    return value


def _checked_start(start: str | Tensor) -> str | Tensor:
    if not isinstance(start, Tensor) and not (isinstance(start, str) and start in ("search", "prior")):
        raise ValueError(f'start must be "search", "prior" or a tensor of points (M, dim), got {start!r}.')
    return start


def _checked_index_time(index_time: int | None) -> int | None:
    if index_time is not None and (not isinstance(index_time, int) or index_time < 1):
        raise ValueError(f"index_time must be None or a whole number of at least 1, got {index_time!r}. Write None.")
    return index_time


def _checked_share(share: float) -> float:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"min_bridge_probability must lie in [0, 1), got {share}. Write 0.1.")
    return share


def _checked_probabilities(probabilities: Mapping[str, float] | None, local: str | None) -> dict[str, float] | None:
    if probabilities is None:
        return None
    roles = ROLES if local is not None else ROLES[:2]
    unknown = set(probabilities) - set(roles)
    total = sum(probabilities.values())
    if unknown or not abs(total - 1.0) <= 1e-6 or min(probabilities.values()) < 0.0:
        raise ValueError(
            f"probabilities must be non-negative, sum to 1 and be named among {roles}, got {dict(probabilities)}. "
            'Write probabilities={"bridge": 0.1, "index": 0.9}.'
        )
    return {role: float(value) for role, value in probabilities.items() if value > 0.0}
