"""Reconstruction errors of a codec by latent dimension, on rows that it was not fitted to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.bridges.codecs.rows import as_rows, numerical_rank
from pyro_sb.checks import as_weights, number, whole
from pyro_sb.warn import warn

SHARE = 0.95  # of the variance, that a chosen dimension explains
HELD_OUT = 0.2
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class ReconstructionReport:
    r"""Reconstruction errors of a codec by latent dimension, on held-out rows.

    Printed, it is a table. A latent bridge cannot be better than its codec's row.

    Attributes:
        dims: Latent dimensions.
        rmse: Root mean square error of an entry, in the data's units.
        explained: Share of the variance, :math:`1 - \sum |x - \hat x|^2 / \sum |x - m|^2` with m the mean of the rows
            fitted to. At most 1; negative if worse than the mean.
        num_rows: Rows fitted to.
        num_held_out: Rows judged by.
    """

    dims: list[int]
    rmse: list[float]
    explained: list[float]
    num_rows: int
    num_held_out: int

    def choose(self, share: float = SHARE) -> int:
        """The smallest dimension that explains this share; with a warning the best, where none does."""
        share = number("share", share, "(0, 1]", "Write 0.95.")
        for dim, explained in zip(self.dims, self.explained):
            if explained >= share:
                return dim
        best = max(range(len(self.dims)), key=self.explained.__getitem__)
        warn(
            f"no latent dimension explains {share:.0%} of the held-out variance: {self.dims[best]} is best with "
            f"{self.explained[best]:.1%}. Pass more dims, lower share, or name latent_dim.",
        )
        return self.dims[best]

    def __str__(self) -> str:
        lines = [f"latent_dim  rmse (held out)  variance explained   [{self.num_rows} + {self.num_held_out} rows]"]
        lines += [f"{d:10d}  {e:15.4g}  {s:17.1%}" for d, e, s in zip(self.dims, self.rmse, self.explained)]
        return "\n".join(lines)


def reconstruction_report(
    x: Any,
    codec: Callable[[int], Codec],
    *,
    dims: Sequence[int] | None = None,
    weights: Any = None,
    held_out: float = HELD_OUT,
    stop_at: float | None = None,
    progress: bool = True,
    **options: Any,
) -> ReconstructionReport:
    """Fit a codec at each latent dimension and measure what it loses on rows held out.

    Args:
        x: Rows ``(N, data_dim)``.
        codec: From a latent dimension to a codec to fit: a class, as `PCACodec`, or a function.
        dims: Latent dimensions, each at most the data's rank. Omitted: 1, 2, 3, 4, 6, 8, 12, 16, ... and the rank.
        weights: Non-negative weights of the rows; rows of weight 0 are left out. Shape ``(N,)``.
        held_out: Share of the rows that are judged by, in (0, 1); a random one.
        stop_at: Leave out the dimensions after the first that explains this share.
        progress: Show the codecs' bars.
        **options: Of the codec's ``fit``.

    Returns:
        The table; ``report.choose()`` gives a dimension.

    Example:
        >>> from pyro_sb.bridges.codecs.pca import PCACodec
        >>> rows = torch.randn(400, 3) @ torch.randn(3, 8) + 0.01 * torch.randn(400, 8)
        >>> reconstruction_report(rows, PCACodec, dims=(1, 2, 3, 4)).choose()
        3
    """
    rows = as_rows(x)
    weights = as_weights(weights, rows)
    rows, weights = rows[weights > 0], weights[weights > 0]
    test, seen = parted(rows, held_out)
    rank = numerical_rank(rows[seen])
    if dims is None:
        dims = [k for k in GRID if k < rank] + [rank]
    if isinstance(dims, str) or not hasattr(dims, "__iter__") or not len(list(dims)):
        raise ValueError(f"dims must name latent dimensions, got {dims!r}. Omit them.")
    dims = sorted({whole("each of dims", dim, cure="Omit them.") for dim in dims})
    stop_at = None if stop_at is None else number("stop_at", stop_at, "(0, 1]", "Write 0.95.")
    report = ReconstructionReport([], [], [], len(seen), len(test))
    share, mean = weights[test] / weights[test].sum(), weights[seen] @ rows[seen] / weights[seen].sum()
    total = float(share @ (rows[test] - mean).square().sum(1))
    for dim in dims:
        made = codec(dim)
        made.fit(rows[seen], weights=weights[seen], progress=progress, **options)
        with torch.no_grad():
            back = made.decode(made.encode(rows[test]))
        error = float(share @ (rows[test] - back).square().sum(1))
        if not error < float("inf"):
            raise ValueError(f"reconstructions must be finite, got {error} at latent_dim = {dim}. Rescale the rows.")
        report.dims.append(dim)
        report.rmse.append((error / rows.shape[1]) ** 0.5)
        report.explained.append(1 - error / total if total > 0 else float(error == 0))
        if stop_at is not None and report.explained[-1] >= stop_at:
            break
    return report


def parted(rows: Tensor, held_out: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Random indices of the rows to judge by, and of those to fit to."""
    held_out = number("held_out", held_out, "(0, 1)", f"Write {HELD_OUT}.")
    num = round(held_out * len(rows))
    if num < 1 or len(rows) - num < 2:
        raise ValueError(
            f"held_out must leave rows on both sides, got {held_out} of {len(rows)}. Write {HELD_OUT}, or add rows."
        )
    order = torch.randperm(len(rows), device=rows.device)
    return order[:num], order[num:]


def choose_dim(
    rows: Tensor, weights: Tensor, codec: Callable[[int], Codec], progress: bool, share: float = SHARE, **options: Any
) -> int:
    """The dimension that the report of these rows chooses."""
    report = reconstruction_report(rows, codec, weights=weights, stop_at=share, progress=progress, **options)
    return report.choose(share)
