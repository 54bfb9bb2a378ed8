"""Runs and draws as they are handed over, read: one `Run`, its target, its draws in the target's coordinates."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_sb.diagnostics.export.container import container_arrays, is_container
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.model.run import Run

__all__ = ["is_run", "run_of", "target_of", "unconstrained_draws"]

Sites = dict[str, Tensor]


def is_run(x: Any) -> bool:
    """Whether `run_of` can read it."""
    return isinstance(x, Run | AbstractMCMC) or callable(getattr(x, "as_run", None))


def run_of(x: Any) -> Run:
    """Draws with the model that they belong to: of an MCMC, ours or Pyro's, a conditioned posterior, weighted draws.

    Raises:
        RuntimeError: It has not run.
        TypeError: It is no run.
    """
    if isinstance(x, Run):
        return x
    if not is_run(x):
        raise TypeError(
            "x must be a finished MCMC (ours or Pyro's), a Posterior, ImportanceDraws or a Run, got "
            f"{type(x).__name__}. Call run() and pass it; for draws of another sampler write "
            "pyro_sb.diagnostics.Run({site: draws}, model, args), each (chain, draw, *site)."
        )
    return x.as_run() if callable(getattr(x, "as_run", None)) else _of_pyro(x)


def _of_pyro(mcmc: Any) -> Run:
    """Pyro's runner, which keeps its draws and the model's arguments to itself."""
    samples = getattr(mcmc, "_samples", None)
    if samples is None:
        raise RuntimeError(f"the {type(mcmc).__name__} must have run, but has no draws yet. Call run(...) first.")
    shape = next(iter(samples.values())).shape[:2]
    divergences = _divergences(mcmc)
    statistics = {} if divergences is None else {"diverging": torch.zeros(shape, dtype=torch.bool)}
    for key, draws in (divergences or {}).items():
        statistics["diverging"][int(key.split()[-1]), draws] = True  # "chain 10" is chain 10, wherever it sorts
    return Run(
        partial(mcmc.get_samples, group_by_chain=True),
        getattr(mcmc.kernel, "model", None),
        mcmc._args,
        mcmc._kwargs,
        potential_fn=getattr(mcmc.kernel, "potential_fn", None),
        transforms=getattr(mcmc, "transforms", None) or {},
        log_joint=getattr(mcmc.kernel, "log_joint", None),
        sample_stats=statistics,
        kernel=mcmc.kernel,
        figures=mcmc.diagnostics,
    )


def _divergences(mcmc: Any) -> Mapping[str, Any] | None:
    """By chain; from where Pyro's MCMC keeps them, as its ``diagnostics()`` fails under four draws a chain."""
    kept = getattr(mcmc, "_diagnostics", None)
    if not kept:
        return mcmc.diagnostics().get("divergences")
    if any("divergences" not in chain for chain in kept):
        return None
    return {f"chain {i}": chain["divergences"] for i, chain in enumerate(kept)}


def target_of(
    x: Any,
    target: Any,
    potential_fn: Callable[[Sites], Tensor] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    initial_params: Sites | None = None,
) -> tuple[LogJoint, Any]:
    """The log joint of a model, a run or a potential; and the draws beside it, if there are any.

    Raises:
        RuntimeError: A run that has not run.
        TypeError: What has neither.
        ValueError: A run that knows no target.
    """
    if potential_fn is not None:
        if target is not None:
            raise ValueError("Either target or potential_fn must be given, got both. Leave one of them out.")
        return log_joint(None, potential_fn, initial_params=initial_params), x
    beside = x
    if target is None:  # a run knows its own; a target may come alone
        target, beside = x, x if is_run(x) else None
    if isinstance(target, LogJoint):
        return target, beside
    if is_run(target):
        return _target_of_run(run_of(target)), beside
    if not callable(target):
        raise TypeError(
            "target must be a Pyro model, a finished MCMC, a Posterior or a LogJoint, got "
            f"{type(target).__name__}. Write mode_audit(draws, model, args=(y,))."
        )
    return log_joint(target, args=args, kwargs=kwargs, initial_params=initial_params), beside


def _target_of_run(run: Run) -> LogJoint:
    if isinstance(run.log_joint, LogJoint):
        return run.log_joint
    if run.model is not None:
        return log_joint(run.model, args=run.args, kwargs=dict(run.kwargs))
    if run.potential_fn is not None:  # the kernel has forgotten its start: the first draws have the sites' shapes
        first = {name: value[0, 0] for name, value in run.draws.items()}
        free = {name: run.transforms[name](value) if name in run.transforms else value for name, value in first.items()}
        return log_joint(None, run.potential_fn, initial_params=free, transforms=dict(run.transforms) or None)
    raise ValueError(
        "the run must know one model whose log joint can be evaluated, got none (a batch of observations, missing "
        "entries, or a black-box simulator). Pass the model after it: mode_audit(mcmc, model, args=(y,)); or "
        "mode_audit(mcmc, potential_fn=..., initial_params=...). report takes either as audit=."
    )


def unconstrained_draws(x: Any, joint: LogJoint) -> Tensor:
    """Draws in a target's coordinates. Shape ``(chain, draw, dim)``."""
    if isinstance(x, Tensor):
        if x.dim() not in (2, 3) or x.shape[-1] != joint.dim:
            raise ValueError(
                f"x must be unconstrained draws (chain, draw, {joint.dim}) or (draw, {joint.dim}), got "
                f"{tuple(x.shape)}. For draws in the sites' own space pass a dict by site."
            )
        draws = x if x.dim() == 3 else x[None]
    else:
        sites = _sites(x)
        missing = sorted(joint.site_shapes.keys() - sites.keys())
        if missing:
            raise ValueError(
                f"x must hold draws of every continuous site of the model, but {missing} are missing among "
                f"{sorted(sites)}. Leave save_params out."
            )
        free = {}
        for name in joint.site_shapes:
            value = torch.as_tensor(sites[name]).to(joint.device)
            free[name] = joint.transforms[name](value) if name in joint.transforms else value
        draws = joint.pack(free)
        if draws.dim() != 3:
            raise ValueError(
                f"draws by site must have the shape (chain, draw, *site), got {draws.dim() - 1} lead dimensions."
            )
    bad = int((~torch.isfinite(draws)).any(-1).sum())
    if bad:
        raise ValueError(f"x must be finite in unconstrained space, got {bad} draws that are not. Leave those out.")
    return draws.detach()


def _sites(x: Any) -> Mapping[str, Any]:
    if is_container(x):  # first, as it is a mapping too: of groups
        return {name: torch.from_numpy(value.copy()) for name, value in container_arrays(x).items()}
    if isinstance(x, Mapping):
        return x
    if is_run(x):
        return run_of(x).draws
    raise TypeError(
        "x must be a finished run, a Posterior, an ArviZ container, a dict of sites or a tensor, got "
        f"{type(x).__name__}."
    )
