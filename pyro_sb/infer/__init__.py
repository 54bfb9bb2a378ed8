"""Inference under Pyro's nouns: MCMC with chains as a tensor dimension, its kernels, and amortised posteriors."""

from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.importance import ImportanceDraws
from pyro_sb.infer.amortized.likelihood.law import LikelihoodDistribution
from pyro_sb.infer.amortized.likelihood.likelihood import AmortizedLikelihood, LikelihoodPairs
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.simulator import Simulations
from pyro_sb.infer.amortized.surprise import Surprise
from pyro_sb.infer.kernels.bridge_mh import BridgeMH
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import LogJoint, log_joint

__all__ = [
    "MCMC",
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "BridgeMH",
    "ImportanceDraws",
    "KernelLangevin",
    "LikelihoodDistribution",
    "LikelihoodPairs",
    "LogJoint",
    "Posterior",
    "Simulations",
    "Surprise",
    "log_joint",
]


def __dir__() -> list[str]:
    return sorted(__all__)
