"""An observation, or a batch of them, as a posterior is asked for it: checked against what was trained on."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.amortized.features import Features
from pyro_sb.infer.amortized.simulator import Simulator

__all__ = ["Observation", "read_observation"]


@dataclass
class Observation:
    """Observations in one matrix.

    Attributes:
        values: Packed; NaN where missing. Shape ``(B, data_dim)``.
        batched: Whether there is a batch of them: one alone has no batch dimension in its posterior.
        sites: As they were given, by site. Shape ``(*shape)``, or ``(B, *shape)``.
    """

    values: Tensor
    batched: bool
    sites: dict[str, Tensor]

    @property
    def missing(self) -> bool:
        """Whether any entry is missing."""
        return bool(torch.isnan(self.values).any())


def read_observation(y: Any, simulator: Simulator, features: Features) -> Observation:
    """Check shapes and missing entries; warn of observations far outside what was simulated."""
    data = simulator.data
    sites = dict(y) if isinstance(y, dict) else {simulator.observed[0]: y}
    if sites.keys() != data.shapes.keys():
        raise ValueError(
            f"y must hold the observed sites {list(data.shapes)}, got {sorted(sites)}. Pass a dict by site name."
        )
    dtype = simulator.prototype.packing.dtype
    sites = {name: torch.as_tensor(value, device=data.device).to(dtype) for name, value in sites.items()}
    leads = {name: value.shape[: max(0, value.dim() - len(data.shapes[name]))] for name, value in sites.items()}
    for name, value in sites.items():
        shape = data.shapes[name]
        if value.shape[len(leads[name]) :] != shape or len(leads[name]) > 1 or 0 in leads[name]:
            raise ValueError(
                f"y must have the shape that was trained on, {tuple(shape)}, or (B, *shape) for a batch, got "
                f"{tuple(value.shape)} for {name!r}. Fit anew for data of another size."
            )
    if len(set(leads.values())) > 1:
        raise ValueError(f"observed sites must share their batch, got { ({k: tuple(v) for k, v in leads.items()}) }.")
    (lead,) = set(leads.values())
    values = torch.cat([sites[name].reshape(*lead, -1) for name in data.shapes], -1).reshape(-1, data.dim)
    check_values(values, features)
    return Observation(values, len(lead) == 1, sites)


def check_values(values: Tensor, features: Features) -> None:
    """Refuse infinities and unexpected NaN; warn of the distance of what lies far outside the simulations."""
    if bool(torch.isinf(values).any()):
        raise ValueError(f"y must be finite, got {int(torch.isinf(values).sum())} infinite entries. NaN marks missing.")
    missing = int(torch.isnan(values).sum())
    if missing and not features.masked:
        raise ValueError(
            f"y must not hold NaN, got {missing}: the bridge was trained on whole observations. Write "
            "fit(..., missing=0.5) for parts that may be missing."
        )
    distance, farthest = features.distance(values)
    if distance > 1.5 * farthest + 1.0:
        warnings.warn(
            f"y lies {distance:.3g} standard deviations from the simulations' mean in one of its entries or summaries; "
            f"the farthest simulation lies {farthest:.3g} away. The bridge extrapolates: check the data against the "
            "model, and trust importance or mcmc only.",
            RuntimeWarning,
            stacklevel=4,
        )
