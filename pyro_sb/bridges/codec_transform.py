"""A bijective codec as a transform of distributions."""

from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints

from pyro_sb.bridges.codecs import Codec


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
