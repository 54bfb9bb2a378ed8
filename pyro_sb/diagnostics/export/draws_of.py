"""What a user holds, read: a run's target, and its draws in the target's unconstrained coordinates."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sb.diagnostics.reports.chain_figures import container_arrays
from pyro_sb.infer.model.joint import LogJoint
from pyro_sb.infer.model.log_joint import log_joint

__all__ = ["draws_by_chain", "is_container", "is_run", "target_of", "unconstrained_draws"]

Sites = dict[str, Tensor]


def is_run(x: Any) -> bool:
    """Whether it has draws by chain: a finished MCMC, ours or Pyro's, or a `Posterior`."""
    return callable(getattr(x, "get_samples", None))


def is_container(x: Any) -> bool:
    """Whether it is one of ArviZ's: ``InferenceData`` (0.x) or ``DataTree`` (1.x)."""
    return type(x).__name__ in ("InferenceData", "DataTree")


def draws_by_chain(run: Any) -> Sites:
    """Its draws by site, ``(chain, draw, *site)``.

    Raises:
        RuntimeError: It has not run.
    """
    _check_has_run(run)
    return run.get_samples(group_by_chain=True)


def _check_has_run(run: Any) -> None:
    """Pyro's MCMC answers with an AttributeError."""
    if getattr(run, "_samples", run) is None:
        raise RuntimeError(f"the {type(run).__name__} must have run, but has no draws yet. Call run(...) first.")


def target_of(
    target: Any,
    potential_fn: Callable[[Sites], Tensor] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    initial_params: Sites | None = None,
) -> tuple[LogJoint, Any]:
    """The log joint of a model, a run or a potential; and the run, if it was one.

    Raises:
        RuntimeError: A run that has not run.
        TypeError: What has neither.
        ValueError: A run that knows no target.
    """
    if isinstance(target, LogJoint):
        return target, None
    if potential_fn is not None:
        return log_joint(None, potential_fn, initial_params=initial_params), target
    if is_run(target):
        _check_has_run(target)
        kernel = getattr(target, "kernel", None)
        found = getattr(kernel, "log_joint", None)
        if isinstance(found, LogJoint):
            return found, target
        model = getattr(kernel, "model", None)
        if model is not None:
            return log_joint(model, args=target._args, kwargs=target._kwargs), target
        potential = getattr(kernel, "potential_fn", None)
        if potential is not None:
            return _from_potential(target, potential), target
        raise ValueError(
            "the run must know one model whose log joint can be evaluated, got none (a batch of observations, missing "
            "entries, or a black-box simulator). Pass the model, and the run as x: mode_audit(model, mcmc, args=(y,)); "
            "or mode_audit(potential_fn=..., initial_params=..., x=mcmc). report takes either as modes=."
        )
    if not callable(target):
        raise TypeError(
            f"target must be a Pyro model, a finished MCMC, a Posterior or a LogJoint, got {type(target).__name__}. "
            "Write mode_audit(model, draws, args=(y,))."
        )
    return log_joint(target, args=args, kwargs=kwargs, initial_params=initial_params), None


def _from_potential(run: Any, potential: Callable[[Sites], Tensor]) -> LogJoint:
    """Of a run by potential_fn, whose kernel has forgotten its start: the first draws have the sites' shapes."""
    transforms = dict(getattr(run, "transforms", None) or {})
    first = {name: value[0, 0] for name, value in draws_by_chain(run).items()}
    free = {name: transforms[name](value) if name in transforms else value for name, value in first.items()}
    return log_joint(None, potential, initial_params=free, transforms=transforms or None)


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
        return draws_by_chain(x)
    raise TypeError(
        f"x must be a finished run, a Posterior, an ArviZ container, a dict of sites or a tensor, got "
        f"{type(x).__name__}."
    )
