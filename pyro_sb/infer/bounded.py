r"""Coordinates in which a bounded prior is near normal: :math:`t = \Phi^{-1}(\sigma(u))` for logits u.

The logit of a uniform variable is logistic: its tails are exponential, and a posterior that leans on an edge is skew.
Its probit is normal, and near an edge the posterior keeps the prior's normal tail.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform, SigmoidTransform

__all__ = ["from_probit", "is_logit", "log_slope", "to_probit"]

LARGEST = 600.0  # logits beyond it have no float64 probability


def is_logit(transform: Transform) -> bool:
    """Whether Pyro's transform, constrained to unconstrained, is a logit of an interval."""
    inner = transform.inv
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    first = inner.parts[0] if isinstance(inner, ComposeTransform) and inner.parts else inner
    return isinstance(first, SigmoidTransform)


def to_probit(u: Tensor) -> Tensor:
    r"""Probits of logits, computed in float64 from the nearer tail.

    Example:
        >>> to_probit(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.6160])
    """
    wide = u.double().clamp(-LARGEST, LARGEST)
    tail = torch.special.ndtri(torch.sigmoid(torch.where(wide > 0, -wide, wide)))  # |u| has no slope at 0
    return torch.where(wide > 0, -tail, tail).to(u)


def from_probit(t: Tensor) -> Tensor:
    r"""Logits of probits, :math:`\log \Phi(t) - \log \Phi(-t)`."""
    wide = t.double()
    return (torch.special.log_ndtr(wide) - torch.special.log_ndtr(-wide)).to(t)


def log_slope(u: Tensor) -> Tensor:
    r""":math:`\log dt / du` at logits u."""
    wide = u.double().clamp(-LARGEST, LARGEST)
    t = torch.special.ndtri(torch.sigmoid(-wide.abs()))
    logistic = torch.nn.functional.logsigmoid(wide) + torch.nn.functional.logsigmoid(-wide)
    return (logistic + 0.5 * t.square() + 0.5 * math.log(2 * math.pi)).to(u)
