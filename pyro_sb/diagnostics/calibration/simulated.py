"""Truths, observations and posterior draws of a model, (theta, y, theta_1 ... theta_L): the start of every check."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_sb.diagnostics.export.draws_of import is_run, run_of
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.simulator import Simulator, simulator
from pyro_sb.infer.model.prototype import Start, first_float, run
from pyro_sb.infer.model.sites import is_deterministic, is_sample
from pyro_sb.warn import warn

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

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:8]) + (f" and {len(self.names) - 8} more" if len(self.names) > 8 else "")
        return (
            f"JointDraws: {len(self.truths)} data sets of {self.observations.shape[1]} numbers, {len(self.draws)} "
            f"posterior draws for each, of {shown}"
        )


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
        raise RuntimeError(
            "an AmortizedPosterior must be fitted before it can be judged, got one that is not: call "
            "amortized.fit(*model_args, num_simulations=...) first."
        )
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
    try:
        source = simulator(model, observed, args, dict(kwargs or {}))
    except ValueError as error:
        _refuse_latent_alone(model, observed, args, dict(kwargs or {}), error)
        raise
    if sampler is None:
        raise ValueError(
            "a model needs the sampler that is to be judged: a function from the observation to posterior draws. "
            "Write sbc(model, sampler=lambda y: run_my_mcmc(y).get_samples()), or sbc(AmortizedPosterior(...))."
        )
    return source


def _refuse_latent_alone(
    model: Any, observed: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], error: ValueError
) -> None:
    """One site has no data beside it: to name it in ``observed``, as the reader proposes, would leave no latent."""
    nodes = run(model, args, kwargs, Start(like=first_float(args, kwargs))).nodes
    sites = [name for name, site in nodes.items() if is_sample(site) and not is_deterministic(site)]
    if len(sites) == 1 and sites[0] not in observed:
        raise ValueError(
            f"The model must have the observed sites {list(observed)}, got {sites} alone, a latent: it makes no data "
            f'that a posterior could be calibrated on. Write pyro.sample("{observed[0]}", ...) in it.'
        ) from error


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "R-hat is", RuntimeWarning)  # the last draw of each is all that is used
        chains = posterior.mcmc(STEPS, num_chains=num, num_proposals=max(num, STARTS))
    return {name: value[:, -1] for name, value in chains.get_samples(group_by_chain=True).items()}


def _sampled_draws(
    sampler: Callable[[Any], Any], source: Simulator, observations: Tensor, num: int, truths: Sites
) -> Tensor:
    """The user's sampler at one data set after the other, its draws thinned to ``num``."""
    columns, effective = [], []
    for row in observations:
        sites = source.data.unpack(row)
        given = next(iter(sites.values())) if len(sites) == 1 else sites
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "R-hat is", RuntimeWarning)  # said of all data sets together below
            found = sampler(given)
        chains = is_run(found)
        found = run_of(found).draws if chains else found
        draws = _by_chain(found, truths, num, chains)
        effective.append(_effective_sizes(draws))
        draws = draws.flatten(0, 1)
        columns.append(draws[torch.linspace(0, len(draws) - 1, num).round().long().to(draws.device)])
    _warn_of_autocorrelation(torch.stack(effective).cpu(), num, truths)
    return torch.stack(columns, 1)


def _by_chain(found: Any, truths: Sites, num: int, chains: bool) -> Tensor:
    """A sampler's draws of the latents. Shape ``(chain, draw, numbers)``."""
    _check_sites(found, truths, num, chains)
    kept = {name: torch.as_tensor(found[name]) for name in truths}
    return _flat(kept if chains else {name: value[None] for name, value in kept.items()}, lead=2)


def _effective_sizes(draws: Tensor) -> Tensor:
    """Effective number of draws ``(chain, draw, numbers)`` of each number: 1 of a constant, NaN of chains too short."""
    if draws.shape[1] < 4:
        return torch.full(draws.shape[2:], torch.nan, dtype=torch.float64, device=draws.device)
    found: Tensor = effective_sample_size(draws.double())
    return torch.where((draws == draws[:1, :1]).all(0).all(0), 1.0, found)


def _warn_of_autocorrelation(effective: Tensor, num: int, truths: Sites) -> None:
    """Where the typical data set has fewer than ``num / 2`` effective draws. ``(S, numbers)``."""
    typical = effective.nanmedian(0).values.nan_to_num(num)
    i = int(typical.argmin())
    least = float(typical[i])
    if least < num / 2:
        name = number_names({name: value.shape[1:] for name, value in truths.items()})[i]
        warn(
            f"the sampler's draws are autocorrelated: {least:.1f} effective ones of {name!r} (median over "
            f"{len(effective)} data sets), where ranks among {num} ask for {num} independent ones, else a correct "
            f"sampler looks too narrow. Let the sampler draw {num / max(least, 1.0):.0f} times as many, or lower "
            f"num_draws (now {num}).",
        )


def _check_sites(found: Any, truths: Sites, num: int, chains: bool) -> None:
    if not isinstance(found, Mapping) or not truths.keys() <= found.keys():
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"sampler(y) must return draws by site, {sorted(truths)}, or a finished MCMC, got {got}.")
    for name, truth in truths.items():
        shape = tuple(torch.as_tensor(found[name]).shape)
        shape = (shape[0] * shape[1], *shape[2:]) if chains else shape
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
        raise ValueError(f"{name} must be at least {least}, got {value}: fewer show nothing of a law.")
