"""Weighted populations of an unnormalised target, with its log evidence."""

from pyro_sb.infer.population.population import Population, populate

__all__ = ["Population", "populate"]
