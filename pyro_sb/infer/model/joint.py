r"""A batched density by the fastest route that agrees with a single row's log density at random points, and later on.

What is compared, and how closely, is said in ``agreement``. The comparison is made in float64 wherever the model runs
in it, so that rounding hides nothing; a model whose own tensors keep it in float32 is compared in its own precision.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sb.infer.model.agreement import NATS, ROUNDING, SLOPE, STILL, Runner, disagreement, precision, same
from pyro_sb.infer.model.enumeration import EnumeratedPlate, EnumeratedVmap
from pyro_sb.infer.model.prototype import MAX_TRIES, Packing, Prototype, persist
from pyro_sb.infer.model.routes import (
    Batched,
    InFloat64,
    Loop,
    ModelPotential,
    Plate,
    Potential,
    Single,
    SingleRow,
    Size,
    UserPotential,
    Vmap,
    constrain,
    default_float64,
    evaluate,
    in_double,
    in_float64,
)
from pyro_sb.infer.model.sites import quiet_draws
from pyro_sb.infer.model.starts import candidate_starts, explain_no_start, finite_starts
from pyro_sb.infer.model.traces import Traces

__all__ = ["CheckedDensity", "Known", "Oracle", "find_oracle", "routes_of_model", "routes_of_potential", "with_twins"]

logger = logging.getLogger(__name__)
Density = Callable[[Tensor], Tensor]
Route = Any  # an object with a `name` that maps (C, dim) to (C,)
# accidental broadcasting depends on the batch size: 1 hides it, a coincidence with one size shows at another
BATCH_SIZES = (1, 2, 3, 5)
NUM_POINTS = 6
NUM_STATES = 8  # of the chains, where the log joint is compared after warm-up
NEARBY = (1.0, 0.1, 0.01)  # how far from a start another point is looked for, in unconstrained space
ADVICE = (
    "Chains are evaluated one by one, which is slow: no batched route agrees with the single chain ({reasons}). Write "
    "the model so that batches of chains can pass: dim=-1 in sums, Vindex for indices, torch.where for Python's if, no "
    ".item()."
)


@dataclass(frozen=True)
class Known:
    """Single rows' log joints at some points ``(P, dim)``: values and sizes ``(P,)``, gradients ``(P, dim)``."""

    points: Tensor
    values: Tensor
    grads: Tensor
    sizes: Tensor
    eps: float

    @classmethod
    def at(cls, density: Single, points: Tensor) -> "Known":
        """The rows one by one; NaN where a matrix cannot be factored."""
        rows = [evaluate(single_batch(density), z[None], gradient=True) for z in points]
        values, grads = (torch.cat(column) for column in zip(*rows, strict=True))
        with pyro.validation_enabled(False):
            sizes = [density.size(z) if v.isfinite() else Size(0.0, 0.0) for z, v in zip(points, values, strict=True)]
        return cls(points, values, grads, values.new_tensor([s.total for s in sizes]), max(s.eps for s in sizes))

    def rows(self, which: Any) -> "Known":
        """Some of the points."""
        return Known(self.points[which], self.values[which], self.grads[which], self.sizes[which], self.eps)

    @property
    def finite(self) -> bool:
        """Whether all values and gradients are."""
        return bool(torch.isfinite(self.values).all() and torch.isfinite(self.grads).all())


@dataclass
class Oracle:
    r"""The single row's log joint with a few random points where it and its gradient are known and finite.

    Attributes:
        density: ``(dim,)`` to ``()``.
        known: The points.
        twins: By the name of a route, what is compared in its place: the same route in float64.
    """

    density: Single
    known: Known
    twins: dict[str, Density] = field(default_factory=dict)

    def objection(self, route: Route) -> str | None:
        """Why ``route`` cannot be used; None if it agrees at the points, for several numbers of chains."""
        for num in BATCH_SIZES:
            known = self.known.rows(torch.arange(num, device=self.known.points.device) % len(self.known.points))
            found = self._figures(route, known.points, gradient=True)
            reason = self._compared(route, known.points, found, range(num), known)
            if reason is not None:
                return f"{reason} for {num} chains"
        return None

    def objection_at(self, route: Route, z: Tensor, most: int, *, gradient: bool = False) -> str | None:
        """The same at other states ``(C, dim)``, by up to ``most`` rows; those without a density are left alone."""
        z = z.to(self.known.points)
        found = self._figures(route, z, gradient)
        finite = torch.isfinite(found["values"]).nonzero()[:, 0].flip(0)
        rows = finite[torch.linspace(0, len(finite) - 1, min(most, len(finite)), device=finite.device).long()]
        if not len(rows):
            return None
        known = Known.at(self.density, z[rows])
        there = ~known.values.isnan()  # on the edge of what can be factored, a batch may do it and one row not
        if not there.any():
            return None
        reason = self._compared(route, z, found, rows[there].tolist(), known.rows(there))
        return reason and f"{reason} for {len(z)} chains"

    def _compared(
        self, route: Route, z: Tensor, found: dict[str, Tensor], rows: Sequence[int], known: Known
    ) -> str | None:
        """What speaks against a batch at ``z``, by some of its rows and by one of them among strangers."""
        gradient = "gradients" in found
        far = torch.cdist(self.known.points, z).amin(-1).argmax()
        strangers = self.known.points[far].expand(len(z), -1).clone()
        strangers[rows[-1]] = z[rows[-1]]
        eps = max(known.eps, precision(found["values"].dtype))
        steep = torch.cat([self.known.grads, known.grads]).abs().amax(0)
        return disagreement(
            found,
            {"values": known.values} | ({"gradients": known.grads} if gradient else {}),
            rows,
            self._figures(route, strangers, gradient) if len(z) > 1 else None,
            {"values": NATS + ROUNDING * eps * known.sizes, "gradients": SLOPE + eps**0.5 * steep},
            {"values": STILL * eps * known.sizes[-1], "gradients": STILL * eps * (steep + known.sizes[-1])},
        )

    def _figures(self, route: Route, z: Tensor, gradient: bool) -> dict[str, Tensor]:
        """Figures of a batch, by the route's twin."""
        twin = self.twins[route.name] if route.name in self.twins else route
        value, grad = evaluate(twin, z, gradient)
        if value.shape != z.shape[:1]:
            raise ValueError(f"values of shape {tuple(value.shape)} for {len(z)} chains")
        return {"values": value} | ({"gradients": grad} if gradient else {})


def find_oracle(density: Single, starts: Iterator[Tensor], *, random: bool = False) -> Oracle | None:
    r"""Points with a finite log joint and gradient, from ``starts`` and beside them; None if there is none.

    Args:
        density: Of a single row.
        starts: Points to begin with. Shape ``(dim,)`` each.
        random: Whether they are random. Otherwise they may be special, such as zeros, or one and the same, and every
            other point is a random one near a start.
    """
    found: list[Known] = []
    for _, start in zip(range(MAX_TRIES), starts, strict=False):
        known = Known.at(density, start[None])
        if not known.finite:
            continue
        near = (Known.at(density, (start + radius * torch.randn_like(start))[None]) for radius in NEARBY if not random)
        found += [known, *islice((other for other in near if other.finite), 1)]
        if len(found) >= NUM_POINTS:
            break
    if not found:
        return None
    rows = [(known.points, known.values, known.grads, known.sizes) for known in found]
    points, values, grads, sizes = map(torch.cat, zip(*rows, strict=True))
    return Oracle(density, Known(points, values, grads, sizes, max(known.eps for known in found)))


def single_batch(density: Single) -> Density:
    """The density of a batch of one row."""
    return lambda z: density(z[0])[None]


def refuse_random_density(oracle: Oracle) -> None:
    """A model whose density is random has no log joint that a kernel could target."""
    first = oracle.known.rows(slice(1))
    again = Known.at(oracle.density, first.points)
    if not same(again.values, first.values, NATS + ROUNDING * first.eps * first.sizes):
        raise ValueError(
            f"The log joint must be the same at every run, got {float(first.values):g} and {float(again.values):g} at "
            "one point. Make every random number of the model a sample site, and put networks into eval mode."
        )


class CheckedDensity:
    r"""A batched density that may change its route, never its values.

    A plate of chains can still go wrong in silence where the number of chains equals another size of the model, so
    each new batch size is compared on one row; and all is compared again where the chains stand after warm-up.

    Args:
        routes: Fastest first; a loop, which is taken to be right, last.
        oracle: The single chain's density at a few points; None to trust the first route.
    """

    def __init__(self, routes: Sequence[Route], oracle: Oracle | None) -> None:
        self.routes, self.oracle = {route.name: route for route in routes}, oracle
        self.traces = Traces()
        self.runner = Runner(list(self.routes), self._admission, advice=ADVICE)

    @property
    def route(self) -> str:
        """Name of the route in use."""
        return self.runner.route

    def __call__(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and, if asked, gradients ``(C, dim)``, as the route in use gives them, NaN included."""
        if not len(z):
            return z.new_zeros(0), torch.zeros_like(z)
        found: tuple[Tensor, Tensor] | None = None
        z = z.contiguous()
        while found is None:
            batch = self.traces.batch(self.routes[self.route], z, gradient)
            kind = gradient, batch.tape is not None
            found = self.runner.attempt(
                batch.figures, len(z), lambda name, _: self._objection(name, z), kind=kind, device=z.device
            )
        return self.traces.follow(batch, found)

    def single(self, z: Tensor) -> Tensor:
        """The density of one row ``(1, dim)`` by itself."""
        if self.oracle is None:
            value: Tensor = self.routes[self.route](z)
            return value
        return self.oracle.density(z[0])

    def recheck(self, z: Tensor) -> str | None:
        """Compare values and gradients at states ``(C, dim)``; why routes were dropped there, None if none was."""
        before = len(self.runner.reasons)
        wrong = self.traces.compare(self.routes[self.route], z)
        while self.oracle is not None:
            states = z[:NUM_STATES] if self.route == "loop" else z
            reason = self.oracle.objection_at(self.routes[self.route], states, NUM_STATES, gradient=True)
            if reason is None:
                break
            if len(self.runner.left) == 1:
                raise ValueError(
                    f"The log joint must be the same at every run, got {reason} where they stand. Make every "
                    "random number of the model a sample site."
                )
            self.runner.drop(reason)
        return "; ".join([*([wrong] if wrong else []), *self.runner.reasons[before:]]) or None

    def _admission(self, name: str) -> str | None:
        return None if self.oracle is None else self.oracle.objection(self.routes[name])

    def _objection(self, name: str, z: Tensor) -> str | None:
        return None if self.oracle is None or name != "plate" else self.oracle.objection_at(self.routes[name], z, 1)


def with_twins(oracle: Oracle, build: Callable[[], Sequence[Route]]) -> Oracle:
    """An oracle that compares in float64, where the model runs in it; else the oracle as it is.

    Args:
        oracle: In the model's own precision.
        build: Makes the routes of the same model with float64 arguments, the loop last.
    """
    if oracle.known.eps <= torch.finfo(torch.float64).eps:
        return oracle
    try:
        with default_float64():
            routes = build()
        density = InFloat64(routes[-1].density)
        known = Known.at(density, oracle.known.points.double())
        if known.finite and known.eps <= torch.finfo(torch.float64).eps and resolved(density, known):
            return Oracle(density, known, {route.name: InFloat64(route) for route in routes})
    except Exception as error:  # a model with float32 tensors of its own may not take float64
        logger.info("routes are compared in the model's precision: %s", error)
    return oracle


def resolved(density: Single, known: Known) -> bool:
    r"""Whether a density is computed in float64 throughout: over a step of :math:`10^{-8}` it rises by its slope.

    A part in float32, such as a network, does not see so small a step.
    """
    step = 1e-8 * (1 + known.points.abs())
    with torch.no_grad(), pyro.validation_enabled(False):
        moved = torch.stack([density(z) for z in known.points + step])
    due = (known.grads * step).abs().sum(-1)
    error = (moved - known.values - (known.grads * step).sum(-1)).abs()
    return bool((error <= 0.1 * due + ROUNDING * known.eps * known.sizes).all())


def routes_of_model(sites: Prototype, given: Sequence[Tensor]) -> tuple[list[Route], Oracle | None]:
    """Routes of a model's log joint, chain plate, vmap, and Pyro's own potential in a loop; and what they must meet.

    Args:
        sites: The model, which passed the refusals.
        given: Where a finite log joint is looked for first. Shape ``(dim,)`` each.
    """
    with pyro.validation_enabled(False), quiet_draws():
        density = single_chain(sites)
        if not sites.packing.dim:  # nothing to compare routes at
            return [Batched(lambda z: density(z[0]).expand(len(z)))], None
        starts = chain(given, candidate_starts(sites.packing, sites))
        oracle = find_oracle(density, finite_starts(density, starts))
        if oracle is None:
            raise ValueError(explain_no_start(sites))
        refuse_random_density(oracle)
        oracle = with_twins(oracle, lambda: model_routes(in_float64(sites), ModelPotential))
    return model_routes(sites, lambda _: density), oracle


def routes_of_potential(
    potential_fn: Potential, packing: Packing, given: Sequence[Tensor]
) -> tuple[list[Route], Oracle]:
    """Routes of a user's single-chain potential, vmap and a loop; and what they must meet, as of `routes_of_model`."""
    density = UserPotential(potential_fn, packing)
    with pyro.validation_enabled(False):
        starts = chain(given, candidate_starts(packing, None))
        oracle = find_oracle(density, finite_starts(density, starts))
    if oracle is None:
        raise ValueError(
            f"potential_fn and its gradient must be finite at some start, got none in {MAX_TRIES} tries. Pass "
            "initial_params where it is finite."
        )
    oracle = with_twins(oracle, lambda: potential_routes(UserPotential(potential_fn, in_double(packing))))
    return potential_routes(density), oracle


def potential_routes(density: UserPotential) -> list[Route]:
    """Of a function of one chain."""
    return [Vmap(density), Loop(density)]


def model_routes(sites: Prototype, density: Callable[[Prototype], ModelPotential]) -> list[Route]:
    """Of a model, with Pyro's own potential in the loop."""
    unpack = partial(constrain, sites)
    batched: list[Route] = [Plate(sites.runs, unpack), Vmap(SingleRow(sites.runs, unpack))]
    if sites.enumerated:
        batched = [EnumeratedPlate(sites), EnumeratedVmap(sites)]
    return [*batched, Loop(density(sites))]


def single_chain(sites: Prototype) -> ModelPotential:
    """Pyro's own potential; it cannot enumerate every distribution that says it can."""
    try:
        return persist(partial(ModelPotential, sites))
    except NotImplementedError as error:
        names = list(sites.enumerated)
        raise NotImplementedError(
            f"Discrete sites must be enumerable, got {names}, of which Pyro says: {error}"
        ) from error
