"""What a Gaussian-mixture bridge holds: its parameters, its source, and the units that it works in."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.ends import DrawsEnd, Ends, Wanted, read_ends, read_source
from pyro_sb.bridges.mixture_checks import Units
from pyro_sb.bridges.mixture_parameters import COVARIANCES, MixtureParameters
from pyro_sb.bridges.mixture_start import MAX_POINTS, cluster_start
from pyro_sb.nn import embedding_config, embedding_from_config
from pyro_sb.ops.bass import BassMap
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
        num_components: int = 50,
        epsilon: float = 1.0,
        *,
        context_dim: int = 0,
        covariance: str = "diagonal",
        hidden: tuple[int, ...] = (64, 64),
        dropout: float = 0.0,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
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
