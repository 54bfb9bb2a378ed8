r"""Two networks as a codec, trained by least squares: :math:`\min E |x - D(E(x))|^2`."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_sb.bridges.codecs.base import Codec
from pyro_sb.bridges.codecs.report import SHARE, choose_dim
from pyro_sb.bridges.codecs.rows import shaped
from pyro_sb.checks import number, whole, widths
from pyro_sb.training import FitHistory, train

NUM_CHECKS, PATIENCE, HELD_OUT = 40, 8, 0.1


class AutoencoderCodec(Codec):
    r"""An encoder and a decoder net, fitted by least squares, with latents of mean 0 and variance 1.

    .. math:: \min_{E, D}\; E\, \big| x - D\big(z(x) + \sigma_z \xi\big) \big|^2 , \qquad
              z(x) = \frac{E(x) - \text{mean}}{\text{sd}}, \quad \xi \sim N(0, I)

    Mean and standard deviation are those of the minibatch while it learns and of all rows afterwards, so an inner
    bridge's epsilon is in units of the latents' standard deviation. A little noise on the latents makes the decoder
    smooth and spreads the codes: a small error of the bridge is then a small error of the data. It is lossy.

    Args:
        latent_dim: Size of the latents, at most the data's rank. None: the smallest of a grid that explains ``share``
            of the variance of held-out rows (`reconstruction_report`; a fit for each dimension tried).
        hidden: Widths of the encoder's layers; the decoder's are the same backwards.
        latent_noise: :math:`\sigma_z`, not negative.
        share: Of the variance, that a chosen latent dimension explains.

    References:
        The least-squares pair of https://arxiv.org/abs/2404.13309, section 3; the units and the noise are ours.

    Example:
        >>> codec = AutoencoderCodec(1, hidden=(16,))
        >>> angle = torch.rand(200, 1) * 3
        >>> history = codec.fit(torch.cat([angle.cos(), angle.sin()], 1), num_updates=40, progress=False)
        >>> codec.decode(codec.encode(torch.zeros(3, 2))).shape
        torch.Size([3, 2])
    """

    scale: Tensor
    latent_location: Tensor
    latent_scale: Tensor
    shapes = {"location": "D", "scale": "", "latent_location": "L", "latent_scale": "L"}

    def __init__(
        self,
        latent_dim: int | None = None,
        *,
        hidden: tuple[int, ...] = (256, 256),
        latent_noise: float = 0.1,
        share: float = SHARE,
    ) -> None:
        super().__init__(latent_dim)
        self.hidden = widths("hidden", hidden)
        self.latent_noise = number("latent_noise", latent_noise, "[0, inf)", "Omit it for the default.")
        self.share = number("share", share, "(0, 1]", "Omit it for the default.")
        for name in AutoencoderCodec.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()

    def encode(self, x: Tensor) -> Tensor:
        """Standardised latents."""
        return (self.encoder((self._like(x) - self.location) / self.scale) - self.latent_location) / self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's answer in the data's units."""
        self._ready()
        return self.location + self.scale * self.decoder(shaped("z", z, self.latent_dim).to(self.location))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config() | {"hidden": self.hidden, "latent_noise": self.latent_noise, "share": self.share}

    def _build(self) -> None:
        from zuko.nn import MLP

        sizes = {"activation": nn.SiLU}
        self.encoder = MLP(cast(int, self.data_dim), cast(int, self.latent_dim), hidden_features=self.hidden, **sizes)
        self.decoder = MLP(self.latent_dim, self.data_dim, hidden_features=self.hidden[::-1], **sizes)
        self.encoder.eval(), self.decoder.eval()

    def _fit(  # type: ignore[override]
        self,
        rows: Tensor,
        weights: Tensor,
        progress: bool,
        *,
        num_updates: int = 3000,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        ema: float | None = 0.995,
    ) -> FitHistory:
        batch_size = whole("batch_size", batch_size, 2)
        num = self.given_dim
        if num is None:
            some = {"num_updates": num_updates, "batch_size": batch_size, "learning_rate": learning_rate, "ema": ema}
            kept = {key: value for key, value in self.config().items() if key != "latent_dim"}
            num = choose_dim(rows, weights, lambda k: AutoencoderCodec(k, **kept), progress, self.share, **some)
        self.data_dim, self.latent_dim = rows.shape[1], num
        self._build()
        self.location = weights @ rows
        self.scale = (weights @ (rows - self.location).square()).mean().sqrt()
        self.to(rows)
        x = (rows - self.location) / self.scale
        order = torch.randperm(len(x), device=x.device)
        cut = int(HELD_OUT * len(x)) if len(x) >= 20 else 0
        test, seen = order[:cut], order[cut:]
        judge = x[test] if cut > 1 else x
        judge_weights = weights[test] if cut > 1 else weights
        uneven = bool(
            (weights != weights[0]).any()
        )  # drawn with replacement then: else small data are all in each batch
        size = batch_size if uneven else min(batch_size, len(seen))

        def loss() -> Tensor:
            some = seen[torch.multinomial(weights[seen], size, replacement=uneven)]
            return 0.5 * (self._round_trip(x[some], None, self.latent_noise) - x[some]).square().mean()

        def validate() -> float:
            with torch.no_grad():
                errors = (self._round_trip(judge, judge_weights, 0.0) - judge).square().mean(1)
                return float(0.5 * judge_weights @ errors / judge_weights.sum())

        history = train(
            [*self.encoder.parameters(), *self.decoder.parameters()],
            loss,
            num_updates=num_updates,
            learning_rate=learning_rate,
            validate=validate,
            keep_best=True,
            num_checks=NUM_CHECKS,
            patience=PATIENCE,
            progress=progress,
            description=f"{type(self).__name__}({num})",
            ema=ema,
        )
        with torch.no_grad():
            self.latent_location, self.latent_scale = moments(self.encoder(x), weights)
        return history

    def _round_trip(self, x: Tensor, weights: Tensor | None, noise: float) -> Tensor:
        """Reconstruction with latents in the units of these rows."""
        z = self.encoder(x)
        location, scale = moments(z, weights)
        z = (z - location) / scale
        return self.decoder(z + noise * torch.randn_like(z) if noise else z)


def moments(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, by weights. Shape ``(d,)`` each."""
    weights = torch.full_like(z[:, 0], 1 / len(z)) if weights is None else weights / weights.sum()
    location = weights @ z
    return location, (weights @ (z - location).square() + 1e-8).sqrt()
