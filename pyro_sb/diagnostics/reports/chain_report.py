"""Report of a run: convergence, figures of the kernel's warm-up, and what populations say of its modes and tails."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_sb.diagnostics.calibration.simulated import number_names
from pyro_sb.diagnostics.export.container import ChainFigures, chain_figures, is_container, to_container
from pyro_sb.diagnostics.export.draws_of import run_of, target_of, unconstrained_draws
from pyro_sb.diagnostics.export.groups import to_groups
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit, audit_or_why, audit_with, lines_of_audit
from pyro_sb.diagnostics.modes.own import affordable_draws, enlarged, population_of
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report, graded, worst
from pyro_sb.diagnostics.reports.population_lines import evidence_line, sources_line, warmup_line
from pyro_sb.diagnostics.reports.tails import audit_tails
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.walking import WalkingKernel
from pyro_sb.infer.model.log_joint import Evaluations, LogJoint
from pyro_sb.infer.model.run import Run
from pyro_sb.threads import chosen_threads
from pyro_sb.weights import pareto_k

__all__ = ["chain_report"]

logger = logging.getLogger(__name__)
R_HAT_OK, R_HAT_OF_MANY, MANY, R_HAT_LOOK = 1.01, 1.02, 8, 1.05
ESS_OK, ESS_LOOK = 400.0, 100.0
SPARE, SPARE_LOOK = 0.01, 0.05  # divergent shares of steps whose lengths spread over a factor of up to thirty
BLIND = "chains compare themselves with each other: a mode that all miss is not seen here"


def chain_report(
    x: Any,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    audit: str | ModeAudit | None,
    progress: bool = True,
) -> Report:
    """Of a finished run, or of an ArviZ container."""
    run = None if is_container(x) else run_of(x)
    figures = chain_figures(x if run is None else to_container(to_groups(run).arrays))
    lines = [*_still(figures), _r_hat(figures), *_sizes(figures), _divergences(figures, run)]
    found = {} if run is None else {k: _mean(v) for k, v in run.figures().items() if not _is_site(v)}
    converged = worst([line for line in lines if line.name in ("R-hat", "bulk ESS", "tail ESS")]) == "ok"
    lines += [] if run is None else _kernel(run, found)
    panels = [Panel("R-hat and ESS", partial(_draw_chains, figures))]
    details: dict[str, Any] = {"figures": figures}
    looked = _looked(x, run, model, args, kwargs, audit, progress, found, converged)
    lines += looked.lines
    details |= looked.details
    panels += [Panel("modes", looked.audit.plot)] if looked.audit is not None else []
    lines += [line for line in (None if run is None else warmup_line(run.seconds),) if line is not None]
    chains = f"{figures.num_chains} chain{'s' * (figures.num_chains > 1)} of {figures.num_draws} draws"
    title = f"{chains}, {len(figures.names)} number{'s' * (len(figures.names) > 1)}"
    return Report(title, lines, panels, details)


class Looked(NamedTuple):
    """What a population says of draws: lines, details, and the mode audit if there was one."""

    lines: list[Line]
    details: dict[str, Any]
    audit: ModeAudit | None


def _looked(
    x: Any,
    run: Run | None,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    audit: str | ModeAudit | None,
    progress: bool,
    found: dict[str, float],
    converged: bool,
) -> Looked:
    """Modes, tails, sources and evidence, by the run's own population, or by two that are made for it."""
    own = population = None if run is None or model is not None else population_of(run)
    draws, joint, made = None, None, audit if isinstance(audit, ModeAudit) else None
    evidence: dict[str, tuple[float, float]] = {}
    why = "audit=None"
    if own is not None and audit is not None and made is None:
        assert run is not None
        joint, draws = run.log_joint, _unconstrained(run, run.log_joint)
        rows = Evaluations(*(int(max(0.0, found.get(f"{kind} evaluations", 0.0))) for kind in ("density", "gradient")))
        with chosen_threads(joint):
            population = enlarged(run, own, affordable_draws(rows))
            if audit == "quick" and draws is not None:
                made = audit_with(joint, (population,), draws)
        evidence["the warm-up's population"] = own.log_evidence, own.log_evidence_error
        pilot = getattr(run.kernel, "pilot", None)
        if pilot is not None and pilot.k_hat <= 0.7:
            evidence["the bridge"] = pilot.log_evidence
    if made is None and audit is not None and not (audit == "quick" and own is not None):
        made, why = audit_or_why(x, model, args, kwargs, audit, progress)
    if population is None and made is not None and not isinstance(audit, ModeAudit):
        population = made.populations[0]
        joint, beside = target_of(x, model, args=args, kwargs=kwargs)
        draws = _unconstrained(x if run is None else run, joint)
    if made is not None:
        for kind, other in zip(made.kinds, made.populations):
            evidence[f"the population from {kind}"] = other.log_evidence, other.log_evidence_error
    lines = _mode_lines(made, why, audit)
    details: dict[str, Any] = {} if made is None else {"modes": made}
    if population is None:
        return Looked(lines, details, made)
    if draws is not None and joint is not None:
        names = _tail_names(joint, population.points)
        weighted = population.points, population.log_weights
        tails = audit_tails(*weighted, draws, names, population.excess, converged)
        lines.append(tails.line)
        details["tails"] = tails
    if own is not None:
        evidence = {"more draws": (population.log_evidence, population.log_evidence_error)} | evidence
    lines.append(evidence_line(evidence, pareto_k(population.log_weights)))
    lines += [line for line in (sources_line(population),) if line is not None]
    return Looked(lines, details, made)


def _mode_lines(made: ModeAudit | None, why: str, audit: str | ModeAudit | None) -> list[Line]:
    if made is not None:
        return lines_of_audit(made)
    return [Line("modes", "not looked for", "-" if audit is None else "look", f"{why}; {BLIND}")]


def _unconstrained(x: Any, joint: LogJoint) -> Tensor | None:
    """Draws in the target's coordinates; None where a site was not kept or a draw is not finite."""
    try:
        return unconstrained_draws(x, joint)
    except ValueError as error:
        logger.info("no draws to compare with a population: %s", error)
        return None


def _tail_names(joint: LogJoint, points: Tensor) -> tuple[str, ...]:
    """Names of the coordinates; 'unconstrained' where a site's own space is another."""
    some = points[:4]
    free, own = joint.unpack(some), joint.constrain(some)
    names: list[str] = []
    for name, value in free.items():
        same = own[name].shape == value.shape and torch.equal(own[name].to(value), value)
        names += number_names({name if same else f"unconstrained {name}": value.shape[1:]})
    return tuple(names)


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
        note = f"too few draws for R-hat: one chain of {figures.num_draws}; draw more"
        return Line("R-hat", "-", "look", note, short=True)
    if bool(np.isnan(figures.r_hat).all()):
        assert figures.constant is not None
        still = "every number is constant: the chains do not move"
        return Line("R-hat", "-", "bad", still if figures.constant.all() else "no number is finite and moves")
    r_hat = np.where(np.isnan(figures.r_hat), -np.inf, figures.r_hat)
    i = int(r_hat.argmax())
    verdict = graded(float(r_hat[i]), agreeing(figures.num_chains), R_HAT_LOOK)
    note = "chains agree with each other" if verdict == "ok" else "not enough draws yet, or chains stuck: run longer"
    if figures.num_chains == 1:
        verdict = "look" if verdict == "ok" else verdict
        note = "one chain, by its halves: run four or more"
    shown = f"{r_hat[i]:.3f}" if r_hat[i] < 100 else "> 99"
    return Line("R-hat", f"{shown} ({figures.names[i]})", verdict, note, short=True)


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
        lines.append(Line(name, f"{figure[i]:.0f} ({figures.names[i]})", verdict, note, short=True))
    return lines


def _divergences(figures: ChainFigures, run: Run | None) -> Line:
    if figures.diverging is None:
        return Line("divergences", "not recorded", "-")
    total = figures.num_chains * figures.num_draws
    share, spared, most, of = figures.diverging / total, 0.0, 0.01, ""
    if run is not None and "diverging_share" in run.sample_stats:  # a draw is flagged for any one of its observations
        share, of = float(run.sample_stats["diverging_share"].mean()), " an observation"
    cure = "smaller steps, or another parametrisation (non-centred)"
    kernel = None if run is None else run.kernel
    if isinstance(kernel, WalkingKernel):  # the longest steps fail where shorter ones do not; chains that none moves
        spared, most = max(SPARE, 1 / total), SPARE_LOOK  # stand still, which R-hat and the line of tails see
        cure = kernel.divergence_cure
    verdict = graded(share, spared, most)
    note = "" if share == 0 else cure if verdict != "ok" else "few, of steps of many lengths"
    return Line("divergences", f"{figures.diverging} ({share:.1%}{of})", verdict, note)


def _kernel(run: Run, found: dict[str, float]) -> list[Line]:
    """Figures of our kernels' warm-up and moves."""
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


def agreeing(num_chains: int) -> float:
    r"""R-hat up to which chains agree.

    Of chains that agree, :math:`\hat R^2 - 1` is one over the effective draws of half a chain, whatever their number.
    So 1.01 asks for a hundred of each chain: what four chains need for 400. Of more chains the means are
    known before that, and all that R-hat must tell is whether each has left its start: 1.02, fifty of each.

    References:
        Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021), section 4, for four
        chains; Nested R-hat (Margossian et al., 2024), section 2, for many.
    """
    return R_HAT_OF_MANY if num_chains >= MANY else R_HAT_OK
