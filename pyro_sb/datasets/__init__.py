"""The field's laws in the plane, posteriors with known answers, and simulators: for tests, tutorials and benchmarks."""

from pyro_sb.datasets.exact import exact_task
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
from pyro_sb.datasets.simulators import (
    SBI_TASKS,
    SBITask,
    bernoulli_glm,
    gaussian_linear,
    gaussian_linear_uniform,
    gaussian_mixture,
    lotka_volterra,
    sbi_task,
    sir,
    slcp,
    two_moons,
)

__all__ = [
    "POSTERIORS",
    "SBI_TASKS",
    "Checkerboard",
    "EightGaussians",
    "Moons",
    "PlanarLaw",
    "PosteriorTask",
    "SBITask",
    "SCurve",
    "SwissRoll",
    "ark",
    "bernoulli_glm",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "exact_task",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "gaussian_mixture",
    "kidscore_interaction",
    "logearn_interaction",
    "lotka_volterra",
    "low_dim_gauss_mix",
    "low_dim_gauss_mix_unordered",
    "posterior_task",
    "sbi_task",
    "sir",
    "slcp",
    "two_moons",
]


def __dir__() -> list[str]:
    return sorted(__all__)
