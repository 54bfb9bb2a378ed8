"""What one run of a Pyro model tells: its sites, shapes and transforms; and which models we refuse, by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_sb.infer.packing import Packing

__all__ = ["Prototype", "Start", "prototype"]

Site = dict[str, Any]


class Start:
    r"""Init strategy that also serves sites which cannot be sampled (``ImproperUniform``).

    Follows ``strategy`` where it works; else the site starts at ``biject_to(support)(u)``, ``u`` uniform on (-2, 2).

    Args:
        strategy: A Pyro init strategy, ``init_to_uniform`` if omitted.
        like: Dtype and device of sites that have none of their own.

    Example:
        >>> import pyro.distributions as dist
        >>> improper = dist.ImproperUniform(dist.constraints.positive, (), (3,))
        >>> Start()({"name": "scale", "fn": improper}).shape
        torch.Size([3])
    """

    def __init__(self, strategy: Callable[..., Any] | None = None, like: Tensor | None = None) -> None:
        self.strategy = init_to_uniform if strategy is None else strategy
        self.like = torch.empty(0) if like is None else like.new_empty(0)

    def __call__(self, site: Site) -> Tensor:
        """A value for one site, as Pyro's init strategies give it."""
        fn = site["fn"]
        if is_discrete(fn):
            return fn.sample()
        try:
            return self.strategy(site)
        except NotImplementedError:
            return self.uniform(site)

    def uniform(self, site: Site) -> Tensor:
        """A start drawn in unconstrained space, from the support and the shape alone."""
        fn = site["fn"]
        transform = bijection(site["name"], fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        return transform(self.like.new_empty(shape).uniform_(-2, 2))


@dataclass
class Prototype:
    r"""One chain's run of a model, as the batched routes need it.

    Attributes:
        packing: Layout of the unconstrained continuous latents.
        transforms: Pyro's convention: ``transforms[name].inv`` maps unconstrained to constrained.
        batch_shapes: Batch shape of each continuous latent, constrained.
        enumerated: Shape of each discrete latent.
        deterministic: Shape of each ``pyro.deterministic`` site.
        improper: Latents that cannot be sampled from their prior.
        max_plate_nesting: Number of plate dimensions, counted from the right.
        depth: Number of batch dimensions left of which a chain dimension is free; undeclared ones included.
        numel: Numbers that one run of the model holds in its sites.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: Start
    packing: Packing
    transforms: dict[str, Transform]
    batch_shapes: dict[str, torch.Size]
    enumerated: dict[str, torch.Size]
    deterministic: dict[str, torch.Size]
    improper: tuple[str, ...]
    max_plate_nesting: int
    depth: int
    numel: int

    def draw(self) -> Tensor:
        """One start of the init strategy, unconstrained. Shape ``(dim,)``."""
        nodes = run(self.model, self.args, self.kwargs, self.start).nodes
        return self.packing.pack({name: t(nodes[name]["value"].detach()) for name, t in self.transforms.items()})


def prototype(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    init_strategy: Callable[..., Any] | None = None,
    max_plate_nesting: int | None = None,
    transforms: dict[str, Transform] | None = None,
) -> Prototype:
    r"""Run ``model`` once and read off what the batched log joint needs; refuse what cannot be served.

    Raises:
        NotImplementedError: Subsampled plate, discrete site that cannot be enumerated in parallel, support without a
            bijection, support that depends on another latent.
        ValueError: No continuous latent site, NaN in an observed site, unknown names in ``transforms``.
    """
    start = Start(init_strategy, like=first_float(args, kwargs))
    trace = run(model, args, kwargs, start)
    refuse_subsampling(trace)
    refuse_nan_data(trace)
    discrete = {name: site for name, site in latents(trace) if is_discrete(site["fn"])}
    continuous = {name: site for name, site in latents(trace) if not is_discrete(site["fn"])}
    for name, site in discrete.items():
        refuse_unenumerable(name, site)
    if not continuous:
        found = f"only discrete ones, {list(discrete)}" if discrete else "none"
        raise ValueError(
            f"The model must have a continuous latent site, got {found}. Leave out obs= where a value is unknown."
        )
    chosen = complete(transforms, continuous)
    if transforms is None:
        refuse_moving_supports(chosen, run(model, args, kwargs, start))
    nesting = plate_nesting(trace) if max_plate_nesting is None else max_plate_nesting
    stochastic = [site for site in trace.nodes.values() if is_sample(site)]
    return Prototype(
        model=model,
        args=args,
        kwargs=kwargs,
        start=start,
        packing=Packing.like({name: chosen[name](site["value"].detach()) for name, site in continuous.items()}),
        transforms=chosen,
        batch_shapes={name: site["fn"].batch_shape for name, site in continuous.items()},
        enumerated={name: site["value"].shape for name, site in discrete.items()},
        deterministic={name: site["value"].shape for name, site in trace.nodes.items() if is_deterministic(site)},
        improper=tuple(name for name, site in continuous.items() if not can_sample(site["fn"])),
        max_plate_nesting=nesting,
        depth=max([nesting, *(len(site["fn"].batch_shape) for site in stochastic)]),
        numel=sum(torch.as_tensor(site["value"]).numel() for site in stochastic),
    )


def run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], start: Start) -> poutine.Trace:
    """Trace of one run with latents drawn by ``start``, discrete ones sampled."""
    with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        return poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)


# ---- questions about a site ----


def is_sample(site: Site) -> bool:
    return site["type"] == "sample" and not isinstance(site["fn"], _Subsample)


def is_deterministic(site: Site) -> bool:
    return is_sample(site) and bool(site["infer"].get("_deterministic"))


def is_discrete(fn: Any) -> bool:
    return bool(fn.has_enumerate_support or getattr(getattr(fn, "support", None), "is_discrete", False))


def latents(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in trace.iter_stochastic_nodes() if is_sample(site))


def can_sample(fn: Any) -> bool:
    try:
        with torch.no_grad():
            fn.sample()
    except NotImplementedError:
        return False
    return True


def plate_nesting(trace: poutine.Trace) -> int:
    frames = (frame for site in trace.nodes.values() if is_sample(site) for frame in site["cond_indep_stack"])
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def first_float(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return next(tensors, None)


# ---- transforms ----


def bijection(name: str, fn: Any) -> Transform:
    """Unconstrained to constrained for one site, or an error that names it."""
    try:
        return biject_to(fn.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"Site {name!r} must have a support with a bijection from R^n, got {type(fn).__name__} on {describe(fn)}. "
            f"Pass transforms={{{name!r}: ...}} (constrained to unconstrained), or write the site in other terms."
        ) from None


def describe(fn: Any) -> str:
    try:
        return str(fn.support)
    except NotImplementedError:
        return "a support that it does not state"


def complete(transforms: dict[str, Transform] | None, sites: dict[str, Site]) -> dict[str, Transform]:
    """The user's transforms, and ``biject_to(support).inv`` for the sites that he left out; sorted by name."""
    given = {} if transforms is None else transforms
    unknown = sorted(given.keys() - sites.keys())
    if unknown:
        raise ValueError(f"transforms must name continuous latent sites, got {unknown}; the model has {sorted(sites)}.")
    return {name: given[name] if name in given else bijection(name, sites[name]["fn"]).inv for name in sorted(sites)}


# ---- refusals ----


def refuse_subsampling(trace: poutine.Trace) -> None:
    for name, site in trace.nodes.items():
        fn = site["fn"] if site["type"] == "sample" else None
        if isinstance(fn, _Subsample) and fn.subsample_size is not None and fn.subsample_size < fn.size:
            raise NotImplementedError(
                f"Plate {name!r} must hold all its data, got subsample_size {fn.subsample_size} of {fn.size}: the log "
                "joint would be random, and no exact kernel can target it. Leave out subsample_size, or use SVI."
            )


def refuse_nan_data(trace: poutine.Trace) -> None:
    for name in trace.observation_nodes:
        value, site = trace.nodes[name]["value"], trace.nodes[name]
        if isinstance(value, Tensor) and not is_deterministic(site) and bool(torch.isnan(value).any()):
            raise ValueError(
                f"Observed site {name!r} must not hold NaN, got {int(torch.isnan(value).sum())} in {value.numel()} "
                "values. Drop them, or mask them (obs_mask, poutine.mask) and write any finite number there: NaN "
                "spoils gradients even under a mask."
            )


def refuse_unenumerable(name: str, site: Site) -> None:
    fn, infer = site["fn"], site["infer"]
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
                f"Site {name!r} must have a fixed support, got one that depends on another latent. Sample a "
                "standardised variable and transform it, e.g. pyro.deterministic('x', low + (high - low) * u) with u ~ Uniform(0, 1)."
            )
