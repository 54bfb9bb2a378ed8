"""Running a model at given latents: its deterministic sites, its discrete sites' posterior, draws of its prior."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sb.infer.prototype import Prototype
from pyro_sb.infer.routes import chain_values, in_chain_plate

__all__ = ["chunked", "deterministic_sites", "discrete_sites", "prior_draws"]

Sites = dict[str, Tensor]
MAX_NUMBERS = 2**23  # numbers that one chunk of runs may hold in its sites, 64 MB in float64


class Record(Messenger):
    """Puts given values at latent sites and keeps the values of wanted sites."""

    def __init__(self, values: Sites, wanted: Iterable[str]) -> None:
        super().__init__()
        self.values, self.wanted = values, frozenset(wanted)
        self.found: Sites = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.wanted:
            self.found[msg["name"]] = msg["value"]


def record(prototype: Prototype, wanted: Iterable[str], values: Sites) -> Sites:
    """Values of the ``wanted`` sites in one chain's run with latents at ``values``."""
    with Record(values, wanted) as messenger:
        prototype.model(*prototype.args, **prototype.kwargs)
    return messenger.found


def deterministic_sites(prototype: Prototype, values: Sites) -> Sites:
    r"""``pyro.deterministic`` sites at constrained latents ``values`` of shape ``(C, *shape)``, discrete ones included."""
    return by_vmap_or_loop(partial(record, prototype, prototype.deterministic), values)


def prior_draws(prototype: Prototype, num: int) -> Sites:
    """``num`` independent draws of the continuous latents from the prior, constrained. Shape ``(num, *shape)``."""

    def one(_: Tensor) -> Sites:
        return record(prototype, prototype.transforms, {})

    return by_vmap_or_loop(one, torch.zeros(num))


def by_vmap_or_loop(one: Callable[[Any], Sites], inputs: Any) -> Sites:
    """``one`` on every row of ``inputs``: under vmap where the model allows it, else row by row."""
    try:
        return torch.func.vmap(one, randomness="different")(inputs)
    except Exception:  # the user's model does something that vmap does not know; the loop raises what is truly wrong
        return stack([one(row) for row in rows(inputs)])


def rows(inputs: Any) -> list[Any]:
    if isinstance(inputs, Tensor):
        return list(inputs.unbind())
    return [dict(zip(inputs, row, strict=True)) for row in zip(*(x.unbind() for x in inputs.values()), strict=True)]


def stack(draws: list[Sites]) -> Sites:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def discrete_sites(prototype: Prototype, values: Sites, *, temperature: int, plate: bool) -> Sites:
    r"""Enumerated sites drawn given continuous latents (``temperature=1``), or their most probable values (0).

    Args:
        prototype: The model.
        values: Constrained latents. Shape ``(C, *shape)`` each.
        temperature: 1 or 0.
        plate: Whether the model runs under an outer chain plate (the log joint's route is "plate").
    """
    if plate:
        return discrete_under_plate(prototype, values, temperature)
    model = config_enumerate(prototype.model)
    draws = stack([infer(prototype, model, row, temperature, -prototype.max_plate_nesting - 1) for row in rows(values)])
    return {name: x.reshape(len(x), *prototype.enumerated[name]) for name, x in draws.items()}


def discrete_under_plate(prototype: Prototype, values: Sites, temperature: int) -> Sites:
    num = len(next(iter(values.values())))
    if num == 1:  # plates of size 1 vanish when Pyro packs tensors
        twice = {name: x.expand(2, *x.shape[1:]) for name, x in values.items()}
        return {name: x[:1] for name, x in discrete_under_plate(prototype, twice, temperature).items()}
    plate_dim = -prototype.max_plate_nesting - 1
    model = partial(in_chain_plate, config_enumerate(prototype.model), num, plate_dim)
    placed = {name: chain_values(prototype, name, x) for name, x in values.items()}
    draws = infer(prototype, model, placed, temperature, plate_dim - 1)
    return {name: x.reshape(num, *prototype.enumerated[name]) for name, x in draws.items()}


def infer(prototype: Prototype, model: Callable[..., Any], values: Sites, temperature: int, first_dim: int) -> Sites:
    """One run of ``infer_discrete`` with the continuous latents at ``values``."""
    conditioned = infer_discrete(
        poutine.condition(model, values), first_available_dim=first_dim, temperature=temperature
    )
    with poutine.block():
        trace = poutine.trace(conditioned).get_trace(*prototype.args, **prototype.kwargs)
    return {name: trace.nodes[name]["value"] for name in prototype.enumerated}


def chunked(fn: Callable[[Tensor], Sites], z: Tensor, numbers_a_row: int) -> Sites:
    """``fn`` on ``(*batch, dim)`` in chunks of bounded memory: flattened to ``(C, dim)``, answers reshaped to ``(*batch, ...)``."""
    batch = z.shape[:-1]
    with torch.no_grad(), pyro.validation_enabled(False):
        parts = [fn(part) for part in z.reshape(-1, z.shape[-1]).split(max(1, MAX_NUMBERS // max(1, numbers_a_row)))]
    return {
        name: torch.cat([part[name] for part in parts]).reshape(batch + parts[0][name].shape[1:]) for name in parts[0]
    }
