r"""The log joint with another observation in every row: :math:`\log p(z_c, y_c)` for rows of pairs."""

from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sb.infer.amortized.simulator import Simulations, Simulator
from pyro_sb.infer.model.joint import CheckedDensity, find_oracle, with_twins
from pyro_sb.infer.model.log_joint import Evaluations
from pyro_sb.infer.model.prototype import Packing
from pyro_sb.infer.model.routes import (
    Loop,
    Plate,
    SingleRow,
    Vmap,
    as_density,
    constrain,
    doubled,
    in_double,
    in_float64,
)
from pyro_sb.infer.model.runs import Row
from pyro_sb.stages import working

__all__ = ["BatchJoint", "ObservedJoint", "PairedJoint", "paired_joint"]

Sites = dict[str, Tensor]
MAX_ROWS = 16384


class PairedJoint:
    r"""Batched log density of pairs, and its gradient in the latents.

    .. math:: \log p(z, y) = \log p(x(z), y) + \log |\partial x / \partial z|

    Entries of an observation may be missing: they are integrated out, which is exact where they are independent of the
    others given the latents: along batch dimensions, and along events made by ``to_event``.

    Args:
        simulator: The model.
        pairs: Some of its simulations, where the routes are compared.
        masked: Whether entries may be missing. Rows of y then have ``2 data_dim`` columns, the last ones 1 where the
            entry is there and 0 where it is not.
    """

    def __init__(self, simulator: Simulator, pairs: Simulations, masked: bool = False) -> None:
        self.data, self.dim, self.masked = simulator.data, simulator.dim, masked
        starts = torch.cat([pairs.latents, pairs.observations.to(pairs.latents)], -1)
        if masked:
            starts = torch.cat([starts, starts.new_ones(len(starts), self.data.dim)], -1)
        routes = pair_routes(simulator, masked)
        with pyro.validation_enabled(False):
            oracle = find_oracle(routes[-1].density, iter(starts.unbind()), random=True)
        if oracle is None:
            raise ValueError(
                f"the log joint and its gradient must be finite at some simulated pair, got none in {len(starts)}. The "
                "observed sites' log_prob does not fit their sample: correct it, or do without corrections."
            )
        oracle = with_twins(oracle, lambda: pair_routes(doubled_simulator(simulator), masked))
        self._density = CheckedDensity(routes, oracle)

    @property
    def route(self) -> str:
        """Route by which a batch is evaluated: ``"plate"``, ``"vmap"`` or ``"loop"``."""
        return self._density.route

    @property
    def threads(self) -> str:
        """Threads of an evaluation, chosen by its wall time (`pyro_sb.threads`)."""
        return self._density.runner.pace.describe()

    def value_and_grad(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and gradients ``(C, dim)``; not finite becomes ``-inf`` and zero."""
        value, grad = self._rows(z, y, gradient=True)
        return value, torch.where(torch.isfinite(grad) & torch.isfinite(value)[:, None], grad, 0.0)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Values ``(C,)`` without a graph."""
        return self._rows(z, y, gradient=False)[0]

    def recheck(self, z: Tensor, y: Tensor) -> str | None:
        """What speaks against the route at these rows, as `LogJoint.recheck` says it."""
        return self._density.recheck(torch.cat([z.detach(), y.to(z)], -1))

    def _rows(self, z: Tensor, y: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        working()
        joined = torch.cat([z.detach(), y.to(z)], -1)
        parts = [self._density(part, gradient=gradient) for part in joined.split(MAX_ROWS)]
        value, grad = (torch.cat(column) for column in zip(*parts, strict=True))
        return as_density(value).to(z), grad[:, : self.dim].to(z)


class ObservedJoint:
    """The log joint of ``(C, dim)`` rows whose observations are fixed, one a row: what a move asks of a target."""

    def __init__(self, pairs: PairedJoint, observations: Tensor) -> None:
        self.pairs, self.observations, self.dim = pairs, observations, pairs.dim

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and gradients ``(C, dim)``."""
        return self.pairs.value_and_grad(z, self._rows(z))

    def log_prob(self, z: Tensor) -> Tensor:
        """Values ``(C,)``."""
        return self.pairs.log_prob(z, self._rows(z))

    def recheck(self, z: Tensor) -> str | None:
        """What speaks against the route at these rows."""
        return self.pairs.recheck(z, self._rows(z))

    def _rows(self, z: Tensor) -> Tensor:
        """The observations, repeated along leading blocks of rows."""
        return self.observations.repeat(len(z) // len(self.observations), 1)


def paired_joint(simulator: Simulator, pairs: Simulations, masked: bool = False) -> PairedJoint:
    """The log joint of a simulator's pairs, or an error that says why there is none."""
    if simulator.returned:
        raise NotImplementedError(
            f"corrections need the density of {list(simulator.observed)}, got a black-box simulator that returns its "
            "observations. Use sample(); or write the last step as a pyro.sample site."
        )
    if simulator.hidden:
        raise NotImplementedError(
            f"corrections need a log joint, got discrete latents {list(simulator.hidden)} that cannot be summed out. "
            "Use sample(), or give them a finite support."
        )
    if simulator.prototype.enumerated:
        raise NotImplementedError(
            f"the log joint of many observations has no sums over discrete sites, got "
            f"{list(simulator.prototype.enumerated)}. Condition on one observation at a time."
        )
    return PairedJoint(simulator, pairs, masked)


def pair_routes(simulator: Simulator, masked: bool) -> list[Any]:
    """Routes to the log density of packed pairs."""
    unpack = partial(unpack_pairs, simulator, masked)
    single = SingleRow(simulator.runs, unpack)
    return [Plate(simulator.runs, unpack), Vmap(single), Loop(single)]


def doubled_simulator(simulator: Simulator) -> Simulator:
    """The same model in float64."""
    runs = replace(simulator.runs, args=doubled(simulator.args), kwargs=doubled(simulator.kwargs))
    return replace(simulator, runs=runs, prototype=in_float64(simulator.prototype), data=in_double(simulator.data))


def unpack_pairs(simulator: Simulator, masked: bool, pairs: Tensor) -> tuple[Row, Tensor]:
    """Rows of vectors of latents, observation and, where entries may be missing, which are there; log Jacobian."""
    data, dim = simulator.data, simulator.dim
    z, *rest = pairs.split([dim] + [data.dim] * (2 if masked else 1), -1)
    row, log_det = constrain(simulator.prototype, z)
    present = {} if not masked else {name: x > 0.5 for name, x in data.unpack(rest[1]).items()}
    return Row(row.values | data.unpack(rest[0]), present), log_det


def refuse_split_events(simulator: Simulator, present: Tensor) -> None:
    """Entries of one event that are missing alone cannot be integrated out. ``present``: ``(*, data_dim)``, bool."""
    for name, mask in simulator.data.unpack(present.to(torch.get_default_dtype())).items():
        dims = simulator.event_dims[name]
        share = mask.float().mean(tuple(range(-dims, 0))) if dims else mask.float()
        if bool(((share > 0) & (share < 1)).any()):
            raise NotImplementedError(
                f"missing entries of {name!r} must be independent of the others given the latents, got part of an "
                "event of a joint distribution. Use sample(), write the site with to_event, or leave out whole events."
            )


class BatchJoint:
    r"""Log joint of B posteriors side by side, :math:`\sum_b \log p(z_b, y_b)`, as `MCMC` and its record ask for it.

    A row is one chain at one observation. Sites have the shape ``(B, *site)``, or ``(*site)`` for a single observation
    that misses entries.

    Attributes:
        evaluations: Rows asked for so far.
    """

    route = "paired"
    model: Any = None
    deterministic_sites: tuple[str, ...] = ()

    def __init__(self, pairs: PairedJoint, observations: Tensor, simulator: Simulator, batch: torch.Size) -> None:
        self.rows = ObservedJoint(pairs, observations)
        self.num_observations, self.dim = len(observations), pairs.dim
        self.single = simulator.prototype.packing
        self.transforms = simulator.prototype.transforms
        shapes = {name: batch + shape for name, shape in self.single.shapes.items()}
        self.packing = Packing(shapes, self.single.dtypes, self.single.device)
        self.batch, self.evaluations = batch, Evaluations()
        self.dtype, self.device = self.single.dtype, self.single.device

    @property
    def threads(self) -> str:
        """Threads of an evaluation, chosen by its wall time (`pyro_sb.threads`)."""
        return self.rows.pairs.threads

    @property
    def site_shapes(self) -> dict[str, torch.Size]:
        """Unconstrained shape of each site."""
        return self.packing.shapes

    def log_prob(self, z: Tensor) -> Tensor:
        """Rows ``(C * B, dim)``, observations fastest, to ``(C * B,)``."""
        self.evaluations.density += len(z)
        return self.rows.log_prob(z.to(self.dtype)).to(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The same with gradients."""
        self.evaluations.gradient += len(z)
        value, grad = self.rows.value_and_grad(z.to(self.dtype))
        return value.to(z), grad.to(z)

    def recheck(self, z: Tensor) -> str | None:
        """What speaks against the route where the chains stand, as `LogJoint.recheck` says it."""
        return self.rows.recheck(z.to(self.dtype))

    def unpack_rows(self, z: Tensor) -> Sites:
        """``(*lead, B, dim)`` to unconstrained sites ``(*lead, *batch, *site)``."""
        return self.single.unpack(z if self.batch else z[..., 0, :])

    def pack_rows(self, sites: Sites) -> Tensor:
        """Unconstrained sites ``(*lead, *batch, *site)`` to ``(*lead, B, dim)``."""
        z = self.single.pack(sites)
        return z if self.batch else z[..., None, :]

    def pack(self, sites: Sites) -> Tensor:
        """The whole state in one vector, for the record."""
        return self.packing.pack(sites)

    def start(self, num: int) -> Tensor:
        """Any vectors, for the names of deterministic sites: there are none."""
        return torch.zeros(num, self.packing.dim, dtype=self.dtype, device=self.packing.device)

    def deterministic(self, z: Tensor) -> Sites:
        """None: a batch of observations has no replay of the model."""
        return {}

    def discrete(self, z: Tensor) -> Sites:
        """None."""
        return {}
