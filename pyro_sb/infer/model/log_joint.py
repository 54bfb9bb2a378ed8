"""From a Pyro model, or a ``potential_fn``, to a batched log joint: what is asked, refused, and chosen."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.model.agreement import Oracle, close, find_oracle, value_and_grad
from pyro_sb.infer.model.enumeration import EnumeratedPlate, EnumeratedVmap
from pyro_sb.infer.model.joint import Evaluations, LogJoint
from pyro_sb.infer.model.packing import Packing
from pyro_sb.infer.model.prototype import (
    MAX_TRIES,
    Prototype,
    explain_no_start,
    model_starts,
    persist,
    prototype,
    uniform_starts,
)
from pyro_sb.infer.model.routes import (
    Loop,
    ModelPotential,
    Plate,
    SingleChain,
    UserPotential,
    Vmap,
    constrain,
    density_terms,
)

__all__ = ["Evaluations", "LogJoint", "log_joint"]

Sites = dict[str, Tensor]


def log_joint(
    model: Callable[..., Any] | None = None,
    potential_fn: Callable[[Sites], Tensor] | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    initial_params: Sites | None = None,
    batched_initial: bool = False,
    init_strategy: Callable[..., Any] | None = None,
    max_plate_nesting: int | None = None,
    transforms: dict[str, Transform] | None = None,
    jit_compile: bool = False,
) -> LogJoint:
    r"""Batched log joint of a Pyro model or of a ``potential_fn``.

    The fastest route that agrees with Pyro's own single-chain potential, in value and gradient at several points and
    batch sizes, is taken: the model under an outer plate of chains, ``torch.func.vmap``, or a loop with a warning.

    Args:
        model: Pyro model. Discrete latents are summed out.
        potential_fn: Minus log density of one chain's dict of unconstrained tensors, instead of ``model``.
        args: The model's positional arguments; ignored with ``potential_fn``, as in Pyro.
        kwargs: The model's keyword arguments.
        initial_params: Unconstrained values of each site: shapes of a ``potential_fn``'s sites, and points where the
            log joint is known to be finite.
        batched_initial: Whether ``initial_params`` of a ``potential_fn`` carry a leading chain dimension. A model's
            may or may not.
        init_strategy: Pyro's init strategy, uniform on (-2, 2) in unconstrained space if omitted.
        max_plate_nesting: Number of plate dimensions; read off one run of the model if omitted.
        transforms: Constrained to unconstrained, for some sites or all; ``biject_to(support).inv`` for the others.
        jit_compile: Refused: chains are batched instead.

    Raises:
        ValueError: Neither or both of ``model`` and ``potential_fn``; no latent site; NaN data; no finite start.
        NotImplementedError: Subsampled plates, discrete sites that cannot be enumerated, supports without a bijection.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> joint = log_joint(model, args=(torch.zeros(3),))
        >>> joint.route, joint.dim
        ('plate', 1)
        >>> joint.log_prob(torch.tensor([[0.0], [1.0]])).diff()
        tensor([-2.])
    """
    if (model is None) == (potential_fn is None):
        given = "neither" if model is None else "both"
        raise ValueError(f"Exactly one of model and potential_fn must be given, got {given}.")
    if jit_compile:
        raise NotImplementedError("jit_compile must be False, got True: chains run as one batch, which gains more.")
    if potential_fn is not None:
        if init_strategy is not None or max_plate_nesting is not None:
            raise ValueError("init_strategy and max_plate_nesting need a model, got potential_fn. Use initial_params.")
        return from_potential(potential_fn, initial_params, batched_initial, transforms)
    assert model is not None
    sites = prototype(
        model,
        args,
        kwargs or {},
        init_strategy=init_strategy,
        max_plate_nesting=max_plate_nesting,
        transforms=transforms,
    )
    return from_prototype(sites, initial_params)


def from_potential(
    potential_fn: Callable[[Sites], Tensor],
    initial_params: Sites | None,
    batched_initial: bool,
    transforms: dict[str, Transform] | None,
) -> LogJoint:
    """Log joint of a user's single-chain potential: vmap, or a loop."""
    if not initial_params:
        raise ValueError("potential_fn needs initial_params, unconstrained, for the shapes of its sites; got none.")
    given = {name: torch.as_tensor(value).detach() for name, value in initial_params.items()}
    chains = given if batched_initial else {name: value[None] for name, value in given.items()}
    packing = Packing.like({name: value[0] for name, value in chains.items()})
    density = UserPotential(potential_fn, packing)
    with pyro.validation_enabled(False):
        oracle = find_oracle(density, chain(packing.pack(chains).unbind(), uniform_starts(packing)))
    if oracle is None:
        raise ValueError(
            f"potential_fn and its gradient must be finite at some start, got none in {MAX_TRIES} tries. Pass "
            "initial_params where it is finite."
        )
    return LogJoint(packing, [Vmap(density), Loop(density)], oracle=oracle, transforms=transforms)


def from_prototype(sites: Prototype, initial_params: Sites | None) -> LogJoint:
    """Log joint of a model that passed the refusals: chain plate, vmap, or a loop."""
    packing = sites.packing
    with pyro.validation_enabled(False):
        density = single_chain(sites)
        starts = model_starts(sites)
        if initial_params:
            starts = chain(packing.pack(initial_params).detach().reshape(-1, packing.dim).unbind(), starts)
        oracle = find_oracle(density, starts)
        if oracle is None:
            raise ValueError(explain_no_start(sites))
        refuse_changing_runs(sites, oracle)
    batched: list[Any] = [Plate(sites), Vmap(SingleChain(sites))]
    if sites.enumerated:
        batched = [EnumeratedPlate(sites), EnumeratedVmap(sites)]
    return LogJoint(packing, [*batched, Loop(density)], oracle=oracle, prototype=sites, transforms=sites.transforms)


def single_chain(sites: Prototype) -> ModelPotential:
    """Pyro's own potential; it cannot enumerate every distribution that says it can."""
    try:
        return persist(partial(ModelPotential, sites))
    except NotImplementedError as error:
        names = list(sites.enumerated)
        raise NotImplementedError(
            f"Discrete sites must be enumerable, got {names}, of which Pyro says: {error}"
        ) from error


def refuse_changing_runs(sites: Prototype, oracle: Oracle) -> None:
    """A model whose sites come and go, or whose density is random, has no log joint that a kernel could target."""
    for z in oracle.points:
        density_terms(sites, constrain(sites, z)[0], enumerate_discrete=bool(sites.enumerated))
    again, _ = value_and_grad(oracle.density, oracle.points[0])
    if not close(again, oracle.values[0]):
        raise ValueError(
            f"The log joint must be the same at every run, got {float(oracle.values[0]):g} and {float(again):g} at one "
            "point. Make every random number of the model a sample site, and put networks into eval mode."
        )
