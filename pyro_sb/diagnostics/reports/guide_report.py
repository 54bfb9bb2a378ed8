"""Report of a fitted guide: its importance weights, its evidence, and the modes of its draws."""

from functools import partial
from typing import Any

from pyro_sb.diagnostics.export.draws_of import unconstrained_draws
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit, audit_or_why, audit_with, lines_of_audit
from pyro_sb.diagnostics.modes.own import enlarged
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report
from pyro_sb.diagnostics.reports.population_lines import evidence_line, sources_line
from pyro_sb.diagnostics.reports.posterior_report import draw_weights, weight_lines
from pyro_sb.diagnostics.reports.psis import psis
from pyro_sb.infer.autoguide.guide import BridgeGuide
from pyro_sb.threads import chosen_threads

__all__ = ["guide_report"]

EVERY, FRESH = 4000, 8192  # draws of the guide, and of its population's proposal


def guide_report(x: BridgeGuide, audit: str | ModeAudit | None, progress: bool = True) -> Report:
    """Of a fitted guide."""
    drawn, run = x.importance(EVERY), x.as_run(EVERY)
    result = psis(drawn)
    assert x.fitted is not None
    joint, estimates = x.fitted.target, {"the guide's draws": (result.log_evidence, result.log_evidence_error)}
    estimates["its fit"] = x.fitted.log_evidence, x.fitted.log_evidence_error
    lines = weight_lines(result, 1, "AutoBridge(model, base=guide), or MCMC(KernelLangevin(model))")
    population, made, why = x.population, audit if isinstance(audit, ModeAudit) else None, "audit=None"
    with chosen_threads(joint):
        if population is not None:
            population = enlarged(run, population, FRESH)
            estimates["its population"] = population.log_evidence, population.log_evidence_error
            if audit == "quick":
                made = audit_with(joint, (population,), unconstrained_draws(run, joint))
        if made is None and audit is not None:
            made, why = audit_or_why(run, None, (), {}, audit, progress)
    lines.append(evidence_line(estimates, result.k_hat))
    lines += lines_of_audit(made) if made is not None else [Line("modes", "not looked for", "-", why)]
    lines += [line for line in (population and sources_line(population),) if line]
    panels = [Panel("weights' tail", partial(draw_weights, result))]
    panels += [] if made is None else [Panel("modes", made.plot)]
    details: dict[str, Any] = {"psis": result} | ({} if made is None else {"modes": made})
    return Report(f"{type(x).__name__}, {joint.dim} unconstrained numbers", lines, panels, details)
