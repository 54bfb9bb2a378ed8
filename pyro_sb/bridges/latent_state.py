"""What a latent bridge holds: an inner bridge and a codec, whose density passes through, saved and loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge, class_named
from pyro_sb.bridges.codec_autoencoder import AutoencoderCodec
from pyro_sb.bridges.codec_pair import PairCodec
from pyro_sb.bridges.codec_pca import PCACodec
from pyro_sb.bridges.codec_rows import shaped
from pyro_sb.bridges.codec_transform import encoded
from pyro_sb.bridges.codecs import Codec
from pyro_sb.bridges.smoothed import SmoothedBridge

CODECS: dict[str, type[Codec]] = {c.__name__: c for c in (PCACodec, AutoencoderCodec, PairCodec)}


class LatentState(Bridge):
    """The half of `LatentBridge` that is made, described, saved and loaded; arguments as there."""

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
        if inner is not None and context_dim is not None and context_dim != inner:
            raise ValueError(f"context_dim is the inner bridge's, {inner}, got {context_dim}. Omit it.")
        super().__init__(1, inner if inner is not None else context_dim or 0)
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
        """What has a density."""
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
    def from_config(cls, config: dict[str, Any]) -> "LatentState":
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

    def save(self, path: str | Path) -> None:
        """As `Bridge.save`."""
        self._fitted().save(path)  # written over below: an inner bridge may refuse what it cannot save
        super().save(path)

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
        return SmoothedBridge(latent_dim, self.context_dim)

    def _check_dims(self, bridge: Bridge, latent_dim: int) -> None:
        if bridge.dim != latent_dim:
            raise ValueError(
                f"the inner bridge's dim must be the codec's latent_dim, got {bridge.dim} and {latent_dim}. "
                f"Write {type(bridge).__name__}({latent_dim}), or omit the bridge."
            )

    def _encode(self, x: Tensor) -> Tensor:
        return self.codec.encode(shaped("x", torch.as_tensor(x), self.dim).to(self.like()))

    def _decode(self, z: Tensor, drawn: bool = False) -> Tensor:
        """Decoded latents, finite; with the codec's residual where they are draws."""
        x = self.codec.draw(z) if drawn else self.codec.decode(z)
        bad = int((~torch.isfinite(x)).any(-1).sum())
        if bad:
            raise RuntimeError(
                f"decoded draws must be finite, got NaN or infinity in {bad} of {x[..., 0].numel()}. "
                "The inner bridge draws latents that the decoder cannot take: fit it longer, or mend the decoder."
            )
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        sizes = state_dict.get(prefix + "codec._extra_state")
        if self.makes_inner and isinstance(sizes, dict) and any(k.startswith(prefix + "bridge.") for k in state_dict):
            self.bridge = self._inner(sizes["latent_dim"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
