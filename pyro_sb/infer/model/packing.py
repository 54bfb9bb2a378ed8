"""The flat vector of a model's unconstrained latents: named tensors to one vector and back."""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    r"""Layout of named tensors in one vector of ``dim`` numbers, sorted by name.

    Args:
        shapes: Shape of each site, one chain, without batch dimensions.
        dtypes: Dtype of each site; the vector has the widest of them.
        device: Where the sites live.

    Example:
        >>> packing = Packing.like({"b": torch.zeros(2), "a": torch.ones(())})
        >>> packing.pack({"b": torch.zeros(5, 2), "a": torch.ones(5)}).shape
        torch.Size([5, 3])
        >>> {name: tuple(value.shape) for name, value in packing.unpack(torch.zeros(5, 3)).items()}
        {'a': (5,), 'b': (5, 2)}
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    device: torch.device

    @classmethod
    def like(cls, sites: dict[str, Tensor]) -> "Packing":
        """The layout of one chain's tensors."""
        sites = dict(sorted(sites.items()))
        device = next(iter(sites.values())).device if sites else torch.device("cpu")
        return cls({k: v.shape for k, v in sites.items()}, {k: v.dtype for k, v in sites.items()}, device)

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vector: the widest of the sites', the default's if there are none."""
        return reduce(torch.promote_types, self.dtypes.values()) if self.dtypes else torch.get_default_dtype()

    def pack(self, sites: dict[str, Tensor]) -> Tensor:
        r"""One vector from named tensors, leading batch dimensions kept.

        Args:
            sites: Tensor of shape ``(*batch, *shape)`` for each site, the same ``batch`` for all.

        Returns:
            Shape ``(*batch, dim)``.

        Raises:
            ValueError: If a site is missing, unknown, or its shape does not end in the site's shape.
        """
        if sites.keys() != self.shapes.keys():
            raise ValueError(
                f"params must hold exactly the sites {list(self.shapes)}, got {sorted(sites)}. Add those that are "
                "missing, leave the others out."
            )
        batch = self.batch_shape(sites)
        columns = [torch.as_tensor(sites[name]).reshape(*batch, -1) for name in self.shapes]
        return torch.cat([column.to(self.device, self.dtype) for column in columns], -1)

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``(*batch, dim)`` to named tensors of shape ``(*batch, *shape)``, each in its site's dtype."""
        if z.shape[-1:] != (self.dim,):
            raise ValueError(
                f"z must have {self.dim} numbers in its last dimension, got shape {tuple(z.shape)}. Use pack()."
            )
        columns = z.split([shape.numel() for shape in self.shapes.values()], -1) if self.shapes else ()
        batch = z.shape[:-1]
        return {
            name: column.reshape(batch + self.shapes[name]).to(self.dtypes[name])
            for name, column in zip(self.shapes, columns, strict=True)
        }

    def batch_shape(self, sites: dict[str, Tensor]) -> torch.Size:
        """The leading dimensions that all sites share, ``()`` for one chain."""
        if not self.shapes:
            raise ValueError("The model must have a continuous latent site for a vector of latents, got none.")
        batches = set()
        for name, shape in self.shapes.items():
            found = torch.as_tensor(sites[name]).shape
            split = len(found) - len(shape)
            if split < 0 or found[split:] != shape:
                raise ValueError(
                    f"Site {name!r} must have shape (*batch, {', '.join(map(str, shape))}), got {tuple(found)}. "
                    "Values are unconstrained, with chains first."
                )
            batches.add(found[:split])
        if len(batches) != 1:
            raise ValueError(
                f"All sites must share their leading dimensions, got {sorted(map(tuple, batches))}. Expand them."
            )
        return batches.pop()
