"""The two ends of a bridge as givers of minibatches: draws, a distribution, or a point."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import as_draws, as_weights
from pyro_sb.bridges.units import Units, check_conditioning, check_law, read_units


class Batch(NamedTuple):
    """Points of one end ``(n, dim)``, with contexts ``(n, context_dim)`` and normalised weights ``(n,)`` if any."""

    points: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None


class PointEnd:
    """A point: one row, however many are asked for."""

    fresh = False

    def __init__(self, point: Tensor) -> None:
        self.point = point

    def batch(self, num: int) -> Batch:
        """The point."""
        return Batch(self.point)

    held_out = batch


class LawEnd:
    """A distribution: every minibatch is fresh."""

    fresh = True

    def __init__(self, law: Distribution, units: Units) -> None:
        self.law, self.units = law, units
        self._judge: Batch | None = None

    def batch(self, num: int) -> Batch:
        """Fresh draws."""
        return Batch(self.units.to(self.law.sample((num,)).to(self.units.location)))

    def held_out(self, num: int) -> Batch:
        """Draws set aside at the first call; new ones where more are asked for than ever."""
        if self._judge is None or len(self._judge.points) < num:
            self._judge = self.batch(num)
        return Batch(self._judge.points[:num])


class DrawsEnd:
    """Draws, shuffled anew each time round; weighted ones are chosen with replacement.

    What is held out is a random share of them, or those that a mask names.
    """

    fresh = False

    def __init__(
        self, points: Tensor, weights: Tensor | None, context: Tensor | None, held_out: float | Tensor
    ) -> None:
        order = torch.randperm(len(points), device=points.device)
        if isinstance(held_out, Tensor):
            held = held_out.to(points.device)[order]
            self._test, self._train = order[held], order[~held]
        else:
            num = int(held_out * len(points)) if len(points) >= 20 else 0
            self._test, self._train = order[:num], order[num:]
        self._points, self._context = points, context
        self._weights = weights
        self._queue = order[:0]

    @property
    def num_train(self) -> int:
        """How many draws are learnt from."""
        return len(self._train)

    def batch(self, num: int) -> Batch:
        """Draws to learn from, each once a round."""
        while len(self._queue) < num:
            self._queue = torch.cat([self._queue, self._round(num)])
        index, self._queue = self._queue[:num], self._queue[num:]
        return self._rows(index)

    def _round(self, num: int) -> Tensor:
        """Indices for some minibatches to come: a shuffle, or as many choices by weight as there are draws."""
        if self._weights is None:
            return self._train[torch.randperm(len(self._train), device=self._train.device)]
        count = max(num, len(self._train))  # one pass over the weights for all of them
        return self._train[torch.multinomial(self._weights[self._train], count, replacement=True)]

    def all(self) -> tuple[Batch, Tensor]:
        """All draws to learn from, with their normalised weights."""
        weights = self._points.new_ones(len(self._train)) if self._weights is None else self._weights[self._train]
        return self._rows(self._train), weights / weights.sum()

    def held_out(self, num: int) -> Batch:
        """What was held out, with its weights; all draws where nothing was."""
        rows = self._test[:num] if len(self._test) else self._train
        weights = None if self._weights is None else self._weights[rows] / self._weights[rows].sum()
        return self._rows(rows)._replace(weights=weights)

    def _rows(self, index: Tensor) -> Batch:
        return Batch(self._points[index], None if self._context is None else self._context[index])


class Ends(NamedTuple):
    """What a fit learns from, each side centred on its own mean: plans and Bass maps do not feel one side's shift."""

    source: LawEnd | DrawsEnd | PointEnd
    target: LawEnd | DrawsEnd


class Reading(NamedTuple):
    """What was read from the data.

    Args:
        ends: Both sides in the bridge's units.
        units: Those of the target.
        source_location: Mean of the source. Shape ``(dim,)``.
        source_variance: Its variance, averaged over the axes, in the bridge's units.
        deviations: The target's standard deviations, in the bridge's units. Shape ``(dim,)``.
        contexts: Mean and standard deviation of the contexts. Shape ``(context_dim,)``.
    """

    ends: Ends
    units: Units
    source_location: Tensor
    source_variance: float
    deviations: Tensor
    contexts: tuple[Tensor, Tensor]


class Wanted(NamedTuple):
    """What a bridge asks of its data: sizes, the number of components, and whether their covariances are full.

    ``raw``: contexts are left as they are, for an embedding.
    """

    dim: int
    context_dim: int
    num_components: int
    full: bool
    raw: bool = False


def read_ends(
    wanted: Wanted, target: Any, source: Any, context: Any, weights: Any, num_draws: int, held_out: float | Tensor
) -> Reading:
    """Both ends checked and in the bridge's units."""
    is_law = isinstance(target, Distribution)
    if is_law:
        check_law("target", target, wanted.dim)
        if wanted.context_dim or context is not None:
            raise ValueError("target must be draws where there is a context, got a distribution. Draw pairs first.")
        if weights is not None:
            raise ValueError("weights go with draws, got a distribution as target. Omit them.")
    points = as_draws("target", target, wanted.dim, num_draws=num_draws)
    held_out = read_held_out(held_out, None if is_law else len(points))
    row_weights = None if weights is None else as_weights(weights, points)
    if row_weights is not None and context is not None and len(torch.as_tensor(context)) == len(points):
        context = torch.as_tensor(context)[(row_weights > 0).cpu()]
    if row_weights is not None and isinstance(held_out, Tensor):
        held_out = held_out[(row_weights > 0).cpu()]
    if row_weights is not None:  # draws without weight are no draws
        points, row_weights = points[row_weights > 0], row_weights[row_weights > 0]
    if isinstance(source, Distribution):
        check_law("source", source, wanted.dim)
    elif source is not None:
        source = read_source(source, wanted.dim, points)
    units, deviations = read_units(points, row_weights)
    if wanted.full:
        check_conditioning(points, row_weights)
    rows, *contexts = read_context(wanted.context_dim, context, points, row_weights, raw=wanted.raw)
    end = LawEnd(target, units) if is_law else DrawsEnd(units.to(points), row_weights, rows, held_out)
    if isinstance(end, DrawsEnd) and end.num_train < wanted.num_components:
        raise ValueError(
            f"num_components must be at most the number of draws to learn from, got {wanted.num_components} for "
            f"{end.num_train} (of {len(points)}; {1 - end.num_train / len(points):.0%} are held out). "
            f"Write num_components={max(1, end.num_train // 10)}."
        )
    if not is_law and len(points[:4096].unique(dim=0)) < wanted.num_components > len(points.unique(dim=0)):
        raise ValueError(
            f"num_components must be at most the number of distinct draws, got {wanted.num_components} for "
            f"{len(points.unique(dim=0))}. Write fewer."
        )
    share = held_out if isinstance(held_out, float) else 0.1
    start, location, variance = _source_end(source, units, num_draws, share)
    return Reading(Ends(start, end), units, location, variance, deviations, (contexts[0], contexts[1]))


def read_held_out(held_out: Any, num: int | None) -> float | Tensor:
    """A share in [0, 1), or a boolean mask of ``num`` draws that leaves some to learn from; None: no draws."""
    if not isinstance(held_out, Tensor) and np.ndim(held_out) == 0:
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {held_out}. Write 0.1 for a tenth of the draws.")
        return float(held_out)
    mask = torch.as_tensor(held_out).detach().cpu()
    if num is None:
        raise ValueError("held_out must be a share where the target is a distribution, got a mask. Write 0.1.")
    if mask.dtype != torch.bool or mask.shape != (num,):
        raise ValueError(
            f"held_out must be a share in [0, 1) or a boolean mask of shape ({num},), got {mask.dtype} of shape "
            f"{tuple(mask.shape)}. Mark the draws to judge by."
        )
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(f"held_out must mark some draws and leave some, got {int(mask.sum())} of {num}.")
    return mask


def read_context(
    context_dim: int, context: Any, points: Tensor, weights: Tensor | None, *, raw: bool = False
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Standardised contexts of the draws, their mean and standard deviation; None and empty without context.

    Raw ones stay as they are, under mean 0 and deviation 1.
    """
    if context_dim == 0:
        if context is not None:
            raise ValueError("context needs context_dim > 0, got context_dim = 0. Build the bridge with context_dim.")
        return None, points.new_empty(0), points.new_empty(0)
    if context is None:
        raise ValueError(f"context must be given for context_dim = {context_dim}: fit(target, context=...).")
    context = as_draws("context", context, context_dim, like=points)
    if len(context) != len(points):
        raise ValueError(f"context must have a row a draw, got {len(context)} for {len(points)} draws.")
    if raw:
        return context, torch.zeros_like(context[0]), torch.ones_like(context[0])
    weights = torch.full_like(points[:, 0], 1 / len(points)) if weights is None else weights
    location = weights @ context
    deviation = (weights @ (context - location).square()).sqrt()
    constant = context.amin(0) == context.amax(0)
    deviation = torch.where(constant, 1.0, deviation)
    return (context - location) / deviation, location, deviation


def _source_end(
    source: Any, units: Units, num_draws: int, held_out: float
) -> tuple[LawEnd | DrawsEnd | PointEnd, Tensor, float]:
    """The source's end, centred on its own mean; the mean, and its variance in the bridge's units."""
    if source is None or (isinstance(source, Tensor) and len(source) == 1):
        location = units.location if source is None else source[0]
        return PointEnd(torch.zeros_like(location)[None]), location, 0.0
    draws = source.sample((num_draws,)).to(units.location) if isinstance(source, Distribution) else source
    own = Units(draws.mean(0), units.scale)
    variance = float(own.to(draws).square().mean())
    if isinstance(source, Distribution):
        return LawEnd(source, own), own.location, variance
    return DrawsEnd(own.to(draws), None, None, held_out), own.location, variance


def read_source(source: Any, dim: int, like: Tensor) -> Tensor:
    """A point ``(dim,)`` as one row, or draws ``(N, dim)``."""
    point = torch.as_tensor(source).to(like)
    if point.shape != (dim,):
        return as_draws("source", source, dim, like=like)
    if not bool(torch.isfinite(point).all()):
        raise ValueError(
            f"source must be finite, got the point {point.tolist()}. Write the place that bridges leave from."
        )
    return point[None]
