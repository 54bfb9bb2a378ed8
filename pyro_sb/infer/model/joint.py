"""The batched log joint on the flat unconstrained vector: density, gradient, and the way back to the model's sites."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.model.agreement import CheckedDensity, Oracle
from pyro_sb.infer.model.enumeration import discrete_sites
from pyro_sb.infer.model.packing import Packing
from pyro_sb.infer.model.prototype import MAX_TRIES, Prototype, model_starts, uniform_starts
from pyro_sb.infer.model.routes import constrain
from pyro_sb.infer.model.runs import chunked, deterministic_sites, prior_draws

__all__ = ["Evaluations", "LogJoint"]

Sites = dict[str, Tensor]
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

    def since(self, before: "Evaluations") -> "Evaluations":
        """Work done since an earlier count."""
        return Evaluations(self.density - before.density, self.gradient - before.gradient)


VECTOR = ""  # key of the vector beside the sites: no site has an empty name


class LogJoint:
    r"""Batched unnormalised log density on :math:`\mathbb{R}^d`.

    .. math:: \log p(z) = \log p(x(z), \text{data}) + \log |\partial x / \partial z|

    with :math:`x(z)` the constrained latents: minus Pyro's ``potential_fn``, for many chains at once. Made by
    :func:`~pyro_sb.infer.model.log_joint.log_joint`.

    Attributes:
        packing: Layout of the sites in the vector.
        prototype: What one run of the model told; None for a ``potential_fn``.
        transforms: Pyro's convention, ``transforms[name].inv`` constrains; with ``potential_fn`` the user's, or none.
        evaluations: Rows asked for so far. Rows spent on checking a route are not counted.
    """

    def __init__(
        self,
        packing: Packing,
        routes: list[Any],
        *,
        oracle: Oracle | None = None,
        prototype: Prototype | None = None,
        transforms: dict[str, Transform] | None = None,
    ) -> None:
        self.packing = packing
        self.prototype = prototype
        self.transforms = transforms or {}
        self.evaluations = Evaluations()
        self._density = CheckedDensity(routes, oracle)

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
        return self._density.route

    @property
    def threads(self) -> str:
        """Threads of an evaluation, chosen by its wall time (`pyro_sb.threads`)."""
        return self._density.pace.describe()

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
        value, _ = self._density(self._own(z), gradient=False)
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
        value, grad = self._density(self._own(z), gradient=True)
        value = as_density(value)
        grad = torch.where(torch.isfinite(grad) & torch.isfinite(value)[:, None], grad, 0.0)
        return value.to(z), grad.to(z)

    def _own(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(
                f"z must have shape (chains, {self.dim}), got {tuple(z.shape)}. Use z[None] for one chain."
            )
        return z.detach().to(self.device, self.dtype)

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
        return self._replay(lambda part: self._constrained(part[VECTOR]), z)

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
            values = self._constrained(part.pop(VECTOR))
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
            return discrete_sites(prototype, self._constrained(part[VECTOR]), route, temperature)

        return self._replay(sites, z, cost=ENUMERATION_COST)

    def _constrained(self, z: Tensor) -> Sites:
        return constrain(self._sited(), z)[0]

    def _replay(self, fn: Callable[[Sites], Sites], z: Tensor, drawn: Sites | None = None, cost: int = 1) -> Sites:
        """``fn`` on ``z`` and on draws that belong to it, in chunks; leading dimensions kept."""
        batch, shapes = z.shape[:-1], self._sited().enumerated
        inputs = {VECTOR: z.detach().to(self.device, self.dtype).reshape(-1, self.dim)}
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
            value, grad = self._density(z, gradient=True)
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
