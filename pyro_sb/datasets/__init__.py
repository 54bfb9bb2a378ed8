"""What tests and benchmarks draw on: the field's laws in the plane, and posteriors with known answers."""

from pyro_sb.datasets.planar import Checkerboard, EightGaussians, Moons, PlanarLaw, SCurve, SwissRoll
from pyro_sb.datasets.posteriors import (
    POSTERIORS,
    PosteriorTask,
    ark,
    eight_schools_centered,
    eight_schools_noncentered,
    kidscore_interaction,
    logearn_interaction,
    low_dim_gauss_mix,
    low_dim_gauss_mix_unordered,
    posterior_task,
)

__all__ = [
    "POSTERIORS",
    "Checkerboard",
    "EightGaussians",
    "Moons",
    "PlanarLaw",
    "PosteriorTask",
    "SCurve",
    "SwissRoll",
    "ark",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "kidscore_interaction",
    "logearn_interaction",
    "low_dim_gauss_mix",
    "low_dim_gauss_mix_unordered",
    "posterior_task",
]
