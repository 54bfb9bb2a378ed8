"""Bridges, one folder a family."""

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.codecs.autoencoder import AutoencoderCodec
from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.bridges.codecs.pair import PairCodec
from pyro_sb.bridges.codecs.pca import PCACodec
from pyro_sb.bridges.codecs.report import ReconstructionReport, reconstruction_report
from pyro_sb.bridges.diffusion.sampler import Sampler
from pyro_sb.bridges.diffusion.smoothed import SmoothedBridge
from pyro_sb.bridges.diffusion.vsdm import SGM, VSDM
from pyro_sb.bridges.dsb.bridge import DSB
from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.light.bass import LightSBBM
from pyro_sb.bridges.light.light import LightSB, LightSBM
from pyro_sb.bridges.tails.bridge import TailMatched, TailTransform
from pyro_sb.bridges.tails.fit import tail_index

__all__ = [
    "DSB",
    "SGM",
    "VSDM",
    "AutoencoderCodec",
    "Bridge",
    "Codec",
    "KernelLangevinBridge",
    "LatentBridge",
    "LightSB",
    "LightSBBM",
    "LightSBM",
    "PCACodec",
    "PairCodec",
    "ReconstructionReport",
    "Sampler",
    "SmoothedBridge",
    "TailMatched",
    "TailTransform",
    "reconstruction_report",
    "tail_index",
]


def __dir__() -> list[str]:
    return sorted(__all__)
