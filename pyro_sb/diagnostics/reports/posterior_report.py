"""Reports of posteriors: weights and modes of one that is conditioned, calibration of one that is amortised."""

import warnings
from functools import partial
from typing import Any

import numpy as np

from pyro_sb.diagnostics.calibration.calibration import Calibration, tarp
from pyro_sb.diagnostics.calibration.simulated import calibration_draws
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit, audit_or_why, lines_of_audit
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report, graded
from pyro_sb.diagnostics.reports.psis import PSIS, psis
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.posterior import Posterior

__all__ = ["amortised_report", "draw_weights", "posterior_report", "weight_lines"]

EVEN = 0.99  # effective share above which a tail of weights is of no consequence
EVERY = 4000  # draws of a posterior that importance weights are taken from


def posterior_report(x: Posterior, audit: str | ModeAudit | None, progress: bool = True) -> Report:
    """Of a conditioned posterior: its importance weights, and its draws' modes."""
    batch = len(x.observation.values)
    lines, panels, details = [], [], dict[str, Any]()
    if x.simulator.returned or x.simulator.hidden or x.bridge.density is None:
        why = "the model has no density" if x.bridge.density else f"the bridge has none: {x.bridge.density_hint}"
        lines.append(Line("importance weights", "none", "look", f"{why}: nothing corrects these draws; see sbc"))
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Pareto k", RuntimeWarning)  # a line says so
            log_weights = x.importance(EVERY).log_weights
        results = [psis(column) for column in log_weights.reshape(EVERY, -1).unbind(1)]
        result = max(results, key=lambda one: one.k_hat)
        lines += weight_lines(result, batch, "use mcmc() of the posterior, or fit on more simulations")
        panels.append(Panel("weights' tail", partial(draw_weights, result)))
        details["psis"] = result
    made, why = (None, "one observation at a time") if batch > 1 else audit_or_why(x, None, (), {}, audit, progress)
    if made is None:
        lines.append(Line("modes", "not looked for", "-", why))
    else:
        lines += lines_of_audit(made)[:2]
        panels.append(Panel("modes", made.plot))
        details["modes"] = made
    lines.append(_world(x))
    title = f"Posterior by {type(x.bridge).__name__}, {batch} observation{'s' * (batch > 1)}"
    return Report(title, lines, panels, details)


def _world(x: Posterior) -> Line:
    """Place of the observation among simulations."""
    if x.observation.missing or x.num_fitted < 40:
        return Line("this world", "not looked at", "-", "missing entries, or few simulations")
    found, note = x.surprise(), "the observation is like simulations"
    if found.verdict != "ok":
        note = f"unlike simulations in {', '.join(list(found.standing_out)[:3]) or 'all together'}: see surprise(y)"
    return Line("this world", f"p {found.smallest_p_value:.2g}", found.verdict, note)


def weight_lines(result: PSIS, batch: int, cure: str) -> list[Line]:
    """Pareto k and effective share of importance weights, and what to do where they are poor."""
    of = "" if batch == 1 else f", worst of {batch} observations"
    note = {"good": "weights can be used", "usable": "weights can be used with care: importance(n) with more draws"}
    share = result.ess / result.num_draws
    tail = result.verdict, note.get(result.reading, cure)
    if share >= EVEN:
        tail = "ok", "of weights that are all but equal"
    return [
        Line("Pareto k-hat", f"{result.k_hat:.2f}{of}", *tail),
        Line(
            "effective share",
            f"{share:.1%} of {result.num_draws}",
            graded(share, 0.1, 0.01, high_is_good=True),
            "of draws, under the model" if share >= 0.1 else f"sample() alone is off: {cure}",
        ),
    ]


def draw_weights(result: PSIS, ax: Any) -> Any:
    """Picture of the weights' tail."""
    from pyro_sb.plots import plot_weights

    return plot_weights(result, ax=ax)


def amortised_report(x: AmortizedPosterior, num_data_sets: int) -> Report:
    """Of a fitted amortised posterior: calibration by parameter and of all together."""
    joint = calibration_draws(x, num_data_sets)
    ranks, regions = Calibration.of(joint.truths, joint.draws, joint.names), tarp(joint.draws, joint.truths)
    p = ranks.band_p_values
    i, cure = int(p.argmin()), "fit on more simulations, or correct: condition(y).importance() or .mcmc()"
    lines = [
        Line(
            "SBC ranks",
            f"smallest p {float(p[i]):.2g} of {len(p)} ({ranks.names[i]})",
            ranks.verdict,
            f"uniform over {len(joint.truths)} data sets" if ranks.verdict == "ok" else cure,
        ),
        Line("TARP", f"p {float(regions.band_p_values[0]):.2g}", regions.verdict, _joint_words(regions.verdict, cure)),
        _covered(ranks, len(joint.truths), cure),
        Line(
            "one observation",
            "not looked at",
            "-",
            "SBC is over the prior: see local_c2st(amortized, y), report(posterior)",
        ),
    ]
    panels = [Panel("SBC", partial(_draw_sbc, ranks)), Panel("coverage", partial(_draw_coverage, ranks, regions))]
    assert x.bridge is not None
    title = f"AmortizedPosterior by {type(x.bridge).__name__}, {len(joint.names)} parameters"
    return Report(title, lines, panels, {"sbc": ranks, "tarp": regions})


def _joint_words(verdict: str, cure: str) -> str:
    return "all parameters together" if verdict == "ok" else f"parameters together are off: {cure}"


def _covered(ranks: Calibration, num: int, cure: str) -> Line:
    covered = ranks.coverage([0.9])[0]
    i = int((covered - 0.9).abs().argmax())
    z = float(covered[i] - 0.9) / (0.09 / num) ** 0.5
    tail = abs(z) - (2 * np.log(max(len(covered), 1))) ** 0.5  # the largest of P normals
    verdict = graded(max(tail, 0.0), 2.5, 3.5)
    note = "truths in 90 % intervals" if verdict == "ok" else ("too narrow: " if z < 0 else "too wide: ") + cure
    return Line("coverage", f"{float(covered[i]):.1%} ({ranks.names[i]})", verdict, note)


def _draw_sbc(ranks: Calibration, ax: Any) -> Any:
    from pyro_sb.plots import plot_sbc

    return plot_sbc(ranks, ax=ax)


def _draw_coverage(ranks: Calibration, regions: Calibration, ax: Any) -> Any:
    from pyro_sb.plots import plot_coverage

    return plot_coverage(ranks, regions, ax=ax)
