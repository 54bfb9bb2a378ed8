"""Report of a fitted bridge: its ends, constraint, inverse, two directions and density, each against its promise."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.diffusion.bridge import DiffusionBridge
from pyro_sb.bridges.diffusion.smoothed import SmoothedBridge
from pyro_sb.bridges.dsb.bridge import DSB
from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.light.bass import LightSBBM
from pyro_sb.bridges.tails.bridge import TailMatched
from pyro_sb.checks import as_draws
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report, graded
from pyro_sb.metrics.transport import sliced_wasserstein2
from pyro_sb.weights import effective_sample_size, log_evidence

__all__ = ["bridge_report", "density_line", "paths_line"]

MOMENT_OK, MOMENT_LOOK = 0.1, 0.3  # standard deviations of a mean; relative, of a deviation
BLOCK = 1024  # rows of an affinity matrix held at a time
KEPT = 4000  # draws compared at most
REDRAWS = 32  # paths drawn backwards from each end


def bridge_report(
    bridge: Bridge,
    target: Any = None,
    *,
    source: Any = None,
    context: Any = None,
    num_draws: int = 2000,
) -> Report:
    r"""Distance of a fitted bridge from its promises, a line for each; those that it does not make are named.

    - **marginal residual**: its draws against the target's: the largest gap between means (in standard deviations) or
      deviations (relative), and the sliced Wasserstein distance with its floor.
    - **source residual**: where it leaves from, against ``source``.
    - **Sinkhorn residual** (kernel-Langevin bridges): :math:`\sum_j |\sum_i w_i P_{ij} - w_j|`, how far the weights are
      from being stationary.
    - **inverse-map residual** (`LightSBBM`): largest :math:`|X(Y(x)) - x|` relative to :math:`1 + |x|`, at both ends.
    - **forward-backward gap** (`DSB`): sliced Wasserstein distance between the pairs of both ends that the forward
      chain makes from the source and the backward chain from the target, with its floor.
    - **density**: :math:`E_q[r(x) / q(x)] = 1` for a normal law r inside the draws' own; it holds for every bridge with
      a density however badly it is fitted, so a gap is an error, not a bad fit.
    - **path-weight ESS** (``density == "path"``): effective share of the weights :math:`\hat q(x) / q(\text{path})`,
      with :math:`\hat q` from paths drawn backwards. It is what the paths alone cost an importance sample, 1 where the
      backward law is the exact reverse.

    Args:
        bridge: Fitted.
        target: Draws of the target ``(N, dim)``, better held out, or a distribution.
        source: What the bridge was to leave from: draws ``(M, dim)``, or a distribution.
        context: A context for each of the target's draws, ``(N, context_dim)``; of a conditional bridge.
        num_draws: Draws of the bridge, at least 100.

    Returns:
        A `Report`: ``print`` it, ``.plot()`` it, read its ``lines``.

    Raises:
        RuntimeError: The bridge is not fitted.
        TypeError: ``bridge`` is none.
        ValueError: Draws of another size; contexts that are missing or of another number.

    Example:
        >>> from pyro_sb.bridges.light.light import LightSB
        >>> draws = torch.randn(1000, 2)
        >>> bridge = LightSB(2, num_components=3)
        >>> history = bridge.fit(draws, solver="moments", progress=False)
        >>> report = bridge_report(bridge, draws)
        >>> report.verdict, [line.name for line in report.lines if line.verdict != "-"]
        ('ok', ['marginal moments', 'marginal distance', 'density'])
    """
    if not isinstance(bridge, Bridge):
        raise TypeError(f"bridge must be a Bridge, got {type(bridge).__name__}. See report(x) for runs and posteriors.")
    if num_draws < 100:
        raise ValueError(f"num_draws must be at least 100, got {num_draws}. Omit it for 2000.")
    bridge.like()  # an error before fit
    target, context = _read_target(bridge, target, context, num_draws)
    num = num_draws if context is None else len(context)
    with torch.no_grad():
        draws = bridge().sample((num,)) if context is None else bridge(context).sample()
        lines = _marginal(draws, target, context)
        lines += _source(bridge, source, context, num)
        lines += [_sinkhorn(bridge), _inverse(bridge, draws, context), _both_ways(bridge, target, context)]
        lines += [density_line(bridge, context, num), paths_line(bridge, context, num)]
    title = f"{bridge.describe()}: dim {bridge.dim}, context_dim {bridge.context_dim}, {num} draws"
    return Report(title, lines, _panels(bridge, draws, target, context), {"draws": draws, "target": target})


def _read_target(bridge: Bridge, target: Any, context: Any, num: int) -> tuple[Tensor | None, Tensor | None]:
    """At most `KEPT` draws of the target and their contexts, in step."""
    draws = None if target is None else as_draws("target", target, bridge.dim, num_draws=num, like=bridge.like())
    if bridge.context_dim == 0:
        bridge.check_context(context)
        return (None if draws is None else _some(draws)), None
    if context is None:
        raise ValueError(
            f"context must be given for a bridge with context_dim {bridge.context_dim}: a row for each of the target's "
            "draws, bridge_report(bridge, draws, context=contexts)."
        )
    rows = as_draws("context", context, bridge.context_dim, like=bridge.like())
    if draws is not None and len(rows) != len(draws):
        raise ValueError(f"context must have a row for each of {len(draws)} draws of the target, got {len(rows)}.")
    kept = torch.randperm(len(rows))[:KEPT].to(rows.device)
    return (None if draws is None else draws[kept]), rows[kept]


def _some(draws: Tensor) -> Tensor:
    return draws if len(draws) <= KEPT else draws[torch.randperm(len(draws))[:KEPT].to(draws.device)]


def _marginal(draws: Tensor, target: Tensor | None, context: Tensor | None) -> list[Line]:
    names = ("marginal moments", "marginal distance")
    if target is None:
        return [Line(name, "not computed", "-", "pass target") for name in names]
    moments = _moments(names[0], draws, target, "fit longer, or with more components or steps")
    if context is not None:  # the joint law: a bridge that ignores its context has the right marginal
        unit = target.std(0).mean() / context.std(0).clamp_min(1e-12)
        draws, target = torch.cat([draws, context * unit], 1), torch.cat([target, context * unit], 1)
    note = "of (draw, context)" if context is not None else "between draws and target"
    return [moments, _distance(names[1], draws, target, note, "the law differs beyond its moments: fit longer")]


def _moments(name: str, draws: Tensor, target: Tensor, cure: str) -> Line:
    """Largest gap of means and deviations, and what chance would make it."""
    draws, target = draws.double(), target.double()
    sd = target.std(0).clamp_min(1e-300)
    mean = (draws.mean(0) - target.mean(0)).abs() / sd
    spread = (draws.std(0) / sd).clamp_min(1e-300).log().abs()
    chance = 3.0 * math.sqrt(1 / len(draws) + 1 / len(target))
    gap = float(torch.maximum(mean, spread).max())
    axis = int(torch.maximum(mean, spread).argmax())
    verdict = graded(gap, max(MOMENT_OK, chance), max(MOMENT_LOOK, 2 * chance))
    value = f"mean {float(mean[axis]):.3f} sd, log sd {float(spread[axis]):.3f} (axis {axis})"
    return Line(name, value, verdict, "largest gap" if verdict == "ok" else cure)


def _distance(name: str, x: Tensor, y: Tensor, note: str, cure: str) -> Line:
    score = sliced_wasserstein2(x, y)
    scale = float(y.double().var(0).mean().sqrt())
    excess = math.sqrt(max(float(score) ** 2 - score.floor**2, 0.0)) / max(scale, 1e-300)
    verdict = "ok" if float(score) <= 1.5 * score.floor else graded(excess, MOMENT_OK, MOMENT_LOOK)
    return Line(name, f"sliced W2 {score.describe()}", verdict, note if verdict == "ok" else cure)


def _source(bridge: Bridge, source: Any, context: Tensor | None, num: int) -> list[Line]:
    if source is None:
        return [Line("source residual", "not computed", "-", "pass source, or it is the bridge's own")]
    inner = _inner(bridge)
    if isinstance(inner, DiffusionBridge):
        leaves = (
            "the target, smoothed" if isinstance(inner, SmoothedBridge) else "the Gaussian that its noising ends in"
        )
        note = f"{bridge.describe()} leaves from {leaves}; for two free ends take LightSB or DSB"
        return [Line("source residual", "does not apply", "-", note)]
    wanted = as_draws("source", source, bridge.dim, num_draws=num, like=bridge.like())
    start = _starts(bridge, num, context)
    if bool((start == start[0]).all()):
        return [Line("source residual", "leaves from a point", "bad", "pass source to fit: its default is a point")]
    return [_moments("source residual", start, _some(wanted), "the bridge leaves from another law: pass source to fit")]


def _starts(bridge: Bridge, num: int, context: Tensor | None) -> Tensor:
    """Where paths begin, one for each context. Shape ``(num, dim)``."""
    return bridge.paths(num, 1)[1][0] if context is None else bridge.paths(1, 1, context)[1][0, 0]


def _sinkhorn(bridge: Bridge) -> Line:
    name, inner = "Sinkhorn residual", _inner(bridge)
    if not isinstance(inner, KernelLangevinBridge):
        return Line(name, "does not apply", "-", f"{bridge.describe()} solves no scaling")
    total = torch.zeros_like(inner.weights)
    for rows in torch.arange(len(inner.points), device=total.device).split(BLOCK):
        context = inner.context_points[rows] if inner.context_dim else None
        total += inner.weights[rows] @ inner.transition_probabilities(inner.points[rows], context)
    residual = float((total - inner.weights).abs().sum())
    verdict = graded(residual, 1e-3, 1e-2)
    note = "the weights are stationary" if verdict == "ok" else "raise max_iter or epsilon in fit"
    return Line(name, f"{residual:.1e}", verdict, note)


def _inverse(bridge: Bridge, draws: Tensor, context: Tensor | None) -> Line:
    name, inner = "inverse-map residual", _inner(bridge)
    if not isinstance(inner, LightSBBM) or math.isinf(inner.beta):
        return Line(name, "does not apply", "-", f"{bridge.describe()} has no Bass map")
    if inner is not bridge:
        draws = inner().sample((len(draws),)) if context is None else inner(context).sample()
    residual = max(_inverse_residual(inner, draws, context, t) for t in (0.0, 1.0))
    if inner.learned_map is not None:
        verdict, cure = graded(residual, 0.02, 0.1), 'a learnt inverse is approximate: solver="dual" has an exact one'
    else:
        single = draws.dtype == torch.float32
        verdict, cure = graded(residual, 1e-3 if single else 1e-9, 1e-2), "fit in float64, or raise beta"
    return Line(name, f"{residual:.1e}", verdict, "of X(Y(x)) - x" if verdict == "ok" else cure)


def _inverse_residual(bridge: LightSBBM, draws: Tensor, context: Tensor | None, t: float) -> float:
    return bridge.inverse_residual(t, _starts(bridge, len(draws), context) if t == 0.0 else draws, context)


def _both_ways(bridge: Bridge, target: Tensor | None, context: Tensor | None) -> Line:
    name, inner = "forward-backward gap", _inner(bridge)
    if not isinstance(inner, DSB):
        return Line(name, "does not apply", "-", f"{bridge.describe()} has no learnt backward chain that is drawn from")
    if target is None:
        return Line(name, "not computed", "-", "pass target: the backward chain starts there")
    end = bridge.codec.encode(target) if isinstance(bridge, LatentBridge) else target
    if context is None:
        ahead = torch.cat(inner.coupling(len(end)), 1)
    else:
        ahead = torch.cat([part[0] for part in inner.coupling(1, context)], 1)
    back = torch.cat([inner.transport_back(end, context), end], 1)
    return _distance(
        name, ahead, back, "of pairs of both ends", "the chains are not each other's reverse: iterate more"
    )


def _inner(bridge: Bridge) -> Bridge | None:
    """The bridge inside one that wraps another."""
    while isinstance(bridge, (LatentBridge, TailMatched)):
        if bridge.bridge is None:
            return None
        bridge = bridge.bridge
    return bridge


def _panels(bridge: Bridge, draws: Tensor, target: Tensor | None, context: Tensor | None) -> list[Panel]:
    def marginals(ax: Any) -> Any:
        from pyro_sb.plots import plot_marginal

        return plot_marginal(draws, target, ax=ax)

    def paths(ax: Any) -> Any:
        from pyro_sb.plots import plot_paths

        return plot_paths(bridge, context=None if context is None else context[0], ax=ax)

    panels: list[tuple[str, Callable[[Any], Any]]] = [("draws", marginals), ("paths", paths)]
    return [Panel(*panel) for panel in panels]


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
    """Cost of the weights of paths to an importance sample."""
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
