r"""Runs of a Pyro model on many rows: values :math:`x_i` and log densities :math:`\log p(x_i | \ldots)` of its sites.

A *row* (`Row`) says at which values one run has some of its sites; the others are drawn, or are data. Three routes lead
from one run to many: one run under an outermost plate of rows, which asks that the model's own tensor code broadcasts
from the left; ``torch.func.vmap`` of single runs; and a loop over them, which is always right. The log joint, that of
pairs, a simulator's batches and what `to_arviz` adds to draws are all made here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import site_is_factor
from torch import Tensor
from tqdm.auto import tqdm

from pyro_sb.infer.model.agreement import NATS, ROUNDING, STILL, Runner, disagreement, precision, vmapped
from pyro_sb.infer.model.sites import Site, base_of, is_deterministic, is_sample, plate_nesting
from pyro_sb.threads import Pace

__all__ = ["Found", "ModelRuns", "PlainSampling", "Row", "unknown_site"]

Sites = dict[str, Tensor]
CPU = torch.device("cpu")  # of what only counts rows
MAX_NUMBERS = 2**22  # numbers in the sites of one batch of runs, 32 MB in float64
BLOCK = 256  # runs one by one in a batch
ROWS = "_pyro_sb_runs"  # name of the plate of rows


class Row(NamedTuple):
    """One run: constrained values of some sites; of observed ones a mask of the entries that are there.

    Of many rows every tensor has one more dimension, the first.
    """

    values: Sites
    present: Sites = {}

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Row":
        """``fn`` of every tensor."""
        return Row(*({name: fn(x) for name, x in sites.items()} for sites in self))

    def single(self, i: int) -> "Row":
        """One of many rows."""
        return self.map(lambda x: x[i])

    def part(self, start: int, size: int) -> "Row":
        """Some of many rows."""
        return self.map(lambda x: x[start : start + size])


class Found(NamedTuple):
    r"""Read off many runs: values ``(num, *value)`` and elementwise log densities ``(num, *batch)``, by site.

    Log densities are 0 where masked; scales, which belong to an objective and not to a density, are left out.
    """

    values: Sites
    log_probs: Sites


class AtRow(Messenger):
    """Puts a row's values at their sites; keeps every site, and log densities of those that are scored.

    Args:
        row: The values.
        event_dims: As of `ModelRuns`.
        scored: Names of sites whose log density is kept, without scale. None: of all but deterministic sites, scaled;
            then a latent that the row does not have is an error.
        resample: Draw observed sites that the row does not have, instead of leaving them at the data.
    """

    def __init__(
        self, row: Row, event_dims: dict[str, int], scored: Sequence[str] | None, resample: bool = False
    ) -> None:
        super().__init__()
        self.row, self.event_dims, self.scored, self.resample = row, event_dims, scored, resample
        self.sites: dict[str, Site] = {}
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.row.values:
            msg["value"], msg["is_observed"] = self.row.values[name], True
        elif self.resample and msg["is_observed"] and not is_deterministic(msg):
            msg["value"], msg["is_observed"], msg["done"] = None, False, False
        if name in self.row.present:
            msg["fn"] = PresentEntries(msg["fn"], self.row.present[name], self.event_dims[name])

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            return
        self.sites[name] = msg
        if self.scored is not None and name in self.scored:
            self.log_probs[name] = log_prob_of(msg)
        if self.scored is None and not msg["infer"].get("_deterministic"):
            if not msg["is_observed"] and msg["infer"].get("_enumerate_dim") is None:
                raise unknown_site(name)
            self.log_probs[name] = log_prob_of(msg, scale=msg["scale"])  # now: autograd sums gradients in this order


class PresentEntries:
    """A distribution's log density without the entries that are missing."""

    def __init__(self, fn: Any, present: Tensor, event_dims: int) -> None:
        self.fn, self.present, self.event_dims = fn, present, event_dims

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over events of the entries that are there."""
        base = base_of(self.fn)
        extra = len(base.batch_shape) - len(self.fn.batch_shape)
        present = self.present
        for _ in range(self.event_dims):  # entries of one event are there together
            present = present[..., 0]
        log_prob = base.log_prob(value)
        log_prob = torch.where(present, log_prob, torch.zeros_like(log_prob))
        return log_prob.sum(tuple(range(-extra, 0))) if extra else log_prob


class PlainSampling(Messenger):
    """Draws by ``sample``: ``rsample`` fills an empty tensor with noise, which vmap refuses."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None:
            msg["value"] = msg["fn"].sample()


class Wanted(NamedTuple):
    """Sites whose values, and whose log densities, are read off a run; ``resample`` draws observed sites too."""

    values: Sequence[str]
    log_probs: Sequence[str] = ()
    resample: bool = False


@dataclass
class ModelRuns:
    r"""A Pyro model with its arguments, and the places of its sites' dimensions, as one run has them.

    Attributes:
        model: Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        batch_shapes: Batch shape of each random site, latent or observed.
        shapes: Shape of each site's value, deterministic ones included; no factors.
        log_prob_shapes: Shape of each random site's log density.
        depth: Number of batch dimensions, undeclared ones included: left of them a dimension of rows is free.
        numel: Numbers that one run holds in its sites.
        event_dims: Of observed sites whose entries may be missing: number of event dimensions that ``to_event`` did
            not make.
        returned: From the model's return value to further sites, for a function that returns its observations.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_shapes: dict[str, torch.Size]
    shapes: dict[str, torch.Size]
    log_prob_shapes: dict[str, torch.Size]
    depth: int
    numel: int
    event_dims: dict[str, int] = field(default_factory=dict)
    returned: Callable[[Any], Sites] | None = None
    pace: Pace = field(default_factory=Pace, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        trace: poutine.Trace,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        max_plate_nesting: int | None = None,
    ) -> "ModelRuns":
        """Runs of a model of which one was traced."""
        nodes = {name: site for name, site in trace.nodes.items() if is_sample(site)}
        named = {name: site for name, site in nodes.items() if not site_is_factor(site)}
        random = {name: site for name, site in named.items() if not is_deterministic(site)}
        nesting = plate_nesting(trace) if max_plate_nesting is None else max_plate_nesting
        return cls(
            model=model,
            args=args,
            kwargs=kwargs,
            batch_shapes={name: site["fn"].batch_shape for name, site in random.items()},
            shapes={name: torch.as_tensor(site["value"]).shape for name, site in named.items()},
            log_prob_shapes={name: masked_shape(site) for name, site in random.items()},
            depth=max([nesting, *(len(site["fn"].batch_shape) for site in nodes.values())]),
            numel=sum(torch.as_tensor(site["value"]).numel() for site in nodes.values()),
        )

    @property
    def looks_at(self) -> tuple[Any, ...]:
        """What its runs depend on."""
        return self.model, self.args, self.kwargs

    def run(
        self,
        row: Row,
        scored: Sequence[str] | None,
        *,
        resample: bool = False,
        model: Callable[..., Any] | None = None,
    ) -> tuple[AtRow, Any]:
        """Sites of one run, and the model's return value; refuses a run without a site that the row has."""
        with AtRow(row, self.event_dims, scored, resample) as at:
            result = (model or self.model)(*self.args, **self.kwargs)
        missing = sorted(row.values.keys() - at.sites.keys())
        if missing:
            raise ValueError(
                f"The model must have the same latent sites at every run, got one without {missing}. Sample them "
                "always and ignore them where they are not used."
            )
        return at, result

    def terms(self, row: Row, model: Callable[..., Any] | None = None) -> list[Tensor]:
        """Log densities of all sites, scaled and masked; refuses latents that the row does not have."""
        at, _ = self.run(row, None, model=model)
        return list(at.log_probs.values())

    def read(self, row: Row, wanted: Wanted) -> Found:
        """Values and log densities of one run; sites that the row does not have are drawn, or are data."""
        at, result = self.run(row, wanted.log_probs, resample=wanted.resample)
        found = {n: torch.as_tensor(at.sites[n]["value"]).detach() for n in wanted.values if n in at.sites}
        if self.returned is not None and not set(wanted.values) <= found.keys():  # else they are deterministic sites
            found |= self.returned(result)
        return Found(found, {name: at.log_probs[name] for name in wanted.log_probs})

    def widened(self, rows: Row) -> Row:
        """``(C, *batch, *event)`` with the rows left of all plates: ``(C, 1, ..., 1, *batch, *event)``."""
        gaps = {name: (1,) * (self.depth - len(batch)) for name, batch in self.batch_shapes.items()}
        widen = (
            {name: x.reshape(x.shape[:1] + gaps[name] + x.shape[1:]) for name, x in sites.items()} for sites in rows
        )
        return Row(*widen)

    def by_row(self, term: Tensor) -> Tensor:
        """Sum of all dimensions but the rows', the leftmost; a term without it is one constant for every row."""
        if term.dim() <= self.depth:
            return term.sum()
        rest = tuple(range(1, term.dim()))
        return term.sum(rest) if rest else term

    def at(self, rows: Row, num: int, wanted: Wanted, **how: Any) -> Found:
        """Runs of ``num`` rows; ``how`` as in `batches`."""
        return joined(list(self.batches(rows, num, wanted, **how)))

    def batches(
        self,
        rows: Row,
        num: int,
        wanted: Wanted,
        *,
        routes: Sequence[str] = ("plate", "vmap", "loop"),
        checked: Sequence[str] = ("plate", "vmap"),
        progress: bool = False,
    ) -> Iterator[Found]:
        r"""Runs of ``num`` rows, in batches that fit in memory, by the first route that serves.

        Args:
            rows: Values of some sites, none of them if it is empty. Each of shape ``(num, *site)``.
            num: Number of runs.
            wanted: What is read.
            routes: Fastest first, the loop last.
            checked: Routes whose first batch of any size is compared: three rows by single runs with every site at that
                row's value, and one among other rows. Vmap may go unchecked: its rows are independent by construction.
            progress: Show a bar where rows are run one by one.
        """
        runner, done = Runner(routes, pace=self.pace), 0
        while runner.route != "loop" and done < num:
            size = min(self._batch_size(), num - done)
            found = self._attempt(runner, rows.part(done, size), size, wanted, checked)
            if found is not None:
                yield found
                done += size
        with tqdm(total=num, initial=done, desc="Run one by one", disable=not progress or done >= num) as bar:
            while done < num:
                size = min(BLOCK, num - done)
                with self.pace.call(size, kind="loop"):
                    found = self._loop(rows.part(done, size), size, wanted, bar.update)
                yield found
                done += size

    def _batch_size(self) -> int:
        """Rows of a batch: bounded in memory, and equal to no size of the model, which could broadcast in silence."""
        rows = max(1, MAX_NUMBERS // max(1, self.numel))
        sizes = {size for shape in self.shapes.values() for size in (*shape, shape.numel())}
        return next(n for n in range(rows, rows + len(sizes) + 2) if n not in sizes)

    def _attempt(self, runner: Runner, rows: Row, num: int, wanted: Wanted, checked: Sequence[str]) -> Found | None:
        """A batch by the route in use; None where it was dropped."""
        everything = Wanted(list(self.shapes), list(self.batch_shapes), wanted.resample)

        def run(route: str, rows: Row, wanted: Wanted) -> Found:
            with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
                return self._plate(rows, num, wanted) if route == "plate" else self._vmap(rows, num, wanted)

        def objection(route: str, found: Found) -> str | None:
            return self._objection(partial(run, route), found, num, rows.present) if route in checked else None

        def ask(route: str) -> Found:
            return run(route, rows, everything if route in checked else wanted)

        found = runner.attempt(ask, num, objection)
        return found and Found(pick(found.values, wanted.values), pick(found.log_probs, wanted.log_probs))

    def _objection(self, run: Callable[[Row, Wanted], Found], found: Found, num: int, present: Sites) -> str | None:
        """What speaks against a batch: its first, middle and last row by single runs, the last among strangers too."""
        wanted = Wanted(list(found.values), list(found.log_probs), resample=True)
        placed = Row({name: found.values[name] for name in self.batch_shapes}, present)
        rows = sorted({0, num // 2, num - 1})
        with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
            known = joined([self.read(placed.single(i), wanted) for i in rows], torch.stack)
        alike = placed.map(lambda x: x[-1:].expand(x.shape).contiguous())
        strangers = figures(run(alike, wanted)) if num > 1 else None
        amounts = {name: largest(x) for name, x in figures(known).items()}
        eps = {name: precision(x.dtype) for name, x in figures(known).items()}
        allowed = {name: eps[name] ** 0.5 * x for name, x in amounts.items()} | {
            name: NATS + ROUNDING * eps[name] * amounts[name] for name in figures(Found({}, known.log_probs))
        }
        still = {name: STILL * eps[name] * x for name, x in amounts.items()}
        return disagreement(figures(found), figures(known), rows, strangers, allowed, still)

    def _plate(self, rows: Row, num: int, wanted: Wanted) -> Found:
        with pyro.plate(ROWS, num, dim=-self.depth - 1):
            found = self.read(self.widened(rows), wanted)
        return Found(
            *(
                {name: fitted(x, num, shapes[name]) for name, x in sites.items()}
                for sites, shapes in zip(found, (self.shapes, self.log_prob_shapes))
            )
        )

    def _vmap(self, rows: Row, num: int, wanted: Wanted) -> Found:
        with PlainSampling():
            found: Found = vmapped(
                lambda _, row: self.read(row, wanted), torch.zeros(num, device=CPU), rows, randomness="different"
            )
        return found

    def _loop(self, rows: Row, num: int, wanted: Wanted, tick: Callable[[], Any] = lambda: None) -> Found:
        found = []
        with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
            for i in range(num):
                found.append(self.read(rows.single(i), wanted))
                tick()
        return joined(found, torch.stack)


def figures(found: Found) -> Sites:
    """All that was read, under names that say what it is."""
    log_probs = {f"log densities of {name!r}": x for name, x in found.log_probs.items()}
    return {f"values of {name!r}": x for name, x in found.values.items()} | log_probs


def largest(figure: Tensor) -> Tensor:
    """The largest size of an entry, of those that are finite."""
    finite = figure.double().nan_to_num(0.0, 0.0, 0.0).abs()
    return finite.amax() if finite.numel() else finite.sum()


def log_prob_of(site: Site, scale: Any = 1.0) -> Tensor:
    """Elementwise log density of a site, 0 where masked."""
    if site["mask"] is False:
        return site["value"].new_zeros(())
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, scale, site["mask"])


def masked_shape(site: Site) -> torch.Size:
    """Shape of a site's log density: a mask may be larger than its distribution."""
    mask = site["mask"]
    return torch.broadcast_shapes(site["fn"].batch_shape, mask.shape if isinstance(mask, Tensor) else ())


def unknown_site(name: str) -> ValueError:
    """The error of a latent that the first run did not have."""
    return ValueError(
        f"The model must have the same latent sites at every run, got a new one, {name!r}. Sample it always and ignore "
        "it where it is not used."
    )


def pick(sites: Sites, names: Iterable[str]) -> Sites:
    """Some of the sites."""
    return {name: sites[name] for name in names}


def joined(parts: list[Found], join: Callable[[list[Tensor]], Tensor] = torch.cat) -> Found:
    """One batch of several."""
    return Found(*({name: join([part[name] for part in column]) for name in column[0]} for column in zip(*parts)))


def fitted(value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """A batched value in the shape ``(num, *shape)`` of as many single runs; a constant is repeated."""
    if value.numel() == num * shape.numel() and value.shape[:1] == (num,):
        return value.reshape(num, *shape)
    return value.reshape(shape).expand(num, *shape)
