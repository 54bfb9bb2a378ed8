"""A user's own encoder and decoder as a codec."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.bridges.codecs.rows import shaped
from pyro_sb.checks import flag, whole
from pyro_sb.training import FitHistory


class PairCodec(Codec):
    r"""Any encoder and decoder: modules (whose parameters become the codec's) or functions of tensors.

    It counts as fitted: train the pair beforehand, on these data or on others. Modules are put into eval mode, and data
    into the dtype of their parameters. In a bijective pair of up to 50 axes ``log_abs_det`` is held against autograd.

    Args:
        encode: ``(n, data_dim)`` to ``(n, latent_dim)``.
        decode: ``(n, latent_dim)`` to ``(n, data_dim)``.
        data_dim: Size of the data.
        latent_dim: Size of the latents.
        bijective: Whether ``decode`` inverts ``encode``, so that densities pass. It asks for equal sizes.
        log_abs_det: Of a bijective pair: latents ``(n, d)`` to :math:`\log |\partial x / \partial z|`, ``(n,)``.

    Example:
        >>> codec = PairCodec(torch.log, torch.exp, 2, 2, bijective=True, log_abs_det=lambda z: z.sum(-1))
        >>> codec.decode(codec.encode(torch.tensor([[1.0, 4.0]])))
        tensor([[1., 4.]])
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        data_dim: int,
        latent_dim: int,
        *,
        bijective: bool = False,
        log_abs_det: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(encode) or not callable(decode):
            raise TypeError("encode and decode must be functions of tensors, got others. Write PairCodec(f, g, 8, 2).")
        data_dim, latent_dim = whole("data_dim", data_dim, cure=""), whole("latent_dim", latent_dim, cure="")
        super().__init__(latent_dim, data_dim=data_dim)
        if latent_dim > data_dim:
            raise ValueError(
                f"latent_dim must be at most the data's rank, which is at most data_dim, got {latent_dim} and "
                f"{data_dim}. Write a narrower encoder."
            )
        if flag("bijective", bijective) and (log_abs_det is None or data_dim != latent_dim):
            raise ValueError(
                f"a bijective pair needs log_abs_det and equal sizes, got {'one' if log_abs_det else 'none'} and "
                f"{data_dim} and {latent_dim}. Write bijective=False for a lossy pair."
            )
        self.encoder, self.decoder, self.log_determinant = encode, decode, log_abs_det
        self._bijective = bool(bijective)
        self.eval()  # dropout would make latents random, and batch norms move
        first = next(self.parameters(), torch.empty(0))
        self.register_buffer("location", torch.zeros(data_dim, dtype=first.dtype, device=first.device))

    @property
    def bijective(self) -> bool:
        """As the user says."""
        return self._bijective

    def encode(self, x: Tensor) -> Tensor:
        """The user's, its shape checked."""
        return self._answer(
            "encode", self.encoder, shaped("x", x, self.data_dim, check=False), (cast(int, self.latent_dim),)
        )

    def decode(self, z: Tensor) -> Tensor:
        """The user's, its shape checked."""
        return self._answer(
            "decode", self.decoder, shaped("z", z, self.latent_dim, check=False), (cast(int, self.data_dim),)
        )

    def log_abs_det(self, z: Tensor) -> Tensor:
        """The user's."""
        if self.log_determinant is None:
            return super().log_abs_det(z)
        return self._answer("log_abs_det", self.log_determinant, shaped("z", z, self.latent_dim, check=False), ())

    def config(self) -> dict[str, Any]:
        """The sizes alone: functions are not saved."""
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Codec":
        """Refuse: no file can rebuild a user's functions."""
        raise ValueError(
            f"a codec of your own functions cannot be rebuilt from a file, got {cls.__name__}. Build the bridge with "
            'it, then bridge.load_state_dict(torch.load(path, weights_only=True)["state"]).'
        )

    def _fit(self, rows: Tensor, weights: Tensor, progress: bool, **options: Any) -> FitHistory:
        raise NotImplementedError(
            "PairCodec has no fit: train your encoder and decoder yourself, or take an AutoencoderCodec."
        )

    def _answer(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Images of the rows of ``x`` under the function, each of this shape."""
        pair = f"encode is to map (n, {self.data_dim}) to (n, {self.latent_dim}), and decode back"
        if next(self.parameters(), None) is not None:
            x = x.to(self.location)
        rows = x.reshape(-1, x.shape[-1])
        try:
            out = function(rows)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{name} failed on shape {tuple(rows.shape)}: {error}. {pair}.") from error
        if not isinstance(out, Tensor) or out.shape != (len(rows), *shape):
            came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{name} must return shape {(len(rows), *shape)} for {tuple(rows.shape)}, got {came}: {pair}."
            )
        return out.reshape((*x.shape[:-1], *shape))
