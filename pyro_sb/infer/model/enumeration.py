r"""Discrete latents of many chains at once: summed out of the log joint, and drawn from their posterior afterwards.

Pyro enumerates a discrete site along a fresh tensor dimension and contracts the sites' log densities, the *factors*.
Chains are one more plate of that contraction. The factors of all chains come from one run of the model under an outer
plate (:class:`EnumeratedPlate`), or from ``torch.func.vmap`` over one chain's run (:class:`EnumeratedVmap`), which also
serves models that index with an enumerated site (``loc[a]``, where a plate would need ``Vindex(loc)[..., a]``).
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import opt_einsum
import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import scale_and_mask
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_sb.infer.model.agreement import vmapped
from pyro_sb.infer.model.prototype import Prototype
from pyro_sb.infer.model.routes import constrain
from pyro_sb.infer.model.runs import Row, unknown_site
from pyro_sb.infer.model.sites import is_sample, latents

__all__ = ["EnumeratedPlate", "EnumeratedVmap", "discrete_sites"]

CHAINS = "_pyro_sb_chains"
CHAIN_SYMBOL = opt_einsum.get_symbol(10_000)  # Pyro counts plates and enumerated dimensions up from 0

Sites = dict[str, Tensor]


class Factor(NamedTuple):
    """One site's log density, packed: ``dims`` has one letter a dimension, ``plates`` the letters of its plates."""

    log_prob: Tensor
    dims: str
    plates: frozenset[str]


def contract(factors: list[Factor], chains: str, num_chains: int) -> Tensor:
    """Sum out all dimensions of the factors but the chains'. Shape ``(C,)``."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()  # Pyro asks for this type
    for factor in factors:
        factor.log_prob._pyro_dims = factor.dims  # type: ignore[attr-defined]
        tree.setdefault(factor.plates, []).append(factor.log_prob)
    summed = set("".join(factor.dims for factor in factors)).difference(*(factor.plates for factor in factors))
    with opt_einsum.shared_intermediates() as cache:
        ring = LogRing(cache, dim_to_size={chains: num_chains})
        return contract_to_tensor(tree, summed, target_ordinal=frozenset({chains}), ring=ring)


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

    def discrete(self, values: Sites, temperature: int) -> Sites:
        """Enumerated sites given constrained latents, drawn (1) or most probable (0). Shape ``(C, *shape)``."""
        num_chains = len(next(iter(values.values())))
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

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        rows, log_det = constrain(self.prototype, z)
        factors, _ = self.factors(rows.values)
        return log_det + contract(list(factors.values()), CHAIN_SYMBOL, len(z))

    def factors(self, values: Sites, *, scaled: bool = True) -> tuple[dict[str, Factor], poutine.Trace]:
        """Factors of all chains, chains first; and one chain's trace, whose structure is that of all."""
        seen = []

        def one(row: Sites) -> Sites:
            trace = enumerated_trace(self.prototype, row)
            seen.append((trace, packed_factors(trace, scaled=scaled)))
            return {name: factor.log_prob for name, factor in seen[-1][1].items()}

        log_probs = vmapped(one, values)
        trace, layout = seen[-1]
        factors = {
            name: Factor(log_probs[name], CHAIN_SYMBOL + factor.dims, factor.plates | {CHAIN_SYMBOL})
            for name, factor in layout.items()
        }
        return factors, trace

    def discrete(self, values: Sites, temperature: int) -> Sites:
        """Enumerated sites given constrained latents, drawn (1) or most probable (0). Shape ``(C, *shape)``."""
        num_chains = len(next(iter(values.values())))
        factors, trace = self.factors(values, scaled=False)
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


def discrete_by_loop(prototype: Prototype, values: Sites, temperature: int) -> Sites:
    """Enumerated sites by one run of ``infer_discrete`` a chain. Shape ``(C, *shape)``."""
    model, first_dim = config_enumerate(prototype.runs.model), -prototype.max_plate_nesting - 1
    chains = [dict(zip(values, row)) for row in zip(*(x.unbind() for x in values.values()))]
    draws = [infer(prototype, model, row, temperature, first_dim) for row in chains]
    return {
        name: torch.stack([draw[name].reshape(shape) for draw in draws]) for name, shape in prototype.enumerated.items()
    }


def infer(prototype: Prototype, model: Callable[..., Any], values: Sites, temperature: int, first_dim: int) -> Sites:
    """One run of ``infer_discrete`` with the continuous latents at ``values``."""
    model = infer_discrete(poutine.condition(model, values), first_available_dim=first_dim, temperature=temperature)
    with poutine.block():
        trace = poutine.trace(model).get_trace(*prototype.runs.args, **prototype.runs.kwargs)
    return {name: trace.nodes[name]["value"] for name in prototype.enumerated}


def discrete_sites(prototype: Prototype, values: Sites, route: str, temperature: int) -> Sites:
    r"""Enumerated sites drawn given continuous latents, by the route that serves the log joint.

    Args:
        prototype: The model.
        values: Constrained latents. Shape ``(C, *shape)`` each.
        route: ``"plate"``, ``"vmap"`` or ``"loop"``.
        temperature: 1 for draws, 0 for the most probable values.

    Returns:
        ``{site: (C, *shape)}``.
    """
    if route == "loop":
        return discrete_by_loop(prototype, values, temperature)
    batched = EnumeratedPlate(prototype) if route == "plate" else EnumeratedVmap(prototype)
    return batched.discrete(values, temperature)
