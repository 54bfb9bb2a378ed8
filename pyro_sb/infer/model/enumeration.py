r"""Discrete latents of many chains at once: summed out of the log joint, and drawn from their posterior afterwards.

Pyro enumerates a discrete site along a fresh tensor dimension and contracts the sites' log densities, the *factors*.
Chains are one more plate of that contraction. The factors of all chains come from one run of the model under an outer
plate (:class:`EnumeratedPlate`), or from ``torch.func.vmap`` over one chain's run (:class:`EnumeratedVmap`), which also
serves models that index with an enumerated site (``loc[a]``, where a plate would need ``Vindex(loc)[..., a]``).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import opt_einsum
import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import scale_and_mask
from pyro.ops.rings import LogRing, MapRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_sb.infer.model.agreement import vmapped
from pyro_sb.infer.model.prototype import Prototype
from pyro_sb.infer.model.routes import constrain
from pyro_sb.infer.model.runs import Row, unknown_site
from pyro_sb.infer.model.sites import is_sample, latents

__all__ = ["EnumeratedPlate", "EnumeratedVmap", "discrete_sites"]

logger = logging.getLogger(__name__)
CHAINS = "_pyro_sb_chains"
CHAIN_SYMBOL = opt_einsum.get_symbol(10_000)  # Pyro counts plates and enumerated dimensions up from 0

Sites = dict[str, Tensor]


class Factor(NamedTuple):
    """One site's log density, packed: ``dims`` has one letter a dimension, ``plates`` the letters of its plates."""

    log_prob: Tensor
    dims: str
    plates: frozenset[str]


def contract(factors: list[Factor], chains: str, num_chains: int, ring: type[LogRing] = LogRing) -> Tensor:
    """Sum out all dimensions of the factors but the chains', or maximise by ``MapRing``. Shape ``(C,)``."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()  # Pyro asks for this type
    for factor in factors:
        factor.log_prob._pyro_dims = factor.dims  # type: ignore[attr-defined]
        tree.setdefault(factor.plates, []).append(factor.log_prob)
    summed = set("".join(factor.dims for factor in factors)).difference(*(factor.plates for factor in factors))
    with opt_einsum.shared_intermediates() as cache:
        rule = ring(cache, dim_to_size={chains: num_chains})
        return contract_to_tensor(tree, summed, target_ordinal=frozenset({chains}), ring=rule)


def packed_factors(trace: poutine.Trace, *, scaled: bool = True) -> dict[str, Factor]:
    """Every site's log density with named dimensions; refuses latents that are neither given nor enumerated.

    Draws of discrete sites obey masks but not scales (``scaled=False``), as in Pyro's ``infer_discrete``.
    """
    for name, site in latents(trace):
        if site["infer"].get("_enumerate_dim") is None:
            raise unknown_site(name)
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors = {}
    for name, site in trace.nodes.items():
        if is_sample(site):
            pack = site["packed"]
            log_prob = pack["log_prob"] if scaled else scale_and_mask(pack["unscaled_log_prob"], mask=pack["mask"])
            plates = frozenset(symbols[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
            factors[name] = Factor(log_prob, log_prob._pyro_dims, plates)
    return factors


class EnumeratedPlate:
    """One run of the model under an outer plate of chains."""

    name = "plate"

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype
        self.looks_at = prototype.runs.looks_at

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        prototype, runs = self.prototype, self.prototype.runs
        rows, log_det = constrain(prototype, z)
        model = poutine.enum(chained(prototype, len(z)), first_available_dim=-prototype.max_plate_nesting - 2)
        with poutine.block():
            conditioned = poutine.condition(model, runs.widened(rows).values)
            trace = poutine.trace(conditioned).get_trace(*runs.args, **runs.kwargs)
        factors = list(packed_factors(trace).values())
        return log_det + contract(factors, trace.plate_to_symbol[CHAINS], len(z))

    def discrete(self, values: Sites, num_chains: int, temperature: int) -> Sites:
        """Enumerated sites given constrained latents, drawn (1) or most probable (0). Shape ``(C, *shape)``."""
        model, placed = chained(self.prototype, num_chains), self.prototype.runs.widened(Row(values)).values
        draws = infer(self.prototype, model, placed, temperature, -self.prototype.max_plate_nesting - 2)
        return {name: x.reshape(num_chains, *self.prototype.enumerated[name]) for name, x in draws.items()}


def chained(prototype: Prototype, num_chains: int) -> Callable[..., Any]:
    """The model inside an outermost plate of chains, its discrete sites marked for enumeration."""
    return partial(in_chain_plate, config_enumerate(prototype.runs.model), num_chains, -prototype.max_plate_nesting - 1)


def in_chain_plate(model: Callable[..., Any], num_chains: int, plate_dim: int, *args: Any, **kwargs: Any) -> Any:
    with pyro.plate(CHAINS, num_chains, dim=plate_dim):
        return model(*args, **kwargs)


class EnumeratedVmap:
    """One chain's run under vmap for the factors; their contraction, outside of vmap, with the chains as a plate."""

    name = "vmap"

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype
        self.looks_at = prototype.runs.looks_at

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        rows, log_det = constrain(self.prototype, z)
        factors, _ = self.factors(rows.values, len(z))
        return log_det + contract(list(factors.values()), CHAIN_SYMBOL, len(z))

    def factors(
        self, values: Sites, num_chains: int, *, scaled: bool = True
    ) -> tuple[dict[str, Factor], poutine.Trace]:
        """Factors of all chains, chains first; and one chain's trace, whose structure is that of all."""
        seen = []

        def one(row: Sites) -> Sites:
            trace = enumerated_trace(self.prototype, row)
            seen.append((trace, packed_factors(trace, scaled=scaled)))
            return {name: factor.log_prob for name, factor in seen[-1][1].items()}

        log_probs = vmapped(lambda _, row: one(row), torch.zeros(num_chains), values)
        trace, layout = seen[-1]
        factors = {
            name: Factor(log_probs[name], CHAIN_SYMBOL + factor.dims, factor.plates | {CHAIN_SYMBOL})
            for name, factor in layout.items()
        }
        return factors, trace

    def discrete(self, values: Sites, num_chains: int, temperature: int) -> Sites:
        """Enumerated sites given constrained latents, drawn (1) or most probable (0). Shape ``(C, *shape)``."""
        factors, trace = self.factors(values, num_chains, scaled=False)
        plate_dim = min(trace.symbol_to_dim.values(), default=0) - 1
        frame = CondIndepStackFrame(name=CHAINS, dim=plate_dim, size=num_chains, counter=0)
        trace.plate_to_symbol[CHAINS] = CHAIN_SYMBOL
        trace.symbol_to_dim[CHAIN_SYMBOL] = plate_dim
        for name, factor in factors.items():  # the chain's trace becomes all chains' trace
            node = trace.nodes[name]
            node["cond_indep_stack"] = (*node["cond_indep_stack"], frame)
            factor.log_prob._pyro_dims = factor.dims  # type: ignore[attr-defined]
            node["packed"]["masked_log_prob"] = factor.log_prob
        names = list(self.prototype.enumerated)
        draws = _sample_posterior_from_trace(partial(replayed, names), trace, temperature, False)
        return {name: x.reshape(num_chains, *self.prototype.enumerated[name]) for name, x in draws.items()}


def enumerated_trace(prototype: Prototype, values: Sites) -> poutine.Trace:
    """One chain's run with its discrete sites enumerated, safe under vmap."""
    messenger = VmapEnumMessenger(first_available_dim=-prototype.max_plate_nesting - 1)
    model = poutine.condition(messenger(config_enumerate(prototype.runs.model)), values)
    with poutine.block():
        return poutine.trace(model).get_trace(*prototype.runs.args, **prototype.runs.kwargs)


class VmapEnumMessenger(EnumMessenger):
    """Pyro's enumeration, which reads ``value.data`` for its shape: vmap forbids that, so it sees an empty stand-in."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


def replayed(names: list[str]) -> Sites:
    """A stand-in model that hands back the values that Pyro replays into its sites."""
    unknown = pyro.distributions.Delta(torch.zeros(()))
    return {name: pyro.sample(name, unknown, infer={"enumerate": "parallel"}) for name in names}


def discrete_by_loop(prototype: Prototype, values: Sites, num_chains: int, temperature: int) -> Sites:
    """Enumerated sites by one run of ``infer_discrete`` a chain. Shape ``(C, *shape)``."""
    model, first_dim = config_enumerate(prototype.runs.model), -prototype.max_plate_nesting - 1
    chains = [{name: x[i] for name, x in values.items()} for i in range(num_chains)]
    draws = [infer(prototype, model, row, temperature, first_dim) for row in chains]
    return {
        name: torch.stack([draw[name].reshape(shape) for draw in draws]) for name, shape in prototype.enumerated.items()
    }


def discrete_in_turn(prototype: Prototype, values: Sites, num_chains: int, temperature: int) -> Sites:
    r"""Enumerated sites drawn entry by entry, each given those before it, with the others summed out.

    Asks for nothing but the log joint, and for one sum an entry and value.
    """
    try:
        factors, trace = EnumeratedVmap(prototype).factors(values, num_chains, scaled=False)
    except Exception as error:  # whatever the user's model raises when it meets a batch
        logger.info("discrete sites are drawn chain by chain: %s", error)
        chains = [{name: x[i] for name, x in values.items()} for i in range(num_chains)]
        draws = [one_in_turn(prototype, row, temperature) for row in chains]
        return {name: torch.cat([draw[name] for draw in draws]) for name in prototype.enumerated}
    return in_turn(prototype, factors, trace, num_chains, temperature)


def one_in_turn(prototype: Prototype, row: Sites, temperature: int) -> Sites:
    """`discrete_in_turn` of one chain. Shape ``(1, *shape)`` each."""
    trace = enumerated_trace(prototype, row)
    factors = {
        name: Factor(factor.log_prob[None], CHAIN_SYMBOL + factor.dims, factor.plates | {CHAIN_SYMBOL})
        for name, factor in packed_factors(trace, scaled=False).items()
    }
    return in_turn(prototype, factors, trace, 1, temperature)


def in_turn(
    prototype: Prototype, factors: dict[str, Factor], trace: poutine.Trace, num_chains: int, temperature: int
) -> Sites:
    """Draws entry by entry from factors with the chains first. Shape ``(C, *shape)`` each."""
    found, ring = {}, LogRing if temperature else MapRing
    for name, shape in prototype.enumerated.items():
        site, factor = trace.nodes[name], factors[name]
        symbol = site["infer"]["_dim_to_symbol"][site["infer"]["_enumerate_dim"]]
        support = site["fn"].enumerate_support(expand=False)
        support = support.reshape(len(support), *support.shape[support.dim() - site["fn"].event_dim :])
        states = torch.arange(len(support), device=support.device)
        entries = [dim for dim in factor.dims[1:] if dim in factor.plates]  # plates of the site, left to right
        sizes = [factor.log_prob.shape[factor.dims.index(dim)] for dim in entries]
        chosen = []
        for place in product(*map(range, sizes)):
            log_probs = []
            for state in states:
                one = factors | {name: restricted(factors[name], symbol, entries, place, (states == state)[None])}
                log_probs.append(contract(list(one.values()), CHAIN_SYMBOL, num_chains, ring))
            logits = torch.stack(log_probs, -1)
            index = torch.distributions.Categorical(logits=logits).sample() if temperature else logits.argmax(-1)
            chosen.append(index)
            keep = index[:, None] == states
            factors = factors | {name: restricted(factors[name], symbol, entries, place, keep)}
        found[name] = support[torch.stack(chosen, -1)].reshape(num_chains, *shape)
    return found


def restricted(factor: Factor, symbol: str, entries: list[str], place: tuple[int, ...], keep: Tensor) -> Factor:
    """A site's factor without the values of one entry that ``keep``, ``(C, values)`` or ``(1, values)``, leaves out."""
    dims, log_prob = factor.dims, factor.log_prob
    sizes = dict.fromkeys(dims, 1)
    banned = ~keep.reshape(list((sizes | {CHAIN_SYMBOL: len(keep), symbol: keep.shape[1]}).values()))
    for dim, i in zip(entries, place):
        here = torch.arange(log_prob.shape[dims.index(dim)], device=log_prob.device) == i
        banned = banned & here.reshape(list((sizes | {dim: len(here)}).values()))
    return factor._replace(log_prob=torch.where(banned, -torch.inf, log_prob))


def infer(prototype: Prototype, model: Callable[..., Any], values: Sites, temperature: int, first_dim: int) -> Sites:
    """One run of ``infer_discrete`` with the continuous latents at ``values``."""
    model = infer_discrete(poutine.condition(model, values), first_available_dim=first_dim, temperature=temperature)
    with poutine.block():
        trace = poutine.trace(model).get_trace(*prototype.runs.args, **prototype.runs.kwargs)
    return {name: trace.nodes[name]["value"] for name in prototype.enumerated}


def discrete_sites(prototype: Prototype, values: Sites, num_chains: int, route: str, temperature: int) -> Sites:
    r"""Enumerated sites drawn given continuous latents, by the route that serves the log joint, or the next that can.

    Args:
        prototype: The model.
        values: Constrained latents. Shape ``(C, *shape)`` each.
        num_chains: C.
        route: ``"plate"``, ``"vmap"`` or ``"loop"``.
        temperature: 1 for draws, 0 for the most probable values.

    Returns:
        ``{site: (C, *shape)}``.
    """
    ways: dict[str, Callable[[Sites, int, int], Sites]] = {
        "plate": EnumeratedPlate(prototype).discrete,
        "vmap": EnumeratedVmap(prototype).discrete,
        "loop": partial(discrete_by_loop, prototype),
    }
    names = list(ways)
    for name in names[names.index(route if route in ways else "vmap") :]:
        try:
            return ways[name](values, num_chains, temperature)
        except Exception as error:  # of Pyro's smoothing, which serves fewer models than its elimination does
            logger.info("discrete sites cannot be drawn by %s: %s: %s", name, type(error).__name__, error)
    return discrete_in_turn(prototype, values, num_chains, temperature)
