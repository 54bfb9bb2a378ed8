"""Inference under Pyro's nouns: MCMC with chains as a tensor dimension, its kernels, and amortised posteriors."""

from pyro_sb.infer.amortized import AmortizedPosterior
from pyro_sb.infer.bridge_mh import BridgeMH
from pyro_sb.infer.importance_draws import ImportanceDraws
from pyro_sb.infer.kernels import KernelLangevin
from pyro_sb.infer.mcmc import MCMC
from pyro_sb.infer.posterior import Posterior
from pyro_sb.infer.potential import LogJoint, log_joint
from pyro_sb.infer.simulate import Simulations

__all__ = [
    "MCMC",
    "AmortizedPosterior",
    "BridgeMH",
    "ImportanceDraws",
    "KernelLangevin",
    "LogJoint",
    "Posterior",
    "Simulations",
    "log_joint",
]
