"""The batched log joint of a Pyro model, or of a ``potential_fn``, on the flat unconstrained vector."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform
from torch.utils._pytree import tree_leaves

from pyro_sb.infer.model.enumeration import discrete_sites
from pyro_sb.infer.model.joint import CheckedDensity, Oracle, routes_of_model, routes_of_potential
from pyro_sb.infer.model.prototype import Packing, Prototype, prototype
from pyro_sb.infer.model.routes import Batched, as_density, constrain
from pyro_sb.infer.model.runs import MAX_NUMBERS, Row, Wanted
from pyro_sb.infer.model.sites import is_deterministic, quiet_draws
from pyro_sb.infer.model.starts import gather_starts, given_starts
from pyro_sb.infer.model.tape import UndecoratedMode
from pyro_sb.infer.model.traces import PATIENCE
from pyro_sb.stages import working

__all__ = ["Evaluations", "LogJoint", "log_joint"]

Sites = dict[str, Tensor]
LEAST_ROWS = 2  # of a batch, however long a run of the model is
PART = 2**16  # numbers that an operation of a batch writes at a time, 512 KB in float64: more fall out of the cache
EAGER_PART = 2**18  # where the model's own code runs every time, whose cost no number of rows changes
LONG, LONG_PATIENCE = 3_000, 40  # operations of a run above which so many batches of a size come before one is recorded
DEVICE_PART = 2**25  # on a GPU
OPERATIONS = 10  # of a model on each of its numbers
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


class LogJoint:
    r"""Batched unnormalised log density on :math:`\mathbb{R}^d`.

    .. math:: \log p(z) = \log p(x(z), \text{data}) + \log |\partial x / \partial z|

    with :math:`x(z)` the constrained latents: minus Pyro's ``potential_fn``, for many chains at once. Made by
    :func:`~pyro_sb.infer.model.log_joint.log_joint`.

    Attributes:
        packing: Layout of the sites in the vector.
        prototype: The model as one run showed it; None for a ``potential_fn``.
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
        self._size, self._width = 0, 1
        self._known = None if oracle is None else oracle.known.points  # finite, whatever other starts are
        self._log_copies = 0.0 if prototype is None else prototype.gaps.log_copies

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

    def __repr__(self) -> str:
        name = "potential_fn" if self.prototype is None else getattr(self.model, "__name__", type(self.model).__name__)
        sites = ", ".join(f"{site} {tuple(shape)}" for site, shape in self.site_shapes.items())
        done = f"{self.evaluations.density} values, {self.evaluations.gradient} gradients asked for"
        return f"LogJoint of {name}: {self.dim} unconstrained numbers ({shortened(sites)}), by {self.route}, {done}"

    @property
    def dim(self) -> int:
        """Length of ``z``."""
        return self.packing.dim

    @property
    def run_size(self) -> int:
        """Numbers that one run of the model holds, about: a tenth of those that its operations write."""
        if not self._size:
            one = torch.zeros(1, self.dim, dtype=self.dtype, device=self.device)
            with ElementCount() as count, pyro.validation_enabled(False), torch.no_grad():
                self._density.single(one)
            self._size = max(self.dim, count.total // OPERATIONS)
            self._width = max(1, count.squares // max(1, count.total))
            self._density.traces.patience = LONG_PATIENCE if count.operations > LONG else PATIENCE
        return self._size

    @property
    def part_size(self) -> int:
        """Rows that are evaluated at a time: as many as memory bears, and a processor's cache."""
        most = MAX_NUMBERS // self.run_size
        if self.device.type != "cpu":
            numbers = DEVICE_PART
        else:
            numbers = EAGER_PART if self._density.traces.refuses(self.route) else PART
        return max(LEAST_ROWS, min(most, numbers // self._width))

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
    def deterministic_sites(self) -> list[str]:
        """Names of the model's ``pyro.deterministic`` sites."""
        return [] if self.prototype is None else list(self.prototype.deterministic)

    @property
    def route(self) -> str:
        """Route of a batch: ``"plate"``, ``"vmap"``, ``"loop"``, or ``"batched"`` (:meth:`from_batched`)."""
        return self._density.route

    @property
    def traced(self) -> str:
        """Whether batches are evaluated without the model's code, or why they are not."""
        return self._density.traces.describe(self.route)

    @property
    def threads(self) -> str:
        """Threads of an evaluation, chosen by its wall time (`pyro_sb.threads`)."""
        return self._density.runner.pace.describe()

    @property
    def model(self) -> Callable[..., Any] | None:
        """The Pyro model, None for a ``potential_fn``."""
        return None if self.prototype is None else self.prototype.runs.model

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Log joint without a graph.

        Args:
            z: Unconstrained vectors, any float dtype; evaluated in the model's. Shape ``(C, dim)``.

        Returns:
            Shape ``(C,)``, in the dtype of ``z``; ``-inf`` where the log joint is not finite.
        """
        self.evaluations.density += len(z)
        value, _ = self._in_parts(z, gradient=False)
        return (as_density(value) - self._log_copies).to(z)

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
        value, grad = self._in_parts(z, gradient=True)
        value = as_density(value) - self._log_copies
        grad = torch.where(torch.isfinite(grad) & torch.isfinite(value)[:, None], grad, 0.0)
        return value.to(z), grad.to(z)

    def recheck(self, z: Tensor) -> str | None:
        r"""Compare the route with single chains where the chains stand, ``(C, dim)``, in value and gradient.

        Returns:
            None; or what spoke against the route there: another has taken its place.
        """
        return self._density.recheck(self._own(z))

    def _in_parts(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Values and gradients of as many rows at a time as memory bears."""
        working()
        size = self.part_size
        parts = self._own(z).split(size if len(z) > 1.5 * size else max(1, len(z)))
        found = [self._density(part, gradient) for part in parts]
        if len(found) == 1:
            return found[0]
        values, grads = zip(*found, strict=True)
        return torch.cat(values), torch.cat(grads)

    def _own(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(
                f"z must have shape (chains, {self.dim}), got {tuple(z.shape)}. Use z[None] for one chain."
            )
        return z.detach().to(self.device, self.dtype)

    def pack(self, params: Sites) -> Tensor:
        """``{site: (*batch, *shape)}``, unconstrained, to ``(*batch, dim)``."""
        return self.packing.pack(params) if self.prototype is None else self.prototype.pack(params)

    def unpack(self, z: Tensor) -> Sites:
        """``(*batch, dim)`` to ``{site: (*batch, *shape)}``, unconstrained."""
        return self.packing.unpack(z)

    def constrain(self, z: Tensor) -> Sites:
        """``(*batch, dim)`` to the continuous latents in their own space, ``{site: (*batch, *shape)}``."""
        if self.prototype is None:
            free = self.unpack(z)
            return {name: self.transforms[name].inv(u) if name in self.transforms else u for name, u in free.items()}
        return self._replay(lambda row, num: row.values, z)

    def deterministic(self, z: Tensor, discrete: Sites | None = None) -> Sites:
        r"""The model's ``pyro.deterministic`` sites.

        Args:
            z: Unconstrained vectors. Shape ``(*batch, dim)``.
            discrete: Draws of the enumerated sites that belong to ``z``, as :meth:`discrete` gave them. Omitted: new
                draws.

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.deterministic:
            return {}
        wanted, drawn = Wanted(list(prototype.deterministic)), self.discrete(z) if discrete is None else discrete

        def sites(rows: Row, num: int) -> Sites:
            return prototype.runs.at(rows, num, wanted, routes=("vmap", "loop"), checked=()).values

        return self._replay(sites, z, drawn)

    def discrete(self, z: Tensor, temperature: int = 1) -> Sites:
        r"""Enumerated sites drawn from their posterior given ``z`` (``temperature=1``), or the most probable ones (0).

        Returns:
            ``{site: (*batch, *shape)}``; empty if the model has none.
        """
        prototype = self.prototype
        if prototype is None or not prototype.enumerated:
            return {}
        gaps = prototype.gaps.latent

        def sites(rows: Row, num: int) -> Sites:
            drawn = discrete_sites(prototype, rows.values, num, self.route, temperature)
            return {name: gaps[name].fill(x) if name in gaps else x for name, x in drawn.items()}

        return self._replay(sites, z, cost=ENUMERATION_COST)

    def _replay(self, fn: Callable[[Row, int], Sites], z: Tensor, drawn: Sites | None = None, cost: int = 1) -> Sites:
        """``fn`` of rows at ``z`` and at draws that belong to it, in chunks; leading dimensions kept."""
        prototype, batch = self._sited(), z.shape[:-1]
        flat = z.detach().to(self.device, self.dtype).reshape(batch.numel(), self.dim)
        more = {name: x.reshape(len(flat), *prototype.enumerated[name]) for name, x in (drawn or {}).items()}
        size, parts = max(1, MAX_NUMBERS // max(1, cost * prototype.runs.numel)), []
        with torch.no_grad(), pyro.validation_enabled(False):
            for start in range(0, max(1, len(flat)), size):
                part = flat[start : start + size]
                values = constrain(prototype, part)[0].values
                parts.append(fn(Row(values | {k: x[start : start + size] for k, x in more.items()}), len(part)))
        return {
            name: torch.cat([p[name] for p in parts]).reshape(batch + parts[0][name].shape[1:]) for name in parts[0]
        }

    def _sited(self) -> Prototype:
        if self.prototype is None:
            raise ValueError("A model must be there to draw from its prior, got a potential_fn. Use start().")
        return self.prototype

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
        wanted = Wanted(list(prototype.transforms))
        with quiet_draws():  # no plate: a model may draw right under the joint's rows, and (C, C) numbers under a plate
            draws = prototype.runs.at(Row({}), num, wanted, routes=("vmap", "loop"), checked=()).values
        return self.pack({name: transform(draws[name]) for name, transform in prototype.transforms.items()})

    def without_data(self) -> "LogJoint":
        """The log density of the latents alone, by no faster route than the joint's own."""
        sites = self._sited()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Chains are evaluated one by one")  # said of the joint
            latents = prototype(
                Unseen()(sites.runs.model),
                sites.runs.args,
                sites.runs.kwargs,
                max_plate_nesting=sites.max_plate_nesting,
                like=sites,
            )
            prior = from_prototype(latents, None)
            while prior.route not in self._density.runner.left:
                prior._density.runner.drop("the joint is not evaluated so")
        return prior

    def start(self, num: int) -> Tensor:
        r"""Starts where log joint and gradient are finite: the model's own, and where too few of those are, others.

        Its own are uniform on (-2, 2), or by the user's ``init_strategy``. Then follow prior draws that the data
        allow, wider starts, and those that were found once more, moved a little.

        Returns:
            Shape ``(num, dim)``.

        Raises:
            ValueError: If none is finite.
        """
        return gather_starts(num, self.packing, self.prototype, self._finite, self._known)

    def _finite(self, candidates: Iterator[Tensor]) -> Tensor:
        """Those candidates where log joint and gradient are finite. Shape ``(n, dim)``."""
        z = self.packing.rows([row[None] for row in candidates])
        self.evaluations.gradient += len(z)
        value, grad = self._density(z, gradient=True)
        return z[torch.isfinite(value) & torch.isfinite(grad).all(-1)]


class ElementCount(UndecoratedMode):
    """Counts the numbers that torch's operations write, whatever they are, and their squares an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.total, self.squares = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.total += x.numel()
                self.squares += x.numel() ** 2
        return result


class Unseen(Messenger):
    """Leaves observed sites and factors out of the log density."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_deterministic(msg):
            msg["mask"] = False


def shortened(text: str, most: int = 200) -> str:
    """A text, or its beginning."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


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
    points: Tensor | None = None,
    empty: bool = False,
) -> LogJoint:
    r"""Batched log joint of a Pyro model or of a ``potential_fn``.

    The fastest route that agrees with Pyro's own single-chain potential, in value and gradient at several points and
    batch sizes, is taken: the model under an outer plate of chains, ``torch.func.vmap``, or a loop with a warning.

    Args:
        model: Pyro model. Discrete latents are summed out.
        potential_fn: Minus log density of one chain's dict of unconstrained tensors, instead of ``model``.
        args: The model's positional arguments; ignored with ``potential_fn``, as in Pyro.
        kwargs: The model's keyword arguments.
        initial_params: Unconstrained values of each site: shapes of a ``potential_fn``'s sites, and points where the
            log joint is known to be finite.
        batched_initial: Whether ``initial_params`` of a ``potential_fn`` carry a leading chain dimension. A model's
            may or may not.
        init_strategy: Pyro's init strategy, uniform on (-2, 2) in unconstrained space if omitted.
        max_plate_nesting: Number of plate dimensions; read off one run of the model if omitted.
        transforms: Constrained to unconstrained, for some sites or all; ``biject_to(support).inv`` for the others.
        jit_compile: Refused: chains are batched instead.
        points: Unconstrained vectors where a finite log joint is looked for first. Shape ``(M, dim)``.
        empty: Serve a model without continuous latents too, by a vector of no numbers.

    Raises:
        ValueError: Neither or both of ``model`` and ``potential_fn``; no latent site; NaN data; no finite start.
        NotImplementedError: Subsampled plates, discrete sites that cannot be enumerated, supports without a bijection.

    Example:
        >>> import pyro.distributions as dist
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
        raise NotImplementedError("jit_compile must be False, got True: chains run as one batch, which gains more.")
    if potential_fn is not None:
        if init_strategy is not None or max_plate_nesting is not None:
            raise ValueError("init_strategy and max_plate_nesting need a model, got potential_fn. Use initial_params.")
        return from_potential(potential_fn, initial_params, batched_initial, transforms, points)
    assert model is not None
    sites = prototype(
        model,
        args,
        kwargs or {},
        init_strategy=init_strategy,
        max_plate_nesting=max_plate_nesting,
        transforms=transforms,
        empty=empty,
    )
    return from_prototype(sites, initial_params, points)


def from_potential(
    potential_fn: Callable[[Sites], Tensor],
    initial_params: Sites | None,
    batched_initial: bool,
    transforms: dict[str, Transform] | None,
    points: Tensor | None = None,
) -> LogJoint:
    """Log joint of a user's single-chain potential: vmap, or a loop."""
    if not initial_params:
        raise ValueError("potential_fn needs initial_params, unconstrained, for the shapes of its sites; got none.")
    given = {name: torch.as_tensor(value).detach() for name, value in initial_params.items()}
    chains = given if batched_initial else {name: value[None] for name, value in given.items()}
    packing = Packing.like({name: value[0] for name, value in chains.items()})
    starts = [*packing.pack(chains).unbind(), *given_starts(points, packing)]
    routes, oracle = routes_of_potential(potential_fn, packing, starts)
    return LogJoint(packing, routes, oracle=oracle, transforms=transforms)


def from_prototype(sites: Prototype, initial_params: Sites | None, points: Tensor | None = None) -> LogJoint:
    """Log joint of a model that passed the refusals: chain plate, vmap, or a loop."""
    starts = given_starts(points, sites.packing)
    if initial_params:
        starts += sites.pack(initial_params).detach().reshape(-1, sites.packing.dim).unbind()
    routes, oracle = routes_of_model(sites, starts)
    return LogJoint(sites.packing, routes, oracle=oracle, prototype=sites, transforms=sites.transforms)
