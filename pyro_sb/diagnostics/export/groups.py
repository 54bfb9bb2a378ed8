"""ArviZ's groups of a finished run, as a nested dict of numpy arrays."""

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_sb.checks import whole
from pyro_sb.diagnostics.export.draws_of import run_of
from pyro_sb.infer.model.prototype import Start, closed, first_float
from pyro_sb.infer.model.run import Run
from pyro_sb.infer.model.runs import Found, ModelRuns, Row, Wanted
from pyro_sb.infer.model.sites import Site, can_sample, is_deterministic

__all__ = ["Groups", "combined", "to_groups"]

Draws = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


class Groups(NamedTuple):
    r"""Arrays by group and variable.

    Attributes:
        arrays: ``{group: {variable: array}}``. Shape ``(chain, draw, *shape)``, in ``observed_data`` ``shape``.
        dims: Names of the dimensions of each variable in a plate.
    """

    arrays: dict[str, Arrays]
    dims: dict[str, list[Hashable]]


def to_groups(
    x: Any,
    *,
    log_likelihood: bool = False,
    prior: int | Mapping[str, Tensor] | None = None,
    posterior_predictive: bool | int | Mapping[str, Tensor] | None = None,
) -> Groups:
    r"""ArviZ's groups of a finished ``MCMC``, ours or Pyro's.

    Args:
        x: What `run_of` reads: a finished MCMC, a conditioned posterior, weighted draws, or a `Run`.
        log_likelihood: Log density of each datum at each draw.
        prior: Number of prior draws to make, at least 1, or draws of shape ``(num, *site)``.
        posterior_predictive: ``True``: one replicate a draw. A number: so many evenly spaced draws of each chain. Or
            replicates of shape ``(chain * draw, *site)`` or ``(chain, draw, *site)``.

    Returns:
        The groups, and dimension names from the model's plates.

    Raises:
        RuntimeError: ``x`` has not run.
        TypeError: ``x`` is no run.
        ValueError: A group was asked for that cannot be made: no model, dropped latents, an improper prior.
    """
    made = run_of(x)
    posterior = made.draws
    runs = None if made.model is None else SiteRuns(made)
    if runs is None and (log_likelihood or prior is not None or posterior_predictive):
        raise ValueError("log_likelihood, prior and posterior_predictive need a model, got a kernel with potential_fn.")
    arrays = {"posterior": _numpy(posterior), "sample_stats": _numpy(made.sample_stats)}
    if runs is not None:
        arrays["observed_data"] = _numpy(runs.observed)
        if log_likelihood:
            arrays["log_likelihood"] = _log_likelihood(runs, _every_latent(made, runs))
        arrays.update(_prior(runs, prior))
        arrays["posterior_predictive"] = _posterior_predictive(made, runs, posterior_predictive)
    arrays = {name: variables for name, variables in arrays.items() if variables}
    return Groups(arrays, {} if runs is None else _plate_dims(runs))


def combined(groups: Groups, num_chains: int) -> Groups:
    """The same draws with about so many chains: neighbouring chains follow each other, in groups of one size.

    Args:
        groups: Of a run of C chains.
        num_chains: As many are aimed at; there are as many as the divisor of C that is nearest by ratio.

    Example:
        >>> arrays = {"posterior": {"mu": np.arange(6.0).reshape(6, 1)}}
        >>> combined(Groups(arrays, {}), 2).arrays["posterior"]["mu"].tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    aim = whole("combine", num_chains, cure="Write combine=8.")

    def laid(array: np.ndarray) -> np.ndarray:
        total = len(array)
        num = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(math.log(n / aim)))
        return array.reshape(num, -1, *array.shape[2:])

    of_chains = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive"}
    arrays = {
        group: {name: laid(array) if group in of_chains else array for name, array in variables.items()}
        for group, variables in groups.arrays.items()
    }
    return Groups(arrays, groups.dims)


class SiteRuns:
    r"""Runs of a run's model with its latents at given draws, and the parts that its sites play.

    Attributes:
        observed: The data, site by site; no deterministic sites, factors or subsampling sites.
        missing: Latents that the run has no draws of.
        improper: Latents that cannot be sampled.
        shapes: Shape of each site's value.
        plates: Names of each site's dimensions, from its plates; ``None`` where a dimension belongs to no plate.
    """

    def __init__(self, made: Run) -> None:
        assert made.model is not None
        args, kwargs = made.args, dict(made.kwargs)
        draw = {name: value[0, 0] for name, value in made.draws.items()}
        start = Start(like=first_float(args, kwargs))
        _, gaps, trace = closed(poutine.condition(made.model, data=draw), args, kwargs, start)
        self.runs = ModelRuns.of(trace, gaps.close(made.model), args, kwargs)
        nodes = {name: trace.nodes[name] for name in self.runs.batch_shapes}
        known = draw.keys() | gaps.latent.keys()
        self.observed = {k: site["value"] for k, site in nodes.items() if site["is_observed"] and k not in known}
        self.observed |= {k: gaps.without_missing(k, x) for k, x in self.observed.items() if k in gaps.masks}
        self.missing = [name for name, site in nodes.items() if not site["is_observed"]]
        self.improper = [k for k, site in nodes.items() if k not in self.observed and not can_sample(site["fn"])]
        self.shapes = self.runs.shapes
        self.plates = {name: _plate_names(trace.nodes[name]) for name in self.shapes}

    def at(self, draws: Draws, num: int, *, resample: bool = False) -> Found:
        """Values and log densities of all sites in ``num`` runs with latents at ``draws``, ``(num, *site)`` each."""
        random = self.runs.batch_shapes
        rows = Row({name: value for name, value in draws.items() if name in random})
        return self.runs.at(rows, num, Wanted(list(self.shapes), list(random), resample))


def _numpy(tensors: Mapping[str, Any]) -> Arrays:
    return {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in tensors.items()}


def _every_latent(made: Run, runs: SiteRuns) -> Draws:
    """The posterior's draws and, where the model enumerates sites, draws of those."""
    draws = dict(made.draws)
    if runs.missing and made.discrete is not None:
        draws.update(made.discrete())
    missing = sorted(set(runs.missing) - draws.keys())
    if missing:
        raise ValueError(
            f"log_likelihood and posterior_predictive need draws of every latent site, but {missing} are missing. "
            "Leave save_params out; for enumerated sites use pyro_sb.infer.MCMC, which can draw them."
        )
    return draws


def _flat(draws: Draws) -> Draws:
    return {name: value.flatten(0, 1) for name, value in draws.items()}


def _log_likelihood(runs: SiteRuns, draws: Draws) -> Arrays:
    num_chains, num_draws = _size(draws)
    log_probs = runs.at(_flat(draws), num_chains * num_draws).log_probs
    return _numpy({name: log_probs[name].unflatten(0, (num_chains, num_draws)) for name in runs.observed})


def _size(draws: Mapping[str, Tensor]) -> tuple[int, int]:
    """Chains, and draws of each."""
    if not draws:
        raise ValueError(
            "log_likelihood and posterior_predictive need draws of a latent site, got a run of a model without any. "
            "Leave them out, or pass prior=."
        )
    num_chains, num_draws = next(iter(draws.values())).shape[:2]
    return num_chains, num_draws


def _posterior_predictive(made: Run, runs: SiteRuns, wanted: Any) -> Arrays:
    if wanted is None or wanted is False:
        return {}
    every = made.draws if isinstance(wanted, Mapping) else _every_latent(made, runs)
    num_chains, num_draws = _size(every)
    if isinstance(wanted, Mapping):
        return {k: _replicates(k, v, runs, num_chains, num_draws) for k, v in _numpy(wanted).items()}
    num = num_draws if wanted is True else wanted
    _check_count("posterior_predictive", num, most=num_draws)
    chosen = torch.linspace(0, num_draws - 1, num).round().long()
    draws = {name: value[:, chosen.to(value.device)] for name, value in every.items()}
    values = runs.at(_flat(draws), num_chains * num, resample=True).values
    return _numpy({name: values[name].unflatten(0, (num_chains, num)) for name in runs.observed})


def _replicates(name: str, value: np.ndarray, runs: SiteRuns, num_chains: int, num_draws: int) -> np.ndarray:
    """A user's replicates as (chain, draw, *site), without the 1s that Predictive adds."""
    lead = (num_chains, num_draws)
    if value.shape[:1] != (num_chains * num_draws,) and value.shape[:2] != lead:
        raise ValueError(
            f"posterior_predictive[{name!r}] must have shape ({num_chains * num_draws}, *site) or {(*lead, '*site')}, "
            f"got {value.shape}. Write Predictive(model, mcmc.get_samples())(...)."
        )
    rest = value.shape[2:] if value.shape[:2] == lead else value.shape[1:]
    return value.reshape(lead + _site_shape(name, rest, runs))


def _site_shape(name: str, shape: tuple[int, ...], runs: SiteRuns) -> tuple[int, ...]:
    """The site's own shape if ``shape`` holds as many numbers, else ``shape``."""
    own = runs.shapes.get(name, torch.Size(shape))
    return tuple(own) if own.numel() == int(np.prod(shape)) else tuple(shape)


def _prior(runs: SiteRuns, prior: Any) -> dict[str, Arrays]:
    """Prior draws of the latents and the data that they predict, as one chain."""
    if prior is None:
        return {}
    if isinstance(prior, Mapping):
        given = _numpy(prior)
        draws = {k: v.reshape((1, len(v), *_site_shape(k, v.shape[1:], runs))) for k, v in given.items()}
    else:
        _check_count("prior", prior)
        if runs.improper:
            raise ValueError(
                f"prior draws need a proper prior, but sites {runs.improper} cannot be sampled (ImproperUniform). "
                "Leave prior out, or pass a dict of draws of your own."
            )
        draws = {name: value[None] for name, value in _numpy(runs.at({}, prior, resample=True).values).items()}
    return {
        "prior": {name: value for name, value in draws.items() if name not in runs.observed},
        "prior_predictive": {name: value for name, value in draws.items() if name in runs.observed},
    }


def _check_count(name: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        between = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{name} must be a whole number, {between}, or a dict of draws, got {value!r}.")


def _plate_dims(runs: SiteRuns) -> dict[str, list[Hashable]]:
    """Plates as dimension names, but for the names that ArviZ keeps for itself; others are named as ArviZ would."""
    return {
        name: [plate if plate not in (None, "chain", "draw") else f"{name}_dim_{i}" for i, plate in enumerate(plates)]
        for name, plates in runs.plates.items()
        if any(plates)
    }


def _plate_names(site: Site) -> list[str | None]:
    """Name of the plate of each dimension of a site's value."""
    shape = torch.as_tensor(site["value"]).shape
    num_batch = len(shape) if is_deterministic(site) else len(site["fn"].batch_shape)
    names: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        index = num_batch + frame.dim if frame.vectorized else -1
        if 0 <= index < len(shape) and shape[index] == frame.size:
            names[index] = frame.name
    return names
