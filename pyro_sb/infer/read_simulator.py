"""What one run tells of a simulator: its latents, its observations, and whether pairs follow its density."""

import logging
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import Start, first_float, prototype, run
from pyro_sb.infer.refusals import refuse_subsampling
from pyro_sb.infer.simulate import Simulator, returned_sites
from pyro_sb.infer.sites import can_sample, is_deterministic, is_discrete, is_sample

__all__ = ["base_of", "simulator"]

logger = logging.getLogger(__name__)


def simulator(
    model: Callable[..., Any],
    observed: tuple[str, ...] = ("y",),
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Simulator:
    r"""Read off one run of a model what its latents and observations are.

    Args:
        model: Pyro model whose observed sites are left open (``obs=None``), or a function with ``pyro.sample`` prior
            sites that returns its observations: a tensor, or a dict by name.
        observed: Names of the observed sites.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: An observed site is missing, or held at data; no continuous latent.
        NotImplementedError: What `log_joint` refuses; and what a run does not heed: factors, scales, masks, data at
            sites that ``observed`` does not name.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Poisson(rate).expand([3]).to_event(1))
        >>> pairs = simulator(model).simulate(100)
        >>> pairs.latents.shape, pairs.observations.shape
        (torch.Size([100, 1]), torch.Size([100, 3]))
    """
    kwargs = kwargs or {}
    observed = (observed,) if isinstance(observed, str) else tuple(observed)
    if not observed:
        raise ValueError('observed must name at least one site, got none. Write observed=("y",).')
    trace = run(model, args, kwargs, Start(like=first_float(args, kwargs)))
    sites = {name: site for name, site in trace.nodes.items() if is_sample(site)}
    stochastic = {name: site for name, site in sites.items() if not is_deterministic(site)}
    refuse_subsampling(trace)
    refuse_other_data(stochastic, observed)
    returned = not set(observed) <= stochastic.keys()
    if returned:
        result = trace.nodes["_RETURN"]["value"]
        values = {n: sites[n]["value"] for n in observed} if set(observed) <= sites.keys() else None
        if values is None and not _gives(result, observed):
            raise ValueError(
                f"The model must have the observed sites {list(observed)}, got {sorted(stochastic)} and no return "
                "value for them. Name them in observed=(...), or return a tensor, or a dict by name."
            )
        if values is None:
            _refuse_own_sites(result, observed, stochastic)
            if not isinstance(result, dict):
                logger.warning(
                    "the model has no sample site %r: its return value is taken for it, with latents %s. Write "
                    "observed=(...) for another site, or return {%r: ...} to say so.",
                    observed[0],
                    sorted(stochastic),
                    observed[0],
                )
        values = values if values is not None else returned_sites(result, observed)
        batch_shapes, event_dims = {name: torch.Size() for name in observed}, {}
        latent_model: Any = model
    else:
        held = [name for name in observed if stochastic[name]["is_observed"]]
        if held:
            raise ValueError(
                f"Observed sites must be open to be simulated, got data at {held}. Leave the data out of fit's "
                "arguments (obs=None) and give it to condition(y)."
            )
        values = {name: stochastic[name]["value"].detach() for name in observed}
        batch_shapes = {name: stochastic[name]["fn"].batch_shape for name in observed}
        event_dims = {name: len(base_of(stochastic[name]["fn"]).event_shape) for name in observed}
        latent_model = poutine.condition(model, data=values)
    hidden = tuple(
        name for name, site in stochastic.items() if name not in observed and not can_be_summed(site, returned)
    )
    if hidden:
        latent_model = poutine.block(latent_model, hide=list(hidden))
    told = prototype(latent_model, args, kwargs)
    return Simulator(
        model=model,
        observed=observed,
        args=args,
        kwargs=kwargs,
        prototype=told,
        data=Packing.like({name: value.detach() for name, value in values.items()}),
        batch_shapes=batch_shapes,
        event_dims=event_dims,
        constrained_shapes={name: stochastic[name]["value"].shape for name in told.transforms},
        returned=returned,
        hidden=hidden,
    )


def refuse_other_data(sites: dict[str, Any], observed: tuple[str, ...]) -> None:
    """What is in a model's density and not in its simulations would make pairs of another law than its joint."""
    for name, site in sites.items():
        if site_is_factor(site):
            raise NotImplementedError(
                f"the model must be simulated by running it, got pyro.factor {name!r}, which a run does not heed. "
                "Write it as a sample site."
            )
        if site["is_observed"] and name not in observed:
            raise NotImplementedError(
                f"data at {name!r} must be named among the observed sites to be simulated, got {list(observed)}. Write "
                f"observed={(*observed, name)!r}, leave it open in fit, and give both to condition."
            )
        if not can_sample(site["fn"]):
            raise NotImplementedError(
                f"site {name!r} must have draws to be simulated, got {type(site['fn']).__name__}. Write a proper prior."
            )
        scale, mask = site.get("scale", 1.0), site.get("mask")
        plain = not isinstance(scale, Tensor) and scale == 1.0
        if is_masked(site["fn"]) or not plain or (isinstance(mask, Tensor) and not bool(mask.all())) or mask is False:
            raise NotImplementedError(
                f"site {name!r} must be neither scaled nor masked, got poutine.scale or poutine.mask: a run does not "
                "heed them. Mark missing data by NaN: fit(..., missing=0.5), condition(y with NaN)."
            )


def is_masked(fn: Any) -> bool:
    """Whether a distribution is masked, under whatever it is wrapped in."""
    while isinstance(fn, dist.Independent | ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, MaskedDistribution)


def can_be_summed(site: dict[str, Any], returned: bool) -> bool:
    """Whether a latent leaves a log joint: it is continuous, or can be enumerated where there is a density at all."""
    fn = site["fn"]
    if not is_discrete(fn):
        return True
    return not returned and fn.has_enumerate_support and not isinstance(fn, dist.Independent)


def _refuse_own_sites(result: Any, observed: tuple[str, ...], sites: dict[str, Any]) -> None:
    """A model that returns its own sample site under another name would have that site as a latent."""
    for value in [result[name] for name in observed] if isinstance(result, dict) else [result]:
        for name, site in sites.items():
            if site["value"] is value:
                raise ValueError(
                    f"The model must have the observed sites {list(observed)}, but returns its sample site {name!r}. "
                    f'Write observed=("{name}",).'
                )


def base_of(fn: Any) -> Any:
    """A distribution without the event dimensions that ``to_event`` made."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _gives(result: Any, observed: tuple[str, ...]) -> bool:
    """Whether a return value holds all observations."""
    if isinstance(result, dict):
        return set(observed) <= result.keys()
    if len(observed) > 1 or result is None:
        return False
    try:
        torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
