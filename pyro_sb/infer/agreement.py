"""Which route is right: value and gradient compared with the single chain's, at points where both are finite."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.infer.prototype import MAX_TRIES

__all__ = ["Oracle", "close", "find_oracle", "value_and_grad"]

Density = Callable[[Tensor], Tensor]
# accidental broadcasting depends on the batch size: 1 hides it, a coincidence with one size shows at another
BATCH_SIZES = (1, 2, 3, 5)
NUM_POINTS = 4


def value_and_grad(density: Density, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value of ``density`` and its gradient at ``z``; zeros where it does not depend on ``z``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = density(z)
        if not value.requires_grad:
            return value, torch.zeros_like(z)
        (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    return value.detach(), torch.zeros_like(z) if grad is None else grad


@dataclass
class Oracle:
    r"""The single chain's log joint with a few points where it and its gradient are known and finite.

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
            if not close(value, self.values[rows]):
                return f"wrong values for {size} chains"
            if not close(grad, self.grads[rows]):
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
                return close(value[row], self.density(z[row]))
        except torch.linalg.LinAlgError:  # on the edge of what can be factored, which a batch may do and one row not
            return True


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


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry: far above rounding errors, far below a wrong formula."""
    tolerance = torch.finfo(b.dtype).eps ** 0.4  # 6e-7 in float64, 2e-3 in float32
    scale = 1 + b.abs().amax(-1) if b.dim() else 1 + b.abs()
    gap = (a - b).abs().amax(-1) if b.dim() else (a - b).abs()
    return bool((gap <= tolerance * scale).all())


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
