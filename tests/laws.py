"""The laws that every bridge must pass, over one registry: a new bridge costs one line in `BRIDGES`."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sb.bridges import (
    DSB,
    SGM,
    VSDM,
    Bridge,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    LightSBBM,
    LightSBM,
    PCACodec,
    SmoothedBridge,
    TailMatched,
)

DIM, CONTEXT_DIM = 2, 3


class QuickSB(LightSB):
    """A few updates from its start: the laws hold of any fit."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4} | options))


class QuickSBM(LightSBM):
    """The same."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4} | options))


class QuickSBBM(LightSBBM):
    """The same."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4} | options))


class QuickVSDM(VSDM):
    """The same."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4, "num_stages": 3} | options))


class QuickSGM(SGM):
    """The same."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4} | options))


class QuickSmoothed(SmoothedBridge):
    """The same."""

    def fit(self, *args, **options):
        return super().fit(*args, **({"num_updates": 20, "learning_rate": 5e-4} | options))


class QuickDSB(DSB):
    """The same."""

    def fit(self, *args, **options):
        quick = {"num_updates": 20, "learning_rate": 5e-4, "num_iterations": 1, "num_pairs": 200}
        return super().fit(*args, **(quick | options))


BRIDGES: dict[str, Callable[..., Bridge]] = {
    "langevin-data-aware": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, **kw),
    "langevin-split-step": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="split-step", **kw),
    "langevin-strang": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="strang", **kw),
    "langevin-plain": lambda **kw: KernelLangevinBridge(DIM, num_steps=3, scheme="plain", **kw),
    "langevin-variable": lambda **kw: KernelLangevinBridge(
        DIM, num_steps=3, scheme="plain", bandwidth_exponent=-0.5, **kw
    ),
    "light": lambda **kw: QuickSB(DIM, num_components=3, epsilon=0.5, **kw),
    "light-full": lambda **kw: QuickSB(DIM, num_components=3, epsilon=0.5, covariance="full", **kw),
    "light-matching": lambda **kw: QuickSBM(DIM, num_components=3, epsilon=0.5, **kw),
    "light-bass": lambda **kw: QuickSBBM(DIM, num_components=3, epsilon=0.5, beta=5.0, **kw),
    "light-bass-full": lambda **kw: QuickSBBM(DIM, num_components=3, epsilon=0.5, beta=5.0, covariance="full", **kw),
    "tails-light-bass": lambda **kw: TailMatched(QuickSBBM(DIM, num_components=3, epsilon=0.5, **kw), df=3.0),
    "vsdm": lambda **kw: QuickVSDM(DIM, hidden=(16, 16), **kw),
    "vsdm-stochastic": lambda **kw: QuickVSDM(DIM, hidden=(16, 16), drift_matrix="stochastic", **kw),
    "vsdm-analytic": lambda **kw: QuickVSDM(
        DIM, hidden=(16, 16), step_covariance="analytic", source_law="conditional", **kw
    ),
    "smoothed": lambda **kw: QuickSmoothed(DIM, hidden=(16, 16), **kw),
    "smoothed-learnt": lambda **kw: QuickSmoothed(
        DIM, epsilon=30.0, hidden=(16, 16), step_covariance="learnt", source_law="moment", **kw
    ),
    "latent-light": lambda **kw: LatentBridge(QuickSB(DIM, num_components=3, epsilon=0.5, **kw), PCACodec(DIM)),
    "latent-smoothed": lambda **kw: LatentBridge(QuickSmoothed(DIM, hidden=(16, 16), **kw), PCACodec(DIM)),
    "dsb": lambda **kw: QuickDSB(DIM, hidden=(16, 16), num_steps=4, **kw),
    "dsb-ipf": lambda **kw: QuickDSB(DIM, hidden=(16, 16), num_steps=4, method="ipf", **kw),
    "dsb-triangular": lambda **kw: QuickDSB(
        DIM, epsilon=0.5, hidden=(16, 16), num_steps=5, schedule="triangular", variance="reference", **kw
    ),
    "sgm": lambda **kw: QuickSGM(DIM, hidden=(16, 16), **kw),
}


def training_draws(dtype: torch.dtype, num: int = 60) -> tuple[Tensor, Tensor]:
    """Draws ``(num, DIM)`` that depend on their contexts ``(num, CONTEXT_DIM)``."""
    context = torch.randn(num, CONTEXT_DIM, dtype=dtype)
    return context[:, :DIM] + 0.5 * torch.randn(num, DIM, dtype=dtype), context


def fitted(make: Callable[..., Bridge], conditional: bool, dtype: torch.dtype = torch.float64) -> Bridge:
    """A bridge of the registry, fitted without a bar: a copy of one fit that all laws share."""
    return copy.deepcopy(_fitted(make, conditional, dtype))


@functools.cache
def _fitted(make: Callable[..., Bridge], conditional: bool, dtype: torch.dtype) -> Bridge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, context = training_draws(dtype)
        bridge = make(context_dim=CONTEXT_DIM) if conditional else make()
        bridge.fit(target, context=context if conditional else None, progress=False)
    return bridge
