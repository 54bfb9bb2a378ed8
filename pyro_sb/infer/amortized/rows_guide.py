"""Guide of the local latents of a plate, :math:`q(z_i | y_i)` for each row: amortised variational inference."""

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.infer.amortized.latent_law import GuideLaw, LatentLaw
from pyro_sb.infer.model.prototype import Packing

__all__ = ["RowsGuide"]


class RowsGuide(AutoGuide):
    """A draw of all rows' latents in a plate, by a conditional law that stays as it is.

    Inside an ``AutoGuideList`` the plate is the list's; alone it makes its own.

    Args:
        law: Of the packed latents at each row's observation.
        packing: Layout of one row's latents.
        transforms: From each latent's support to the reals.
        plate: Name of the plate in the larger model.
        num_rows: Its size.
        dim: Its dimension, negative.
    """

    def __init__(
        self,
        law: LatentLaw,
        packing: Packing,
        transforms: dict[str, Transform],
        plate: str,
        num_rows: int,
        dim: int,
    ) -> None:
        super().__init__(None)
        self._row = law, packing, transforms
        self.plate, self.num_rows, self.dim = plate, num_rows, dim

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Latents of every row, ``{site: (num_rows, *site)}``."""
        law, packing, transforms = self._row
        plates = self._create_plates(*args, **kwargs)
        if self.plate not in plates:
            plates = {self.plate: pyro.plate(self.plate, self.num_rows, dim=self.dim)}
        with plates[self.plate]:
            name = f"_{self.plate}_latent"
            u = pyro.sample(name, GuideLaw(law, self.num_rows), infer={"is_auxiliary": True})
            free = packing.unpack(u)
            return {site: _point_mass(site, transform, free[site]) for site, transform in transforms.items()}


def _point_mass(name: str, transform: Transform, free: Tensor) -> Tensor:
    """A latent of every row, with the Jacobian's density."""
    value = transform.inv(free)
    density = transform.log_abs_det_jacobian(value, free).reshape(len(value), -1).sum(-1)
    site: Tensor = pyro.sample(name, dist.Delta(value, log_density=density, event_dim=value.dim() - 1))
    return site
