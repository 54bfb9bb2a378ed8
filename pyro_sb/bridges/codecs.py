"""What stands between data and latents: the contract of a codec, its checks, and a user's own pair."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from pyro_sb.bridges.base import Fitted, as_weights
from pyro_sb.training import FitHistory

ROUND_TRIP = 1e-3  # largest error of a bijection's round trip, in standard deviations of each column
LOG_DET = 0.01  # largest error of a bijection's log determinant, at NUM_CHECKED latents of up to LARGEST_JACOBIAN axes
NUM_CHECKED, LARGEST_JACOBIAN = 4, 50


class Codec(Fitted):
    r"""An encoder and a decoder between data ``(*, data_dim)`` and latents ``(*, latent_dim)``.

    **A new codec** supplies `encode`, `decode`, `_fit` and `config`; a bijective one also `log_abs_det`. What was
    fitted lives in parameters and buffers, whose shapes `_build` makes from the two sizes. A codec that is not
    bijective is lossy: draws through it have no density.

    Args:
        latent_dim: Size of the latents, at least 1; None: chosen in ``fit``.
        data_dim: Size of the data; None: read in ``fit``.

    Attributes:
        data_dim: Size of the data; None before the fit.
        latent_dim: Size of the latents; None before the fit if it was not given.
    """

    location: Tensor
    affine = False  # whether decoding is an affine map

    def __init__(self, latent_dim: int | None = None, data_dim: int | None = None) -> None:
        super().__init__()
        for name, size in (("latent_dim", latent_dim), ("data_dim", data_dim)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}. Omit it to have it found.")
        self.given_dim, self.latent_dim, self.data_dim = latent_dim, latent_dim, data_dim
        self.register_buffer("location", torch.empty(0))

    @property
    def bijective(self) -> bool:
        """Whether nothing is lost, and `log_abs_det` is known."""
        return False

    @property
    def fitted(self) -> bool:
        """Whether it can encode and decode."""
        return len(self.location) > 0

    def fit(self, x: Any, *, weights: Any = None, progress: bool = True, **options: Any) -> FitHistory:
        """Learn from rows ``(N, data_dim)``, weighted or not. Changes the codec."""
        rows = as_rows(x)
        weights = as_weights(weights, rows)
        rows, weights = rows[weights > 0], weights[weights > 0]
        if self.given_dim is not None:
            check_rank(self.given_dim, rows)
        return self._fit(rows, weights / weights.sum(), progress, **options)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of data. Shapes ``(*, data_dim)`` to ``(*, latent_dim)``."""
        raise NotImplementedError(f"{type(self).__name__} has no encode.")

    def decode(self, z: Tensor) -> Tensor:
        """Data of latents. Shapes ``(*, latent_dim)`` to ``(*, data_dim)``."""
        raise NotImplementedError(f"{type(self).__name__} has no decode.")

    @property
    def noisy(self) -> bool:
        """Whether `draw` adds noise to `decode`; a codec whose `draw` is its own is taken to, unless it answers."""
        return type(self).draw is not Codec.draw

    def draw(self, z: Tensor) -> Tensor:
        """A draw of the data given latents: `decode`, with the codec's residual noise if it has one."""
        return self.decode(z)

    def log_abs_det(self, z: Tensor) -> Tensor:
        r"""Of decoding, :math:`\log |\det \partial x / \partial z|`. Shapes ``(*, latent_dim)`` to ``(*)``."""
        raise NotImplementedError(f"{self.describe()} is lossy: no density passes through it. {self.cure()}")

    def cure(self) -> str:
        """What to use instead where a density is asked for, for messages."""
        size = self.data_dim or "data_dim"
        return f"Use sample(), or a codec that keeps all dimensions: PCACodec({size})."

    def describe(self) -> str:
        """Name and sizes, for messages."""
        return f"{type(self).__name__} ({self.data_dim} to {self.latent_dim} dimensions)"

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {"latent_dim": self.given_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Codec":
        """Build the codec that `config` describes."""
        return cls(**config)

    def get_extra_state(self) -> dict[str, Any]:
        """The sizes."""
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take saved sizes."""
        self.data_dim, self.latent_dim = state["data_dim"], state["latent_dim"]

    def _fit(self, rows: Tensor, weights: Tensor, progress: bool, **options: Any) -> FitHistory:
        raise NotImplementedError(f"{type(self).__name__} has no fit.")

    def _build(self) -> None:
        """Make what depends on the sizes."""

    def _like(self, x: Tensor) -> Tensor:
        """An error before the fit, or for a last axis that is not the data's; x in the codec's dtype."""
        self._ready()
        return shaped("x", x, self.data_dim).to(self.location)

    def _ready(self) -> None:
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call codec.fit(rows).")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # What was fitted decides the shapes, not the constructor.
        sizes, saved = state_dict.get(prefix + "_extra_state"), state_dict.get(prefix + "location")
        if isinstance(sizes, dict) and isinstance(saved, Tensor) and len(saved):
            self.set_extra_state(sizes)
            self._build()
            self.to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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
        super().__init__(latent_dim, data_dim)
        if latent_dim > data_dim:
            raise ValueError(
                f"latent_dim must be at most the data's rank, which is at most data_dim, got {latent_dim} and "
                f"{data_dim}. Write a narrower encoder."
            )
        if bijective and (log_abs_det is None or data_dim != latent_dim):
            raise ValueError(
                f"a bijective pair needs log_abs_det and equal sizes, got {'one' if log_abs_det else 'none'} and "
                f"{data_dim} and {latent_dim}. Write bijective=False for a lossy pair."
            )
        self.encoder, self.decoder, self.log_determinant = encode, decode, log_abs_det
        self._bijective = bijective
        self.eval()  # dropout would make latents random, and batch norms move
        first = next(self.parameters(), torch.empty(0))
        self.register_buffer("location", torch.zeros(data_dim, dtype=first.dtype, device=first.device))

    @property
    def bijective(self) -> bool:
        """As the user says."""
        return self._bijective

    def encode(self, x: Tensor) -> Tensor:
        """The user's, its shape checked."""
        return self._answer("encode", self.encoder, shaped("x", x, self.data_dim), (cast(int, self.latent_dim),))

    def decode(self, z: Tensor) -> Tensor:
        """The user's, its shape checked."""
        return self._answer("decode", self.decoder, shaped("z", z, self.latent_dim), (cast(int, self.data_dim),))

    def log_abs_det(self, z: Tensor) -> Tensor:
        """The user's."""
        if self.log_determinant is None:
            return super().log_abs_det(z)
        return self._answer("log_abs_det", self.log_determinant, shaped("z", z, self.latent_dim), ())

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
        """What the function makes of the rows of ``x``, each of this shape."""
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
        return out.reshape(*x.shape[:-1], *shape)


def as_rows(x: Any) -> Tensor:
    """Rows ``(N, d)`` of finite floating numbers, at least two."""
    rows = torch.as_tensor(x)
    rows = rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())
    if rows.dim() != 2 or len(rows) < 2 or not rows.shape[1]:
        raise ValueError(
            f"a codec is fitted on rows of shape (N, data_dim), N at least 2, got {tuple(rows.shape)}. "
            "Flatten each row."
        )
    bad = int((~torch.isfinite(rows)).any(1).sum())
    if bad:
        raise ValueError(f"rows must be finite, got NaN or infinity in {bad} of {len(rows)}. Remove them.")
    return rows.detach()


def shaped(name: str, x: Tensor, size: int | None) -> Tensor:
    """The tensor, if its last axis has this size."""
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape (*, {size}), got {tuple(x.shape)}.")
    return x


def numerical_rank(rows: Tensor) -> int:
    """Rank of centred rows up to rounding, which is a matrix of independent errors of ten units in the last place."""
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    rounding = 10 * torch.finfo(rows.dtype).eps * float(rows.abs().max())
    return int((values > rounding * sum(math.sqrt(n) for n in rows.shape)).sum())


def check_rank(latent_dim: int, rows: Tensor) -> None:
    """Refuse more latents than the data have directions."""
    if latent_dim > min(rows.shape) or latent_dim > numerical_rank(rows):
        raise ValueError(
            f"latent_dim must be at most the data's rank, got {latent_dim} for {len(rows)} rows of {rows.shape[1]} "
            f"numbers with numerical rank {numerical_rank(rows)}. Write latent_dim={numerical_rank(rows)} or fewer, "
            "and drop constant columns where a density is needed."
        )


@torch.no_grad()
def check_pair(codec: Codec, rows: Tensor, name: str = "rows") -> Tensor:
    """Latents of the rows; refused where shapes do not meet, a value is not finite, or a bijection is not one."""
    z = codec.encode(rows)
    back = codec.decode(z)
    shapes = f"encode made {tuple(z.shape)} of {tuple(rows.shape)}, decode made {tuple(back.shape)} of that"
    if z.shape != (len(rows), codec.latent_dim) or back.shape != rows.shape:
        raise ValueError(
            f"encode and decode must lead from (n, {codec.data_dim}) to (n, {codec.latent_dim}) and back: {shapes}."
        )
    bad = int((~torch.isfinite(z)).any(1).logical_or((~torch.isfinite(back)).any(1)).sum())
    if bad:
        raise ValueError(
            f"latents and reconstructions must be finite, got NaN or infinity in {bad} of {len(rows)} {name}. "
            "Fit the codec on data of this range, or rescale them."
        )
    if codec.bijective and len(rows) > 1:
        _check_bijection(codec, rows, z, back)
    return z


def _check_bijection(codec: Codec, rows: Tensor, z: Tensor, back: Tensor) -> None:
    """Each column must come back in units of its own deviation, and the log determinant be that of ``decode``."""
    scale = rows.std(0)
    constant = scale <= 10 * torch.finfo(rows.dtype).eps * rows.abs().amax(0)
    scale = torch.where(constant, scale.mean().clamp(min=torch.finfo(rows.dtype).tiny), scale)
    errors = (back - rows).square().mean(0).sqrt() / scale
    if float(errors.max()) > ROUND_TRIP:
        raise ValueError(
            f"a bijective codec must give its data back, got a root mean square error of {float(errors.max()):.2g} "
            f"standard deviations of column {int(errors.argmax())}. Write bijective=False, or mend the pair."
        )
    some = z[:NUM_CHECKED]
    said, true = codec.log_abs_det(some), _log_abs_det(codec, some)
    if true is None:
        return
    worst = int((said - true).abs().nan_to_num(torch.inf).argmax())
    if not bool((said - true).abs()[worst] <= LOG_DET):
        raise ValueError(
            f"log_abs_det must be log |dx / dz| of decode, at latents, got {float(said[worst]):.4g} where the Jacobian "
            f"of decode has {float(true[worst]):.4g}. That of encode has the other sign."
        )


def _log_abs_det(codec: Codec, z: Tensor) -> Tensor | None:
    """From the Jacobian of ``decode``; None where that is large, or autograd does not see it."""
    if z.shape[1] > LARGEST_JACOBIAN:
        return None
    try:
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(lambda y: codec.decode(y).sum(0), z, strict=True)
    except (RuntimeError, ValueError):  # functions of other libraries
        return None
    return torch.linalg.slogdet(jacobian.detach().transpose(0, 1).double()).logabsdet.to(z)
