"""Bridges, one file a method."""

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.kernel_langevin import KernelLangevinBridge
from pyro_sb.bridges.light import LightSB, LightSBM
from pyro_sb.bridges.light_bass import LightSBBM
from pyro_sb.bridges.tail_fit import tail_index
from pyro_sb.bridges.tails import TailMatched, TailTransform
from pyro_sb.bridges.vsdm import SGM, VSDM
from pyro_sb.bridges.vsdm_state import Sampler

__all__ = [
    "SGM",
    "VSDM",
    "Bridge",
    "KernelLangevinBridge",
    "LightSB",
    "LightSBBM",
    "LightSBM",
    "Sampler",
    "TailMatched",
    "TailTransform",
    "tail_index",
]
