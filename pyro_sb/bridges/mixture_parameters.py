"""The learnt parameters of a Gaussian-mixture potential, free or given by a network of the context."""

import torch
from torch import Tensor, nn

from pyro_sb.nn import ContextNet
from pyro_sb.ops.mixture import MixturePotential

COVARIANCES = ("diagonal", "full")


class MixtureParameters(nn.Module):
    r"""Unconstrained parameters of :math:`\log a_j, r_j, S_j`, with every eigenvalue of S above a floor.

    Diagonal: :math:`S = s_{\min} + e^q`. Full: :math:`S = s_{\min} I + A L L^\top A` with :math:`L` lower triangular
    and :math:`\log \operatorname{diag} L` free; :math:`r = A \rho`. The diagonal A is 1 but for axes that are more
    than ten times narrower than the rest, so that Adam's steps suit them too. With a context a network adds to all
    parameters.

    Args:
        dim: Event size d.
        num_components: J.
        context_dim: Size of the context; 0 for none.
        covariance: ``"diagonal"`` or ``"full"``.
        hidden: Widths of the network's hidden layers.
    """

    floor: Tensor
    axes: Tensor
    net: ContextNet | None

    def __init__(
        self, dim: int, num_components: int, context_dim: int, covariance: str, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        shape = (num_components, dim) if covariance == "diagonal" else (num_components, dim, dim)
        self.diagonal = covariance == "diagonal"
        self.log_weights = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.zeros(num_components, dim))
        self.raw = nn.Parameter(torch.zeros(shape))
        self.register_buffer("floor", torch.tensor(1e-6))
        self.register_buffer("axes", torch.ones(dim))
        size = sum(p.numel() for p in (self.log_weights, self.locs, self.raw))
        self.net = ContextNet(context_dim, size, hidden) if context_dim else None

    def forward(self, context: Tensor | None, epsilon: float) -> MixturePotential:
        """The potential, with a leading batch of contexts ``(n, context_dim)`` if there are any."""
        log_weights, locs, raw = self.log_weights, self.locs, self.raw
        if self.net is not None and context is not None:
            shift = self.net(context).split([p.numel() for p in (log_weights, locs, raw)], -1)
            log_weights, locs, raw = (
                p + s.unflatten(-1, p.shape) for p, s in zip((log_weights, locs, raw), shift, strict=True)
            )
        return MixturePotential(log_weights, self.axes * locs, self._scales(raw), epsilon)

    def measure(self, deviations: Tensor) -> None:
        """Take A from the standard deviations of the axes, in the bridge's units. Shape ``(dim,)``."""
        self.axes.copy_((10 * deviations).clamp_max(1.0))

    def reset(self) -> None:
        """Forget what the network has learnt."""
        if self.net is not None:
            self.net.reset()

    @torch.no_grad()
    def set(self, potential: MixturePotential, floor: float) -> None:
        """Take the values of a potential without a batch; eigenvalues of S near or below the floor are raised."""
        self.floor.fill_(floor)
        self.log_weights.copy_(potential.log_weights)
        self.locs.copy_(potential.locs / self.axes)
        if self.diagonal:
            self.raw.copy_((potential.scales - self.floor).clamp_min(1e-3 * floor).log())
            return
        values, vectors = torch.linalg.eigh(potential.scales)
        above = (vectors * (values - self.floor).clamp_min(1e-3 * floor)[..., None, :]) @ vectors.mT
        factor = torch.linalg.cholesky(above / (self.axes[:, None] * self.axes))
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        self.raw.copy_(factor.tril(-1) + torch.diag_embed(diagonal.log()))

    def _scales(self, raw: Tensor) -> Tensor:
        if self.diagonal:
            return self.floor + raw.exp()
        factor = self.axes[:, None] * (raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp()))
        return factor @ factor.mT + self.floor * torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
