"""Inference under Pyro's nouns: MCMC with chains as a tensor dimension, and the kernels that it runs."""

from pyro_sb.infer.kernels import KernelLangevin
from pyro_sb.infer.mcmc import MCMC

__all__ = ["MCMC", "KernelLangevin"]
