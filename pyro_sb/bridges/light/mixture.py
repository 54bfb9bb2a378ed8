r"""Bridge with potential :math:`v = \sum_j a_j N(r_j, \epsilon S_j)`: source, units, closed forms for the rest."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.data import Units
from pyro_sb.bridges.light.laws import FixedMixture, MixtureLaws, Plan, condition_mixture
from pyro_sb.bridges.light.process import COVARIANCES, LearnedMap, MixtureParameters, MixtureProcess
from pyro_sb.bridges.proposals import HeldSources
from pyro_sb.checks import answered, broadcast, check_choice, finite, floats, number, one_time, points, whole, widths
from pyro_sb.distributions import BridgeDistribution, Draws, PathLaw
from pyro_sb.nn import embedding_config

MIN_SOURCES, MAX_SOURCES, CONTEXT_SOURCES = 256, 4096, 64  # source points that a path weight averages over
HELD_SOURCES = 1024  # the same while chains propose


class MixtureBridge(Bridge):
    r"""Bridge whose adjusted potential is a Gaussian mixture; arguments as of `LightSB`.

    In its own units it is a `MixtureProcess` with `MixtureLaws`; here are the source, the units, and what is asked of a
    `Bridge`. A subclass names its solvers, and its ``fit`` hands the data to one of them.

    Attributes:
        solvers: Ways to fit it, by name.
        default_solver: Name of the solver where none is asked for.
        asked_beta: Price of volatility as the constructor has it, ``"auto"`` where a fit is to choose it; None where
            the class has none.
        beta: Price of volatility; infinite here, where the bridge's space is the user's.
        scores: Held-out log likelihood of each beta that a fit chose among; empty where it chose none.
        learned_map: Network in place of the inverse of the Bass map; None for the exact one.
        source: The distribution that draws leave from, if it is one. It is not saved.
        fitted_to: The data and the way of the last fit in words; empty before it.
    """

    solvers: ClassVar[dict[str, Any]] = {}
    default_solver: str = ""
    asked_beta: float | str | None = None
    location: Tensor
    scale: Tensor
    source_location: Tensor
    context_location: Tensor
    context_scale: Tensor
    source_points: Tensor
    shapes = {
        "location": "d", "scale": "", "source_location": "d", "context_location": "c", "context_scale": "c",
        "source_points": "M d",
    }  # fmt: skip

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
        self.epsilon = number("epsilon", epsilon, "(0, inf)", "Write the variance of the reference over [0, 1].")
        self.dropout = number("dropout", dropout, "[0, 1)", "Write 0.1, or omit it for none.")
        self.num_components, self.hidden = whole("num_components", num_components), widths("hidden", hidden)
        self.covariance = check_choice("covariance", covariance, COVARIANCES)
        self.parameters_of = MixtureParameters(
            self.dim, self.num_components, self.context_dim, covariance, self.hidden, self.dropout, embedding
        )
        for name in MixtureBridge.shapes:
            self.register_buffer(name, torch.empty(0))
        self.beta = math.inf
        self.scores: dict[float, float] = {}
        self.learned_map: LearnedMap | None = None
        self.source: Distribution | None = None
        self._source_kind, self._source_variance = "point", 0.0
        self.fitted_to = ""

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """Marginal from a point, path from a distribution, None from draws or through a learnt inverse."""
        if self.learned_map is not None:
            return None
        return {"point": "marginal", "law": "path"}.get(self._source_kind)

    @property
    def density_hint(self) -> str:  # type: ignore[override]
        """The choice that gives draws a density."""
        if self.learned_map is not None:
            return 'After solver="alternating" its inverse is a network: fit with solver="dual".'
        return "Give a distribution as source, or omit the source; plan(x0) has an exact log_prob either way."

    @property
    def process(self) -> MixtureProcess:
        """The fitted bridge in its own units."""
        epsilon = self.epsilon / float(self.scale) ** 2
        return MixtureProcess(self.parameters_of, epsilon, self.beta, self._source_variance, self.learned_map)

    @property
    def _laws(self) -> MixtureLaws:
        """Its draws, paths and densities."""
        return MixtureLaws(self.process)

    def units(self, t: float | Tensor = 1.0) -> Units:
        """The units at time t: the centre moves from the source's mean to the target's, and the drift with it."""
        return Units(torch.lerp(self.source_location, self.location, torch.as_tensor(t).to(self.location)), self.scale)

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
        t = one_time(t)
        z, rows, shape = self.unit_rows(x0, context, 0.0)
        return answered("transport", self.units(t).back(self._laws.move(z, rows, t)).reshape(shape))

    def plan(self, x0: Tensor, context: Any = None) -> BridgeDistribution:
        r"""The law :math:`\pi(x_1 | x_0)` of the ends of bridges from given points, with an exact log_prob.

        Args:
            x0: Source points. Shape ``(*batch, dim)``.
            context: Contexts that broadcast with them.

        Returns:
            A Pyro distribution with ``batch_shape == batch``.
        """
        x0, given = points("x0", x0, self.dim, self.like()), self.check_context(context)
        if given is not None:
            shape = broadcast("x0 and context", x0.shape[:-1], given.shape[:-1])
            x0 = torch.cat([x0.expand(*shape, -1), given.expand(*shape, -1)], -1)
        return BridgeDistribution(Plan(self), x0, like=x0)

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
            >>> history = bridge.fit(torch.cat([y, 2 * y + torch.randn_like(y)], 1), solver="moments", progress=False)
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
        if x0 is None and self._source_kind != "point":
            raise ValueError("x0 must be given where the source is no point. Write condition(axes, observed, x0).")
        if isinstance(axes, str) or not isinstance(axes, Sequence | Tensor | np.ndarray):
            raise TypeError(f"axes must be a list of axes, got {axes!r}. Write [0] for the first.")
        axes = [whole("each of axes", axis, -(2**31), cure="Write [0] for the first.") for axis in axes]
        observed = finite("observed", floats("observed", observed, like))
        x0 = self.source_points[0] if x0 is None else points("x0", x0, self.dim, like)
        if x0.shape != (self.dim,):
            raise ValueError(f"x0 must be one point of shape ({self.dim},), got {tuple(x0.shape)}. Write x0[0].")
        gates, locs, covariances = self.process.potential().plan_components(self.units(0.0).to(x0))
        locs, covariances = self.units().back(locs), self.scale**2 * covariances
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
        z, rows, shape = self.unit_rows(x0, context, 0.0)
        potential, points = self.process.frozen(z, rows)
        mean, covariance = potential.plan_moments(points)
        covariance = self.scale**2 * covariance.reshape(*shape, self.dim)
        return self.units().back(mean.reshape(z.shape)).reshape(shape), covariance

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
        num_source = whole("num_source", num_source)
        z, rows, shape = self.unit_rows(x, context, 1.0)
        z0 = self.units(0.0).to(self._start(1 if self._source_kind == "point" else num_source))
        return answered("marginal_log_prob", self._given_sources(z, z0, rows).reshape(shape[:-1]))

    @torch.no_grad()
    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Optimal drift :math:`\alpha^*(t, x) = s(t, Y_t(x))` at a time t in [0, 1], both ends included."""
        t = one_time(t)
        z, rows, shape = self.unit_rows(x, context, t)
        shift = self.location - self.source_location
        return answered("drift", self.scale * self._laws.drift(t, z, rows).reshape(shape) + shift)

    @torch.no_grad()
    def volatility(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Optimal volatility :math:`\sigma^*(t, x) = \sqrt\epsilon\, (I + \nabla s(t, Y_t(x)) / \beta)`, symmetric.

        For ``beta = inf`` it is :math:`\sqrt\epsilon I`. Shapes ``(*, dim)`` to ``(*, dim, dim)``.
        """
        t = one_time(t)
        z, rows, shape = self.unit_rows(x, context, t)
        jacobian = self._laws.jacobian(t, z, rows)
        return math.sqrt(self.epsilon) * jacobian.reshape(*shape, self.dim)

    @torch.no_grad()
    def inverse_residual(self, t: Any, x: Tensor, context: Any = None) -> float:
        """Largest :math:`|X_t(Y_t(x)) - x|` relative to :math:`1 + |x|`, in the bridge's units, at a time t."""
        t = one_time(t)
        z, rows, _ = self.unit_rows(x, context, t)
        return self._laws.residual(t, z, rows)

    @torch.no_grad()
    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Paths, exact at their times: :math:`X_t = X_t(Y_t)` along Brownian bridges Y between both ends of the plan.

        They solve ``dX = drift dt + volatility dW`` without the error of a scheme.

        Returns:
            Times ``(num_steps + 1,)`` from 0 to 1, and states ``(num_steps + 1, num_paths, *batch_shape, dim)``.
        """
        context = self.check_context(context)
        num_paths, num_steps = whole("num_paths", num_paths), whole("num_steps", num_steps)
        shape = torch.Size((num_paths,)) + (torch.Size() if context is None else context.shape[:-1])
        rows = None if context is None else context.expand(*shape, -1).reshape(-1, self.context_dim)
        z = self.units(0.0).to(self._start(shape.numel()))
        times = torch.linspace(0, 1, num_steps + 1).to(z)
        path = self._laws.path(z, self._context_rows(rows), times)
        states = [self.units(0.0).back(z), *(self.units(t).back(x) for t, x in zip(times[1:], path))]
        return times, answered("paths", torch.stack(states).reshape(num_steps + 1, *shape, self.dim))

    def fixed(self, context: Any) -> FixedMixture | None:
        """The law at contexts ``(*B, context_dim)``, its network asked once; None where it has no such form.

        Gradients go to the contexts, not to the parameters.
        """
        rows = self._context_rows(self.check_context(context))
        process = self.process
        return FixedMixture(process.frozen_law(rows), self.units()) if process.factored and rows is not None else None

    @torch.no_grad()
    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Ends of bridges from source points."""
        rows, process = self._context_rows(context), self.process
        if process.factored and rows is not None:
            return self.units().back(self._laws.ends(rows))
        return self.units().back(self._laws.move(self.units(0.0).to(self._start(num)), rows))

    @torch.no_grad()
    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        r"""Ends with their marginal density from a point; from a distribution, with that of an extended path.

        The path holds M source points, the index of the one that the bridge leaves from, and its end; backwards, the
        source points are drawn from the source again. So :math:`\log q = \log \tfrac1M \sum_i \pi(x_1 | x_0^{(i)})`:
        given the source points that is the exact density of the draws, for any M. One set serves all draws of a call;
        with a context, each has its own.
        """
        if self.density != "path":
            return super().draws_rows(num, context)
        z0, rows = self._sources(num, context), self._context_rows(context)
        chosen = z0[torch.randint(len(z0), (num,), device=z0.device)] if rows is None else z0[:, 0]
        z1 = self._laws.move(chosen, rows)
        return Draws(self.units().back(z1), self._given_sources(z1, z0, rows))

    @torch.no_grad()
    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """As the ``log_q`` of `draws_rows`, with new source points. One set serves all rows without a context."""
        if self.density != "path":
            return super().redraw_rows(x, context)
        z1 = self.units().to(x.to(self.location))
        return self._given_sources(z1, self._sources(len(x), context), self._context_rows(context))

    def proposal_law(self) -> PathLaw:
        """The bridge, or where its draws share source points, `HeldSources`: those held, with a marginal density."""
        if self.density != "path" or self.context_dim:
            return self
        return HeldSources(self, self._start(HELD_SOURCES))

    def _sources(self, num: int, context: Tensor | None) -> Tensor:
        """Source points of path weights in the bridge's units: ``(M, dim)``, or with contexts ``(num, M, dim)``."""
        if context is None:
            return self.units(0.0).to(self._start(min(max(num, MIN_SOURCES), MAX_SOURCES)))
        return self.units(0.0).to(self._start(num * CONTEXT_SOURCES)).unflatten(0, (num, CONTEXT_SOURCES))

    def _given_sources(self, z1: Tensor, z0: Tensor, rows: Tensor | None) -> Tensor:
        """Log density of ends given the source points, in the user's units."""
        self.check_exact()
        return self._laws.mean_log_prob(z1, z0, rows) - self.dim * self.scale.log()

    @torch.no_grad()
    def log_prob_from(self, x: Tensor, x0: Tensor) -> Tensor:
        r"""Log of the plan's density averaged over source points, :math:`\log \tfrac1M \sum_i \pi(x | x_0^{(i)})`.

        Args:
            x: Points. Shape ``(num, dim)``.
            x0: Source points, the same for all. Shape ``(M, dim)``.

        Returns:
            Shape ``(num,)``. Without context alone.
        """
        units = self.units(), self.units(0.0)
        return self._given_sources(units[0].to(x.to(self.location)), units[1].to(x0.to(self.location)), None)

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density of points, from a point as source."""
        if self.density != "marginal":
            return super().log_prob_rows(x, context)
        rows, process = self._context_rows(context), self.process
        if process.factored and rows is not None:
            z = self.units().to(x.to(self.location))
            return self._laws.end_log_prob(z, rows) - self.dim * self.scale.log()
        return self.plan_log_prob_rows(x, self.source_points.expand(len(x), -1), context)

    def plan_log_prob_rows(self, x: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log density of the plan, by change of variables through the Bass map.

        .. math:: \log \pi(x | x_0) = \log \pi(y | y_0) - \log\det(I + \nabla s(1, y) / \beta),\quad y = Y_1(x),\;
            y_0 = Y_0(x_0)
        """
        self.check_exact()
        z1, z0 = self.units().to(x.to(self.location)), self.units(0.0).to(x0)
        return self._laws.plan_log_prob(z1, z0, self._context_rows(context)) - self.dim * self.scale.log()

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

    def get_extra_state(self) -> dict[str, Any]:
        """Kind and variance of the source, words on the fit, and with a price of volatility that and what chose it."""
        state = {
            "source_kind": self._source_kind,
            "source_variance": self._source_variance,
            "fitted_to": self.fitted_to,
        }
        if self.asked_beta is None:
            return state
        return state | {"beta": self.beta, "learned": self.learned_map is not None, "scores": self.scores}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back; a distribution must be given again."""
        self._source_kind, self._source_variance = state["source_kind"], state["source_variance"]
        self.fitted_to = state.get("fitted_to", "")
        if self.asked_beta is not None:
            self.beta, self.scores = state["beta"], state["scores"]
            self.learned_map = LearnedMap(self.dim).to(self.location) if state["learned"] else None

    def describe_lines(self) -> list[str]:
        """Components, and what the bridge was fitted on: for `repr`."""
        numbers = f"{self.num_components} {self.covariance} components, epsilon {self.epsilon:g}"
        return [numbers, *super().describe_lines()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "location")
        if isinstance(saved, Tensor):
            self.to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def adopt(
        self, source: Any, units: Units, mean: Tensor, variance: float, deviations: Tensor, contexts: Any
    ) -> None:
        """Take what was read from the data.

        Args:
            source: A distribution, draws or a point as rows ``(n, dim)``, or None for the point at the target's mean.
            units: Those of the target.
            mean: Of the source. Shape ``(dim,)``.
            variance: Of the source, averaged over the axes, in the bridge's units.
            deviations: The target's standard deviations, in the bridge's units. Shape ``(dim,)``.
            contexts: Mean and standard deviation of the contexts. Shape ``(context_dim,)``.
        """
        self.to(units.location)
        self.location, self.scale = units
        self.source_location, self._source_variance = mean, variance
        self.parameters_of.measure(deviations)
        self.context_location, self.context_scale = contexts
        self.source = source if isinstance(source, Distribution) else None
        if self.source is not None:
            self.source_points, self._source_kind = units.location.new_empty(0), "law"
        else:
            points = units.location[None] if source is None else source.clone()  # the user's array may change
            self.source_points, self._source_kind = points, "point" if len(points) == 1 else "draws"

    def _start(self, num: int) -> Tensor:
        """Source points in the user's units."""
        if self._source_kind == "point":
            return self.source_points.expand(num, -1)
        if self._source_kind == "draws":
            index = torch.randint(len(self.source_points), (num,), device=self.location.device)
            return self.source_points[index]
        if self.source is None:
            raise RuntimeError(
                "a loaded bridge must be given its source, which was a distribution and is not saved. "
                "Write bridge.source = ..., or use transport(x0) or plan(x0)."
            )
        return self.source.sample((num,)).to(self.location)

    def unit_rows(self, x: Any, context: Any, t: float) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Points at time t and contexts, broadcast, as flat rows in the bridge's units; the points' shape before."""
        x, context, shape = self.flat_rows(x, context)
        return self.units(t).to(x), self._context_rows(context), shape

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.context_location) / self.context_scale

    def check_exact(self) -> None:
        """Refuse densities through a learnt inverse."""
        if self.learned_map is not None:
            raise NotImplementedError(f"{self.describe()} has no density. {self.density_hint}")
