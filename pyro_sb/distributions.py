"""Law of a bridge's draws given a context, as a lazy Pyro distribution."""

from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sb.checks import answered, broadcast, points, sample_size

__all__ = [
    "BridgeDistribution",
    "Draws",
    "Law",
    "PathLaw",
]


def __dir__() -> list[str]:
    return sorted(__all__)


class Draws(NamedTuple):
    r"""Draws with the log density that corrects them.

    Attributes:
        value: The draws. Shape ``(*sample_shape, *batch_shape, dim)``.
        log_q: With it :math:`E_q[\exp(\log p(\text{value}) - \log q)]` is the normaliser of :math:`p`, exactly: the
            log density of the draw where that is known, else that of its path forwards less that of the path
            backwards given its end. Shape ``(*sample_shape, *batch_shape)``.
    """

    value: Tensor
    log_q: Tensor


class Law(Protocol):
    """A law that `BridgeDistribution` draws from: a bridge. ``context`` is flat, a row a draw; None without context."""

    dim: int
    density: str | None
    has_rsample: bool

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws, shape ``(num, dim)``; differentiable if ``has_rsample``."""
        ...

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws with their log density, ``(num, dim)`` and ``(num,)``; or an error that says which choice has one."""
        ...

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density of rows ``(num, dim)``, shape ``(num,)``; or an error that names `draws`."""
        ...


class PathLaw(Protocol):
    """A law that MCMC proposes from: draws with ``log_q``, and the ``log_q`` of given points, their paths redrawn."""

    dim: int

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws with their log density, ``(num, dim)`` and ``(num,)``."""
        ...

    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density of points ``(num, dim)``, or of paths drawn backwards from them. Shape ``(num,)``."""
        ...


class BridgeDistribution(TorchDistribution):
    r"""Law of a bridge's draws given a context: a Pyro distribution with ``event_shape == (dim,)``.

    Bridges make it: write ``bridge()`` or ``bridge(context)``. A context of shape ``(*batch, context_dim)`` gives
    ``batch_shape == batch``.

    Args:
        law: The bridge.
        context: What is conditioned on. Shape ``(*batch_shape, context_dim)``; None for an unconditional bridge.
        batch_shape: Independent copies, for plates. Omitted: that of the context.
        like: A tensor with the dtype and device of the draws.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(
        self, law: Law, context: Tensor | None = None, batch_shape: Size | None = None, *, like: Tensor
    ) -> None:
        self.law, self.context, self._like = law, context, like
        if batch_shape is None:
            batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(sample_size(batch_shape, "batch_shape"), Size((law.dim,)), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return self.law.has_rsample

    def __repr__(self) -> str:
        name = getattr(self.law, "describe", lambda: type(self.law).__name__)()
        density = {"marginal": "of the draw", "path": "of its path", None: "none"}.get(self.law.density, "none")
        batch = f", batch_shape {tuple(self.batch_shape)}" if self.batch_shape else ""
        given = " given a context" if self.context is not None else ""
        return f"BridgeDistribution: draws ({self.law.dim},) of {name}{given}{batch}, density {density}"

    def expand(self, batch_shape: Size, _instance: Any = None) -> "BridgeDistribution":
        """The same law over a larger batch."""
        context, shape = self.context, sample_size(batch_shape, "batch_shape")
        if broadcast("batch_shape and the batch", shape, self.batch_shape) != shape:
            raise ValueError(
                f"batch_shape must be one that {tuple(self.batch_shape)} expands to, got {tuple(shape)}. Write "
                f"{(2, *self.batch_shape)}."
            )
        if context is not None:
            context = context.expand(*shape, context.shape[-1])
        return BridgeDistribution(self.law, context, shape, like=self._like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradients. Shape ``(*sample_shape, *batch_shape, dim)``."""
        with torch.no_grad():
            return self._sample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with gradients, where the bridge has them."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.law).__name__} has no reparametrised draws, some choices are discrete. Use sample()."
            )
        return self._sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a point, where `Bridge.density` is "marginal". Shape of ``value`` less its last axis."""
        value = points("value", value, self.law.dim, self._like)
        shape = broadcast("value and the batch", value.shape[:-1], self.batch_shape)
        value = value.expand(*shape, self.law.dim).reshape(-1, self.law.dim)
        if not len(value):
            return value.new_empty(shape)
        return answered("log_prob", self.law.log_prob_rows(value, self._rows(shape)).reshape(shape))

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused in a guide that is being trained, where the bridge has no reparametrised draws."""
        if not self.has_rsample and torch.is_grad_enabled():
            name = type(self.law).__name__
            raise NotImplementedError(
                f"a bridge in a guide that is trained must have reparametrised draws, got {name}, where choices "
                "are discrete: its parameters would hardly move. Train it by fit() on draws; or write in the "
                "guide x = bridge.push(noise), where there is such a map; or use AutoLightBridge(model)."
            )
        return super().score_parts(x, *args, **kwargs)

    def draws(self, sample_shape: Any = ()) -> Draws:
        """Draws with the log density that corrects them, without gradients unless the bridge has them.

        The same seed gives the same draws, whatever the number of threads. Many draws are made some rows at a time: the
        first n of more need not be the n that the seed gives alone.
        """
        shape = self._batch(sample_shape)
        if not shape.numel():
            return Draws(self._like.new_empty(*shape, self.law.dim), self._like.new_empty(shape))
        with torch.set_grad_enabled(self.has_rsample and torch.is_grad_enabled()):
            value, log_q = self.law.draws_rows(shape.numel(), self._rows(shape))
        answered("draws", value), answered("log_q of draws", log_q)
        return Draws(value.reshape(*shape, self.law.dim), log_q.reshape(shape))

    def _sample(self, sample_shape: Any) -> Tensor:
        shape = self._batch(sample_shape)
        if not shape.numel():
            return self._like.new_empty(*shape, self.law.dim)
        value = self.law.sample_rows(shape.numel(), self._rows(shape)).reshape(*shape, self.law.dim)
        return answered("sample", value)

    def _batch(self, sample_shape: Any) -> Size:
        return sample_size(sample_shape) + self.batch_shape

    def _rows(self, shape: Size) -> Tensor | None:
        """The context of every draw, flat."""
        if self.context is None:
            return None
        return self.context.expand(*shape, self.context.shape[-1]).reshape(-1, self.context.shape[-1])
