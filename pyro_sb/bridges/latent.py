"""Any bridge in the latent space of a codec."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import as_draws, as_weights
from pyro_sb.bridges.codec_transform import CodecTransform
from pyro_sb.bridges.ends import read_context
from pyro_sb.bridges.held_law import MappedLaw
from pyro_sb.bridges.latent_checkpoint import Parts
from pyro_sb.bridges.latent_data import latent_rows, latent_source, target_rows
from pyro_sb.bridges.latent_state import LatentState
from pyro_sb.distributions import Draws, PathLaw
from pyro_sb.nn import with_constant_parameters
from pyro_sb.training import FitHistory


class LatentBridge(LatentState):
    r"""Any bridge between an encoder and a decoder: it learns the law of :math:`z = E(x)`, and draws :math:`D(z)`.

    ``fit`` encodes the rows, fits the inner bridge to the latents, and draws are the inner one's, decoded. The
    latents are taken as the codec makes them: those of `PCACodec` and `AutoencoderCodec` have unit variance on what
    these were fitted to, so an inner bridge's epsilon is in those units.

    **Densities.** A bijective codec (`PCACodec` with all dimensions) hands the inner bridge's density through,

    .. math:: \log q(x) = \log q_z(E(x)) - \log |\det \partial x / \partial z| ,

    and ``draws()`` are as exact as the inner ones. Through a lossy codec there is none: draws lie on a surface of the
    decoder's making, and ``log_prob`` and ``draws()`` raise.

    **How good it can be** the codec says: draws are no better than its reconstructions. `reconstruction_report`
    shows them by latent dimension, and chooses one.

    Args:
        bridge: The inner bridge, of the codec's ``latent_dim``; it is fitted in place. Omitted: a `SmoothedBridge`,
            made in ``fit``.
        codec: Omitted: ``AutoencoderCodec()``, whose latent dimension is chosen in ``fit``. One that is fitted already
            (on other data, as in the paper) is left as it is.
        context_dim: Size of the context of the default inner bridge. Omitted: the inner bridge's.

    Attributes:
        bridge: The inner bridge; None before ``fit`` if it was omitted.
        codec: The codec.
        dim: Size of the data; an error before the codec knows it.

    References:
        Latent Schrödinger Bridge Diffusion Model for Generative Learning (Jiao, Kang, Lin, Liu and Zuo, 2024),
        https://arxiv.org/abs/2404.13309. Inner bridges other than theirs, and densities, are ours.

    Example:
        >>> from pyro_sb.bridges import LightSB, PCACodec
        >>> bridge = LatentBridge(LightSB(2, num_components=3), PCACodec(2))
        >>> history = bridge.fit(torch.randn(500, 2) @ torch.randn(2, 2), num_steps=50, progress=False)
        >>> value, log_q = bridge().draws((5,))
        >>> torch.allclose(bridge().log_prob(value), log_q, atol=1e-4)
        True
    """

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        pretrain: Any = None,
        refit_codec: bool = False,
        codec_options: dict[str, Any] | None = None,
        num_draws: int = 20_000,
        **options: Any,
    ) -> FitHistory:
        """Fit the codec if it is not fitted, then the inner bridge to the latents.

        Args:
            target: Draws ``(N, dim)``, or a distribution, which gives ``num_draws`` of them.
            source: For inner bridges that take one: draws, a point or a distribution in the data's space, encoded. A
                distribution keeps its density through a bijective codec, and gives ``num_draws`` draws otherwise.
            context: Contexts of the draws, for the inner bridge. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the draws. Shape ``(N,)``.
            progress: Show bars.
            checkpoint: Path to save the whole bridge to at its end. Until then the codec and the inner bridge's own
                checkpoint lie beside it, and the same call goes on from them.
            pretrain: Rows ``(M, dim)`` to fit the codec on instead of the target, fitted already or not.
            refit_codec: Fit a codec that is fitted already anew on the target.
            codec_options: Of the codec's ``fit``.
            num_draws: Draws of a distribution.
            **options: Of the inner bridge's ``fit``.

        Returns:
            The inner bridge's record; ``seconds`` are those of both.
        """
        parts, seconds = Parts(checkpoint), 0.0
        if isinstance(target, Distribution):
            parts.begin()
        size = self.codec.data_dim if pretrain is None and not refit_codec else None
        draws = target_rows(target, size, num_draws)
        if isinstance(target, Distribution) and (weights is not None or self.context_dim):
            raise ValueError(
                "weights and contexts go with draws, got a distribution as target. Pass target.sample((n,))."
            )
        normalised = None if weights is None else as_weights(weights, draws)
        read_context(self.context_dim, context, draws, normalised)
        rows = None if pretrain is None else as_draws("pretrain", pretrain, draws.shape[1], like=draws)
        parts.known_by(self.codec, draws, normalised, rows, refit_codec, codec_options or {})
        learns = rows is not None or refit_codec or not self.codec.fitted
        if not parts.restore(self.codec, learns):
            if learns:
                given = {"weights": normalised} if rows is None else {}
                fitted = self.codec.fit(
                    draws if rows is None else rows, progress=progress, **given, **codec_options or {}
                )
                seconds = fitted.seconds
            parts.keep(self.codec)
        z = latent_rows(self.codec, draws, normalised)
        inner = self._inner(int(z.shape[1]))
        inner_options = options | ({} if parts.inner is None else {"checkpoint": parts.inner})
        history = inner.fit(
            z,
            latent_source(self.codec, source, draws, num_draws),
            context=context,
            weights=normalised,
            progress=progress,
            **inner_options,
        )
        self.bridge, history.seconds = inner, history.seconds + seconds
        self._source = source if isinstance(source, Distribution) else None
        if checkpoint is not None and not history.interrupted:
            self.save(checkpoint)
            parts.clear()
        return history

    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        """Drift in the data's space, where the codec is affine and bijective. Shape of ``x``: ``(*, dim)``."""
        if not (self.codec.affine and self.codec.bijective):
            raise NotImplementedError(
                f"the drift passes through an affine bijective codec alone, got {self.codec.describe()}. "
                "Use bridge.bridge.drift, in the latent space, or paths()."
            )
        z = self._encode(x)
        move = self._fitted().drift(t, z, context)
        return self.codec.decode(move) - self.codec.decode(torch.zeros_like(move))

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target: encoded, carried, decoded. Shapes ``(*, dim)`` to ``(*, dim)``."""
        return self._carried(self._fitted().transport, x0, context)

    def transport_back(self, x1: Tensor, context: Any = None) -> Tensor:
        """Target points to draws of the source, where the inner bridge has it. ``(*, dim)`` to ``(*, dim)``."""
        return self._carried(self._own("transport_back"), x1, context, drawn=False)

    def coupling(self, num: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Pairs of a start and its end, where the inner bridge has them. Shape ``(num, *batch_shape, dim)`` each."""
        z0, z1 = self._own("coupling")(num, context)
        with torch.no_grad():
            return self._decode(z0), self._decode(z1, drawn=True)

    def push(self, noise: Tensor, context: Any = None) -> Tensor:
        """Standard normals ``(*, latent_dim)`` to draws ``(*, dim)``: the inner bridge's ``push``, decoded.

        Refused where the codec adds noise of its own to draws (a residual): the map would miss it.
        """
        inner = self._fitted()
        if self.codec.noisy:
            raise NotImplementedError(
                f"push decodes without noise, and the draws of {self.codec.describe()} have a residual. Write "
                "PCACodec(residual=False), or keep all components."
            )
        return with_constant_parameters(self.codec, self.codec.decode, inner.push(noise, context))

    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Times and states of the inner bridge, decoded; noisy latents lie where no decoder was trained.

        Shapes ``(num_steps + 1,)`` and ``(num_steps + 1, num_paths, *batch_shape, dim)``.
        """
        times, states = self._fitted().paths(num_paths, num_steps, context)
        with torch.no_grad():
            return times, self.codec.decode(states)

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws of the inner bridge, decoded. Shape ``(num, dim)``."""
        return self._decode(self._fitted().sample_rows(num, context), drawn=True)

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws of the inner bridge, decoded, with its log density less the log determinant."""
        if self.density is None:
            return super().draws_rows(num, context)
        z, log_q = self._fitted().draws_rows(num, context)
        return Draws(self._decode(z), log_q - self.codec.log_abs_det(z))

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density through a bijective codec, if the inner bridge has one. Shapes ``(num, dim)`` to ``(num,)``."""
        if not self.codec.bijective:
            return super().log_prob_rows(x, context)
        z = self._encode(x)
        return self._fitted().log_prob_rows(z, context) - self.codec.log_abs_det(z)

    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The inner bridge's, at the latents of x, less the log determinant. Shapes ``(num, dim)`` to ``(num,)``."""
        if self.density is None:
            return super().redraw_rows(x, context)
        z = self._encode(x)
        return self._fitted().redraw_rows(z, context) - self.codec.log_abs_det(z)

    @torch.no_grad()
    def path_log_prob(self, x: Any, context: Any = None, num_paths: int = 16) -> Tensor:
        """The inner bridge's, where it has one, at the latents of x ``(*, dim)``, less the log determinant ``(*)``."""
        if not self.codec.bijective:
            raise NotImplementedError(f"{self.describe()} has no density of its draws. {self.density_hint}")
        z = self._encode(x)
        return self._own("path_log_prob")(z, context, num_paths) - self.codec.log_abs_det(z)

    def proposal_law(self) -> PathLaw:
        """The inner bridge's, decoded."""
        law = self._fitted().proposal_law()
        return self if law is self.bridge else MappedLaw(law, CodecTransform(self.codec))

    # Parts

    def _own(self, name: str) -> Callable[..., Any]:
        """A method that not every inner bridge has."""
        inner = self._fitted()
        if not hasattr(inner, name):
            raise NotImplementedError(
                f"{name} is the inner bridge's, and {type(inner).__name__} has none. "
                "Write LatentBridge(DSB(latent_dim), codec)."
            )
        return getattr(inner, name)

    def _carried(self, move: Callable[..., Tensor], x: Tensor, context: Any, drawn: bool = True) -> Tensor:
        """Points encoded, moved and decoded; with gradients where the inner bridge's draws have them."""
        with torch.set_grad_enabled(self.has_rsample and torch.is_grad_enabled()):
            return self._decode(move(self._encode(x), context), drawn)
