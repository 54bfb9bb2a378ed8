"""Bridges, one file a method."""

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.kernel_langevin import KernelLangevinBridge

__all__ = ["Bridge", "KernelLangevinBridge"]
