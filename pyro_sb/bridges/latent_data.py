"""What a latent fit reads: rows of the target, its latents, and the source's."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import as_draws
from pyro_sb.bridges.codec_checks import check_pair
from pyro_sb.bridges.codec_rows import advice, numerical_rank, shaped
from pyro_sb.bridges.codec_transform import encoded
from pyro_sb.bridges.codecs import Codec
from pyro_sb.bridges.ends import read_source
from pyro_sb.bridges.mixture_checks import check_law


def target_rows(target: Any, size: int | None, num_draws: int) -> Tensor:
    """The target's draws ``(N, d)``; of this size, where the codec knows it."""
    if isinstance(target, Distribution):
        size = size or (target.event_shape[0] if len(target.event_shape) == 1 else 1)
        check_law("target", target, size)
    elif size is None:
        shape = torch.as_tensor(target).shape
        size = int(shape[1]) if len(shape) == 2 else 1
    return as_draws("target", target, size, num_draws=num_draws)


def latent_rows(codec: Codec, draws: Tensor, weights: Tensor | None = None) -> Tensor:
    """The target's latents ``(N, latent_dim)``; refused where the codec does not fit the draws, or some say nothing."""
    z = check_pair(codec, shaped("target", draws, codec.data_dim))
    still = z.amax(0) - z.amin(0) <= 10 * torch.finfo(z.dtype).eps * z.abs().amax(0)
    if bool(still.any()):
        raise ValueError(
            f"latents must vary along every axis, got constant latents {still.nonzero().flatten().tolist()} of "
            f"{z.shape[1]} on {len(z)} rows. Lower latent_dim, or train the encoder so that it uses them."
        )
    used = z if weights is None else z[weights > 0]
    rank = numerical_rank(used)
    if rank < min(z.shape[1], len(used) - 1):  # few rows say little of the rank
        raise ValueError(
            f"latent_dim must be at most the data's rank, got {z.shape[1]} latents with numerical rank {rank} on "
            f"{len(used)} rows. {advice(rank)}, or fit the codec on rows like these."
        )
    return z


def latent_source(codec: Codec, source: Any, like: Tensor, num_draws: int) -> Any:
    """The source in the latent space: None, a point, draws, or a distribution that keeps its density."""
    if source is None:
        return None
    size = like.shape[1]
    if isinstance(source, Distribution):
        check_law("source", source, size)
        if codec.bijective:
            return encoded(source, codec)
        source = source.sample((num_draws,))
    points = check_pair(codec, read_source(source, size, like), "rows of the source")
    return points[0] if len(points) == 1 else points
