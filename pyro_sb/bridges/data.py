"""Data of a fit: the target and the source checked, units x = location + scale z, and minibatches of both ends."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.checks import as_draws, as_weights, finite, floats, number, whole
from pyro_sb.fingerprint import fingerprint
from pyro_sb.ops.regression import Affine, regress


class Units(NamedTuple):
    """The affine map to the bridge's units: ``(x - location) / scale``, one number for all axes.

    Args:
        location: Shape ``(dim,)``.
        scale: Positive. Shape ``()``.
    """

    location: Tensor
    scale: Tensor

    def to(self, x: Tensor) -> Tensor:
        """To the bridge's units."""
        return (x - self.location) / self.scale

    def back(self, z: Tensor) -> Tensor:
        """To the user's."""
        return self.location + self.scale * z


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

    def position(self) -> Tensor | None:
        """The draws set aside, if any: all that a fit needs to go on."""
        return None if self._judge is None else self._judge.points

    def seek(self, position: Tensor | None) -> None:
        """Take what `position` gave."""
        self._judge = None if position is None else Batch(position)


class DrawsEnd:
    """Draws, shuffled at each time round; weighted ones are chosen with replacement.

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
        """Number of draws that are learnt from."""
        return len(self._train)

    @property
    def num_draws(self) -> int:
        """Number of draws, held-out ones among them."""
        return len(self._points)

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
        """The draws held out, with their weights; all draws where nothing was."""
        rows = self._test[:num] if len(self._test) else self._train
        weights = None if self._weights is None else self._weights[rows] / self._weights[rows].sum()
        return self._rows(rows)._replace(weights=weights)

    def position(self) -> Tensor | None:
        """Indices still to come in this round."""
        return self._queue.clone()

    def seek(self, position: Tensor | None) -> None:
        """Go to a place that `position` gave."""
        assert position is not None
        self._queue = position.to(self._queue.device)

    def _rows(self, index: Tensor) -> Batch:
        return Batch(self._points[index], None if self._context is None else self._context[index])


class Ends(NamedTuple):
    """Both ends of a fit, each centred on its own mean: plans and Bass maps do not feel one side's shift."""

    source: LawEnd | DrawsEnd | PointEnd
    target: LawEnd | DrawsEnd


class Contexts(NamedTuple):
    """Standardised contexts ``(n, context_dim)``, their mean and standard deviation ``(context_dim,)``.

    Without context ``rows`` is None and the others are empty.
    """

    rows: Tensor | None
    location: Tensor
    scale: Tensor


class Target(NamedTuple):
    """Draws of the target with what belongs to them; those without weight are left out.

    Args:
        points: The draws, or some of a distribution's. Shape ``(n, dim)``.
        weights: Normalised; None where none were given. Shape ``(n,)``.
        context: As given. Shape ``(n, context_dim)``, or None.
        held_out: Share of the draws to judge by, in [0, 1), or a boolean mask ``(n,)``.
        law: The distribution, if the target is one.
    """

    points: Tensor
    weights: Tensor | None
    context: Tensor | None
    held_out: float | Tensor
    law: Distribution | None

    @property
    def shares(self) -> Tensor:
        """The weights, equal ones where none were given. Shape ``(n,)``."""
        return as_weights(None, self.points) if self.weights is None else self.weights

    def contexts(self) -> Contexts:
        """Contexts in units of their deviations; constant columns stay in their own."""
        if self.context is None:
            return Contexts(None, self.points.new_empty(0), self.points.new_empty(0))
        location = self.shares @ self.context
        deviation = (self.shares @ (self.context - location).square()).sqrt()
        constant = self.context.amin(0) == self.context.amax(0)
        deviation = torch.where(constant, 1.0, deviation)
        return Contexts((self.context - location) / deviation, location, deviation)

    def raw_contexts(self) -> Contexts:
        """Contexts as they are, under mean 0 and deviation 1."""
        if self.context is None:
            return self.contexts()
        return Contexts(self.context, torch.zeros_like(self.context[0]), torch.ones_like(self.context[0]))

    def describe(self, source: Any = None) -> str:
        """The data in words: how many draws, or which law, and the source that was given."""
        data = f"{len(self.points)} draws" if self.law is None else f"a {type(self.law).__name__}"
        if source is None:
            return f"{data}, from its own source"
        if isinstance(source, Distribution):
            return f"{data}, from a {type(source).__name__}"
        shape = floats("source", source).shape
        return f"{data}, from {f'{shape[0]} draws' if len(shape) == 2 else 'a point'}"


def read_target(
    dim: int,
    context_dim: int,
    target: Any,
    *,
    context: Any = None,
    weights: Any = None,
    num_law_draws: int,
    held_out: Any = 0.0,
) -> Target:
    """The target checked: draws or a distribution, with contexts, weights and what is held out.

    Args:
        dim: Event size.
        context_dim: Size of the context, 0 for none.
        target: Draws ``(N, dim)``, or a distribution.
        context: Of draws. Shape ``(N, context_dim)``.
        weights: Of draws, not negative. Shape ``(N,)``.
        num_law_draws: How many draws a distribution gives.
        held_out: Share in [0, 1), or a boolean mask ``(N,)``.
    """
    law = target if isinstance(target, Distribution) else None
    if law is not None:
        check_law("target", law, dim)
        if context_dim or context is not None:
            raise ValueError("target must be draws where there is a context, got a distribution. Draw pairs first.")
        if weights is not None:
            raise ValueError("weights go with draws, got a distribution as target. Pass target.sample((n,)).")
    points = as_draws("target", target, dim, num_draws=whole("num_law_draws", num_law_draws, 2))
    mask = read_held_out(held_out, None if law is not None else len(points))
    shares = None if weights is None else as_weights(weights, points)
    rows = _read_context(context_dim, context, points)
    if shares is None:
        return Target(points, None, rows, mask, law)
    kept = shares > 0  # draws without weight are no draws
    mask = mask[kept.cpu()] if isinstance(mask, Tensor) else mask
    return Target(points[kept], shares[kept], None if rows is None else rows[kept], mask, law)


def read_held_out(held_out: Any, num: int | None) -> float | Tensor:
    """A share in [0, 1), or a boolean mask of ``num`` draws that leaves some to learn from; None: no draws."""
    if np.ndim(held_out) == 0:
        return number("held_out", held_out, "[0, 1)", "Write 0.1 for a tenth of the draws.")
    mask = torch.as_tensor(np.array(held_out)) if not isinstance(held_out, Tensor) else held_out.detach().cpu()
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


def _read_context(context_dim: int, context: Any, points: Tensor) -> Tensor | None:
    """Contexts of the draws, checked; None without context."""
    if context_dim == 0:
        if context is not None:
            raise ValueError("context needs context_dim > 0, got context_dim = 0. Build the bridge with context_dim.")
        return None
    if context is None:
        raise ValueError(f"context must be given for context_dim = {context_dim}: fit(target, context=...).")
    context = as_draws("context", context, context_dim, like=points)
    if len(context) != len(points):
        raise ValueError(f"context must have a row a draw, got {len(context)} for {len(points)} draws.")
    return context


def read_source(source: Any, dim: int, like: Tensor, *, point: bool = True) -> Any:
    """The source checked: None, a distribution, draws ``(N, dim)``, or a point ``(dim,)`` as one row.

    Args:
        source: As given to ``fit``.
        dim: Event size.
        like: A tensor whose dtype and device are taken.
        point: Whether it may be one point.
    """
    if source is None:
        return None
    if isinstance(source, Distribution):
        check_law("source", source, dim)
        return source
    value = floats("source", source, like)
    if not point or value.shape != (dim,):
        return as_draws("source", source, dim, like=like)
    return finite("source", value, "Write the place that bridges leave from.").detach()[None]


def check_law(name: str, law: Distribution, dim: int) -> None:
    """Refuse a distribution whose shapes are not a bridge's."""
    if tuple(law.event_shape) != (dim,) or len(law.batch_shape):
        shapes = f"{tuple(law.batch_shape)} and {tuple(law.event_shape)}"
        raise ValueError(f"{name} must have batch and event shapes () and ({dim},), got {shapes}. Write .to_event(1).")


def read_units(draws: Tensor, weights: Tensor | None) -> tuple[Units, Tensor]:
    """Mean and root mean variance of the axes, and each axis's standard deviation in those units.

    Refused where one is constant, or 1e6 times narrower than another.
    """
    weights = torch.full_like(draws[:, 0], 1 / len(draws)) if weights is None else weights
    location = weights @ draws
    variance = weights @ (draws - location).square()
    flat = draws.amin(0) == draws.amax(0)
    if bool(flat.any()):
        raise ValueError(
            f"target must vary along every axis, got constant axes {flat.nonzero().flatten().tolist()}. "
            "Drop them: they need no bridge."
        )
    if float(variance.min()) < 1e-12 * float(variance.max()):
        narrow = int(variance.argmin())
        raise ValueError(
            f"target's covariance must be well conditioned, got standard deviations from "
            f"{float(variance.min().sqrt()):.2g} (axis {narrow}) to {float(variance.max().sqrt()):.2g}. "
            "Rescale the axes: a bridge has one epsilon for all."
        )
    return Units(location, variance.mean().sqrt()), (variance / variance.mean()).sqrt()


def check_conditioning(draws: Tensor, weights: Tensor | None) -> None:
    """Refuse draws whose covariance is singular, where components have full covariances."""
    if draws.shape[1] == 1:
        return
    if len(draws) <= draws.shape[1]:
        raise ValueError(
            f"full components need more draws than axes, got {len(draws)} draws of {draws.shape[1]} axes. "
            'Write covariance="diagonal".'
        )
    weights = torch.full_like(draws[:, 0], 1 / len(draws)) if weights is None else weights
    centred = (draws - weights @ draws).double()
    covariance = (weights.double()[:, None] * centred).T @ centred
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < 1e-10 * float(values[-1]):
        axes = vectors[:, 0].abs().topk(min(3, draws.shape[1])).indices.tolist()
        raise ValueError(
            f"target's covariance must be well conditioned for full components, got eigenvalues from "
            f"{float(values[0]):.2g} to {float(values[-1]):.2g}: axes {axes} are nearly linear in each other. "
            'Drop one, or write covariance="diagonal".'
        )


class PairsReading(NamedTuple):
    """Data to learn from, in the user's units.

    Args:
        end: Gives minibatches of draws and standardised contexts.
        affine: The regression.
        covariance: Of what it leaves. Shape ``(dim, dim)``.
        contexts: Mean and standard deviation of the contexts. Shape ``(context_dim,)``.
        digest: Text that tells these data from others.
        data: The data in words.
    """

    end: DrawsEnd | LawEnd
    affine: Affine
    covariance: Tensor
    contexts: tuple[Tensor, Tensor]
    digest: str
    data: str


def read_pairs(read: Target, embedding: nn.Module | None = None, source: Any = None) -> PairsReading:
    """The affine regression of the draws on their contexts, and the moments of what it leaves.

    Args:
        read: The target.
        embedding: Of the contexts; one with an ``item_dim`` has items that share one scale.
        source: As given to ``fit``, for the description.
    """
    points, shares = read.points, read.weights
    read_units(points, shares)  # refuses constant axes
    rows, location, scale = read.contexts()
    item_dim = getattr(embedding, "item_dim", None)
    if rows is not None and isinstance(item_dim, int):  # exchangeable items share one scale
        raw = rows * scale + location
        location, scale = shared_units(location, scale, item_dim)
        rows = (raw - location) / scale
    digest = fingerprint(points, rows, shares, read.held_out)
    unit = Units(torch.zeros_like(points[0]), torch.ones_like(points[0, 0]))
    end = LawEnd(read.law, unit) if read.law is not None else DrawsEnd(points, shares, rows, read.held_out)
    if isinstance(end, DrawsEnd):
        batch, shares = end.all()
        points, rows = batch.points, batch.context
        if len(points) < 2:
            raise ValueError(f"at least 2 draws must be left to learn from, got {len(points)}. Hold fewer out.")
    else:
        shares = torch.full_like(points[:, 0], 1 / len(points))
    features = None if rows is None else summarise(embedding, rows)
    affine = regress(points, features, shares)
    rest = (points - affine(features)).double()
    covariance = (shares.double()[:, None] * rest).T @ rest
    return PairsReading(end, affine, covariance.to(points), (location, scale), digest, read.describe(source))


def shared_units(location: Tensor, scale: Tensor, item_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that all items ``(k * item_dim,)`` share."""
    if len(location) % item_dim:
        raise ValueError(
            f"context_dim must be a multiple of the embedding's item_dim, got {len(location)} and {item_dim}."
        )
    means, deviations = location.unflatten(0, (-1, item_dim)), scale.unflatten(0, (-1, item_dim))
    centre = means.mean(0)
    spread = (deviations.square() + (means - centre).square()).mean(0).sqrt()
    return centre.repeat(len(means)), spread.repeat(len(means))


def summarise(embedding: nn.Module | None, context: Tensor) -> Tensor:
    """Standardised contexts as the regression sees them: an embedding's ``summary``, or all of it."""
    summary = getattr(embedding, "summary", None)
    return summary(context) if callable(summary) else context
