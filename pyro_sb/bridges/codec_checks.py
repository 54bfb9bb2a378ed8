"""Whether a codec fits rows: shapes that meet, finite values, a bijection that is one."""

import torch
from torch import Tensor

from pyro_sb.bridges.codecs import Codec

ROUND_TRIP = 1e-3  # largest error of a bijection's round trip, in standard deviations of each column
LOG_DET = 0.01  # largest error of a bijection's log determinant, at NUM_CHECKED latents of up to LARGEST_JACOBIAN axes
NUM_CHECKED, LARGEST_JACOBIAN = 4, 50


@torch.no_grad()
def check_pair(codec: Codec, rows: Tensor, name: str = "rows") -> Tensor:
    """Latents of the rows; refused where shapes do not meet, a value is not finite, or a bijection is not one."""
    z = codec.encode(rows)
    back = codec.decode(z)
    shapes = f"encode made {tuple(z.shape)} of {tuple(rows.shape)}, decode made {tuple(back.shape)} of that"
    if z.shape != (len(rows), codec.latent_dim) or back.shape != rows.shape:
        raise ValueError(
            f"encode and decode must lead from (n, {codec.data_dim}) to (n, {codec.latent_dim}) and back: {shapes}."
        )
    bad = int((~torch.isfinite(z)).any(1).logical_or((~torch.isfinite(back)).any(1)).sum())
    if bad:
        raise ValueError(
            f"latents and reconstructions must be finite, got NaN or infinity in {bad} of {len(rows)} {name}. "
            "Fit the codec on data of this range, or rescale them."
        )
    if codec.bijective and len(rows) > 1:
        _check_bijection(codec, rows, z, back)
    return z


def _check_bijection(codec: Codec, rows: Tensor, z: Tensor, back: Tensor) -> None:
    """Each column must come back in units of its own deviation, and the log determinant be that of ``decode``."""
    scale = rows.std(0)
    constant = scale <= 10 * torch.finfo(rows.dtype).eps * rows.abs().amax(0)
    scale = torch.where(constant, scale.mean().clamp(min=torch.finfo(rows.dtype).tiny), scale)
    errors = (back - rows).square().mean(0).sqrt() / scale
    if float(errors.max()) > ROUND_TRIP:
        raise ValueError(
            f"a bijective codec must give its data back, got a root mean square error of {float(errors.max()):.2g} "
            f"standard deviations of column {int(errors.argmax())}. Write bijective=False, or mend the pair."
        )
    some = z[:NUM_CHECKED]
    said, true = codec.log_abs_det(some), _log_abs_det(codec, some)
    if true is None:
        return
    worst = int((said - true).abs().nan_to_num(torch.inf).argmax())
    if not bool((said - true).abs()[worst] <= LOG_DET):
        raise ValueError(
            f"log_abs_det must be log |dx / dz| of decode, at latents, got {float(said[worst]):.4g} where the Jacobian "
            f"of decode has {float(true[worst]):.4g}. That of encode has the other sign."
        )


def _log_abs_det(codec: Codec, z: Tensor) -> Tensor | None:
    """From the Jacobian of ``decode``; None where that is large, or autograd does not see it."""
    if z.shape[1] > LARGEST_JACOBIAN:
        return None
    try:
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(lambda y: codec.decode(y).sum(0), z, strict=True)
    except (RuntimeError, ValueError):  # functions of other libraries
        return None
    return torch.linalg.slogdet(jacobian.detach().transpose(0, 1).double()).logabsdet.to(z)
