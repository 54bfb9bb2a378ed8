r"""Any bridge in the latent space of a codec: draws :math:`x = D(z)` of latents :math:`z \sim q_z`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge, check_parameters, class_named
from pyro_sb.bridges.codecs.autoencoder import AutoencoderCodec
from pyro_sb.bridges.codecs.base import Codec, CodecTransform, encoded
from pyro_sb.bridges.codecs.pair import PairCodec
from pyro_sb.bridges.codecs.pca import PCACodec
from pyro_sb.bridges.data import read_target
from pyro_sb.bridges.diffusion.smoothed import SmoothedBridge
from pyro_sb.bridges.latent.fit import Parts, latent_rows, latent_source, target_size
from pyro_sb.bridges.options import check_names, keyword_names
from pyro_sb.bridges.proposals import MappedLaw
from pyro_sb.checks import as_draws, flag, points, whole
from pyro_sb.distributions import Draws, PathLaw
from pyro_sb.nn import with_constant_parameters
from pyro_sb.training import FitHistory

CODECS: dict[str, type[Codec]] = {c.__name__: c for c in (PCACodec, AutoencoderCodec, PairCodec)}


class LatentBridge(Bridge):
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
        >>> history = bridge.fit(torch.randn(500, 2) @ torch.randn(2, 2), num_updates=50, progress=False)
        >>> value, log_q = bridge().draws((5,))
        >>> torch.allclose(bridge().log_prob(value), log_q, atol=1e-4)
        True
    """

    def __init__(
        self, bridge: Bridge | None = None, codec: Codec | None = None, *, context_dim: int | None = None
    ) -> None:
        if bridge is not None and not isinstance(bridge, Bridge):
            raise ValueError(
                f"bridge must be a Bridge, got {type(bridge).__name__}. Write LatentBridge(LightSB(8), ...)."
            )
        if codec is not None and not isinstance(codec, Codec):
            raise ValueError(
                f"codec must be a Codec, got {type(codec).__name__}. "
                "Write PairCodec(encode, decode, data_dim, latent_dim)."
            )
        inner = None if bridge is None else bridge.context_dim
        if context_dim is not None:
            context_dim = whole("context_dim", context_dim, 0)
        if inner is not None and context_dim is not None and context_dim != inner:
            raise ValueError(f"context_dim is the inner bridge's, {inner}, got {context_dim}. Omit it.")
        super().__init__(1, context_dim=inner if inner is not None else 0 if context_dim is None else context_dim)
        self.makes_inner = bridge is None
        self.bridge, self.codec = bridge, AutoencoderCodec() if codec is None else codec
        if bridge is not None and self.codec.latent_dim is not None:
            self._check_dims(bridge, self.codec.latent_dim)
        self._source: Distribution | None = None
        self.eval()  # a codec of one's own, too, must answer alike at each call

    @property
    def dim(self) -> int:
        """Size of the data."""
        if self.codec.data_dim is None:
            raise RuntimeError(f"{type(self).__name__} must be fitted first: its codec has not seen the data's size.")
        return self.codec.data_dim

    @dim.setter
    def dim(self, dim: int) -> None:
        """The codec decides; nothing is kept."""

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """The inner bridge's through a bijective codec, else None; before the codec's fit, what that may make of it."""
        inner = SmoothedBridge if self.bridge is None else self.bridge
        return inner.density if self._keeps_all else None

    @property
    def density_hint(self) -> str:  # type: ignore[override]
        """Bridges that have a density, for messages."""
        if self.bridge is not None and self._keeps_all:
            return self.bridge.density_hint
        codec = self.codec.describe() if self.codec.fitted else type(self.codec).__name__
        return f"Its {codec} is lossy. {self.codec.cure()}"

    @property
    def whole_dim(self) -> int | None:
        """`dim`, or before the codec's fit the size of the data that it would keep whole; None where it may be any."""
        inner = None if self.bridge is None else self.bridge.dim
        return self.codec.data_dim or self.codec.latent_dim or inner

    @property
    def approximate_log_prob(self) -> bool:  # type: ignore[override]
        """Whether ``log_prob`` is an approximation of the inner bridge's, seen through a bijective codec."""
        return self.bridge is not None and self.codec.bijective and self.bridge.approximate_log_prob

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: as the inner bridge's."""
        return self.bridge is not None and self.bridge.has_rsample

    @property
    def source(self) -> Distribution | None:
        """Law that bridges leave from, in x; None where it is no distribution, or none was given after a load."""
        return self._source

    @source.setter
    def source(self, law: Distribution | None) -> None:
        if law is not None and not self.codec.bijective:
            raise ValueError(
                f"a law passes through a bijective codec alone, got {self.codec.describe()}. Set draws in fit."
            )
        self._source = law
        setattr(self._fitted(), "source", None if law is None else encoded(law, self.codec))  # noqa: B010

    def describe(self) -> str:
        """Name, codec and inner bridge, for messages."""
        inner = "SmoothedBridge" if self.bridge is None else self.bridge.describe()
        return f"LatentBridge of {inner} and {type(self.codec).__name__}"

    def like(self) -> Tensor:
        """A fitted tensor of the inner bridge; an error before ``fit``."""
        return self._fitted().like()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, the inner bridge and the codec by their classes' names and their own."""
        inner = None if self.bridge is None else (type(self.bridge).__name__, self.bridge.config())
        codec = (type(self.codec).__name__, self.codec.config())
        return {"inner": inner, "codec": codec, "makes_inner": self.makes_inner, "context_dim": self.context_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LatentBridge":
        """Build the codec and the inner bridge, then the one around them."""
        name, options = config["codec"]
        if name not in CODECS:
            raise ValueError(
                f"a codec of your own class cannot be rebuilt from a file, got {name}. Build the bridge with it, then "
                'bridge.load_state_dict(torch.load(path, weights_only=True)["state"]).'
            )
        inner = None
        if config["inner"] is not None:
            inner = class_named(config["inner"][0], Bridge, "the inner bridge").from_config(config["inner"][1])
        bridge = cls(inner, CODECS[name].from_config(options), context_dim=config["context_dim"])
        bridge.makes_inner = config["makes_inner"]
        return bridge

    def contents(self) -> dict[str, Any]:
        """As `Bridge.contents`, where the inner bridge can be saved."""
        self._fitted().contents()
        return super().contents()

    def title(self) -> str:
        """The class with its sizes, as far as they are known."""
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{type(self).__name__}(dim={self.whole_dim or 'of the data'}{context})"

    def describe_lines(self) -> list[str]:
        """The codec and the inner bridge, a line each; then the data."""
        inner = "SmoothedBridge, made in fit" if self.bridge is None else self.bridge.title()
        return [f"codec {self.codec!r}", f"inner bridge {inner}", *super().describe_lines()]

    def fit_options(self) -> frozenset[str]:
        """Names of the options that ``fit`` takes, the inner bridge's among them."""
        inner = keyword_names(SmoothedBridge, "fit") if self.bridge is None else self.bridge.fit_options()
        return super().fit_options() | inner

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
        num_law_draws: int = 20_000,
        **options: Any,
    ) -> FitHistory:
        """Fit the codec if it is not fitted, then the inner bridge to the latents.

        Args:
            target: Draws ``(N, dim)``, or a distribution, which gives ``num_law_draws`` of them.
            source: For inner bridges that take one: draws, a point or a distribution in the data's space, encoded. A
                distribution keeps its density through a bijective codec, and gives ``num_law_draws`` draws otherwise.
            context: Contexts of the draws, for the inner bridge. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the draws. Shape ``(N,)``.
            progress: Show bars.
            checkpoint: Path to save the whole bridge to at its end. Until then the codec and the inner bridge's own
                checkpoint lie beside it, and the same call goes on from them.
            pretrain: Rows ``(M, dim)`` to fit the codec on instead of the target, fitted already or not.
            refit_codec: Fit a codec that is fitted already once more, on the target.
            codec_options: Of the codec's ``fit``.
            num_law_draws: Draws of a distribution.
            **options: Of the inner bridge's ``fit``.

        Returns:
            The inner bridge's record; ``seconds`` are those of both.
        """
        codec_options, refit_codec = codec_options or {}, flag("refit_codec", refit_codec)
        if not isinstance(codec_options, dict):
            raise TypeError(f"codec_options must be a dict, got {codec_options!r}. Write {{'num_updates': 1000}}.")
        check_names(f"{type(self).__name__}.fit", options, self.fit_options())
        check_names(f"{type(self.codec).__name__}.fit (codec_options)", codec_options, self.codec.fit_options())
        parts, seconds = Parts(checkpoint), 0.0
        if isinstance(target, Distribution):
            parts.begin()
        size = self.codec.data_dim if pretrain is None and not refit_codec else None
        read = read_target(
            target_size(target) if size is None else size,
            self.context_dim,
            target,
            context=context,
            weights=weights,
            num_law_draws=num_law_draws,
            held_out=options.get("held_out", 0.0),
        )
        draws = read.points
        rows = None if pretrain is None else as_draws("pretrain", pretrain, draws.shape[1], like=draws)
        parts.known_by(self.codec, draws, read.weights, rows, refit_codec, codec_options)
        learns = rows is not None or refit_codec or not self.codec.fitted
        if not parts.restore(self.codec, learns):
            if learns:
                given = {"weights": read.weights} if rows is None else {}
                fitted = self.codec.fit(draws if rows is None else rows, progress=progress, **given, **codec_options)
                seconds = fitted.seconds
            parts.keep(self.codec)
        z = latent_rows(self.codec, draws)
        inner = self._inner(int(z.shape[1]))
        inner_options = options | ({} if parts.inner is None else {"checkpoint": parts.inner})
        inner_options |= {"held_out": read.held_out} if "held_out" in options else {}
        history = inner.fit(
            z,
            latent_source(self.codec, source, draws, num_law_draws),
            context=read.context,
            weights=read.weights,
            progress=progress,
            **inner_options,
        )
        self.bridge, history.seconds = inner, history.seconds + seconds
        self._source, self.fitted_to = (source if isinstance(source, Distribution) else None), read.describe(source)
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

    @property
    def _keeps_all(self) -> bool:
        """Whether the codec is bijective; before its fit, whether its class answers that for itself, and may be."""
        return self.codec.bijective if self.codec.fitted else type(self.codec).bijective is not Codec.bijective

    def _fitted(self) -> Bridge:
        if self.bridge is None:
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.bridge

    def _inner(self, latent_dim: int) -> Bridge:
        """The inner bridge to fit: a new one where it was omitted and the size is another."""
        if self.bridge is not None and not (self.makes_inner and self.bridge.dim != latent_dim):
            self._check_dims(self.bridge, latent_dim)
            return self.bridge
        return SmoothedBridge(latent_dim, context_dim=self.context_dim)

    def _check_dims(self, bridge: Bridge, latent_dim: int) -> None:
        if bridge.dim != latent_dim:
            raise ValueError(
                f"the inner bridge's dim must be the codec's latent_dim, got {bridge.dim} and {latent_dim}. "
                f"Write {type(bridge).__name__}({latent_dim}), or omit the bridge."
            )

    def _encode(self, x: Tensor) -> Tensor:
        return self.codec.encode(points("x", x, self.dim, self.like()))

    def _decode(self, z: Tensor, drawn: bool = False) -> Tensor:
        """Decoded latents, finite; with the codec's residual where they are draws."""
        x = self.codec.draw(z) if drawn else self.codec.decode(z)
        bad = int((~torch.isfinite(x)).any(-1).sum())
        if bad:
            raise RuntimeError(
                f"decoded draws must be finite, got NaN or infinity in {bad} of {x[..., 0].numel()}. "
                "The inner bridge draws latents that the decoder cannot take: fit it longer, or change the decoder."
            )
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        sizes = state_dict.get(prefix + "codec._extra_state")
        if self.makes_inner and isinstance(sizes, dict) and any(k.startswith(prefix + "bridge.") for k in state_dict):
            latent_dim = sizes["latent_dim"]
            check_parameters(lambda: self._inner(latent_dim), state_dict, prefix + "bridge.")
            self.bridge = self._inner(latent_dim)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
