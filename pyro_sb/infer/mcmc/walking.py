r"""Contract of kernels that learn moves in warm-up, freeze them and walk: :math:`\pi`-invariant steps for `MCMC`.

What warm-up learnt stays when a run ends, and is carried to files: a run may go on from it.
"""

import logging
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.fingerprint import differences
from pyro_sb.infer.mcmc.figures import PerChain
from pyro_sb.infer.mcmc.record import Block
from pyro_sb.infer.mcmc.walk import Frozen, Walk
from pyro_sb.plain import from_plain, to_plain
from pyro_sb.threads import chosen_threads
from pyro_sb.warn import warn

__all__ = ["Sites", "WalkingKernel", "Words"]

RECHECKS = 3  # of a target that was refuted where its chains stand

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
        for _ in range(RECHECKS):  # what is built anew may take the same route again, at other points
            self._forget()
            self._prepare()
            x = self._starts(1 if self.num_chains is None else self.num_chains)
            if self._target.recheck(x) is None:
                break
        assert self.frozen is not None
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
