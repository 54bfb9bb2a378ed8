"""Running a model at given latents, or at its prior: the values of wanted sites, for many chains, in bounded memory."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sb.infer.prototype import Prototype

__all__ = ["PlainSampling", "chunked", "deterministic_sites", "prior_draws"]

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


class PlainSampling(Messenger):
    """Draws by ``sample``: ``rsample`` fills an empty tensor with noise, which vmap refuses."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None:
            msg["value"] = msg["fn"].sample()


def record(prototype: Prototype, wanted: Iterable[str], values: Sites) -> Sites:
    """Values of the ``wanted`` sites in one chain's run with latents at ``values``."""
    with Record(values, wanted) as messenger:
        prototype.model(*prototype.args, **prototype.kwargs)
    return messenger.found


def deterministic_sites(prototype: Prototype, values: Sites) -> Sites:
    """``pyro.deterministic`` sites at constrained ``values``, discrete ones among them. Shape ``(C, *shape)`` each."""
    return by_vmap_or_loop(partial(record, prototype, prototype.deterministic), values)


def prior_draws(prototype: Prototype, num: int) -> Sites:
    """Independent draws of the continuous latents from the prior, constrained. Shape ``(num, *shape)`` each."""
    index = {"draw": torch.zeros(num)}  # no site's name, only something to map over
    with PlainSampling():
        return by_vmap_or_loop(lambda _: record(prototype, prototype.transforms, {}), index)


def by_vmap_or_loop(one: Callable[[Sites], Sites], inputs: Sites) -> Sites:
    """``one`` on every row of ``inputs``: under vmap where the model allows it, else row by row."""
    try:
        return torch.func.vmap(one, randomness="different")(inputs)
    except Exception:  # something in the user's model that vmap does not know; the loop raises what is truly wrong
        found = [one(dict(zip(inputs, row))) for row in zip(*(x.unbind() for x in inputs.values()))]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def chunked(fn: Callable[[Sites], Sites], inputs: Sites, numbers_a_row: int) -> Sites:
    """``fn`` on rows of ``inputs``, ``(C, ...)`` each, in chunks that hold at most :data:`MAX_NUMBERS` numbers."""
    num_rows = max(1, MAX_NUMBERS // max(1, numbers_a_row))
    chunks = zip(*(x.split(num_rows) for x in inputs.values()))
    with torch.no_grad(), pyro.validation_enabled(False):
        parts = [fn(dict(zip(inputs, chunk))) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
