"""Report of a learned likelihood, on held-out runs: what its networks gain, whether its draws are the simulator's."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_sb.diagnostics.calibration.calibration import Calibration
from pyro_sb.diagnostics.calibration.local_classifier import LocalC2ST
from pyro_sb.diagnostics.calibration.simulated import number_names
from pyro_sb.diagnostics.reports.lines import Line, Panel, Report
from pyro_sb.infer.amortized.likelihood.likelihood import AmortizedLikelihood

__all__ = ["likelihood_report"]

DRAWS = 100  # of the likelihood, a held-out run, that its rank is taken among
PLACES, AT_PLACE = 4, 500  # parameters where a classifier looks, and draws there
MOST = 2000  # held-out runs that are looked at
CURE = "simulate more, or let one run be one trial"


def likelihood_report(x: AmortizedLikelihood) -> Report:
    r"""Of a fitted likelihood, on the runs that it did not learn from.

    Ranks of the data among draws at the same parameters are uniform where :math:`p(y | \theta)` is right, number by
    number. A classifier of pairs :math:`(\theta, y)` of the simulator and of the likelihood looks at all numbers
    together, at some parameters: the local test of `local_c2st` with data and parameters exchanged.
    """
    theta, y = (part[:MOST] for part in x.held_out)
    columns, num = x.parts.columns, len(theta)
    if num < 100:
        raise ValueError(
            f"a report needs at least 100 held-out simulations, got {num}. Write fit(held_out=0.2), or more."
        )
    law = x(dict(zip(columns.shapes, _split(theta, columns.shapes))))
    draws = law.sample((DRAWS,)).reshape(DRAWS, num, -1).double()
    data = y.reshape(num, -1).double()
    whole = list(x.parts.data.discrete)
    made = draws.clone()
    shown = data.clone()
    made[..., whole] += torch.rand_like(made[..., whole])  # ranks of discrete numbers, their ties at random
    shown[:, whole] += torch.rand_like(shown[:, whole])
    names = number_names({x.observed: x.parts.data.event_shape})
    ranks = Calibration.of(shown, made, names)
    p = ranks.band_p_values
    worst = int(p.argmin())
    places = _places(theta)
    found = [_local(x, theta, shown, made[0], theta[i]) for i in places]
    local = min(found, key=lambda one: one.tail_p_value)
    least = min(1.0, local.tail_p_value * len(found))
    gain = x.scores["learnt"] - x.scores["affine Gaussian"]
    lines = [
        Line(
            "held-out log density",
            f"{x.scores['learnt']:.3f} nats a run",
            "ok" if gain > -0.05 else "look",
            f"{gain:+.3f} beside an affine Gaussian regression{'' if gain > -0.05 else f': {CURE}'}",
        ),
        Line(
            "ranks of data",
            f"smallest p {float(p[worst]):.2g} of {len(p)} ({names[worst]})",
            ranks.verdict,
            f"uniform over {num} held-out runs" if ranks.verdict == "ok" else CURE,
        ),
        Line(
            "local C2ST",
            f"{float(local.score):.3f} at worst of {len(found)} parameters, p {least:.2g}",
            "ok" if least > 0.05 else "look" if least > 0.01 else "bad",
            "no classifier tells it from the simulator" if least > 0.05 else CURE,
        ),
        Line(
            "the whole chain",
            "not looked at",
            "-",
            "a posterior under it: sbc(model, sampler=...); its draws: likelihood.outside(...)",
        ),
    ]
    title = f"AmortizedLikelihood p({x.observed} | {', '.join(columns.shapes)}), {num} held-out runs"
    return Report(title, lines, [Panel("ranks", partial(_draw, ranks))], {"ranks": ranks, "local": found})


def _split(theta: Tensor, shapes: dict[str, torch.Size]) -> list[Tensor]:
    """Columns of parameters by name, each in its shape."""
    parts = theta.split([shape.numel() for shape in shapes.values()], -1)
    return [part.reshape(len(theta), *shape) for part, shape in zip(parts, shapes.values())]


def _places(theta: Tensor) -> list[int]:
    """Rows spread over the parameters: the middle one, then each the farthest from those before."""
    white = (theta - theta.mean(0)) / theta.std(0).clamp_min(1e-12)
    inner = (white.abs() < 1.5).all(1).nonzero().flatten()  # no corners: a classifier knows little of them
    inner = inner if len(inner) >= PLACES else torch.arange(len(theta), device=theta.device)
    chosen = [int(inner[white[inner].square().sum(1).argmin()])]
    while len(chosen) < min(PLACES, len(inner)):
        distance = torch.cdist(white[inner], white[chosen]).amin(1)
        chosen.append(int(inner[distance.argmax()]))
    return chosen


def _local(x: AmortizedLikelihood, theta: Tensor, data: Tensor, made: Tensor, place: Tensor) -> LocalC2ST:
    """The classifier's opinion of draws at one parameter."""
    shapes = x.parts.columns.shapes
    at = {name: part[0] for name, part in zip(shapes, _split(place[None], shapes))}
    there = x(at).sample((AT_PLACE,)).reshape(AT_PLACE, -1).double()
    whole = list(x.parts.data.discrete)
    there[:, whole] += torch.rand_like(there[:, whole])
    return LocalC2ST.of(data, made, theta, place, there, num_null=9)


def _draw(ranks: Calibration, ax: Any) -> Any:
    from pyro_sb.plots import plot_sbc

    return plot_sbc(ranks, ax=ax)
