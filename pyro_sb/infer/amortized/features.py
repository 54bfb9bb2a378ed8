"""Observations as a bridge sees them: standardised numbers, their normal scores, and summaries of sets."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.checks import floats
from pyro_sb.infer.amortized.simulator import Simulator
from pyro_sb.infer.model.prototype import Packing
from pyro_sb.warn import warn

__all__ = ["Features", "Observation", "read_observation"]

FEW_VALUES, MOST_QUANTILES = 12, 16  # of exchangeable numbers: values that are counted; order statistics
LARGEST_SCORE = 3.5  # normal scores beyond it are read off a handful of simulations


@dataclass
class Features:
    r"""Numbers from an observation, fitted on simulations.

    Each column of the observation is standardised, and beside it stands its normal score :math:`\Phi^{-1}(F(y))` with F
    its distribution function over the simulations: what is affine in neither is mostly affine in both. A site whose
    items are exchangeable is replaced by permutation-invariant summaries: means, log standard deviations, correlations;
    of numbers also their order statistics (quantiles where there are more than 16), and the shares of each value where
    there are but a few. A posterior is then that given the summaries: pass an ``embedding`` where they are not
    sufficient. Missing entries are zeros, and an indicator says so.

    Args:
        data: Layout of the observations.
        sets: Number of items of each exchangeable site.
        masked: Whether entries may be missing (NaN).
        raw: Standardised entries alone for the bridge, in the model's own order: for an embedding. Items of a set are
            standardised alike.
    """

    data: Packing
    sets: dict[str, int] = field(default_factory=dict)
    masked: bool = False
    raw: bool = False
    location: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    farthest: Tensor = field(init=False)
    raw_location: Tensor = field(init=False)
    raw_scale: Tensor = field(init=False)
    quantiles: Any = field(init=False)
    levels: dict[str, Tensor | None] = field(init=False)

    def fit(self, observations: Tensor) -> "Features":
        """Learn means, deviations and distribution functions. Shape ``(N, data_dim)``, NaN where missing."""
        from sklearn.preprocessing import QuantileTransformer

        self.levels = {
            name: few_values(observations[:, part]) for name, part in self._slices().items() if name in self.sets
        }
        columns = self.columns(observations)
        self.location, self.scale = nan_moments(columns)
        self.farthest = ((columns - self.location) / self.scale).abs().nan_to_num(0.0).amax(0)
        self.raw_location, self.raw_scale = nan_moments(observations)
        for name, part in self._slices().items():
            if name in self.sets:
                items = observations[:, part].reshape(len(observations) * self.sets[name], -1)
                location, scale = nan_moments(items)
                self.raw_location[part] = location.repeat(self.sets[name])
                self.raw_scale[part] = scale.repeat(self.sets[name])
        num = len(columns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of columns that are missing throughout
            self.quantiles = QuantileTransformer(
                n_quantiles=min(num, 1000), output_distribution="normal", subsample=None
            ).fit(columns.cpu().double().numpy())
        return self

    def design(self, y: Tensor) -> Tensor:
        """Regressors ``(B, F)`` of observations ``(B, data_dim)``."""
        columns = self.columns(y)
        standard = ((columns - self.location) / self.scale).clamp(-10.0, 10.0)
        scores = torch.as_tensor(self.quantiles.transform(columns.cpu().double().numpy())).to(y)
        parts = [standard, scores.clamp(-LARGEST_SCORE, LARGEST_SCORE)]
        if self.masked:
            parts.append(torch.isnan(y).to(y))
        return torch.cat(parts, -1).nan_to_num(0.0)

    def context(self, y: Tensor) -> Tensor:
        """Context of the bridge at observations ``(B, data_dim)``: the regressors; raw entries for an embedding."""
        if not self.raw:
            return self.design(y)
        standard = ((y - self.raw_location) / self.raw_scale).nan_to_num(0.0)
        return torch.cat([standard, torch.isnan(y).to(y)], -1) if self.masked else standard

    def distance(self, y: Tensor) -> tuple[float, float]:
        """The largest distance of any column from its simulations' mean, in deviations; of the farthest simulation."""
        standard = ((self.columns(y) - self.location) / self.scale).abs().nan_to_num(0.0)
        excess = (standard - self.farthest).amax(0)
        worst = int(excess.argmax())
        return float(standard[:, worst].max()), float(self.farthest[worst])

    def columns(self, y: Tensor) -> Tensor:
        """Sites as they are, sets by their summaries. ``(B, data_dim)`` to ``(B, columns)``."""
        parts = []
        for name, part in self._slices().items():
            values = y[:, part]
            if name in self.sets:
                values = summary(values.unflatten(1, (self.sets[name], -1)), self.levels[name])
            parts.append(values)
        return torch.cat(parts, -1)

    def names(self) -> tuple[str, ...]:
        """What each of `columns` is: ``y[i]``, or ``summary i of y``."""
        found: list[str] = []
        for name, shape in self.data.shapes.items():
            num = shape.numel()
            if name in self.sets:
                items = torch.zeros(1, self.sets[name], num // self.sets[name])
                found += [f"summary {i} of {name}" for i in range(summary(items, self.levels[name]).shape[1])]
            else:
                found += [f"{name}[{i}]" for i in range(num)] if num > 1 else [name]
        return tuple(found)

    def _slices(self) -> dict[str, slice]:
        """Columns of each site."""
        ends = np.cumsum([shape.numel() for shape in self.data.shapes.values()]).tolist()
        return {name: slice(a, b) for name, a, b in zip(self.data.shapes, [0, *ends], ends, strict=False)}


def few_values(values: Tensor) -> Tensor | None:
    """The distinct values of a site that has at most :data:`FEW_VALUES`; else None."""
    levels = values[~torch.isnan(values)].unique()
    return levels if len(levels) <= FEW_VALUES else None


def summary(items: Tensor, levels: Tensor | None = None) -> Tensor:
    """Permutation-invariant summaries of items ``(B, k, q)``; missing items are left out. ``levels``: their values."""
    present = ~torch.isnan(items).any(-1, keepdim=True)
    filled, count = items.nan_to_num(0.0), present.sum(1).clamp_min(1)
    mean = (filled * present).sum(1) / count
    centred = (filled - mean[:, None]) * present
    covariance = torch.einsum("nka,nkb->nab", centred, centred) / count[..., None]
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt() + 1e-6 * (1 + mean.abs())
    parts = [mean, deviation.log()]
    if items.shape[-1] > 1:
        rows, columns = torch.tril_indices(items.shape[-1], items.shape[-1], -1).tolist()
        correlation = covariance[:, rows, columns] / (deviation[:, rows] * deviation[:, columns])
        parts.append(torch.atanh(correlation.clamp(-0.9999, 0.9999)))
    if items.shape[-1] == 1 or items.shape[1] >= 8:
        num = min(items.shape[1], MOST_QUANTILES if items.shape[-1] == 1 else 5)
        shares = torch.linspace(0, 1, num, dtype=items.dtype, device=items.device)
        parts.append(torch.nanquantile(items, shares, 1).transpose(0, 1).flatten(1).nan_to_num(0.0))
    if levels is not None and items.shape[-1] == 1:
        parts.append((items == levels).sum(1) / count)
    return torch.cat(parts, -1)


def nan_moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column without its missing entries; 1 where it is constant."""
    present = ~torch.isnan(columns)
    count = present.sum(0).clamp_min(1)
    mean = columns.nan_to_num(0.0).sum(0) / count
    deviation = (((columns - mean).nan_to_num(0.0)).square().sum(0) / count).sqrt()
    return mean, torch.where(deviation > 1e-12 * (1 + mean.abs()), deviation, torch.ones_like(deviation))


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
    like = torch.empty(0, dtype=dtype, device=data.device)
    sites = {name: floats("y" if len(sites) == 1 else name, value, like).detach() for name, value in sites.items()}
    leads = {name: value.shape[: max(0, value.dim() - len(data.shapes[name]))] for name, value in sites.items()}
    for name, value in sites.items():
        shape = data.shapes[name]
        if value.shape[len(leads[name]) :] != shape or len(leads[name]) > 1 or 0 in leads[name]:
            raise ValueError(
                f"y must have the shape that was trained on, {tuple(shape)}, or (B, *shape) for a batch, got "
                f"{tuple(value.shape)} for {name!r}. Fit again for data of another size."
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
        warn(
            f"y lies {distance:.3g} standard deviations from the simulations' mean in one of its entries or summaries; "
            f"the farthest simulation lies {farthest:.3g} away. The bridge extrapolates: check the data against the "
            "model, and trust importance or mcmc only.",
        )
