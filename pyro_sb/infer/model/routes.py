r"""Routes from a Pyro model to a batched log joint, ``(C, dim)`` to ``(C,)``, differentiable row by row.

- :class:`Plate`: one run of the model with the chains as an outermost batch dimension. Fastest; asks that the model's
  own tensor code broadcasts from the left.
- :class:`Vmap`: ``torch.func.vmap`` over a single chain's run. Semantically safe, a little slower.
- :class:`Loop`: a single chain's log joint, chain after chain. Always right, slow.

Models with discrete latents have their own two batched routes, in ``enumeration``.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_sb.infer.model.packing import Packing
from pyro_sb.infer.model.prototype import Prototype

__all__ = [
    "Loop",
    "ModelPotential",
    "Plate",
    "SingleChain",
    "UserPotential",
    "Vmap",
    "chain_values",
    "constrain",
    "density_terms",
    "unknown_site",
]

Potential = Callable[[dict[str, Tensor]], Tensor]


class Plate:
    """One run of the model on all chains: each site's value has shape ``(C, 1, ..., 1, *batch, *event)``."""

    name = "plate"

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        values, total = constrain(self.prototype, z)
        for term in density_terms(self.prototype, chain_values(self.prototype, values)):
            total = total + self.per_chain(term)
        return total.expand(len(z))

    def per_chain(self, term: Tensor) -> Tensor:
        """Sum all dimensions but the chains', the leftmost; a term without it is one constant for every chain."""
        if term.dim() <= self.prototype.depth:
            return term.sum()
        rest = tuple(range(1, term.dim()))
        return term.sum(rest) if rest else term


class Vmap:
    """``torch.func.vmap`` of a single chain's log density."""

    name = "vmap"

    def __init__(self, density: Callable[[Tensor], Tensor]) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return torch.func.vmap(self.density)(z)


class Loop:
    """A single chain's log density, chain after chain."""

    name = "loop"

    def __init__(self, density: Callable[[Tensor], Tensor]) -> None:
        self.density = density

    def __call__(self, z: Tensor) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        return torch.stack([self.density(row) for row in z.unbind()]) if len(z) else z.new_zeros(0)


# ---- one chain ----


class SingleChain:
    """Log joint of one chain by our own run of the model, free of what vmap cannot do; no discrete latents."""

    def __init__(self, prototype: Prototype) -> None:
        self.prototype = prototype

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        values, log_det = constrain(self.prototype, z)
        return sum((term.sum() for term in density_terms(self.prototype, values)), log_det)


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
        """``(dim,)`` to ``()``."""
        return -self.potential(self.packing.unpack(z))


class UserPotential:
    """Log joint of one chain by the user's ``potential_fn``."""

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential, self.packing = potential, packing

    def __call__(self, z: Tensor) -> Tensor:
        """``(dim,)`` to ``()``."""
        value = torch.as_tensor(self.potential(self.packing.unpack(z)))
        if value.numel() != 1:
            raise ValueError(f"potential_fn must return one number for one chain, got shape {tuple(value.shape)}.")
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


def unknown_site(name: str) -> ValueError:
    """What to say of a latent that the first run did not have."""
    return ValueError(
        f"The model must have the same latent sites at every run, got a new one, {name!r}. Sample it always and ignore "
        "it where it is not used."
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
        raise ValueError(
            f"The model must have the same latent sites at every run, got one without {missing}. Sample them always "
            "and ignore them where they are not used."
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


def chain_values(prototype: Prototype, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(C, *batch, *event)`` with the chains moved left of all plates: ``(C, 1, ..., 1, *batch, *event)``."""
    gaps = {name: prototype.depth - len(batch) for name, batch in prototype.batch_shapes.items()}
    return {name: x.reshape(x.shape[:1] + (1,) * gaps[name] + x.shape[1:]) for name, x in values.items()}
