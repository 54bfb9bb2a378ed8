r"""Transitions of a scaled affinity off its points: one softmax attention head, with its mean and covariance.

With points divided by the square root of the bandwidth, and :math:`\log v` from
`pyro_sb.ops.sinkhorn.symmetric_sinkhorn`,

.. math:: p_j(x) = \frac{e^{-|x - x_j|^2 / 2}\, v_j}{\sum_k e^{-|x - x_k|^2 / 2}\, v_k}
        = \mathrm{softmax}_j \big(x \cdot x_j + \log v_j - \tfrac12 |x_j|^2\big),

which is attention with queries :math:`x`, keys :math:`x_j` and one bias a key. At :math:`x = x_i` it is row i of the
Markov matrix.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from pyro_sb.ops.sinkhorn import log_affinity

CHUNK_ELEMENTS = 2**20  # queries x keys that exist at one time where the probabilities themselves are needed


class Transitions:
    r"""The law :math:`p_j(x)` above, frozen: probabilities, mean and covariance of the next point from any :math:`x`.

    The keys are centred once, since :math:`x \cdot x_j` loses its digits far from the origin.

    Args:
        keys: Points divided by the square root of the bandwidth, each axis by its own. Shape ``(M, k)``.
        values: What to average, usually the points themselves. Shape ``(M, d)``.
        log_v: Log scaling; ``-inf`` leaves a point out. Shape ``(M,)``.
        scale: :math:`\rho_j > 0` of a variable bandwidth; then every query carries one too. Shape ``(M,)``.

    References:
        Stable generative modeling using Schrödinger bridges (Gottwald, Li, Marzouk and Reich, 2024), section 3,
        https://arxiv.org/abs/2401.04372. The reading as attention is ours.

    Example:
        >>> points = torch.tensor([[-1.0], [1.0]])
        >>> law = Transitions(points, points, torch.zeros(2))
        >>> law.probabilities(torch.zeros(1, 1))
        tensor([[0.5000, 0.5000]])
        >>> law.mean(torch.tensor([[0.0], [9.0]]))
        tensor([[0.],
                [1.]])
    """

    def __init__(self, keys: Tensor, values: Tensor, log_v: Tensor, scale: Tensor | None = None) -> None:
        finite = torch.finfo(keys.dtype).min / 4  # -inf would make inf - inf in a block of left-out keys
        self.centre = keys.mean(0)
        self.keys = keys - self.centre
        self.values = values
        self.value_centre = values.mean(0)
        self.log_v = log_v.clamp(min=finite)
        self.scale = scale
        self.bias = (self.log_v - 0.5 * self.keys.square().sum(-1)).clamp(min=finite)
        # One head size for both, as the fused kernels want. On CPU in float32 a size below 16 falls to a plain sum over
        # the keys, slower and with an error of 2e-5 at 1e5 keys; from 16 on it is 4e-7.
        width = max(keys.shape[1], values.shape[1], 16 if keys.dtype == torch.float32 else 1)
        self._padded_keys = pad(self.keys, (0, width - keys.shape[1]))
        self._padded_values = pad(values - self.value_centre, (0, width - values.shape[1]))

    def log_probabilities(self, query: Tensor, scale: Tensor | None = None) -> Tensor:
        r"""Logarithms of :math:`p_j(x)`. Makes the whole matrix.

        Args:
            query: Points in the units of the keys. Shape ``(C, k)``.
            scale: :math:`\rho(x) > 0`, if and only if the keys have one. Shape ``(C,)``.

        Returns:
            Shape ``(C, M)``; each row's exponentials sum to one.
        """
        log_t = log_affinity(query - self.centre, self.keys, scale, self.scale)
        return torch.log_softmax(log_t + self.log_v, dim=-1)

    def probabilities(self, query: Tensor, scale: Tensor | None = None) -> Tensor:
        r"""The transition probabilities :math:`p_j(x)`. Shapes as in `log_probabilities`."""
        return self.log_probabilities(query, scale).exp()

    def mean(self, query: Tensor, scale: Tensor | None = None) -> Tensor:
        r"""Conditional mean :math:`m(x) = \sum_j p_j(x) x_j`, a point of the values' convex hull.

        With one bandwidth this is `torch.nn.functional.scaled_dot_product_attention`: no C x M matrix where torch has
        a fused kernel (CPU in float32 and float64, CUDA in float32). Elsewhere the queries go in chunks.

        Args:
            query: Points in the units of the keys. Shape ``(C, k)``.
            scale: :math:`\rho(x) > 0`, if and only if the keys have one. Shape ``(C,)``.

        Returns:
            Shape ``(C, d)``.
        """
        if self.scale is not None:
            rows = [self.probabilities(q, s) @ self.values for q, s in self._chunks(query, scale)]
            return torch.cat(rows)
        fused = query.device.type == "cpu" or query.dtype != torch.float64
        if fused:
            return self._attend(query)
        return torch.cat([self._attend(q) for q, _ in self._chunks(query, None)])

    def moments(self, query: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Conditional mean and covariance :math:`C(x) = \sum_j p_j(x) (x_j - m(x)) (x_j - m(x))^\top`.

        Args:
            query: Points in the units of the keys. Shape ``(C, k)``.
            scale: :math:`\rho(x) > 0`, if and only if the keys have one. Shape ``(C,)``.

        Returns:
            Mean ``(C, d)`` and covariance ``(C, d, d)``, symmetric, positive semi-definite up to rounding. Costs
            ``C M d^2 / 2``.
        """
        pairs = [self._moments(q, s) for q, s in self._chunks(query, scale)]
        return torch.cat([m for m, _ in pairs]), torch.cat([c for _, c in pairs])

    def column_form(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one head size, a multiple of 8, whose keys carry the bias as one more column."""
        dim, width = self.values.shape[1], self._padded_keys.shape[1]
        room = -(width + 1) % 8
        q = pad(query - self.centre, (0, width - query.shape[1]))
        q = pad(pad(q, (0, 1), value=1.0), (0, room))
        k = pad(torch.cat([self._padded_keys, self.bias[:, None]], dim=1), (0, room))
        return q, k, pad(self.values - self.value_centre, (0, q.shape[1] - dim))

    def _attend(self, query: Tensor) -> Tensor:
        """One fused head. The bias is a broadcast mask; on CUDA, where a mask leaves the fast path, a column."""
        if query.device.type == "cuda":
            (q, k, v), mask = self.column_form(query), None
        else:
            width = self._padded_keys.shape[1]
            q, k, v = pad(query - self.centre, (0, width - query.shape[1])), self._padded_keys, self._padded_values
            mask = self.bias.expand(len(q), -1)
        out = scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], attn_mask=mask, scale=1.0)
        return out[0, 0, :, : self.values.shape[1]] + self.value_centre

    def _moments(self, query: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities(query, scale)
        values, dim = self.values - self.value_centre, self.values.shape[1]
        mean = probabilities @ values
        i, j = torch.triu_indices(dim, dim, device=query.device)
        second = query.new_zeros(len(query), len(i))
        block = max(1, 4 * CHUNK_ELEMENTS // len(i))  # keys whose products exist at one time
        for start in range(0, len(values), block):
            part = values[start : start + block]
            second += probabilities[:, start : start + block] @ (part[:, i] * part[:, j])
        covariance = query.new_zeros(len(query), dim, dim)
        covariance[:, i, j] = covariance[:, j, i] = second - mean[:, i] * mean[:, j]
        return mean + self.value_centre, covariance

    def _chunks(self, query: Tensor, scale: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        size = max(1, math.ceil(CHUNK_ELEMENTS / len(self.keys)))
        for start in range(0, max(len(query), 1), size):
            rows = slice(start, start + size)
            yield query[rows], None if scale is None else scale[rows]
