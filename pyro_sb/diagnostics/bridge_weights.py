"""Two lines of a bridge's report: whether its density is its draws', and what weights of paths cost."""

import math

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.diagnostics.lines import Line, graded
from pyro_sb.weights import effective_sample_size, log_evidence

__all__ = ["density_line", "paths_line"]

REDRAWS = 32  # paths drawn backwards from each end


def density_line(bridge: Bridge, context: Tensor | None, num: int) -> Line:
    """Whether ``E_q[r / q] = 1`` for a normal law r within the draws."""
    name = "density"
    if bridge.density is None:
        return Line(name, "has none", "-", f"no correction by weights or MCMC: {bridge.density_hint}")
    if context is not None:
        context = context[:1].expand(num, -1)  # one law
    value, log_q = bridge.draws_rows(num, context)
    half = num // 2
    middle, factor = _inside(value[:half].double())
    value, log_q, num = value[half:].double(), log_q[half:].double(), num - half
    log_r = torch.distributions.MultivariateNormal(middle, scale_tril=factor).log_prob(value)
    log_mean, error = log_evidence(log_r - log_q)
    share = effective_sample_size(log_r - log_q) / num
    gap = abs(log_mean) / max(error, 1e-12)
    shown = f"log E[r/q] = {log_mean:.3f} +- {error:.3f}"
    if share < 0.02:
        return Line(name, shown, "look", f"effective share {share:.3f}: too poor to tell; the weights will be poor too")
    verdict = graded(gap, 4.0, 6.0) if abs(log_mean) > 1e-4 else "ok"
    note = f"{bridge.density}, normalised" if verdict == "ok" else "log_q is not the draws' density: report it as a bug"
    return Line(name, shown, verdict, note)


def _inside(value: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and factor of a normal law within the draws: their densest eighth about a draw, by distance."""
    covariance = torch.cov(value.T).reshape(value.shape[1], value.shape[1])
    covariance = covariance + 1e-9 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, value.T, upper=False).T
    near = max(2 * value.shape[1] + 2, len(value) // 8)
    seeds = white[:: max(1, len(white) // 64)]
    far = torch.cdist(seeds, white).sort(1)
    best = int(far.values[:, near - 1].argmin())
    members = value[far.indices[best, :near]]
    inner = torch.cov(members.T).reshape(factor.shape)
    inner = inner + 1e-6 * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
    return members.mean(0), torch.linalg.cholesky(inner)


def paths_line(bridge: Bridge, context: Tensor | None, num: int) -> Line:
    """What the weights of paths cost an importance sample."""
    name = "path-weight ESS"
    if bridge.density != "path":
        why = "its density is that of the draw" if bridge.density else "it has no density"
        return Line(name, "does not apply", "-", why)
    num = min(num, 500)
    context = None if context is None else context[torch.arange(num) % len(context)]
    value, log_q = bridge.draws_rows(num, context)
    try:
        back = torch.stack([bridge.redraw_rows(value, context) for _ in range(REDRAWS)])
    except NotImplementedError:
        return Line(name, "not computed", "-", f"{bridge.describe()} does not draw its paths backwards")
    log_w = (back.logsumexp(0) - math.log(REDRAWS) - log_q).double()
    share = effective_sample_size(log_w) / num
    verdict = graded(share, 0.5, 0.1, high_is_good=True)
    note = (
        "what paths alone leave of an importance sample" if verdict == "ok" else "use more steps, or average num_paths"
    )
    return Line(name, f"{share:.0%}", verdict, note)
