"""Where chains may start, and what to say when they cannot start anywhere."""

from collections.abc import Iterator

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import MAX_TRIES, Prototype, run

__all__ = ["explain_no_start", "model_starts", "uniform_starts"]

RADIUS = 2.0  # as Pyro's and Stan's starts, in unconstrained space


def uniform_starts(packing: Packing) -> Iterator[Tensor]:
    """Points uniform on (-2, 2), for ever. Shape ``(dim,)`` each."""
    while True:
        yield torch.empty(packing.dim, dtype=packing.dtype, device=packing.device).uniform_(-RADIUS, RADIUS)


def model_starts(prototype: Prototype) -> Iterator[Tensor]:
    """Draws of the user's init strategy, for ever; uniform on (-2, 2) if he gave none. Shape ``(dim,)`` each."""
    if prototype.start.strategy is init_to_uniform:
        yield from uniform_starts(prototype.packing)
    while True:
        yield prototype.draw()


def explain_no_start(prototype: Prototype) -> str:
    """Which sites keep the log joint from being finite, read off one run of the model."""
    trace = run(prototype.model, prototype.args, prototype.kwargs, prototype.start)
    with torch.no_grad(), pyro.validation_enabled(False):
        trace.compute_log_prob()
    bad = [
        f"{'observed' if site['is_observed'] else 'latent'} site {name!r} (log density {float(site['log_prob_sum']):g})"
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not torch.isfinite(torch.as_tensor(site["log_prob_sum"]))
    ]
    culprits = ", ".join(bad) if bad else "no single site in the last run; perhaps the gradient"
    return (
        f"The log joint and its gradient must be finite at some start, got none in {MAX_TRIES} tries. Not finite: "
        f"{culprits}. Check the data for NaN and infinity and the parameters for their range, or pass init_strategy or "
        "initial_params inside the support."
    )
