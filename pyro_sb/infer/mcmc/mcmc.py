r"""MCMC, Pyro's runner with chains as a tensor dimension: states ``(chains, ...)``, blocks ``(steps, chains, ...)``.

Pyro's own runner gives every chain a process and hands draws over one at a time. Here one process moves all chains
together, and one batched evaluation of the log joint serves every chain.

A kernel takes part by the *batched protocol*: it is a :class:`~pyro.infer.mcmc.mcmc_kernel.MCMCKernel` that also has

* ``num_chains``: set by :class:`MCMC` before ``setup``, ``None`` under :class:`pyro.infer.MCMC`;
* ``default_warmup_steps``: used for ``warmup_steps=None``;
* ``sample_block(params, num_transitions) -> Block``: ``num_transitions`` further states of every chain;
* ``log_joint``: after ``setup``, the :class:`~pyro_sb.infer.model.log_joint.LogJoint` that it samples;
* ``diagnostics()``: its figures; one with a value a chain is a :class:`~pyro_sb.infer.mcmc.walk.PerChain`.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc import api, util
from pyro.util import optional
from torch import Tensor

from pyro_sb.bridges.checkpoint import on_device
from pyro_sb.files import checkpoint_path
from pyro_sb.fingerprint import differences, fingerprint
from pyro_sb.infer.mcmc.drawing import Drawing, Hook, RunPlan
from pyro_sb.infer.mcmc.figures import (
    SAME,
    figures_of,
    floating,
    moving_entries,
    site_diagnostics,
    varying,
    worst_r_hat,
)
from pyro_sb.infer.mcmc.options import check_kernel, check_starts, check_steps, detached, site_names
from pyro_sb.infer.mcmc.record import Record
from pyro_sb.infer.mcmc.results import Results
from pyro_sb.infer.mcmc.saved import Checkpoint, kernel_of, read_run
from pyro_sb.infer.mcmc.walking import WalkingKernel
from pyro_sb.infer.model.log_joint import Evaluations
from pyro_sb.infer.model.run import Run
from pyro_sb.plain import is_plain
from pyro_sb.threads import chosen_threads
from pyro_sb.training import random_state, set_random_state
from pyro_sb.warn import warn

__all__ = ["MCMC"]

logger = logging.getLogger(__name__)


class MCMC(api.MCMC):
    r"""Markov chains of a Pyro model, all chains in one tensor.

    Pyro's class, signature and methods. What differs: ``num_chains`` chains run vectorised in this process, 64 unless
    said otherwise (Pyro: 1); ``warmup_steps=None`` is what the kernel asks for (Pyro: ``num_samples``);
    ``initial_params`` always carry a leading chain dimension (also for one chain); and :meth:`get_samples` holds the
    ``pyro.deterministic`` sites too. A run can be drawn out (:meth:`extend`), saved and loaded, and goes on from a file
    where it was killed (``checkpoint``).

    Args:
        kernel: A kernel of the batched protocol (module docstring), such as ``KernelLangevin``.
        num_samples: Draws kept a chain, at least 1. After a run: the draws really made (fewer after Ctrl-C).
        warmup_steps: Steps before the first kept draw, at least 0. ``None``: the kernel's own default.
        initial_params: Unconstrained starts, each of shape ``(num_chains, *site)``. ``None``: the kernel finds them.
        num_chains: Number of chains, at least 1.
        hook_fn: Called as ``hook_fn(kernel, params, stage, i)`` after every step, with ``params`` of shape
            ``(num_chains, *site)`` and ``stage`` either ``"Warmup"`` or ``"Sample"``. Draws are then made one step at a
            time, which is slower.
        mp_context: Refused unless ``None``: there are no processes.
        disable_progbar: No progress bar. The environment variable ``CI`` has the same effect, as in Pyro.
        disable_validation: Switch Pyro's argument checks off (``True``), on (``False``) or leave them (``None``).
        transforms: ``transforms[site].inv`` maps draws to the constrained space. ``None``: the kernel's.
        save_params: The sites to keep, in any order; deterministic sites may be named too. ``None``: all.
        checkpoint: A file in which `run` keeps what was learnt, the draws and torch's random state as it goes on, and
            from which it goes on if it ended early. ``None``: no file.

    Attributes:
        checkpoint: The file's path, or None.

    Raises:
        TypeError: The kernel has no ``sample_block``.
        ValueError: ``num_samples`` or ``num_chains`` < 1, ``warmup_steps`` < 0, an ``mp_context``, or starts without a
            chain dimension.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_sb.infer.kernels.langevin import KernelLangevin
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(KernelLangevin(model), num_samples=50, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.zeros(3))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
        torch.Size([16, 50])
    """

    num_samples: int
    num_chains: int

    def __init__(
        self,
        kernel: Any,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: dict[str, Tensor] | None = None,
        num_chains: int = 64,
        hook_fn: Hook | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: dict[str, Any] | None = None,
        save_params: Iterable[str] | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        check_kernel(kernel)
        check_steps("num_samples", num_samples, least=1)
        check_steps("num_chains", num_chains, least=1)
        check_starts(initial_params, num_chains)
        if mp_context is not None:
            raise ValueError(
                f"mp_context must be None, got {mp_context!r}: chains are a tensor dimension of one process here. "
                "Leave it out, or use pyro.infer.MCMC for one process a chain."
            )
        api.AbstractMCMC.__init__(self, kernel, num_chains, transforms)  # api.MCMC.__init__ would start processes
        self.warmup_steps = kernel.default_warmup_steps if warmup_steps is None else warmup_steps
        check_steps("warmup_steps", self.warmup_steps, least=0)
        self.num_samples = num_samples
        self.initial_params = initial_params
        self.hook_fn = hook_fn
        self.disable_progbar = disable_progbar
        self.disable_validation = disable_validation
        self.save_params = None if save_params is None else site_names(save_params)
        self.checkpoint = checkpoint_path(checkpoint)
        self._num_requested = num_samples
        self._user_transforms = transforms
        self._drawn: Results | None = None
        self._log_joint: Any = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._words: dict[str, str] | None = None
        self._rest: Any = None
        self._frozen: Any = None

    def run(self, *args: Any, **kwargs: Any) -> None:
        r"""Warm the kernel up and draw.

        With ``warmup_steps=0`` a kernel that has been warmed up for the same model, arguments and options does not
        learn again, and as many chains as before go on from where they stood. A kernel whose warm-up from these
        arguments was interrupted goes on from what it had learnt.

        With ``checkpoint`` a run that ended early, by whatever, goes on from its file, bit for bit as if nothing had
        happened; where the file holds the finished run, its draws are taken and a warning says so.

        Ctrl-C while drawing keeps the draws made so far, with a warning that counts them; only the block in progress, 8
        to 64 steps, is lost. Any other exception keeps them too, and is raised again with a note. Results of an earlier
        run stay until this one has draws of its own.

        Args:
            *args: The model's positional arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            KeyboardInterrupt: Ctrl-C before the first draw. What warm-up has learnt until then stays in the kernel.
            ValueError: ``save_params`` names an unknown site; ``warmup_steps`` is 0 and the kernel was warmed up for
                another model, other data or options; the checkpoint is of another run.
        """
        with chosen_threads(args, kwargs), self._prepared_kernel():
            checkpoint, saved = self._found_checkpoint(args, kwargs)
            if saved is not None and saved["going"] is None:
                self._take_up(saved, args, kwargs)
                warn(
                    f"{self.checkpoint} holds this run, finished: its {self.num_samples} draws a chain are taken. "
                    "Delete it to draw again, or write extend(n) for more.",
                    UserWarning,
                )
                return
            record = Record(self.save_params)
            plan = self._plan(self.warmup_steps, self._num_requested)
            drawing = Drawing(self.kernel, plan, record, checkpoint, partial(self._contents, args, kwargs))
            with self._kept(record, args, kwargs):
                if saved is None:
                    self._setup_kernel(self.warmup_steps, args, kwargs)
                    record.open(self.kernel.log_joint)
                    drawing.params = self._stand_where_chains_rested()
                else:
                    self._resume(saved, drawing, args, kwargs)
                drawing.run()
            if record.num_draws == self._num_requested:  # else it was interrupted
                if checkpoint is not None:
                    checkpoint.write(partial(self._finished, args, kwargs))
                self._warn_of_r_hat()

    def extend(self, num_samples: int) -> None:
        r"""Draw further from where the chains stand, without learning again.

        The new draws follow those that are there: `get_samples`, ``sample_stats``, `diagnostics`, ``evaluations`` and
        ``seconds`` speak of all. Model and arguments are those of the run. With ``checkpoint`` its file holds all when
        this ends, and until then the run as it was.

        Args:
            num_samples: Further draws of a chain, at least 1.

        Raises:
            RuntimeError: There was no run.
            ValueError: The model, its arguments or the kernel's options have changed since the run, or the kernel has
                learnt other moves for another run.

        Example:
            >>> import torch, pyro.distributions as dist
            >>> from pyro_sb.infer.kernels.langevin import KernelLangevin
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> mcmc = MCMC(KernelLangevin(model), num_samples=20, num_chains=8, disable_progbar=True)
            >>> mcmc.run(torch.tensor(1.0))
            >>> mcmc.extend(30)
            >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
            torch.Size([8, 50])
        """
        self._results()
        check_steps("num_samples", num_samples, least=1)
        args, kwargs = self._args, self._kwargs
        with chosen_threads(args, kwargs), self._prepared_kernel():
            record = Record(self.save_params)
            drawing = Drawing(self.kernel, self._plan(0, num_samples), record)
            drawing.stage, drawing.params = 1, self._stand_again()
            record.open(self.kernel.log_joint)
            with self._kept(record, args, kwargs, further=True):
                drawing.run()
            if self.checkpoint is not None:
                self._file(self.checkpoint).write(partial(self._finished, args, kwargs))
            self._warn_of_r_hat()

    def save(self, path: str | Path) -> None:
        """Write the draws, what warm-up has learnt and where the chains stand to a file, read back by `load`.

        Args:
            path: The file: tensors and plain values alone, written whole or not at all.

        Raises:
            RuntimeError: There was no run.
            TypeError: The kernel cannot be written.
            ValueError: ``transforms`` of the user's own, a model that cannot be told from others, or one that has
                changed since the run, as its data or the kernel's moves may have.
        """
        self._results()
        file = self._file(path)
        self._check_unchanged()
        file.write(partial(self._finished, self._args, self._kwargs))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        map_location: Any = None,
    ) -> "MCMC":
        r"""A run that `save` or ``checkpoint`` wrote: with its draws and figures, ready for `extend`.

        A file of a run that did not end has the draws made so far.

        Args:
            path: The file. Read with ``weights_only=True``: no code in it is run.
            model: The Pyro model; a kernel like that of the run, where its options were functions or it had a bridge
                or a ``potential_fn``; a conditioned posterior for chains of
                :meth:`~pyro_sb.infer.amortized.posterior.Posterior.mcmc`.
            args: The model's positional arguments, where the file does not hold them: what is no tensor and no plain
                value.
            kwargs: Its keyword arguments, likewise.
            map_location: As in `torch.load`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no whole file of a run, or one of another model, other data or options: both are named.

        Example:
            >>> import tempfile, torch, pyro.distributions as dist
            >>> from pyro_sb.infer.kernels.langevin import KernelLangevin
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> mcmc = MCMC(KernelLangevin(model), num_samples=20, num_chains=8, disable_progbar=True)
            >>> mcmc.run(torch.tensor(1.0))
            >>> path = tempfile.mkdtemp() + "/run.pt"
            >>> mcmc.save(path)
            >>> MCMC.load(path, model).get_samples()["mu"].shape
            torch.Size([160])
        """
        saved = read_run(path, map_location)
        try:
            kernel = kernel_of(model, saved, _family(WalkingKernel), path)
            options = saved["options"]
            mcmc = cls(
                kernel,
                options["num_samples"],
                options["warmup_steps"],
                num_chains=options["num_chains"],
                save_params=options["save_params"],
            )
        except (KeyError, TypeError) as error:
            raise _altered(path, error) from error
        held = saved["arguments"]
        if args is None and kwargs is None and held is None:
            raise ValueError(
                f"{path} does not hold the model's arguments, which were more than tensors and plain values. Write "
                "MCMC.load(path, model, args=(y,))."
            )
        mine, theirs = ((), {}) if held is None else (tuple(held["args"]), held["kwargs"])
        args, kwargs = mine if args is None else args, theirs if kwargs is None else kwargs
        with chosen_threads(args, kwargs), mcmc._prepared_kernel():
            mcmc._check_words(saved["words"], args, kwargs, path)
            if saved["rest"] is not None:  # the shapes of a potential's sites
                kernel.initial_params = saved["rest"]["sites"]
            mcmc._take_up(saved, args, kwargs)
        return mcmc

    def _plan(self, warmup_steps: int, num_samples: int) -> RunPlan:
        return RunPlan((warmup_steps, num_samples), self.hook_fn, self.disable_progbar)

    @contextmanager
    def _kept(
        self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any], *, further: bool = False
    ) -> Iterator[None]:
        """Make a record's draws results, also where the work inside is interrupted or fails."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if record.num_draws == 0:
                raise KeyboardInterrupt(self._without_draws(further)) from interrupt
            self._adopt(record, args, kwargs, further=further)
            made = f"{record.num_draws} {'further ' * further}draws a chain"
            made = made if further else f"{record.num_draws} of {self._num_requested} draws a chain"
            warn(f"interrupted: {made} were made and are kept.", UserWarning)
        except Exception as error:
            if record.num_draws > 0:
                self._adopt(record, args, kwargs, further=further)
                _add_note(error, f"The first {record.num_draws} draws of each chain are kept: see get_samples().")
            else:
                _add_note(error, "No draws were made.")
            raise
        else:
            self._adopt(record, args, kwargs, further=further)

    def _without_draws(self, further: bool) -> str:
        """What to say of an interrupt before the first draw."""
        if further:
            return f"interrupted: no further draws were made; {self.num_samples} draws a chain are there as before."
        kept = isinstance(self.kernel, WalkingKernel) and self.kernel.has_learnt
        more = " What was learnt is kept: run(...) with the same arguments goes on from it." if kept else ""
        return f"interrupted in warm-up: no draws were made.{more}"

    @contextmanager
    def _prepared_kernel(self) -> Iterator[None]:
        """Lend the kernel our number of chains and Pyro's switches, and clean it up whatever happens."""
        before = getattr(self.kernel, "num_chains", None)
        self.kernel.num_chains = self.num_chains
        validation = pyro.validation_enabled(not self.disable_validation)
        try:
            with poutine.block(), optional(validation, self.disable_validation is not None):
                yield
        finally:
            self.kernel.cleanup()
            self.kernel.num_chains = before  # the kernel may serve pyro.infer.MCMC next

    def _setup_kernel(self, warmup_steps: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.initial_params is not None:
            self.kernel.initial_params = {name: value.clone() for name, value in self.initial_params.items()}
        args, kwargs = detached(args, kwargs)
        self.kernel.setup(warmup_steps, *args, **kwargs)

    def _stand_where_chains_rested(self) -> dict[str, Tensor] | None:
        """Let a kernel that needs no warm-up go on from its chains' last states, if they are as many; their sites."""
        kernel = self.kernel
        if not isinstance(kernel, WalkingKernel):
            return None
        rest, kernel.rest = kernel.rest, None
        if rest is None or self.warmup_steps or self.initial_params or rest["num_chains"] != self.num_chains:
            return None
        kernel.go_on(rest, counting_on=False)
        sites: dict[str, Tensor] = rest["sites"]
        return sites

    def _stand_again(self) -> dict[str, Tensor]:
        """Let the chains of this run go on from their last states; their sites."""
        kernel, rest, args, kwargs = self.kernel, self._rest, self._args, self._kwargs
        sites: dict[str, Tensor] = rest["sites"]
        if not isinstance(kernel, WalkingKernel) or "walk" not in rest:
            kernel.initial_params = {name: value.clone() for name, value in sites.items()}
            args, kwargs = detached(args, kwargs)
            kernel.setup(0, *args, **kwargs)
            return sites
        self._check_unchanged()
        if kernel.log_joint is not self._log_joint:
            random = random_state()
            self._setup_kernel(0, args, kwargs)
            set_random_state(random)  # checks of a log joint draw points; the draws are those of the same seed
            self._count_before(kernel.log_joint)
        kernel.go_on(rest, counting_on=True)
        return sites

    def _check_unchanged(self) -> None:
        """Refuse to speak of a run whose model, data, options or moves are others by now."""
        differ = differences(self._words, self.kernel.words_for(*detached(self._args, self._kwargs)) or {})
        if differ:
            raise ValueError(
                f"extend and save are of the run's own model, data and options, but they have changed since: {differ}. "
                "Write run(...) to begin anew."
            )
        if self.kernel.frozen is not self._frozen:
            raise ValueError(
                "extend and save need the moves that made the draws, but the kernel has learnt others since, for "
                "another run. Extend or save that run, or give each MCMC a kernel of its own."
            )

    def _count_before(self, log_joint: Any) -> None:
        """Add the evaluations of the draws that are there to those of a new log joint."""
        counts = self._results().evaluations
        log_joint.evaluations.density += counts.density
        log_joint.evaluations.gradient += counts.gradient

    def _found_checkpoint(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Checkpoint | None, dict[str, Any] | None]:
        """The file to keep this run in, and what lies there of it."""
        if self.checkpoint is None:
            return None, None
        checkpoint = self._file(self.checkpoint, args, kwargs)
        saved = checkpoint.found()
        return checkpoint, saved

    def _file(self, path: Any, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> Checkpoint:
        """A file of this run; refused where the run could not be written."""
        if not isinstance(self.kernel, WalkingKernel):
            raise TypeError(
                f"a run is written to a file with what its kernel has learnt, but {type(self.kernel).__name__} cannot "
                "be written. Use KernelLangevin or BridgeMH, or leave the file out."
            )
        if self._user_transforms is not None:
            raise ValueError(
                "transforms are functions, which no file keeps, but a run with transforms of its own was to be "
                "written. Leave transforms out, and map the draws afterwards."
            )
        self.kernel.check_saved()
        args, kwargs = detached(self._args if args is None else args, self._kwargs if kwargs is None else kwargs)
        words = self.kernel.words_for(args, kwargs)
        return Checkpoint.at(path, None if words is None else words | self._own_words())

    def _own_words(self) -> dict[str, str]:
        """What tells runs of one kernel and arguments from each other."""
        return {
            "the number of chains": str(self.num_chains),
            "the number of warm-up steps": str(self.warmup_steps),
            "the number of draws": str(self._num_requested),
            "the sites kept": str(self.save_params),
            "the start": fingerprint(self.initial_params),
            "the default dtype": str(torch.get_default_dtype()),
        }

    def _check_words(self, words: dict[str, str], args: tuple[Any, ...], kwargs: dict[str, Any], path: Any) -> None:
        """Refuse a file of another model, other data or options."""
        mine = self.kernel.words_for(*detached(args, kwargs)) or {}
        theirs = {name: word for name, word in words.items() if name not in self._own_words()}
        differ = differences(theirs, mine)
        if differ:
            raise ValueError(
                f"{path} must be given the model, data and options that it was drawn with, got others: {differ}. Load "
                "it with those, or run anew."
            )

    def _contents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a file of this run holds beside its place or its results."""
        kernel = self.kernel
        args, kwargs = detached(args, kwargs)
        arguments = {"args": list(args), "kwargs": kwargs}
        return {
            "options": {
                "num_samples": self._num_requested,
                "warmup_steps": self.warmup_steps,
                "num_chains": self.num_chains,
                "save_params": self.save_params,
                "kernel": type(kernel).__name__,
                "config": kernel.config(),
            },
            "arguments": arguments if is_plain(arguments) else None,
            "kernel": kernel.learnt(),
            "rest": kernel.rest,
        }

    def _finished(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the file of a run that ended holds: its results among it."""
        ended = {"going": None, "results": self._results().packed(), "rest": self._rest}
        return self._contents(args, kwargs) | ended

    def _take_up(self, saved: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what a file holds: what was learnt, and the draws with their figures."""
        self._setup_kernel(max(1, self.warmup_steps), args, kwargs)
        device = self.kernel.log_joint.device
        try:
            rest, going = on_device(saved["rest"], device), on_device(saved["going"], device)
            self.kernel.learn_from(on_device(saved["kernel"], device), rest)
            if going is None:
                self._bound(rest, args, kwargs)
                self._draw(Results.unpacked(on_device(saved["results"], device)))
                counts, drawn = self.kernel.log_joint.evaluations, self._results().evaluations
                counts.density, counts.gradient = drawn.density, drawn.gradient
                if "walk" in rest:
                    self.kernel.go_on(rest, counting_on=True)
                return
            record = Record(self.save_params)
            record.open(self.kernel.log_joint)
            Drawing(self.kernel, self._plan(0, 1), record).resume(going, rest)
            if record.num_draws:
                self._adopt(record, args, kwargs)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise _altered("the file", error) from error

    def _resume(self, saved: dict[str, Any], drawing: Drawing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a run stand where its file left it, torch's random state included."""
        self._setup_kernel(self.warmup_steps, args, kwargs)
        log_joint = self.kernel.log_joint
        drawing.record.open(log_joint)
        try:
            rest, going = on_device(saved["rest"], log_joint.device), on_device(saved["going"], log_joint.device)
            self.kernel.learn_from(on_device(saved["kernel"], log_joint.device), rest)
            drawing.resume(going, rest)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise _altered(self.checkpoint, error) from error
        set_random_state(going["random"])

    def _bound(self, rest: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the draws belong to, and where the chains stand."""
        kernel = self.kernel
        self._args, self._kwargs, self._rest = args, kwargs, rest
        self._log_joint = kernel.log_joint
        self._words, self._frozen = getattr(kernel, "words", None), getattr(kernel, "frozen", None)
        self.transforms = kernel.transforms if self._user_transforms is None else self._user_transforms

    def _adopt(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any], *, further: bool = False) -> None:
        """Make a record's draws this object's results, or let them follow those that are there."""
        self._bound(record.rest, args, kwargs)
        drawn = Results.of(record, self.kernel, self.transforms, self.num_chains)
        self._draw(drawn.after(self._results(), self._log_joint) if further else drawn)

    def _draw(self, drawn: Results) -> None:
        self._drawn, self.num_samples = drawn, drawn.num_samples

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """The kernel's statistics after a run, each of shape ``(num_chains, num_samples)``."""
        return {} if self._drawn is None else self._drawn.stats

    @property
    def evaluations(self) -> Evaluations | None:
        """What the kernel evaluated until the end of a run, in rows: one row is one chain, once."""
        return None if self._drawn is None else self._drawn.evaluations

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of ``"warmup"``, what the kernel learns before its first step included, and of ``"sampling"``."""
        return {} if self._drawn is None else self._drawn.seconds

    def _warn_of_r_hat(self) -> None:
        """Say so where chains disagree; of one chain, or under four draws, nothing is known."""
        if self.num_chains == 1 or self.num_samples < 4:
            return
        name, r_hat = worst_r_hat(self._results().samples)
        if r_hat > SAME:
            shown = f"{r_hat:.3f}" if r_hat < 100 else "over 99"
            warn(
                f"R-hat is {shown} > {SAME} (worst: {name}): not enough draws yet, or chains stuck, so that means and "
                f"shares of modes may be off. Raise num_samples (now {self.num_samples})."
            )

    def _results(self) -> Results:
        if self._drawn is None:
            raise RuntimeError("there are no draws yet. Call run(*model_args, **model_kwargs) first.")
        return self._drawn

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        r"""Draws of the latent and deterministic sites, in the constrained space.

        Args:
            num_samples: ``None``: every draw in order. A number: as many, resampled with replacement.
            group_by_chain: Keep the chain dimension.

        Returns:
            Site to draws, of shape ``(num_chains, num_samples, *site)`` or ``(num_chains * num_samples, *site)``.

        Raises:
            RuntimeError: There was no run.
        """
        return dict(util.select_samples(self._results().samples, num_samples, group_by_chain))

    def get_discrete_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        r"""Draws of the enumerated sites given each draw of the others: those behind the deterministic sites, if any.

        Without deterministic sites they are made at the first call, and kept.

        Args:
            group_by_chain: Keep the chain dimension.

        Returns:
            Site to draws, shaped as in :meth:`get_samples`; empty if the model enumerates nothing.

        Raises:
            RuntimeError: There was no run, or ``save_params`` dropped a site that the enumerated ones need.
        """
        drawn = self._results()
        if drawn.discrete is None:
            log_joint = self._log_joint if self._log_joint is not None else self._rebuilt_log_joint()
            dropped = sorted(set(log_joint.site_shapes) - set(drawn.unconstrained))
            if dropped:
                raise RuntimeError(f"enumerated sites need every continuous site, but save_params dropped {dropped}.")
            drawn = self._drawn = dataclasses.replace(drawn, discrete=drawn.drawn_discrete(log_joint))
        assert drawn.discrete is not None
        return dict(util.select_samples(drawn.discrete, None, group_by_chain))

    def _rebuilt_log_joint(self) -> Any:
        """The log joint of an unpickled object: it does not travel, the model and its arguments do."""
        with self._prepared_kernel():
            self._setup_kernel(0, self._args, self._kwargs)
            self._log_joint = self.kernel.log_joint
        return self._log_joint

    def diagnostics(self) -> dict[str, Any]:
        r"""Convergence figures of every site, and the kernel's own of every chain.

        Returns:
            ``{site: {"n_eff": Tensor, "r_hat": Tensor}}`` (NaN under 4 draws a chain) and ``{key: {"chain i": value}}``
            for every key of the kernel. ``"divergences"``, lists of draw indices, is always there.

        Raises:
            RuntimeError: There was no run.
        """
        sites = self._results().samples
        return {name: site_diagnostics(value) for name, value in sites.items()} | self._kernel_figures()

    def _kernel_figures(self) -> dict[str, Any]:
        """The kernel's own figures of every chain."""
        figures = self._results().figures
        return {key: {f"chain {i}": chain[key] for i, chain in enumerate(figures)} for key in figures[0]}

    def summary(self, prob: float = 0.9) -> None:
        r"""Print Pyro's table (mean, sd, median, credible interval, n_eff, r_hat) and the number of divergences.

        Entries that cannot vary, such as the zeros of a Cholesky factor, are left out; sites of nothing else are named.

        Args:
            prob: Mass of the credible interval, in (0, 1).

        Raises:
            RuntimeError: There was no run.
            ValueError: A chain has fewer than 4 draws.
        """
        samples: dict[str, Tensor] = {}
        drawn = self._results()
        for name, value in drawn.samples.items():
            samples |= moving_entries(name, floating(value))
        still = [name for name, value in drawn.samples.items() if not bool(varying(floating(value)).any())]
        if samples and self.num_samples < 4:
            raise ValueError(f"summary needs at least 4 draws a chain, got {self.num_samples}. See get_samples().")
        if samples:
            util.print_summary(samples, prob=prob)
        if still:
            print(f"Constant: {', '.join(still)}")
        print(f"Number of divergences: {drawn.num_divergences}")

    def __repr__(self) -> str:
        kernel = repr(self.kernel).splitlines()
        lines = [
            f"MCMC of {self.num_chains} chain{'s' * (self.num_chains > 1)} x {self.num_samples} draws",
            *kernel[:1],
        ]
        drawn = self._drawn
        if drawn is None:
            return "\n  ".join([*lines, f"not run: {self.warmup_steps} warm-up steps first; call run(*model_args)"])
        sites = [f"{name} {tuple(x.shape[2:])}" if x.dim() > 2 else name for name, x in drawn.samples.items()]
        shown = sites if len(sites) <= 8 else [*sites[:7], f"and {len(sites) - 7} more"]
        share = drawn.num_divergences / (self.num_chains * self.num_samples)
        counts = drawn.evaluations
        figures = [
            f"sites: {', '.join(shown)}",
            f"divergences: {drawn.num_divergences} ({share:.1%})",
            f"evaluations: {counts.density} of the density, {counts.gradient} with gradient",
        ]
        return "\n  ".join([*lines, *figures])

    def _repr_html_(self) -> str:
        """Table of the first 20 numbers: mean, sd, 5 % and 95 % quantiles, n_eff and r_hat."""
        text = "<br>".join(escape(line) for line in repr(self).splitlines())
        if self._drawn is None:
            return f"<p>{text}</p>"
        columns = ("", "mean", "sd", "5 %", "95 %", "n_eff", "r_hat")
        numbers = figures_of(self._drawn.samples, most=20)
        rows = [(name, *(f"{figure:.4g}" for figure in figures)) for name, figures in numbers]
        cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<p>{text}</p><table><tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>{cells}</table>"

    def as_run(self) -> Run:
        """The draws with the model and its arguments, as reports and exports read them.

        Raises:
            RuntimeError: There was no run.
        """
        self._results()
        return Run(
            partial(self.get_samples, group_by_chain=True),
            getattr(self.kernel, "model", None),
            self._args,
            self._kwargs,
            potential_fn=getattr(self.kernel, "potential_fn", None),
            transforms=self.transforms or {},
            log_joint=getattr(self.kernel, "log_joint", None),
            sample_stats=self.sample_stats,
            kernel=self.kernel,
            figures=self._kernel_figures,
            discrete=partial(self.get_discrete_samples, group_by_chain=True),
            seconds=self.seconds,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_log_joint": None}  # it may hold closures; rebuilt on demand


def _family(kind: Any) -> list[Any]:
    """A class and those derived from it."""
    return [kind, *(each for child in kind.__subclasses__() for each in _family(child))]


def _altered(path: Any, error: Exception) -> ValueError:
    """What to say of a file whose parts do not fit together."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} must hold a run as this version writes it, got one that differs ({line}). Run anew.")


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
    else:
        logger.warning(note)
