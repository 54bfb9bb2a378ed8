"""Random Gaussian-mixture potentials for the tests of `ops`."""

import torch

from pyro_sb.ops.mixture import MixturePotential

F64 = {"dtype": torch.float64}


def random_potential(dim, num=4, *, full=False, epsilon=0.7, low=0.3, high=1.8, batch=(), seed=0):
    """Eigenvalues of every S lie in [low, high], both ends are reached; weights do not sum to one."""
    g = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(*batch, num, generator=g, **F64)
    locs = 1.5 * torch.randn(*batch, num, dim, generator=g, **F64)
    values = low + (high - low) * torch.rand(*batch, num, dim, generator=g, **F64)
    values[..., 0, 0], values[..., -1, -1] = low, high
    if not full:
        return MixturePotential(log_weights, locs, values, epsilon)
    axes = torch.linalg.qr(torch.randn(*batch, num, dim, dim, generator=g, **F64)).Q
    scales = axes * values[..., None, :] @ axes.mT
    return MixturePotential(log_weights, locs, 0.5 * (scales + scales.mT), epsilon)


def one_of(potential, index):
    """One potential of a batch."""
    return MixturePotential(*(part[index] for part in potential[:3]), potential.epsilon)
