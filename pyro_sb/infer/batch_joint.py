"""The log joint of a batch of observations at once: a product of posteriors, the batch a dimension of each site."""

from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.joint import Evaluations
from pyro_sb.infer.packing import Packing
from pyro_sb.infer.paired import ObservedJoint, PairedJoint
from pyro_sb.infer.simulate import Simulator

__all__ = ["BatchJoint"]

Sites = dict[str, Tensor]


class BatchJoint:
    r"""What `MCMC` and its record ask of a log joint, for B posteriors side by side.

    A row is one chain at one observation. Sites have the shape ``(B, *site)``, or ``(*site)`` for a single observation
    that misses entries.

    Attributes:
        evaluations: Rows asked for so far.
    """

    route = "paired"
    model: Any = None

    def __init__(self, pairs: PairedJoint, observations: Tensor, simulator: Simulator, batch: torch.Size) -> None:
        self.rows = ObservedJoint(pairs, observations)
        self.num_observations, self.dim = len(observations), pairs.dim
        self.single = simulator.prototype.packing
        self.transforms = simulator.prototype.transforms
        shapes = {name: batch + shape for name, shape in self.single.shapes.items()}
        self.packing = Packing(shapes, self.single.dtypes, self.single.device)
        self.batch, self.evaluations = batch, Evaluations()
        self.dtype = self.single.dtype

    @property
    def site_shapes(self) -> dict[str, torch.Size]:
        """Unconstrained shape of each site."""
        return self.packing.shapes

    def log_prob(self, z: Tensor) -> Tensor:
        """Rows ``(C * B, dim)``, observations fastest, to ``(C * B,)``."""
        self.evaluations.density += len(z)
        return self.rows.log_prob(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The same with gradients."""
        self.evaluations.gradient += len(z)
        return self.rows.value_and_grad(z)

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
