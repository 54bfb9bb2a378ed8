r"""Product of Gaussian mixtures :math:`q(x) = \prod_b \sum_k \pi_{bk} N(x_b; m_{bk}, L_{bk} L_{bk}^\top)`.

Each block of coordinates has a mixture of its own. The law brings the gradient estimator that stochastic variational
inference asks for, and the Schrödinger bridge from a point that ends in it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.poutine.runtime import _PYRO_STACK
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.weights import systematic_resample

__all__ = ["MixtureBlock", "BlockMixture"]


BISECTIONS = 80
NONE = Size()


class MixtureBlock(NamedTuple):
    """A mixture of some coordinates: their places in the vector ``(k,)``, and their law in ``k`` dimensions."""

    places: Tensor
    mixture: StudentMixture

    def detach(self) -> "MixtureBlock":
        """The same without a graph."""
        return self._replace(mixture=StudentMixture(*(value.detach() for value in self.mixture)))


class BlockMixture(TorchDistribution):
    r"""Law of a vector whose blocks of coordinates are independent Gaussian mixtures.

    Draws are reparametrised within components, :math:`x = m_k + L_k e`; their indices are systematic, so that every
    component gets its share of a batch. For stochastic variational inference :meth:`score_parts` gives Pyro's
    estimator the gradient

    .. math:: \nabla_\theta E_q[f] = E\big[\partial_x f\, \partial_\theta x\big] + E\Big[(f - b)\, \nabla_\theta
        \log \sum_k \pi_k N(x; m_k, L_k L_k^\top)\big|_{x, m, L\ \text{fixed}}\Big], \qquad f = \log p - \log q,

    pathwise within components, by the marginal score in the weights, with the evidence b as a baseline, and without
    the term :math:`\partial_\theta \log q` whose mean is zero.

    Args:
        blocks: Mixtures with ``df`` infinite; their places are a partition of the coordinates.
        baseline: b, near the log evidence: it costs nothing but variance where it is not.
        batch_shape: Independent copies, for plates and vectorised particles.

    References:
        Sticking the landing (Roeder, Wu and Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> normal = StudentMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], torch.tensor([math.inf]))
        >>> law = BlockMixture([MixtureBlock(torch.arange(2), normal)])
        >>> law.rsample((3,)).shape, law.log_prob(torch.zeros(2))
        (torch.Size([3, 2]), tensor(-1.8379))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, blocks: Sequence[MixtureBlock], baseline: Tensor | float = 0.0, batch_shape: Size = NONE
    ) -> None:
        self.blocks, self.baseline = list(blocks), baseline
        self._order = torch.cat([block.places for block in self.blocks]).argsort()
        super().__init__(Size(batch_shape), Size((len(self._order),)), validate_args=False)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{b.mixture.num_components} in {len(b.places)} dimensions" for b in self.blocks)
        return f"BlockMixture of Gaussian components: {sizes}"

    def expand(self, batch_shape: Size, _instance: Any = None) -> "BlockMixture":
        """The same law over a larger batch."""
        return BlockMixture(self.blocks, self.baseline, Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with gradients in means and scales. Shape ``(*sample_shape, *batch_shape, dim)``."""
        shape = Size(sample_shape) + self.batch_shape
        columns = [_draws(block.mixture, shape.numel()) for block in self.blocks]
        return torch.cat(columns, -1)[:, self._order].reshape(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density. ``(*batch, dim)`` to ``(*batch,)``."""
        return _log_prob(self.blocks, value)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        r"""The log density, the weights' score, and the entropy term of Pyro's ELBOs.

        ``Trace_ELBO`` multiplies the score of an auxiliary site by log p alone, so the entropy term brings
        :math:`-(\log q + b)` times the score; ``TraceEnum_ELBO`` multiplies by all costs, and has no entropy term.
        """
        weights_live = [_with_fixed_components(block) for block in self.blocks]
        score = _log_prob(weights_live, x.detach())
        entropy = _log_prob([block.detach() for block in self.blocks], x)
        log_q = self.log_prob(x)
        if not score.requires_grad:
            return ScoreParts(log_q, 0, entropy)
        if any(isinstance(handler, TrackNonReparam) for handler in _PYRO_STACK):
            raise NotImplementedError(
                "a mixture in a guide needs an ELBO that reads its score, got TraceGraph_ELBO. Write Trace_ELBO()."
            )
        return ScoreParts(log_q, score, entropy + (self.baseline + log_q.detach()) * (score - score.detach()))

    def double(self) -> "BlockMixture":
        """The same law in float64, without a graph."""
        blocks = [b._replace(mixture=StudentMixture(*(v.double() for v in b.mixture))) for b in self.detached()]
        return BlockMixture(blocks, self.baseline, self.batch_shape)

    def detached(self) -> list[MixtureBlock]:
        """The blocks without a graph."""
        return [block.detach() for block in self.blocks]

    def marginal_quantiles(self, probs: Tensor) -> Tensor:
        """Quantiles of every coordinate by bisection of its distribution function. ``(Q,)`` to ``(Q, dim)``."""
        columns = [_quantiles(block.detach().mixture, probs) for block in self.blocks]
        return torch.cat(columns, -1)[:, self._order]

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Drift of the Föllmer bridge at times in [0, 1]: from each block's mean, with its covariance as reference.

        In coordinates :math:`y = C^{-1}(x - \mu)`, where :math:`\mu` and :math:`C C^\top` are the block's mean and
        covariance, the bridge leaves the origin with unit variance and ends in the mixture.

        Args:
            t: A number, or times of shape ``(n,)``.
            x: Points of the space, ``(n, dim)``.

        Returns:
            Shape ``(n, dim)``.
        """
        columns = []
        for block in self.blocks:
            mean, factor, potential = follmer(block.mixture)
            white = torch.linalg.solve_triangular(factor, (x[:, block.places] - mean).T, upper=False).T
            if isinstance(t, Tensor) and t.dim():
                log_weights, locs, scales = (v.expand(len(x), *v.shape) for v in potential[:3])
                one = MixturePotential(log_weights, locs, scales, potential.epsilon)
                drift = one.drift(t, white[:, None])[:, 0]
            else:
                drift = potential.drift(t, white)
            columns.append(drift @ factor.T)
        return torch.cat(columns, -1)[:, self._order]

    def paths(self, num_paths: int, num_steps: int) -> tuple[Tensor, Tensor]:
        r"""Exact paths of that bridge: a draw of its end, and a Brownian bridge to it.

        Returns:
            Times ``(num_steps + 1,)`` and states ``(num_paths, num_steps + 1, dim)``.
        """
        like = self.blocks[0].mixture.locs
        times = torch.linspace(0.0, 1.0, num_steps + 1, dtype=like.dtype, device=like.device)
        columns = []
        for block in self.blocks:
            mean, factor, _ = follmer(block.mixture)
            end = _draws(block.mixture, num_paths).detach()
            noise = torch.randn(num_paths, num_steps, len(mean), dtype=like.dtype, device=like.device)
            walk = torch.cat([torch.zeros_like(noise[:, :1]), noise.cumsum(1) / math.sqrt(num_steps)], 1)
            tied = walk - times[:, None] * walk[:, -1:]
            columns.append(mean + times[:, None] * (end - mean)[:, None] + tied @ factor.T)
        return times, torch.cat(columns, -1)[..., self._order]


def follmer(mixture: StudentMixture) -> tuple[Tensor, Tensor, MixturePotential]:
    """Mean and covariance factor of a Gaussian mixture, and its potential in the coordinates whitened by them."""
    weights, scales = mixture.log_weights.exp(), mixture.scale_trils @ mixture.scale_trils.mT
    mean = weights @ mixture.locs
    apart = mixture.locs - mean
    factor = torch.linalg.cholesky((weights[:, None, None] * scales).sum(0) + (weights[:, None] * apart).T @ apart)
    white = torch.linalg.solve_triangular(factor, mixture.scale_trils, upper=False)
    locs = torch.linalg.solve_triangular(factor, apart.T, upper=False).T
    return mean, factor, MixturePotential(mixture.log_weights, locs, white @ white.mT, 1.0)


def _draws(mixture: StudentMixture, num: int) -> Tensor:
    index = systematic_resample(mixture.log_weights.detach().exp(), num)
    index = index[torch.randperm(num, device=index.device)]
    noise = torch.randn(num, mixture.locs.shape[1], dtype=mixture.locs.dtype, device=mixture.locs.device)
    return mixture.locs[index] + (mixture.scale_trils[index] @ noise[..., None])[..., 0]


def _quantiles(mixture: StudentMixture, probs: Tensor) -> Tensor:
    """Of each coordinate of a Gaussian mixture. ``(Q,)`` to ``(Q, d)``."""
    sds, weights = mixture.scale_trils.norm(dim=-1), mixture.log_weights.exp()
    probs = probs.to(weights)[:, None]
    reach = 40.0 * sds
    low, high = (mixture.locs - reach).amin(0) + 0 * probs, (mixture.locs + reach).amax(0) + 0 * probs
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        below = torch.special.ndtr((middle[..., None, :] - mixture.locs) / sds)
        less = torch.einsum("k,qkd->qd", weights, below) < probs
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return 0.5 * (low + high)


def _with_fixed_components(block: MixtureBlock) -> MixtureBlock:
    return block._replace(mixture=block.detach().mixture._replace(log_weights=block.mixture.log_weights))


def _log_prob(blocks: Sequence[MixtureBlock], value: Tensor) -> Tensor:
    total = value.new_zeros(value.shape[:-1])
    for block in blocks:
        rows = value[..., block.places].reshape(-1, len(block.places))
        total = total + block.mixture.log_prob(rows).reshape(value.shape[:-1])
    return total
