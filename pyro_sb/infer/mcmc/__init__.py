"""MCMC with chains as a tensor dimension: the runner and the contract of its kernels."""

from pyro_sb.infer.mcmc.mcmc import MCMC

__all__ = ["MCMC"]


def __dir__() -> list[str]:
    return sorted(__all__)
