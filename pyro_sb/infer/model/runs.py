"""Running a model at given latents, or at its prior: the values of wanted sites, for many chains, in bounded memory."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_sb.infer.model.prototype import Prototype, Start, can_sample, first_float, is_deterministic, is_sample, run

__all__ = ["ModelRuns", "PlainSampling", "RunSites", "chunked", "deterministic_sites", "prior_draws"]

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


# A Pyro model run at many draws at once: values and elementwise log densities of its sites, in the shapes of one run


logger = logging.getLogger(__name__)
Draws = dict[str, Tensor]
Trace = Any
MAX_BATCH = 2**22  # numbers in the sites of one batch, 32 MB in float64


@dataclass
class RunSites:
    r"""What a batch of runs gave.

    Attributes:
        values: Every sample and deterministic site. Each of shape ``(num, *value)``.
        log_probs: Log density of every sample site, elementwise: 0 where masked, scales left out. Each of shape
            ``(num, *batch)``.
    """

    values: Draws
    log_probs: Draws


class ModelRuns:
    r"""Runs of a model with its latents at given draws.

    Args:
        model: Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        draw: One draw of its latents, at which it is run once to learn its structure.

    Attributes:
        observed: The data, site by site; no deterministic sites, factors or subsampling sites.
        missing: Latents that ``draw`` leaves open.
        improper: Latents that cannot be sampled.
        shapes: Shape of each site's value.
        plates: Names of each site's dimensions, from its plates; ``None`` where a dimension belongs to no plate.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], draw: Draws) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        start = Start(like=first_float(args, kwargs))
        nodes = run(poutine.condition(model, data=draw), args, kwargs, start).nodes
        sites = {name: site for name, site in nodes.items() if is_sample(site) and not site_is_factor(site)}
        stochastic = {name: site for name, site in sites.items() if not is_deterministic(site)}
        self.stochastic = list(stochastic)
        self.observed = {k: s["value"] for k, s in stochastic.items() if s["is_observed"] and k not in draw}
        self.missing = [name for name, site in stochastic.items() if not site["is_observed"]]
        self.improper = [k for k, s in stochastic.items() if k not in self.observed and not can_sample(s["fn"])]
        self.shapes = {name: torch.as_tensor(site["value"]).shape for name, site in sites.items()}
        self.plates = {name: _plate_names(site) for name, site in sites.items()}
        self._batch_dims = {name: len(site["fn"].batch_shape) for name, site in stochastic.items()}
        self._log_prob_shapes = {name: _log_prob(site).shape for name, site in stochastic.items()}
        self._numel = 1 + sum(shape.numel() for shape in self.shapes.values())

    def at(self, draws: Draws, num: int, *, resample: bool = False) -> RunSites:
        r"""Run the model ``num`` times.

        Args:
            draws: Latents to set, constrained. Each of shape ``(num, *site)``. Other latents are sampled.
            num: Number of runs.
            resample: Draw the observed sites too, instead of leaving them at the data.

        Returns:
            Values and elementwise log densities of the sites.
        """
        draws = {name: draws[name] for name in draws if name in self.stochastic}
        model = poutine.uncondition(self.model) if resample else self.model
        routes: list[Callable[[Any, Draws, int], RunSites]] = [self._plate, self._vmap, self._loop]
        rows = max(1, MAX_BATCH // self._numel)
        batches = []
        for start in range(0, num, rows):
            size = min(rows, num - start)
            batch = {name: value[start : start + size] for name, value in draws.items()}
            with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
                batches.append(self._first_that_agrees(routes, model, batch, size))
        return RunSites(
            _stacked([b.values for b in batches], torch.cat), _stacked([b.log_probs for b in batches], torch.cat)
        )

    def _first_that_agrees(self, routes: list[Any], model: Any, batch: Draws, size: int) -> RunSites:
        """Try routes in order, dropping from the list those that fail, so that later batches do not try again."""
        while len(routes) > 1:
            try:
                sites = routes[0](model, batch, size)
                if all(self._agrees(sites, row) for row in {0, size // 2, size - 1}):
                    return sites
                reason = "it disagrees with a single run"
            except Exception as error:  # whatever the user's model raises when it meets a batch
                reason = f"{type(error).__name__}: {error}"
            logger.info("The model cannot be run by %s: %s.", routes[0].__name__, reason)
            routes.pop(0)
        return routes[0](model, batch, size)

    def _agrees(self, sites: RunSites, row: int) -> bool:
        """Whether a row of a batch is what a single run gives with every site at that row's value."""
        model = poutine.uncondition(self.model)
        single = self._single(model, {name: sites.values[name][row] for name in self.stochastic})
        pairs = [(sites.values[name][row], value) for name, value in single.values.items()]
        pairs += [(sites.log_probs[name][row], value) for name, value in single.log_probs.items()]
        return all(a.shape == b.shape and _close(a, b) for a, b in pairs)

    def _single(self, model: Any, draw: Draws) -> RunSites:
        trace = poutine.trace(poutine.condition(model, data=draw)).get_trace(*self.args, **self.kwargs)
        return RunSites(
            {name: torch.as_tensor(trace.nodes[name]["value"]) for name in self.shapes},
            {name: _log_prob(trace.nodes[name]) for name in self.stochastic},
        )

    def _loop(self, model: Any, draws: Draws, num: int) -> RunSites:
        runs = [self._single(model, {name: value[row] for name, value in draws.items()}) for row in range(num)]
        return RunSites(
            _stacked([r.values for r in runs], torch.stack), _stacked([r.log_probs for r in runs], torch.stack)
        )

    def _vmap(self, model: Any, draws: Draws, num: int) -> RunSites:
        def single(_: Tensor, draw: Draws) -> tuple[Draws, Draws]:
            sites = self._single(model, draw)
            return sites.values, sites.log_probs

        with PlainSampling():
            return RunSites(*torch.func.vmap(single, randomness="different")(torch.zeros(num), draws))

    def _plate(self, model: Any, draws: Draws, num: int) -> RunSites:
        depth = max([0, *self._batch_dims.values()])

        def batched(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate("_pyro_sb_runs", num, dim=-depth - 1):
                return model(*args, **kwargs)

        widened = {
            name: value.reshape(num, *[1] * (depth - self._batch_dims[name]), *self.shapes[name])
            for name, value in draws.items()
        }
        nodes = poutine.trace(poutine.condition(batched, data=widened)).get_trace(*self.args, **self.kwargs).nodes
        return RunSites(
            {name: _fitted(torch.as_tensor(nodes[name]["value"]), num, shape) for name, shape in self.shapes.items()},
            {name: _fitted(_log_prob(nodes[name]), num, shape) for name, shape in self._log_prob_shapes.items()},
        )


def _log_prob(site: dict[str, Any]) -> Tensor:
    """Elementwise log density of a site, 0 where masked. Scales change an objective, not a density: left out."""
    log_prob = site["fn"].log_prob(site["value"])
    mask = site["mask"]
    if mask is None or mask is True:
        return log_prob
    return torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, torch.zeros_like(log_prob))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _fitted(value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """A batched value in the shape (num, *shape) of as many single runs; a constant is repeated."""
    if value.numel() == num * shape.numel() and value.shape[:1] == (num,):
        return value.reshape(num, *shape)
    return value.reshape(shape).expand(num, *shape)


def _stacked(parts: list[Draws], join: Callable[[list[Tensor]], Tensor]) -> Draws:
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def _plate_names(site: dict[str, Any]) -> list[str | None]:
    """Name of the plate of each dimension of a site's value."""
    shape = torch.as_tensor(site["value"]).shape
    num_batch = len(shape) if is_deterministic(site) else len(site["fn"].batch_shape)
    names: list[str | None] = [None] * len(shape)
    for index, frame in _vectorised(site, num_batch):
        if 0 <= index < len(shape) and shape[index] == frame.size:
            names[index] = frame.name
    return names


def _vectorised(site: dict[str, Any], num_batch: int) -> Iterator[tuple[int, Any]]:
    return ((num_batch + frame.dim, frame) for frame in site["cond_indep_stack"] if frame.vectorized)
