"""A Pyro model as its first run shows it: its latents, their transforms, and their layout in one vector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.model.imputation import FreeEntries, Gaps, find_gaps, with_unused
from pyro_sb.infer.model.runs import ModelRuns
from pyro_sb.infer.model.sites import (
    Site,
    bijection,
    can_sample,
    is_deterministic,
    is_discrete,
    is_sample,
    latents,
    plate_nesting,
    quiet_draws,
    refuse_moving_supports,
    refuse_nan_data,
    refuse_subsampling,
    refuse_unenumerable,
)

__all__ = ["MAX_TRIES", "Packing", "Prototype", "Start", "closed", "first_float", "persist", "prototype", "run"]

MAX_TRIES = 100  # runs or starts before we give up, as in Pyro
MOVES = 3  # random runs that are looked at for supports that move


@dataclass(frozen=True)
class Packing:
    r"""Layout of named tensors in one vector of ``dim`` numbers, sorted by name.

    Args:
        shapes: Shape of each site, one chain, without batch dimensions.
        dtypes: Dtype of each site; the vector has the widest of them.
        device: Where the sites live.

    Example:
        >>> packing = Packing.like({"b": torch.zeros(2), "a": torch.ones(())})
        >>> packing.pack({"b": torch.zeros(5, 2), "a": torch.ones(5)}).shape
        torch.Size([5, 3])
        >>> {name: tuple(value.shape) for name, value in packing.unpack(torch.zeros(5, 3)).items()}
        {'a': (5,), 'b': (5, 2)}
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    device: torch.device

    @classmethod
    def like(cls, sites: dict[str, Tensor]) -> "Packing":
        """The layout of one chain's tensors."""
        sites = dict(sorted(sites.items()))
        device = next(iter(sites.values())).device if sites else torch.device("cpu")
        return cls({k: v.shape for k, v in sites.items()}, {k: v.dtype for k, v in sites.items()}, device)

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vector: the widest of the sites', the default's if there are none."""
        return reduce(torch.promote_types, self.dtypes.values()) if self.dtypes else torch.get_default_dtype()

    def pack(self, sites: dict[str, Tensor]) -> Tensor:
        r"""One vector from named tensors, leading batch dimensions kept.

        Args:
            sites: Tensor of shape ``(*batch, *shape)`` for each site, the same ``batch`` for all.

        Returns:
            Shape ``(*batch, dim)``.

        Raises:
            ValueError: If a site is missing, unknown, or its shape does not end in the site's shape.
        """
        if sites.keys() != self.shapes.keys():
            raise ValueError(
                f"params must hold exactly the sites {list(self.shapes)}, got {sorted(sites)}. Add those that are "
                "missing, leave the others out."
            )
        batch = self.batch_shape(sites)
        columns = [torch.as_tensor(sites[name]).reshape(*batch, -1) for name in self.shapes]
        return torch.cat([column.to(self.device, self.dtype) for column in columns], -1)

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``(*batch, dim)`` to named tensors of shape ``(*batch, *shape)``, each in its site's dtype."""
        if z.shape[-1:] != (self.dim,):
            raise ValueError(
                f"z must have {self.dim} numbers in its last dimension, got shape {tuple(z.shape)}. Use pack()."
            )
        columns = z.split([shape.numel() for shape in self.shapes.values()], -1) if self.shapes else ()
        batch = z.shape[:-1]
        return {
            name: column.reshape(batch + self.shapes[name]).to(self.dtypes[name])
            for name, column in zip(self.shapes, columns, strict=True)
        }

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Vectors ``(n, dim)``, one below another, in the layout's dtype."""
        empty = torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
        return torch.cat([empty, *(part.to(empty) for part in parts)])

    def batch_shape(self, sites: dict[str, Tensor]) -> torch.Size:
        """The leading dimensions that all sites share, ``()`` for one chain."""
        if not self.shapes:
            raise ValueError("The model must have a continuous latent site for a vector of latents, got none.")
        batches = set()
        for name, shape in self.shapes.items():
            found = torch.as_tensor(sites[name]).shape
            split = len(found) - len(shape)
            if split < 0 or found[split:] != shape:
                raise ValueError(
                    f"Site {name!r} must have shape (*batch, {', '.join(map(str, shape))}), got {tuple(found)}. "
                    "Values are unconstrained, with chains first."
                )
            batches.add(found[:split])
        if len(batches) != 1:
            raise ValueError(
                f"All sites must share their leading dimensions, got {sorted(map(tuple, batches))}. Expand them."
            )
        return batches.pop()


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
        except NotImplementedError:  # cannot be sampled, or has a support that the strategy does not know
            return fn.sample() if can_sample(fn) else self.uniform(site)

    def uniform(self, site: Site) -> Tensor:
        """A start drawn in unconstrained space, from the support and the shape alone."""
        fn = site["fn"]
        transform = bijection(site["name"], fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        return transform(self.like.new_empty(shape).uniform_(-2, 2))


@dataclass
class Prototype:
    r"""A model's latents, read off one chain's run.

    Attributes:
        runs: The model with its arguments and the places of its sites' dimensions.
        start: Init strategy of one site.
        packing: Layout of the unconstrained continuous latents.
        transforms: Pyro's convention: ``transforms[name].inv`` maps unconstrained to constrained.
        enumerated: Shape of each discrete latent.
        deterministic: Shape of each ``pyro.deterministic`` site.
        improper: Latents that cannot be sampled from their prior.
        max_plate_nesting: Number of plate dimensions, counted from the right.
        gaps: Entries that an ``obs_mask`` leaves open.
    """

    runs: ModelRuns
    start: Start
    packing: Packing
    transforms: dict[str, Transform]
    enumerated: dict[str, torch.Size]
    deterministic: dict[str, torch.Size]
    improper: tuple[str, ...]
    max_plate_nesting: int
    gaps: Gaps = field(default_factory=Gaps)

    def trace(self) -> poutine.Trace:
        """One run with latents by the init strategy."""
        return run(self.runs.model, self.runs.args, self.runs.kwargs, self.start)

    def draw(self) -> Tensor:
        """One start of the init strategy, unconstrained. Shape ``(dim,)``."""
        return self.unconstrained(self.trace())

    def unconstrained(self, trace: poutine.Trace) -> Tensor:
        """The latents of a run. Shape ``(dim,)``."""
        return self.packing.pack({name: t(trace.nodes[name]["value"].detach()) for name, t in self.transforms.items()})

    def pack(self, params: dict[str, Tensor]) -> Tensor:
        """``{site: (*batch, *shape)}``, unconstrained, to ``(*batch, dim)``; a site with fixed entries may be whole."""
        return self.packing.pack({name: self._free_entries(name, torch.as_tensor(u)) for name, u in params.items()})

    def _free_entries(self, name: str, u: Tensor) -> Tensor:
        transform, own = self.transforms.get(name), self.packing.shapes.get(name)
        if not isinstance(transform, FreeEntries) or u.shape[-len(own or ()) :] == own:
            return u
        whole = (*transform.batch, *transform.event)
        return transform.select(u) if u.shape[u.dim() - len(whole) :] == whole else u


def prototype(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    init_strategy: Callable[..., Any] | None = None,
    max_plate_nesting: int | None = None,
    transforms: dict[str, Transform] | None = None,
    empty: bool = False,
    like: Prototype | None = None,
) -> Prototype:
    r"""Run ``model`` once and read off what the batched log joint needs; refuse what cannot be served.

    With ``empty`` a model without continuous latents is served too. ``like`` is the prototype of a model with the same
    latents, whose vector, transforms and masked entries are taken over: ``model`` is then its own with other effects.

    Raises:
        NotImplementedError: Subsampled plate, discrete site that cannot be enumerated in parallel, support without a
            bijection, support that depends on another latent.
        ValueError: No continuous latent site, NaN in an observed site, unknown names in ``transforms``.
    """
    start = Start(init_strategy, like=first_float(args, kwargs))
    if like is None:
        model, gaps, trace = closed(model, args, kwargs, start)
    else:
        gaps, transforms, trace = like.gaps, like.transforms, run(model, args, kwargs, start)
    refuse_subsampling(trace)
    refuse_nan_data(trace)
    discrete = {name: site for name, site in latents(trace) if is_discrete(site["fn"])}
    continuous = {name: site for name, site in latents(trace) if not is_discrete(site["fn"])}
    for name, site in discrete.items():
        refuse_unenumerable(name, site)
    if not continuous and not (empty and has_samples(trace)):
        found = f"only discrete ones, {list(discrete)}" if discrete else "none"
        advice = "Leave out obs= where a value is unknown."
        if not has_samples(trace):
            advice = (
                "It has no pyro.sample at all. If it gives minus the log density of a dict of tensors, hand it to a "
                "kernel by potential_fn=."
            )
        raise ValueError(f"The model must have a continuous latent site, got {found}. {advice}")
    chosen = complete(transforms, continuous)
    own = {name: transform for name, transform in chosen.items() if name not in (transforms or {})}
    for _ in range(MOVES):  # at random points, whatever the user's starts are
        refuse_moving_supports(own, run(model, args, kwargs, Start(like=start.like)))
    if like is None:
        chosen = {name: FreeEntries(t, gaps.latent[name]) if name in gaps.latent else t for name, t in chosen.items()}
    return Prototype(
        runs=ModelRuns.of(trace, model, args, kwargs, max_plate_nesting),
        start=start,
        packing=Packing.like({name: chosen[name](site["value"].detach()) for name, site in continuous.items()}),
        transforms=chosen,
        enumerated={name: site["value"].shape for name, site in discrete.items()},
        deterministic={name: site["value"].shape for name, site in trace.nodes.items() if is_deterministic(site)},
        improper=tuple(name for name, site in sorted(continuous.items()) if not can_sample(site["fn"])),
        max_plate_nesting=plate_nesting(trace) if max_plate_nesting is None else max_plate_nesting,
        gaps=gaps,
    )


def closed(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], start: Start
) -> tuple[Callable[..., Any], Gaps, poutine.Trace]:
    """The model without latents where masks leave none; what they leave open; and a run of that model."""

    def total(values: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False), poutine.block():
            return poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs).log_prob_sum()

    def draw() -> poutine.Trace:
        return run(model, args, kwargs, start)

    trace = draw()
    split = find_gaps(trace)
    gaps = with_unused(split, trace, draw, total)
    if not gaps.latent and not gaps.data:
        return model, gaps, trace
    again = run(gaps.close(model), args, kwargs, start)
    refuse_moving_masks(split, find_gaps(again))
    return gaps.close(model), gaps, again


def refuse_moving_masks(gaps: Gaps, others: Gaps) -> None:
    """Which entries are latents must be known."""
    for name in gaps.partial:
        other = others.latent.get(name)
        if other is None or not torch.equal(gaps.latent[name].free, other.free):
            raise NotImplementedError(
                f"Site {name!r} must have the same obs_mask at every run, got two. Make the mask of the data alone."
            )


def has_samples(trace: poutine.Trace) -> bool:
    """Whether a model has any random variable, latent or observed."""
    return any(is_sample(site) and not is_deterministic(site) for site in trace.nodes.values())


def run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], start: Start) -> poutine.Trace:
    """Trace of one run with latents drawn by ``start``, discrete ones sampled."""

    def once() -> poutine.Trace:
        with torch.no_grad(), pyro.validation_enabled(False), poutine.block(), quiet_draws():
            return poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)

    return persist(once)


def persist(fn: Callable[[], Any]) -> Any:
    """``fn()``, tried again while it draws a matrix that cannot be factored."""
    for _ in range(MAX_TRIES - 1):
        try:
            return fn()
        except torch.linalg.LinAlgError:
            continue
    return fn()


def first_float(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor of floats among a model's arguments: dtype and device of sites that have none of their own."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return next(tensors, None)


def complete(transforms: dict[str, Transform] | None, sites: dict[str, Site]) -> dict[str, Transform]:
    """The user's transforms, and ``biject_to(support).inv`` for the sites that he left out; sorted by name."""
    given = {} if transforms is None else transforms
    unknown = sorted(given.keys() - sites.keys())
    if unknown:
        raise ValueError(f"transforms must name continuous latent sites, got {unknown}; the model has {sorted(sites)}.")
    return {name: given[name] if name in given else bijection(name, sites[name]["fn"]).inv for name in sorted(sites)}
