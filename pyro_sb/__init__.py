"""Schrödinger bridges for Pyro: fit a bridge on draws, call it on a context, and hold a Pyro distribution."""

__version__ = "0.1.0"
