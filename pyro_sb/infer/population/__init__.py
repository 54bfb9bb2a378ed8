"""Weighted populations of an unnormalised target, with its log evidence."""

from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.population import Population

__all__ = ["Population", "populate"]


def __dir__() -> list[str]:
    return sorted(__all__)
