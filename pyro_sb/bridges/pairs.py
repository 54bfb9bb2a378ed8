"""What a variational diffusion learns from: draws, an affine regression on their contexts, and moments of the rest."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import as_draws, as_weights
from pyro_sb.bridges.ends import DrawsEnd, LawEnd, read_context, read_held_out
from pyro_sb.bridges.units import Units, check_law, read_units
from pyro_sb.ops.regression import Affine, regress


class Rows(DrawsEnd):
    """Draws in minibatches whose place in the round can be saved."""

    def position(self) -> Tensor:
        """Indices still to come in this round."""
        return self._queue.clone()

    def seek(self, queue: Tensor) -> None:
        """Go to a saved place."""
        self._queue = queue.to(self._queue.device)


class Reading(NamedTuple):
    """What was read from the data, in the user's units.

    Args:
        end: Gives minibatches of draws and standardised contexts.
        affine: The regression.
        covariance: Of what it leaves. Shape ``(dim, dim)``.
        contexts: Mean and standard deviation of the contexts. Shape ``(context_dim,)``.
        sums: Figures that tell these data from others.
    """

    end: Rows | LawEnd
    affine: Affine
    covariance: Tensor
    contexts: tuple[Tensor, Tensor]
    sums: list[float]


def read_pairs(
    dim: int,
    context_dim: int,
    target: Any,
    context: Any,
    weights: Any,
    num_draws: int,
    held_out: Any,
    embedding: nn.Module | None,
) -> Reading:
    """The draws and contexts checked, the regression made on those to learn from."""
    is_law = isinstance(target, Distribution)
    if is_law:
        check_law("target", target, dim)
        if context_dim or context is not None:
            raise ValueError("target must be draws where there is a context, got a distribution. Draw pairs first.")
        if weights is not None:
            raise ValueError("weights go with draws, got a distribution as target. Omit them.")
    points = as_draws("target", target, dim, num_draws=num_draws)
    held_out = read_held_out(held_out, None if is_law else len(points))
    row_weights = None if weights is None else as_weights(weights, points)
    if row_weights is not None:  # draws without weight are no draws
        kept = row_weights > 0
        if context is not None and len(torch.as_tensor(context)) == len(points):
            context = torch.as_tensor(context)[kept.cpu()]
        if isinstance(held_out, Tensor):
            held_out = held_out[kept.cpu()]
        points, row_weights = points[kept], row_weights[kept]
    read_units(points, row_weights)  # refuses constant axes
    rows, location, scale = read_context(context_dim, context, points, row_weights)
    item_dim = getattr(embedding, "item_dim", None)
    if rows is not None and isinstance(item_dim, int):  # exchangeable items share one scale
        raw = rows * scale + location
        location, scale = shared_units(location, scale, item_dim)
        rows = (raw - location) / scale
    sums = [float(points.double().sum()), float(points.double().square().sum())]
    sums += [] if rows is None else [float(rows.double().square().sum())]
    sums += [] if row_weights is None else [float(row_weights.double().square().sum())]
    unit = Units(torch.zeros_like(points[0]), torch.ones_like(points[0, 0]))
    end: Rows | LawEnd = LawEnd(target, unit) if is_law else Rows(points, row_weights, rows, held_out)
    if isinstance(end, Rows):
        batch, row_weights = end.all()
        points, rows = batch.points, batch.context
        if len(points) < 2:
            raise ValueError(f"at least 2 draws must be left to learn from, got {len(points)}. Hold fewer out.")
    else:
        row_weights = torch.full_like(points[:, 0], 1 / len(points))
    features = None if rows is None else summarise(embedding, rows)
    affine = regress(points, features, row_weights)
    rest = (points - affine(features)).double()
    covariance = (row_weights.double()[:, None] * rest).T @ rest
    return Reading(end, affine, covariance.to(points), (location, scale), sums)


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
    """What the regression sees of standardised contexts: an embedding's ``summary``, or all of it."""
    summary = getattr(embedding, "summary", None)
    return summary(context) if callable(summary) else context
