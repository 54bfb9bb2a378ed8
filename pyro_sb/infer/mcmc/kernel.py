"""What kernels share that learn in warm-up, freeze and then walk: the contracts of Pyro and of `MCMC`."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.infer.mcmc.frozen import Frozen
from pyro_sb.infer.mcmc.record import Block
from pyro_sb.infer.mcmc.walk import Walk
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.coordinates import NonCentred
from pyro_sb.infer.population.population import Population
from pyro_sb.threads import chosen_threads

__all__ = ["WalkingKernel"]


class WalkingKernel(MCMCKernel):
    """A kernel whose moves are learnt once and frozen, for one chain or many.

    A subclass supplies ``_prepare``, which sets ``frozen`` (and perhaps ``coordinates`` and ``population``), and
    ``_starts``; ``_new_walk`` where its walk is its own.

    Args:
        model: Pyro model.
        potential_fn: Minus the log joint of one chain, instead of a model.
        init_strategy: Pyro's per-site strategy for starts.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.
    """

    default_warmup_steps = 32

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None,
        *,
        init_strategy: Callable[..., Any] | None,
        max_plate_nesting: int | None,
        transforms: dict[str, Any] | None,
        jit_compile: bool,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError(
                f"Exactly one of model and potential_fn must be given. Write {type(self).__name__}(model)."
            )
        self.model = model
        self.potential_fn = potential_fn
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

    # What a subclass supplies

    @abstractmethod
    def _prepare(self) -> None:
        """Learn and freeze the moves, once; nothing if that is done."""

    @abstractmethod
    def _starts(self, num: int) -> Tensor:
        """States that chains may start from, in the coordinates of the walk. Shape ``(num, dim)``."""

    def _new_walk(self, state: Tensor, log_density: Tensor) -> Walk:
        """A walk of the frozen moves from states ``(C, dim)``."""
        assert self.frozen is not None
        return Walk(self._target, self.frozen, state, log_density)

    # Pyro's contract

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Bind the model's arguments; what was learnt from others is dropped.

        Warm-up learns at the first draw.
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
        """Unconstrained start of the chains: the user's, or draws of what warm-up found, by weight."""
        if self._initial_params is not None:
            return self._initial_params
        if self._own_start is None:
            with chosen_threads():  # pyro.infer.MCMC opens no run
                self._prepare()
            z = self._shown(self._starts(1 if self.num_chains is None else self.num_chains))
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
        with chosen_threads():
            return self._walked(params, num_steps)

    def _walked(self, params: dict[str, Tensor], num_steps: int) -> Block:
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
        """Acceptance rates in all and per move, the probabilities of moves, evaluations, what warm-up found."""
        walk, frozen = self._walk, self.frozen
        if walk is None or frozen is None:
            return {"divergences": []}
        evaluations = self.log_joint.evaluations
        by_chain = self.num_chains is not None
        report: dict[str, Any] = {
            "acceptance rate": walk.acceptance_by_chain.tolist() if by_chain else walk.acceptance_rate,
            "density evaluations": evaluations.density,
            "gradient evaluations": evaluations.gradient,
        } | self._facts()
        for role, rate in walk.acceptance_by_role().items():
            report[f"acceptance {role}"] = rate.tolist() if by_chain else float(rate)
            report[f"probability {role}"] = frozen.probabilities[role]
        if not by_chain:
            report["divergences"] = walk.divergent_steps
        return report

    def _facts(self) -> dict[str, Any]:
        """What warm-up found, for `diagnostics`."""
        return {}

    def cleanup(self) -> None:
        """Drop the chains' state. What warm-up learnt stays for inspection."""
        self._initial_params = None
        self._reset()

    @property
    def save_params(self) -> list[str]:
        """Sites to keep, sorted: Pyro unpacks draws in sorted order."""
        return self._save_params

    @save_params.setter
    def save_params(self, names: Sequence[str]) -> None:
        self._save_params = sorted(names)

    # Parts

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

    def _hints(self) -> Tensor | None:
        """The user's starts as points for a search, in the model's coordinates."""
        return None if self._initial_params is None else self._pack(self._initial_params).to(torch.float64)

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
        return self._new_walk(state, log_density)

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
        lost: dict[str, Any] = {"_walk": None, "coordinates": None}
        if self.coordinates is not None:  # they are in these coordinates, and mean nothing without them
            lost |= {"population": None, "frozen": None}
        return self.__dict__ | lost
