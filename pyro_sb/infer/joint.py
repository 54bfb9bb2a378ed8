"""The batched log joint on the flat unconstrained vector: density, gradient, and the way back to the model's sites."""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.agreement import MAX_TRIES, Oracle, value_and_grad
from pyro_sb.infer.enumeration import discrete_sites
from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import Prototype
from pyro_sb.infer.replay import chunked, deterministic_sites, prior_draws
from pyro_sb.infer.routes import constrain
from pyro_sb.infer.starts import model_starts, uniform_starts

__all__ = ["Evaluations", "LogJoint"]

logger = logging.getLogger(__name__)

Sites = dict[str, Tensor]
Route = Any  # an object with a `name` that maps (C, dim) to (C,)
ENUMERATION_COST = 64  # numbers held by an enumerated run for each number in its sites, a guess on the high side


@dataclass
class Evaluations:
    """Work done so far, in rows: one chain evaluated once is one row.

    Attributes:
        density: Rows of value alone.
        gradient: Rows of value and gradient.
    """

    density: int = 0
    gradient: int = 0


class LogJoint:
    r"""Batched unnormalised log density on :math:`\mathbb{R}^d`.

    .. math:: \log p(z) = \log p(x(z), \text{data}) + \log |\partial x / \partial z|

    with :math:`x(z)` the constrained latents: minus Pyro's ``potential_fn``, for many chains at once. Made by
    :func:`~pyro_sb.infer.potential.log_joint`.

    Attributes:
        packing: Layout of the sites in the vector.
        prototype: What one run of the model told; None for a ``potential_fn``.
        transforms: Pyro's convention, ``transforms[name].inv`` constrains; with ``potential_fn`` the user's, or none.
        evaluations: Rows asked for so far. Rows spent on checking a route are not counted.
    """

    def __init__(
        self,
        packing: Packing,
        routes: list[Route],
        *,
        oracle: Oracle | None = None,
        prototype: Prototype | None = None,
        transforms: dict[str, Transform] | None = None,
    ) -> None:
        self.packing = packing
        self.prototype = prototype
        self.transforms = transforms or {}
        self.evaluations = Evaluations()
        self._routes = routes  # the one in use, then those to fall back on
        self._oracle = oracle
        self._objections: list[str] = []
        self._sizes_checked: set[int] = set()
        self._settle()

    @classmethod
    def from_batched(
        cls,
        fn: Callable[[Tensor], Tensor],
        dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> "LogJoint":
        r"""A log joint from a function that already maps ``(C, dim)`` to ``(C,)``; its one site is called ``z``.

        Example:
            >>> joint = LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, dim=2)
            >>> joint.value_and_grad(torch.ones(1, 2))
            (tensor([-1.]), tensor([[-1., -1.]]))
        """
        packing = Packing({"z": torch.Size([dim])}, {"z": dtype}, torch.device(device))
        return cls(packing, [Batched(fn)])

    # ---- what it is ----

    @property
    def dim(self) -> int:
        """Length of ``z``."""
        return self.packing.dim

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; ``z`` is evaluated in it."""
        return self.packing.dtype

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.packing.device

    @property
    def site_shapes(self) -> dict[str, torch.Size]:
        """Unconstrained shape of each site, in packing order."""
        return self.packing.shapes

    @property
    def route(self) -> str:
        """How a batch is evaluated: ``"plate"``, ``"vmap"``, ``"loop"``, or ``"batched"`` (:meth:`from_batched`)."""
        return self._routes[0].name

    @property
    def model(self) -> Callable[..., Any] | None:
        """The Pyro model, None for a ``potential_fn``."""
        return None if self.prototype is None else self.prototype.model

    # ---- density ----

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Log joint without a graph.

        Args:
            z: Unconstrained vectors, any float dtype; evaluated in the model's. Shape ``(C, dim)``.

        Returns:
            Shape ``(C,)``, in the dtype of ``z``; ``-inf`` where the log joint is not finite.
        """
        self.evaluations.density += len(z)
        value, _ = self._evaluate(self._own(z), gradient=False)
        return as_density(value).to(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Log joint and its gradient.

        Args:
            z: Unconstrained vectors, any float dtype; evaluated in the model's. Shape ``(C, dim)``.

        Returns:
            Values of shape ``(C,)`` and gradients ``(C, dim)``, in the dtype of ``z``. Where the value is not finite:
            ``-inf`` and a zero gradient. A single gradient entry that is not finite is 0: any fixed field in place of
            the gradient leaves leapfrog steps reversible and volume-preserving.
        """
        self.evaluations.gradient += len(z)
        value, grad = self._evaluate(self._own(z), gradient=True)
        value = as_density(value)
        grad = torch.where(torch.isfinite(grad) & torch.isfinite(value)[:, None], grad, 0.0)
        return value.to(z), grad.to(z)

    def _own(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z must have shape (chains, {self.dim}), got {tuple(z.shape)}.")
        return z.detach().to(self.device, self.dtype)

    def _evaluate(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Value and gradient by the route in use; a batch size that is new to the plate is checked on one row."""
        if not len(z):
            return z.new_zeros(0), torch.zeros_like(z)
        value, grad = self._attempt(z, gradient)
        if self.route != "plate" or len(z) in self._sizes_checked:
            return value, grad
        if self._confirmed(z, value):
            self._sizes_checked.add(len(z))
            return value, grad
        self._demote(f"wrong values for {len(z)} chains")
        return self._evaluate(z, gradient)

    def _attempt(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """One call of the route; a row whose matrix cannot be factored gets NaN and does not spoil its neighbours."""
        try:
            with pyro.validation_enabled(False):
                if gradient:
                    return value_and_grad(self._routes[0], z)
                with torch.no_grad():
                    return self._routes[0](z), torch.empty_like(z)
        except torch.linalg.LinAlgError:
            if len(z) == 1:
                return z.new_full((1,), torch.nan), torch.zeros_like(z)
            halves = [self._attempt(half, gradient) for half in z.tensor_split(2)]
            return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])

    # ---- which route ----

    def _confirmed(self, z: Tensor, value: Tensor) -> bool:
        """Whether the single chain agrees: a batch size that equals a data size can broadcast in silence."""
        if self._oracle is None:
            return True
        if len(z) > 1 and bool((z == z[0]).all()):  # equal rows hide mixed-up chains, so spread them
            z = z + torch.linspace(-0.05, 0.05, len(z), dtype=z.dtype, device=z.device)[:, None]
            value, _ = self._attempt(z, gradient=False)
        with pyro.validation_enabled(False):
            return self._oracle.confirms(z, value)

    def _demote(self, objection: str) -> None:
        """Drop the route in use for the next one that agrees with the single chain; the loop always does."""
        self._objections.append(f"{self._routes.pop(0).name}: {objection}")
        self._settle()

    def _settle(self) -> None:
        """Make the first route that agrees with the oracle the one in use, and warn if only the loop is left."""
        while self.route != "loop" and self._oracle is not None:
            with pyro.validation_enabled(False):
                objection = self._oracle.objection(self._routes[0])
            if objection is None:
                logger.info("log joint by route %r (%s)", self.route, "; ".join(self._objections) or "first choice")
                return
            self._objections.append(f"{self._routes.pop(0).name}: {objection}")
        if self.route == "loop":
            warnings.warn(
                "Chains are evaluated one by one, which is slow: no batched route agrees with the single chain "
                f"({'; '.join(self._objections)}). Write the model so that batches of chains can pass: dim=-1 in sums, "
                "Vindex for indices, torch.where for Python's if, no .item().",
                RuntimeWarning,
                stacklevel=4,
            )

    # ---- sites ----

    def pack(self, params: Sites) -> Tensor:
        """``{site: (*batch, *shape)}``, unconstrained, to ``(*batch, dim)``."""
        return self.packing.pack(params)

    def unpack(self, z: Tensor) -> Sites:
        """``(*batch, dim)`` to ``{site: (*batch, *shape)}``, unconstrained."""
        return self.packing.unpack(z)

    def constrain(self, z: Tensor) -> Sites:
        """``(*batch, dim)`` to the continuous latents in their own space, ``{site: (*batch, *shape)}``."""
        if self.prototype is None:
            free = self.unpack(z)
            return {name: self.transforms[name].inv(u) if name in self.transforms else u for name, u in free.items()}
        return self._replay(lambda part: self._constrained(part["z"]), z)

    def deterministic(self, z: Tensor, discrete: Sites | None = None) -> Sites:
        r"""The model's ``pyro.deterministic`` sites.

        Args:
            z: Unconstrained vectors. Shape ``(*batch, dim)``.
            discrete: Draws of the enumerated sites that belong to ``z``, as :meth:`discrete` gave them; drawn anew if
                omitted.

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.deterministic:
            return {}
        drawn = self.discrete(z) if discrete is None else discrete

        def sites(part: Sites) -> Sites:
            values = self._constrained(part.pop("z"))
            return deterministic_sites(prototype, values | part)

        return self._replay(sites, z, drawn)

    def discrete(self, z: Tensor, temperature: int = 1) -> Sites:
        r"""Enumerated sites drawn from their posterior given ``z`` (``temperature=1``), or the most probable ones (0).

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.enumerated:
            return {}
        route = self.route

        def sites(part: Sites) -> Sites:
            return discrete_sites(prototype, self._constrained(part["z"]), route, temperature)

        return self._replay(sites, z, cost=ENUMERATION_COST)

    def _constrained(self, z: Tensor) -> Sites:
        return constrain(self._sited(), z)[0]

    def _replay(self, fn: Callable[[Sites], Sites], z: Tensor, drawn: Sites | None = None, cost: int = 1) -> Sites:
        """``fn`` on ``z`` and on draws that belong to it, in chunks; leading dimensions kept."""
        batch, shapes = z.shape[:-1], self._sited().enumerated
        inputs = {"z": z.detach().to(self.device, self.dtype).reshape(-1, self.dim)}
        inputs |= {name: x.reshape(-1, *shapes[name]) for name, x in (drawn or {}).items()}
        found = chunked(fn, inputs, cost * self._sited().numel)
        return {name: x.reshape(batch + x.shape[1:]) for name, x in found.items()}

    def _sited(self) -> Prototype:
        if self.prototype is None:
            raise ValueError("A model must be there to draw from its prior, got a potential_fn. Use start().")
        return self.prototype

    # ---- points ----

    def prior(self, num: int) -> Tensor:
        r"""Independent draws of the prior, unconstrained. Shape ``(num, dim)``.

        Raises:
            ValueError: If a site is improper, or there is no model.
        """
        prototype = self._sited()
        if prototype.improper:
            raise ValueError(
                f"The prior must be proper to draw from it, got improper sites {list(prototype.improper)}. Use start()."
            )
        with torch.no_grad(), pyro.validation_enabled(False):
            draws = prior_draws(prototype, num)
            return self.pack({name: transform(draws[name]) for name, transform in prototype.transforms.items()})

    def start(self, num: int) -> Tensor:
        r"""Starts where log joint and gradient are finite, uniform on (-2, 2) or by the user's ``init_strategy``.

        Returns:
            Shape ``(num, dim)``.

        Raises:
            ValueError: If too few are finite in 100 rounds.
        """
        starts = self._starts()
        kept: list[Tensor] = []
        for _ in range(MAX_TRIES):
            z = torch.stack([next(starts) for _ in range(num - len(kept))])
            self.evaluations.gradient += len(z)
            value, grad = self._evaluate(z, gradient=True)
            kept.extend(z[torch.isfinite(value) & torch.isfinite(grad).all(-1)].unbind())
            if len(kept) == num:
                return torch.stack(kept)
        raise ValueError(
            f"The log joint and its gradient must be finite at the starts, got {len(kept)} of {num} in {MAX_TRIES} "
            "rounds. Pass init_strategy or initial_params inside the support."
        )

    def _starts(self) -> Iterator[Tensor]:
        return uniform_starts(self.packing) if self.prototype is None else model_starts(self.prototype)


class Batched:
    """A function that is batched already."""

    name = "batched"

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return self.fn(z)


def as_density(value: Tensor) -> Tensor:
    """Not finite becomes ``-inf``."""
    return torch.where(torch.isfinite(value), value, -torch.inf)
