"""Questions about one site of a Pyro trace: what it is, and how its support is reached from R^n."""

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.subsample_messenger import _Subsample
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

__all__ = [
    "Site",
    "bijection",
    "can_sample",
    "is_deterministic",
    "is_discrete",
    "is_sample",
    "latents",
    "plate_nesting",
]

Site = dict[str, Any]


def is_sample(site: Site) -> bool:
    """Whether a node of a trace is a random variable, latent or observed, not a plate's index set."""
    return site["type"] == "sample" and not isinstance(site["fn"], _Subsample)


def is_deterministic(site: Site) -> bool:
    """Whether a site is ``pyro.deterministic``, or the original of a reparametrised one: a point mass at its value."""
    if not is_sample(site):
        return False
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution | dist.Independent | ExpandedDistribution):
        fn = fn.base_dist
    return bool(site["infer"].get("_deterministic")) or (site["is_observed"] and isinstance(fn, dist.Delta))


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has discrete values."""
    return bool(fn.has_enumerate_support or getattr(getattr(fn, "support", None), "is_discrete", False))


def latents(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """The unobserved random variables of a trace."""
    return ((name, site) for name, site in trace.iter_stochastic_nodes() if is_sample(site))


def can_sample(fn: Any) -> bool:
    """Whether a distribution can be drawn from; ``ImproperUniform`` cannot."""
    try:
        with torch.no_grad():
            fn.sample()
    except NotImplementedError:
        return False
    return True


def plate_nesting(trace: poutine.Trace) -> int:
    """Number of dimensions from the right that the plates of a trace take."""
    frames = (frame for site in trace.nodes.values() if is_sample(site) for frame in site["cond_indep_stack"])
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def bijection(name: str, fn: Any) -> Transform:
    """Unconstrained to constrained for one site, or an error that names it."""
    try:
        support = fn.support
        mixed = isinstance(support, MixtureSameFamilyConstraint)  # torch registers no bijection for a mixture's support
        return biject_to(support.base_constraint if mixed else support)
    except NotImplementedError:
        raise NotImplementedError(
            f"Site {name!r} must have a support with a bijection from R^n, got {type(fn).__name__} on "
            f"{describe(fn)}. "
            f"Pass transforms={{{name!r}: ...}} (constrained to unconstrained), or write the site in other terms, e.g. "
            "by poutine.reparam."
        ) from None


def describe(fn: Any) -> str:
    try:
        return str(fn.support)
    except NotImplementedError:
        return "a support that it does not state"
