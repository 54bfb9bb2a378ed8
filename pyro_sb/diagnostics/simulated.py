"""Truths, observations and posterior draws, drawn from a model: what every check by simulation starts from."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.amortized import AmortizedPosterior
from pyro_sb.infer.posterior import Posterior
from pyro_sb.infer.read_simulator import simulator
from pyro_sb.infer.simulate import Simulator

__all__ = ["JointDraws", "calibration_draws", "number_names"]

Sites = dict[str, Tensor]
PROPOSALS, STARTS = 2000, 500  # draws of the bridge, a data set, that are weighted; that chains start from
STEPS = 10  # of each chain, after its warm-up; its last state is the draw
ROWS = 2**18  # draws corrected at once, over all data sets


class JointDraws(NamedTuple):
    r"""S data sets of a model: what made each, and what a posterior says of it.

    Attributes:
        truths: The parameters that each data set was made with. Shape ``(S, parameters)``.
        draws: L posterior draws for each. Shape ``(L, S, parameters)``.
        observations: The data sets, flat. Shape ``(S, data_dim)``.
        names: Name of each parameter, one for each number in the latent sites.
    """

    truths: Tensor
    draws: Tensor
    observations: Tensor
    names: tuple[str, ...]


def calibration_draws(
    x: AmortizedPosterior | Callable[..., Any],
    num_data_sets: int = 200,
    num_draws: int = 100,
    *,
    corrected: bool | str = False,
    sampler: Callable[[Any], Any] | None = None,
    observed: Sequence[str] = ("y",),
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> JointDraws:
    r"""Data sets of a model, each with the parameters that made it and with posterior draws; see `sbc`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0))
        >>> exact = lambda y: {"mu": y / 2 + 0.5**0.5 * torch.randn(50)}
        >>> calibration_draws(model, 20, 50, sampler=exact).draws.shape
        torch.Size([50, 20, 1])
    """
    _check_least("num_data_sets", num_data_sets, 20)
    _check_least("num_draws", num_draws, 20)
    ways: dict[bool | str, str] = {False: "bridge", True: "mcmc", "mcmc": "mcmc", "importance": "importance"}
    if corrected not in ways:
        raise ValueError(f'corrected must be False, True, "importance" or "mcmc", got {corrected!r}.')
    if isinstance(x, AmortizedPosterior):
        if sampler is not None:
            raise ValueError("an AmortizedPosterior is its own sampler, got another. Leave sampler out.")
        source = _fitted_simulator(x)
    else:
        source = _read_model(x, sampler, tuple(observed), args, kwargs)
    pairs = source.simulate(num_data_sets, keep_finite=True)
    truths = source.prototype.packing.unpack(pairs.latents)
    truths = {name: transform.inv(truths[name]) for name, transform in source.prototype.transforms.items()}
    if isinstance(x, AmortizedPosterior):
        draws = _amortised_draws(x, source, pairs.observations, num_draws, ways[corrected])
    else:
        assert sampler is not None
        draws = _sampled_draws(sampler, source, pairs.observations, num_draws, truths)
    names = number_names({name: value.shape[1:] for name, value in truths.items()})
    return JointDraws(_flat(truths, lead=1), draws, pairs.observations, names)


def number_names(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """``name[i, j]`` for each number of sites of these shapes, in order; the bare name for a single number.

    Example:
        >>> number_names({"mu": (), "theta": (2,)})
        ('mu', 'theta[0]', 'theta[1]')
    """
    names = []
    for name, shape in shapes.items():
        for index in product(*map(range, shape)):
            names.append(f"{name}[{', '.join(map(str, index))}]" if index else name)
    return tuple(names)


def _fitted_simulator(amortized: AmortizedPosterior) -> Simulator:
    if amortized.bridge is None:
        raise RuntimeError("sbc needs a fitted posterior: call amortized.fit(*model_args, num_simulations=...) first.")
    return amortized.simulator


def _read_model(
    model: Any, sampler: Any, observed: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Simulator:
    """The model as a giver of pairs: one without observed sites is refused there."""
    if isinstance(model, Posterior) or not callable(model):
        raise TypeError(
            f"x must be an AmortizedPosterior, or a Pyro model with a sampler, got {type(model).__name__}: calibration "
            "is over data sets, and one posterior has one. Write sbc(amortized)."
        )
    source = simulator(model, observed, args, dict(kwargs or {}))
    if sampler is None:
        raise ValueError(
            "a model needs the sampler that is to be judged: a function from the observation to posterior draws. "
            "Write sbc(model, sampler=lambda y: run_my_mcmc(y).get_samples()), or sbc(AmortizedPosterior(...))."
        )
    return source


def _amortised_draws(
    amortized: AmortizedPosterior, source: Simulator, observations: Tensor, num: int, way: str
) -> Tensor:
    block = len(observations) if way == "bridge" else max(1, ROWS // PROPOSALS)
    parts = []
    for rows in observations.split(block):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="y lies", category=RuntimeWarning)  # y is the model's own
            posterior = amortized.condition(source.data.unpack(rows))
        parts.append(_flat(_drawn(posterior, num, way), lead=2))
    return torch.cat(parts, 1)


def _drawn(posterior: Posterior, num: int, way: str) -> Sites:
    """Draws ``(num, B, *site)`` of a batch, that are independent of each other."""
    if way == "bridge":
        return posterior.sample(num)
    if way == "importance":
        return posterior.importance(PROPOSALS).resample(num)
    chains = posterior.mcmc(STEPS, num_chains=num, num_proposals=max(num, STARTS))
    return {name: value[:, -1] for name, value in chains.get_samples(group_by_chain=True).items()}


def _sampled_draws(
    sampler: Callable[[Any], Any], source: Simulator, observations: Tensor, num: int, truths: Sites
) -> Tensor:
    """The user's sampler at one data set after the other, its draws thinned to ``num``."""
    columns = []
    for row in observations:
        sites = source.data.unpack(row)
        given = next(iter(sites.values())) if len(sites) == 1 else sites
        found = sampler(given)
        found = found.get_samples() if callable(getattr(found, "get_samples", None)) else found
        _check_sites(found, truths, num)
        kept = {}
        for name in truths:
            value = torch.as_tensor(found[name])
            kept[name] = value[torch.linspace(0, len(value) - 1, num).round().long().to(value.device)]
        columns.append(_flat(kept, lead=1))
    return torch.stack(columns, 1)


def _check_sites(found: Any, truths: Sites, num: int) -> None:
    if not isinstance(found, Mapping) or not truths.keys() <= found.keys():
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"sampler(y) must return draws by site, {sorted(truths)}, or a finished MCMC, got {got}.")
    for name, truth in truths.items():
        shape = tuple(torch.as_tensor(found[name]).shape)
        if shape[1:] != tuple(truth.shape[1:]) or shape[0] < num:
            raise ValueError(
                f"sampler(y) must return at least {num} draws of {name!r}, shape {(num, *truth.shape[1:])}, got "
                f"{shape}. Draw more, or lower num_draws."
            )


def _flat(sites: Sites, lead: int) -> Tensor:
    """All sites' numbers side by side."""
    return torch.cat([value.reshape(*value.shape[:lead], -1) for value in sites.values()], -1)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: fewer tell nothing of a law.")
