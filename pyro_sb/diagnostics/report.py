"""`report`: one table and one figure for whatever was fitted or run."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from pyro_sb.bridges.base import Bridge
from pyro_sb.diagnostics.bridge_report import bridge_report
from pyro_sb.diagnostics.calibration import Calibration, tarp
from pyro_sb.diagnostics.chain_figures import ChainFigures, chain_figures
from pyro_sb.diagnostics.container import to_container
from pyro_sb.diagnostics.draws_of import is_container, is_run
from pyro_sb.diagnostics.groups import to_groups
from pyro_sb.diagnostics.lines import Line, Panel, Report, graded
from pyro_sb.diagnostics.mode_audit import ModeAudit, mode_audit
from pyro_sb.diagnostics.psis import PSIS, psis
from pyro_sb.diagnostics.simulated import calibration_draws
from pyro_sb.infer.amortized import AmortizedPosterior
from pyro_sb.infer.posterior import Posterior

__all__ = ["report"]

R_HAT_OK, R_HAT_LOOK = 1.01, 1.05
ESS_OK, ESS_LOOK = 400.0, 100.0
EVERY = 4000  # draws of a posterior that importance weights are taken from
BLIND = "chains compare themselves with each other: a mode that all miss is not seen here"


def report(
    x: Any,
    model: Callable[..., Any] | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    modes: bool | ModeAudit = True,
    num_data_sets: int = 200,
    target_draws: Any = None,
    source: Any = None,
    context: Any = None,
) -> Report:
    r"""A verdict on whatever was fitted or run: ok, look, or bad, line by line, and what to do.

    - A finished `MCMC`, ours or Pyro's, or an ArviZ container: R-hat, bulk and tail effective sizes, divergences,
      what the kernel's warm-up knew, and the `mode_audit`, which looks where chains cannot.
    - A conditioned `Posterior`: the importance weights' k-hat and effective size under the model, and the audit.
    - A fitted `AmortizedPosterior`: calibration of each parameter and of all together (`sbc`, `tarp`).
    - A fitted `Bridge`: `bridge_report`.

    **No line proves a posterior right**; each names what it would have seen.

    Args:
        x: One of these.
        model: The Pyro model for the audit, where ``x`` does not know it (an ArviZ container).
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        modes: False: no audit, which costs two populations of the target. A `ModeAudit` made before is shown as it is.
        num_data_sets: Data sets of a calibration.
        target_draws: Of a bridge: draws of its target.
        source: Of a bridge: what it was to leave from.
        context: Of a bridge: contexts of those draws.

    Raises:
        ImportError: Chains, and ArviZ is not installed.
        RuntimeError: ``x`` was not fitted, or has not run.
        TypeError: ``x`` is none of these.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_sb.infer.kernels import KernelLangevin
        >>> from pyro_sb.infer.mcmc import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(KernelLangevin(model), num_samples=100, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.tensor(0.5))
        >>> found = report(mcmc)
        >>> found.verdict, found["R-hat"].verdict
        ('ok', 'ok')
    """
    if isinstance(x, Bridge):
        return bridge_report(x, target_draws, source, context)
    if isinstance(x, AmortizedPosterior):
        return _amortised(x, num_data_sets)
    if isinstance(x, Posterior):
        return _posterior(x, modes)
    if not is_run(x) and not is_container(x):
        raise TypeError(
            "x must be a finished MCMC, an ArviZ container, a Posterior, an AmortizedPosterior or a Bridge, got "
            f"{type(x).__name__}. Call run() or fit() and pass the object itself."
        )
    return _run(x, model, args, dict(kwargs or {}), modes)


# ---- chains ----


def _run(x: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: bool | ModeAudit) -> Report:
    container = x if is_container(x) else to_container(to_groups(x).arrays)
    figures = chain_figures(container)
    lines = _convergence(figures) + ([] if is_container(x) else _kernel(x))
    panels = [Panel("R-hat and ESS", partial(_draw_chains, figures))]
    details: dict[str, Any] = {"figures": figures}
    audit, why = _audited(x, model, args, kwargs, modes)
    if audit is None:
        lines.append(Line("modes", "not looked for", "look" if modes is not False else "-", f"{why}; {BLIND}"))
    else:
        lines += [Line(f"modes: {line.name}", line.value, line.verdict, line.note) for line in audit.lines]
        panels.append(Panel("modes", audit.plot))
        details["modes"] = audit
    chains = f"{figures.num_chains} chain{'s' * (figures.num_chains > 1)} of {figures.num_draws} draws"
    title = f"{chains}, {len(figures.names)} number{'s' * (len(figures.names) > 1)}"
    return Report(title, lines, panels, details)


def _convergence(figures: ChainFigures) -> list[Line]:
    constant = np.isnan(figures.r_hat)
    r_hat = np.where(constant, -np.inf, figures.r_hat)
    i, bulk, tail = int(r_hat.argmax()), _least(figures.ess_bulk), _least(figures.ess_tail)
    lines = []
    if bool(constant.all()):
        lines.append(Line("R-hat", "-", "bad", "every number is constant, or not finite: the chains do not move"))
    else:
        verdict = graded(float(r_hat[i]), R_HAT_OK, R_HAT_LOOK)
        note = "chains agree with each other" if verdict == "ok" else "chains disagree: run longer, or start elsewhere"
        if figures.num_chains == 1:
            verdict = "look" if verdict == "ok" else verdict
            note = "one chain, by its halves: run four or more"
        lines.append(Line("R-hat", f"{r_hat[i]:.3f} ({figures.names[i]})", verdict, note))
    for name, figure, j in (("bulk ESS", figures.ess_bulk, bulk), ("tail ESS", figures.ess_tail, tail)):
        verdict = graded(float(figure[j]), ESS_OK, ESS_LOOK, high_is_good=True)
        of = "means" if name == "bulk ESS" else "5 % and 95 % quantiles"
        note = f"enough for {of}" if verdict == "ok" else f"too few for {of}: draw more"
        lines.append(Line(name, f"{figure[j]:.0f} ({figures.names[j]})", verdict, note))
    if figures.diverging is None:
        lines.append(Line("divergences", "not recorded", "-"))
    else:
        share = figures.diverging / (figures.num_chains * figures.num_draws)
        note = "" if share == 0 else "smaller steps, or another parametrisation (non-centred)"
        lines.append(Line("divergences", f"{figures.diverging} ({share:.1%})", graded(share, 0.0, 0.01), note))
    return lines


def _least(figure: np.ndarray) -> int:
    return int(np.where(np.isnan(figure), np.inf, figure).argmin())


def _kernel(x: Any) -> list[Line]:
    """What our kernels knew after their warm-up."""
    found = {key: _first(value) for key, value in x.diagnostics().items() if not _is_site(value)}
    lines = []
    if "population share" in found:
        share = found["population share"]
        note = (
            "of the population that warm-up fitted" if share >= 0.1 else "the population is poor: raise num_particles"
        )
        lines.append(
            Line("population", f"effective share {share:.2f}", graded(share, 0.1, 0.02, high_is_good=True), note)
        )
    if "k_hat" in found:
        k_hat = found["k_hat"]
        note = "of the bridge's weights" if k_hat <= 0.7 else "the bridge misses a tail: chains may stay in it for long"
        lines.append(Line("bridge's k-hat", f"{k_hat:.2f}", "ok" if k_hat <= 0.7 else "look", note))
    for role, what in (("bridge", "the bridge's move"), ("index", "the population's move")):
        rate = found.get(f"acceptance {role}")
        if rate is not None and rate == rate:
            note = f"{what} crosses between modes" if rate >= 0.05 else f"{what} hardly accepts: fit it better"
            verdict = graded(rate, 0.05, 0.01, high_is_good=True)
            lines.append(
                Line(
                    f"acceptance {role}",
                    f"{rate:.2f}",
                    verdict if role != "bridge" else verdict.replace("bad", "look"),
                    note,
                )
            )
    return lines


def _is_site(value: Any) -> bool:
    return isinstance(value, Mapping) and "r_hat" in value


def _first(value: Any) -> Any:
    """The mean over chains of a kernel's figure."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    if not values or not all(isinstance(v, (int, float)) for v in values):
        return float("nan")
    return float(np.mean(values))


def _audited(
    x: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: bool | ModeAudit
) -> tuple[ModeAudit | None, str]:
    """The audit, or why there is none."""
    if isinstance(modes, ModeAudit):
        return modes, ""
    if not modes:
        return None, "modes=False"
    if model is None and is_container(x):
        return None, "pass model and args for the audit"
    try:
        if model is not None:
            return mode_audit(model, x, args=args, kwargs=kwargs), ""
        return mode_audit(x), ""
    except (ValueError, NotImplementedError) as error:
        return None, f"no audit: {str(error).split('. ')[0]}"


def _draw_chains(figures: ChainFigures, ax: Any) -> Any:
    from pyro_sb.plots import plot_chains

    return plot_chains(figures, ax=ax)


# ---- posteriors ----


def _posterior(x: Posterior, modes: bool | ModeAudit) -> Report:
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
        lines += _weights(result, batch)
        panels.append(Panel("weights' tail", partial(_draw_weights, result)))
        details["psis"] = result
    audit, why = (None, "one observation at a time") if batch > 1 else _audited(x, None, (), {}, modes)
    if audit is None:
        lines.append(Line("modes", "not looked for", "-", why))
    else:
        lines += [Line(f"modes: {line.name}", line.value, line.verdict, line.note) for line in audit.lines[:2]]
        panels.append(Panel("modes", audit.plot))
        details["modes"] = audit
    title = f"Posterior by {type(x.bridge).__name__}, {batch} observation{'s' * (batch > 1)}"
    return Report(title, lines, panels, details)


def _weights(result: PSIS, batch: int) -> list[Line]:
    of = "" if batch == 1 else f", worst of {batch} observations"
    cure = "use mcmc() of the posterior, or fit on more simulations"
    note = {"good": "weights can be used", "usable": "weights can be used with care: importance(n) with more draws"}
    share = result.ess / result.num_draws
    return [
        Line("Pareto k-hat", f"{result.k_hat:.2f}{of}", result.verdict, note.get(result.reading, cure)),
        Line(
            "effective share",
            f"{share:.1%} of {result.num_draws}",
            graded(share, 0.1, 0.01, high_is_good=True),
            "of draws, under the model" if share >= 0.1 else f"sample() alone is off: {cure}",
        ),
    ]


def _draw_weights(result: PSIS, ax: Any) -> Any:
    from pyro_sb.plots import plot_weights

    return plot_weights(result, ax=ax)


def _amortised(x: AmortizedPosterior, num_data_sets: int) -> Report:
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
