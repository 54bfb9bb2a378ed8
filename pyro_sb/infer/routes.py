r"""Routes from a Pyro model to a batched log joint, ``(C, dim)`` to ``(C,)``, differentiable row by row.

- :class:`Plate`: one run of the model with the chains as an outermost batch dimension. Fastest; asks that the model's own
  tensor code broadcasts on the left.
- :class:`EnumeratedPlate`: the same under a Pyro plate, with discrete sites summed out exactly.
- :class:`Vmap`: ``torch.func.vmap`` over a single chain's run. Semantically safe, a little slower; no discrete sites.
- :class:`Loop`: Pyro's single-chain potential, one chain after another. Always right, slow.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import Prototype, is_sample, latents

__all__ = [
    "EnumeratedPlate",
    "Loop",
    "ModelPotential",
    "Plate",
    "SingleChain",
    "UserPotential",
    "Vmap",
    "chain_values",
    "constrain",
    "density_terms",
    "in_chain_plate",
]

CHAINS = "_pyro_sb_chains"
Potential = Callable[[dict[str, Tensor]], Tensor]


class Plate:
    """One run of the model on all chains: each site's value has shape ``(C, 1, ..., 1, *batch, *event)``."""

    name = "plate"

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype

    def __call__(self, z: Tensor) -> Tensor:
        prototype = self.prototype
        constrained, log_det = constrain(prototype, z)
        values = {name: chain_values(prototype, name, x) for name, x in constrained.items()}
        total = log_det
        for term in density_terms(prototype, values):
            total = total + self.per_chain(term)
        return total.expand(len(z))

    def per_chain(self, term: Tensor) -> Tensor:
        """Sum all dimensions but the chains'; a term without it is one constant for every chain."""
        extra = term.dim() - self.prototype.depth
        if extra <= 0:
            return term.sum()
        if extra > 1:
            raise ValueError(f"a site has {extra} batch dimensions left of its plates, expected the chains alone")
        rest = tuple(range(1, term.dim()))
        return term.sum(rest) if rest else term


class EnumeratedPlate:
    """One run under an outer chain plate, discrete sites enumerated and contracted down to that plate."""

    name = "plate"

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype

    def __call__(self, z: Tensor) -> Tensor:
        if len(z) == 1:  # plates of size 1 vanish when Pyro packs tensors, so a lone chain runs with its copy
            return self(z.expand(2, -1))[:1]
        constrained, log_det = constrain(self.prototype, z)
        trace = self.trace(constrained, len(z))
        for name, site in latents(trace):
            if site["infer"].get("_enumerate_dim") is None:
                raise unknown_site(name)
        trace.compute_log_prob()
        trace.pack_tensors()
        return log_det + self.contract(trace, len(z))

    def trace(self, constrained: dict[str, Tensor], num_chains: int) -> poutine.Trace:
        prototype = self.prototype
        values = {name: chain_values(prototype, name, x) for name, x in constrained.items()}
        model = partial(in_chain_plate, config_enumerate(prototype.model), num_chains, -prototype.max_plate_nesting - 1)
        model = poutine.enum(model, first_available_dim=-prototype.max_plate_nesting - 2)
        with poutine.block():
            return poutine.trace(poutine.condition(model, values)).get_trace(*prototype.args, **prototype.kwargs)

    @staticmethod
    def contract(trace: poutine.Trace, num_chains: int) -> Tensor:
        """Sum out enumerated dimensions and plates, all but the chains'. Shape ``(C,)``."""
        symbols = trace.plate_to_symbol
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()  # Pyro asks for this type
        for site in filter(is_sample, trace.nodes.values()):
            plates = frozenset(symbols[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
            factors.setdefault(plates, []).append(site["packed"]["log_prob"])
        enumerated = set(trace.symbol_to_dim) - set(symbols.values())
        chains = symbols[CHAINS]
        with shared_intermediates() as cache:
            ring = LogRing(cache, dim_to_size={chains: num_chains})
            return contract_to_tensor(factors, enumerated, target_ordinal=frozenset({chains}), ring=ring)


class Vmap:
    """``torch.func.vmap`` of a single chain's log density."""

    name = "vmap"

    def __init__(self, density: Callable[[Tensor], Tensor]) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        return torch.func.vmap(self.density)(z)


class Loop:
    """A single chain's log density, chain after chain."""

    name = "loop"

    def __init__(self, density: Callable[[Tensor], Tensor]) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        return torch.stack([self.density(row) for row in z.unbind()]) if len(z) else z.new_zeros(0)


class SingleChain:
    """Log joint of one chain by our own run of the model: no enumeration, refuses sites that come and go."""

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype

    def __call__(self, z: Tensor) -> Tensor:
        constrained, log_det = constrain(self.prototype, z)
        return log_det + torch.stack([term.sum() for term in density_terms(self.prototype, constrained)]).sum()


class ModelPotential:
    """Log joint of one chain by Pyro's own potential: the oracle that the batched routes must agree with."""

    def __init__(self, prototype: Prototype) -> None:
        self.packing = prototype.packing
        _, self.potential, _, _ = initialize_model(
            prototype.model,
            prototype.args,
            prototype.kwargs,
            transforms=prototype.transforms,
            max_plate_nesting=prototype.max_plate_nesting,
            init_strategy=prototype.start,
            initial_params={},  # anything but None: we search for valid starts ourselves
        )

    def __call__(self, z: Tensor) -> Tensor:
        return -self.potential(self.packing.unpack(z))


class UserPotential:
    """Log joint of one chain by the user's ``potential_fn``."""

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential, self.packing = potential, packing

    def __call__(self, z: Tensor) -> Tensor:
        value = torch.as_tensor(self.potential(self.packing.unpack(z)))
        if value.numel() != 1:
            raise ValueError(
                f"potential_fn must return one number for one chain's parameters, got shape {tuple(value.shape)}."
            )
        return -value.reshape(())


# ---- pieces ----


class DensityMessenger(Messenger):
    """Puts given values at the latent sites and collects every site's log density, scaled and masked."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.seen: set[str] = set()
        self.terms: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            self.seen.add(msg["name"])
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) or msg["infer"].get("_deterministic"):
            return
        if not msg["is_observed"] and msg["infer"].get("_enumerate_dim") is None:
            raise unknown_site(msg["name"])
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.terms.append(scale_and_mask(log_prob, msg["scale"], msg["mask"]))


class StructureError(ValueError):
    """The model's latent sites are not the same at every run."""


def unknown_site(name: str) -> StructureError:
    return StructureError(
        f"The model must have the same latent sites at every run, got a new one, {name!r}. Sample it always and ignore it where unused."
    )


def density_terms(prototype: Prototype, values: dict[str, Tensor], *, enumerate_discrete: bool = False) -> list[Tensor]:
    """Log densities of all sites with the continuous latents at ``values``; refuses sites that come and go."""
    model = prototype.model
    if enumerate_discrete:
        model = poutine.enum(config_enumerate(model), first_available_dim=-prototype.max_plate_nesting - 1)
    with DensityMessenger(values) as messenger:
        model(*prototype.args, **prototype.kwargs)
    missing = sorted(values.keys() - messenger.seen)
    if missing:
        raise StructureError(
            f"The model must have the same latent sites at every run, missed {missing}. Sample them always."
        )
    return messenger.terms


def constrain(prototype: Prototype, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    r"""Constrained latents, and the log Jacobian of the map.

    Args:
        prototype: The model's sites.
        z: Unconstrained vectors. Shape ``(*batch, dim)``.

    Returns:
        ``{name: (*batch, *shape)}`` and :math:`\log |\partial x / \partial z|`, shape ``(*batch,)`` or ``()``.
    """
    values, log_det = prototype.packing.unpack(z), z.new_zeros(())
    for name, transform in prototype.transforms.items():
        if is_identity(transform):
            continue
        u = values[name]
        x = values[name] = transform.inv(u)
        term = transform.log_abs_det_jacobian(x, u)
        log_det = log_det - term.reshape(*z.shape[:-1], -1).sum(-1)
    return values, log_det


def is_identity(transform: Transform) -> bool:
    """Whether ``transform`` is ``biject_to(real).inv``, whose log Jacobian is 0."""
    inner = transform.inv
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    return isinstance(inner, ComposeTransform) and not inner.parts


def chain_values(prototype: Prototype, name: str, x: Tensor) -> Tensor:
    """``(C, *batch, *event)`` with the chains moved left of all plates: ``(C, 1, ..., 1, *batch, *event)``."""
    gap = prototype.depth - len(prototype.batch_shapes[name])
    return x.reshape(x.shape[:1] + (1,) * gap + x.shape[1:])


def in_chain_plate(model: Callable[..., Any], num_chains: int, plate_dim: int, *args: Any, **kwargs: Any) -> Any:
    """``model`` inside the outer plate of chains."""
    with pyro.plate(CHAINS, num_chains, dim=plate_dim):
        return model(*args, **kwargs)
