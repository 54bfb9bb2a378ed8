"""MCMC kernels with bridges inside."""

from pyro_sb.infer.kernels.bridge_mh import BridgeMH
from pyro_sb.infer.kernels.langevin import KernelLangevin

__all__ = ["BridgeMH", "KernelLangevin"]


def __dir__() -> list[str]:
    return sorted(__all__)
