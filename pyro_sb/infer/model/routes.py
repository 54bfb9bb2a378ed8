r"""Routes to a batched log joint, ``(C, dim)`` to ``(C,)``, and the single row's log joint that they must agree with.

- :class:`Plate`: one run of the model with the rows as an outermost batch dimension. Fastest; asks that the model's
  own tensor code broadcasts from the left.
- :class:`Vmap`: ``torch.func.vmap`` over a single row's run. Semantically safe, a little slower.
- :class:`Loop`: a single row's log joint, row after row. Always right, slow.

Models with discrete latents have their own two batched routes, in ``enumeration``; which one serves is decided in
``agreement``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_sb.infer.model.agreement import precision, vmapped
from pyro_sb.infer.model.prototype import Packing, Prototype
from pyro_sb.infer.model.runs import ModelRuns, Row

__all__ = [
    "Batched",
    "InFloat64",
    "Loop",
    "ModelPotential",
    "Plate",
    "Single",
    "SingleRow",
    "Size",
    "UserPotential",
    "Vmap",
    "as_density",
    "constrain",
    "default_float64",
    "doubled",
    "evaluate",
    "evaluate_all",
    "in_double",
    "in_float64",
    "value_and_grad",
]

Density = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor], tuple[Row, Tensor]]
Potential = Callable[[dict[str, Tensor]], Tensor]


class Batched:
    """A function that is batched already."""

    name = "batched"

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return self.fn(z)


class Plate:
    r"""One run of the model on all rows: each site's value has shape ``(C, 1, ..., 1, *batch, *event)``.

    Args:
        runs: The model; every latent is among the rows' values.
        unpack: From vectors ``(*, dim)`` to rows, and the log Jacobian of the map.
    """

    name = "plate"

    def __init__(self, runs: ModelRuns, unpack: Unpack) -> None:
        self.runs, self.unpack = runs, unpack
        self.looks_at = runs.looks_at

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        rows, total = self.unpack(z)
        for term in self.runs.terms(self.runs.widened(rows)):
            total = total + self.runs.by_row(term)
        return total.expand(len(z))


class Size(NamedTuple):
    r"""How a log joint is rounded at a row: :math:`\sum |\text{terms}|` of it, and their coarsest epsilon."""

    total: float
    eps: float


class Single(Protocol):
    """A single row's log density."""

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""

    def size(self, z: Tensor) -> Size:
        """How it is rounded at ``z``."""


class SingleRow:
    """Log joint of one row by our own run of the model, free of what vmap cannot do.

    Args:
        runs: As of `Plate`.
        unpack: As of `Plate`.
        enumeration: Marks the model's discrete sites for `size`, if it has any: they are no part of a row.
    """

    def __init__(self, runs: ModelRuns, unpack: Unpack, enumeration: Callable[[Any], Any] | None = None) -> None:
        self.runs, self.unpack, self.enumeration = runs, unpack, enumeration
        self.looks_at = runs.looks_at

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        row, log_det = self.unpack(z)
        return sum((term.sum() for term in self.runs.terms(row)), log_det)

    def size(self, z: Tensor) -> Size:
        """How it is rounded at ``z``; refuses a run with other sites than the first."""
        with torch.no_grad():
            row, log_det = self.unpack(z)
            model = None if self.enumeration is None else self.enumeration(self.runs.model)
            terms = [log_det, *self.runs.terms(row, model)]
        total = sum(float(term[torch.isfinite(term)].abs().sum()) for term in terms)
        return Size(total, precision(*(x.dtype for x in (*row.values.values(), *terms))))


class Vmap:
    """``torch.func.vmap`` of a single row's log density."""

    name = "vmap"

    def __init__(self, density: Density) -> None:
        self.density = density
        if hasattr(density, "looks_at"):
            self.looks_at = density.looks_at

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        values: Tensor = vmapped(self.density, z)
        return values


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
        first_dim = -prototype.max_plate_nesting - 1
        enumeration = partial(enumerated, first_dim) if prototype.enumerated else None
        self.size = SingleRow(runs, partial(constrain, prototype), enumeration).size
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


def enumerated(first_dim: int, model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its discrete sites enumerated."""
    return poutine.enum(config_enumerate(model), first_available_dim=first_dim)


class UserPotential:
    """Log joint of one chain by the user's ``potential_fn``."""

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential, self.packing = potential, packing
        self.looks_at = (potential,)

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        value = torch.as_tensor(self.potential(self.packing.unpack(z)))
        if value.numel() != 1:
            raise ValueError(f"potential_fn must return one number for one chain, got shape {tuple(value.shape)}.")
        return -value.reshape(())

    def size(self, z: Tensor) -> Size:
        """How it is rounded at ``z``: its terms are not known, but their sum."""
        with torch.no_grad():
            value = self(z)
        return Size(float(value.abs()), precision(value.dtype, *self.packing.dtypes.values()))


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


def evaluate_all(density: Density, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Values and, if asked, gradients; an error where a row's matrix cannot be factored."""
    with pyro.validation_enabled(False):
        if gradient:
            return value_and_grad(density, z)
        with torch.no_grad():
            return density(z), torch.empty_like(z)


def evaluate(density: Density, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Values and, if asked, gradients; a row whose matrix cannot be factored gets NaN and spoils no other."""
    try:
        return evaluate_all(density, z, gradient)
    except torch.linalg.LinAlgError:
        if len(z) == 1:
            return z.new_full((1,), torch.nan), torch.zeros_like(z)
        halves = [evaluate(density, half, gradient) for half in z.tensor_split(2)]
        return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])


class InFloat64:
    """A density in float64, whose model makes its constants in float64 too."""

    def __init__(self, density: Any) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        """As the density's."""
        with default_float64():
            value: Tensor = self.density(z)
            return value

    def size(self, z: Tensor) -> Size:
        """As the density's."""
        with default_float64():
            size: Size = self.density.size(z)
            return size


@contextmanager
def default_float64() -> Iterator[None]:
    """Constants are made in float64 meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64(prototype: Prototype) -> Prototype:
    """The same model with its floating point arguments and latents in float64."""
    runs = replace(prototype.runs, args=doubled(prototype.runs.args), kwargs=doubled(prototype.runs.kwargs))
    return replace(prototype, runs=runs, packing=in_double(prototype.packing))


def in_double(packing: Packing) -> Packing:
    """The same layout with its floating point numbers in float64."""
    dtypes = {name: torch.float64 if dtype.is_floating_point else dtype for name, dtype in packing.dtypes.items()}
    return replace(packing, dtypes=dtypes)


def doubled(value: Any) -> Any:
    """Floating point tensors, and those in lists, tuples and dicts, in float64; all else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(doubled, value))
    return value
