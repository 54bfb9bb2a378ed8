"""Guides on the model's own log joint: `AutoLightBridge`, `AutoBridge`."""

from pyro_sb.infer.autoguide.annealed import AutoBridge
from pyro_sb.infer.autoguide.light import AutoLightBridge

__all__ = ["AutoBridge", "AutoLightBridge"]


def __dir__() -> list[str]:
    return sorted(__all__)
