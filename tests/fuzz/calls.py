"""Public calls with arguments that are right, and for each argument the values to try in its place."""

import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyro_sb.bridges import (
    DSB,
    SGM,
    VSDM,
    AutoencoderCodec,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    LightSBBM,
    LightSBM,
    PairCodec,
    PCACodec,
    Sampler,
    SmoothedBridge,
    TailMatched,
)
from pyro_sb.nn import SetEmbedding
from tests.fuzz import pools
from tests.fuzz.pools import Value, rows
from tests.laws import BRIDGES, CONTEXT_DIM, DIM


class Call(NamedTuple):
    """A public call.

    Args:
        function: Takes keyword arguments.
        right: Makes the arguments that are right.
        tried: Values to try in the place of each.
        slow: Whether it learns, so that the daily run tries fewer.
    """

    function: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    tried: dict[str, list[Value]]
    slow: bool = False


CALLS: dict[str, Call] = {}


def add(called: str, function: Callable[..., Any], right: Any, /, slow: bool = False, **tried: list[Value]) -> None:
    CALLS[called] = Call(function, right if callable(right) else lambda: dict(right), tried, slow)


def optional(values: list[Value]) -> list[Value]:
    """None is right too."""
    return [value._replace(bad=False) if value.name == "none" else value for value in values] + [
        Value("omitted", lambda: None, False)
    ]


# ---- bridges: constructors ----

SIZES = {"dim": pools.COUNT, "context_dim": pools.LEAST0}
NETS = {"hidden": pools.WIDTHS, "embedding": optional(pools.NONSENSE)}
LIGHT = SIZES | {
    "num_components": pools.COUNT,
    "epsilon": pools.POSITIVE,
    "covariance": pools.CHOICE,
    "dropout": pools.SHARE,
    "hidden": pools.WIDTHS,
}
DIFFUSION = SIZES | {
    "b_max": pools.POSITIVE,
    "b_min": pools.POSITIVE,
    "power": pools.NO_NUMBER,
    "source_law": pools.CHOICE,
    "preconditioning": pools.CHOICE,
    "step_covariance": pools.CHOICE,
    "hidden": pools.WIDTHS,
    "covariance_hidden": pools.WIDTHS,
}
MATRIX = pools.bad(
    other="other",
    number=3,
    wide=lambda: torch.eye(3),
    nan=lambda: torch.full((2, 2), torch.nan),
    negative=lambda: -torch.eye(2),
    crooked=lambda: torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
    complex_rows=lambda: torch.eye(2) + 1j,
    list=lambda: [["a", "b"], ["c", "d"]],
    dict=lambda: {},
    flat=lambda: torch.ones(2),
) + pools.open_values(
    lists=lambda: [[2.0, 0.0], [0.0, 1.0]], numpy=lambda: torch.eye(2).numpy(), whole=lambda: torch.eye(2).long()
)
LANGEVIN = SIZES | {
    "epsilon": optional(pools.POSITIVE),
    "scheme": pools.CHOICE,
    "num_steps": pools.COUNT,
    "step_size": pools.POSITIVE,
    "metric": MATRIX,
    "diffusion": optional(MATRIX),
    "bandwidth_exponent": pools.NO_NUMBER,
}
for kind, tried in {
    LightSB: LIGHT,
    LightSBM: LIGHT,
    LightSBBM: LIGHT | {"beta": [v for v in pools.POSITIVE if v.name not in ("one", "infinite", "text")]},
    VSDM: DIFFUSION | {"drift_matrix": MATRIX},
    SGM: DIFFUSION,
    SmoothedBridge: SIZES
    | {"epsilon": optional(pools.POSITIVE), "num_steps": pools.COUNT, "path_steps": pools.COUNT}
    | NETS,
    DSB: SIZES
    | {"epsilon": pools.POSITIVE, "method": pools.CHOICE, "num_steps": optional(pools.COUNT), "variance": pools.CHOICE},
    KernelLangevinBridge: LANGEVIN,
}.items():
    add(kind.__name__, kind, {"dim": 2}, **tried)
add("Sampler", Sampler, {}, num_steps=pools.COUNT, path_steps=pools.COUNT, solver=pools.CHOICE)
add("PCACodec", PCACodec, {}, latent_dim=optional(pools.COUNT), whiten=pools.FLAG, residual=pools.FLAG)
add(
    "AutoencoderCodec",
    AutoencoderCodec,
    {},
    latent_dim=optional(pools.COUNT),
    hidden=pools.WIDTHS,
    share=[v for v in pools.SHARE if v.name != "one"],
    latent_noise=pools.NO_NUMBER,
)
add(
    "PairCodec",
    PairCodec,
    {"encode": torch.exp, "decode": torch.log, "data_dim": 3, "latent_dim": 2},
    encode=pools.bad(number=3, text="a"),
    decode=pools.bad(number=3),
    data_dim=pools.COUNT,
    latent_dim=pools.COUNT,
    bijective=pools.FLAG,
)
DF = pools.bad(
    minus=-1.0,
    zero=0.0,
    text="text",
    nan=torch.nan,
    three=lambda: [3.0, 3.0, 3.0],
    wide=lambda: torch.ones(5),
    dict=lambda: {},
    complex_rows=1j,
) + pools.open_values(
    three=3, infinite=torch.inf, pair=lambda: (3.0, torch.inf), tensor=lambda: torch.tensor([3.0, 4.0])
)
add(
    "TailMatched",
    lambda **kw: TailMatched(**kw),
    lambda: {"bridge": LightSB(2)},
    bridge=pools.NONSENSE,
    df=DF,
    fraction=[v for v in pools.SHARE if v.name != "half"],
)
add(
    "LatentBridge",
    LatentBridge,
    lambda: {"bridge": LightSB(2)},
    bridge=optional(pools.NONSENSE),
    codec=optional(pools.NONSENSE),
    context_dim=optional(pools.LEAST0),
)
add(
    "SetEmbedding",
    SetEmbedding,
    {"item_dim": 2, "out_dim": 3},
    item_dim=pools.COUNT,
    out_dim=pools.COUNT,
    hidden=pools.WIDTHS,
)

# ---- bridges: fits ----

TARGET, CONTEXT = rows(DIM), rows(CONTEXT_DIM)
FIT = {
    "target": pools.draws(DIM),
    "weights": pools.weights(40),
    "progress": [v for v in pools.FLAG if v.name != "true"],
    "checkpoint": pools.PATH,
    "num_law_draws": pools.COUNT,
}
HELD = pools.bad(
    minus=-0.1,
    one=1.0,
    nan=torch.nan,
    text="text",
    mask=lambda: torch.ones(40, dtype=torch.bool),
    short=lambda: torch.ones(3).bool(),
    floats=lambda: torch.ones(40),
    none=None,
    complex=1j,
    infinite=torch.inf,
) + pools.open_values(half=0.5, mask_of_some=lambda: torch.arange(40) < 5, list=lambda: [True] * 5 + [False] * 35)
LEARNT = FIT | {
    "num_updates": [v for v in pools.COUNT if v.name != "none"],
    "batch_size": pools.COUNT,
    "learning_rate": pools.POSITIVE,
    "held_out": HELD,
}
SOURCE = [v for v in pools.draws(DIM) if v.name not in ("none", "flat", "same")]
QUICK = {"target": TARGET, "progress": False, "num_updates": 2}
DSB_QUICK = QUICK | {"num_iterations": 1, "num_pairs": 30}
for name, make, right, tried in [
    (
        "LightSB",
        lambda: LightSB(2, num_components=2),
        QUICK,
        LEARNT | {"source": SOURCE, "solver": pools.CHOICE, "patience": pools.COUNT},
    ),
    ("LightSBBM", lambda: LightSBBM(2, num_components=2), QUICK, LEARNT | {"source": SOURCE}),
    (
        "VSDM",
        lambda: VSDM(2, hidden=(4,), covariance_hidden=(4,), drift_matrix="stochastic"),
        QUICK,
        LEARNT | {"ema": optional(pools.SHARE), "num_stages": pools.COUNT, "zeta": pools.POSITIVE},
    ),
    ("SmoothedBridge", lambda: SmoothedBridge(2, hidden=(4,)), QUICK, LEARNT),
    (
        "DSB",
        lambda: DSB(2, hidden=(4,), num_steps=2),
        DSB_QUICK,
        LEARNT
        | {
            "source": SOURCE,
            "num_iterations": pools.COUNT,
            "num_pairs": pools.COUNT,
            "pairs": pools.CHOICE,
            "loss": pools.CHOICE,
            "reference": pools.CHOICE,
            "refresh": pools.COUNT,
            "warm_start": pools.FLAG,
        },
    ),
    (
        "KernelLangevinBridge",
        lambda: KernelLangevinBridge(2),
        {"target": TARGET, "progress": False},
        FIT | {"max_iter": pools.COUNT, "tolerance": optional(pools.POSITIVE), "source": SOURCE},
    ),
    (
        "LatentBridge",
        lambda: LatentBridge(LightSB(2, num_components=2), PCACodec(2)),
        QUICK,
        FIT
        | {
            "target": [v for v in pools.draws(DIM) if v.name != "wide"],
            "refit_codec": pools.FLAG,
            "pretrain": optional(pools.draws(DIM)),
            "codec_options": optional(pools.bad(number=3, dict=lambda: {"a": 1})),
        },
    ),
    (
        "TailMatched",
        lambda: TailMatched(LightSB(2, num_components=2), df=3.0),
        QUICK,
        FIT | {"tail_draws": pools.COUNT},
    ),
]:
    add(f"{name}.fit", lambda make=make, **kw: make().fit(**kw), right, slow=True, **tried)
add(
    "LightSB.fit given contexts",
    lambda **kw: LightSB(2, num_components=2, context_dim=CONTEXT_DIM).fit(**kw),
    QUICK | {"context": CONTEXT},
    slow=True,
    context=[v for v in pools.draws(CONTEXT_DIM) if v.name not in ("few", "law", "same")]
    + pools.bad(short=lambda: CONTEXT[:-1]),
)
for name, codec, more in (
    ("PCACodec", PCACodec, {}),
    (
        "AutoencoderCodec",
        AutoencoderCodec,
        {"num_updates": pools.COUNT, "batch_size": pools.COUNT, "ema": optional(pools.SHARE)},
    ),
):
    quick = {"x": TARGET, "progress": False} | ({"num_updates": 2} if more else {})
    law_free = [v for v in pools.draws(DIM) if v.name not in ("law", "same", "wide")]
    add(
        f"{name}.fit",
        lambda codec=codec, **kw: codec(1).fit(**kw),
        quick,
        slow=True,
        x=law_free,
        weights=pools.weights(40),
        **more,
    )


# ---- bridges: methods of fitted ones ----


@functools.cache
def fitted_bridge(name: str, conditional: bool) -> Any:
    bridge = BRIDGES[name](context_dim=CONTEXT_DIM) if conditional else BRIDGES[name]()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        bridge.fit(TARGET, context=CONTEXT if conditional else None, progress=False)
    return bridge


X = rows(DIM, 6)
PATHS = {"num_paths": pools.COUNT, "num_steps": [v for v in pools.COUNT if v.name != "none"]}
POINTS = pools.points(DIM)


def method(name: str, conditional: bool, call: str, right: dict[str, Any], /, **tried: list[Value]) -> None:
    def function(**kw: Any) -> Any:
        bridge = fitted_bridge(name, conditional)
        return getattr(bridge, call)(**kw)

    context = {"context": rows(CONTEXT_DIM, 6)} if conditional else {}
    more = {"context": pools.points(CONTEXT_DIM)} if conditional else {"context": pools.bad(number=1.0, rows=lambda: X)}
    given = "given contexts" if conditional else ""
    add(f"{name} {call} {given}".strip(), function, right | context, **tried, **more)


def law(name: str, conditional: bool, call: str, right: dict[str, Any], /, **tried: list[Value]) -> None:
    def function(**kw: Any) -> Any:
        bridge = fitted_bridge(name, conditional)
        return getattr(bridge(rows(CONTEXT_DIM, 6)) if conditional else bridge(), call)(**kw)

    add(f"{name}() {call} {'given contexts' if conditional else ''}".strip(), function, right, **tried)


for name in BRIDGES:
    for conditional in (False, True):
        method(name, conditional, "transport", {"x0": X}, x0=POINTS)
        method(name, conditional, "drift", {"t": 0.5, "x": X}, t=pools.TIME, x=POINTS)
        method(name, conditional, "paths", {"num_paths": 3, "num_steps": 4}, **PATHS)
        law(name, conditional, "sample", {"sample_shape": (2,)}, sample_shape=pools.SHAPE)
        law(name, conditional, "log_prob", {"value": X}, value=POINTS)
        law(name, conditional, "draws", {"sample_shape": (2,)}, sample_shape=pools.SHAPE)
        law(name, conditional, "expand", {"batch_shape": (2, 6)}, batch_shape=pools.SHAPE)
for name in ("vsdm", "sgm", "smoothed-learnt", "latent-smoothed"):
    finite = [v._replace(bad=False) if v.name in ("nan", "infinite") else v for v in POINTS]
    method(name, False, "push", {"noise": X}, noise=[v for v in finite if v.name not in ("nan", "infinite")])
for name in ("vsdm", "dsb", "smoothed"):
    method(name, False, "path_log_prob", {"x": X}, x=POINTS, num_paths=pools.COUNT)
method("dsb", False, "coupling", {"num": 5}, num=pools.COUNT)
method("dsb", False, "transport_back", {"x1": X}, x1=POINTS)
for call in ("plan_moments", "plan"):
    method("light", False, call, {"x0": X}, x0=POINTS)
for call in ("volatility", "inverse_residual"):
    method("light-bass", False, call, {"t": 0.5, "x": X}, t=pools.TIME, x=POINTS)
method("light", False, "marginal_log_prob", {"x": X}, x=POINTS, num_source=pools.COUNT)
method("langevin-plain", False, "conditional_mean", {"x": X}, x=POINTS)
method("langevin-plain", False, "conditional_covariance", {"x": X}, x=POINTS)
method("langevin-plain", False, "transition_probabilities", {"x": X}, x=POINTS)
AXES = pools.bad(
    none=None,
    all=lambda: [0, 1],
    empty=lambda: [],
    far=lambda: [7],
    text="a",
    half=lambda: [0.5],
    twice=lambda: [0, 0],
    number=0.5,
    minus=lambda: [-9],
)
add(
    "light condition",
    lambda **kw: fitted_bridge("light-full", False).condition(**kw).sample((2,)),
    {"axes": [0], "observed": [0.1]},
    axes=AXES,
    observed=[v for v in pools.points(1) if v.name not in ("wide", "half")],
)
add(
    "light-bass dual",
    lambda **kw: fitted_bridge("light-bass", False).dual(**kw),
    {"x0": X, "x1": X},
    x0=POINTS,
    x1=POINTS,
)
add(
    "save",
    lambda path: fitted_bridge("light", False).save(path),
    lambda: {"path": tempfile.mkdtemp() + "/b.pt"},
    path=pools.PATH,
)
add(
    "load",
    LightSB.load,
    {"path": "absent.pt"},
    path=pools.bad(number=3, folder="/", absent="/absent/fit.pt", none=None),
)
