"""Codecs: an encoder and a decoder between data and latents."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints

from pyro_sb.bridges.base import Fitted, check_parameters
from pyro_sb.bridges.codecs.rows import as_rows, check_rank, shaped
from pyro_sb.bridges.options import check_names, keyword_names
from pyro_sb.checks import as_weights, whole
from pyro_sb.training import FitHistory


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
    shapes = {"location": "D"}
    affine = False  # whether decoding is an affine map

    def __init__(self, latent_dim: int | None = None, *, data_dim: int | None = None) -> None:
        super().__init__()
        for name, size in (("latent_dim", latent_dim), ("data_dim", data_dim)):
            if size is not None:
                whole(name, size, cure="Omit it to have it found.")
        self.given_dim = self.latent_dim = None if latent_dim is None else int(latent_dim)
        self.data_dim = None if data_dim is None else int(data_dim)
        self.register_buffer("location", torch.empty(0))

    def sizes(self) -> dict[str, int]:
        """Size of the data, D, and of the latents, L."""
        return {name: size for name, size in (("D", self.data_dim), ("L", self.latent_dim)) if size is not None}

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
        check_names(f"{type(self).__name__}.fit", options, self.fit_options())
        rows = as_rows(x)
        weights = as_weights(weights, rows)
        rows, weights = rows[weights > 0], weights[weights > 0]
        if self.given_dim is not None:
            check_rank(self.given_dim, rows)
        return self._fit(rows, weights / weights.sum(), progress, **options)

    def fit_options(self) -> frozenset[str]:
        """Names of the options that ``fit`` takes."""
        return keyword_names(type(self), "_fit")

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
        """Advice where a density is asked for, for messages."""
        size = self.data_dim or "data_dim"
        return f"Use sample(), or a codec that keeps all dimensions: PCACodec({size})."

    def __repr__(self) -> str:
        sizes = f"latent_dim={self.latent_dim or 'chosen in fit'}, data_dim={self.data_dim or 'of the data'}"
        options = [f"{key}={value}" for key, value in self.config().items() if not key.endswith("_dim")]
        state = "fitted" if self.fitted else "not fitted"
        return f"{type(self).__name__}({', '.join([sizes, *options])}): {state}"

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

    def _built(self) -> "Codec":
        self._build()
        return self

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
            self._check_buffers(state_dict, prefix)
            check_parameters(self._built, state_dict, prefix)
            self._build()
            self.to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


ROUND_TRIP = 1e-3  # largest error of a bijection's round trip, in standard deviations of each column
LOG_DET = 0.01  # largest error of a bijection's log determinant, at NUM_CHECKED latents of up to LARGEST_JACOBIAN axes
NUM_CHECKED, LARGEST_JACOBIAN = 4, 50


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
            f"standard deviations of column {int(errors.argmax())}. Write bijective=False, or correct the pair."
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


class CodecTransform(Transform):
    """A bijective codec as a transform from latents to data."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, codec: Codec, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codec = codec

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """At latents ``x``. Shape ``(*)``."""
        return self.codec.log_abs_det(x)

    def _call(self, x: Tensor) -> Tensor:
        return self.codec.decode(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.codec.encode(y)


def encoded(law: Distribution, codec: Codec) -> TransformedDistribution:
    """The law of the latents of draws of a law, through a bijective codec."""
    return TransformedDistribution(law, [CodecTransform(codec).inv], validate_args=False)
