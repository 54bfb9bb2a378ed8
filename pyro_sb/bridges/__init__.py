"""Bridges, one file a method."""

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.codec_autoencoder import AutoencoderCodec
from pyro_sb.bridges.codec_pair import PairCodec
from pyro_sb.bridges.codec_pca import PCACodec
from pyro_sb.bridges.codec_report import ReconstructionReport, reconstruction_report
from pyro_sb.bridges.codecs import Codec
from pyro_sb.bridges.dsb import DSB
from pyro_sb.bridges.kernel_langevin import KernelLangevinBridge
from pyro_sb.bridges.latent import LatentBridge
from pyro_sb.bridges.light import LightSB, LightSBM
from pyro_sb.bridges.light_bass import LightSBBM
from pyro_sb.bridges.smoothed import SmoothedBridge
from pyro_sb.bridges.tail_fit import tail_index
from pyro_sb.bridges.tails import TailMatched, TailTransform
from pyro_sb.bridges.vsdm import SGM, VSDM
from pyro_sb.bridges.vsdm_state import Sampler

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
