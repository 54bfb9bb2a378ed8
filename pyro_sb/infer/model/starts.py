"""Starts of chains: points where a log joint and its gradient are finite, and what to say where there are none."""

from collections.abc import Callable, Iterator
from itertools import islice

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_sample, init_to_uniform
from torch import Tensor

from pyro_sb.infer.model.prototype import MAX_TRIES, Packing, Prototype, Start, run
from pyro_sb.infer.model.runs import Row, Wanted
from pyro_sb.infer.model.sites import quiet_draws

__all__ = ["candidate_starts", "explain_no_start", "finite_starts", "given_starts", "gather_starts"]

ROUNDS = 8  # of starts of one kind, before others are tried
JITTERS = (1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 0.0)  # of known starts that are repeated, as shares of 1 + |z|
RADIUS = 2.0  # of starts, in unconstrained space, as Pyro's and Stan's
RADII = (0.1, 5.0, 10.0, 30.0)  # where those fail
PRIOR_DRAWS = (64, 512, 4096)  # looked through for a start, as long as there is none

Finite = Callable[[Iterator[Tensor]], Tensor]


def gather_starts(
    num: int, packing: Packing, prototype: Prototype | None, finite: Finite, known: Tensor | None
) -> Tensor:
    r"""Starts where log joint and gradient are finite: the model's own, and where too few of those are, others.

    Args:
        num: How many.
        packing: Layout of the vector.
        prototype: The model; None for a ``potential_fn``.
        finite: Those candidates where both are finite. Shape ``(n, dim)``.
        known: Points where they are. Shape ``(m, dim)``.

    Returns:
        Shape ``(num, dim)``.
    """
    kept = packing.rows([])
    for starts, enough in kinds_of_starts(num, packing, prototype):
        for _ in range(ROUNDS):
            if len(kept) >= enough:
                break
            found = finite(islice(starts, num - len(kept)))
            kept = torch.cat([kept, found])
            if not len(found):
                break
    if len(kept) == num:
        return kept
    return torch.cat(
        [kept, near_starts(num - len(kept), packing.rows([kept, *([] if known is None else [known])]), finite)]
    )


def kinds_of_starts(num: int, packing: Packing, prototype: Prototype | None) -> list[tuple[Iterator[Tensor], int]]:
    """Kinds of starts in the order in which they are tried, and how many need no more of the kind."""
    wide = wide_starts(packing), 1 + num // 8
    if prototype is None:
        return [(uniform_starts(packing), num), wide]
    return [(model_starts(prototype), num), (possible_starts(prototype), num), wide]


def near_starts(num: int, known: Tensor, finite: Finite) -> Tensor:
    """Starts beside those that are known to be finite, the closer the rarer they are."""
    if not len(known):
        raise ValueError(
            "The log joint and its gradient must be finite at some start, got none. Pass init_strategy or "
            "initial_params inside the support."
        )
    kept = known[:0]
    for jitter in JITTERS:
        z = known[torch.randint(len(known), (num - len(kept),), device=known.device)]
        z = z + jitter * (1 + z.abs()) * torch.randn_like(z)
        kept = torch.cat([kept, z if jitter == 0.0 else finite(iter(z))])
    return kept


def given_starts(points: Tensor | None, packing: Packing) -> list[Tensor]:
    """The user's points, as many as are tried; those of a wrong length are refused where they are used."""
    if points is None or points.dim() != 2 or points.shape[1] != packing.dim:
        return []
    return list(points[:MAX_TRIES].detach().to(packing.device, packing.dtype))


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


def candidate_starts(packing: Packing, prototype: Prototype | None) -> Iterator[Tensor]:
    """Where a finite log joint is looked for: by the init strategy, in the prior, then far and wide."""
    for starts, _ in kinds_of_starts(MAX_TRIES, packing, prototype):
        yield from islice(starts, MAX_TRIES)


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
