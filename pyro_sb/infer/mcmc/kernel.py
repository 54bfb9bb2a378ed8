r"""Kernels of a model or of a ``potential_fn``, which learn from a weighted population, in coordinates that serve."""

import warnings
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from pyro_sb.checks import number
from pyro_sb.fingerprint import fingerprint, named
from pyro_sb.infer.mcmc.walking import Sites, WalkingKernel, Words
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.build import NO_PROPOSAL
from pyro_sb.infer.population.coordinates import NonCentred, choose_coordinates, known_coordinates
from pyro_sb.infer.population.population import Population
from pyro_sb.plain import is_plain

__all__ = ["ModelKernel", "check_count"]


class ModelKernel(WalkingKernel):
    """A kernel of a model or of a ``potential_fn``, which may walk in the model's non-centred coordinates.

    Args:
        model: Pyro model.
        potential_fn: Minus the log joint of one chain, instead of a model.
        local: The local move: ``"hmc"``, ``"mala"``, or None.
        num_particles: Size of the population, at least 50.
        start: Where the population starts: ``"search"``, ``"prior"`` or unconstrained points of shape ``(M, dim)``.
        reparam: ``"auto"``: hierarchies centred to a degree learnt from short chains. None: never.
        init_strategy: Pyro's per-site strategy for starts.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.
        warmup_budget: Rows after which warm-up begins nothing more that may be left out. None: no bound.

    Attributes:
        population: The population that warm-up made, if it made one.
        coordinates: The partly centred coordinates that the chains walk in; None for the model's own.
    """

    learns: tuple[str, ...] = ("population", "frozen")

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[[Sites], Tensor] | None,
        *,
        local: str | None,
        num_particles: int,
        start: str | Tensor,
        reparam: str | None,
        init_strategy: Callable[..., Any] | None,
        max_plate_nesting: int | None,
        transforms: dict[str, Any] | None,
        jit_compile: bool,
        warmup_budget: float | None = None,
    ) -> None:
        super().__init__()
        if (model is None) == (potential_fn is None):
            name = type(self).__name__
            raise ValueError(
                f"Exactly one of model and potential_fn must be given, got {'both' if model is not None else 'neither'}"
                f". Write {name}(model), or {name}(potential_fn=...) for minus a log density of a dict of tensors."
            )
        for role, given in (("model", model), ("potential_fn", potential_fn)):
            if given is not None and not callable(given):
                raise TypeError(f"{role} must be a function, got {type(given).__name__}. Write a Pyro model.")
        self.model = model
        self.potential_fn = potential_fn
        self._joint_options: dict[str, Any] = {
            "init_strategy": init_strategy,
            "max_plate_nesting": max_plate_nesting,
            "transforms": transforms,
            "jit_compile": jit_compile,
        }
        if local not in ("hmc", "mala", None):
            raise ValueError(f'local must be "hmc", "mala" or None, got {local!r}.')
        if reparam not in ("auto", None):
            raise ValueError(
                f'reparam must be "auto" or None, got {reparam!r}. For your own, use pyro.poutine.reparam.'
            )
        if not isinstance(start, Tensor) and not (isinstance(start, str) and start in ("search", "prior")):
            raise ValueError(f'start must be "search", "prior" or a tensor of points (M, dim), got {start!r}.')
        self.num_particles = check_count("num_particles", num_particles, least=50)
        self.local, self.start, self.reparam = local, start, reparam
        cure = "Omit it for no bound."
        self.warmup_budget = None if warmup_budget is None else number("warmup_budget", warmup_budget, "(0, inf)", cure)
        self.population: Population | None = None
        self.coordinates: NonCentred | None = None

    def _options(self) -> dict[str, Any]:
        """The constructor's options but for the model."""
        own = {name: getattr(self, name) for name in ("local", "num_particles", "start", "reparam", "warmup_budget")}
        return self._joint_options | own

    def config(self) -> dict[str, Any] | None:
        """The constructor's options as plain values; None where some are functions."""
        options = self._options()
        return options if self.potential_fn is None and is_plain(options) else None

    def _words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Words:
        target = named(self.model if self.model is not None else self.potential_fn)
        return {
            "the model": target,
            "the data": fingerprint(args, kwargs),
            "the options": fingerprint(self._options()),
        }

    def _forget(self) -> None:
        super()._forget()
        self.coordinates = None

    def _bind_learnt(self) -> None:
        if self.coordinates is not None:
            self.coordinates = self._found_coordinates(self.coordinates.degrees)

    def _found_coordinates(self, degrees: dict[str, Tensor]) -> NonCentred:
        """The coordinates of these degrees of centring, of the log joint that is bound now."""
        found = known_coordinates(self.log_joint, self._build, degrees)
        if found is None:
            raise ValueError(
                "the chains walked in the model's non-centred coordinates, but it has none now. Let warm-up learn "
                "again: warmup_steps=None, without the file."
            )
        return found

    def learnt(self) -> dict[str, Any]:
        """What warm-up has learnt so far, as tensors and plain values."""
        return super().learnt() | {"centring": None if self.coordinates is None else self.coordinates.degrees}

    def learn_from(self, learnt: dict[str, Any], rest: dict[str, Any] | None = None) -> None:
        """Take what a kernel of the same target has learnt, as `learnt` gave it; after `setup`."""
        degrees = learnt["centring"]
        self.coordinates = None if degrees is None else self._found_coordinates(degrees)
        super().learn_from(learnt, rest)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogJoint:
        self._arguments = (args, kwargs)
        if self.model is not None and not args and not kwargs:
            self._refuse_potential(self.model)
        return self._build(self.model, self._initial_params)

    def _refuse_potential(self, model: Callable[..., Any]) -> None:
        """Name ``potential_fn=`` where a function of one argument got none."""
        try:
            given = signature(model).parameters.values()
        except (TypeError, ValueError):  # a callable without a signature
            return
        places = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
        needed = [p.name for p in given if p.default is Parameter.empty and p.kind in places]
        if len(needed) == 1:
            raise ValueError(
                f"model must get its arguments from run(), got none for {needed[0]!r}. Write run({needed[0]}); or, if "
                f"it is minus the log density of a dict of tensors, {type(self).__name__}(potential_fn=...)."
            )

    def _build(self, model: Callable[..., Any] | None, initial_params: Sites | None = None) -> LogJoint:
        args, kwargs = self._arguments
        return log_joint(
            model,
            self.potential_fn,
            args=args,
            kwargs=kwargs,
            initial_params=initial_params,
            batched_initial=self.num_chains is not None,
            points=self.start if isinstance(self.start, Tensor) else None,
            empty=True,
            **self._joint_options,
        )

    def _hints(self) -> Tensor | None:
        """The user's starts as points for a search, in the model's coordinates."""
        return None if self._initial_params is None else self._rows(self._initial_params).to(torch.float64)

    def _populate(self) -> Population:
        """Build the population, in the coordinates that serve it best, once."""
        if self.population is not None:
            return self.population
        reparam = self.reparam if self._joint_options["transforms"] is None else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NO_PROPOSAL)  # chains need none
            self.coordinates, self.population = choose_coordinates(
                self.log_joint, self._build, self.num_particles, self.start, reparam, self._hints(), self.warmup_budget
            )
        return self.population

    @property
    def _target(self) -> LogJoint:
        return self.log_joint if self.coordinates is None else self.coordinates.log_joint

    def _sites(self, states: Tensor) -> Sites:
        z = states if self.coordinates is None else self.coordinates.forward(states)
        return super()._sites(z)

    def _into_walk(self, rows: Tensor) -> Tensor:
        rows = super()._into_walk(rows)
        return rows if self.coordinates is None else self.coordinates.inverse(rows)

    def _where(self) -> str:
        """The coordinates, for `describe`."""
        return "the model's own" if self.coordinates is None else self.coordinates.describe()

    def _subject(self) -> str:
        """The model's name, and whether arguments are bound, for `__repr__`."""
        what = f"potential_fn {_name(self.potential_fn)}" if self.model is None else f"model {_name(self.model)}"
        joint = getattr(self, "log_joint", None)
        if joint is None:
            return f"{what}, not set up: MCMC's run(*model_args) does it"
        return f"{what}, {joint.dim} unconstrained number{'s' * (joint.dim != 1)} in {list(joint.site_shapes)}"

    def __getstate__(self) -> dict[str, Any]:
        lost: dict[str, Any] = {"coordinates": None}
        if self.coordinates is not None:  # they are in these coordinates, and mean nothing without them
            lost |= {"population": None, "frozen": None, "rest": None}
        return super().__getstate__() | lost


def _name(function: Any) -> str:
    """A function's name; a partial's is that of its function."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}. Omit it for the default.")
    return value
