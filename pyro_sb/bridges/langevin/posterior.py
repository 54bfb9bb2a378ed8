"""Posterior weights and scores: a bridge on draws of the prior, tilted by a likelihood."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sb.warn import warn

LogLikelihood = Callable[[Tensor], Tensor]


def checked_log_likelihood(log_likelihood: LogLikelihood, points: Tensor) -> Tensor:
    """Its values at the prior's draws, shape ``(M,)``; refused where misshapen, NaN, or finite nowhere."""
    values = torch.as_tensor(log_likelihood(points)).detach()
    if values.shape != points.shape[:1]:
        raise ValueError(
            f"log_likelihood must map points {tuple(points.shape)} to ({len(points)},), got {tuple(values.shape)}."
        )
    if bool(torch.isnan(values).any()) or bool((values == math.inf).any()):
        raise ValueError(
            "log_likelihood must not be NaN or +infinity at a draw of the prior. Return -math.inf where it is 0."
        )
    if not bool((values > -math.inf).any()):
        raise ValueError("log_likelihood must be finite at one draw of the prior at least. Check the draws' units.")
    return values


def posterior_weights(weights: Tensor, log_likelihood: Tensor) -> Tensor:
    """The prior's weights times the likelihood, normalised; refused where they count for less than two draws."""
    posterior = torch.softmax(weights.log() + log_likelihood, dim=0)
    effective = 1 / float(posterior.square().sum())
    if effective < 2:
        raise ValueError(
            f"the prior's draws must overlap the posterior, got 1 / sum w^2 = {effective:.3g} of {len(weights)}. "
            'Use more draws, method="drift", or KernelLangevin.'
        )
    if effective < 50:
        warn(
            f"The posterior rests on 1 / sum w^2 = {effective:.1f} of {len(weights)} draws. Use more draws.",
        )
    return posterior


def score(log_likelihood: LogLikelihood, x: Tensor) -> Tensor:
    """Gradient of the log likelihood at points ``(C, d)``. Shape ``(C, d)``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_likelihood(x).sum(), x)
    return gradient


def check_options(method: str, options: dict[str, Any]) -> None:
    """Refuse an unknown method, and fit options where nothing is fitted."""
    if method not in ("weights", "drift"):
        raise ValueError(f'method must be "weights" or "drift", got {method!r}.')
    if method == "drift" and options:
        raise ValueError(f'method="drift" fits nothing, so it takes no options of fit, got {sorted(options)}.')
