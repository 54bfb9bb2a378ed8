"""Any bridge with the target's own power tails: a marginal transform around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints

from pyro_sb.bridges.base import Bridge, class_named
from pyro_sb.bridges.data import read_source, read_target
from pyro_sb.bridges.options import check_names
from pyro_sb.bridges.proposals import MappedLaw
from pyro_sb.bridges.tails.fit import quantile, tail_index
from pyro_sb.checks import finite, floats, number, one_time, points
from pyro_sb.distributions import Draws, PathLaw
from pyro_sb.files import checkpoint_path
from pyro_sb.ops.tails import curvature, gaussian_tail, log_derivative, power_tail
from pyro_sb.training import FitHistory

NORMAL_QUARTILE = 0.6744897501960817


class TailTransform(Transform):
    r"""Bijection of vectors that gives each coordinate power tails, :math:`x_i = a_i + s_i\, \psi_{\nu_i}(z_i)`.

    :math:`\psi` is `pyro_sb.ops.tails.power_tail`. Its inverse makes power tails of the stated index sub-Gaussian.

    Args:
        loc: Location a, what 0 becomes. Shape ``(d,)``.
        scale: Scale s, the slope at 0; positive. Shape ``(d,)``.
        lower: Index of the tails below ``loc``, positive; ``inf`` leaves that side affine. Shape ``(d,)``.
        upper: The same above ``loc``. Shape ``(d,)``.
        cache_size: As in `torch.distributions.Transform`.

    Example:
        >>> transform = TailTransform(torch.zeros(2), torch.ones(2), torch.full((2,), 3.0), torch.full((2,), 3.0))
        >>> x = transform(torch.tensor([0.5, 4.0]))
        >>> x, transform.inv(x)
        (tensor([ 0.5106, 24.8673]), tensor([0.5000, 4.0000]))
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        loc = floats("loc", loc)
        scale, lower, upper = (floats(n, v, loc) for n, v in (("scale", scale), ("lower", lower), ("upper", upper)))
        finite("loc", loc)
        for name, value in (("scale", scale), ("lower", lower), ("upper", upper)):
            if value.shape != loc.shape:
                raise ValueError(f"{name} must have the shape of loc, {tuple(loc.shape)}, got {tuple(value.shape)}.")
            if not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive, got {value.tolist()}. Write inf for the index of no tail.")
        self.loc, self.scale, self.lower, self.upper = loc, scale, lower, upper

    def with_cache(self, cache_size: int = 1) -> "TailTransform":
        """The same map, which remembers its last value."""
        return TailTransform(self.loc, self.scale, self.lower, self.upper, cache_size)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log determinant at ``x``, before the map. Shape ``(*,)``."""
        return self.log_slope(x).sum(-1)

    def log_slope(self, z: Tensor) -> Tensor:
        r"""Logarithm of :math:`dx_i / dz_i`. Shape ``(*, d)``."""
        return log_derivative(z, self.lower, self.upper) + self.scale.log()

    def curvature(self, z: Tensor) -> Tensor:
        r"""The ratio :math:`\frac{d^2 x_i}{d z_i^2} \big/ \frac{d x_i}{d z_i}`. Shape ``(*, d)``."""
        return curvature(z, self.lower, self.upper)

    def __repr__(self) -> str:
        tails = [" ".join(f"{v:.3g}" for v in side[:8].tolist()) for side in (self.lower, self.upper)]
        more = " ..." if len(self.lower) > 8 else ""
        return f"TailTransform(dim={len(self.loc)}): tails of index {tails[0]}{more} below, {tails[1]}{more} above"

    def _call(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.loc.shape[-1]:
            raise ValueError(f"x must have shape (*, {len(self.loc)}), got {tuple(x.shape)}.")
        return self.loc + self.scale * power_tail(x, self.lower, self.upper)

    def _inverse(self, y: Tensor) -> Tensor:
        return gaussian_tail((y - self.loc) / self.scale, self.lower, self.upper)


class TailMatched(Bridge):
    r"""Any bridge between laws whose tails were made Gaussian, coordinate by coordinate, and mapped back.

    With :math:`T_i(z_i) = a_i + s_i\, \psi_{\nu_i}(z_i)`, `TailTransform`, and an inner bridge fitted from
    :math:`T^{-1}(x_0)` to :math:`T^{-1}(x_1)`,

    .. math:: x_t = T(z_t), \qquad \log q(x) = \log q_z(T^{-1}(x)) - \sum_i \log T_i'(z_i), \qquad
        b_i(t, x) = T_i' b^z_i + \tfrac12 T_i'' (\sigma \sigma^\top)_{ii}, \quad \sigma(t, x) = T' \sigma^z .

    A bridge to a mixture of normals, a network that starts from a normal, has sub-Gaussian ends: against a target of
    power tails its weights are unbounded, however well the body fits. Here the tails are the target's, as a Student-t
    coordinate becomes normal but for a factor that grows linearly. The density is the inner one's, and as exact.
    The path law is the Schrödinger bridge in z: its reference is the inner one's seen through T.

    **When it does not help.** A wrong index is a wrong tail: too large an index leaves the weights unbounded, too
    small a one costs a little. The choice of ``"auto"`` needs some thousands of draws (`tail_index` says how many),
    and takes a tail for light where they do not tell. Marginal transforms do not match how extremes of coordinates
    go together: the angles of a multivariate t far out are the inner bridge's affair. Nor do they help bounded or
    light-tailed targets, where T is affine. A context does not change the transform: the tail of each conditional is
    taken from that of the marginal.

    **Few components inside make the better tail**: the outermost one alone reaches it, and of many it is fitted to a
    handful of draws. Take 1 to 3 in one dimension where the tail matters (see ``benchmarks/light/tails.py``).

    Args:
        bridge: The inner bridge; it is fitted in place.
        df: Index of the tails: ``"auto"`` from the draws by `tail_index`; a positive number or tensor ``(dim,)``
            (Student-t targets: their degrees of freedom; ``inf`` for light tails); or a pair of such for the lower
            and upper side.
        fraction: Part of the draws on a side that ``"auto"`` reads, in (0, 1/2].

    Attributes:
        bridge: The inner bridge, in z.
        loc: Medians a. Shape ``(dim,)``.
        scale: Scales s, with which the distance of the quartiles is that of a standard normal's in z; the standard
            deviation where they coincide. Shape ``(dim,)``.
        lower: Indices in use below the medians. Shape ``(dim,)``.
        upper: Indices in use above them. Shape ``(dim,)``.

    References:
        Bounds on normal approximations to Student's and the chi-square distributions (Wallace, 1959), for the map.
        Tails of Lipschitz triangular flows (Jaini et al., 2020), https://arxiv.org/abs/1907.04481, for why a
        Lipschitz map of a normal cannot have such tails.

    Example:
        >>> from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
        >>> bridge = TailMatched(KernelLangevinBridge(2, scheme="plain", num_steps=3), df=3.0)
        >>> history = bridge.fit(torch.distributions.StudentT(3.0).sample((500, 2)), progress=False)
        >>> value, log_q = bridge().draws((5,))
        >>> value.shape, log_q.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    loc: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor
    shapes = {"loc": "d", "scale": "d", "lower": "d", "upper": "d"}

    def __init__(self, bridge: Bridge, *, df: Any = "auto", fraction: float = 0.05) -> None:
        if not isinstance(bridge, Bridge):
            raise ValueError(f"bridge must be a Bridge, got {type(bridge).__name__}. Write TailMatched(LightSB(2)).")
        super().__init__(bridge.dim, context_dim=bridge.context_dim)
        self.fraction = number("fraction", fraction, "(0, 0.5]", "Omit it for 0.05.")
        for side in _sides(df):
            _check_index(side, self.dim)
        self.bridge, self.df = bridge, df
        self._source: Distribution | None = None
        for name in TailMatched.__annotations__:
            self.register_buffer(name, torch.empty(0))

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """The inner bridge's."""
        return self.bridge.density

    @property
    def density_hint(self) -> str:  # type: ignore[override]
        """The inner bridge's."""
        return self.bridge.density_hint

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: as the inner bridge's."""
        return self.bridge.has_rsample

    @property
    def transform(self) -> TailTransform:
        """The fitted map from z to x; an error before ``fit``."""
        self.like()
        return TailTransform(self.loc, self.scale, self.lower, self.upper)

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        tail_draws: int = 20_000,
        **options: Any,
    ) -> FitHistory:
        """Fit the transform to the target's marginals, then the inner bridge to what it makes of the target.

        Args:
            target: Draws ``(N, dim)``, or a distribution; the inner bridge then draws from it as it needs.
            source: Draws or a distribution in the coordinates of x. Omitted: the inner bridge's own, in z.
            context: Passed to the inner bridge.
            weights: Non-negative weights of the draws. Shape ``(N,)``.
            progress: Passed to the inner bridge.
            checkpoint: Path to save the whole bridge to when it is fitted.
            tail_draws: Draws of a distribution that its median, quartiles and tails are read from.
            **options: The inner bridge's options of ``fit``.

        Returns:
            The inner bridge's record.
        """
        check_names(f"{type(self).__name__}.fit", options, self.fit_options())
        checkpoint = checkpoint_path(checkpoint)
        read = read_target(
            self.dim,
            self.context_dim,
            target,
            context=context,
            weights=weights,
            num_law_draws=tail_draws,
            held_out=options.get("held_out", 0.0),
        )
        transform = self._match(read.points, read.shares)
        start = self._to_inner(source, transform, read.points)
        history = self.bridge.fit(
            transform.inv(read.points) if read.law is None else _transformed(read.law, transform),
            start,
            context=read.context,
            weights=read.weights,
            progress=progress,
            **options | ({"held_out": read.held_out} if "held_out" in options else {}),
        )
        self.loc, self.scale, self.lower, self.upper = transform.loc, transform.scale, transform.lower, transform.upper
        self._source, self.fitted_to = (source if isinstance(source, Distribution) else None), read.describe(source)
        if checkpoint is not None:
            self.save(checkpoint)
        return history

    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        """Drift in x by Itô's formula, where the inner bridge has a ``volatility``. Shape of ``x``: ``(*, dim)``."""
        one_time(t)
        transform, z = self.transform, self._inverse(x)
        sigma = self._inner_volatility(t, z, context)
        correction = 0.5 * transform.curvature(z) * sigma.square().sum(-1)
        return transform.log_slope(z).exp() * (self.bridge.drift(t, z, context) + correction)

    def volatility(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        """Matrix that multiplies the noise in x. Shapes ``(*, dim)`` to ``(*, dim, dim)``."""
        z = self._inverse(x)
        return self.transform.log_slope(z).exp()[..., None] * self._inner_volatility(t, z, context)

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target. Shapes ``(*, dim)`` to ``(*, dim)``."""
        return self.transform(self.bridge.transport(self._inverse(x0), context))

    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Times ``(num_steps + 1,)`` from 0 to 1, and states ``(num_steps + 1, num_paths, *batch_shape, dim)``."""
        transform = self.transform
        times, states = self.bridge.paths(num_paths, num_steps, context)
        return times, transform(states)

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws of the inner bridge, mapped. Shape ``(num, dim)``."""
        return self.transform(self.bridge.sample_rows(num, context))

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws of the inner bridge, mapped, with its log density less the log determinant."""
        z, log_q = self.bridge.draws_rows(num, context)
        x = self.transform(z)
        return Draws(x, log_q - self.transform.log_abs_det_jacobian(z, x))

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density, where the inner bridge has one. Shapes ``(num, dim)`` to ``(num,)``."""
        z = self._inverse(x)
        return self.bridge.log_prob_rows(z, context) - self.transform.log_abs_det_jacobian(z, x)

    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The inner bridge's, at the inverse of x, less the log determinant. Shapes ``(num, dim)`` to ``(num,)``."""
        z = self._inverse(x)
        return self.bridge.redraw_rows(z, context) - self.transform.log_abs_det_jacobian(z, x.to(z))

    def proposal_law(self) -> PathLaw:
        """The inner bridge's, mapped."""
        law = self.bridge.proposal_law()
        return self if law is self.bridge else MappedLaw(law, self.transform)

    @property
    def source(self) -> Distribution | None:
        """Law that bridges leave from, in x; None where it is no distribution, or none was given after a load."""
        return self._source

    @source.setter
    def source(self, law: Distribution | None) -> None:
        self._source = law
        setattr(self.bridge, "source", None if law is None else _transformed(law, self.transform))  # noqa: B010

    def describe(self) -> str:
        """Name and inner bridge, for messages."""
        return f"TailMatched {self.bridge.describe()}"

    def like(self) -> Tensor:
        """The medians; an error before ``fit``."""
        if not len(self.loc):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.loc

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, the inner bridge as its class's name and its own."""
        inner = {"inner_class": type(self.bridge).__name__, "inner_config": self.bridge.config()}
        return inner | {"df": self.df, "fraction": self.fraction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TailMatched":
        """Build the inner bridge, then the one around it."""
        inner = class_named(config["inner_class"], Bridge, "inner_class")
        return cls(inner.from_config(config["inner_config"]), df=config["df"], fraction=config["fraction"])

    def contents(self) -> dict[str, Any]:
        """As `Bridge.contents`, where the inner bridge can be saved."""
        self.bridge.contents()
        return super().contents()

    def describe_lines(self) -> list[str]:
        """The inner bridge and the tails; then the data."""
        tails = [str(self.transform)] if self.fitted else []
        return [f"inner bridge {self.bridge.title()}", *tails, *super().describe_lines()]

    def fit_options(self) -> frozenset[str]:
        """Names of the options that ``fit`` takes, the inner bridge's among them."""
        return super().fit_options() | self.bridge.fit_options()

    @torch.no_grad()
    def _match(self, draws: Tensor, weights: Tensor) -> TailTransform:
        """The transform whose medians, quartiles and tails are those of the draws."""
        lower, upper = (
            None if _is_auto(side) else floats("df", side, draws).expand(self.dim).clone() for side in _sides(self.df)
        )
        if lower is None or upper is None:
            found = tail_index(draws, self.fraction, weights)
            lower = found.lower if lower is None else lower
            upper = found.upper if upper is None else upper
        q1, median, q3 = (quantile(draws, weights, level) for level in (0.25, 0.5, 0.75))
        edge = draws.new_full((self.dim,), NORMAL_QUARTILE)
        scale = (q3 - q1) / (power_tail(edge, upper, upper) + power_tail(edge, lower, lower))
        deviation = (weights @ (draws - median).square()).sqrt()
        scale = torch.where(scale > 0, scale, torch.where(deviation > 0, deviation, 1.0))
        return TailTransform(median, scale, lower, upper)

    def _to_inner(self, source: Any, transform: TailTransform, like: Tensor) -> Any:
        """The source in z: None, a point, draws, or a distribution that keeps its density."""
        source = read_source(source, self.dim, like)
        if source is None:
            return None
        if isinstance(source, Distribution):
            return _transformed(source, transform)
        points = transform.inv(source)
        return points[0] if len(points) == 1 else points

    def _inverse(self, x: Tensor) -> Tensor:
        return self.transform.inv(points("x", x, self.dim, self.like()))

    def _inner_volatility(self, t: Any, z: Tensor, context: Any) -> Tensor:
        volatility = getattr(self.bridge, "volatility", None)
        if volatility is None:
            raise NotImplementedError(
                f"the drift in x needs the inner bridge's noise, and {self.bridge.describe()} has no volatility(t, x). "
                "Use bridge.bridge.drift, in z, or paths()."
            )
        return volatility(t, z, context)


def _transformed(law: Distribution, transform: TailTransform) -> TransformedDistribution:
    """The law of the inverse transform of draws."""
    return TransformedDistribution(law, [transform.inv], validate_args=False)


def _is_auto(side: Any) -> bool:
    return isinstance(side, str) and side == "auto"


def _sides(df: Any) -> tuple[Any, Any]:
    """The lower and the upper index that were asked for."""
    if isinstance(df, Sequence) and not isinstance(df, str):
        if len(df) != 2:
            raise ValueError(f"df must be one index or a pair (lower, upper), got {len(df)}. Write a tensor (dim,).")
        return df[0], df[1]
    return df, df


def _check_index(side: Any, dim: int) -> None:
    if _is_auto(side):
        return
    if isinstance(side, str):
        raise ValueError(f'df must be "auto", a number, a tensor or a pair of those, got {side!r}.')
    value = floats("df", side)
    if value.shape not in ((), (dim,)) or not bool((value > 0).all()):
        raise ValueError(f"df must be positive, a number or ({dim},) of them, got {side}. Write inf for no tail.")
