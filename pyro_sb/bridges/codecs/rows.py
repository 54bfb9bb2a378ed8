"""Rows of data or latents: their shape and rank."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sb.checks import finite, floats

UNITS = 3.0  # of rounding, that a direction must exceed


def as_rows(x: Any) -> Tensor:
    """Rows ``(N, d)`` of finite floating numbers, at least two."""
    rows = floats("x", x)
    if rows.dim() != 2 or len(rows) < 2 or not rows.shape[1]:
        raise ValueError(
            f"a codec is fitted on rows of shape (N, data_dim), N at least 2, got {tuple(rows.shape)}. "
            "Flatten each row."
        )
    bad = int((~torch.isfinite(rows)).any(1).sum())
    if bad:
        raise ValueError(f"rows must be finite, got NaN or infinity in {bad} of {len(rows)}. Remove them.")
    return rows.detach()


def shaped(name: str, x: Any, size: int | None, *, check: bool = True) -> Tensor:
    """The tensor, if its last axis has this size; ``check``: and if it is finite."""
    x = finite(name, floats(name, x), in_chains=True) if check else floats(name, x)
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape (*, {size}), got {tuple(x.shape)}.")
    return x


def numerical_rank(rows: Tensor) -> int:
    """Rank of centred rows up to rounding: each column in units of the last place of its largest number."""
    exact = rows.double()
    unit = torch.finfo(rows.dtype).eps * exact.abs().amax(0)
    values = torch.linalg.svdvals((exact - exact.mean(0)) / torch.where(unit > 0, unit, 1.0))
    return int((values > UNITS * sum(math.sqrt(n) for n in rows.shape)).sum())


def advice(rank: int) -> str:
    """Advice where more latents are asked for than there are directions."""
    if rank == 0:
        return "Rows vary by no more than their rounding: subtract offsets, rescale, or pass float64"
    return f"Write latent_dim={rank} or fewer"


def check_rank(latent_dim: int, rows: Tensor) -> None:
    """Refuse more latents than the data have directions."""
    if latent_dim > min(rows.shape) or latent_dim > numerical_rank(rows):
        rank = numerical_rank(rows)
        raise ValueError(
            f"latent_dim must be at most the data's rank, got {latent_dim} for {len(rows)} rows of {rows.shape[1]} "
            f"numbers with numerical rank {rank}. {advice(rank)}, and drop constant columns where a density is needed."
        )
