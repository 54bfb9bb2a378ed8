"""One site of a Pyro trace: its kind, the bijection from R^n to its support, and what is refused."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_sb.infer.model.matrices import CholeskyVector, PositiveDefiniteVector

__all__ = [
    "Site",
    "base_of",
    "bijection",
    "can_sample",
    "is_deterministic",
    "is_discrete",
    "is_sample",
    "latents",
    "plate_nesting",
    "quiet_draws",
    "refuse_moving_supports",
    "refuse_nan_data",
    "refuse_subsampling",
    "refuse_unenumerable",
    "without_handlers",
]

Site = dict[str, Any]
MATRICES = {type(kind.codomain): kind for kind in (CholeskyVector, PositiveDefiniteVector)}


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


@contextmanager
def quiet_draws() -> Iterator[None]:
    """Without what torch says of every draw of a Wishart law."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected", UserWarning)
        yield


def can_sample(fn: Any) -> bool:
    """Whether a distribution can be drawn from; ``ImproperUniform`` cannot."""
    try:
        with torch.no_grad(), quiet_draws():
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
        if isinstance(support, MixtureSameFamilyConstraint):  # torch registers no bijection for a mixture's support
            support = support.base_constraint
        own = MATRICES.get(type(support))
        return biject_to(support) if own is None else own()
    except NotImplementedError:
        raise NotImplementedError(
            f"Site {name!r} must have a support with a bijection from R^n, got {type(fn).__name__} on "
            f"{describe(fn)}. "
            f"Pass transforms={{{name!r}: ...}} (constrained to unconstrained), or write the site in other terms, e.g. "
            "by poutine.reparam."
        ) from None


def base_of(fn: Any) -> Any:
    """A distribution without the event dimensions that ``to_event`` made."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def describe(fn: Any) -> str:
    """A distribution's support, in words."""
    try:
        return str(fn.support)
    except NotImplementedError:
        return "a support that it does not state"


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
        shape = there.inverse_shape(value.shape)
        u = torch.empty(shape, dtype=value.dtype, device=value.device).uniform_(-2, 2)  # 0 is blind to (-top, top)
        if not torch.equal(here(u), there(u)):
            raise NotImplementedError(
                f"Site {name!r} must have a fixed support, got one that depends on another latent. Sample a standard "
                "variable and move it: pyro.deterministic('x', low + (high - low) * u) with u ~ Uniform(0, 1)."
            )


@contextmanager
def without_handlers() -> Iterator[None]:
    """Runs of a model inside are no part of what Pyro's handlers outside record, replay or allot dimensions to."""
    stack = list(_PYRO_STACK)
    plates = [handler for handler in stack if isinstance(handler, IndepMessenger) and handler.dim is not None]
    _PYRO_STACK.clear()
    for plate in plates:
        _DIM_ALLOCATOR.free(plate.name, plate.dim)
    try:
        yield
    finally:
        _PYRO_STACK[:] = stack
        for plate in plates:
            _DIM_ALLOCATOR.allocate(plate.name, plate.dim)
