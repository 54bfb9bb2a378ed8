"""Models that cannot be served, refused by the name of the site: what must hold, what came, what to write instead."""

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.sites import Site, bijection, is_deterministic

__all__ = ["refuse_moving_supports", "refuse_nan_data", "refuse_subsampling", "refuse_unenumerable"]


def refuse_subsampling(trace: poutine.Trace) -> None:
    """A plate that draws a random part of the data makes the density random."""
    for name, site in trace.nodes.items():
        fn = site["fn"] if site["type"] == "sample" else None
        if isinstance(fn, _Subsample) and fn.subsample_size is not None and fn.subsample_size < fn.size:
            raise NotImplementedError(
                f"Plate {name!r} must hold all its data, got subsample_size {fn.subsample_size} of {fn.size}: the log "
                "joint would be random, and no exact kernel can target it. Leave out subsample_size, or use SVI."
            )


def refuse_nan_data(trace: poutine.Trace) -> None:
    """NaN in the data makes every density, or at least every gradient, NaN."""
    for name in trace.observation_nodes:
        value, site = trace.nodes[name]["value"], trace.nodes[name]
        if isinstance(value, Tensor) and not is_deterministic(site) and bool(torch.isnan(value).any()):
            raise ValueError(
                f"Observed site {name!r} must not hold NaN, got {int(torch.isnan(value).sum())} in {value.numel()} "
                "values. Drop them, or mask them (obs_mask, poutine.mask) and write any finite number there: NaN "
                "spoils gradients even under a mask."
            )


def refuse_unenumerable(name: str, site: Site) -> None:
    """A discrete latent must be summed out, exactly and in parallel."""
    fn, infer = site["fn"], site["infer"]
    if isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims:
        raise NotImplementedError(
            f"Discrete site {name!r} must be enumerable, got a vector of discrete variables (to_event): its values are "
            "too many. Sample them in a plate instead."
        )
    if not fn.has_enumerate_support:
        raise NotImplementedError(
            f"Discrete site {name!r} must have a finite support to be summed out, got {type(fn).__name__}. Observe it, "
            "sum it out by hand (pyro.factor), or replace it by a distribution with enumerate_support."
        )
    how = infer.get("enumerate", "parallel")
    if how != "parallel" or infer.get("num_samples") is not None:
        asked = f"enumerate={how!r}, num_samples={infer.get('num_samples')}"
        raise NotImplementedError(
            f"Discrete site {name!r} must be enumerated exactly and in parallel, got {asked}. Leave out infer."
        )


def refuse_moving_supports(transforms: dict[str, Transform], other: poutine.Trace) -> None:
    """Pyro fixes each transform at the first run; a support that moves with a latent would be half obeyed."""
    for name, transform in transforms.items():
        if name not in other.nodes:
            continue  # dynamic structure is refused where the runs are compared
        here = transform.inv
        there = bijection(name, other.nodes[name]["fn"])
        value = other.nodes[name]["value"]
        u = torch.zeros(there.inverse_shape(value.shape), dtype=value.dtype, device=value.device)
        if not torch.equal(here(u), there(u)):
            raise NotImplementedError(
                f"Site {name!r} must have a fixed support, got one that depends on another latent. Sample a standard "
                "variable and move it: pyro.deterministic('x', low + (high - low) * u) with u ~ Uniform(0, 1)."
            )
