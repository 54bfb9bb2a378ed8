r"""Masked entries of latents: those that reach nothing are no latents. First of all, data with missing entries.

Pyro splits ``sample("y", fn, obs=y, obs_mask=mask)`` in two sites of the whole shape, ``y_observed`` and
``y_unobserved``, each masked where the other counts, and puts ``y`` together from both. A masked entry has no density
and reaches nothing: as a latent it would be flat. Here it has a fixed value, and the vector of latents holds the others
(`FreeEntries`). A site without any missing entry is no latent at all, and of a discrete site each masked entry counts
as the one value that it has.

The same holds of what ``poutine.mask`` takes out of a latent site, as of a series beyond its end, where the log density
shows that nothing depends on it; a masked entry that the data depend on has a flat prior.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_sb.infer.model.sites import Site, is_deterministic, is_discrete, latents

__all__ = ["MISSING", "FreeEntries", "Gap", "Gaps", "find_gaps", "with_unused"]

logger = logging.getLogger(__name__)
Draw = Callable[[], poutine.Trace]
Total = Callable[[dict[str, Tensor]], Tensor]
PAIRS = 3  # of runs that show whether a masked entry reaches anything
THERE, MISSING = "_observed", "_unobserved"  # Pyro's names of the two halves


@dataclass(frozen=True)
class Gap:
    """One half of a site with an ``obs_mask``.

    Attributes:
        free: Which entries are latents. Shape ``batch_shape``.
        filled: Values of the others, inside the support. Shape ``(*batch_shape, *event_shape)``.
    """

    free: Tensor
    filled: Tensor

    @property
    def num_free(self) -> int:
        """Number of entries that are latents."""
        return int(self.free.sum())

    def fill(self, value: Tensor) -> Tensor:
        """Values of the site, ``(*batch, *shape)``, with the entries that are no latents at their own."""
        return torch.where(right_aligned(self.free, self.filled.dim() - self.free.dim()), value, self.filled)


@dataclass(frozen=True)
class Gaps:
    """What masks leave open in a model's sites, as one run shows it.

    Attributes:
        latent: By name of a latent half, or of another latent with masked entries that reach nothing.
        data: Values for the observed halves, the missing entries inside the support: whatever stood there, perhaps NaN,
            would spoil gradients through the mask.
        masks: Which entries of each observed half are there.
        log_copies: Log of how often an enumeration counts every configuration: once a value of each masked entry.
    """

    latent: dict[str, Gap] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    log_copies: float = 0.0

    @property
    def partial(self) -> dict[str, Gap]:
        """Those with a latent entry."""
        return {name: gap for name, gap in self.latent.items() if gap.num_free}

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
    gaps, log_copies = Gaps(), 0.0
    for name, site in trace.nodes.items():
        halves = [trace.nodes.get(name + half) for half in (THERE, MISSING)]
        if any(half is None or half["type"] != "sample" for half in halves) or not is_deterministic(site):
            continue
        there, missing = halves
        for half, other in ((there, missing), (missing, there)):
            if not half["is_observed"]:
                gap = gaps.latent[half["name"]] = gap_of(half, other)
                log_copies += log_values(half) * (gap.free.numel() - gap.num_free) if gap.num_free else 0.0
        if there["is_observed"]:
            gaps.masks[there["name"]] = mask_of(there)
            gaps.data[there["name"]] = spread(there["value"], gaps.masks[there["name"]], missing["value"], there)
    return replace(gaps, log_copies=log_copies)


def log_values(site: Site) -> float:
    """Log of how many values an entry can have that is summed over; 0 of a continuous site."""
    return log(len(site["fn"].enumerate_support(expand=False))) if site["fn"].has_enumerate_support else 0.0


def with_unused(gaps: Gaps, trace: poutine.Trace, draw: Draw, total: Total) -> Gaps:
    """The gaps, and masked entries of other latents that nothing depends on.

    Args:
        gaps: Those of the run.
        trace: The run.
        draw: Makes a further run.
        total: Log density of the model with its latents at given values.
    """
    sites = {name: site for name, site in latents(trace) if name not in gaps.latent}
    try:
        unused = unused_entries(sites, draw, total)
    except Exception as error:  # whatever the user's model raises at values that one run did not have together
        logger.info("masked latents are left as they are: %s", error)
        unused = {}
    found, log_copies = dict(gaps.latent), gaps.log_copies
    for name, entries in unused.items():
        site = trace.nodes[name]
        if is_discrete(site["fn"]):
            log_copies += log_values(site) * int(entries.sum())
        elif bool(entries.any()):
            found[name] = Gap(~entries, site["value"].detach())
    return replace(gaps, latent=found, log_copies=log_copies)


def unused_entries(sites: dict[str, Site], draw: Draw, total: Total) -> dict[str, Tensor]:
    """Which masked entries of latents have no gradient and, all moved together, leave the log density where it is."""
    unused = {name: ~mask_of(site) for name, site in sites.items()}
    unused = {name: entries for name, entries in unused.items() if bool(entries.any())}
    for _ in range(PAIRS if unused else 0):
        here, there = ({k: s["value"].detach() for k, s in latents(draw())} for _ in range(2))
        if not unused.keys() <= here.keys() == there.keys():
            return {}
        for name, grad in gradients(total, here, [name for name in unused if here[name].is_floating_point()]).items():
            still = (grad == 0).reshape(*unused[name].shape, -1).all(-1)
            unused[name] = unused[name] & still
        moved = {
            name: torch.where(right_aligned(entries, here[name].dim() - entries.dim()), there[name], here[name])
            for name, entries in unused.items()
        }
        if not bool(total(here) == total(here | moved)):
            return {}
    return unused


def gradients(total: Total, values: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Of a log density in some of its values; 0 where it does not depend on them."""
    leaves = [values[name].clone().requires_grad_() for name in names]
    with torch.enable_grad():
        found = total(values | dict(zip(names, leaves)))
    if not leaves or not found.requires_grad:
        return {name: torch.zeros_like(values[name]) for name in names}
    grads = torch.autograd.grad(found, leaves, allow_unused=True)
    return {name: torch.zeros_like(values[name]) if g is None else g for name, g in zip(names, grads)}


def gap_of(site: Site, other: Site) -> Gap:
    """A latent half, its masked entries at the data's values where those can be used."""
    free, value = mask_of(site), site["value"].detach()
    filled = value
    if other["is_observed"]:
        usable = ~free & mask_of(other) & finite(other["value"], site)
        filled = torch.where(right_aligned(usable, site["fn"].event_dim), other["value"].to(value), value)
    return Gap(free, filled)


def mask_of(site: Site) -> Tensor:
    """Which entries of a site count, in its batch shape; of a larger mask, those that count anywhere."""
    fn, masks = site["fn"], [True if site["mask"] is None else site["mask"]]
    masks += [fn._mask] if isinstance(fn, MaskedDistribution) else []
    shape, mask = fn.batch_shape, torch.ones((), dtype=torch.bool, device=site["value"].device)
    for more in masks:
        mask = mask & torch.as_tensor(more, device=mask.device)
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
        self.domain = constraints.independent(inner.domain, gap.filled.dim() - inner.domain.event_dim)
        self.codomain = constraints.independent(constraints.real, 1 + len(self.event))
        self.places, self.chosen = torch.where(gap.free.flatten(), rank, 0), gap.free.flatten().nonzero()[:, 0]

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
        return padded.index_select(len(lead), self.places).reshape((*lead, *self.batch, *self.event))

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
