"""KernelLangevin: an exact MCMC kernel from a population and the kernel-Langevin bridge fitted to it."""

import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.infer.coordinates import choose_coordinates
from pyro_sb.infer.frozen import Frozen, freeze
from pyro_sb.infer.noncentred import NonCentred
from pyro_sb.infer.population import Population, temper_weights
from pyro_sb.infer.potential import LogJoint, log_joint
from pyro_sb.infer.record import Block
from pyro_sb.infer.walk import ROLES, Walk
from pyro_sb.weights import normalise

logger = logging.getLogger(__name__)


class KernelLangevin(MCMCKernel):
    r"""Exact MCMC by the kernel-Langevin bridge of a population, every move Metropolis-corrected.

    Warm-up builds a weighted population of the target (multi-start Newton search, importance check, tempered SMC
    where the check fails), fits a :class:`~pyro_sb.bridges.kernel_langevin.KernelLangevinBridge` to it, chooses its
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
        >>> from pyro_sb.infer.mcmc import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(KernelLangevin(model), num_samples=50, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.tensor(3.0))
        >>> mcmc.get_samples()["mu"].shape
        torch.Size([800])
    """

    default_warmup_steps = 32

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
        if (model is None) == (potential_fn is None):
            raise ValueError("Exactly one of model and potential_fn must be given. Write KernelLangevin(model).")
        self.model = model
        self.potential_fn = potential_fn
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
        self.num_chains: int | None = None
        self._joint_options: dict[str, Any] = {
            "init_strategy": init_strategy,
            "max_plate_nesting": max_plate_nesting,
            "transforms": transforms,
            "jit_compile": jit_compile,
        }
        self.population: Population | None = None
        self.frozen: Frozen | None = None
        self.coordinates: NonCentred | None = None
        self._initial_params: dict[str, Tensor] | None = None
        self._reset()

    def _reset(self) -> None:
        self._own_start: dict[str, Tensor] | None = None
        self._walk: Walk | None = None
        self._standing: Tensor | None = None
        self._steps_left = 0

    # Pyro's contract

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Bind the model's arguments; what was learnt from others is dropped.

        The population is built at the first draw.
        """
        self._reset()
        self.population = self.frozen = self.coordinates = None
        self._steps_left = warmup_steps
        self._arguments = (args, kwargs)
        self.log_joint: LogJoint = self._build(self.model, self._initial_params)
        self._check_sites()

    @property
    def transforms(self) -> dict[str, Any]:
        """Transforms from each site's support to the reals; their inverses constrain the draws."""
        return self.log_joint.transforms

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained start of the chains: the user's, or draws of the population by weight."""
        if self._initial_params is not None:
            return self._initial_params
        if self._own_start is None:
            self._prepare()
            assert self.population is not None
            num = 1 if self.num_chains is None else self.num_chains
            weights = normalise(temper_weights(self.population.log_weights, 50.0))
            index = torch.multinomial(weights, num, replacement=True)
            z = self._shown(self.population.points[index])
            self._own_start = self.log_joint.unpack(z if self.num_chains is not None else z[0])
        return self._own_start

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition from ``params``, for ``pyro.infer.MCMC``."""
        draws = self.sample_block(params, 1).draws
        return {name: value[0] if self.num_chains is not None else value[0, 0] for name, value in draws.items()}

    def sample_block(self, params: dict[str, Tensor], num_steps: int) -> Block:
        """``num_steps`` transitions of every chain from ``params``: draws and statistics, steps first."""
        self._prepare()
        walk = self._walk = self._walk_from(self._pack(params))
        if self._steps_left == 0:
            walk.forget_warmup()
        states, stats = walk.run(num_steps)
        self._steps_left -= num_steps
        draws = self.log_joint.unpack(self._shown(states))
        self._standing = self.log_joint.pack({name: value[-1] for name, value in draws.items()})
        return Block(draws, stats)

    def logging(self) -> OrderedDict[str, str]:
        """Acceptance rate and divergences, for the progress bar."""
        walk = self._walk
        if walk is None:
            return OrderedDict()
        return OrderedDict([("acc. prob", f"{walk.acceptance_rate:.3f}"), ("divergences", str(walk.num_divergences))])

    def diagnostics(self) -> dict[str, Any]:
        """Acceptance rates in all and per move, the moves' probabilities, evaluations, divergences."""
        walk, frozen, population = self._walk, self.frozen, self.population
        if walk is None or frozen is None or population is None:
            return {"divergences": []}
        evaluations = self.log_joint.evaluations
        report: dict[str, Any] = {
            "acceptance rate": walk.acceptance_by_chain.tolist()
            if self.num_chains is not None
            else walk.acceptance_rate,
            "density evaluations": evaluations.density,
            "gradient evaluations": evaluations.gradient,
            "log evidence": population.log_evidence,
            "log evidence error": population.log_evidence_error,
            "population share": population.ess_share,
        }
        for role, rate in walk.acceptance_by_role().items():
            report[f"acceptance {role}"] = rate.tolist() if self.num_chains is not None else float(rate)
            report[f"probability {role}"] = frozen.probabilities[role]
        if self.num_chains is None:
            report["divergences"] = walk.divergent_steps
        return report

    def describe(self) -> str:
        """What warm-up found and froze, in lines: the population's stages, its evidence, the coordinates, the moves."""
        if self.population is None or self.frozen is None:
            return "KernelLangevin before its warm-up"
        coordinates = "the model's own" if self.coordinates is None else f"non-centred in {self.coordinates.sites}"
        evidence = f"{self.population.log_evidence:.3f} +- {self.population.log_evidence_error:.3f}"
        lines = [*self.population.stages, f"log evidence: {evidence}", f"coordinates: {coordinates}"]
        return "\n".join([*lines, f"moves: {self.frozen.describe()}"])

    def cleanup(self) -> None:
        """Drop the chains' state. The population and the frozen moves stay for inspection."""
        self._initial_params = None
        self._reset()

    @property
    def save_params(self) -> list[str]:
        """Sites to keep, sorted: Pyro unpacks draws in sorted order."""
        return self._save_params

    @save_params.setter
    def save_params(self, names: Sequence[str]) -> None:
        self._save_params = sorted(names)

    # Warm-up

    def _check_sites(self) -> None:
        """Refuse what the caller set before the model was known."""
        known = sorted(self.log_joint.site_shapes)
        unknown = sorted(set(getattr(self, "_save_params", [])) - set(known))
        if unknown:
            raise ValueError(f"save_params must name sites of the model, got {unknown}. Known sites: {known}.")
        if self._initial_params is not None and not bool(torch.isfinite(self._pack(self._initial_params)).all()):
            raise ValueError(
                "initial_params must be finite, got NaN or infinite entries. Omit them, or drop those chains."
            )

    def _build(self, model: Callable[..., Any] | None, initial_params: dict[str, Tensor] | None = None) -> LogJoint:
        args, kwargs = self._arguments
        return log_joint(
            model,
            self.potential_fn,
            args=args,
            kwargs=kwargs,
            initial_params=initial_params,
            batched_initial=self.num_chains is not None,
            **self._joint_options,
        )

    def _prepare(self) -> None:
        """Build the population, and fit, tune and freeze the moves on it, once."""
        if self.frozen is not None:
            return
        given = None if self._initial_params is None else self._pack(self._initial_params).to(torch.float64)
        reparam = self.reparam if self._joint_options["transforms"] is None else None
        self.coordinates, self.population = choose_coordinates(
            self.log_joint, self._build, self.num_particles, self.start, reparam, given
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

    @property
    def _target(self) -> LogJoint:
        """Log joint in the coordinates that the chains walk in."""
        return self.log_joint if self.coordinates is None else self.coordinates.log_joint

    def _shown(self, state: Tensor) -> Tensor:
        """The model's unconstrained vector at states of the walk."""
        z = state if self.coordinates is None else self.coordinates.forward(state)
        return z.to(self.log_joint.dtype)

    def _walk_from(self, z: Tensor) -> Walk:
        """The running walk if it stands at z, else a new one from there."""
        if self._walk is not None and self._standing is not None and torch.equal(self._standing, z):
            return self._walk
        assert self.frozen is not None
        state = z.to(torch.float64)
        state = state if self.coordinates is None else self.coordinates.inverse(state)
        log_density = self._target.log_prob(state)
        finite = torch.isfinite(log_density)
        if not bool(finite.all()):
            rows = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"The log joint must be finite at every chain's start, but is not at chains {rows}. "
                "Omit initial_params, or give points inside the support."
            )
        return Walk(self._target, self.frozen, state, log_density)

    def _pack(self, params: dict[str, Tensor]) -> Tensor:
        flat = self.log_joint.pack(params).detach()
        if flat.ndim != (1 if self.num_chains is None else 2):
            chains = "no chain dimension: one chain" if self.num_chains is None else "one leading chain dimension"
            raise ValueError(
                f"initial_params must have {chains}, got {tuple(flat.shape[:-1])} before the site's shape."
            )
        return flat if self.num_chains is not None else flat[None]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the chains' state and coordinates, so that a kernel travels to another process."""
        lost = {"_walk": None, "coordinates": None}
        if self.coordinates is not None:  # they are in these coordinates, and mean nothing without them
            lost |= {"population": None, "frozen": None}
        return self.__dict__ | lost


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
