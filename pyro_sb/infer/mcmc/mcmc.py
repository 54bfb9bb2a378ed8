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
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.mcmc import api, util
from pyro.infer.mcmc.logger import ProgressBar
from pyro.util import optional
from torch import Tensor

from pyro_sb.infer.mcmc.walk import (
    SAME,
    Block,
    Record,
    blocks,
    figures_of,
    floating,
    in_chunks,
    moving_entries,
    per_chain,
    site_diagnostics,
    states,
    worst_r_hat,
)
from pyro_sb.infer.model.run import Run
from pyro_sb.threads import chosen_threads
from pyro_sb.warn import warn

__all__ = ["MCMC"]

logger = logging.getLogger(__name__)
Hook = Callable[[Any, dict[str, Tensor], str, int], None]


class MCMC(api.MCMC):
    r"""Markov chains of a Pyro model, all chains in one tensor.

    Pyro's class, signature and methods. What differs: ``num_chains`` chains run vectorised in this process, 64 unless
    said otherwise (Pyro: 1); ``warmup_steps=None`` is what the kernel asks for (Pyro: ``num_samples``);
    ``initial_params`` always carry a leading chain dimension (also for one chain); and :meth:`get_samples` holds the
    ``pyro.deterministic`` sites too.

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

    Attributes:
        sample_stats: After a run, the kernel's statistics, each of shape ``(num_chains, num_samples)``.
        evaluations: After a run, what the kernel evaluated, counted in rows (one row: one chain, once).
        seconds: After a run, wall time of ``"warmup"``, what the kernel learns before its first step included, and of
            ``"sampling"``.

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
    ) -> None:
        _check_kernel(kernel)
        _check_count("num_samples", num_samples, least=1)
        _check_count("num_chains", num_chains, least=1)
        _check_starts(initial_params, num_chains)
        if mp_context is not None:
            raise ValueError(
                f"mp_context must be None, got {mp_context!r}: chains are a tensor dimension of one process here. "
                "Leave it out, or use pyro.infer.MCMC for one process a chain."
            )
        api.AbstractMCMC.__init__(self, kernel, num_chains, transforms)  # api.MCMC.__init__ would start processes
        self.warmup_steps = kernel.default_warmup_steps if warmup_steps is None else warmup_steps
        _check_count("warmup_steps", self.warmup_steps, least=0)
        self.num_samples = num_samples
        self.initial_params = initial_params
        self.hook_fn = hook_fn
        self.disable_progbar = disable_progbar
        self.disable_validation = disable_validation
        self.save_params = None if save_params is None else _names(save_params)
        self.sample_stats: dict[str, Tensor] = {}
        self.evaluations: Any = None
        self.seconds: dict[str, float] = {}
        self._num_requested = num_samples
        self._user_transforms = transforms
        self._samples: dict[str, Tensor] | None = None
        self._unconstrained: dict[str, Tensor] = {}
        self._discrete: dict[str, Tensor] | None = None
        self._log_joint: Any = None
        self._diagnostics: list[dict[str, Any]] = []
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> None:
        r"""Warm the kernel up and draw.

        Ctrl-C while drawing keeps the draws made so far, with a warning that counts them; only the block in progress, 8
        to 64 steps, is lost. Any other exception keeps them too, and is raised again with a note. Results of an earlier
        run stay until this one has draws of its own.

        Args:
            *args: The model's positional arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            KeyboardInterrupt: Ctrl-C before the first draw.
            ValueError: ``save_params`` names an unknown site.
        """
        record = Record(self.save_params)
        with chosen_threads(args, kwargs), self._prepared_kernel():
            try:
                self._draw(record, args, kwargs)
            except KeyboardInterrupt as interrupt:
                if record.num_draws == 0:
                    raise KeyboardInterrupt("interrupted in warm-up: no draws were made.") from interrupt
                self._adopt(record, args, kwargs)
                made = f"{record.num_draws} of {self._num_requested} draws a chain"
                warn(f"interrupted: {made} were made and are kept.", UserWarning)
            except Exception as error:
                if record.num_draws > 0:
                    self._adopt(record, args, kwargs)
                    _add_note(error, f"The first {record.num_draws} draws of each chain are kept: see get_samples().")
                else:
                    _add_note(error, "No draws were made.")
                raise
            else:
                self._adopt(record, args, kwargs)
                self._warn_of_r_hat()

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
        detached = {name: _detached(value) for name, value in kwargs.items()}
        self.kernel.setup(warmup_steps, *map(_detached, args), **detached)

    def _draw(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the kernel up, warm it up, and collect blocks of draws."""
        begun = time.perf_counter()
        self._setup_kernel(self.warmup_steps, args, kwargs)
        record.open(self.kernel.log_joint)
        progress = ProgressBar(self.warmup_steps, self._num_requested, disable=self.disable_progbar)
        try:
            progress.set_description("Prepare")  # what a kernel learns before its first step
            params = self.kernel.initial_params
            for stage, num_steps in (("Warmup", self.warmup_steps), ("Sample", self._num_requested)):
                progress.set_description(stage, refresh=False)
                if stage == "Sample":
                    record.warmup_seconds = time.perf_counter() - begun
                for start, size in blocks(num_steps, single=self.hook_fn is not None):
                    block = self.kernel.sample_block(params, size)
                    if stage == "Sample":
                        record.add(block)
                    params = {name: draws[-1] for name, draws in block.draws.items()}
                    progress.set_postfix(_postfix(self.kernel, block, record), refresh=False)
                    progress.update(size)
                    if self.hook_fn is not None:
                        self.hook_fn(self.kernel, params, stage, start)
        finally:
            progress.close()
            record.seconds = time.perf_counter() - begun

    def _adopt(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a record's draws this object's results."""
        self._args, self._kwargs = args, kwargs
        self._log_joint = self.kernel.log_joint
        self._discrete = record.discrete() or None
        self.num_samples = record.num_draws
        self.transforms = self.kernel.transforms if self._user_transforms is None else self._user_transforms
        self._unconstrained = record.sites()
        self._samples = dict(self._unconstrained)
        for name in self.transforms.keys() & self._samples.keys():
            self._samples[name] = self.transforms[name].inv(self._samples[name])
        self._samples.update(record.deterministic())
        self.sample_stats = record.statistics()
        self.seconds = {"warmup": record.warmup_seconds, "sampling": record.seconds - record.warmup_seconds}
        self.evaluations = dataclasses.replace(self._log_joint.evaluations)
        self._diagnostics = per_chain(self.kernel.diagnostics(), self.sample_stats.get("diverging"), self.num_chains)

    def _warn_of_r_hat(self) -> None:
        """Say so where chains disagree; of one chain, or under four draws, nothing is known."""
        if self.num_chains == 1 or self.num_samples < 4:
            return
        name, r_hat = worst_r_hat(self._results())
        if r_hat > SAME:
            shown = f"{r_hat:.3f}" if r_hat < 100 else "over 99"
            warn(
                f"R-hat is {shown} > {SAME} (worst: {name}): not enough draws yet, or chains stuck, so that means and "
                f"shares of modes may be off. Raise num_samples (now {self.num_samples})."
            )

    def _results(self) -> dict[str, Tensor]:
        if self._samples is None:
            raise RuntimeError("there are no draws yet. Call run(*model_args, **model_kwargs) first.")
        return self._samples

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
        return dict(util.select_samples(self._results(), num_samples, group_by_chain))

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
        self._results()
        if self._discrete is None:
            log_joint = self._log_joint if self._log_joint is not None else self._rebuilt_log_joint()
            dropped = sorted(set(log_joint.site_shapes) - set(self._unconstrained))
            if dropped:
                raise RuntimeError(f"enumerated sites need every continuous site, but save_params dropped {dropped}.")
            z = states(Block(self._unconstrained, self.sample_stats), log_joint)
            self._discrete = in_chunks(log_joint.discrete, z)
        return dict(util.select_samples(self._discrete, None, group_by_chain))

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
        return {name: site_diagnostics(value) for name, value in self._results().items()} | self._kernel_figures()

    def _kernel_figures(self) -> dict[str, Any]:
        """The kernel's own figures of every chain."""
        return {
            key: {f"chain {i}": entry[key] for i, entry in enumerate(self._diagnostics)} for key in self._diagnostics[0]
        }

    def summary(self, prob: float = 0.9) -> None:
        r"""Print Pyro's table (mean, sd, median, credible interval, n_eff, r_hat) and the number of divergences.

        Args:
            prob: Mass of the credible interval, in (0, 1).

        Raises:
            RuntimeError: There was no run.
            ValueError: A chain has fewer than 4 draws.
        """
        samples: dict[str, Tensor] = {}
        for name, value in self._results().items():
            samples |= moving_entries(name, floating(value))
        if samples and self.num_samples < 4:
            raise ValueError(f"summary needs at least 4 draws a chain, got {self.num_samples}. See get_samples().")
        util.print_summary(samples, prob=prob)
        print(f"Number of divergences: {sum(len(entry['divergences']) for entry in self._diagnostics)}")

    def __repr__(self) -> str:
        kernel = repr(self.kernel).splitlines()
        lines = [
            f"MCMC of {self.num_chains} chain{'s' * (self.num_chains > 1)} x {self.num_samples} draws",
            *kernel[:1],
        ]
        if self._samples is None:
            return "\n  ".join([*lines, f"not run: {self.warmup_steps} warm-up steps first; call run(*model_args)"])
        sites = [f"{name} {tuple(x.shape[2:])}" if x.dim() > 2 else name for name, x in self._samples.items()]
        shown = sites if len(sites) <= 8 else [*sites[:7], f"and {len(sites) - 7} more"]
        divergences = sum(len(entry["divergences"]) for entry in self._diagnostics)
        share = divergences / (self.num_chains * self.num_samples)
        figures = [f"sites: {', '.join(shown)}", f"divergences: {divergences} ({share:.1%})"]
        if self.evaluations is not None:
            counts = self.evaluations
            figures.append(f"evaluations: {counts.density} of the density, {counts.gradient} with gradient")
        return "\n  ".join([*lines, *figures])

    def _repr_html_(self) -> str:
        """Table of the first 20 numbers: mean, sd, 5 % and 95 % quantiles, n_eff and r_hat."""
        text = "<br>".join(escape(line) for line in repr(self).splitlines())
        if self._samples is None:
            return f"<p>{text}</p>"
        columns = ("", "mean", "sd", "5 %", "95 %", "n_eff", "r_hat")
        rows = [
            (name, *(f"{figure:.4g}" for figure in figures)) for name, figures in figures_of(self._results(), most=20)
        ]
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


def _postfix(kernel: Any, block: Block, record: Record) -> OrderedDict[str, str]:
    """Words of the progress bar: the kernel's, and always acceptance and divergences."""
    words = OrderedDict(kernel.logging() or {})
    if "acceptance_rate" in block.stats and not any(word.startswith("acc") for word in words):
        words["acc. prob"] = f"{block.stats['acceptance_rate'].double().mean().item():.3f}"
    words["divergences"] = str(record.num_diverging)
    return words


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _names(save_params: Iterable[str]) -> list[str]:
    if isinstance(save_params, str):
        raise TypeError(f"save_params must be a list of sites, got a string. Write save_params=[{save_params!r}].")
    return sorted(set(save_params))


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
    else:
        logger.warning(note)


def _check_kernel(kernel: Any) -> None:
    if not callable(getattr(kernel, "sample_block", None)):
        raise TypeError(
            f"kernel must move all chains at once (have sample_block), got {type(kernel).__name__}. "
            "Use pyro.infer.MCMC for it, or a kernel of pyro_sb.infer such as KernelLangevin."
        )


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {value!r}. Write {name}={max(least, 64)}."
        )


def _check_starts(initial_params: dict[str, Tensor] | None, num_chains: int) -> None:
    for name, value in (initial_params or {}).items():
        if value.dim() == 0 or value.shape[0] != num_chains:
            raise ValueError(
                f"initial_params must have the chains as leading dimension: {name!r} must have shape "
                f"({num_chains}, *site), got {tuple(value.shape)}. For one common start write "
                f"value.expand({num_chains}, *value.shape)."
            )
