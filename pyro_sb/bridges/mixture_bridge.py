"""What all Gaussian-mixture bridges are: a potential, a source, and closed forms for the rest."""

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sb.bridges.base import check_points
from pyro_sb.bridges.conditioning import condition_mixture
from pyro_sb.bridges.fixed_mixture import FixedMixture
from pyro_sb.bridges.held_law import HeldSources
from pyro_sb.bridges.mixture_state import MixtureState
from pyro_sb.bridges.plan import Plan, chunked
from pyro_sb.distributions import BridgeDistribution, Draws, PathLaw
from pyro_sb.ops.bass import DENSE_DIM

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
            >>> from pyro_sb.bridges.light import LightSB
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
