"""C2ST values on the sbibm tasks as others published them, at 1,000 and 10,000 simulations.

`SBIBM`: https://arxiv.org/abs/2101.04653, results table (gaussian_mixture from its rerun): means over ten observations,
10,000 draws a side; NPE, a neural spline flow, twice: over ten observations, and over the five that
`pyro_sb.datasets` has. `SIMFORMER`: https://arxiv.org/abs/2404.09636, VE-SDE figure read off to .002; NPE, NLE and NRE
are sbi's, run by that paper, NPSE is its conditional score baseline.
"""

KINDS = {
    "amortised": "one network, draws at once for any observation",
    "graph": "the same, given the dependence graph of the model",
    "mcmc": "amortised likelihood or ratio, but MCMC for each observation",
    "sequential": "simulates for each observation; the budget is for each",
}

SBIBM_METHODS = ("NPE", "NPE", "NLE", "NRE", "SNPE", "SNLE", "SNRE", "SMC-ABC")
SBIBM = (
    ("two_moons", 1_000, (0.725, 0.697, 0.773, 0.822, 0.643, 0.657, 0.651, 0.922)),
    ("two_moons", 10_000, (0.606, 0.604, 0.713, 0.761, 0.554, 0.571, 0.582, 0.707)),
    ("gaussian_linear", 1_000, (0.694, 0.700, 0.650, 0.672, 0.652, 0.628, 0.670, 0.922)),
    ("gaussian_linear", 10_000, (0.552, 0.549, 0.555, 0.560, 0.544, 0.548, 0.536, 0.829)),
    ("gaussian_linear_uniform", 1_000, (0.696, 0.702, 0.723, 0.788, 0.631, 0.657, 0.681, 0.968)),
    ("gaussian_linear_uniform", 10_000, (0.553, 0.554, 0.548, 0.706, 0.527, 0.552, 0.606, 0.928)),
    ("gaussian_mixture", 1_000, (0.716, 0.722, 0.740, 0.777, 0.669, 0.706, 0.673, 0.791)),
    ("gaussian_mixture", 10_000, (0.615, 0.629, 0.723, 0.748, 0.551, 0.685, 0.578, 0.722)),
    ("slcp", 1_000, (0.975, 0.976, 0.946, 0.972, 0.965, 0.921, 0.968, 0.982)),
    ("slcp", 10_000, (0.901, 0.889, 0.771, 0.947, 0.845, 0.713, 0.917, 0.969)),
    ("bernoulli_glm", 1_000, (0.863, 0.864, 0.740, 0.899, 0.855, 0.634, 0.718, 0.991)),
    ("bernoulli_glm", 10_000, (0.678, 0.681, 0.605, 0.812, 0.614, 0.553, 0.584, 0.981)),
)

SIMFORMER_METHODS = (
    "NPE",
    "NLE",
    "NRE",
    "NPSE",
    "Simformer",
    "Simformer posterior-only",
    "Simformer undirected graph",
    "Simformer directed graph",
)
SIMFORMER = (
    ("gaussian_linear", 1_000, (0.770, 0.761, 0.686, 0.705, 0.732, 0.671, 0.540, 0.539)),
    ("gaussian_linear", 10_000, (0.600, 0.608, 0.597, 0.572, 0.635, 0.555, 0.507, 0.510)),
    ("gaussian_mixture", 1_000, (0.691, 0.673, 0.702, 0.613, 0.574, 0.677, 0.572, 0.592)),
    ("gaussian_mixture", 10_000, (0.557, 0.534, 0.684, 0.528, 0.515, 0.521, 0.515, 0.524)),
    ("two_moons", 1_000, (0.761, 0.639, 0.833, 0.570, 0.611, 0.635, 0.611, 0.685)),
    ("two_moons", 10_000, (0.576, 0.552, 0.723, 0.513, 0.525, 0.533, 0.525, 0.521)),
    ("slcp", 1_000, (0.972, 0.973, 0.967, 0.988, 0.924, 0.941, 0.831, 0.881)),
    ("slcp", 10_000, (0.872, 0.770, 0.912, 0.831, 0.784, 0.821, 0.646, 0.649)),
)


def kind_of(method: str) -> str:
    """Key of `KINDS`."""
    if method in ("NLE", "NRE"):
        return "mcmc"
    if method in ("SNPE", "SNLE", "SNRE", "SMC-ABC"):
        return "sequential"
    return "graph" if method.endswith("graph") else "amortised"


def best_of(task: str, simulations: int, kind: str) -> str:
    """The lowest value of a kind, with its method."""
    values = [
        (value, method)
        for methods, table in ((SBIBM_METHODS, SBIBM), (SIMFORMER_METHODS, SIMFORMER))
        for name, budget, row in table
        for method, value in zip(methods, row, strict=True)
        if (name, budget, kind_of(method)) == (task, simulations, kind)
    ]
    return "{:.3f} {}".format(*min(values, key=lambda pair: pair[0])) if values else "-"
