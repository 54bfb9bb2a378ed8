"""Public calls beyond the bridges' own: weights, metrics, datasets, inference, diagnostics and plots."""

import functools
import warnings
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_sb import checks, datasets, diagnostics, plots, weights
from pyro_sb.bridges import PCACodec, reconstruction_report
from pyro_sb.bridges.tails.bridge import TailTransform
from pyro_sb.bridges.tails.fit import tail_index
from pyro_sb.datasets.planar import Checkerboard, EightGaussians, Moons
from pyro_sb.infer import MCMC, AmortizedPosterior, BridgeMH, KernelLangevin
from pyro_sb.infer.autoguide import AutoBridge, AutoLightBridge
from pyro_sb.metrics import (
    Moments,
    bw2_uvp,
    c2st,
    cbw2_uvp,
    mmd,
    mode_share_tv,
    mode_shares,
    sliced_wasserstein2,
    wasserstein2,
)
from pyro_sb.training import FitHistory, train
from tests.fuzz import pools
from tests.fuzz.calls import CALLS, POINTS, TARGET, X, add, fitted_bridge, optional
from tests.fuzz.pools import rows

__all__ = ["CALLS"]

# ---- weights, metrics, tails ----

for function in (weights.normalise, weights.effective_sample_size, weights.log_evidence, weights.pareto_k):
    add(f"weights.{function.__name__}", function, {"log_weights": rows(1, 60)[:, 0]}, log_weights=pools.log_weights(60))
add(
    "weights.systematic_resample",
    weights.systematic_resample,
    {"weights": torch.ones(8) / 8, "num": 5},
    weights=[v for v in pools.weights(9) if v.bad and v.name not in ("single", "short")],
    num=pools.COUNT,
)
CLOUD = [v for v in pools.draws(2) if v.name not in ("law", "same")]
LAWFUL = [v for v in pools.draws(2) if v.name != "same"]
add(
    "mmd",
    mmd,
    {"x": TARGET, "y": TARGET},
    x=CLOUD,
    y=[v for v in LAWFUL if v.name != "twice"],
    floor_draws=optional(LAWFUL),
)
add("wasserstein2", wasserstein2, {"x": TARGET, "y": TARGET}, x=CLOUD, y=LAWFUL)
add(
    "sliced_wasserstein2",
    sliced_wasserstein2,
    {"x": TARGET, "y": TARGET},
    x=CLOUD,
    y=LAWFUL,
    num_projections=pools.COUNT,
    generator=pools.GENERATOR,
)
add(
    "c2st",
    c2st,
    {"x": X, "y": X},
    x=[v for v in CLOUD if v.bad],
    y=[v for v in LAWFUL if v.bad],
    slow=True,
    num_folds=[v for v in pools.COUNT if v.bad],
    generator=[v for v in pools.GENERATOR if v.bad],
)
add("bw2_uvp", bw2_uvp, {"model": TARGET, "target": TARGET}, model=CLOUD, target=CLOUD)
EXACT = Moments(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
add(
    "cbw2_uvp",
    cbw2_uvp,
    {"model": EXACT, "target": EXACT, "variance": 4.0},
    model=[v for v in CLOUD if v.bad and v.name != "batch"],
    target=pools.NONSENSE,
    variance=pools.POSITIVE,
)
add("mode_shares", mode_shares, {"x": TARGET, "centres": X}, x=CLOUD, centres=CLOUD)
add(
    "mode_share_tv",
    mode_share_tv,
    {"x": TARGET, "centres": X[:3]},
    x=CLOUD,
    shares=[v for v in pools.weights(3) if v.name not in ("single", "list", "series", "whole", "tiny")],
)
add(
    "tail_index",
    tail_index,
    {"x": TARGET},
    x=[v for v in CLOUD if v.name not in ("flat", "wide")],
    fraction=[v for v in pools.SHARE if v.name != "half"],
    weights=pools.weights(40),
)
SIDE = pools.bad(
    minus=lambda: -torch.ones(2),
    zero=lambda: torch.zeros(2),
    nan=lambda: torch.full((2,), torch.nan),
    text="a",
    none=None,
    wide=lambda: torch.ones(3),
) + pools.open_values(list=lambda: [1.0, 2.0])
ONE = torch.ones(2)
add(
    "TailTransform",
    lambda **kw: TailTransform(**kw)(X),
    {"loc": 0 * ONE, "scale": ONE, "lower": 3 * ONE, "upper": 3 * ONE},
    scale=SIDE,
    lower=SIDE,
    upper=SIDE,
    loc=[v for v in SIDE if v.name not in ("minus", "zero")],
)
add(
    "reconstruction_report",
    reconstruction_report,
    {"x": TARGET, "codec": PCACodec},
    slow=True,
    x=[v for v in CLOUD if v.bad and v.name != "wide"],
    dims=optional(pools.WIDTHS),
    held_out=[v for v in pools.SHARE if v.name not in ("tiny",)],
    stop_at=optional([v for v in pools.SHARE if v.name != "one"]),
)

# ---- readers, training, datasets ----

add("checks.floats", checks.floats, {"name": "x", "value": X}, value=POINTS[:0] + pools.NONSENSE)


def quick_train(**kw: Any) -> Any:
    x = nn.Parameter(torch.tensor(1.0))
    return train([x], lambda: x**2, **({"num_updates": 2, "learning_rate": 0.1, "progress": False} | kw))


add(
    "train",
    quick_train,
    {},
    num_updates=pools.COUNT,
    learning_rate=pools.POSITIVE,
    num_checks=pools.COUNT,
    ema=optional(pools.SHARE),
)
for kind in (EightGaussians, Moons, Checkerboard, datasets.SwissRoll, datasets.SCurve):
    add(
        f"{kind.__name__}",
        kind,
        {},
        dtype=pools.bad(text="float32", half=torch.float16, complex=torch.complex64, number=3),
    )
    add(f"{kind.__name__}.sample", lambda kind=kind, **kw: kind().sample(**kw), {}, sample_shape=pools.SHAPE)
    add(
        f"{kind.__name__}.expand",
        lambda kind=kind, **kw: kind().expand(**kw).sample(),
        {"batch_shape": (2,)},
        batch_shape=pools.SHAPE,
    )
for kind in (EightGaussians, Checkerboard):
    add(f"{kind.__name__}.log_prob", lambda kind=kind, **kw: kind().log_prob(**kw), {"value": X}, value=POINTS)
add("equal_counts", lambda **kw: EightGaussians().equal_counts(**kw), {"n": 8}, n=[v for v in pools.COUNT if v.bad])
add("stratified", lambda **kw: Moons().stratified(**kw), {"n": 8}, n=[v for v in pools.COUNT if v.bad])
for function in (datasets.exact_task, datasets.posterior_task, datasets.sbi_task):
    add(function.__name__, function, {"name": "none of them"}, name=pools.CHOICE)

# ---- inference ----


def model(y: Any = None) -> Any:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        return pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def given(y: Any = None) -> Any:
    return pyro.sample("mu", dist.Normal(0.0, 1.0))


START = pools.bad(other="other", number=3, list=lambda: [[1.0]], dict=lambda: {})
add(
    "BridgeMH",
    lambda **kw: BridgeMH(**kw),
    {"model": given},
    model=[v for v in pools.NONSENSE if v.name not in ("function", "kind")],
    bridge=[v for v in pools.NONSENSE if v.name not in ("function", "kind")],
    local=[v for v in pools.CHOICE if v.name != "none"],
    num_proposals=pools.COUNT,
    num_particles=[v for v in pools.COUNT if v.bad],
    start=START,
    reparam=pools.CHOICE,
    bridge_probability=optional([v for v in pools.SHARE if v.bad]),
)
add(
    "KernelLangevin",
    lambda **kw: KernelLangevin(**kw),
    {"model": given},
    model=[v for v in pools.NONSENSE if v.name not in ("function", "kind")],
    num_particles=[v for v in pools.COUNT if v.bad],
    start=START,
)
add(
    "MCMC",
    lambda **kw: MCMC(**kw),
    lambda: {"kernel": KernelLangevin(given), "num_samples": 5},
    kernel=pools.NONSENSE,
    num_samples=pools.COUNT,
    warmup_steps=optional(pools.LEAST0),
    num_chains=pools.COUNT,
)
add(
    "AmortizedPosterior",
    AmortizedPosterior,
    {"model": model},
    model=[v for v in pools.NONSENSE if v.name not in ("function", "kind")],
    bridge=[v for v in pools.CHOICE if v.name != "none"],
    embedding=optional(pools.bad(number=3, text="a")),
    observed=pools.bad(number=3, empty=()),
)


@functools.cache
def amortized() -> AmortizedPosterior:
    fitted = AmortizedPosterior(model, bridge="light")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        fitted.fit(num_simulations=60, num_updates=5, num_copies=0, progress=False)
    return fitted


def posterior() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return amortized().condition(torch.zeros(3))


AMORTIZED = {"num_simulations": 60, "num_updates": 2, "num_copies": 0, "progress": False}
add(
    "AmortizedPosterior.fit",
    lambda **kw: AmortizedPosterior(model, bridge="light").fit(**kw),
    AMORTIZED,
    slow=True,
    num_simulations=[v for v in pools.COUNT if v.bad],
    num_copies=[v for v in pools.LEAST0 if v.bad],
    missing=pools.SHARE,
    held_out=pools.SHARE,
    progress=[v for v in pools.FLAG if v.name != "true"],
    checkpoint=pools.PATH,
    num_updates=[v for v in pools.COUNT if v.bad and v.name != "none"],
    keep_finite=pools.FLAG,
)
OBSERVED = [v for v in pools.points(3) if v.name not in ("nan", "empty", "batch", "none", "read_only", "far")]
add(
    "AmortizedPosterior.condition",
    lambda **kw: amortized().condition(**kw).sample(2),
    {"y": torch.zeros(3)},
    y=OBSERVED,
)
add("Posterior.sample", lambda **kw: posterior().sample(**kw), {}, num_samples=pools.COUNT)
add(
    "Posterior.importance", lambda **kw: posterior().importance(**kw), {}, num_samples=[v for v in pools.COUNT if v.bad]
)
SITES = pools.bad(
    none=None,
    empty=lambda: {},
    other=lambda: {"a": torch.zeros(3)},
    text=lambda: {"mu": "a"},
    nan=lambda: {"mu": torch.tensor(torch.nan)},
    complex_rows=lambda: {"mu": torch.tensor(1j)},
    list=lambda: [1.0],
) + pools.open_values(lists=lambda: {"mu": [0.0, 1.0]}, number=lambda: {"mu": 0.5})
add("Posterior.log_prob", lambda **kw: posterior().log_prob(**kw), {"sites": {"mu": torch.zeros(3)}}, sites=SITES)
add(
    "Posterior.mcmc",
    lambda **kw: posterior().mcmc(**kw).get_samples(),
    {"num_samples": 2, "num_chains": 2},
    slow=True,
    num_samples=[v for v in pools.COUNT if v.bad],
    num_chains=[v for v in pools.COUNT if v.bad],
    num_proposals=[v for v in pools.COUNT if v.bad],
    warmup_steps=[v for v in pools.LEAST0 if v.bad and v.name != "none"],
)


# ---- guides, diagnostics, plots ----

NO_MODEL = [v for v in pools.NONSENSE if v.name not in ("function", "kind")]
add(
    "AutoLightBridge",
    lambda **kw: AutoLightBridge(**kw),
    {"model": given},
    model=NO_MODEL,
    num_components=optional(pools.COUNT),
    num_particles=pools.COUNT,
    num_updates=[v for v in pools.LEAST0 if v.bad],
)
add(
    "AutoBridge",
    lambda **kw: AutoBridge(**kw),
    {"model": given},
    model=NO_MODEL,
    base=optional(pools.NONSENSE),
    num_steps=[v for v in pools.COUNT if v.bad],
)
LOG_WEIGHTS = [v for v in pools.log_weights(60) if v.name not in ("all_zero", "single", "half_zero")]
add("psis", diagnostics.psis, {"x": rows(1, 60)[:, 0]}, x=LOG_WEIGHTS)
for function in (diagnostics.report, diagnostics.to_arviz):
    add(function.__name__, function, {"x": 3}, x=NO_MODEL)
add(
    "bridge_report",
    diagnostics.bridge_report,
    lambda: {"bridge": fitted_bridge("light", False), "target": TARGET},
    slow=True,
    bridge=NO_MODEL,
    target=[v for v in pools.draws(2) if v.bad and v.name not in ("same", "none")],
)


def drawn(function: Any) -> Any:
    """A picture's call, which leaves no picture behind."""

    def call(**kw: Any) -> None:
        matplotlib.use("Agg")
        try:
            function(**kw)
        finally:
            plt.close("all")

    return call


add(
    "plot_paths",
    drawn(plots.plot_paths),
    lambda: {"bridge": fitted_bridge("light", False), "num_paths": 3, "num_steps": 3},
    slow=True,
    bridge=NO_MODEL,
    num_paths=pools.COUNT,
    num_steps=pools.COUNT,
    axis=pools.bad(far=7, text="a", three=(0, 1, 0), half=0.5),
)
add(
    "plot_marginals",
    drawn(plots.plot_marginals),
    {"bridge": TARGET},
    slow=True,
    bridge=[v for v in pools.draws(2) if v.bad and v.name not in ("same", "wide")],
    target=[v for v in pools.draws(2) if v.bad and v.name not in ("none", "same")],
    coords=pools.bad(far=[7], text="ab", empty=[]),
    num_draws=[v for v in pools.COUNT if v.bad],
)
add(
    "plot_history",
    drawn(plots.plot_history),
    lambda: {"history": FitHistory(losses=[1.0, 0.5], iterations=2)},
    slow=True,
    history=NO_MODEL,
)
