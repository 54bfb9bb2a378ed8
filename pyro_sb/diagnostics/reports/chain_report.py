"""Report of a run: convergence, figures of the kernel's warm-up, and the mode audit."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from pyro_sb.diagnostics.export.container import ChainFigures, chain_figures, is_container, to_container
from pyro_sb.diagnostics.export.draws_of import run_of
from pyro_sb.diagnostics.export.groups import to_groups
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit, audit_or_why, lines_of_audit
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report, graded
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.kernel import WalkingKernel
from pyro_sb.infer.model.run import Run

__all__ = ["chain_report"]

R_HAT_OK, R_HAT_LOOK = 1.01, 1.05
ESS_OK, ESS_LOOK = 400.0, 100.0
SPARE = 1e-3  # divergent share that our kernels' many jittered short steps may have
BLIND = "chains compare themselves with each other: a mode that all miss is not seen here"


def chain_report(x: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: bool | ModeAudit) -> Report:
    """Of a finished run, or of an ArviZ container."""
    run = None if is_container(x) else run_of(x)
    figures = chain_figures(x if run is None else to_container(to_groups(run).arrays))
    lines = [*_still(figures), _r_hat(figures), *_sizes(figures), _divergences(figures, run)]
    lines += [] if run is None else _kernel(run)
    panels = [Panel("R-hat and ESS", partial(_draw_chains, figures))]
    details: dict[str, Any] = {"figures": figures}
    audit, why = audit_or_why(x, model, args, kwargs, modes)
    if audit is None:
        lines.append(Line("modes", "not looked for", "look" if modes is not False else "-", f"{why}; {BLIND}"))
    else:
        lines += lines_of_audit(audit)
        panels.append(Panel("modes", audit.plot))
        details["modes"] = audit
    chains = f"{figures.num_chains} chain{'s' * (figures.num_chains > 1)} of {figures.num_draws} draws"
    title = f"{chains}, {len(figures.names)} number{'s' * (len(figures.names) > 1)}"
    return Report(title, lines, panels, details)


def _still(figures: ChainFigures) -> list[Line]:
    """Numbers that R-hat and ESS cannot be asked about: not finite, or constant."""
    assert figures.not_finite is not None and figures.constant is not None
    lines = []
    if figures.not_finite.any():
        i = int(figures.not_finite.argmax())
        worst, num = int(figures.not_finite[i]), int((figures.not_finite > 0).sum())
        value = f"{worst} draw{'s' * (worst > 1)} of {figures.names[i]} {'are' if worst > 1 else 'is'} not finite"
        value += f", of {num - 1} more numbers too" if num > 1 else ""
        lines.append(Line("finite draws", value, "bad", "NaN or infinity: find out in the model or sampler where from"))
    if figures.constant.any() and not figures.constant.all():
        sites = [name.split("[")[0] for name in figures.names]
        moving = {site for site, constant in zip(sites, figures.constant) if not constant}
        whole = list(dict.fromkeys(site for site in sites if site not in moving))
        part = [name for name, constant in zip(figures.names, figures.constant) if constant]
        note = "a deterministic site, or chains that stand still in it" if whole else "parts of sites that move"
        lines.append(Line("constant", _listed(whole or part), "look" if whole else "-", note))
    return lines


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _r_hat(figures: ChainFigures) -> Line:
    if figures.num_chains == 1 and figures.num_draws < 8:
        return Line("R-hat", "-", "look", f"too few draws for R-hat: one chain of {figures.num_draws}; draw more")
    if bool(np.isnan(figures.r_hat).all()):
        assert figures.constant is not None
        still = "every number is constant: the chains do not move"
        return Line("R-hat", "-", "bad", still if figures.constant.all() else "no number is finite and moves")
    r_hat = np.where(np.isnan(figures.r_hat), -np.inf, figures.r_hat)
    i = int(r_hat.argmax())
    verdict = graded(float(r_hat[i]), R_HAT_OK, R_HAT_LOOK)
    note = "chains agree with each other" if verdict == "ok" else "chains disagree: run longer, or start elsewhere"
    if figures.num_chains == 1:
        verdict = "look" if verdict == "ok" else verdict
        note = "one chain, by its halves: run four or more"
    shown = f"{r_hat[i]:.3f}" if r_hat[i] < 100 else "> 99"
    return Line("R-hat", f"{shown} ({figures.names[i]})", verdict, note)


def _sizes(figures: ChainFigures) -> list[Line]:
    lines = []
    for name, figure in (("bulk ESS", figures.ess_bulk), ("tail ESS", figures.ess_tail)):
        if bool(np.isnan(figure).all()):
            lines.append(Line(name, "-", "bad", "no number is finite and moves"))
            continue
        i = int(np.where(np.isnan(figure), np.inf, figure).argmin())
        verdict = graded(float(figure[i]), ESS_OK, ESS_LOOK, high_is_good=True)
        of = "means" if name == "bulk ESS" else "5 % and 95 % quantiles"
        note = f"enough for {of}" if verdict == "ok" else f"too few for {of}: draw more"
        lines.append(Line(name, f"{figure[i]:.0f} ({figures.names[i]})", verdict, note))
    return lines


def _divergences(figures: ChainFigures, run: Run | None) -> Line:
    if figures.diverging is None:
        return Line("divergences", "not recorded", "-")
    total = figures.num_chains * figures.num_draws
    share, spared, of = figures.diverging / total, 0.0, ""
    if run is not None and "diverging_share" in run.sample_stats:  # a draw is flagged for any one of its observations
        share, of = float(run.sample_stats["diverging_share"].mean()), " an observation"
    cure = "smaller steps, or another parametrisation (non-centred)"
    kernel = None if run is None else run.kernel
    if isinstance(kernel, WalkingKernel):  # it has no step size to set, and a single one says nothing
        spared = max(SPARE, 1 / total)
        cure = kernel.divergence_cure
    verdict = graded(share, spared, 0.01)
    note = "" if share == 0 else cure if verdict != "ok" else "few, of steps of many lengths"
    return Line("divergences", f"{figures.diverging} ({share:.1%}{of})", verdict, note)


def _kernel(run: Run) -> list[Line]:
    """Figures of our kernels' warm-up and moves."""
    found = {key: _mean(value) for key, value in run.figures().items() if not _is_site(value)}
    lines = []
    if "population share" in found:
        share = found["population share"]
        note = "of the population that warm-up fitted" if share >= 0.1 else "a poor population: raise num_particles"
        verdict = graded(share, 0.1, 0.02, high_is_good=True)
        lines.append(Line("population", f"effective share {share:.2f}", verdict, note))
    if "k_hat" in found:
        k_hat = found["k_hat"]
        note = "of the bridge's weights" if k_hat <= 0.7 else "the bridge misses a tail: chains may stay in it for long"
        lines.append(Line("bridge's k-hat", f"{k_hat:.2f}", "ok" if k_hat <= 0.7 else "look", note))
    local = isinstance(run.kernel, KernelLangevin)
    for role in ("bridge", "index"):
        rate = found.get(f"acceptance {role}", float("nan"))
        if rate == rate:
            lines.append(_acceptance(role, rate, local and role == "bridge"))
    return lines


def _acceptance(role: str, rate: float, local: bool) -> Line:
    """Of a move; whether its proposals cross between modes, the audit tells."""
    if rate >= 0.05:
        note = "of the bridge's local move" if local else "of proposals of whole points"
    elif local:
        note = "the bridge's local move hardly accepts: chains rely on the others"
    else:
        cure = "fit the bridge better" if role == "bridge" else "raise num_particles"
        note = f"proposals of whole points are hardly accepted: {cure}, or rely on the local move"
    return Line(f"acceptance {role}", f"{rate:.2f}", "ok" if rate >= 0.05 else "look", note)


def _is_site(value: Any) -> bool:
    return isinstance(value, Mapping) and "r_hat" in value


def _mean(value: Any) -> Any:
    """The mean over chains of a kernel's figure."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    if not values or not all(isinstance(v, (int, float)) for v in values):
        return float("nan")
    return float(np.mean(values))


def _draw_chains(figures: ChainFigures, ax: Any) -> Any:
    from pyro_sb.plots import plot_chains

    return plot_chains(figures, ax=ax)
