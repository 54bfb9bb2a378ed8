r"""The prior of a model alone, :math:`p(\theta)`, without the simulator behind it; and the ratio of another to it."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sb.infer.amortized.simulator import Simulator
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.model.prototype import prototype
from pyro_sb.infer.model.runs import Row, Wanted

__all__ = ["latents_alone", "log_prior", "log_prior_ratio"]

Sites = dict[str, Tensor]


class Done(Exception):  # noqa: N818
    """All latents of a run are there."""


class UntilLatents(Messenger):
    """Ends a run when its last latent is there."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.left = names, set(names)

    def __enter__(self) -> Any:
        self.left = set(self.names)
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.left.discard(msg["name"])
        if not self.left:
            raise Done


def latents_alone(source: Simulator) -> Callable[..., None]:
    """The model up to its last latent: what comes after, a simulator or a density, does not run."""
    names = set(source.prototype.transforms)

    def prior(*args: Any, **kwargs: Any) -> None:
        try:
            with UntilLatents(names):
                source.runs.model(*args, **kwargs)
        except Done:
            pass

    return prior


def log_prior(source: Simulator) -> LogJoint:
    """The log density of a model's unconstrained latents alone, in batches."""
    return log_joint(latents_alone(source), args=source.args, kwargs=source.kwargs)


@torch.no_grad()
def log_prior_ratio(source: Simulator, prior: Callable[..., Any], sites: Sites) -> Tensor:
    r"""Values :math:`\log p'(\theta) - \log p(\theta)` at latents in their own space, ``(n, *site)`` each.

    Args:
        source: The model, with its prior p.
        prior: Pyro model of the same latents with another prior :math:`p'`; called with the model's arguments.
        sites: The latents.

    Returns:
        Shape ``(n,)``; -inf where the other prior has no density.
    """
    names, num = set(source.prototype.transforms), len(next(iter(sites.values())))
    other = prototype(prior, source.args, source.kwargs)
    if set(other.transforms) != names:
        raise ValueError(
            f"prior must have the latents of the model, {sorted(names)}, got {sorted(other.transforms)}. Write a "
            "function with a pyro.sample site for each."
        )
    own = prototype(latents_alone(source), source.args, source.kwargs)
    values = []
    for part in (other, own):
        shapes = {name: part.runs.shapes[name] for name in sorted(names)}
        came = {name: sites[name].shape[1:] for name in sorted(names)}
        if shapes != came:
            raise ValueError(f"prior must have latents of the model's shapes, {came}, got {shapes}.")
        found = part.runs.at(Row(sites), num, Wanted((), sorted(names))).log_probs
        values.append(torch.stack([value.reshape(num, -1).sum(1) for value in found.values()]).sum(0))
    ratio = values[0] - values[1]
    return torch.where(torch.isnan(ratio), torch.full_like(ratio, -torch.inf), ratio)
