"""Schrödinger bridges for Pyro: fit a bridge on draws, call it on a context, and hold a Pyro distribution."""

from importlib import import_module
from types import ModuleType

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.codecs.autoencoder import AutoencoderCodec
from pyro_sb.bridges.codecs.pair import PairCodec
from pyro_sb.bridges.codecs.pca import PCACodec
from pyro_sb.bridges.codecs.report import reconstruction_report
from pyro_sb.bridges.diffusion.smoothed import SmoothedBridge
from pyro_sb.bridges.diffusion.vsdm import SGM, VSDM
from pyro_sb.bridges.dsb.bridge import DSB
from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.light.bass import LightSBBM
from pyro_sb.bridges.light.light import LightSB, LightSBM
from pyro_sb.bridges.tails.bridge import TailMatched
from pyro_sb.diagnostics import (
    Calibration,
    bridge_report,
    coverage,
    local_c2st,
    mode_audit,
    psis,
    report,
    sbc,
    sbc_ranks,
    tarp,
    to_arviz,
)
from pyro_sb.distributions import BridgeDistribution, Draws
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.likelihood.likelihood import AmortizedLikelihood
from pyro_sb.infer.kernels.bridge_mh import BridgeMH
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC

__version__ = "0.1.0"

__all__ = [
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "AutoencoderCodec",
    "Bridge",
    "BridgeDistribution",
    "BridgeMH",
    "Calibration",
    "DSB",
    "Draws",
    "KernelLangevin",
    "KernelLangevinBridge",
    "LatentBridge",
    "LightSB",
    "LightSBBM",
    "LightSBM",
    "MCMC",
    "PCACodec",
    "PairCodec",
    "SGM",
    "SmoothedBridge",
    "TailMatched",
    "VSDM",
    "bridge_report",
    "coverage",
    "local_c2st",
    "mode_audit",
    "psis",
    "reconstruction_report",
    "report",
    "sbc",
    "sbc_ranks",
    "tarp",
    "to_arviz",
]

MODULES = ("bridges", "datasets", "diagnostics", "infer", "metrics", "plots")


def __getattr__(name: str) -> ModuleType:
    """Modules that nothing has asked for yet: pictures and data load when used."""
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *MODULES, "__version__"])
