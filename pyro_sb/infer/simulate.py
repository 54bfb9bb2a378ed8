"""From a Pyro model to joint draws of its latents and its observations."""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_sb.infer.packing import Packing
from pyro_sb.infer.prototype import Prototype
from pyro_sb.infer.replay import PlainSampling, Record

__all__ = ["Simulations", "Simulator", "returned_sites"]

logger = logging.getLogger(__name__)
Sites = dict[str, Tensor]
BLOCK = 256  # runs one by one that Ctrl-C may lose
MAX_NUMBERS = 2**22  # numbers in the sites of one batch of runs


class Simulations(NamedTuple):
    """Joint draws: unconstrained latents ``(N, dim)``, observations ``(N, data_dim)``, packed by the `Simulator`."""

    latents: Tensor
    observations: Tensor


@dataclass
class Simulator:
    r"""A model as a giver of pairs: latents of the prior, and observations of the model given them.

    Attributes:
        model: Pyro model, or a function with ``pyro.sample`` prior sites that returns its observations.
        observed: Names of the observed sites.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        prototype: What one run told of the latents, with the observations held at one simulation.
        data: Layout of the observations in one vector.
        batch_shapes: Batch shape of each observed site.
        event_dims: Number of event dimensions of each observed site that ``to_event`` did not make.
        constrained_shapes: Shape of each continuous latent in its own space.
        returned: Whether the observations are the function's return value, so that they have no density.
        hidden: Discrete latents that cannot be summed out: they are simulated, and leave the log joint unknown.
        plated: Whether one outer plate simulates many runs at once.
        interrupted: What was simulated when Ctrl-C came.
    """

    model: Callable[..., Any]
    observed: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prototype: Prototype
    data: Packing
    batch_shapes: dict[str, torch.Size]
    event_dims: dict[str, int]
    constrained_shapes: dict[str, torch.Size]
    returned: bool
    hidden: tuple[str, ...] = ()
    plated: bool = False
    interrupted: Simulations | None = None

    @property
    def dim(self) -> int:
        """Length of the unconstrained latent vector."""
        return self.prototype.packing.dim

    def conditioned(self, values: Sites) -> Callable[..., Any]:
        """The model with its observed sites at given values."""
        return poutine.condition(self.model, data=values)

    def simulate(self, num: int, *, keep_finite: bool = False, progress: bool = False) -> Simulations:
        r"""Independent draws of the joint law.

        Args:
            num: How many, at least 1.
            keep_finite: Leave out simulations that are not finite. Otherwise they are an error.
            progress: Show a bar where the model runs draw after draw.

        Returns:
            Latents and observations; fewer rows than ``num`` if some were left out.

        Raises:
            ValueError: ``num`` < 1, or simulations that are not finite: how many, and in which sites.
        """
        if num < 1:
            raise ValueError(f"num_simulations must be at least 1, got {num}. Write 10_000.")
        parts: list[Simulations] = []
        try:
            with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
                for sites in self._runs(num, progress):
                    parts.append(self._pairs(sites))
        except KeyboardInterrupt:
            if parts:
                self.interrupted = self.finite(joined(parts), True)
            raise
        return self.finite(joined(parts), keep_finite)

    def singles(self, num: int) -> Simulations:
        """Pairs of so many runs one by one."""
        return joined([self._pairs({name: x[None] for name, x in self._one().items()}) for _ in range(num)])

    @property
    def depth(self) -> int:
        """Batch dimensions of the model, left of which a dimension for runs is free."""
        return max(self.prototype.depth, *map(len, self.batch_shapes.values()))

    @property
    def has_density(self) -> bool:
        """Whether the log joint of latents and observations can be evaluated."""
        return not (self.returned or self.hidden or self.prototype.enumerated)

    def _pairs(self, sites: Sites) -> Simulations:
        transforms = self.prototype.transforms
        latents = self.prototype.packing.pack({name: t(sites[name]) for name, t in transforms.items()})
        return Simulations(latents, self.data.pack({name: sites[name] for name in self.data.shapes}))

    def _runs(self, num: int, progress: bool) -> Iterator[Sites]:
        """Sites of ``num`` runs in batches: in one plate or under vmap where that works, else one by one."""
        done = 0
        for route in self._batched:
            while done < num:
                size = min(self._most_rows(), num - done)
                try:
                    yield route(size)
                except Exception as error:  # something in the user's model that the route does not know
                    logger.info("the model is not simulated by %s: %s: %s", route.__name__, type(error).__name__, error)
                    break
                done += size
        bar = tqdm(total=num, initial=done, desc="Simulate one by one", disable=not progress or done >= num)
        with bar:
            while done < num:
                singles = []
                for _ in range(min(BLOCK, num - done)):
                    singles.append(self._one())
                    bar.update()
                yield {name: torch.stack([single[name] for single in singles]) for name in singles[0]}
                done += len(singles)

    @property
    def _batched(self) -> list[Callable[[int], Sites]]:
        """Ways of running many at once. A plain function's noise may come from outside torch: none."""
        if self.returned:
            return []
        return [self._plate, self._vmap] if self.plated else [self._vmap]

    def _most_rows(self) -> int:
        """Rows of a batch: bounded in memory, and equal to no size of the model, which could broadcast in silence."""
        rows = max(1, MAX_NUMBERS // max(1, self.prototype.numel))
        shapes = [*self.prototype.packing.shapes.values(), *self.data.shapes.values()]
        sizes = {size for shape in shapes for size in shape} | {self.prototype.packing.dim, self.data.dim}
        return next(n for n in range(rows, rows + len(sizes) + 2) if n not in sizes)

    def _plate(self, size: int) -> Sites:
        """Runs in one plate, outermost."""
        wanted = [*self.prototype.transforms, *self.data.shapes]
        with Record({}, wanted) as messenger, pyro.plate("_pyro_sb_runs", size, dim=-self.depth - 1):
            self.model(*self.args, **self.kwargs)
        shapes = self.constrained_shapes | dict(self.data.shapes)
        return {name: value.detach().reshape(size, *shapes[name]) for name, value in messenger.found.items()}

    def _vmap(self, size: int) -> Sites:
        with PlainSampling(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop", UserWarning
            )  # torch, of what it cannot batch
            return torch.func.vmap(lambda _: self._one(), randomness="different")(torch.zeros(size))

    def _one(self) -> Sites:
        """Latent and observed sites of one run."""
        wanted = [*self.prototype.transforms, *self.data.shapes]
        with Record({}, wanted) as messenger:
            result = self.model(*self.args, **self.kwargs)
        found = {name: value.detach() for name, value in messenger.found.items()}
        if self.returned and not set(self.observed) <= found.keys():  # else they are deterministic sites
            found |= self._checked(returned_sites(result, self.observed))
        return found

    def _checked(self, sites: Sites) -> Sites:
        for name, shape in self.data.shapes.items():
            if sites[name].shape != shape:
                raise ValueError(
                    f"observed {name!r} must have one shape at every run, got {tuple(shape)} and "
                    f"{tuple(sites[name].shape)}. Return as many numbers each time; pad and mask them."
                )
        return sites

    def finite(self, pairs: Simulations, keep: bool) -> Simulations:
        """Pairs that are finite, where ``keep`` says to leave the others out; else an error where any is not."""
        good = torch.isfinite(pairs.latents).all(-1) & torch.isfinite(pairs.observations).all(-1)
        if bool(good.all()):
            return pairs
        bad: dict[str, int] = {}
        for packing, rows in ((self.prototype.packing, pairs.latents), (self.data, pairs.observations)):
            for name, value in packing.unpack(rows).items():
                count = int((~torch.isfinite(value)).reshape(len(rows), -1).any(-1).sum())
                if count:
                    bad[name] = count
        num = int((~good).sum())
        if not keep:
            raise ValueError(
                f"simulations must be finite, got NaN or infinity in {num} of {len(good)}, by site {bad}. Mend the "
                "model, or write keep_finite=True to learn from the others: the posterior is then that given a finite "
                "simulation."
            )
        logger.warning("%d of %d simulations are not finite (by site %s) and were left out.", num, len(good), bad)
        return Simulations(pairs.latents[good], pairs.observations[good])


def joined(parts: list[Simulations]) -> Simulations:
    """Pairs of several batches."""
    return Simulations(*(torch.cat(column) for column in zip(*parts, strict=True)))


def returned_sites(result: Any, observed: tuple[str, ...]) -> Sites:
    """A function's return value by name: a dict, or the one observation."""
    if isinstance(result, dict):
        return {name: torch.as_tensor(result[name]).detach() for name in observed}
    return {observed[0]: torch.as_tensor(result).detach()}
