"""Pareto-smoothed importance sampling: k-hat of importance weights, their smoothed logarithms, and a reading."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.checks import floats
from pyro_sb.distributions import Draws
from pyro_sb.weights import effective_sample_size, log_evidence, pareto_tail, smoothed

__all__ = ["PSIS", "psis"]

GOOD, USABLE = 0.5, 0.7
WORDS = {
    "good": "the weights have a variance: means under them converge as usual",
    "usable": "the weights have heavy tails: smoothed means can be used, and converge slowly",
    "unreliable": "means under the weights, their effective size too, rest on a few draws",
}


@dataclass(frozen=True, eq=False, repr=False)
class PSIS:
    r"""Pareto-smoothed importance weights, their tail and their effective size.

    Attributes:
        log_weights: As given: log target less log proposal, not normalised. Shape ``(S,)``.
        smoothed: Normalised logarithms with the largest weights replaced by the expected order statistics of the
            fitted tail. Shape ``(S,)``.
        k_hat: Shape of the generalised Pareto law of the largest weights: infinity where fewer weights are positive
            than the tail has (`pareto_tail`), minus infinity where those of the tail are equal.
        ess: Effective number of draws of the smoothed weights, :math:`1 / \sum_s w_s^2`. It means little where k-hat
            is above `threshold`.
        log_evidence: Log of the mean raw weight, in nats.
        log_evidence_error: Its standard error.
        tail_size: Weights M that the law was fitted to; 0 where k-hat is infinite.
    """

    log_weights: Tensor
    smoothed: Tensor
    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_error: float
    tail_size: int

    @property
    def k_hat_error(self) -> float:
        r"""Standard error of k-hat, :math:`(1 + k) / \sqrt M`; 0 where k-hat is infinite, and nothing was fitted.

        That of the maximum-likelihood shape of a generalised Pareto law, for k above -1/2, from M draws of it; k-hat is
        pulled to 1/2 by a prior that counts for ten of them, so that this is a little too large. It says nothing of
        the tail that these draws have not seen.

        References:
            Parameter and Quantile Estimation for the Generalized Pareto Distribution (Hosking and Wallis, 1987),
            Technometrics 29, where the shape is -k.
        """
        return (1 + self.k_hat) / math.sqrt(self.tail_size) if self.tail_size else 0.0

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.log_weights)

    @property
    def threshold(self) -> float:
        r"""Largest k-hat that S draws can cope with, :math:`\min(1 - 1 / \log_{10} S, 0.7)`."""
        return min(1 - 1 / math.log10(self.num_draws), USABLE)

    @property
    def reading(self) -> str:
        """``"good"`` (up to .5), ``"usable"`` (up to `threshold`), or ``"unreliable"``."""
        if self.k_hat <= min(GOOD, self.threshold):
            return "good"
        return "usable" if self.k_hat <= self.threshold else "unreliable"

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"look"`` or ``"bad"``."""
        return {"good": "ok", "usable": "look", "unreliable": "bad"}[self.reading]

    @property
    def weights(self) -> Tensor:
        """Smoothed weights that sum to one. Shape ``(S,)``."""
        return self.smoothed.exp()

    def __repr__(self) -> str:
        error = f" +- {self.k_hat_error:.2f}" if self.tail_size else ""
        return (
            f"PSIS: k-hat {self.k_hat:.2f}{error} of {self.num_draws} weights, {self.reading}: {WORDS[self.reading]} "
            f"(good up to {min(GOOD, self.threshold):.2f}, unreliable above {self.threshold:.2f})\n"
            f"ESS {self.ess:.0f} ({self.ess / self.num_draws:.0%}); log evidence {self.log_evidence:.3f} "
            f"+- {self.log_evidence_error:.3f}"
        )


def psis(x: Any, log_prob: Callable[[Tensor], Tensor] | None = None) -> PSIS:
    r"""Pareto-smoothed importance sampling: k-hat with its reading, smoothed weights, effective size.

    The largest :math:`M = \min(S / 5, 3 \sqrt S)` weights are fitted by a generalised Pareto law, and replaced by its
    expected order statistics, none larger than the largest weight given. A weight of zero stays zero.

    k-hat is itself an estimate, with a standard error of about .1 at S = 4000 and .05 at 100,000
    (`PSIS.k_hat_error`): of one proposal, batches of 4000 draws may get all three readings. Near a limit, draw more.

    Args:
        x: Log weights ``(S,)``, S at least 25; or what carries them (``Posterior.importance(n)``, a population); or
            `Draws` of a bridge, with ``log_prob``.
        log_prob: Log density of the target, up to a constant: from ``(S, dim)`` to ``(S,)``. For `Draws` alone.

    Raises:
        TypeError: ``x`` carries no log weights, or ``log_prob`` is missing or superfluous.
        ValueError: Fewer than 25 weights, more than one dimension, NaN or ``+inf``.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646, algorithm 1, and
        section 3.2.4 for the threshold that depends on S.

    Example:
        >>> log_weights = torch.distributions.Pareto(1.0, 4.0).sample((2000,)).log()  # k is 1/4
        >>> result = psis(log_weights)
        >>> result.reading, result.verdict
        ('good', 'ok')
    """
    log_weights = _log_weights(x, log_prob).detach().double()
    if log_weights.dim() != 1:
        raise ValueError(
            f"log weights must be those of one target, shape (S,), got {tuple(log_weights.shape)}. Take a column: "
            "psis(draws.log_weights[:, i])."
        )
    strange = int((torch.isnan(log_weights) | torch.isposinf(log_weights)).sum())
    if strange:
        raise ValueError(f"log weights must not hold NaN or +inf, got {strange}. A weight of zero is -inf.")
    tail = pareto_tail(log_weights)
    smooth = smoothed(log_weights, tail) if math.isfinite(tail.k) else log_weights
    smooth = torch.log_softmax(smooth, 0) if bool(torch.isfinite(smooth).any()) else smooth
    value, error = log_evidence(log_weights)
    return PSIS(log_weights, smooth, tail.k, effective_sample_size(smooth), value, error, len(tail.places))


def _log_weights(x: Any, log_prob: Callable[[Tensor], Tensor] | None) -> Tensor:
    if isinstance(x, Draws):
        if log_prob is None:
            raise TypeError("draws need the target's density: write psis(draws, log_prob).")
        log_p = log_prob(x.value)
        if log_p.shape != x.log_q.shape:
            raise ValueError(
                f"log_prob must return one number a draw, {tuple(x.log_q.shape)}, got {tuple(log_p.shape)}."
            )
        return log_p - x.log_q
    if log_prob is not None:
        raise TypeError(
            f"log_prob goes with Draws alone, got {type(x).__name__}, whose weights are known. Leave it out."
        )
    found = getattr(x, "log_weights", x)
    if not isinstance(found, Tensor | np.ndarray | list) and not hasattr(found, "to_numpy"):
        raise TypeError(
            f"x must be log weights (S,), Draws, or have log_weights, got {type(x).__name__}. "
            "Write psis(log_p - log_q)."
        )
    return floats("log weights", found)
