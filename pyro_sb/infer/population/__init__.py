"""Weighted populations of an unnormalised target, with its log evidence."""

from pyro_sb.infer.population.population import Population, populate

__all__ = ["Population", "populate"]


def __dir__() -> list[str]:
    return sorted(__all__)
