"""Joint draws (theta, y) of a Pyro model's latents and observations."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_sb.infer.model.prototype import Packing, Prototype, Start, first_float, prototype, run
from pyro_sb.infer.model.runs import Found, ModelRuns, Row, Wanted
from pyro_sb.infer.model.sites import base_of, can_sample, is_deterministic, is_discrete, is_sample, refuse_subsampling

__all__ = ["Simulations", "Simulator", "returned_sites", "simulator"]

logger = logging.getLogger(__name__)
Sites = dict[str, Tensor]


class Simulations(NamedTuple):
    """Joint draws: unconstrained latents ``(N, dim)``, observations ``(N, data_dim)``, packed by the `Simulator`."""

    latents: Tensor
    observations: Tensor

    def __repr__(self) -> str:
        (num, dim), width = self.latents.shape, self.observations.shape[1]
        return f"Simulations: {num} pairs of {dim} unconstrained latents and {width} numbers observed"


@dataclass
class Simulator:
    r"""A model as a giver of pairs: latents of the prior, and observations of the model given them.

    Attributes:
        runs: The model, its observed sites left open, with its arguments.
        observed: Names of the observed sites.
        prototype: The latents as one run showed them, with the observations held at one simulation.
        data: Layout of the observations in one vector.
        returned: Whether the observations are the function's return value, so that they have no density.
        hidden: Discrete latents that cannot be summed out: they are simulated, and leave the log joint unknown.
        interrupted: What was simulated when Ctrl-C came.
    """

    runs: ModelRuns
    observed: tuple[str, ...]
    prototype: Prototype
    data: Packing
    returned: bool
    hidden: tuple[str, ...] = ()
    interrupted: Simulations | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return self.runs.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return self.runs.kwargs

    @property
    def event_dims(self) -> dict[str, int]:
        """Number of event dimensions of each observed site that ``to_event`` did not make."""
        return self.runs.event_dims

    @property
    def dim(self) -> int:
        """Length of the unconstrained latent vector."""
        return self.prototype.packing.dim

    def conditioned(self, values: Sites) -> Callable[..., Any]:
        """The model with its observed sites at given values."""
        return poutine.condition(self.runs.model, data=values)

    def simulate(self, num: int, *, keep_finite: bool = False, progress: bool = False) -> Simulations:
        r"""Independent draws of the joint law.

        Args:
            num: How many, at least 1.
            keep_finite: Leave out simulations that are not finite. Otherwise they are an error.
            progress: Show a bar where the model runs draw after draw.

        Returns:
            Latents and observations; fewer rows than ``num`` if some were left out.

        Raises:
            ValueError: ``num`` < 1, or simulations that are not finite: how many, and in which sites.
        """
        if num < 1:
            raise ValueError(f"num_simulations must be at least 1, got {num}. Write 10_000.")
        routes = ["plate", "vmap", "loop"]
        if self.returned:  # a plain function's noise may come from outside torch
            routes = ["loop"]
        parts: list[Simulations] = []
        try:
            for found in self.runs.batches(
                Row({}), num, self._wanted, routes=routes, checked=["plate"], progress=progress
            ):
                parts.append(self._pairs(found))
        except KeyboardInterrupt:
            if parts:
                self.interrupted = self.finite(joined(parts), True)
            raise
        return self.finite(joined(parts), keep_finite)

    def simulate_at(self, latents: Tensor, *, keep_finite: bool = False, progress: bool = False) -> Simulations:
        """Observations at unconstrained latents ``(N, dim)``, one each; options as of `simulate`."""
        free, transforms = self.prototype.packing.unpack(latents), self.prototype.transforms
        rows = Row({name: t.inv(free[name]) for name, t in transforms.items()})
        routes = ["loop"] if self.returned else ["plate", "vmap", "loop"]
        found = self.runs.batches(rows, len(latents), self._wanted, routes=routes, checked=["plate"], progress=progress)
        return self.finite(joined([self._pairs(part) for part in found]), keep_finite)

    @property
    def has_density(self) -> bool:
        """Whether the log joint of latents and observations can be evaluated."""
        return not (self.returned or self.hidden or self.prototype.enumerated)

    @property
    def _wanted(self) -> Wanted:
        return Wanted([*self.prototype.transforms, *self.data.shapes])

    def _pairs(self, found: Found) -> Simulations:
        sites, transforms = found.values, self.prototype.transforms
        latents = self.prototype.packing.pack({name: t(sites[name]) for name, t in transforms.items()})
        return Simulations(latents, self.data.pack({name: sites[name] for name in self.data.shapes}))

    def finite(self, pairs: Simulations, keep: bool) -> Simulations:
        """Pairs that are finite, where ``keep`` says to leave the others out; else an error where any is not."""
        good = torch.isfinite(pairs.latents).all(-1) & torch.isfinite(pairs.observations).all(-1)
        if bool(good.all()):
            return pairs
        bad: dict[str, int] = {}
        for packing, rows in ((self.prototype.packing, pairs.latents), (self.data, pairs.observations)):
            for name, value in packing.unpack(rows).items():
                count = int((~torch.isfinite(value)).reshape(len(rows), -1).any(-1).sum())
                if count:
                    bad[name] = count
        num = int((~good).sum())
        if not keep:
            raise ValueError(
                f"simulations must be finite, got NaN or infinity in {num} of {len(good)}, by site {bad}. Correct "
                "the model, or write keep_finite=True to learn from the others: the posterior is then that given "
                "a finite simulation."
            )
        logger.warning("%d of %d simulations are not finite (by site %s) and were left out.", num, len(good), bad)
        return Simulations(pairs.latents[good], pairs.observations[good])


def joined(parts: list[Simulations]) -> Simulations:
    """Pairs of several batches."""
    return Simulations(*(torch.cat(column) for column in zip(*parts, strict=True)))


def returned_sites(result: Any, observed: tuple[str, ...]) -> Sites:
    """A function's return value by name: a dict, or the one observation."""
    if isinstance(result, dict):
        return {name: torch.as_tensor(result[name]).detach() for name in observed}
    return {observed[0]: torch.as_tensor(result).detach()}


def checked_sites(result: Any, shapes: dict[str, torch.Size]) -> Sites:
    """A function's return value by name, of one shape at every run."""
    sites = returned_sites(result, tuple(shapes))
    for name, shape in shapes.items():
        if sites[name].shape != shape:
            raise ValueError(
                f"observed {name!r} must have one shape at every run, got {tuple(shape)} and "
                f"{tuple(sites[name].shape)}. Return as many numbers each time; pad and mask them."
            )
    return sites


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
        NotImplementedError: What `log_joint` refuses; and what a run ignores: factors, scales, masks, data at sites
            that ``observed`` does not name.

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
        event_dims: dict[str, int] = {}
        latent_model: Any = model
    else:
        held = [name for name in observed if stochastic[name]["is_observed"]]
        if held:
            raise ValueError(
                f"Observed sites must be open to be simulated, got data at {held}. Leave the data out of fit's "
                "arguments (obs=None) and give it to condition(y)."
            )
        values = {name: stochastic[name]["value"].detach() for name in observed}
        event_dims = {name: len(base_of(stochastic[name]["fn"]).event_shape) for name in observed}
        latent_model = poutine.condition(model, data=values)
    hidden = tuple(
        name for name, site in stochastic.items() if name not in observed and not can_be_summed(site, returned)
    )
    if hidden:
        latent_model = poutine.block(latent_model, hide=list(hidden))
    values = {name: value.detach() for name, value in values.items()}
    data, runs = Packing.like(values), ModelRuns.of(trace, model, args, kwargs)
    given = partial(checked_sites, shapes={name: values[name].shape for name in observed}) if returned else None
    return Simulator(
        runs=replace(runs, event_dims=event_dims, returned=given),
        observed=observed,
        prototype=prototype(latent_model, args, kwargs),
        data=data,
        returned=returned,
        hidden=hidden,
    )


def refuse_other_data(sites: dict[str, Any], observed: tuple[str, ...]) -> None:
    """Refuse what is in a model's density and not in its simulations: pairs would have another law than its joint."""
    for name, site in sites.items():
        if site_is_factor(site):
            raise NotImplementedError(
                f"the model must be simulated by running it, got pyro.factor {name!r}, which a run ignores. "
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
                f"site {name!r} must be neither scaled nor masked, got poutine.scale or poutine.mask: a run ignores "
                "them. Mark missing data by NaN: fit(..., missing=0.5), condition(y with NaN)."
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
