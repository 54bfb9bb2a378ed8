"""A Pyro model as its first run shows it: the layout of its latents, their transforms, and where chains may start."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample, init_to_uniform
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.model.imputation import FreeEntries, Gaps, find_gaps, with_unused
from pyro_sb.infer.model.packing import Packing
from pyro_sb.infer.model.runs import ModelRuns, Row, Wanted
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

__all__ = [
    "MAX_TRIES",
    "Prototype",
    "Start",
    "candidate_starts",
    "closed",
    "explain_no_start",
    "finite_starts",
    "model_starts",
    "persist",
    "possible_starts",
    "prototype",
    "uniform_starts",
    "wide_starts",
]

MAX_TRIES = 100  # runs or starts before we give up, as in Pyro
MOVES = 3  # random runs that are looked at for supports that move
RADIUS = 2.0  # of starts, in unconstrained space, as Pyro's and Stan's
RADII = (0.1, 5.0, 10.0, 30.0)  # where those fail
PRIOR_DRAWS = (64, 512, 4096)  # looked through for a start, as long as there is none


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


def uniform_starts(packing: Packing, radius: float = RADIUS) -> Iterator[Tensor]:
    """Points uniform on (-radius, radius), for ever. Shape ``(dim,)`` each."""
    while True:
        yield torch.empty(packing.dim, dtype=packing.dtype, device=packing.device).uniform_(-radius, radius)


def wide_starts(packing: Packing) -> Iterator[Tensor]:
    """Points of cubes of several sizes in turn, for ever. Shape ``(dim,)`` each."""
    cubes = [uniform_starts(packing, radius) for radius in RADII]
    while True:
        yield from map(next, cubes)


def possible_starts(prototype: Prototype) -> Iterator[Tensor]:
    """Draws of the prior under which every site's density is positive, from ever more draws. Shape ``(dim,)`` each.

    Improper sites are uniform on (-2, 2), unconstrained.
    """
    if not prototype.packing.dim:
        return
    if prototype.improper:
        yield from drawn_one_by_one(prototype, sum(PRIOR_DRAWS[:2]))
        return
    wanted = Wanted(list(prototype.transforms), list(prototype.runs.batch_shapes))
    for num in PRIOR_DRAWS:
        try:
            with quiet_draws():
                found = prototype.runs.at(Row({}), num, wanted, routes=("vmap", "loop"), checked=())
        except (NotImplementedError, ValueError, RuntimeError):  # a prior that cannot be drawn
            return
        total = sum(x.reshape(num, -1).sum(-1) for x in found.log_probs.values())
        rows = torch.isfinite(torch.as_tensor(total).expand(num)).nonzero()[:, 0]
        if not len(rows):
            continue
        yield from prototype.packing.pack({k: t(found.values[k][rows]) for k, t in prototype.transforms.items()})


def drawn_one_by_one(prototype: Prototype, num: int) -> Iterator[Tensor]:
    """Those of ``num`` runs, with latents from their priors where there are any, that have a positive density."""
    runs, start = prototype.runs, Start(init_to_sample, like=prototype.start.like)
    for _ in range(num):
        trace = run(runs.model, runs.args, runs.kwargs, start)
        with torch.no_grad(), pyro.validation_enabled(False):
            if bool(torch.isfinite(torch.as_tensor(trace.log_prob_sum()))):
                yield prototype.unconstrained(trace)


def candidate_starts(prototype: Prototype) -> Iterator[Tensor]:
    """Where a finite log joint is looked for: by the init strategy, in the prior, then far and wide."""
    yield from islice(model_starts(prototype), MAX_TRIES)
    yield from islice(possible_starts(prototype), MAX_TRIES)
    yield from islice(wide_starts(prototype.packing), MAX_TRIES)


def model_starts(prototype: Prototype) -> Iterator[Tensor]:
    """Draws of the user's init strategy, for ever; uniform on (-2, 2) if he gave none. Shape ``(dim,)`` each."""
    if prototype.start.strategy is init_to_uniform:
        yield from uniform_starts(prototype.packing)
    while True:
        yield prototype.draw()


def finite_starts(density: Callable[[Tensor], Tensor], candidates: Iterator[Tensor]) -> Iterator[Tensor]:
    """Those candidates where a single row's log density is finite."""
    for z in candidates:
        try:
            with torch.no_grad():
                found = bool(torch.isfinite(density(z)))
        except torch.linalg.LinAlgError:
            continue
        if found:
            yield z


def explain_no_start(prototype: Prototype) -> str:
    """Error message with the sites that keep the log joint from being finite, read off one run of the model."""
    trace = prototype.trace()
    with torch.no_grad(), pyro.validation_enabled(False):
        trace.compute_log_prob()
    bad = [
        f"{'observed' if site['is_observed'] else 'latent'} site {name!r} (log density {float(site['log_prob_sum']):g})"
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not torch.isfinite(torch.as_tensor(site["log_prob_sum"]))
    ]
    culprits = ", ".join(bad) if bad else "no single site in the last run; perhaps the gradient"
    return (
        f"The log joint and its gradient must be finite at some start, got none among {MAX_TRIES} by the init "
        f"strategy, {sum(PRIOR_DRAWS)} draws of the prior (if it can be drawn) and {MAX_TRIES} far and wide. Not "
        f"finite: {culprits}. Check the data for NaN and infinity and the parameters for their range, or pass "
        "init_strategy or initial_params (start=) inside the support."
    )
