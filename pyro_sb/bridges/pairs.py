"""Draws and contexts that a network learns from: an affine regression, and the moments of what it leaves."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_sb.bridges.ends import DrawsEnd, LawEnd, Target
from pyro_sb.bridges.units import Units, read_units
from pyro_sb.ops.regression import Affine, regress


class PairsReading(NamedTuple):
    """Data to learn from, in the user's units.

    Args:
        end: Gives minibatches of draws and standardised contexts.
        affine: The regression.
        covariance: Of what it leaves. Shape ``(dim, dim)``.
        contexts: Mean and standard deviation of the contexts. Shape ``(context_dim,)``.
        sums: Figures that tell these data from others.
        data: The data in words.
    """

    end: DrawsEnd | LawEnd
    affine: Affine
    covariance: Tensor
    contexts: tuple[Tensor, Tensor]
    sums: list[float]
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
    sums = [float(points.double().sum()), float(points.double().square().sum())]
    sums += [] if rows is None else [float(rows.double().square().sum())]
    sums += [] if shares is None else [float(shares.double().square().sum())]
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
    return PairsReading(end, affine, covariance.to(points), (location, scale), sums, read.describe(source))


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
