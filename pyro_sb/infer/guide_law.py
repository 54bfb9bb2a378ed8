"""An amortised law as the distribution of a guide's joint site."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sb.infer.latent_law import LatentLaw

__all__ = ["GuideLaw"]


class GuideLaw(TorchDistribution):
    """Law of the unconstrained latents at one observation.

    Where the density of a point is unknown, ``log_prob`` answers for the last draw alone, by the density of its path:
    what ``Importance`` and the ELBO ask, and exact for them.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, law: LatentLaw) -> None:
        self.law = law
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(), law.residuals.weights.shape[1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "GuideLaw":
        """Refused: the joint site stands outside the model's plates."""
        if batch_shape:
            raise NotImplementedError(
                f"a posterior's guide cannot stand in a plate, got {tuple(batch_shape)}. Call Predictive without "
                "parallel=True, or draw by posterior.sample(n)."
            )
        return self

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws. Shape ``(*sample_shape, d)``."""
        shape = torch.Size(sample_shape)
        value, log_q = self.law.draws(max(shape.numel(), 1))
        value, log_q = value[:, 0].reshape(*shape, -1), log_q[:, 0].reshape(shape)
        self._last = value, log_q
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a point; of the last draw where paths alone have one."""
        if self.law.marginal:
            return self.law.log_prob(value[..., None, :])[..., 0]
        if self._last is None or value.shape != self._last[0].shape or not torch.equal(value, self._last[0]):
            raise NotImplementedError(
                'this posterior knows the density of its own last draw alone, got another point. Use bridge="light".'
            )
        return self._last[1]
