"""The laws that every bridge must pass, over one registry: a new bridge costs one line in `BRIDGES`."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sb.bridges import Bridge, KernelLangevinBridge

DIM, CONTEXT_DIM = 2, 3

BRIDGES: dict[str, Callable[..., Bridge]] = {
    "langevin-data-aware": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, **kw),
    "langevin-split-step": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="split-step", **kw),
    "langevin-strang": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="strang", **kw),
    "langevin-plain": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="plain", **kw),
    "langevin-variable": lambda **kw: KernelLangevinBridge(
        DIM, num_steps=3, scheme="plain", bandwidth_exponent=-0.5, **kw
    ),
}


def training_draws(dtype: torch.dtype, num: int = 60) -> tuple[Tensor, Tensor]:
    """Draws ``(num, DIM)`` that depend on their contexts ``(num, CONTEXT_DIM)``."""
    context = torch.randn(num, CONTEXT_DIM, dtype=dtype)
    return context[:, :DIM] + 0.5 * torch.randn(num, DIM, dtype=dtype), context


def fitted(make: Callable[..., Bridge], conditional: bool, dtype: torch.dtype = torch.float64) -> Bridge:
    """A bridge of the registry, fitted without a bar."""
    target, context = training_draws(dtype)
    bridge = make(context_dim=CONTEXT_DIM) if conditional else make()
    bridge.fit(target, context=context if conditional else None, progress=False)
    return bridge
