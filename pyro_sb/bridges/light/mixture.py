"""What a Gaussian-mixture bridge holds: its parameters, its source, and the units that it works in."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge, check_points
from pyro_sb.bridges.ends import DrawsEnd, Ends, Wanted, read_ends, read_source
from pyro_sb.bridges.light.laws import FixedMixture, Plan, condition_mixture
from pyro_sb.bridges.light.parameters import COVARIANCES, MAX_POINTS, MixtureParameters, cluster_start
from pyro_sb.bridges.proposals import HeldSources
from pyro_sb.bridges.rows import chunked
from pyro_sb.bridges.units import Units
from pyro_sb.distributions import BridgeDistribution, Draws, PathLaw
from pyro_sb.nn import embedding_config, embedding_from_config
from pyro_sb.ops.bass import DENSE_DIM, BassMap
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, equal_weights

SMALL_EPSILON = 1e-3  # in units of the target's variance


class MixtureState(Bridge):
    """The half of a `MixtureBridge` that is read, started, saved and loaded; arguments as of `LightSB`.

    ``beta`` is the price of volatility: infinite here, where the bridge's space is the user's.
    """

    location: Tensor
    scale: Tensor
    source_location: Tensor
    context_location: Tensor
    context_scale: Tensor
    source_points: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_components: int = 50,
        epsilon: float = 1.0,
        context_dim: int = 0,
        covariance: str = "diagonal",
        hidden: tuple[int, ...] = (64, 64),
        dropout: float = 0.0,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        if embedding is not None and not context_dim:
            raise ValueError("embedding needs context_dim > 0, got 0: it maps contexts to features.")
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}. Omit it for 50.")
        if not 0 < epsilon < math.inf:
            raise ValueError(
                f"epsilon must be positive and finite, got {epsilon}. Write the variance of the reference over [0, 1]."
            )
        if not hidden:
            raise ValueError("hidden must name at least one layer, got (). Omit it for (64, 64).")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {list(COVARIANCES)}, got {covariance!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}. Write 0.1, or omit it for none.")
        self.dropout = float(dropout)
        self.num_components, self.epsilon, self.covariance = int(num_components), float(epsilon), covariance
        self.hidden, self.beta = tuple(map(int, hidden)), math.inf
        self.parameters_of = MixtureParameters(
            dim, num_components, context_dim, covariance, self.hidden, self.dropout, embedding
        )
        for name in MixtureState.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.source: Distribution | None = None
        self._source_variance = 0.0
        self._learning = False
        self._source_kind = "point"

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """Marginal from a point, path from a distribution, None from draws."""
        if self._source_kind == "point":
            return "marginal"
        return "path" if self._source_kind == "law" else None

    def _read(self, target: Any, source: Any, context: Any, weights: Any, num_draws: int, held_out: Any) -> Ends:
        """Checked ends in the bridge's units; the bridge changes when all has gone well."""
        raw = self.parameters_of.embedding is not None
        wanted = Wanted(self.dim, self.context_dim, self.num_components, self.covariance == "full", raw)
        read = read_ends(wanted, target, source, context, weights, num_draws, held_out)
        units = read.units
        self.to(units.location)
        self.location, self.scale = units
        self.source_location, self._source_variance = read.source_location, read.source_variance
        self.parameters_of.measure(read.deviations)
        self.context_location, self.context_scale = read.contexts
        self.source = source if isinstance(source, Distribution) else None
        if self.source is not None:
            self.source_points, self._source_kind = units.location.new_empty(0), "law"
        else:
            points = units.location[None] if source is None else read_source(source, self.dim, units.location)
            self.source_points, self._source_kind = points, "point" if len(points) == 1 else "draws"
        return read.ends

    @property
    def _floor(self) -> float:
        """Smallest eigenvalue of S: components keep 1e-6 of the target's variance, or the Bass map its inverse."""
        bass = 0.0 if math.isinf(self.beta) else 1.05 / (1 + self.beta)
        variance = 1e-6 * float(self.parameters_of.axes.min()) ** 2  # the axes are 1 where none is narrow
        root = math.sqrt(self._epsilon**2 + 4 * self._source_variance * variance)
        return max(2 * variance / (self._epsilon + root), bass)  # S that carries the source to that variance

    @property
    def _epsilon(self) -> float:
        """Epsilon in the bridge's units."""
        return self.epsilon / float(self.scale) ** 2

    def _begin(self, ends: Ends) -> None:
        """Put the start into the parameters."""
        self._learning = False
        if self._epsilon < SMALL_EPSILON and self._source_variance > 0:
            warnings.warn(
                f"epsilon is {self._epsilon:.2g} of the target's variance, below {SMALL_EPSILON:g}: gates saturate, "
                "and the fit may be far off. Raise epsilon, or compare draws with held-out ones.",
                RuntimeWarning,
                stacklevel=5,
            )
        source = ends.source.batch(MAX_POINTS // 2).points
        target = ends.target.batch(MAX_POINTS).points
        if isinstance(ends.target, DrawsEnd) and len(target) > ends.target.num_train:
            rows, weights = ends.target.all()
            start = Side(rows.points, weights)
        else:
            start = equal_weights(target)
        potential = cluster_start(
            source,
            start,
            self.num_components,
            self._epsilon,
            floor=self._floor,
            diagonal=self.covariance == "diagonal",
        )
        self.parameters_of.reset()
        self.parameters_of.set(potential, self._floor)
        self._learning = True

    def _units(self, t: float | Tensor = 1.0) -> Units:
        """The units at time t: the centre moves from the source's mean to the target's, and the drift with it."""
        return Units(torch.lerp(self.source_location, self.location, torch.as_tensor(t).to(self.location)), self.scale)

    def _lift(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The potential of each row's context, and the rows in the shape that it takes."""
        potential = self.parameters_of(context, self._epsilon)
        return potential, z if context is None else z[:, None, :]

    def _frozen(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The same of a fitted bridge, whose parameters take no gradient: densities pass it to points alone."""
        with torch.no_grad():
            potential = self._lift(z, context)[0]
        log_weights, locs, scales, epsilon = potential
        potential = MixturePotential(log_weights.detach(), locs.detach(), scales.detach(), epsilon)
        return potential, z if context is None else z[:, None, :]

    def _bass(self, potential: MixturePotential, t: float | Tensor) -> BassMap:
        return BassMap(potential.at(t), self._epsilon, self.beta)

    def _invert(self, potential: MixturePotential, t: float | Tensor, points: Tensor) -> Tensor:
        """Y_t at points of the user's space, exact, with its first three derivatives where points carry gradients."""
        bass = self._bass(potential, t)
        with torch.no_grad():
            inverse = bass.inverse(points)
        if not inverse.residual <= (1e-3 if points.dtype == torch.float32 else 1e-9):  # NaN is refused too
            raise RuntimeError(
                f"the inverse of the Bass map must be found, got a residual of {inverse.residual:.2g} after "
                f"{inverse.iterations} Newton steps. Fit in float64, or raise beta (now {self.beta:g})."
            )
        if not (torch.is_grad_enabled() and points.requires_grad):
            return inverse.points
        once = bass.newton_step(inverse.points, points)  # from a constant k steps have 2^k - 1 derivatives right
        return bass.newton_step(once, points)

    def like(self) -> Tensor:
        """A fitted tensor; an error before ``fit``."""
        if not len(self.location):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.location

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("num_components", "epsilon", "covariance", "hidden", "dropout")
        embedding = {"embedding": embedding_config(self.parameters_of.embedding)}
        return super().config() | {name: getattr(self, name) for name in names} | embedding

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MixtureState":
        """Build the bridge that `config` describes, its embedding among it."""
        return cls(**config | {"embedding": embedding_from_config(config.get("embedding"))})

    def get_extra_state(self) -> dict[str, Any]:
        """What the source was."""
        return {"source_kind": self._source_kind, "source_variance": self._source_variance}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a saved kind of source; a distribution must be given again."""
        self._source_kind, self._source_variance = state["source_kind"], state["source_variance"]

    def _start(self, num: int) -> Tensor:
        """Source points in the user's units."""
        if self._source_kind == "point":
            return self.source_points.expand(num, -1)
        if self._source_kind == "draws":
            index = torch.randint(len(self.source_points), (num,), device=self.location.device)
            return self.source_points[index]
        if self.source is None:
            raise RuntimeError(
                "a loaded bridge must be told its source, which was a distribution and is not saved. "
                "Write bridge.source = ..., or use transport(x0) or plan(x0)."
            )
        return self.source.sample((num,)).to(self.location)

    def _rows(self, x: Any, context: Any, t: float) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Points at time t and contexts, broadcast, as flat rows in the bridge's units; the points' shape before."""
        x, context, shape = self.flat_rows(x, context)
        return self._units(t).to(x), self._context_rows(context), shape

    @property
    def _width(self) -> int:
        """Numbers that a row of points takes at once."""
        return self.num_components * self.dim

    @property
    def _factored(self) -> bool:
        """Whether the plan from the source is a mixture known by the factors of its precisions."""
        return self.parameters_of.factored and self._source_kind == "point" and math.isinf(self.beta)

    def _plan_draw(self, potential: MixturePotential, y0: Tensor, rows: Tensor | None) -> Tensor:
        """One end of the plan from each point; ``rows`` are the contexts of a point source."""
        if self._factored and rows is not None:
            return self.parameters_of.law(rows, self._epsilon).sample().reshape(y0.shape)
        return potential.plan_sample(y0)

    def _broadcast(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if context is None:
            return x, None
        shape = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        return x.expand(*shape, self.dim), context.expand(*shape, self.context_dim)

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.context_location) / self.context_scale

    def _save_checkpoint(self, checkpoint: str | Path | None) -> Callable[[], None] | None:
        return None if checkpoint is None else lambda: self.save(checkpoint)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "location")
        if isinstance(saved, Tensor):
            self.to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# What all Gaussian-mixture bridges are: a potential, a source, and closed forms for the rest


MIN_SOURCES, MAX_SOURCES, CONTEXT_SOURCES = 256, 4096, 64  # source points that a path weight averages over
HELD_SOURCES = 1024  # the same while chains propose


class MixtureBridge(MixtureState):
    r"""A bridge whose adjusted potential is a Gaussian mixture: the static half of `LightSB` and its kin.

    Its arguments are documented there. A subclass says how the parameters are learnt.
    """

    density_hint = "Give a distribution as source, or omit the source; plan(x0) has an exact log_prob either way."

    @torch.no_grad()
    def transport(self, x0: Tensor, context: Any = None, *, t: float = 1.0) -> Tensor:
        r"""One draw of the plan :math:`\pi(x_1 | x_0)` from each point, or of the state at time t, in one shot.

        Args:
            x0: Source points. Shape ``(*, dim)``.
            context: Contexts that broadcast with them.
            t: Time in [0, 1].

        Returns:
            Shape ``(*, dim)``.
        """
        t = _check_time(t)
        z, rows, shape = self._rows(x0, context, 0.0)
        moved = chunked(lambda z, rows: self._move(z, rows, t), z, rows, width=self._width)
        return self._units(t).back(moved).reshape(shape)

    def plan(self, x0: Tensor, context: Any = None) -> BridgeDistribution:
        r"""The law :math:`\pi(x_1 | x_0)` of the ends of bridges from given points, with an exact log_prob.

        Args:
            x0: Source points. Shape ``(*batch, dim)``.
            context: Contexts that broadcast with them.

        Returns:
            A Pyro distribution with ``batch_shape == batch``.
        """
        x0 = torch.as_tensor(x0).to(self.like())
        check_points("x0", x0, self.dim)
        x0, given = self._broadcast(x0, self.check_context(context))
        joint = x0 if given is None else torch.cat([x0, given], -1)
        return BridgeDistribution(Plan(self), joint, like=x0)

    @torch.no_grad()
    def condition(self, axes: list[int], observed: Any, x0: Tensor | None = None) -> TorchDistributionMixin:
        r"""The law of the other coordinates given some, in closed form: for a bridge fitted on joint draws.

        Conditioning without a network: fit on rows ``(context, latent)``, with ``covariance="full"`` as a rule, and ask
        for the latents given any of the coordinates. For ``beta = inf`` and without ``context_dim``.

        Args:
            axes: Which coordinates are known, at least one and not all.
            observed: Their values. Shape ``(*batch, len(axes))``.
            x0: The source point that bridges leave from. Shape ``(dim,)``. Omitted: the bridge's own; where the source
                is no point it must be given.

        Returns:
            A Pyro mixture over the other coordinates, in their order, with ``batch_shape == batch``.

        Example:
            >>> from pyro_sb.bridges.light.light import LightSB
            >>> y = torch.randn(2000, 1, dtype=torch.float64)
            >>> bridge = LightSB(2, num_components=1, covariance="full")
            >>> history = bridge.fit(torch.cat([y, 2 * y + torch.randn_like(y)], 1), solver="em", progress=False)
            >>> law = bridge.condition([0], [1.0])
            >>> abs(law.mean.item() - 2) < 0.1, abs(law.variance.item() - 1) < 0.1
            (True, True)
        """
        like = self.like()
        if not math.isinf(self.beta):
            raise NotImplementedError(
                f"conditioning has a closed form for beta = inf, got beta = {self.beta:g}: the Bass map mixes "
                "coordinates. Use LightSB, or context_dim."
            )
        if self.context_dim:
            raise NotImplementedError("condition is for bridges on joint draws, got context_dim > 0. Call the bridge.")
        axes = [int(a) % self.dim if -self.dim <= int(a) < self.dim else self.dim for a in axes]
        if self.dim in axes or len(set(axes)) != len(axes) or not 0 < len(axes) < self.dim:
            raise ValueError(
                f"axes must be distinct axes of {self.dim}, at least one and not all, got {axes}. "
                "Write the columns of what is known."
            )
        if x0 is None and self._source_kind != "point":
            raise ValueError("x0 must be given where the source is no point. Write condition(axes, observed, x0).")
        observed = torch.as_tensor(observed, dtype=like.dtype, device=like.device)
        if observed.dim() == 0 or observed.shape[-1] != len(axes):
            raise ValueError(f"observed must have shape (*batch, {len(axes)}), got {tuple(observed.shape)}.")
        potential = self.parameters_of(None, self._epsilon)
        x0 = self.source_points[0] if x0 is None else torch.as_tensor(x0).to(like)
        if x0.shape != (self.dim,):
            raise ValueError(f"x0 must be one point of shape ({self.dim},), got {tuple(x0.shape)}. Write x0[0].")
        y0 = self._units(0.0).to(x0)
        gates, locs, covariances = potential.plan_components(y0)
        locs, covariances = self._units().back(locs), self.scale**2 * covariances
        return condition_mixture(gates, locs, covariances, axes, observed)

    @torch.no_grad()
    def plan_moments(self, x0: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Mean and covariance of the plan from each point, in closed form: for ``beta = inf`` alone.

        Shapes ``(*, dim)`` to ``(*, dim)`` and ``(*, dim, dim)``.
        """
        if not math.isinf(self.beta):
            raise NotImplementedError(
                f"the plan's moments have a closed form for beta = inf, got beta = {self.beta:g}. "
                "Use plan(x0).sample((1000,))."
            )
        z, rows, shape = self._rows(x0, context, 0.0)
        potential, points = self._frozen(z, rows)
        mean, covariance = potential.plan_moments(points)
        covariance = self.scale**2 * covariance.reshape(*shape, self.dim)
        return self._units().back(mean.reshape(z.shape)).reshape(shape), covariance

    def marginal_log_prob(self, x: Tensor, context: Any = None, *, num_source: int = 4096) -> Tensor:
        r"""Log density of the draws whatever the source: of the plan, averaged over source points.

        .. math:: \log \tfrac1M \sum_i \pi(x | x_0^{(i)})

        From a point it is exact. From draws or a distribution it is an estimate, low by about ``1 / (2 M)`` relative
        variances of the plan's density: a score by which bridges of any beta and solver compare on held-out draws, no
        weight for a correction.

        Args:
            x: Points. Shape ``(*, dim)``.
            context: Contexts that broadcast with them.
            num_source: M.

        Returns:
            Shape ``(*,)``.
        """
        z, rows, shape = self._rows(x, context, 1.0)
        z0 = self._units(0.0).to(self._start(1 if self._source_kind == "point" else num_source))
        return (self._mean_log_prob(z, z0, rows) - self.dim * self.scale.log()).reshape(shape[:-1])

    def _mean_log_prob(self, z1: Tensor, z0: Tensor, rows: Tensor | None) -> Tensor:
        """Log of the plan's density averaged over source points ``(M, dim)``, in the bridge's units.

        With a context they are ``(M, dim)`` for all rows, or ``(n, M, dim)``.
        """
        if rows is not None:
            z0 = z0.expand(len(z1), *z0.shape[-2:])

        def log_prob(z: Tensor, rows: Tensor | None, given: Tensor | None) -> Tensor:
            potential, points = self._frozen(z, rows)
            y0 = self._invert(potential, 0.0, z0 if given is None else given)
            y1 = self._invert(potential, 1.0, points)
            inner = y1 @ y0.mT / self._epsilon - potential.normaliser().value(y0)[..., None, :]
            mean = torch.logsumexp(inner, -1) - math.log(y0.shape[-2])
            value = potential.adjusted().value(y1) + mean - self._bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z))

        width = self._width if rows is None else self._width * z0.shape[-2]
        return chunked(log_prob, z1, rows, None if rows is None else z0, width=width)

    @torch.no_grad()
    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Optimal drift :math:`\alpha^*(t, x) = s(t, Y_t(x))` at a time t in [0, 1], both ends included."""
        t = _check_time(t)
        z, rows, shape = self._rows(x, context, t)

        def drift(z: Tensor, rows: Tensor | None) -> Tensor:
            potential, points = self._frozen(z, rows)
            return potential.drift(t, self._invert(potential, t, points)).reshape(z.shape)

        shift = self.location - self.source_location
        return self.scale * chunked(drift, z, rows, width=self._width).reshape(shape) + shift

    @torch.no_grad()
    def volatility(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Optimal volatility :math:`\sigma^*(t, x) = \sqrt\epsilon\, (I + \nabla s(t, Y_t(x)) / \beta)`, symmetric.

        For ``beta = inf`` it is :math:`\sqrt\epsilon I`. Shapes ``(*, dim)`` to ``(*, dim, dim)``.
        """
        t = _check_time(t)
        z, rows, shape = self._rows(x, context, t)

        def jacobian(z: Tensor, rows: Tensor | None) -> Tensor:
            potential, points = self._frozen(z, rows)
            bass = self._bass(potential, t)
            return bass.jacobian(self._invert(potential, t, points)).reshape(*z.shape, self.dim)

        return math.sqrt(self.epsilon) * chunked(jacobian, z, rows, width=self._width * self.dim).reshape(
            *shape, self.dim
        )

    @torch.no_grad()
    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Paths, exact at their times: :math:`X_t = X_t(Y_t)` along Brownian bridges Y between both ends of the plan.

        They solve ``dX = drift dt + volatility dW`` without the error of a scheme.

        Returns:
            Times ``(num_steps + 1,)`` from 0 to 1, and states ``(num_steps + 1, num_paths, *batch_shape, dim)``.
        """
        context = self.check_context(context)
        shape = torch.Size((num_paths,)) + (torch.Size() if context is None else context.shape[:-1])
        rows = None if context is None else context.expand(*shape, -1).reshape(-1, self.context_dim)
        rows = self._context_rows(rows)
        z = self._units(0.0).to(self._start(shape.numel()))
        potential, points = self._frozen(z, rows)
        y0 = self._invert(potential, 0.0, points)
        y1 = self._plan_draw(potential, y0, rows)
        times = torch.linspace(0, 1, num_steps + 1).to(z)
        y, states = y0, [self._units(0.0).back(z)]
        for now, then in zip(times[:-1], times[1:]):
            share = (then - now) / (1 - now)  # Brownian bridge from y at `now` to y1 at 1
            spread = (self._epsilon * share * (1 - then)).clamp_min(0.0).sqrt()
            y = y + share * (y1 - y) + spread * torch.randn_like(y)
            states.append(self._units(then).back(self._bass(potential, then).forward(y).reshape(z.shape)))
        return times, torch.stack(states).reshape(num_steps + 1, *shape, self.dim)

    @torch.no_grad()
    def fixed(self, context: Any) -> FixedMixture | None:
        """The law at B contexts ``(B, context_dim)``, its network asked once; None where it has no such form."""
        rows = self._context_rows(self.check_context(context))
        if not self._factored or rows is None:
            return None
        return FixedMixture(self.parameters_of.law(rows, self._epsilon), self._units())

    @torch.no_grad()
    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Ends of bridges from source points."""
        rows = self._context_rows(context)
        if self._factored and rows is not None:
            draw = chunked(
                lambda rows: self.parameters_of.law(rows, self._epsilon).sample(), rows, width=self._row_width
            )
            return self._units().back(draw)
        z = self._units(0.0).to(self._start(num))
        return self._units().back(chunked(self._move, z, rows, width=self._width))

    @torch.no_grad()
    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        r"""Ends with their marginal density from a point; from a distribution, with that of an extended path.

        The path holds M source points, the index of the one that the bridge leaves from, and its end; backwards, the
        source points are drawn from the source anew. So :math:`\log q = \log \tfrac1M \sum_i \pi(x_1 | x_0^{(i)})`:
        given the source points that is the exact density of the draws, for any M. One set serves all draws of a call;
        with a context, each has its own.
        """
        if self.density != "path":
            return super().draws_rows(num, context)
        z0, rows = self._sources(num, context), self._context_rows(context)
        chosen = z0[torch.randint(len(z0), (num,), device=z0.device)] if rows is None else z0[:, 0]
        z1 = chunked(self._move, chosen, rows, width=self._width)
        return Draws(self._units().back(z1), self._given_sources(z1, z0, rows))

    @torch.no_grad()
    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """As the ``log_q`` of `draws_rows`: source points drawn anew. One set serves all rows without a context."""
        if self.density != "path":
            return super().redraw_rows(x, context)
        z1 = self._units().to(x.to(self.location))
        return self._given_sources(z1, self._sources(len(x), context), self._context_rows(context))

    def proposal_law(self) -> PathLaw:
        """The bridge, or where its draws share source points, `HeldSources`: those held, with a marginal density."""
        if self.density != "path" or self.context_dim:
            return self
        return HeldSources(self, self._start(HELD_SOURCES))

    def _sources(self, num: int, context: Tensor | None) -> Tensor:
        """Source points of path weights in the bridge's units: ``(M, dim)``, or with contexts ``(num, M, dim)``."""
        if context is None:
            return self._units(0.0).to(self._start(min(max(num, MIN_SOURCES), MAX_SOURCES)))
        return self._units(0.0).to(self._start(num * CONTEXT_SOURCES)).unflatten(0, (num, CONTEXT_SOURCES))

    def _given_sources(self, z1: Tensor, z0: Tensor, rows: Tensor | None) -> Tensor:
        """Log density of ends given the source points, in the user's units."""
        return self._mean_log_prob(z1, z0, rows) - self.dim * self.scale.log()

    @torch.no_grad()
    def log_prob_from(self, x: Tensor, x0: Tensor) -> Tensor:
        r"""Log of the plan's density averaged over source points, :math:`\log \tfrac1M \sum_i \pi(x | x_0^{(i)})`.

        Args:
            x: Points. Shape ``(num, dim)``.
            x0: Source points, the same for all. Shape ``(M, dim)``.

        Returns:
            Shape ``(num,)``. Without context alone.
        """
        units = self._units(), self._units(0.0)
        return self._given_sources(units[0].to(x.to(self.location)), units[1].to(x0.to(self.location)), None)

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density of points, from a point as source."""
        if self.density != "marginal":
            return super().log_prob_rows(x, context)
        rows = self._context_rows(context)
        if self._factored and rows is not None:
            z = self._units().to(x.to(self.location))
            return chunked(self._law_log_prob, z, rows, width=self._row_width) - self.dim * self.scale.log()
        return self.plan_log_prob_rows(x, self.source_points.expand(len(x), -1), context)

    def plan_log_prob_rows(self, x: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log density of the plan, by change of variables through the Bass map.

        .. math:: \log \pi(x | x_0) = \log \pi(y | y_0) - \log\det(I + \nabla s(1, y) / \beta),\quad y = Y_1(x),\;
            y_0 = Y_0(x_0)
        """
        z, z0 = self._units().to(x.to(self.location)), self._units(0.0).to(x0)
        rows = self._context_rows(context)

        def log_prob(z: Tensor, z0: Tensor, rows: Tensor | None) -> Tensor:
            potential, points = self._frozen(z, rows)
            y0 = self._invert(potential, 0.0, self._frozen(z0, rows)[1])
            y1 = self._invert(potential, 1.0, points)
            value = potential.plan_log_prob(y1, y0) - self._bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z))

        return (
            chunked(log_prob, z, z0, rows, width=self._width * min(self.dim, DENSE_DIM)) - self.dim * self.scale.log()
        )

    def _law_log_prob(self, z: Tensor, rows: Tensor) -> Tensor:
        """Log density of the ends from the source point; no gradient goes to parameters."""
        with torch.no_grad():
            law = self.parameters_of.law(rows, self._epsilon)
        return law.log_prob(z)

    @property
    def _row_width(self) -> int:
        """Numbers that a row of contexts takes where it has full covariances."""
        return self._width * self.dim

    def _move(self, z: Tensor, rows: Tensor | None, t: float = 1.0) -> Tensor:
        """States at time t of bridges from rows, in the bridge's units."""
        potential, points = self._frozen(z, rows)
        y0 = self._invert(potential, 0.0, points)
        y = potential.plan_sample(y0)
        if t < 1:
            y = y0 + t * (y - y0) + math.sqrt(self._epsilon * t * (1 - t)) * torch.randn_like(y)
        return self._bass(potential, t).forward(y).reshape(z.shape)


def _check_time(t: Any) -> float:
    t = float(t)
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie in [0, 1], source to target, got {t}.")
    return t
