r"""Contract of kernels that learn moves in warm-up, freeze them and walk: :math:`\pi`-invariant steps for `MCMC`.

`WalkingKernel` is the contract of Pyro and of `MCMC`; `ModelKernel` its form for a model or a ``potential_fn``, which
learns from a weighted population, in the model's coordinates or non-centred ones.
"""

import logging
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.fingerprint import differences, fingerprint, named
from pyro_sb.infer.mcmc.figures import PerChain
from pyro_sb.infer.mcmc.record import Block
from pyro_sb.infer.mcmc.walk import Frozen, Walk
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.coordinates import NonCentred, choose_coordinates, non_centred
from pyro_sb.infer.population.population import Population
from pyro_sb.plain import from_plain, is_plain, to_plain
from pyro_sb.threads import chosen_threads
from pyro_sb.warn import warn

__all__ = ["ModelKernel", "WalkingKernel", "check_count"]

logger = logging.getLogger(__name__)
Sites = dict[str, Tensor]
Words = dict[str, str]


class WalkingKernel(MCMCKernel):
    """A kernel whose moves are learnt once and frozen, for one chain or many.

    A subclass supplies ``_bind``, which gives the log joint of arguments; ``_prepare``, which sets ``frozen``; and
    ``_starts``. A state of its walk is one row a chain; `ModelKernel` may walk in other coordinates than the model's,
    and chains of B posteriors side by side have B rows each, by ``_rows``, ``_sites`` and ``_by_chain``.

    What warm-up learnt stays when a run ends. It serves a further run without warm-up steps, and one with the same
    arguments after warm-up was interrupted; `words_for` tells whether arguments are the same. `learnt` and `learn_from`
    carry it to a file and back: ``learns`` names the attributes that hold it.

    Attributes:
        num_chains: Set by `MCMC`; None for one chain of Pyro's runner.
        frozen: The moves, after warm-up.
        rest: Where the chains stood after their last steps, for `go_on`; None before.
        words: What tells the arguments that it has learnt from; None before, and where they cannot be told.
        log_joint: The target, after `setup`.
        model: The Pyro model, if there is one.
        walk_kind: The walk that carries the chains.
        divergence_cure: Advice of reports where trajectories diverge.
    """

    default_warmup_steps = 32
    walk_kind: type[Walk] = Walk
    divergence_cure = "a larger num_particles, or another parametrisation (non-centred)"
    model: Callable[..., Any] | None = None
    learns: tuple[str, ...] = ("frozen",)

    def __init__(self) -> None:
        self.num_chains: int | None = None
        self.frozen: Frozen | None = None
        self.words: Words | None = None
        self.rest: dict[str, Any] | None = None
        self._warmed = False  # whether a draw after warm-up was made
        self._initial_params: Sites | None = None
        self._report: dict[str, Any] = {"divergences": []}
        self._reset()

    def _forget(self) -> None:
        """Drop all that was learnt."""
        for name in self.learns:
            setattr(self, name, None)
        self.rest, self._warmed = None, False

    def _reset(self) -> None:
        self._own_start: Sites | None = None
        self._walk: Walk | None = None
        self._standing: Tensor | None = None
        self._steps_left = 0

    @abstractmethod
    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The log joint of the model's arguments."""

    @abstractmethod
    def _prepare(self) -> None:
        """Learn and freeze the moves, once; nothing if that is done."""

    @abstractmethod
    def _starts(self, num: int) -> Tensor:
        """States that ``num`` chains may start from, in the coordinates of the walk. Shape ``(rows, dim)``."""

    @abstractmethod
    def describe(self) -> str:
        """Lines on the population or bridge of warm-up, the coordinates, and the moves."""

    @property
    def _target(self) -> Any:
        """Log joint in the coordinates that the chains walk in."""
        return self.log_joint

    def _rows(self, sites: Sites) -> Tensor:
        """Unconstrained sites of the chains, in the model's coordinates, to rows ``(rows, dim)``."""
        flat = self.log_joint.pack(sites).detach()
        if flat.ndim != (1 if self.num_chains is None else 2):
            chains = "no chain dimension: one chain" if self.num_chains is None else "one leading chain dimension"
            raise ValueError(
                f"initial_params must have {chains}, got {tuple(flat.shape[:-1])} before the site's shape."
            )
        return flat if self.num_chains is not None else flat[None]

    def _sites(self, states: Tensor) -> Sites:
        """States of the walk, ``(*, rows, dim)``, to unconstrained sites ``(*, chains, *site)``."""
        return self.log_joint.unpack(states.to(self.log_joint.dtype))

    def _row_name(self, row: int) -> str:
        """A row of the walk, for messages."""
        return f"chain {row}"

    def _into_walk(self, rows: Tensor) -> Tensor:
        """Rows of the model's coordinates to those of the walk, in float64."""
        return rows.to(torch.float64)

    def _by_chain(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of rows to those of chains."""
        return stats

    def _facts(self) -> dict[str, Any]:
        """Figures of warm-up, for `diagnostics`."""
        return {}

    @abstractmethod
    def _words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Words:
        """What tells the target and the options from others, by name."""

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Bind the model's arguments; what was learnt before is dropped, but where it serves.

        It serves where ``warmup_steps`` is 0, and where warm-up from the same arguments was interrupted. Otherwise
        warm-up learns at the first draw.

        Raises:
            ValueError: ``warmup_steps`` is 0, and what was learnt is of another model, data or options.
        """
        words = self.words_for(args, kwargs)
        serves = self._serves(warmup_steps, words)
        if not serves:
            self._forget()
        self._reset()
        self._report, self._steps_left = {"divergences": []}, warmup_steps
        self.log_joint: Any = self._bind(args, kwargs)
        self._check_sites()
        self.words = words
        if serves:
            self._bind_learnt()

    def words_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Words | None:
        """What tells arguments from others, by name; None where that cannot be told."""
        try:
            return {"the kernel": type(self).__name__} | self._words(args, kwargs)
        except Exception as error:  # an object of the user's that cannot be looked through
            logger.info("arguments cannot be told from others: %s", error)
            return None

    def _serves(self, warmup_steps: int, words: Words | None) -> bool:
        """Whether what was learnt is for these arguments, and is to be used again."""
        if self.words is None or words is None or not self.has_learnt:
            return False
        differ = differences(self.words, words)
        if warmup_steps > 0:
            return not differ and not self._warmed
        if differ:
            raise ValueError(
                "warmup_steps=0 goes on with what the kernel has learnt, which must be of the same model, data and "
                f"options, got others: {differ}. Write warmup_steps=None to learn again, or run it on those."
            )
        return True

    @property
    def has_learnt(self) -> bool:
        """Whether warm-up has learnt anything so far."""
        return any(getattr(self, name) is not None for name in self.learns)

    def _bind_learnt(self) -> None:
        """Let what was learnt speak of the log joint that is bound now."""

    def learnt(self) -> dict[str, Any]:
        """What warm-up has learnt so far, as tensors and plain values.

        Raises:
            ValueError: Some of it is neither, such as a network of the user's own.
        """
        known = self._known()
        return {name: to_plain(getattr(self, name), known, name) for name in self.learns}

    def learn_from(self, learnt: dict[str, Any], rest: dict[str, Any] | None = None) -> None:
        """Take what a kernel of the same target has learnt, as `learnt` gave it; after `setup`.

        Args:
            learnt: What it has learnt.
            rest: Where its chains stood.
        """
        known = self._known()
        for name in self.learns:
            setattr(self, name, from_plain(learnt[name], known))
        self.rest, self._warmed = rest, rest is not None and rest["steps_left"] < 0

    def check_saved(self) -> None:
        """Refuse, before any work, what could not be written to a file afterwards."""

    def _known(self) -> dict[str, Any]:
        """Objects that a file names and does not hold."""
        return {}

    def config(self) -> dict[str, Any] | None:
        """The constructor's options as plain values; None where a file needs the kernel itself."""
        return None

    def go_on(self, rest: dict[str, Any], *, counting_on: bool) -> None:
        """Stand where chains rested, after `setup` with the same arguments.

        Args:
            rest: As `rest` was.
            counting_on: Whether what they counted belongs to the same run.
        """
        assert self.frozen is not None
        rows = self._rows(rest["sites"])
        if rest["walk"]["x"].shape != rows.shape:
            raise ValueError(
                f"the chains' state must have shape {tuple(rows.shape)}, as their sites say, got "
                f"{tuple(rest['walk']['x'].shape)}."
            )
        walk = self.walk_kind.resumed(self._target, self.frozen, rest["walk"])
        if self._target.route != rest["route"]:  # it may have been wrong where chains stand
            self._target.recheck(walk.x)
        if counting_on:
            self._steps_left = rest["steps_left"]
        else:
            walk.count_anew()
        self._walk, self._own_start, self._standing = walk, rest["sites"], rows
        self.rest = rest | {"walk": walk.state(), "steps_left": self._steps_left}

    @property
    def transforms(self) -> dict[str, Any]:
        """Transforms from each site's support to the reals; their inverses constrain the draws."""
        return self.log_joint.transforms

    @property
    def initial_params(self) -> Sites:
        """Unconstrained start of the chains: the user's, or draws of what warm-up found, by weight."""
        if self._initial_params is not None:
            return self._initial_params
        if not self.log_joint.dim:
            return {}
        if self._own_start is None:
            with chosen_threads(self.log_joint):  # pyro.infer.MCMC opens no run
                self._prepare()
            sites = self._sites(self._starts(1 if self.num_chains is None else self.num_chains))
            self._own_start = sites if self.num_chains is not None else {name: x[0] for name, x in sites.items()}
        return self._own_start

    @initial_params.setter
    def initial_params(self, params: Sites) -> None:
        self._initial_params = params

    def sample(self, params: Sites) -> Sites:
        """One transition from ``params``, for ``pyro.infer.MCMC``."""
        if not params:  # a model without latents, as in Pyro
            return {}
        draws = self.sample_block(params, 1).draws
        return {name: value[0] if self.num_chains is not None else value[0, 0] for name, value in draws.items()}

    def sample_block(self, params: Sites, num_transitions: int) -> Block:
        """``num_transitions`` of every chain from ``params``: draws and statistics, transitions first."""
        if not self.log_joint.dim:  # nothing to move; discrete sites are drawn from their posterior
            still = torch.zeros(num_transitions, 1 if self.num_chains is None else self.num_chains)
            return Block({}, {"acceptance_rate": still + 1, "diverging": still.bool()})
        with chosen_threads(self.log_joint):
            return self._walked(params, num_transitions)

    def _walked(self, params: dict[str, Tensor], num_transitions: int) -> Block:
        self._prepare()
        walk = self._walk = self._walk_from(self._rows(params))
        if self._steps_left == 0:
            walk.forget_warmup()
            walk = self._walk = self._confirmed(walk)
        states, stats = walk.run(num_transitions)
        self._warmed = self._steps_left <= 0
        self._steps_left -= num_transitions
        draws = self._sites(states)
        last = {name: value[-1] if self.num_chains is not None else value[-1, 0] for name, value in draws.items()}
        self._standing = self._rows(last)
        stats = self._by_chain(stats)
        walk.count_divergences(stats["diverging"])
        where = {"num_chains": self.num_chains, "steps_left": self._steps_left, "route": self._target.route}
        self.rest = {"walk": walk.state(), "sites": last} | where
        return Block(draws, stats)

    def _confirmed(self, walk: Walk) -> Walk:
        """The walk after warm-up, its target compared with single chains where they stand, once.

        Where another route of the target must be taken, warm-up learns again, and the chains start from what it finds.
        """
        objection = self._target.recheck(walk.x)
        if objection is None:
            return walk
        warn(
            "A batch of chains is not what single chains are, where they stand after warm-up: what warm-up learnt was "
            f"wrong ({objection}). It learns again, and the draws are right but slower, by {self._target.route}. Write "
            "the model so that chains can be a leading dimension: dim=-1 in means and sums.",
        )
        self._forget()
        self._prepare()
        assert self.frozen is not None
        x = self._starts(1 if self.num_chains is None else self.num_chains)
        return self.walk_kind(self._target, self.frozen, x, self._target.log_prob(x))

    @property
    def walk(self) -> Walk | None:
        """The chains' running walk; None before the first step and after `cleanup`."""
        return self._walk

    @property
    def step_size(self) -> Tensor:
        """Leapfrog step of the local move in units of its metric, ``()`` or one an observation; warm-up tunes it.

        To set it is an experiment: the target stays invariant at any step, chains may stand still.
        """
        return torch.as_tensor(self._local_move().step_size, dtype=torch.float64)

    @step_size.setter
    def step_size(self, value: float | Tensor) -> None:
        move = self._local_move()
        if isinstance(move.step_size, Tensor):
            move.step_size = torch.as_tensor(value).to(move.step_size).expand_as(move.step_size).clone()
        else:
            move.step_size = float(value)

    def _local_move(self) -> Any:
        self._prepare()
        moves = {} if self.frozen is None else self.frozen.moves
        if "local" not in moves:
            raise AttributeError(
                f"step_size is that of trajectories, got a {type(self).__name__} without: its moves are {list(moves)}. "
                'Write local="hmc".'
            )
        return moves["local"]

    def logging(self) -> OrderedDict[str, str]:
        """Acceptance rate and divergences, for the progress bar."""
        walk = self._walk
        if walk is None:
            return OrderedDict()
        return OrderedDict([("acc. prob", f"{walk.acceptance_rate:.3f}"), ("divergences", str(walk.num_divergences))])

    def diagnostics(self) -> dict[str, Any]:
        """Acceptance rates in all and per move, the probabilities of moves, evaluations, what warm-up found.

        After `cleanup` those of the run that has ended.
        """
        walk, frozen = self._walk, self.frozen
        if walk is None or frozen is None:
            return self._report
        evaluations = self.log_joint.evaluations
        by_chain = self.num_chains is not None
        by_role = {f"acceptance {role}": rate[None] for role, rate in walk.acceptance_by_role().items()}
        rates = self._by_chain({"acceptance rate": walk.acceptance_by_chain[None]} | by_role)
        report: dict[str, Any] = {
            "acceptance rate": PerChain(rates["acceptance rate"][0].tolist()) if by_chain else walk.acceptance_rate,
            "density evaluations": evaluations.density,
            "gradient evaluations": evaluations.gradient,
        } | self._facts()
        for role in frozen.moves:
            rate = rates[f"acceptance {role}"][0]
            report[f"acceptance {role}"] = PerChain(rate.tolist()) if by_chain else float(rate)
            report[f"probability {role}"] = frozen.probabilities.get(role, 1.0)
        if not by_chain:
            report["divergences"] = walk.divergent_steps
        return report

    def cleanup(self) -> None:
        """Drop the chains' state. What warm-up learnt, `rest` and `diagnostics` stay."""
        self._report = self.diagnostics()
        self._initial_params = None
        self._reset()

    @property
    def save_params(self) -> list[str]:
        """Sites to keep, sorted: Pyro unpacks draws in sorted order."""
        return self._save_params

    @save_params.setter
    def save_params(self, names: Sequence[str]) -> None:
        self._save_params = sorted(names)

    def _check_sites(self) -> None:
        """Refuse what the caller set before the model was known."""
        known = sorted(self.log_joint.site_shapes)
        unknown = sorted(set(getattr(self, "_save_params", [])) - set(known))
        if unknown:
            raise ValueError(f"save_params must name sites of the model, got {unknown}. Known sites: {known}.")
        if self._initial_params is not None and not bool(torch.isfinite(self._rows(self._initial_params)).all()):
            raise ValueError(
                "initial_params must be finite, got NaN or infinite entries. Omit them, or drop those chains."
            )

    def _walk_from(self, z: Tensor) -> Walk:
        """The running walk if it stands at z, else a new one from there."""
        if self._walk is not None and self._standing is not None and torch.equal(self._standing, z):
            return self._walk
        state = self._into_walk(z)
        log_density = self._target.log_prob(state)
        finite = torch.isfinite(log_density)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            shown = ", ".join(self._row_name(row) for row in bad[:8]) + f" and {len(bad) - 8} more" * (len(bad) > 8)
            raise ValueError(
                f"The log joint must be finite at every chain's start, but is not at {shown}. "
                "Omit initial_params, or give points inside the support."
            )
        assert self.frozen is not None
        return self.walk_kind(self._target, self.frozen, state, log_density)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the chains' state, so that a kernel travels to another process."""
        return self.__dict__ | {"_walk": None}


class ModelKernel(WalkingKernel):
    """A kernel of a model or of a ``potential_fn``, which may walk in the model's non-centred coordinates.

    Args:
        model: Pyro model.
        potential_fn: Minus the log joint of one chain, instead of a model.
        local: The local move: ``"hmc"``, ``"mala"``, or None.
        num_particles: Size of the population, at least 50.
        start: Where the population starts: ``"search"``, ``"prior"`` or unconstrained points of shape ``(M, dim)``.
        reparam: ``"auto"``: non-centred coordinates where the population fits poorly in the model's. None: never.
        init_strategy: Pyro's per-site strategy for starts.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.

    Attributes:
        population: The population that warm-up made, if it made one.
        coordinates: The non-centred coordinates that the chains walk in; None for the model's own.
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
        self.population: Population | None = None
        self.coordinates: NonCentred | None = None

    def _options(self) -> dict[str, Any]:
        """The constructor's options but for the model."""
        own = {"local": self.local, "num_particles": self.num_particles, "start": self.start, "reparam": self.reparam}
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
            self.coordinates = self._found_coordinates()

    def _found_coordinates(self) -> NonCentred:
        """The non-centred coordinates of the log joint that is bound now."""
        found = non_centred(self.log_joint, self._build)
        if found is None:
            raise ValueError(
                "the chains walked in the model's non-centred coordinates, but it has none now. Let warm-up learn "
                "again: warmup_steps=None, without the file."
            )
        return found

    def learnt(self) -> dict[str, Any]:
        """What warm-up has learnt so far, as tensors and plain values."""
        return super().learnt() | {"non_centred": self.coordinates is not None}

    def learn_from(self, learnt: dict[str, Any], rest: dict[str, Any] | None = None) -> None:
        """Take what a kernel of the same target has learnt, as `learnt` gave it; after `setup`."""
        self.coordinates = self._found_coordinates() if learnt["non_centred"] else None
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
        self.coordinates, self.population = choose_coordinates(
            self.log_joint, self._build, self.num_particles, self.start, reparam, self._hints()
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
        return "the model's own" if self.coordinates is None else f"non-centred in {self.coordinates.sites}"

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
