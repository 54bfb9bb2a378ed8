"""Draws with a scaled affinity between them: the transition law that a Langevin bridge steps with."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge, as_draws
from pyro_sb.bridges.langevin.schemes import Dynamics
from pyro_sb.bridges.langevin.setup import (
    Bandwidths,
    check_metric,
    choose_bandwidth,
    choose_conditional_bandwidths,
    make_keys,
    metric_factor,
    solve,
    whiten,
)
from pyro_sb.ops.attention import Transitions
from pyro_sb.ops.sinkhorn import SymmetricScaling


class AffinityBridge(Bridge):
    r"""The static half of `KernelLangevinBridge`: fitted draws with their transition law, given a context or not.

    Its arguments and attributes are documented there. A subclass says how to walk: it scales the affinities by
    ``_scale`` in its ``fit``, and adds ``sample_rows``, ``transport``, ``paths`` and ``drift``.
    """

    points: Tensor
    weights: Tensor
    log_v: Tensor
    location: Tensor
    metric_cholesky: Tensor
    context_points: Tensor
    context_location: Tensor
    context_scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        epsilon: float | None = None,
        context_epsilon: float | None = None,
        metric: str | Tensor = "covariance",
        bandwidth_exponent: float = 0.0,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        for name, value in (("epsilon", epsilon), ("context_epsilon", context_epsilon)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}. Omit it for the default.")
        if context_epsilon is not None and context_dim == 0:
            raise ValueError("context_epsilon is the bandwidth of a context, got context_dim = 0. Omit one of them.")
        if not -math.inf < bandwidth_exponent <= 0:
            raise ValueError(f"bandwidth_exponent must be 0 or negative, got {bandwidth_exponent}. Write -1 / {dim}.")
        check_metric("metric", metric, dim)
        self.bandwidth_exponent, self.metric = float(bandwidth_exponent), metric
        self._asked = (epsilon, context_epsilon)
        self._bandwidths = Bandwidths(math.nan)
        for name in AffinityBridge.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self._cache: Dynamics | None = None

    @property
    def epsilon(self) -> float:
        """The bandwidth in use, ``2 eta``; in units of the metric. NaN before ``fit``."""
        return self._bandwidths.epsilon

    @property
    def context_epsilon(self) -> float | None:
        """The context's bandwidth in use; None without context."""
        return self._bandwidths.context if self.context_dim else None

    def conditional_mean(self, x: Tensor, context: Any = None) -> Tensor:
        """m(x), within the convex hull of the draws. Shapes ``(*, dim)`` to ``(*, dim)``."""
        z, y = self._rows(x, context)
        return self._unwhiten(self._dynamics().mean(z, y)).reshape(x.shape)

    def conditional_covariance(self, x: Tensor, context: Any = None) -> Tensor:
        """C(x), the covariance of the transition from x. Shapes ``(*, dim)`` to ``(*, dim, dim)``."""
        z, y = self._rows(x, context)
        factor = self.metric_cholesky
        return (factor @ self._dynamics().moments(z, y)[1] @ factor.mT).reshape(*x.shape, self.dim)

    def transition_probabilities(self, x: Tensor, context: Any = None) -> Tensor:
        """p_j(x); at the draws a Markov matrix, reversible for the weights. Shapes ``(*, dim)`` to ``(*, M)``."""
        z, y = self._rows(x, context)
        query = self._dynamics().query(z, y)
        probabilities = self._dynamics().law.probabilities(query, self._dynamics().scale(query))
        return probabilities.reshape(*x.shape[:-1], len(self.points))

    def like(self) -> Tensor:
        """The draws; an error before ``fit``."""
        if not len(self.points):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.points

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        asked = dict(zip(("epsilon", "context_epsilon"), self._asked))
        return super().config() | asked | {"metric": self.metric, "bandwidth_exponent": self.bandwidth_exponent}

    def get_extra_state(self) -> dict[str, float]:
        """The bandwidths in use."""
        return self._bandwidths._asdict()

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Take saved bandwidths."""
        self._bandwidths, self._cache = Bandwidths(**state), None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = None  # it holds tensors of the old device and dtype
        return super()._apply(*args, **kwargs)

    def _scale(
        self, points: Tensor, weights: Tensor, context: Any, progress: bool, tolerance: float | None, max_iter: int
    ) -> SymmetricScaling:
        """Whiten, choose the bandwidths, solve for the scaling; the bridge changes when all has gone well."""
        contexts, context_location, context_scale = self._read_contexts(context, points, weights)
        location, factor = weights @ points, metric_factor(self.metric, points, weights)
        z = whiten(points - location, factor)
        y = (contexts - context_location) / context_scale if self.context_dim else None
        bandwidths = self._choose(z, y, weights)
        keys = make_keys(z, y, weights, bandwidths, self.bandwidth_exponent)
        result = solve(keys, weights, bandwidths.epsilon, progress, tolerance=tolerance, max_iter=max_iter)
        self.points, self.weights, self.log_v = points, weights, result.log_v
        self.location, self.metric_cholesky, self._bandwidths, self._cache = location, factor, bandwidths, None
        self.context_points, self.context_location, self.context_scale = contexts, context_location, context_scale
        return result

    def _dynamics(self) -> Dynamics:
        """The transition law, and what else a scheme steps with; made once after ``fit``, a load or a move."""
        if self._cache is None:
            z = whiten(self.like() - self.location, self.metric_cholesky)
            y = self._standardised(self.context_points) if self.context_dim else None
            keys = make_keys(z, y, self.weights, self._bandwidths, self.bandwidth_exponent)
            law = Transitions(keys.points, z, self.log_v, keys.scale)
            self._cache = Dynamics(law, self.epsilon, pilot=keys.pilot, pilot_units=keys.units, **self._walking())
        return self._cache

    def _walking(self) -> dict[str, Any]:
        """Step size, diffusion and score of a subclass."""
        return {}

    def _choose(self, z: Tensor, y: Tensor | None, weights: Tensor) -> Bandwidths:
        """Bandwidths: those asked for, the rest from the draws."""
        epsilon, context = self._asked
        if y is not None and (epsilon is None or context is None):
            chosen = choose_conditional_bandwidths(z, y, weights)
            epsilon, context = epsilon or chosen[0], context or chosen[1]
        joint = z if y is None else torch.cat([y, z], dim=1)
        pilot = choose_bandwidth(joint, weights) if self.bandwidth_exponent else 1.0
        return Bandwidths(epsilon or choose_bandwidth(z, weights), context or 1.0, pilot)

    def _read_contexts(self, context: Any, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The draws' contexts with their mean and standard deviations; empty without context."""
        if self.context_dim == 0:
            if context is not None:
                raise ValueError(
                    "context needs context_dim > 0, got context_dim = 0. Build the bridge with context_dim."
                )
            return points.new_empty(0), points.new_empty(0), points.new_empty(0)
        if context is None:
            raise ValueError(f"context must be given for context_dim = {self.context_dim}: fit(target, context=...).")
        context = as_draws("context", context, self.context_dim, like=points)
        if len(context) != len(points):
            raise ValueError(f"context must have a row a draw, got {len(context)} for {len(points)} draws.")
        location = weights @ context
        deviation = (weights @ (context - location).square()).sqrt()
        return context, location, torch.where(deviation > 0, deviation, 1.0)

    def _rows(self, x: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
        """Points and contexts as flat rows, whitened and in units of the bandwidth."""
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (*, {self.dim}), got {tuple(x.shape)}. Put coordinates in the last axis."
            )
        x, context = x.to(self.like()), self.check_context(context)
        if context is not None:
            context = context.expand(*x.shape[:-1], self.context_dim).reshape(-1, self.context_dim)
        return whiten((x - self.location).reshape(-1, self.dim), self.metric_cholesky), self._context_rows(context)

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        """Rows of context in units of their bandwidth."""
        if context is None:
            return None
        return self._standardised(context) / math.sqrt(self._bandwidths.context)

    def _standardised(self, context: Tensor) -> Tensor:
        return (context - self.context_location) / self.context_scale

    def _unwhiten(self, z: Tensor) -> Tensor:
        return z @ self.metric_cholesky.mT + self.location
