"""A Pyro model, or a ``potential_fn``, as a batched log joint and gradient on the flat unconstrained vector."""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.agreement import Oracle, close, find_oracle, value_and_grad
from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import Prototype, prototype
from pyro_sb.infer.replay import chunked, deterministic_sites, discrete_sites, prior_draws
from pyro_sb.infer.routes import (
    EnumeratedPlate,
    Loop,
    ModelPotential,
    Plate,
    SingleChain,
    UserPotential,
    Vmap,
    constrain,
    density_terms,
)
from pyro_sb.infer.starts import explain_no_start, model_starts, uniform_starts

__all__ = ["Evaluations", "LogJoint", "log_joint"]

logger = logging.getLogger(__name__)

Sites = dict[str, Tensor]
Route = Any  # an object with a `name` that maps (C, dim) to (C,)


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

    with :math:`x(z)` the constrained latents: minus Pyro's ``potential_fn``, for many chains at once. Made by :func:`log_joint`.

    Attributes:
        dim: Length of ``z``.
        route: How a batch is evaluated: ``"plate"``, ``"vmap"``, ``"loop"``, or ``"batched"`` (:meth:`from_batched`).
        dtype: The model's dtype; likewise ``device``.
        evaluations: Rows asked for so far. The checks of a route are not counted.
        model: The Pyro model, None for a ``potential_fn``.
        transforms: Pyro's convention, ``transforms[name].inv`` constrains; for a ``potential_fn`` what the user gave, or empty.
        site_shapes: Unconstrained shape of each site, in packing order.
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
            >>> joint.value_and_grad(torch.ones(1, 2, dtype=torch.float64))
            (tensor([-1.], dtype=torch.float64), tensor([[-1., -1.]], dtype=torch.float64))
        """
        packing = Packing({"z": torch.Size([dim])}, {"z": dtype}, torch.device(device))
        return cls(packing, [Batched(fn)])

    # ---- what it is ----

    @property
    def dim(self) -> int:
        return self.packing.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.packing.dtype

    @property
    def device(self) -> torch.device:
        return self.packing.device

    @property
    def site_shapes(self) -> dict[str, torch.Size]:
        return self.packing.shapes

    @property
    def route(self) -> str:
        return self._routes[0].name

    @property
    def model(self) -> Callable[..., Any] | None:
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
        value = self._evaluate(self._own(z), gradient=False)[0]
        return as_density(value).to(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Log joint and its gradient.

        Args:
            z: Unconstrained vectors, any float dtype; evaluated in the model's. Shape ``(C, dim)``.

        Returns:
            Values of shape ``(C,)`` and gradients ``(C, dim)``, in the dtype of ``z``. Where the value is not finite: ``-inf``
            and a zero gradient. A single gradient entry that is not finite is 0: leapfrog steps stay reversible.
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
        """Value and gradient of any rows, by the route in use; a batch size seen for the first time is checked."""
        value, grad = self._attempt(z, gradient)
        if self.route == "plate" and len(z) not in self._sizes_checked and len(z):
            if not self._confirmed(z, value):
                self._demote(f"wrong values for {len(z)} chains")
                return self._evaluate(z, gradient)
            self._sizes_checked.add(len(z))
        return value, grad

    def _attempt(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """One call of the route; a row whose matrix cannot be factored gets NaN and does not spoil its neighbours."""
        try:
            with pyro.validation_enabled(False):
                if gradient:
                    return value_and_grad(self._routes[0], z)
                with torch.no_grad():
                    return self._routes[0](z), z.new_zeros(0)
        except torch.linalg.LinAlgError:
            if len(z) == 1:
                return z.new_full((1,), float("nan")), torch.zeros_like(z)
            halves = [self._attempt(half, gradient) for half in z.tensor_split(2)]
            return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])

    def _confirmed(self, z: Tensor, value: Tensor) -> bool:
        """Whether the single chain agrees on one row: a batch size equal to a data size can broadcast in silence."""
        if self._oracle is None:
            return True
        with pyro.validation_enabled(False):
            if len(z) > 1 and bool((z == z[0]).all()):  # equal rows hide mixed-up chains, so spread them
                z = z + torch.linspace(-0.05, 0.05, len(z), dtype=z.dtype, device=z.device)[:, None]
                value, _ = self._attempt(z, gradient=False)
            return self._oracle.confirms(z, value)

    def _demote(self, objection: str) -> None:
        """Drop the route in use for the next one that agrees with the single chain; the loop always does."""
        failed = self._routes.pop(0)
        self._objections.append(f"{failed.name}: {objection}")
        self._settle()

    def _settle(self) -> None:
        """Make the first route that agrees with the oracle the one in use, and warn if only the loop is left."""
        while self.route != "loop" and self._oracle is not None:
            with pyro.validation_enabled(False):
                objection = self._oracle.objection(self._routes[0])
            if objection is None:
                logger.info(
                    "log joint evaluated by route %r (%s)", self.route, "; ".join(self._objections) or "first choice"
                )
                return
            self._objections.append(f"{self._routes.pop(0).name}: {objection}")
        if self.route == "loop":
            warnings.warn(
                f"Chains are evaluated one by one, which is slow: no batched route agrees with the single chain "
                f"({'; '.join(self._objections)}). Write the model so that a leading batch dimension broadcasts: index with Vindex, use "
                "[..., ] and dim=-1, and torch.where for Python's if.",
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
            return {
                name: self.transforms[name].inv(u) if name in self.transforms else u
                for name, u in self.unpack(z).items()
            }
        return self._replay(self._constrained, z)

    def deterministic(self, z: Tensor, discrete: Sites | None = None) -> Sites:
        r"""The model's ``pyro.deterministic`` sites.

        Args:
            z: Unconstrained vectors. Shape ``(*batch, dim)``.
            discrete: Draws of the enumerated sites that belong to ``z``, as :meth:`discrete` gave them; drawn anew if omitted.

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.deterministic:
            return {}
        if prototype.enumerated and discrete is None:
            discrete = self.discrete(z)
        if not discrete:
            return self._replay(lambda part: deterministic_sites(prototype, self._constrained(part)), z)
        flat = {name: x.reshape(-1, *prototype.enumerated[name]) for name, x in discrete.items()}
        index = torch.arange(z[..., 0].numel(), device=z.device).reshape(z.shape[:-1])
        vectors = z.reshape(-1, self.dim)

        def at(part: Tensor) -> Sites:
            rows = part.squeeze(-1)
            drawn = {name: x[rows] for name, x in flat.items()}
            return deterministic_sites(prototype, self._constrained(vectors[rows]) | drawn)

        return self._replay(at, index[..., None])

    def discrete(self, z: Tensor, temperature: int = 1) -> Sites:
        r"""Enumerated sites drawn from their posterior given ``z`` (``temperature=1``), or the most probable ones (0).

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.enumerated:
            return {}
        plate = self.route == "plate"
        return self._replay(
            lambda part: discrete_sites(prototype, self._constrained(part), temperature=temperature, plate=plate), z
        )

    def _constrained(self, z: Tensor) -> Sites:
        return constrain(self._sited(), z)[0]

    def _replay(self, fn: Callable[[Tensor], Sites], z: Tensor) -> Sites:
        z = z.detach().to(self.device, self.dtype if z.is_floating_point() else z.dtype)
        return chunked(fn, z, self._sited().numel)

    def _sited(self) -> Prototype:
        if self.prototype is None:
            raise ValueError("This needs a model with sites, got a potential_fn. Pass model=... instead.")
        return self.prototype

    # ---- draws ----

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
            return self.pack({name: t(draws[name]) for name, t in prototype.transforms.items()})

    def start(self, num: int) -> Tensor:
        r"""Starts with a finite log joint and gradient: uniform on (-2, 2), or the user's ``init_strategy``. Shape ``(num, dim)``."""
        starts = self._starts()
        kept: list[Tensor] = []
        for _ in range(100):
            z = torch.stack([next(starts) for _ in range(num - len(kept))])
            self.evaluations.gradient += len(z)
            value, grad = self._evaluate(z, gradient=True)
            kept.extend(z[torch.isfinite(value) & torch.isfinite(grad).all(-1)].unbind())
            if len(kept) == num:
                return torch.stack(kept)
        raise ValueError(
            f"The log joint must be finite at the starts, got only {len(kept)} of {num} in 100 rounds. Pass init_strategy or initial_params."
        )

    def _starts(self) -> Iterator[Tensor]:
        return uniform_starts(self.packing) if self.prototype is None else model_starts(self.prototype)


def log_joint(
    model: Callable[..., Any] | None = None,
    potential_fn: Callable[[Sites], Tensor] | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    initial_params: Sites | None = None,
    batched_initial: bool = False,
    init_strategy: Callable[..., Any] | None = None,
    max_plate_nesting: int | None = None,
    transforms: dict[str, Transform] | None = None,
    jit_compile: bool = False,
) -> LogJoint:
    r"""Batched log joint of a Pyro model or of a ``potential_fn``.

    The fastest route that agrees with Pyro's own single-chain potential, in value and gradient at several points and batch
    sizes, is taken: the model under an outer plate of chains, ``torch.func.vmap``, or a loop with a warning.

    Args:
        model: Pyro model. Discrete latents are summed out.
        potential_fn: Minus log density of one chain's dict of unconstrained tensors, instead of ``model``.
        args: The model's positional arguments; ignored with ``potential_fn``, as in Pyro.
        kwargs: The model's keyword arguments.
        initial_params: Unconstrained values of each site; shapes of a ``potential_fn``'s sites, points where a model is known
            to be finite.
        batched_initial: Whether ``initial_params`` carry a leading chain dimension. For a model either works.
        init_strategy: Pyro's init strategy, uniform on (-2, 2) in unconstrained space if omitted.
        max_plate_nesting: Number of plate dimensions; read off one run of the model if omitted.
        transforms: Constrained to unconstrained, for some sites or all; ``biject_to(support).inv`` for the others.
        jit_compile: Refused: chains are batched instead.

    Raises:
        ValueError: Neither or both of ``model`` and ``potential_fn``; no latent site; NaN data; no finite start.
        NotImplementedError: Subsampled plates, discrete sites that cannot be enumerated, supports without a bijection.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> joint = log_joint(model, args=(torch.zeros(3),))
        >>> joint.route, joint.dim
        ('plate', 1)
        >>> joint.log_prob(torch.tensor([[0.0], [1.0]])).diff()
        tensor([-2.])
    """
    if (model is None) == (potential_fn is None):
        given = "neither" if model is None else "both"
        raise ValueError(f"Exactly one of model and potential_fn must be given, got {given}.")
    if jit_compile:
        raise NotImplementedError(
            "jit_compile must be False, got True: chains are evaluated as one batch instead, which gains more."
        )
    if potential_fn is not None:
        if init_strategy is not None or max_plate_nesting is not None:
            raise ValueError(
                "init_strategy and max_plate_nesting need a model, got potential_fn. Pass initial_params alone."
            )
        return from_potential(potential_fn, initial_params, batched_initial, transforms)
    assert model is not None
    sites = prototype(
        model,
        args,
        kwargs or {},
        init_strategy=init_strategy,
        max_plate_nesting=max_plate_nesting,
        transforms=transforms,
    )
    return from_prototype(sites, initial_params)


def from_potential(
    potential_fn: Callable[[Sites], Tensor],
    initial_params: Sites | None,
    batched_initial: bool,
    transforms: dict[str, Transform] | None,
) -> LogJoint:
    """Log joint of a user's single-chain potential: vmap, or a loop."""
    if not initial_params:
        raise ValueError(
            "potential_fn needs initial_params, one unconstrained tensor a site, for the shapes; got none."
        )
    given = {name: torch.as_tensor(value) for name, value in initial_params.items()}
    chains = given if batched_initial else {name: value[None] for name, value in given.items()}
    packing = Packing.like({name: value[0].detach() for name, value in chains.items()})
    density = UserPotential(potential_fn, packing)
    with pyro.validation_enabled(False):
        oracle = find_oracle(density, chain(packing.pack(chains).detach().unbind(), uniform_starts(packing)))
    if oracle is None:
        raise ValueError(
            "potential_fn must be finite at some start, with a finite gradient, got none in 100 tries. Check initial_params."
        )
    return LogJoint(packing, [Vmap(density), Loop(density)], oracle=oracle, transforms=transforms)


def from_prototype(sites: Prototype, initial_params: Sites | None) -> LogJoint:
    """Log joint of a model that passed the refusals: chain plate, vmap, or a loop."""
    with pyro.validation_enabled(False):
        density = ModelPotential(sites)
        starts = model_starts(sites)
        if initial_params:
            starts = chain(sites.packing.pack(initial_params).detach().reshape(-1, sites.packing.dim).unbind(), starts)
        oracle = find_oracle(density, starts)
        if oracle is None:
            raise ValueError(explain_no_start(sites))
        refuse_changing_runs(sites, oracle)
    routes = [EnumeratedPlate(sites)] if sites.enumerated else [Plate(sites), Vmap(SingleChain(sites))]
    return LogJoint(
        sites.packing, [*routes, Loop(density)], oracle=oracle, prototype=sites, transforms=sites.transforms
    )


def refuse_changing_runs(sites: Prototype, oracle: Oracle) -> None:
    """A model whose sites come and go, or whose density is random, has no log joint that a kernel could target."""
    for z in oracle.points:
        density_terms(sites, constrain(sites, z)[0], enumerate_discrete=bool(sites.enumerated))
    again, _ = value_and_grad(oracle.density, oracle.points[0])
    if not close(again, oracle.values[0]):
        raise ValueError(
            f"The log joint must be the same at every run, got {float(oracle.values[0]):g} and {float(again):g} at one point. Make "
            "every random number of the model a sample site, and put networks into eval mode."
        )


class Batched:
    """A function that is batched already."""

    name = "batched"

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, z: Tensor) -> Tensor:
        return self.fn(z)


def as_density(value: Tensor) -> Tensor:
    """Not finite becomes ``-inf``."""
    return torch.where(torch.isfinite(value), value, -torch.inf)
