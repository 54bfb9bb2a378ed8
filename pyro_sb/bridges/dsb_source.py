"""The source of a diffusion Schrödinger bridge, read: its moments, and what its points are drawn from."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import as_draws
from pyro_sb.bridges.dsb_half import Guide
from pyro_sb.bridges.mixture_checks import check_law
from pyro_sb.bridges.vsdm_data import Reading
from pyro_sb.ops.regression import Affine

FEW = 20  # draws of which none is held out


class SourceReading(NamedTuple):
    """What was read of the source.

    Args:
        kind: ``"moments"``, ``"law"`` or ``"draws"``.
        guide: Mean and covariance.
        deviations: Of independent normals, where the source is these. Shape ``(dim,)``, else ``(0,)``.
        points: Of draws. Shape ``(M, dim)``, else ``(0, dim)``.
        law: The distribution, if it is one.
        train: Indices of the points to learn from.
        test: Of those to judge by.
    """

    kind: str
    guide: Guide
    deviations: Tensor
    points: Tensor
    law: Distribution | None
    train: Tensor
    test: Tensor

    def sums(self) -> tuple[str, list[float]]:
        """What tells this source from others."""
        values = (self.guide.affine.location, self.guide.covariance, self.points.square())
        return self.kind, [float(value.double().sum()) for value in values]


def read_source_law(read: Reading, source: Any, dim: int, num_draws: int, held_out: Any) -> SourceReading:
    """The source checked and measured; a share of its draws is held out, a tenth where the target has a mask."""
    like = read.affine.location
    none, no_points, index = like.new_empty(0), like.new_empty(0, dim), torch.empty(0, dtype=torch.long)
    if source is None:
        variances = read.covariance.diagonal()
        guide = Guide(read.affine, variances.diag())
        return SourceReading("moments", guide, variances.sqrt(), no_points, None, index, index)
    law = source if isinstance(source, Distribution) else None
    if law is not None:
        check_law("source", law, dim)
    draws = as_draws("source", source, dim, num_draws=num_draws, like=like)
    if bool((draws == draws[0]).all()):
        raise ValueError(
            f"source must vary, got {len(draws)} equal draws. From a point take LightSB(dim).fit(target, source=point)."
        )
    centred = (draws - draws.mean(0)).double()
    guide = Guide(Affine(draws.mean(0), like.new_empty(dim, 0)), (centred.T @ centred / len(draws)).to(like))
    if law is not None:
        return SourceReading("law", guide, none, no_points, law, index, index)
    order = torch.randperm(len(draws), device=like.device)
    share = held_out if isinstance(held_out, float) else 0.1
    num = int(share * len(draws)) if len(draws) >= FEW else 0
    return SourceReading("draws", guide, none, draws, None, order[num:], order[:num])
