"""Options of a run, checked at the door."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["check_kernel", "check_starts", "check_steps", "detached", "site_names"]


def site_names(save_params: Iterable[str]) -> list[str]:
    """Names of the sites to keep, sorted."""
    if isinstance(save_params, str):
        raise TypeError(f"save_params must be a list of sites, got a string. Write save_params=[{save_params!r}].")
    return sorted(set(save_params))


def check_kernel(kernel: Any) -> None:
    """A kernel of the batched protocol."""
    if not callable(getattr(kernel, "sample_block", None)):
        raise TypeError(
            f"kernel must move all chains at once (have sample_block), got {type(kernel).__name__}. "
            "Use pyro.infer.MCMC for it, or a kernel of pyro_sb.infer such as KernelLangevin."
        )


def check_steps(name: str, value: int, least: int) -> None:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {value!r}. Write {name}={max(least, 64)}."
        )


def check_starts(initial_params: dict[str, Tensor] | None, num_chains: int) -> None:
    """Starts with the chains as leading dimension."""
    for name, value in (initial_params or {}).items():
        if value.dim() == 0 or value.shape[0] != num_chains:
            raise ValueError(
                f"initial_params must have the chains as leading dimension: {name!r} must have shape "
                f"({num_chains}, *site), got {tuple(value.shape)}. For one common start write "
                f"value.expand({num_chains}, *value.shape)."
            )


def detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments, tensors without their graphs."""
    return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
