"""Amortised posteriors of a Pyro model: simulate, fit once, condition on any observation, correct by the model."""

from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.importance import ImportanceDraws
from pyro_sb.infer.amortized.likelihood.law import LikelihoodDistribution
from pyro_sb.infer.amortized.likelihood.likelihood import AmortizedLikelihood, LikelihoodPairs
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.simulator import Simulations
from pyro_sb.infer.amortized.surprise import Surprise

__all__ = [
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "ImportanceDraws",
    "LikelihoodDistribution",
    "LikelihoodPairs",
    "Posterior",
    "Simulations",
    "Surprise",
]


def __dir__() -> list[str]:
    return sorted(__all__)
