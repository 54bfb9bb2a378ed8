"""The first half of ``to_arviz``: a finished run to a nested dict of numpy arrays, ArviZ's groups."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_sb.diagnostics.export.draws_of import draws_by_chain
from pyro_sb.infer.model.runs import ModelRuns

__all__ = ["Groups", "to_groups"]

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
        x: Has ``get_samples(group_by_chain=)``, ``diagnostics()``, ``kernel.model``, ``_args`` and ``_kwargs``.
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
    if not callable(getattr(x, "get_samples", None)):
        raise TypeError(f"x must be a finished MCMC (ours or Pyro's), got {type(x).__name__}. Call run() and pass it.")
    posterior = draws_by_chain(x)
    num_chains, num_draws = next(iter(posterior.values())).shape[:2]
    runs = _model_runs(x, posterior)
    if runs is None and (log_likelihood or prior is not None or posterior_predictive):
        raise ValueError("log_likelihood, prior and posterior_predictive need a model, got a kernel with potential_fn.")
    arrays = {"posterior": _numpy(posterior), "sample_stats": _sample_stats(x, num_chains, num_draws)}
    if runs is not None:
        arrays["observed_data"] = _numpy(runs.observed)
        if log_likelihood:
            arrays["log_likelihood"] = _log_likelihood(runs, _every_latent(x, runs, posterior))
        arrays.update(_prior(runs, prior))
        arrays["posterior_predictive"] = _posterior_predictive(x, runs, posterior, posterior_predictive)
    arrays = {name: variables for name, variables in arrays.items() if variables}
    return Groups(arrays, {} if runs is None else _plate_dims(runs))


def _model_runs(x: Any, posterior: Draws) -> ModelRuns | None:
    model = getattr(getattr(x, "kernel", None), "model", None)
    if model is None:
        return None
    return ModelRuns(model, x._args, x._kwargs, {name: value[0, 0] for name, value in posterior.items()})


def _numpy(tensors: Mapping[str, Any]) -> Arrays:
    return {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in tensors.items()}


def _sample_stats(x: Any, num_chains: int, num_draws: int) -> Arrays:
    """Our kernels' statistics as they are; of Pyro's kernels the divergences."""
    statistics = getattr(x, "sample_stats", None)
    if statistics is not None:
        return _numpy(statistics)
    divergences = _divergences(x)
    if divergences is None:
        return {}
    diverging = np.zeros((num_chains, num_draws), dtype=bool)
    for key, draws in divergences.items():
        diverging[int(key.split()[-1]), draws] = True  # "chain 10" is chain 10, wherever it sorts
    return {"diverging": diverging}


def _divergences(x: Any) -> Mapping[str, Any] | None:
    """By chain; from where Pyro's MCMC keeps them, as its ``diagnostics()`` fails under four draws a chain."""
    kept = getattr(x, "_diagnostics", None)
    if not kept:
        return x.diagnostics().get("divergences")
    if any("divergences" not in chain for chain in kept):
        return None
    return {f"chain {i}": chain["divergences"] for i, chain in enumerate(kept)}


def _every_latent(x: Any, runs: ModelRuns, posterior: Draws) -> Draws:
    """The posterior's draws and, where the model enumerates sites, draws of those."""
    draws = dict(posterior)
    if runs.missing and callable(getattr(x, "get_discrete_samples", None)):
        draws.update(x.get_discrete_samples(group_by_chain=True))
    missing = sorted(set(runs.missing) - draws.keys())
    if missing:
        raise ValueError(
            f"log_likelihood and posterior_predictive need draws of every latent site, but {missing} are missing. "
            "Leave save_params out; for enumerated sites use pyro_sb.infer.MCMC, which can draw them."
        )
    return draws


def _flat(draws: Draws) -> Draws:
    return {name: value.flatten(0, 1) for name, value in draws.items()}


def _log_likelihood(runs: ModelRuns, draws: Draws) -> Arrays:
    num_chains, num_draws = next(iter(draws.values())).shape[:2]
    log_probs = runs.at(_flat(draws), num_chains * num_draws).log_probs
    return _numpy({name: log_probs[name].unflatten(0, (num_chains, num_draws)) for name in runs.observed})


def _posterior_predictive(x: Any, runs: ModelRuns, posterior: Draws, wanted: Any) -> Arrays:
    num_chains, num_draws = next(iter(posterior.values())).shape[:2]
    if wanted is None or wanted is False:
        return {}
    if isinstance(wanted, Mapping):
        return {k: _replicates(k, v, runs, num_chains, num_draws) for k, v in _numpy(wanted).items()}
    num = num_draws if wanted is True else wanted
    _check_count("posterior_predictive", num, most=num_draws)
    chosen = torch.linspace(0, num_draws - 1, num).round().long()
    draws = {name: value[:, chosen.to(value.device)] for name, value in _every_latent(x, runs, posterior).items()}
    values = runs.at(_flat(draws), num_chains * num, resample=True).values
    return _numpy({name: values[name].unflatten(0, (num_chains, num)) for name in runs.observed})


def _replicates(name: str, value: np.ndarray, runs: ModelRuns, num_chains: int, num_draws: int) -> np.ndarray:
    """A user's replicates as (chain, draw, *site), without the 1s that Predictive adds."""
    lead = (num_chains, num_draws)
    if value.shape[:1] != (num_chains * num_draws,) and value.shape[:2] != lead:
        raise ValueError(
            f"posterior_predictive[{name!r}] must have shape ({num_chains * num_draws}, *site) or {(*lead, '*site')}, "
            f"got {value.shape}. Write Predictive(model, mcmc.get_samples())(...)."
        )
    rest = value.shape[2:] if value.shape[:2] == lead else value.shape[1:]
    return value.reshape(lead + _site_shape(name, rest, runs))


def _site_shape(name: str, shape: tuple[int, ...], runs: ModelRuns) -> tuple[int, ...]:
    """The site's own shape if ``shape`` holds as many numbers, else ``shape``."""
    own = runs.shapes.get(name, torch.Size(shape))
    return tuple(own) if own.numel() == int(np.prod(shape)) else tuple(shape)


def _prior(runs: ModelRuns, prior: Any) -> dict[str, Arrays]:
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


def _plate_dims(runs: ModelRuns) -> dict[str, list[Hashable]]:
    """Plates as dimension names, but for the names that ArviZ keeps for itself; others are named as ArviZ would."""
    return {
        name: [plate if plate not in (None, "chain", "draw") else f"{name}_dim_{i}" for i, plate in enumerate(plates)]
        for name, plates in runs.plates.items()
        if any(plates)
    }
