"""C2ST values on the sbibm tasks as others published them: plain data, with budget and sample size."""

from collections.abc import Sequence
from typing import NamedTuple

SBIBM = "sbibm"
SIMFORMER = "Simformer"
GENSBI = "GenSBI"

SOURCES = {
    SBIBM: "Lueckmann et al. 2021, https://arxiv.org/abs/2101.04653, results table; gaussian_mixture from its rerun",
    SIMFORMER: "Gloeckler et al. 2024, https://arxiv.org/abs/2404.09636, VE-SDE figure read off to .002",
    GENSBI: "https://arxiv.org/abs/2605.27499, table of its documentation, two digits",
}
"""Where each value comes from. sbibm's are means over ten observations, of 10,000 draws a side."""

KINDS = {
    "amortised": "one network, draws at once for any observation",
    "mcmc": "amortised likelihood or ratio, but MCMC for each observation",
    "sequential": "simulates anew for each observation",
    "graph": "amortised, told the dependence graph of the model",
}


class Published(NamedTuple):
    """One published value.

    Attributes:
        source: Key of `SOURCES`.
        method: Its name there.
        kind: Key of `KINDS`.
        task: Name of the task.
        simulations: Budget; for each observation where the method is sequential.
        c2st: Mean over the observations.
        draws: Draws a side, or None where the source at hand does not say.
        observations: Which of the benchmark's, or None where the source at hand does not say.
    """

    source: str
    method: str
    kind: str
    task: str
    simulations: int
    c2st: float
    draws: int | None
    observations: range | None


def published(task: str | None = None, simulations: int | None = None, kinds: Sequence[str] = ()) -> list[Published]:
    """The values for a task, a budget and some kinds; each omitted: all."""
    return [
        row
        for row in PUBLISHED
        if task in (None, row.task) and simulations in (None, row.simulations) and (not kinds or row.kind in kinds)
    ]


# NPE (a neural spline flow) twice: over ten observations, and over the five that pyro_sb.datasets has
_SBIBM_METHODS = ("NPE", "NPE", "NLE", "NRE", "SNPE", "SNLE", "SNRE", "SMC-ABC")
_SBIBM_VALUES = (
    ("two_moons", 1_000, (0.725, 0.697, 0.773, 0.822, 0.643, 0.657, 0.651, 0.922)),
    ("two_moons", 10_000, (0.606, 0.604, 0.713, 0.761, 0.554, 0.571, 0.582, 0.707)),
    ("two_moons", 100_000, (0.542, 0.526, 0.668, 0.629, 0.530, 0.582, 0.563, 0.663)),
    ("gaussian_linear", 1_000, (0.694, 0.700, 0.650, 0.672, 0.652, 0.628, 0.670, 0.922)),
    ("gaussian_linear", 10_000, (0.552, 0.549, 0.555, 0.560, 0.544, 0.548, 0.536, 0.829)),
    ("gaussian_linear", 100_000, (0.506, 0.506, 0.515, 0.536, 0.507, 0.519, 0.515, 0.726)),
    ("gaussian_linear_uniform", 1_000, (0.696, 0.702, 0.723, 0.788, 0.631, 0.657, 0.681, 0.968)),
    ("gaussian_linear_uniform", 10_000, (0.553, 0.554, 0.548, 0.706, 0.527, 0.552, 0.606, 0.928)),
    ("gaussian_linear_uniform", 100_000, (0.509, 0.509, 0.506, 0.631, 0.507, 0.509, 0.536, 0.794)),
    ("gaussian_mixture", 1_000, (0.716, 0.722, 0.740, 0.777, 0.669, 0.706, 0.673, 0.791)),
    ("gaussian_mixture", 10_000, (0.615, 0.629, 0.723, 0.748, 0.551, 0.685, 0.578, 0.722)),
    ("gaussian_mixture", 100_000, (0.548, 0.551, 0.690, 0.735, 0.536, 0.646, 0.531, 0.673)),
    ("slcp", 1_000, (0.975, 0.976, 0.946, 0.972, 0.965, 0.921, 0.968, 0.982)),
    ("slcp", 10_000, (0.901, 0.889, 0.771, 0.947, 0.845, 0.713, 0.917, 0.969)),
    ("slcp", 100_000, (0.831, 0.838, 0.699, 0.919, 0.666, 0.578, 0.721, 0.963)),
    ("bernoulli_glm", 1_000, (0.863, 0.864, 0.740, 0.899, 0.855, 0.634, 0.718, 0.991)),
    ("bernoulli_glm", 10_000, (0.678, 0.681, 0.605, 0.812, 0.614, 0.553, 0.584, 0.981)),
    ("bernoulli_glm", 100_000, (0.559, 0.566, 0.545, 0.751, 0.525, 0.522, 0.529, 0.818)),
    ("sir", 1_000, (0.815, 0.884, 0.761, 0.841, 0.638, 0.745, 0.637, 0.921)),
    ("sir", 10_000, (0.680, 0.737, 0.748, 0.770, 0.561, 0.745, 0.646, 0.626)),
    ("sir", 100_000, (0.585, 0.571, 0.730, 0.690, 0.575, 0.650, 0.547, 0.613)),
    ("lotka_volterra", 1_000, (0.999, 1.000, 0.994, 1.000, 0.990, 0.909, 0.971, 1.000)),
    ("lotka_volterra", 10_000, (0.997, 0.997, 0.956, 0.998, 0.953, 0.738, 0.848, 0.996)),
    ("lotka_volterra", 100_000, (0.981, 0.977, 0.952, 0.996, 0.928, 0.695, 0.831, 0.995)),
)

# NPE, NLE and NRE are sbi's, run by that paper; NPSE is its conditional score baseline
_SIMFORMER_METHODS = (
    "NPE",
    "NLE",
    "NRE",
    "NPSE",
    "Simformer",
    "Simformer posterior-only",
    "Simformer undirected graph",
    "Simformer directed graph",
)
_SIMFORMER_VALUES = (
    ("gaussian_linear", 1_000, (0.770, 0.761, 0.686, 0.705, 0.732, 0.671, 0.540, 0.539)),
    ("gaussian_linear", 10_000, (0.600, 0.608, 0.597, 0.572, 0.635, 0.555, 0.507, 0.510)),
    ("gaussian_linear", 100_000, (0.533, 0.531, 0.558, 0.507, 0.505, 0.539, 0.503, 0.505)),
    ("gaussian_mixture", 1_000, (0.691, 0.673, 0.702, 0.613, 0.574, 0.677, 0.572, 0.592)),
    ("gaussian_mixture", 10_000, (0.557, 0.534, 0.684, 0.528, 0.515, 0.521, 0.515, 0.524)),
    ("gaussian_mixture", 100_000, (0.519, 0.513, 0.591, 0.502, 0.506, 0.503, 0.504, 0.505)),
    ("two_moons", 1_000, (0.761, 0.639, 0.833, 0.570, 0.611, 0.635, 0.611, 0.685)),
    ("two_moons", 10_000, (0.576, 0.552, 0.723, 0.513, 0.525, 0.533, 0.525, 0.521)),
    ("two_moons", 100_000, (0.530, 0.520, 0.591, 0.502, 0.506, 0.505, 0.505, 0.505)),
    ("slcp", 1_000, (0.972, 0.973, 0.967, 0.988, 0.924, 0.941, 0.831, 0.881)),
    ("slcp", 10_000, (0.872, 0.770, 0.912, 0.831, 0.784, 0.821, 0.646, 0.649)),
    ("slcp", 100_000, (0.745, 0.630, 0.810, 0.630, 0.703, 0.666, 0.569, 0.565)),
)

_GENSBI_TASKS = ("two_moons", "gaussian_linear", "gaussian_mixture", "slcp", "bernoulli_glm")
_GENSBI_VALUES = (
    ("GenSBI score, joint transformer", (0.51, 0.50, 0.50, 0.57, 0.58)),
    ("GenSBI flow matching, joint", (0.53, 0.51, 0.52, 0.59, 0.58)),
    ("GenSBI flow matching, conditional", (0.53, 0.51, 0.52, 0.72, 0.70)),
    ("OneFlowSBI", (0.51, 0.51, 0.51, 0.73, 0.58)),
    ("Simformer", (0.51, 0.50, 0.51, 0.57, 0.59)),
    ("NPE", (0.57, 0.55, 0.56, 0.84, 0.65)),
)


def _kind(method: str) -> str:
    if method in ("NLE", "NRE"):
        return "mcmc"
    if method in ("SNPE", "SNLE", "SNRE", "SMC-ABC"):
        return "sequential"
    return "graph" if method.endswith("graph") else "amortised"


def _rows() -> list[Published]:
    rows = []
    for task, simulations, values in _SBIBM_VALUES:
        for column, (method, value) in enumerate(zip(_SBIBM_METHODS, values, strict=True)):
            which = range(1, 6) if column == 1 else range(1, 11)
            rows.append(Published(SBIBM, method, _kind(method), task, simulations, value, 10_000, which))
    for task, simulations, values in _SIMFORMER_VALUES:
        for method, value in zip(_SIMFORMER_METHODS, values, strict=True):
            rows.append(Published(SIMFORMER, method, _kind(method), task, simulations, value, None, None))
    for method, values in _GENSBI_VALUES:
        for task, value in zip(_GENSBI_TASKS, values, strict=True):
            rows.append(Published(GENSBI, method, _kind(method), task, 30_000, value, None, None))
    return rows


PUBLISHED: tuple[Published, ...] = tuple(_rows())
