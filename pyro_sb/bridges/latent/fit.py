"""Fit of a latent bridge: latents of both ends, and the files of an unfinished fit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.codecs.base import Codec, check_pair, encoded
from pyro_sb.bridges.codecs.rows import advice, numerical_rank, shaped
from pyro_sb.bridges.data import read_source
from pyro_sb.checks import as_draws, floats
from pyro_sb.files import checkpoint_path, read_file, write_file
from pyro_sb.fingerprint import fingerprint
from pyro_sb.training import random_state, set_random_state


def target_size(target: Any) -> int:
    """Size of the target's events; 1 where it has none, for the reading to refuse."""
    if isinstance(target, Distribution):
        return target.event_shape[0] if len(target.event_shape) == 1 else 1
    shape = floats("target", target).shape
    return int(shape[1]) if len(shape) == 2 else 1


def latent_rows(codec: Codec, draws: Tensor) -> Tensor:
    """The target's latents ``(N, latent_dim)``; refused where the codec does not fit the draws, or some say nothing."""
    z = check_pair(codec, shaped("target", draws, codec.data_dim))
    still = z.amax(0) - z.amin(0) <= 10 * torch.finfo(z.dtype).eps * z.abs().amax(0)
    if bool(still.any()):
        raise ValueError(
            f"latents must vary along every axis, got constant latents {still.nonzero().flatten().tolist()} of "
            f"{z.shape[1]} on {len(z)} rows. Lower latent_dim, or train the encoder so that it uses them."
        )
    rank = numerical_rank(z)
    if rank < min(z.shape[1], len(z) - 1):  # few rows say little of the rank
        raise ValueError(
            f"latent_dim must be at most the data's rank, got {z.shape[1]} latents with numerical rank {rank} on "
            f"{len(z)} rows. {advice(rank)}, or fit the codec on rows like these."
        )
    return z


def latent_source(codec: Codec, source: Any, like: Tensor, num_law_draws: int) -> Any:
    """The source in the latent space: None, a point, draws, or a distribution that keeps its density."""
    if source is None:
        return None
    source = read_source(source, like.shape[1], like)
    if isinstance(source, Distribution):
        if codec.bijective:
            return encoded(source, codec)
        source = as_draws("source", source, like.shape[1], num_draws=num_law_draws, like=like)
    points = check_pair(codec, source, "rows of the source")
    return points[0] if len(points) == 1 else points


class Parts:
    """The files of one fit.

    Args:
        checkpoint: Where the whole bridge will be; None: nothing is kept.
    """

    def __init__(self, checkpoint: str | Path | None) -> None:
        path = checkpoint_path(checkpoint)
        self.codec = None if path is None else path.with_name(path.name + ".codec")
        self.inner = None if path is None else path.with_name(path.name + ".inner")
        self.start, self.name, self.device = random_state(), "", torch.device("cpu")
        self.saved: dict[str, Any] | None = None
        if self.codec is not None and self.codec.exists():
            self.saved = read_file(self.codec, map_location="cpu")

    def begin(self) -> None:
        """Torch's random state as the fit that was cut short began with: its draws of a distribution come again."""
        if self.saved is not None:
            self.start = self.saved["start"]
            set_random_state(self.start)

    def known_by(self, codec: Codec, draws: Tensor, *others: Any) -> None:
        """Key of this fit: the codec's class and options, and the figures of draws and others."""
        self.device = draws.device
        self.name = fingerprint(type(codec).__name__, codec.config(), draws, others)

    def restore(self, codec: Codec, learns: bool) -> bool:
        """Whether this fit was cut short; the codec and torch's random state are then as it had them.

        Args:
            codec: It is changed, and stays on its device, or that of the draws.
            learns: Whether the codec is to be fitted; one that is not must be the saved one.
        """
        if self.saved is None:
            return False
        device = codec.location.device if codec.fitted else self.device
        state = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.saved["state"].items()}
        if self.saved["name"] != self.name or not (learns or _equal(codec.state_dict(), state)):
            raise ValueError(
                f"checkpoint must be of this fit to go on from, got that of other data, codec or codec options in "
                f"{self.codec}. Delete it, or write another path."
            )
        codec.load_state_dict(state)
        set_random_state(self.saved["random"])
        return True

    def keep(self, codec: Codec) -> None:
        """Write the fitted codec."""
        if self.codec is None:
            return
        state = {"name": self.name, "state": codec.state_dict(), "start": self.start, "random": random_state()}
        write_file(state, self.codec)

    def clear(self) -> None:
        """Remove both files."""
        for path in (self.codec, self.inner):
            if path is not None:
                path.unlink(missing_ok=True)


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states on one device hold the same tensors."""
    ours, theirs = ({k: v for k, v in state.items() if isinstance(v, Tensor)} for state in (one, other))
    return ours.keys() == theirs.keys() and all(
        v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in ours.items()
    )
