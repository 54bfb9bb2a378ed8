"""Lines of a report on what a run's population knows: its sources, its evidence, and what warm-up cost."""

import math
from collections.abc import Mapping

from pyro_sb.diagnostics.reports.lines import Line
from pyro_sb.infer.population.population import Population

__all__ = ["evidence_line", "sources_line", "warmup_line"]

SELDOM = 0.01  # share of the evidence in maxima met seldom, above which more of their kind may be unmet
CLEAR, VAGUE = 0.1, 0.5  # nats of error of a log evidence
APART_OK, APART_LOOK = 4.0, 6.0  # standard errors between two estimates
BOUNDED = 0.7  # k-hat above which an error is no guide
SHOWN = 3  # places of a log evidence


def sources_line(population: Population) -> Line | None:
    """What each source of regions met, and what it could not have met; None for a population of given points."""
    if not population.sources:
        return None
    told = [
        f"search {_maxima(source.maxima)}" if source.name == "search" else f"{source.name} {source.new} more"
        for source in population.sources
        if not source.failure
    ]
    tempered = next((s for s in population.sources if s.name != "search" and not s.failure), None)
    value = ", ".join(told)
    if tempered is None:
        why = next((s.failure for s in population.sources if s.failure), "there is none")
        return Line("sources", value, "look", f"no second source: regions that the search missed stay unseen ({why})")
    if tempered.exponent < 1:
        note = f"tempering ended at exponent {tempered.exponent:.3g} of 1: raise num_particles"
        return Line("sources", value, "look", note)
    if population.rare > SELDOM:
        note = f"{population.rare:.1%} of the evidence lies in maxima met three times or less: there may be more"
        return Line("sources", value, "look", note)
    if tempered.instead:
        note = f"particles from the {tempered.name}, not from the prior: {tempered.instead}"
        return Line("sources", value, "look", note)
    least = f"a region under {tempered.capacity:.1g} of {tempered.num} particles at every temperature may be missed"
    return Line("sources", value, "ok", least)


def _maxima(num: int) -> str:
    return f"{num or 'no'} maxim{'um' if num <= 1 else 'a'}"


def evidence_line(estimates: Mapping[str, tuple[float, float]], k_hat: float = 0.0) -> Line:
    """Log evidence with its error, and whether a second estimate agrees.

    Args:
        estimates: By origin, value and standard error, in nats; the first is shown.
        k_hat: Of the weights that the first rests on.
    """
    (_, (value, error)), *others = estimates.items()
    shown = f"{value:.{SHOWN}f} +- {error:.{SHOWN}f}"
    verdict, note = "ok" if error <= VAGUE else "look", "log evidence, in nats"
    if not error <= CLEAR:
        note = f"log evidence is known to {error:.2g} nats; raise num_particles for more"
    for name, (other, its) in others:
        apart = abs(value - other) / max(math.hypot(error, its), 1e-3)
        if not apart <= APART_OK:
            verdict = "bad" if not apart <= APART_LOOK and k_hat <= BOUNDED else "look"
            return Line("evidence", shown, verdict, f"{name} says {other:.{SHOWN}f} +- {its:.{SHOWN}f}: trust neither")
        note += f"; {name} agrees, {other:.{SHOWN}f}" if verdict == "ok" else ""
    return Line("evidence", shown, verdict, note)


def warmup_line(seconds: Mapping[str, float]) -> Line | None:
    """Share of the wall time that was warm-up; None where it is not known."""
    total = sum(seconds.values())
    if total <= 0:
        return None
    share = seconds["warmup"] / total
    note = "of the run's time; more draws cost little" if share > 0.5 else "of the run's time"
    return Line("warm-up", f"{share:.0%} of {total:.1f} s", "ok", note)
