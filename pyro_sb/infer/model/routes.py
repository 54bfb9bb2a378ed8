r"""Routes to a batched log joint, ``(C, dim)`` to ``(C,)``, and their test against a single row's log joint.

- :class:`Plate`: one run of the model with the rows as an outermost batch dimension. Fastest; asks that the model's
  own tensor code broadcasts from the left.
- :class:`Vmap`: ``torch.func.vmap`` over a single row's run. Semantically safe, a little slower.
- :class:`Loop`: a single row's log joint, row after row. Always right, slow.

The first that agrees with the single row's log joint is taken (:class:`CheckedDensity`). Models with discrete latents
have their own two batched routes, in ``enumeration``.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_sb.infer.model.packing import Packing
from pyro_sb.infer.model.prototype import MAX_TRIES, Prototype
from pyro_sb.infer.model.runs import ModelRuns, Row, close
from pyro_sb.threads import Pace

__all__ = [
    "CheckedDensity",
    "Loop",
    "ModelPotential",
    "Oracle",
    "Plate",
    "SingleRow",
    "UserPotential",
    "Vmap",
    "as_density",
    "constrain",
    "find_oracle",
    "value_and_grad",
]

logger = logging.getLogger(__name__)
Density = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor], tuple[Row, Tensor]]
Potential = Callable[[dict[str, Tensor]], Tensor]
Route = Any  # an object with a `name` that maps (C, dim) to (C,)
# accidental broadcasting depends on the batch size: 1 hides it, a coincidence with one size shows at another
BATCH_SIZES = (1, 2, 3, 5)
NUM_POINTS = 4
NATS = 1e-3  # by which a batched log joint may differ from a single one, beyond rounding


class Plate:
    r"""One run of the model on all rows: each site's value has shape ``(C, 1, ..., 1, *batch, *event)``.

    Args:
        runs: The model; every latent is among the rows' values.
        unpack: From vectors ``(*, dim)`` to rows, and the log Jacobian of the map.
    """

    name = "plate"

    def __init__(self, runs: ModelRuns, unpack: Unpack) -> None:
        self.runs, self.unpack = runs, unpack

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        rows, total = self.unpack(z)
        for term in self.runs.terms(self.runs.widened(rows)):
            total = total + self.runs.by_row(term)
        return total.expand(len(z))


class SingleRow:
    """Log joint of one row by our own run of the model, free of what vmap cannot do; arguments as of `Plate`."""

    def __init__(self, runs: ModelRuns, unpack: Unpack) -> None:
        self.runs, self.unpack = runs, unpack

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        row, log_det = self.unpack(z)
        return sum((term.sum() for term in self.runs.terms(row)), log_det)


class Vmap:
    """``torch.func.vmap`` of a single row's log density."""

    name = "vmap"

    def __init__(self, density: Density) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return torch.func.vmap(self.density)(z)


class Loop:
    """A single row's log density, row after row."""

    name = "loop"

    def __init__(self, density: Density) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return torch.stack([self.density(row) for row in z.unbind()]) if len(z) else z.new_zeros(0)


class ModelPotential:
    """Log joint of one chain by Pyro's own potential: the oracle that the batched routes must agree with."""

    def __init__(self, prototype: Prototype) -> None:
        self.packing, runs = prototype.packing, prototype.runs
        _, self.potential, _, _ = initialize_model(
            runs.model,
            runs.args,
            runs.kwargs,
            transforms=prototype.transforms,
            max_plate_nesting=prototype.max_plate_nesting,
            init_strategy=prototype.start,
            initial_params={},  # anything but None: we search for valid starts ourselves
        )

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        return -self.potential(self.packing.unpack(z))


class UserPotential:
    """Log joint of one chain by the user's ``potential_fn``."""

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential, self.packing = potential, packing

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        value = torch.as_tensor(self.potential(self.packing.unpack(z)))
        if value.numel() != 1:
            raise ValueError(f"potential_fn must return one number for one chain, got shape {tuple(value.shape)}.")
        return -value.reshape(())


def constrain(prototype: Prototype, z: Tensor) -> tuple[Row, Tensor]:
    r"""Rows of constrained latents, and the log Jacobian of the map.

    Args:
        prototype: The model's sites.
        z: Unconstrained vectors. Shape ``(*batch, dim)``.

    Returns:
        Values ``{name: (*batch, *shape)}`` and :math:`\log |\partial x / \partial z|`, shape ``(*batch,)`` or ``()``.
    """
    values, log_det = prototype.packing.unpack(z), z.new_zeros(())
    for name, transform in prototype.transforms.items():
        if is_identity(transform):
            continue
        u = values[name]
        x = values[name] = transform.inv(u)
        term = transform.log_abs_det_jacobian(x, u)
        log_det = log_det - term.reshape(*z.shape[:-1], -1).sum(-1)
    return Row(values), log_det


def is_identity(transform: Transform) -> bool:
    """Whether ``transform`` is ``biject_to(real).inv``, whose log Jacobian is 0."""
    inner = transform.inv
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    return isinstance(inner, ComposeTransform) and not inner.parts


def value_and_grad(density: Density, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value of ``density`` and its gradient at ``z``; zeros where it does not depend on ``z``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = density(z)
        if not value.requires_grad:
            return value, torch.zeros_like(z)
        (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    return value.detach(), torch.zeros_like(z) if grad is None else grad


def as_density(value: Tensor) -> Tensor:
    """Not finite becomes ``-inf``."""
    return torch.where(torch.isfinite(value), value, -torch.inf)


@dataclass
class Oracle:
    r"""The single row's log joint with a few points where it and its gradient are known and finite.

    Attributes:
        density: ``(dim,)`` to ``()``.
        points: Shape ``(P, dim)``; ``values`` ``(P,)`` and ``grads`` ``(P, dim)`` belong to them.
    """

    density: Density
    points: Tensor
    values: Tensor
    grads: Tensor

    def objection(self, route: Density) -> str | None:
        """Why ``route`` cannot be used; None if it agrees in value and gradient for several batch sizes."""
        for size in BATCH_SIZES:
            rows = torch.arange(size) % len(self.points)
            try:
                value, grad = value_and_grad(route, self.points[rows])
            except Exception as error:  # whatever the user's model raises when it meets a batch
                return f"{type(error).__name__}: {first_line(error)}"
            if value.shape != (size,):
                return f"values of shape {tuple(value.shape)} for {size} chains"
            if not self.same(value, self.values[rows]):
                return f"wrong values for {size} chains"
            known = self.grads[rows]
            if not close(grad, known, floor=torch.inf, scale=known.abs().amax(-1, keepdim=True)):
                return f"wrong gradients for {size} chains"
        return None

    def confirms(self, z: Tensor, value: Tensor) -> bool:
        """Whether ``value`` at one row of ``z`` is right; rows that are not finite cannot tell and are left alone."""
        finite = torch.isfinite(value).nonzero()
        if not len(finite):
            return True
        row = int(finite[-1])
        try:
            with torch.no_grad():
                return self.same(value[row], self.density(z[row]))
        except torch.linalg.LinAlgError:  # on the edge of what can be factored, which a batch may do and one row not
            return True

    @staticmethod
    def same(value: Tensor, known: Tensor) -> bool:
        """Whether log joints are equal up to :data:`NATS` and the rounding of numbers of their size."""
        return close(value, known, floor=NATS, scale=known.abs().amax())


def find_oracle(density: Density, starts: Iterator[Tensor]) -> Oracle | None:
    """Collect points with a finite log joint and gradient from ``starts``; None if there is none."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _, z in zip(range(MAX_TRIES), starts, strict=False):
        try:
            value, grad = value_and_grad(density, z)
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(value) and torch.isfinite(grad).all():
            found.append((z, value, grad))
        if len(found) == NUM_POINTS:
            break
    return Oracle(density, *map(torch.stack, zip(*found, strict=True))) if found else None


class CheckedDensity:
    r"""A batched density that may change its route, never its values.

    The first of ``routes`` that agrees with the oracle at several batch sizes is used. A plate of chains can still go
    wrong in silence where the number of chains equals another size of the model, so each new batch size is checked on
    one row.

    Args:
        routes: Fastest first; a loop, which is taken to be right, last.
        oracle: The single chain's density at a few points; None to trust the first route.
    """

    def __init__(self, routes: list[Route], oracle: Oracle | None) -> None:
        self.routes = routes
        self.oracle = oracle
        self.objections: list[str] = []
        self.sizes_checked: set[int] = set()
        self.pace = Pace()
        self._settle()

    @property
    def route(self) -> str:
        """Name of the route in use."""
        return self.routes[0].name

    def __call__(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and, if asked, gradients ``(C, dim)``, as the route in use gives them, NaN included."""
        if not len(z):
            return z.new_zeros(0), torch.zeros_like(z)
        with self.pace.call(len(z), kind=gradient, device=z.device):
            value, grad = self._attempt(z, gradient)
        if self.route != "plate" or len(z) in self.sizes_checked:
            return value, grad
        if self._confirmed(z, value):
            self.sizes_checked.add(len(z))
            return value, grad
        self._demote(f"wrong values for {len(z)} chains")
        return self(z, gradient)

    def _attempt(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """One call of the route; a row whose matrix cannot be factored gets NaN and does not spoil its neighbours."""
        try:
            with pyro.validation_enabled(False):
                if gradient:
                    return value_and_grad(self.routes[0], z)
                with torch.no_grad():
                    return self.routes[0](z), torch.empty_like(z)
        except torch.linalg.LinAlgError:
            if len(z) == 1:
                return z.new_full((1,), torch.nan), torch.zeros_like(z)
            halves = [self._attempt(half, gradient) for half in z.tensor_split(2)]
            return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])

    def _confirmed(self, z: Tensor, value: Tensor) -> bool:
        """Whether the single chain agrees: a batch size that equals a data size can broadcast in silence."""
        if self.oracle is None:
            return True
        if len(z) > 1 and bool((z == z[0]).all()):  # equal rows hide mixed-up chains, so spread them
            z = z + torch.linspace(-0.05, 0.05, len(z), dtype=z.dtype, device=z.device)[:, None]
            value, _ = self._attempt(z, gradient=False)
        with pyro.validation_enabled(False):
            return self.oracle.confirms(z, value)

    def _demote(self, objection: str) -> None:
        """Drop the route in use for the next one that agrees with the single chain; the loop always does."""
        self.objections.append(f"{self.routes.pop(0).name}: {objection}")
        self._settle()

    def _settle(self) -> None:
        """Make the first route that agrees with the oracle the one in use, and warn if only the loop is left."""
        while self.route != "loop" and self.oracle is not None:
            with pyro.validation_enabled(False):
                objection = self.oracle.objection(self.routes[0])
            if objection is None:
                logger.info("log joint by route %r (%s)", self.route, "; ".join(self.objections) or "first choice")
                return
            self.objections.append(f"{self.routes.pop(0).name}: {objection}")
        if self.route == "loop":
            warnings.warn(
                "Chains are evaluated one by one, which is slow: no batched route agrees with the single chain "
                f"({'; '.join(self.objections)}). Write the model so that batches of chains can pass: dim=-1 in sums, "
                "Vindex for indices, torch.where for Python's if, no .item().",
                RuntimeWarning,
                stacklevel=4,
            )


def first_line(error: Exception) -> str:
    """The beginning of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0][:200]
