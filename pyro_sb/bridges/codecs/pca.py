r"""Principal components as a codec, :math:`x = m + W \Lambda z`: affine, and bijective where none is dropped."""

import time
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.bridges.codecs.report import SHARE, ReconstructionReport, parted
from pyro_sb.bridges.codecs.rows import advice, numerical_rank, shaped
from pyro_sb.checks import flag
from pyro_sb.training import FitHistory


class PCACodec(Codec):
    r"""Principal components, :math:`x = m + W \Lambda z`, with orthonormal columns W and scales :math:`\Lambda`.

    Whitened latents have unit variance on what it was fitted to, so that an inner bridge's epsilon is in units of
    their standard deviation. With all dimensions it is a bijection with
    :math:`\log |\partial x / \partial z| = \sum_i \log \lambda_i`, and densities pass through it. With fewer it is
    lossy: probabilistic PCA models what is dropped as :math:`N(0, \sigma^2 (I - W W^\top))`, and ``residual=True``
    adds that noise to draws (the encoder does not see it).

    Args:
        latent_dim: Components that are kept, at most the data's rank. None: the smallest number that explains 95 % of
            the variance of held-out rows; as `reconstruction_report` with every dimension.
        whiten: Give each latent unit variance; else :math:`\Lambda = I`, and distances in the span are kept.
        residual: Add the residual noise in `draw`.

    Attributes:
        components: W. Shape ``(data_dim, latent_dim)``.
        scales: The diagonal of Lambda. Shape ``(latent_dim,)``.
        residual_scale: sigma, root mean variance of the dropped directions. Shape ``()``.

    References:
        Mixtures of Probabilistic Principal Component Analysers (Tipping and Bishop, 1999), for the residual.

    Example:
        >>> codec = PCACodec(2)
        >>> history = codec.fit(torch.randn(50, 2) * torch.tensor([1.0, 10.0]))
        >>> codec.bijective, codec.encode(torch.zeros(3, 2)).shape
        (True, torch.Size([3, 2]))
    """

    components: Tensor
    scales: Tensor
    residual_scale: Tensor
    shapes = {"location": "D", "components": "D L", "scales": "L", "residual_scale": ""}
    affine = True

    def __init__(self, latent_dim: int | None = None, *, whiten: bool = True, residual: bool = False) -> None:
        super().__init__(latent_dim)
        self.whiten, self.residual = flag("whiten", whiten), flag("residual", residual)
        for name in PCACodec.__annotations__:
            if name != "affine":
                self.register_buffer(name, torch.empty(0))

    @property
    def bijective(self) -> bool:
        """Whether no dimension is dropped."""
        return self.data_dim is not None and self.latent_dim == self.data_dim

    def encode(self, x: Tensor) -> Tensor:
        r""":math:`\Lambda^{-1} W^\top (x - m)`."""
        return (self._like(x) - self.location) @ self.components / self.scales

    def decode(self, z: Tensor) -> Tensor:
        r""":math:`m + W \Lambda z`."""
        self._ready()
        return self.location + (shaped("z", z, self.latent_dim).to(self.location) * self.scales) @ self.components.T

    @property
    def noisy(self) -> bool:
        """Whether a residual is added, and something was dropped that it stands for."""
        return self.residual and not self.bijective

    def draw(self, z: Tensor) -> Tensor:
        """`decode`, with noise in the dropped directions if ``residual``."""
        x = self.decode(z)
        if not self.noisy:
            return x
        noise = self.residual_scale * torch.randn_like(x)
        return x + noise - noise @ self.components @ self.components.T

    def log_abs_det(self, z: Tensor) -> Tensor:
        """Sum of the log scales, the same everywhere."""
        if not self.bijective:
            return super().log_abs_det(z)
        return self.scales.log().sum().expand(z.shape[:-1])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config() | {"whiten": self.whiten, "residual": self.residual}

    def _fit(self, rows: Tensor, weights: Tensor, progress: bool) -> FitHistory:  # type: ignore[override]
        begun = time.perf_counter()
        num = self.given_dim
        if num is None:
            num = _smallest(rows, weights)
        location, values, vectors = _directions(rows, weights)
        peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        components = (vectors * peaks.sign())[:num].T  # a sign that rounding does not choose
        dropped = rows.shape[1] - num
        rest = values[num:].square().sum() / max(1, dropped)
        self.data_dim, self.latent_dim = rows.shape[1], num
        self.location, self.components, self.residual_scale = location, components.contiguous(), rest.sqrt()
        self.scales = values[:num].clone() if self.whiten else torch.ones_like(values[:num])
        return FitHistory(iterations=1, seconds=time.perf_counter() - begun, converged=True)


def _directions(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(d,)``, deviations ``(r,)`` from the largest on, and their directions ``(r, d)``; weights sum to 1."""
    location = weights @ rows
    _, values, vectors = torch.linalg.svd(weights.sqrt()[:, None] * (rows - location), full_matrices=False)
    return location, values, vectors


def _smallest(rows: Tensor, weights: Tensor, share: float = SHARE) -> int:
    """The smallest dimension that explains this share of held-out rows: all of them from one decomposition."""
    test, seen = parted(rows)
    location, _, vectors = _directions(rows[seen], weights[seen] / weights[seen].sum())
    vectors = vectors[: numerical_rank(rows[seen])]
    if not len(vectors):
        raise ValueError(f"rows must vary, got {len(seen)} equal ones up to rounding. {advice(0)}.")
    gaps, judge = rows[test] - location, weights[test] / weights[test].sum()
    total = judge @ gaps.square().sum(1)
    left = (total - (judge @ (gaps @ vectors.T).square()).cumsum(0)).clamp(min=0)
    explained = 1 - left / total if total > 0 else torch.ones_like(left)
    rmse = (left / rows.shape[1]).sqrt()
    dims = list(range(1, len(left) + 1))
    return ReconstructionReport(dims, rmse.tolist(), explained.tolist(), len(seen), len(test)).choose(share)
