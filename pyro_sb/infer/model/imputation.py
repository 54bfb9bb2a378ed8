r"""Data with missing entries, by Pyro's ``obs_mask``: what is missing is a latent, what is there is none.

Pyro splits ``sample("y", fn, obs=y, obs_mask=mask)`` in two sites of the whole shape, ``y_observed`` and
``y_unobserved``, each masked where the other counts, and puts ``y`` together from both. A masked entry has no density
and reaches nothing: as a latent it would be flat. Here it has a fixed value, and the vector of latents holds the others
(`FreeEntries`). A site without any missing entry is no latent at all, and of a discrete site each masked entry counts as the
one value that it has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_sb.infer.model.sites import Site, is_deterministic

__all__ = ["MISSING", "FreeEntries", "Gap", "Gaps", "find_gaps"]

THERE, MISSING = "_observed", "_unobserved"  # Pyro's names of the two halves


@dataclass(frozen=True)
class Gap:
    """One half of a site with an ``obs_mask``.

    Attributes:
        free: Which entries are latents. Shape ``batch_shape``.
        filled: Values of the others, inside the support. Shape ``(*batch_shape, *event_shape)``.
        num_values: Values that a discrete entry can have; 1 of a continuous one.
    """

    free: Tensor
    filled: Tensor
    num_values: int = 1

    @property
    def num_free(self) -> int:
        """Number of entries that are latents."""
        return int(self.free.sum())

    def fill(self, value: Tensor) -> Tensor:
        """Values of the site, ``(*batch, *shape)``, with the entries that are no latents at their own."""
        return torch.where(right_aligned(self.free, self.filled.dim() - self.free.dim()), value, self.filled)


@dataclass(frozen=True)
class Gaps:
    """What ``obs_mask`` leaves open in a model's sites, as one run shows it.

    Attributes:
        latent: By name of a latent half.
        data: Values for the observed halves, the missing entries inside the support: whatever stood there, perhaps NaN,
            would spoil gradients through the mask.
        masks: Which entries of each observed half are there.
    """

    latent: dict[str, Gap] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def partial(self) -> dict[str, Gap]:
        """Those with a latent entry."""
        return {name: gap for name, gap in self.latent.items() if gap.num_free}

    @property
    def log_copies(self) -> float:
        """Log of how often an enumeration counts every configuration, as masked discrete entries run over values."""
        return sum((gap.free.numel() - gap.num_free) * log(gap.num_values) for gap in self.partial.values())

    def without_missing(self, name: str, data: Tensor) -> Tensor:
        """Data of an observed half as they were given: NaN where they are missing, if they are floats."""
        there = self.masks[name]
        if not data.is_floating_point() or data.dim() < there.dim():
            return data
        return torch.where(right_aligned(there, data.dim() - there.dim()), data, torch.nan)

    def close(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model with its data in place, and halves without a missing entry fixed."""
        fixed = {name: gap.filled for name, gap in self.latent.items() if not gap.num_free}
        return DataInPlace(self.data, fixed)(model) if self.data or fixed else model


def find_gaps(trace: poutine.Trace) -> Gaps:
    """The sites of a run that have an ``obs_mask``."""
    gaps = Gaps()
    for name, site in trace.nodes.items():
        halves = [trace.nodes.get(name + half) for half in (THERE, MISSING)]
        if any(half is None or half["type"] != "sample" for half in halves) or not is_deterministic(site):
            continue
        there, missing = halves
        for half, other in ((there, missing), (missing, there)):
            if not half["is_observed"]:
                gaps.latent[half["name"]] = gap_of(half, other)
        if there["is_observed"]:
            gaps.masks[there["name"]] = mask_of(there)
            gaps.data[there["name"]] = spread(there["value"], gaps.masks[there["name"]], missing["value"], there)
    return gaps


def gap_of(site: Site, other: Site) -> Gap:
    """A latent half, its masked entries at the data's values where those can be used."""
    free, value = mask_of(site), site["value"].detach()
    filled = value
    if other["is_observed"]:
        usable = ~free & mask_of(other) & finite(other["value"], site)
        filled = torch.where(right_aligned(usable, site["fn"].event_dim), other["value"].to(value), value)
    size = len(site["fn"].enumerate_support(expand=False)) if site["fn"].has_enumerate_support else 1
    return Gap(free, filled, size)


def mask_of(site: Site) -> Tensor:
    """Which entries of a site count, in its batch shape; of a larger mask, those that count anywhere."""
    shape, mask = site["fn"].batch_shape, torch.as_tensor(site["mask"], device=site["value"].device)
    mask = mask.expand(torch.broadcast_shapes(mask.shape, shape))
    for _ in range(mask.dim() - len(shape)):
        mask = mask.any(0)
    for dim, size in enumerate(shape):
        if size == 1 and mask.shape[dim] > 1:
            mask = mask.any(dim, keepdim=True)
    return mask


def finite(value: Tensor, site: Site) -> Tensor:
    """Which entries, in the batch shape, are finite in all of their event."""
    fn = site["fn"]
    found = torch.isfinite(value.expand(fn.batch_shape + fn.event_shape))
    return found.flatten(len(fn.batch_shape)).all(-1) if fn.event_dim else found


def spread(data: Tensor, there: Tensor, inside: Tensor, site: Site) -> Tensor:
    """The data with the missing entries inside the support; as they are where the mask is larger than the site."""
    dims = site["fn"].event_dim
    if data.dim() - dims > there.dim():
        return data
    return torch.where(right_aligned(there, dims), data, inside.detach().to(data))


def right_aligned(mask: Tensor, event_dim: int) -> Tensor:
    """A mask of the batch shape, to go with values."""
    return mask.reshape(mask.shape + (1,) * event_dim)


class DataInPlace(Messenger):
    """Gives observed sites their values, and latent ones that are known after all."""

    def __init__(self, data: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        super().__init__()
        self.data, self.fixed = data, fixed

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.data and msg["is_observed"]:
            msg["value"] = self.data[name]
        elif name in self.fixed and msg["value"] is None:
            msg["value"], msg["is_observed"] = self.fixed[name], True


class FreeEntries(Transform):
    r"""A site with fixed entries to the unconstrained values of the others; its inverse puts the fixed ones back.

    Args:
        inner: Constrained to unconstrained for the whole site, entry by entry.
        gap: Which entries are free, and the values of the others.

    Example:
        >>> gap = Gap(torch.tensor([False, True, False]), torch.tensor([5.0, 0.0, 7.0]))
        >>> FreeEntries(torch.distributions.ExpTransform().inv, gap).inv(torch.zeros(1))
        tensor([5., 1., 7.])
    """

    bijective = True

    def __init__(self, inner: Transform, gap: Gap) -> None:
        super().__init__()
        self.inner, self.gap = inner, gap
        batch, unconstrained = gap.free.shape, inner.forward_shape(gap.filled.shape)
        self.batch, self.event = batch, torch.Size(unconstrained[len(batch) :])
        rank = gap.free.flatten().long().cumsum(0)  # place of each entry in [0, free entries ...]
        self.places, self.chosen = torch.where(gap.free.flatten(), rank, 0), gap.free.flatten().nonzero()[:, 0]

    @property
    def domain(self) -> constraints.Constraint:
        """The site's, as one event."""
        inner = self.inner.domain
        return constraints.independent(inner, self.gap.filled.dim() - inner.event_dim)

    @property
    def codomain(self) -> constraints.Constraint:
        """Real numbers, an event of the free entries."""
        return constraints.independent(constraints.real, 1 + len(self.event))

    def _call(self, x: Tensor) -> Tensor:
        return self.select(self.inner(x))

    def select(self, u: Tensor) -> Tensor:
        """The free entries of unconstrained values of the whole site."""
        lead = u.shape[: u.dim() - len(self.batch) - len(self.event)]
        return u.reshape(*lead, len(self.places), *self.event).index_select(len(lead), self.chosen)

    def _inverse(self, u: Tensor) -> Tensor:
        return self.gap.fill(self.inner.inv(self._whole(u)))

    def _whole(self, u: Tensor) -> Tensor:
        """Unconstrained values of the whole site, 0 at the fixed entries."""
        lead = u.shape[: u.dim() - 1 - len(self.event)]
        padded = torch.cat([u.new_zeros(*lead, 1, *self.event), u], len(lead))
        return padded.index_select(len(lead), self.places).reshape(*lead, *self.batch, *self.event)

    def log_abs_det_jacobian(self, x: Tensor, u: Tensor) -> Tensor:
        """Of the free entries. Shape ``(*lead,)``."""
        whole = self._whole(u)
        term = self.inner.log_abs_det_jacobian(self.inner.inv(whole), whole)
        dims = u.dim() - 1 - len(self.event) + len(self.batch)
        term = term.flatten(dims).sum(-1) if term.dim() > dims else term
        lead = u.shape[: u.dim() - 1 - len(self.event)]
        return torch.where(self.gap.free, term, 0.0).reshape(*lead, len(self.places)).sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Of the site to that of the free entries."""
        return torch.Size((*shape[: len(shape) - self.gap.filled.dim()], self.gap.num_free, *self.event))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Of the free entries to that of the site."""
        return torch.Size((*shape[: len(shape) - 1 - len(self.event)], *self.gap.filled.shape))
