"""Draws of every bridge, kernel and figure at fixed seeds, as hashes: the same before and after a move of the code?

    python unchanged.py --out FILE.json [--save FOLDER] [--load FOLDER] [--only "WORD|WORD"]
    python unchanged.py --compare A.json B.json [--only "WORD|WORD"] [--verbose] [--numbers]
    python unchanged.py --list

--save writes every fitted bridge to a folder, --load draws from the files in that folder instead of fresh ones (entries
"saved and loaded"). --numbers compares tensors and not texts, which name options. Any difference ends in 1.

Only public names are used, and all options go through NAMES and `call`, so that a renamed option is changed in one place.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import Independent, MultivariateNormal, Normal, StudentT

import pyro_sb.bridges as bridges
import pyro_sb.datasets as datasets
import pyro_sb.diagnostics as diagnostics
import pyro_sb.infer as infer
import pyro_sb.metrics as metrics

torch.set_num_threads(1)
F64 = torch.float64

# ---------------------------------------------------------------------------------------------------------------------
# Names of options. A key is "Class.option", "Class.fit.option", "fit.option" (of every fit), "function.option"; the
# value is the option's name in the code that runs, or None where it is gone. More specific keys win.

NAMES: dict[str, str | None] = {
    # "fit.num_steps": "num_updates",
    # "BridgeMH.start": "particles_start",
}


def renamed(kinds, options):
    """Options under their present names."""
    found = {}
    for key, value in options.items():
        name = next((NAMES[f"{kind}.{key}"] for kind in kinds if f"{kind}.{key}" in NAMES), key)
        if name is not None:
            found[name] = value
    return found


def make(kind, *first, **options):
    """An object of a class; ``first`` is dim (or the bridge, codec size, model, kernel: what comes first)."""
    kinds = [c.__name__ for c in kind.__mro__]
    return kind(*first, **renamed(kinds, options))


def fit_names(bridge, options):
    """Options of a fit; those of bridges and codecs within go by the same names."""
    kinds = [f"{c.__name__}.fit" for c in type(bridge).__mro__] + ["fit"]
    found = renamed(kinds, options)
    for inner in ("codec_options", "bridge_options", "fit_options"):
        if isinstance(found.get(inner), dict):
            found[inner] = renamed(["fit"], found[inner])
    return found


def fit(bridge, target, **options):
    """Fit without a bar."""
    return bridge.fit(target, **fit_names(bridge, {"progress": False} | options))


def learn(amortized, *model_args, **options):
    """Fit an amortised posterior without a bar."""
    return amortized.fit(*model_args, **fit_names(amortized, {"progress": False} | options))


def call(function, *first, **options):
    """A function of the package."""
    return function(*first, **renamed([function.__name__], options))


# ---------------------------------------------------------------------------------------------------------------------
# Recording

CASES = {}
ARGS = argparse.Namespace(save=None, load=None)
MOST = 64  # values kept of a tensor, to read differences from


def case(function):
    """Register a case."""
    CASES[function.__name__] = function
    return function


def digest(*parts):
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else str(part).encode())
    return found.hexdigest()


def tensor_entry(x):
    x = x.detach().cpu().contiguous()
    flat = x.reshape(-1).to(F64) if x.dtype != torch.complex64 else torch.view_as_real(x).reshape(-1).to(F64)
    kept = flat if len(flat) <= MOST else flat[torch.linspace(0, len(flat) - 1, MOST).long()]
    return {
        "sha": digest(str(x.dtype), tuple(x.shape), x.numpy().tobytes()),
        "shape": list(x.shape),
        "dtype": str(x.dtype),
        "values": kept.tolist(),
    }


class Recorder:
    """Entries of one case, and a seed of its own for each."""

    def __init__(self, name):
        self.name, self.entries = name, {}

    def seed(self, label):
        pyro.set_rng_seed(zlib.crc32(f"{self.name}/{label}".encode()) % 2**31)

    def put(self, label, value):
        """Record a tensor, number, text, or a nest of them."""
        if isinstance(value, torch.Tensor):
            self.entries[label] = tensor_entry(value)
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "fiub":
                self.entries[label] = tensor_entry(torch.as_tensor(np.ascontiguousarray(value)))
            else:
                self.put(label, str(value.tolist()))
        elif isinstance(value, (np.floating, np.integer, np.bool_)):
            self.put(label, value.item())
        elif isinstance(value, bool) or value is None or isinstance(value, str):
            self.entries[label] = {"sha": digest(type(value).__name__, value), "text": str(value)[:4000]}
        elif isinstance(value, (int, float)):
            self.entries[label] = tensor_entry(torch.tensor(float(value), dtype=F64))
        elif isinstance(value, dict):
            self.put(f"{label}: keys", str(sorted(map(str, value))))
            for key in sorted(value, key=str):
                self.put(f"{label}[{key}]", value[key])
        elif hasattr(value, "_asdict"):
            self.put(label, value._asdict())
        elif dataclasses.is_dataclass(value):
            self.put(label, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif isinstance(value, (list, tuple)):
            if value and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
                self.put(label, torch.tensor([float(v) for v in value], dtype=F64))
            elif len(value) == 0:
                self.put(label, "empty")
            else:
                for i, each in enumerate(value):
                    self.put(f"{label}[{i}]", each)
        else:
            raise TypeError(f"{label}: cannot record {type(value).__name__}")

    def of(self, label, function):
        """Record what a function returns at this label's own seed; of an error its type."""
        self.seed(label)
        try:
            value = function()
        except NotImplementedError:
            self.put(label, "raises NotImplementedError")
            return None
        except Exception as error:
            self.put(label, f"raises {type(error).__name__}")
            print(f"    {self.name} / {label}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            if os.environ.get("TRACE"):
                traceback.print_exc()
            return None
        self.put(label, value)
        return value

    def history(self, label, history):
        """All of a fit's record but its seconds."""
        for name in ("losses", "validation_losses", "residuals"):
            self.put(f"{label}.{name}", list(map(float, getattr(history, name))))
        self.put(f"{label}.iterations", history.iterations)
        self.put(f"{label}.converged", bool(history.converged))


def state_of(bridge):
    """Tensors of a state dict, whatever their names: hashes sorted."""
    tensors = [v for v in bridge.state_dict().values() if isinstance(v, torch.Tensor)]
    shas = sorted(tensor_entry(v)["sha"] for v in tensors)
    sums = sorted(float(v.to(F64).sum()) for v in tensors)
    return f"{len(tensors)} tensors {digest(*shas)}", sums


def law_of(bridge, context):
    return bridge() if context is None else bridge(context)


def probe(rec, bridge, history=None, *, contexts=None, save=True, fresh=None, label=""):
    """Everything public that a fitted bridge gives, each from a seed of its own.

    Args:
        contexts: Shape ``(4, context_dim)``.
        save: Whether it can be saved; else its state dict goes into ``fresh``.
    """
    p = f"{label}." if label else ""
    if history is not None:
        rec.history(f"{p}fit", history)
    text, sums = state_of(bridge)
    rec.put(f"{p}state", text)
    rec.put(f"{p}state sums", sums)
    rec.put(f"{p}density", bridge.density)
    like = bridge.like()
    one = None if contexts is None else contexts[0]
    rec.seed(f"{p}points")
    x = torch.randn(6, bridge.dim).to(like)
    batch = None if contexts is None else contexts
    xs = x[:4] if contexts is not None else x

    rec.of(f"{p}sample", lambda: law_of(bridge, one).sample((7,)))
    rec.of(f"{p}sample, batch", lambda: law_of(bridge, batch).sample((2,)))
    rec.of(f"{p}sample, expanded", lambda: law_of(bridge, one).expand((3,)).sample())
    rec.of(f"{p}draws", lambda: law_of(bridge, one).draws((7,)))
    rec.of(f"{p}draws, batch", lambda: law_of(bridge, batch).draws((2,)))
    rec.of(f"{p}log_prob", lambda: law_of(bridge, one).log_prob(x))
    rec.of(f"{p}log_prob, batch", lambda: law_of(bridge, batch).log_prob(xs))
    if bridge.has_rsample:
        rec.of(f"{p}rsample", lambda: law_of(bridge, one).rsample((7,)))
    rec.of(f"{p}redraw_rows", lambda: bridge.redraw_rows(xs, batch))
    rec.of(f"{p}transport", lambda: bridge.transport(xs, batch))
    rec.of(f"{p}paths", lambda: bridge.paths(3, 5, context=one))
    rec.of(f"{p}paths, batch", lambda: bridge.paths(3, 4, context=batch))
    for t in (0.0, 0.3, 0.9):
        rec.of(f"{p}drift at {t}", lambda: bridge.drift(t, xs, context=batch))
        if hasattr(bridge, "volatility"):
            rec.of(f"{p}volatility at {t}", lambda: bridge.volatility(t, xs, context=batch))

    def pushed():
        width = getattr(getattr(bridge, "codec", None), "latent_dim", None) or bridge.dim
        noise = torch.randn(4, width).to(like).requires_grad_()
        y = bridge.push(noise, context=batch)
        return y, torch.autograd.grad(y.square().sum(), noise)[0]

    def gradient():
        z = xs.clone().requires_grad_()
        return torch.autograd.grad(law_of(bridge, batch).log_prob(z).sum(), z)[0]

    def chained():
        law = bridge.proposal_law()
        rows = None if batch is None else batch
        value, log_q = law.draws_rows(4, rows)
        return value, log_q, law.redraw_rows(xs[:4], rows)

    rec.of(f"{p}push", pushed)
    if bridge.density == "marginal":
        rec.of(f"{p}gradient of log_prob", gradient)
    if bridge.density is not None:
        rec.of(f"{p}proposal_law", chained)
    for name in ("path_log_prob", "marginal_log_prob"):
        if hasattr(bridge, name):
            rec.of(f"{p}{name}", lambda: getattr(bridge, name)(xs, context=batch))
    if hasattr(bridge, "transport_back"):
        rec.of(f"{p}transport_back", lambda: bridge.transport_back(xs, context=batch))
    if hasattr(bridge, "coupling"):
        rec.of(f"{p}coupling", lambda: bridge.coupling(5, context=one))
    if hasattr(bridge, "plan"):
        rec.of(f"{p}plan.sample", lambda: bridge.plan(xs, context=batch).sample())
        rec.of(f"{p}plan.log_prob", lambda: bridge.plan(xs, context=batch).log_prob(xs + 0.1))
        rec.of(f"{p}plan_moments", lambda: bridge.plan_moments(xs, context=batch))
        rec.of(f"{p}log_prob_from", lambda: bridge.log_prob_from(xs + 0.1, xs))
        rec.of(f"{p}transport, t", lambda: bridge.transport(xs, context=batch, t=0.4))
        if contexts is None:
            rec.of(f"{p}condition.sample", lambda: bridge.condition([0], x[0, :1], x0=x[1]).sample((5,)))
            rec.of(f"{p}condition.log_prob", lambda: bridge.condition([0], x[0, :1], x0=x[1]).log_prob(x[:, 1:]))
    if isinstance(getattr(bridge, "sampler", None), bridges.Sampler):
        own, sampler = bridge.sampler.solver, bridge.sampler
        for solver in ("ancestral", "multistep", "euler", "heun"):
            sampler.solver = solver
            rec.of(f"{p}sample by {solver}", lambda: law_of(bridge, one).sample((4,)))
            rec.of(f"{p}paths by {solver}", lambda: bridge.paths(3, 4, context=one, solver=solver)[1])
        sampler.solver = own
    if hasattr(bridge, "drift_matrix"):
        rec.of(f"{p}drift_matrix", lambda: bridge.drift_matrix)
    if hasattr(bridge, "conditional_mean"):
        for name in ("conditional_mean", "conditional_covariance", "transition_probabilities"):
            rec.of(f"{p}{name}", lambda: getattr(bridge, name)(xs, context=batch))
    if isinstance(bridge, bridges.KernelLangevinBridge):
        rec.put(f"{p}bandwidths", [float(v) for v in (bridge.epsilon, bridge.context_epsilon) if v is not None])
        rec.of(f"{p}paths, own steps", lambda: bridge.paths(3, context=one))
    rec.of(f"{p}float32", lambda: in_float32(bridge, one))
    saved(rec, bridge, one, save, fresh, p, label)


def in_float32(bridge, context):
    """Draws of a copy in single precision; a copy through its state, so that the bridge stays as it is."""
    import copy

    other = copy.deepcopy(bridge).float()
    return law_of(other, None if context is None else context.float()).sample((3,))


def saved(rec, bridge, context, save, fresh, p, label):
    """Draws of the bridge's file: the one written by this run, or with --load the one in that folder."""
    name = f"{rec.name}{'.' + label if label else ''}.pt".replace(" ", "_").replace("/", "_")

    def roundtrip():
        if not save:
            fresh.load_state_dict(bridge.state_dict())
            pyro.set_rng_seed(77)
            return law_of(fresh, context).sample((5,))
        if ARGS.load:
            path = Path(ARGS.load) / name
        elif ARGS.save:
            path = Path(ARGS.save) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            bridge.save(path)
        else:
            path = Path(tempfile.mkdtemp()) / name
            bridge.save(path)
        found = []
        for kind in (bridges.Bridge, type(bridge)):
            loaded = kind.load(path)
            source = getattr(bridge, "source", None)
            if isinstance(source, torch.distributions.Distribution):  # code is not saved
                loaded.source = source
            pyro.set_rng_seed(77)
            found.append(law_of(loaded, context).sample((5,)))
            if getattr(getattr(loaded, "codec", None), "bijective", True):
                found.append(loaded.drift(0.4, found[-1], context=context))
            if loaded.density is not None:
                found += list(law_of(loaded, context).draws((4,)))
            found += [state_of(loaded)[0]]
        return found

    if save or fresh is not None:
        rec.of(f"{p}saved and loaded", roundtrip)


# ---------------------------------------------------------------------------------------------------------------------
# Bridges

QUICK = {"num_steps": 20, "learning_rate": 5e-4}
SOURCE = MultivariateNormal(torch.tensor([0.5, -0.5], dtype=F64), torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=F64))


def training_draws(num=60, dtype=F64):
    """Draws ``(num, 2)`` that depend on their contexts ``(num, 3)``."""
    context = torch.randn(num, 3, dtype=dtype)
    return context[:, :2] + 0.5 * torch.randn(num, 2, dtype=dtype), context


def a_bridge(name, build, *, source=None, context=False, both=True, options=None, dtype=F64, weights=False, **rest):
    """Register a case of one bridge: without context, and with one."""

    def run(rec, conditional):
        rec.seed("data")
        target, contexts = training_draws(dtype=dtype)
        given = dict(options or {})
        if source is not None:
            given["source"] = source() if callable(source) else source
        if weights:
            given["weights"] = torch.rand(len(target), dtype=dtype) + 0.1
        rec.seed("build")
        bridge = build(context_dim=3) if conditional else build()
        rec.seed("fit")
        history = fit(bridge, target, context=contexts if conditional else None, **given)
        fresh = None
        if not rest.get("save", True) and rest.get("fresh", True):
            rec.seed("build")
            fresh = build(context_dim=3) if conditional else build()
        keep = {"save": rest.get("save", True), "fresh": fresh}
        probe(rec, bridge, history, contexts=contexts[:4] + 0.1 if conditional else None, **keep)
        if "then" in rest:
            rest["then"](rec, bridge, contexts[:4] if conditional else None)

    if both or not context:
        CASES[name] = lambda rec: run(rec, False)
    if both or context:
        CASES[f"{name}, context"] = lambda rec: run(rec, True)


def build(kind, *first, **options):
    return lambda **more: make(kind, *first, **(options | more))


KLB = bridges.KernelLangevinBridge
for _scheme in ("data-aware", "split-step", "strang", "plain"):
    a_bridge(f"langevin {_scheme}", build(KLB, 2, num_steps=3, scheme=_scheme))


def langevin_posterior(rec, bridge, contexts):
    def log_likelihood(x):
        return -0.5 * (x - 0.3).square().sum(-1)

    for method in ("weights", "drift"):
        rec.seed(method)
        other = bridge.posterior(log_likelihood, method=method)
        rec.of(f"posterior by {method}", lambda: law_of(other, None if contexts is None else contexts[0]).sample((5,)))
    rows = None if contexts is None else contexts[0].expand(4, 3)
    one = None if contexts is None else contexts[0]
    rec.of("log_q_paths", lambda: bridge.log_q_paths(bridge.paths(4, context=one)[1], rows))


a_bridge(
    "langevin variable",
    build(KLB, 2, num_steps=3, scheme="plain", bandwidth_exponent=-0.5),
    then=langevin_posterior,
)
a_bridge("langevin defaults", build(KLB, 2), both=False, then=langevin_posterior)
a_bridge("langevin float32", build(KLB, 2), dtype=torch.float32)
a_bridge(
    "langevin weights",
    build(KLB, 2, metric="identity", step_size=0.8, epsilon=0.3, num_steps=4),
    weights=True,
    both=False,
)
a_bridge("langevin diffusion", build(KLB, 2, diffusion="identity", context_epsilon=None, num_steps=4))
a_bridge(
    "langevin source draws",
    build(KLB, 2, scheme="plain", num_steps=3),
    source=lambda: torch.randn(40, 2, dtype=F64),
    both=False,
)
a_bridge(
    "langevin source law",
    build(KLB, 2, scheme="plain", num_steps=3),
    source=SOURCE,
    both=False,
    save=False,
    fresh=False,
)

LSB, LSBM, BASS = bridges.LightSB, bridges.LightSBM, bridges.LightSBBM
MIX = {"num_components": 3, "epsilon": 0.5}
a_bridge("light", build(LSB, 2, **MIX), options=QUICK)
a_bridge("light full", build(LSB, 2, covariance="full", **MIX), options=QUICK)
a_bridge("light float32", build(LSB, 2, **MIX), options=QUICK, dtype=torch.float32)
a_bridge("light defaults", build(LSB, 2), options={"num_steps": 10}, both=False)
a_bridge("light dropout", build(LSB, 2, dropout=0.2, hidden=(16,), **MIX), options=QUICK, context=True, both=False)
a_bridge("light source law", build(LSB, 2, covariance="full", **MIX), source=SOURCE, options=QUICK)
a_bridge("light source draws", build(LSB, 2, **MIX), source=lambda: torch.randn(50, 2, dtype=F64), options=QUICK)
a_bridge(
    "light source point", build(LSB, 2, **MIX), source=lambda: torch.zeros(2, dtype=F64), options=QUICK, both=False
)
a_bridge("light weights", build(LSB, 2, **MIX), options=QUICK, weights=True)
a_bridge("light moments", build(LSB, 2, **MIX), options={"solver": "em", "num_steps": 30}, both=False)
a_bridge(
    "light moments full",
    build(LSB, 2, covariance="full", **MIX),
    options={"solver": "em", "num_steps": 30},
    weights=True,
    both=False,
)
a_bridge(
    "light moments source law",
    build(LSB, 2, **MIX),
    source=SOURCE,
    options={"solver": "em", "num_steps": 30, "num_draws": 300},
    both=False,
)
a_bridge(
    "light moments source draws",
    build(LSB, 2, covariance="full", **MIX),
    source=lambda: torch.randn(50, 2, dtype=F64),
    options={"solver": "em", "num_steps": 30},
    both=False,
)
a_bridge("light matching", build(LSBM, 2, **MIX), options=QUICK)
a_bridge(
    "light matching source law", build(LSBM, 2, covariance="full", **MIX), source=SOURCE, options=QUICK, both=False
)


def bass_figures(rec, bridge, contexts):
    if contexts is None:
        x = torch.randn(8, 2, dtype=F64)
        rec.of("dual", lambda: bridge.dual(x, x + 0.2))
        rec.put("beta", bridge.beta)
        rec.put("scores", {str(k): v for k, v in bridge.scores.items()})


a_bridge("bass", build(BASS, 2, beta=5.0, **MIX), options=QUICK, then=bass_figures)
a_bridge("bass full", build(BASS, 2, beta=5.0, covariance="full", **MIX), options=QUICK)
a_bridge("bass source law", build(BASS, 2, beta=5.0, **MIX), source=SOURCE, options=QUICK, then=bass_figures)
a_bridge(
    "bass source draws",
    build(BASS, 2, beta=5.0, **MIX),
    source=lambda: torch.randn(50, 2, dtype=F64),
    options=QUICK,
    both=False,
)
a_bridge(
    "bass batch",
    build(BASS, 2, beta=5.0, **MIX),
    options={"solver": "batch", "num_steps": 10},
    both=False,
    then=bass_figures,
)
a_bridge(
    "bass batch source law",
    build(BASS, 2, beta=5.0, covariance="full", **MIX),
    source=SOURCE,
    options={"solver": "batch", "num_steps": 8, "num_draws": 200},
    both=False,
)
a_bridge(
    "bass alternating",
    build(BASS, 2, beta=5.0, **MIX),
    options={"solver": "alternating", "num_steps": 60, "learning_rate": 5e-4},
    both=False,
)
a_bridge(
    "bass alternating source law",
    build(BASS, 2, beta=5.0, **MIX),
    source=SOURCE,
    options={"solver": "alternating", "num_steps": 60, "learning_rate": 5e-4},
    both=False,
)
a_bridge("bass auto", build(BASS, 2, beta="auto", **MIX), options={"num_steps": 10}, both=False, then=bass_figures)
a_bridge("bass infinite", build(BASS, 2, beta=math.inf, **MIX), options=QUICK, both=False)

VSDM, SGM, SMOOTHED = bridges.VSDM, bridges.SGM, bridges.SmoothedBridge
NET = {"hidden": (16, 16)}


def rates(rec, bridge, contexts):
    rec.of("rates_history", lambda: torch.as_tensor(bridge.rates_history))


a_bridge("vsdm", build(VSDM, 2, **NET), options=QUICK)
a_bridge("vsdm stochastic", build(VSDM, 2, drift="stochastic", **NET), options=QUICK | {"num_stages": 5}, then=rates)
a_bridge(
    "vsdm tolerance", build(VSDM, 2, drift="tolerance", preconditioning="scalar", **NET), options=QUICK, both=False
)
a_bridge(
    "vsdm given drift",
    build(VSDM, 2, drift=torch.tensor([[1.2, 0.1], [0.1, 0.9]], dtype=F64), **NET),
    options=QUICK,
    both=False,
)
a_bridge("vsdm analytic", build(VSDM, 2, covariance="analytic", start="conditional", **NET), options=QUICK)
a_bridge("vsdm float32", build(VSDM, 2, **NET), options=QUICK, dtype=torch.float32, both=False)
a_bridge(
    "vsdm weights", build(VSDM, 2, **NET), options=QUICK | {"ema": None, "held_out": 0.2}, weights=True, both=False
)
a_bridge("sgm", build(SGM, 2, **NET), options=QUICK)
a_bridge("smoothed", build(SMOOTHED, 2, **NET), options=QUICK)
a_bridge("smoothed learnt", build(SMOOTHED, 2, epsilon=30.0, covariance="learnt", start="moment", **NET), options=QUICK)
a_bridge("smoothed weights", build(SMOOTHED, 2, **NET), options=QUICK, weights=True, both=False)

DSB = bridges.DSB
CHAIN = QUICK | {"num_iterations": 2, "num_pairs": 200}


def backward(rec, bridge, contexts):
    x = torch.linspace(-1, 1, 8, dtype=F64).reshape(4, 2)
    rec.of("drift, backward", lambda: bridge.drift(0.4, x, context=contexts, backward=True))


a_bridge("dsb imf", build(DSB, 2, chain_steps=4, **NET), options=CHAIN, then=backward)
a_bridge("dsb ipf", build(DSB, 2, chain_steps=4, method="ipf", **NET), options=CHAIN | {"refresh": 7}, then=backward)
a_bridge(
    "dsb triangular",
    build(DSB, 2, epsilon=0.5, chain_steps=5, schedule="triangular", variance="reference", **NET),
    options=CHAIN,
)
a_bridge("dsb source law", build(DSB, 2, chain_steps=4, **NET), source=SOURCE, options=CHAIN)
a_bridge(
    "dsb source draws",
    build(DSB, 2, chain_steps=4, **NET),
    source=lambda: torch.randn(50, 2, dtype=F64),
    options=CHAIN | {"pairs": "sinkhorn"},
    both=False,
)
a_bridge(
    "dsb ipf ou drift",
    build(DSB, 2, chain_steps=4, method="ipf", **NET),
    options=CHAIN | {"reference": "ou", "loss": "drift", "warm_start": False},
    both=False,
)
a_bridge(
    "dsb ipf source law",
    build(DSB, 2, chain_steps=4, method="ipf", variance="reference", **NET),
    source=SOURCE,
    options=CHAIN,
    both=False,
)
a_bridge("dsb weights", build(DSB, 2, chain_steps=4, **NET), options=CHAIN | {"ema": None}, weights=True, both=False)

LATENT, PCA, AE, PAIR = bridges.LatentBridge, bridges.PCACodec, bridges.AutoencoderCodec, bridges.PairCodec


def latent(inner, codec):
    return lambda **more: make(LATENT, inner(**more), codec=codec())


def codec_figures(rec, bridge, contexts):
    def figures():
        x = torch.randn(5, bridge.dim, dtype=F64)
        z = bridge.codec.encode(x)
        return z, bridge.codec.decode(z), bridge.codec.draw(z)

    rec.of("codec", figures)
    rec.of("codec.log_abs_det", lambda: bridge.codec.log_abs_det(torch.randn(5, bridge.codec.latent_dim, dtype=F64)))


def asinh():
    return make(
        PAIR, encode=torch.sinh, decode=torch.asinh, data_dim=2, latent_dim=2, bijective=True,
        log_abs_det=lambda z: -0.5 * z.square().log1p().sum(-1),
    )  # fmt: skip


def narrow():
    return make(PAIR, encode=lambda x: x[:, :1], decode=lambda z: torch.cat([z, -z], 1), data_dim=2, latent_dim=1)


AE_OPTIONS = {"codec_options": {"num_steps": 20}}
a_bridge("latent light pca", latent(build(LSB, 2, **MIX), build(PCA, 2)), options=QUICK, then=codec_figures)
a_bridge(
    "latent light pca source law", latent(build(LSB, 2, **MIX), build(PCA, 2)), source=SOURCE, options=QUICK, both=False
)
a_bridge(
    "latent light pca lossy",
    latent(build(LSB, 1, **MIX), build(PCA, 1, residual=True)),
    options=QUICK,
    then=codec_figures,
)
a_bridge(
    "latent light pca plain",
    latent(build(LSB, 2, **MIX), build(PCA, whiten=False)),
    options=QUICK,
    weights=True,
    both=False,
)
a_bridge("latent smoothed pca", latent(build(SMOOTHED, 2, **NET), build(PCA, 2)), options=QUICK)
a_bridge("latent vsdm pca", latent(build(VSDM, 2, **NET), build(PCA, 2)), options=QUICK, both=False)
a_bridge("latent dsb pca", latent(build(DSB, 2, chain_steps=4, **NET), build(PCA, 2)), options=CHAIN, both=False)
a_bridge("latent langevin pca", latent(build(KLB, 2, scheme="plain", num_steps=3), build(PCA, 2)), both=False)
a_bridge(
    "latent vsdm autoencoder",
    latent(build(VSDM, 1, **NET), build(AE, 1, hidden=(16,))),
    options=QUICK | AE_OPTIONS,
    then=codec_figures,
)
a_bridge("latent light pair", latent(build(LSB, 2, **MIX), asinh), options=QUICK, save=False, then=codec_figures)
a_bridge("latent vsdm pair", latent(build(VSDM, 2, **NET), asinh), options=QUICK, save=False, both=False)
a_bridge("latent light pair lossy", latent(build(LSB, 1, **MIX), narrow), options=QUICK, save=False, both=False)

TAILS = bridges.TailMatched


def tails(inner, **options):
    return lambda **more: make(TAILS, inner(**more), **options)


def tail_figures(rec, bridge, contexts):
    rec.put("tails", [bridge.loc, bridge.scale, bridge.lower, bridge.upper])


a_bridge("tails light", tails(build(LSB, 2, **MIX), df=3.0), options=QUICK, then=tail_figures)
a_bridge("tails light source law", tails(build(LSB, 2, **MIX), df=20.0), source=SOURCE, options=QUICK, both=False)
a_bridge("tails bass", tails(build(BASS, 2, **MIX), df=3.0), options=QUICK, then=tail_figures)
a_bridge("tails langevin", tails(build(KLB, 2, scheme="plain", num_steps=3), df=(3.0, math.inf)), both=False)
a_bridge("tails vsdm", tails(build(VSDM, 2, **NET), df="auto"), options=QUICK, both=False, then=tail_figures)


@case
def latent_default(rec):
    rec.seed("data")
    x = torch.randn(80, 3, dtype=F64) @ torch.randn(3, 5, dtype=F64)
    bridge = make(LATENT)
    rec.seed("fit")
    history = fit(bridge, x, num_steps=10, codec_options={"num_steps": 15})
    probe(rec, bridge, history)


@case
def latent_pretrained(rec):
    rec.seed("data")
    x = torch.randn(80, 2, dtype=F64)
    bridge = make(LATENT, make(LSB, 1, **MIX), codec=make(PCA, 1))
    rec.seed("fit")
    history = fit(bridge, x, pretrain=3 * torch.randn(50, 2, dtype=F64), **QUICK)
    probe(rec, bridge, history)


@case
def reconstruction(rec):
    rec.seed("data")
    x = torch.randn(200, 3, dtype=F64) @ torch.randn(3, 6, dtype=F64) + 0.1 * torch.randn(200, 6, dtype=F64)

    def of(codec, **options):
        found = call(bridges.reconstruction_report, x, codec, progress=False, **options)
        return found.dims, found.rmse, found.explained, found.choose(), str(found)

    rec.of("pca", lambda: of(lambda k: make(PCA, k)))
    rec.of(
        "autoencoder",
        lambda: of(lambda k: make(AE, k, hidden=(16,)), dims=[1, 3], **renamed(["fit"], {"num_steps": 20})),
    )


@case
def tail_index(rec):
    rec.seed("data")
    x = StudentT(torch.tensor(3.0, dtype=F64)).sample((4000, 2))
    rec.of("index", lambda: call(bridges.tail_index, x))
    rec.of("index, weights", lambda: call(bridges.tail_index, x, fraction=0.1, weights=torch.rand(4000, dtype=F64)))
    t = make(
        bridges.TailTransform,
        *(torch.tensor(v, dtype=F64) for v in ([0.0, 1.0], [1.0, 2.0], [3.0, math.inf], [2.0, 4.0])),
    )
    rec.of("transform", lambda: (t(x[:5]), t.inv(x[:5]), t.log_abs_det_jacobian(x[:5], t(x[:5])), t.curvature(x[:5])))


@case
def high_dimension(rec):
    """Bridges in 25 dimensions: other branches than the plane's."""
    rec.seed("data")
    x = torch.randn(150, 25, dtype=F64) @ torch.randn(25, 25, dtype=F64) / 5
    for name, bridge, options in (
        ("light", make(LSB, 25, num_components=4, covariance="full"), QUICK),
        ("bass", make(BASS, 25, num_components=4), QUICK | {"num_steps": 5}),
        ("vsdm", make(VSDM, 25, **NET), QUICK),
        ("smoothed", make(SMOOTHED, 25, **NET), QUICK),
        ("dsb", make(DSB, 25, chain_steps=4, **NET), CHAIN),
        ("langevin", make(KLB, 25, num_steps=3), {}),
    ):
        rec.seed(name)
        history = fit(bridge, x, **options)
        rec.history(name, history)
        rec.of(f"{name}.sample", lambda: bridge().sample((3,)))
        rec.of(f"{name}.draws", lambda: bridge().draws((3,)))
        saved(rec, bridge, None, True, None, f"{name}.", name)


@case
def fitted_on_laws(rec):
    """Targets that are distributions, checkpoints, and a second fit of the same bridge."""
    for name, bridge, options in (
        ("light", make(LSB, 2, **MIX), QUICK | {"num_draws": 300}),
        ("light law to law", make(LSB, 2, **MIX), QUICK | {"num_draws": 300, "source": SOURCE}),
        ("matching", make(LSBM, 2, **MIX), QUICK | {"num_draws": 300, "source": SOURCE}),
        ("bass", make(BASS, 2, **MIX), QUICK | {"num_draws": 300}),
        ("vsdm", make(VSDM, 2, **NET), QUICK | {"num_draws": 300}),
        ("smoothed", make(SMOOTHED, 2, **NET), QUICK | {"num_draws": 300}),
        ("dsb", make(DSB, 2, chain_steps=4, **NET), CHAIN | {"num_draws": 300}),
        ("dsb ipf", make(DSB, 2, chain_steps=4, method="ipf", **NET), CHAIN | {"num_draws": 300}),
        ("langevin", make(KLB, 2, num_steps=3), {"num_draws": 50}),
        ("latent", make(LATENT, make(LSB, 2, **MIX), codec=make(PCA, 2)), QUICK | {"num_draws": 300}),
        ("tails", make(TAILS, make(LSB, 2, **MIX), df=4.0), QUICK | {"num_draws": 300}),
    ):
        law = SOURCE if "law" not in name else MultivariateNormal(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64))
        for again in ("first", "second"):
            path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
            rec.seed(f"{name}, {again}")
            history = fit(bridge, law, checkpoint=path, **options)
            rec.history(f"{name}, {again}", history)
            rec.of(f"{name}, {again}, sample", lambda: bridge().sample((4,)))

            def kept():
                loaded = bridges.Bridge.load(path)
                if isinstance(getattr(bridge, "source", None), torch.distributions.Distribution):
                    loaded.source = bridge.source
                return loaded().sample((4,))

            rec.of(f"{name}, {again}, checkpoint", kept)


@case
def embeddings(rec):
    """A module of the user's on the context."""
    rec.seed("data")
    target, contexts = training_draws()
    for kind, options in ((LSB, QUICK), (BASS, QUICK), (VSDM, QUICK), (SMOOTHED, QUICK), (DSB, CHAIN)):
        name = kind.__name__
        rec.seed(f"{name}, build")
        module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
        extra = {"num_components": 3} if kind in (LSB, BASS) else {"chain_steps": 4} if kind is DSB else {}
        bridge = make(kind, 2, context_dim=3, embedding=module, hidden=(16,), **extra)
        rec.seed(f"{name}, fit")
        rec.history(name, fit(bridge, target, context=contexts, **options))
        rec.of(f"{name}.sample", lambda: bridge(contexts[:4]).sample((3,)))
        rec.of(f"{name}.draws", lambda: bridge(contexts[:4]).draws((3,)))


@case
def bridges_in_models(rec):
    """A bridge as a site of a Pyro model."""
    rec.seed("data")
    target, contexts = training_draws()
    plain, conditional = make(LSB, 2, **MIX), make(VSDM, 2, context_dim=3, **NET)
    rec.seed("fit")
    fit(plain, target, **QUICK)
    fit(conditional, target, context=contexts, **QUICK)

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("a", plain()), pyro.sample("b", conditional(contexts[:4]))

    rec.of("model", model)
    rec.of("log_prob", lambda: pyro.poutine.trace(pyro.poutine.block(model, hide=["b"])).get_trace().log_prob_sum())


# ---------------------------------------------------------------------------------------------------------------------
# Kernels

Y = torch.tensor([1.2, 0.3, 2.1, 0.8], dtype=F64)
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=F64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=F64)
SMALL = SCHOOLS[:5] / 10
ZERO = torch.zeros((), dtype=F64)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu[..., None], 1.0), obs=y)


def two_modes(y):
    z = pyro.sample("z", dist.Normal(ZERO, 3.0))
    w = pyro.sample("w", dist.Normal(ZERO, 1.0))
    pyro.deterministic("sum", z + w)
    pyro.sample("y", dist.Normal(z * z + 0.3 * w, 0.7), obs=y)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(ZERO + 5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel():
    v = pyro.sample("v", dist.Normal(ZERO, 3.0))
    with pyro.plate("xs", 4):
        pyro.sample("x", dist.Normal(ZERO, (v / 2).exp()))


def mixture(x):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2, dtype=F64)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(weight))
        pyro.deterministic("centre", Vindex(loc)[..., which])
        pyro.sample("x", dist.Normal(Vindex(loc)[..., which], 1.0), obs=x)


def hmm(x):
    stay = pyro.sample("stay", dist.Dirichlet(torch.ones(2, 2, dtype=F64)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 1.0).to_event(1))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(stay)[..., state, :]))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(loc)[..., state], 1.0), obs=x[t])


def regression(x, y):  # wrong for a batch of betas: the vmap route
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def control_flow(y):  # the loop route
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0), obs=y)


def two_modes_potential(params):
    z = params["z"]
    shift = 4.0 * torch.nn.functional.one_hot(torch.tensor(0), z.shape[-1]).to(z.dtype)
    one, two = -0.5 * (z + shift).square().sum(-1), -0.5 * (z - shift).square().sum(-1)
    return -torch.logaddexp(math.log(0.3) + one, math.log(0.7) + two)


def potential_starts(num):
    z = torch.randn(num, 2, dtype=F64)
    z[:, 0] += torch.where(torch.arange(num) % 2 == 0, -4.0, 4.0)
    return {"z": z}


MATRIX = torch.linspace(-1, 1, 21, dtype=F64).reshape(7, 3).cos()
CHAINS = {"num_samples": 24, "num_chains": 6, "warmup_steps": 16, "disable_progbar": True}


def run_chains(rec, kernel, *args, label="", **options):
    """A run of a kernel, and all that it says."""
    p = f"{label}." if label else ""
    mcmc = make(infer.MCMC, kernel, **(CHAINS | options))
    rec.seed(f"{p}run")
    mcmc.run(*args)
    chains(rec, mcmc, p)
    rec.of(f"{p}describe", kernel.describe)
    population = getattr(kernel, "population", None)
    if population is not None:
        for name in ("points", "log_weights", "log_evidence", "log_evidence_error", "ess_share"):
            rec.of(f"{p}population.{name}", lambda: getattr(population, name))
    return mcmc


def chains(rec, mcmc, p):
    rec.put(f"{p}samples", mcmc.get_samples(group_by_chain=True))
    rec.of(f"{p}resampled", lambda: mcmc.get_samples(num_samples=10))
    rec.of(f"{p}discrete", lambda: mcmc.get_discrete_samples(group_by_chain=True))
    rec.of(f"{p}diagnostics", mcmc.diagnostics)
    rec.put(f"{p}sample_stats", mcmc.sample_stats)
    rec.of(f"{p}evaluations", lambda: mcmc.evaluations)

    def summary():
        with contextlib.redirect_stdout(io.StringIO()) as text:
            mcmc.summary()
        return text.getvalue()

    rec.of(f"{p}summary", summary)
    rec.put(f"{p}random state", digest(torch.get_rng_state().numpy().tobytes()))


KL, SIZES = infer.KernelLangevin, {"num_particles": 150}


@case
def kernel_conjugate(rec):
    for local in ("hmc", "mala", None):
        run_chains(rec, make(KL, conjugate, local=local, **SIZES), Y, label=str(local))


@case
def kernel_two_modes(rec):
    run_chains(rec, make(KL, two_modes, **SIZES), torch.tensor(4.0, dtype=F64))
    run_chains(rec, make(KL, two_modes, start="prior", **SIZES), torch.tensor(4.0, dtype=F64), label="prior")


@case
def kernel_options(rec):
    y = torch.tensor(4.0, dtype=F64)
    options = {"epsilons": (1.0, 8.0), "index_time": 2, "min_bridge_probability": 0.3}
    run_chains(rec, make(KL, two_modes, **options, **SIZES), y, label="moves")
    given = {"bridge": 0.2, "index": 0.3, "local": 0.5}
    run_chains(rec, make(KL, two_modes, probabilities=given, **SIZES), y, label="probabilities")
    rec.seed("starts")
    starts = {"z": torch.randn(6, dtype=F64), "w": torch.randn(6, dtype=F64)}
    seen = []
    run_chains(
        rec, make(KL, two_modes, **SIZES), y, label="hook", initial_params=starts, save_params=["z", "sum"], num_samples=8,
        hook_fn=lambda kernel, params, stage, i: seen.append(params["z"].sum() + i),
    )  # fmt: skip
    rec.put("hook", torch.stack(seen))


@case
def kernel_hierarchical(rec):
    run_chains(rec, make(KL, schools, **SIZES), SCHOOLS, SIGMA)
    run_chains(rec, make(KL, funnel, **SIZES), label="funnel")
    run_chains(rec, make(KL, funnel, reparam=None, **SIZES), label="funnel as it is")


@case
def kernel_enumerated(rec):
    run_chains(rec, make(KL, mixture, **SIZES), SMALL)
    run_chains(rec, make(KL, hmm, **SIZES), SMALL, label="hmm", num_samples=10)


@case
def kernel_routes(rec):
    run_chains(rec, make(KL, regression, **SIZES), MATRIX, SCHOOLS[:7] / 10, label="vmap")
    run_chains(
        rec, make(KL, control_flow, num_particles=50), SMALL, label="loop", num_samples=4, warmup_steps=4, num_chains=2
    )


@case
def kernel_potential(rec):
    rec.seed("starts")
    points = potential_starts(200)["z"]
    run_chains(
        rec,
        make(KL, potential_fn=two_modes_potential, start=points, num_particles=200),
        initial_params=potential_starts(6),
    )
    run_chains(
        rec, make(KL, potential_fn=two_modes_potential, **SIZES), initial_params=potential_starts(6), label="search"
    )


@case
def kernel_under_pyro(rec):
    """Pyro's own runner, one chain in its own process's main thread."""
    import pyro.infer.mcmc.api as api

    for name, kernel, args in (
        ("langevin", make(KL, two_modes, **SIZES), (torch.tensor(4.0, dtype=F64),)),
        ("mh", make(infer.BridgeMH, conjugate, **SIZES), (Y,)),
    ):
        rec.seed(name)
        mcmc = api.MCMC(kernel, num_samples=12, warmup_steps=6, disable_progbar=True)
        mcmc.run(*args)
        rec.put(f"{name}.samples", mcmc.get_samples())
        rec.of(f"{name}.diagnostics", mcmc.diagnostics)


MH = infer.BridgeMH
POINT = torch.tensor(4.0, dtype=F64)


def fitted_bridge(rec, kind, *first, rows=None, label="bridge", **options):
    """A bridge in the coordinates of a small model, for BridgeMH."""
    rec.seed(label)
    bridge = make(kind, *first, **options)
    fit(bridge, rows, **(CHAIN if kind is DSB else {} if kind is KLB else QUICK | {"num_steps": 40}))
    return bridge


def around(num=200, dim=1):
    """Draws about where `conjugate`'s posterior lies."""
    return 1.0 + 0.6 * torch.randn(num, dim, dtype=F64)


def mh_facts(rec, kernel, p):
    pilot = kernel.pilot
    for name in ("share", "k_hat", "log_evidence"):
        rec.of(f"{p}.pilot.{name}", lambda: getattr(pilot, name))


@case
def mh_default(rec):
    for name, model, args in (
        ("conjugate", conjugate, (Y,)),
        ("two modes", two_modes, (POINT,)),
        ("schools", schools, (SCHOOLS, SIGMA)),
    ):
        kernel = make(MH, model, **SIZES)
        run_chains(rec, kernel, *args, label=name)
        mh_facts(rec, kernel, name)


@case
def mh_given_light(rec):
    rec.seed("rows")
    light = fitted_bridge(rec, LSB, 1, rows=around(), num_components=2, covariance="full")
    for name, options in (
        ("hmc", {}), ("mala", {"local": "mala"}), ("alone", {"local": None}), ("tries", {"num_proposals": 4}),
        ("probability", {"bridge_probability": 0.4}),
    ):  # fmt: skip
        kernel = make(MH, conjugate, bridge=light, **options, **SIZES)
        run_chains(rec, kernel, Y, label=name)
        mh_facts(rec, kernel, name)


@case
def mh_paths(rec):
    rec.seed("rows")
    rows = around()
    for name, kind, options in (
        ("vsdm", VSDM, NET), ("sgm", SGM, NET), ("smoothed", SMOOTHED, NET), ("dsb", DSB, NET | {"chain_steps": 4}),
        ("plain", KLB, {"scheme": "plain", "num_steps": 3}),
    ):  # fmt: skip
        bridge = fitted_bridge(rec, kind, 1, rows=rows, label=name, **options)
        if hasattr(bridge, "sampler"):
            bridge.sampler.path_steps = 5
        for num_paths in (1, 3):
            kernel = make(MH, conjugate, bridge=bridge, num_paths=num_paths, **SIZES)
            run_chains(rec, kernel, Y, label=f"{name}, {num_paths}")
            mh_facts(rec, kernel, f"{name}, {num_paths}")


@case
def mh_source_law(rec):
    rec.seed("rows")
    law = Independent(Normal(torch.zeros(1, dtype=F64), 1.0), 1)
    for name, bridge in (
        ("light", make(LSB, 1, num_components=2)), ("bass", make(BASS, 1, num_components=2, beta=5.0)),
        ("tails", make(TAILS, make(LSB, 1, num_components=2), df=20.0)),
        ("latent", make(LATENT, make(LSB, 1, num_components=2), codec=make(PCA, 1))),
    ):  # fmt: skip
        rec.seed(name)
        fit(bridge, around(), source=law, **QUICK)
        kernel = make(MH, conjugate, bridge=bridge, **SIZES)
        run_chains(rec, kernel, Y, label=name)


@case
def mh_fitted_in_warmup(rec):
    quick = {"fit_options": {"num_steps": 30}}
    for name, given, options in (
        ("function", lambda dim: make(LSB, dim, num_components=2), quick),
        ("template", make(BASS, 1, num_components=2, beta=5.0), quick),
        ("paths", make(KLB, 1, scheme="plain", num_steps=3), {}),
        ("vsdm", make(VSDM, 1, **NET), quick),
        ("dsb", make(DSB, 1, chain_steps=4, **NET), {"fit_options": CHAIN}),
        ("latent", make(LATENT, make(LSB, 1, num_components=2), codec=make(PCA, 1)), quick),
        ("tails", make(TAILS, make(LSB, 1, num_components=2), df=10.0), quick),
    ):
        options = {k: renamed(["fit"], v) for k, v in options.items()}
        kernel = make(MH, conjugate, bridge=given, **options, **SIZES)
        run_chains(rec, kernel, Y, label=name)
        mh_facts(rec, kernel, name)


@case
def mh_context(rec):
    rec.seed("rows")
    context = torch.randn(200, 1, dtype=F64)
    for name, kind, options in (("light", LSB, {"num_components": 2, "hidden": (8,)}), ("vsdm", VSDM, NET)):
        rec.seed(name)
        bridge = make(kind, 1, context_dim=1, **options)
        fit(bridge, around() + context, context=context, **QUICK)
        kernel = make(MH, conjugate, bridge=bridge, context=torch.zeros(1, dtype=F64), **SIZES)
        run_chains(rec, kernel, Y, label=name)


@case
def mh_hierarchical_and_enumerated(rec):
    run_chains(rec, make(MH, funnel, **SIZES), label="funnel")
    run_chains(rec, make(MH, mixture, **SIZES), SMALL, label="mixture")


@case
def mh_potential(rec):
    rec.seed("starts")
    starts = potential_starts(6)
    light = fitted_bridge(rec, LSB, 2, rows=potential_starts(300)["z"], num_components=2, covariance="full")
    run_chains(
        rec, make(MH, potential_fn=two_modes_potential, bridge=light, **SIZES), initial_params=starts, label="given"
    )
    run_chains(rec, make(MH, potential_fn=two_modes_potential, **SIZES), initial_params=starts, label="default")


@case
def log_joints(rec):
    """The batched log joint of models on every route."""
    for name, model, args in (
        ("conjugate", conjugate, (Y,)), ("schools", schools, (SCHOOLS, SIGMA)), ("mixture", mixture, (SMALL,)),
        ("hmm", hmm, (SMALL,)), ("regression", regression, (MATRIX, SCHOOLS[:7] / 10)), ("loop", control_flow, (SMALL,)),
        ("ark", datasets.ark, (torch.randn(12, 2, dtype=F64).cos(), SCHOOLS.repeat(2)[:12] / 10)),
        ("centred", datasets.eight_schools_centered, (SIGMA, SCHOOLS)),
        ("non-centred", datasets.eight_schools_noncentered, (SIGMA, SCHOOLS)),
        ("gauss mix", datasets.low_dim_gauss_mix, (SCHOOLS / 10,)),
        ("gauss mix unordered", datasets.low_dim_gauss_mix_unordered, (SCHOOLS / 10,)),
        ("kidscore", datasets.kidscore_interaction, (MATRIX[:, :2].abs(), SCHOOLS[:7].abs())),
    ):  # fmt: skip
        rec.seed(f"{name}, build")
        try:
            joint = call(infer.log_joint, model, args=args)
        except Exception as error:
            rec.put(f"{name}.raises", type(error).__name__)
            print(f"    log_joints / {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        rec.put(f"{name}.route", joint.route)
        rec.seed(f"{name}, points")
        z = joint.start(5)
        rec.put(f"{name}.start", z)
        rec.of(f"{name}.log_prob", lambda: joint.log_prob(z))
        rec.of(f"{name}.value_and_grad", lambda: joint.value_and_grad(z))
        rec.of(f"{name}.constrain", lambda: joint.constrain(z))
        rec.of(f"{name}.deterministic", lambda: joint.deterministic(z))
        rec.of(f"{name}.discrete", lambda: joint.discrete(z))
        rec.of(f"{name}.unpack", lambda: joint.pack(joint.unpack(z)))
        rec.of(f"{name}.prior", lambda: joint.prior(4))


# ---------------------------------------------------------------------------------------------------------------------
# Amortised posteriors


def iid(num=5):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", num):
        pyro.sample("y", dist.Normal(mu, 0.5))


def bounded(num=4):
    p = pyro.sample("p", dist.Uniform(-1.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", num):
        pyro.sample("y", dist.Normal(p, scale))


def bimodal():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.square().sum(-1, keepdim=True), 0.02).to_event(1))


def plate_latents(num=3):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", num):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0))


def needs_vmap(x):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1))


def two_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(mu, 0.5))
    pyro.sample("b", dist.Normal(mu, 1.0).expand([2]).to_event(1))


def black_box():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return mu + 0.3 * torch.randn(3)


AMORT = infer.AmortizedPosterior
LEARN = {"num_simulations": 120, "num_copies": 2, "num_steps": 20}


def an_amortized(rec, model, *args, label="", options=None, **given):
    p = f"{label}." if label else ""
    rec.seed(f"{p}build")
    amortized = make(AMORT, model, **given)
    rec.seed(f"{p}fit")
    history = learn(amortized, *args, **(LEARN | (options or {})))
    rec.history(f"{p}fit", history)
    text, sums = state_of(amortized.bridge)
    rec.put(f"{p}state", text)
    rec.put(f"{p}state sums", sums)
    rec.put(f"{p}scores", dict(amortized.scores))
    rec.put(f"{p}exchangeable", dict(amortized.exchangeable))
    rec.put(f"{p}simulations", amortized.simulations)
    if given.get("embedding") is None:
        context = torch.zeros(amortized.bridge.context_dim).to(amortized.bridge.like())
        saved(rec, amortized.bridge, context, True, None, p, label)
    return amortized


def probe_posterior(rec, posterior, p, *, mcmc=True, density=True):
    draws = rec.of(f"{p}.sample", lambda: posterior.sample(12))
    rec.of(f"{p}.log_prob", lambda: posterior.log_prob(draws))
    rec.of(f"{p}.get_samples", lambda: posterior.get_samples(num_samples=6))
    if not density:
        return
    weighted = []

    def importance():
        found = posterior.importance(200)
        weighted.append(found)
        name = next(iter(found.sites))
        return found, found.weights, found.expectation(found.sites[name]), found.resample(5)

    rec.of(f"{p}.importance", importance)
    if weighted and weighted[0].log_weights.dim() == 1:
        rec.of(f"{p}.psis", lambda: call(diagnostics.psis, weighted[0]))
        rec.of(f"{p}.psis, text", lambda: repr(call(diagnostics.psis, weighted[0])))
    if mcmc:
        made = []

        def run():
            made.append(posterior.mcmc(num_samples=8, num_chains=6, warmup_steps=8, num_proposals=128))
            return made[0].kernel.describe()

        rec.of(f"{p}.mcmc", run)
        if made:
            chains(rec, made[0], f"{p}.mcmc.")


IID_Y = torch.tensor([1.0, 0.5, 1.4, 0.2, 1.1])


def guided(posterior):
    return pyro.infer.Predictive(posterior.model, guide=posterior, num_samples=6)()


@case
def amortized_light(rec):
    amortized = an_amortized(rec, iid, bridge="light")
    probe_posterior(rec, amortized.condition(IID_Y), "one")
    probe_posterior(rec, amortized.condition(torch.stack([IID_Y, IID_Y + 0.5, -IID_Y])), "batch")
    probe_posterior(rec, amortized.condition(IID_Y + 4.0), "far")
    rec.of("guide", lambda: guided(amortized.condition(IID_Y)))
    rec.seed("again")
    learn(amortized, simulations=amortized.simulations, num_steps=10, num_copies=0)
    rec.of("learnt again", lambda: amortized.condition(IID_Y).sample(6))


@case
def amortized_bounded(rec):
    amortized = an_amortized(rec, bounded, bridge="light")
    probe_posterior(rec, amortized.condition(IID_Y[:4]), "one")
    probe_posterior(rec, amortized.condition(torch.stack([IID_Y[:4], IID_Y[1:]])), "batch")
    rec.of("guide", lambda: guided(amortized.condition(IID_Y[:4])))


@case
def amortized_default(rec):
    """Both bridges tried, by held-out score."""
    amortized = an_amortized(rec, bounded, options={"num_steps": 10})
    probe_posterior(rec, amortized.condition(IID_Y[:4]), "one", mcmc=False)


@case
def amortized_vsdm(rec):
    def small(dim, context_dim):
        bridge = make(VSDM, dim, context_dim=context_dim, **NET)
        bridge.sampler.path_steps = 5
        return bridge

    amortized = an_amortized(rec, iid, bridge=small)
    probe_posterior(rec, amortized.condition(IID_Y), "one")
    probe_posterior(rec, amortized.condition(torch.stack([IID_Y, IID_Y + 0.5])), "batch")
    rec.of("guide", lambda: guided(amortized.condition(IID_Y)))
    amortized = an_amortized(rec, bounded, bridge=make(VSDM, 1, **NET), label="template")
    probe_posterior(rec, amortized.condition(IID_Y[:4]), "template.one", mcmc=False)


@case
def amortized_dsb(rec):
    amortized = an_amortized(
        rec, iid, bridge=lambda dim, context_dim: make(DSB, dim, context_dim=context_dim, chain_steps=4, **NET),
        options={"bridge_options": {"num_iterations": 1, "num_pairs": 200}},
    )  # fmt: skip
    probe_posterior(rec, amortized.condition(IID_Y), "one")
    probe_posterior(rec, amortized.condition(torch.stack([IID_Y, IID_Y + 0.5])), "batch", mcmc=False)


@case
def amortized_other_bridges(rec):
    for name, build_one, options in (
        ("bass", lambda d, context_dim: make(BASS, d, context_dim=context_dim, num_components=3, hidden=(8,)), {}),
        ("matching", lambda d, context_dim: make(LSBM, d, context_dim=context_dim, num_components=3, hidden=(8,)), {}),
        ("smoothed", lambda d, context_dim: make(SMOOTHED, d, context_dim=context_dim, **NET), {}),
        (
            "langevin",
            lambda d, context_dim: make(KLB, d, context_dim=context_dim, num_steps=3, scheme="plain"),
            {"num_steps": None},
        ),
    ):
        amortized = an_amortized(rec, iid, bridge=build_one, label=name, options=options)
        probe_posterior(rec, amortized.condition(IID_Y), f"{name}.one", mcmc=False)


@case
def amortized_tempered(rec):
    """A bridge too poor to start chains from."""
    for name, given in (
        ("light", "light"),
        ("vsdm", lambda d, context_dim: make(VSDM, d, context_dim=context_dim, **NET)),
    ):
        amortized = an_amortized(rec, bimodal, bridge=given, label=name, options={"num_copies": 0, "num_steps": 2})
        probe_posterior(rec, amortized.condition(torch.tensor([7.0])), f"{name}.one")
        probe_posterior(rec, amortized.condition(torch.tensor([[5.0], [7.0]])), f"{name}.batch")


@case
def amortized_models(rec):
    amortized = an_amortized(rec, plate_latents, bridge="light", label="plate")
    probe_posterior(rec, amortized.condition(IID_Y[:3]), "plate.one")
    amortized = an_amortized(rec, needs_vmap, MATRIX[:4].float(), bridge="light", label="vmap")
    probe_posterior(rec, amortized.condition(IID_Y[:4]), "vmap.one")
    amortized = an_amortized(rec, two_sites, bridge="light", observed=("a", "b"), label="two sites")
    probe_posterior(
        rec, amortized.condition({"a": torch.tensor(0.4), "b": torch.tensor([0.2, 0.9])}), "two sites.one", mcmc=False
    )
    amortized = an_amortized(rec, black_box, bridge="light", label="black box", options={"num_copies": 0})
    probe_posterior(rec, amortized.condition(IID_Y[:3]), "black box.one", density=False)
    amortized = an_amortized(
        rec, datasets.two_moons, bridge="light", label="two moons", options={"num_copies": None, "num_simulations": 60}
    )
    probe_posterior(rec, amortized.condition(torch.zeros(2)), "two moons.one", mcmc=False)


@case
def amortized_missing_and_embedding(rec):
    amortized = an_amortized(rec, iid, bridge="light", label="missing", options={"missing": 0.5})
    y = IID_Y.clone()
    y[1] = math.nan
    probe_posterior(rec, amortized.condition(y), "missing.one")
    rec.seed("module")
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    amortized = an_amortized(rec, iid, bridge="light", embedding=module, label="embedding")
    probe_posterior(rec, amortized.condition(IID_Y), "embedding.one", mcmc=False)


@case
def mh_posterior(rec):
    """BridgeMH on a conditioned posterior, paths and points."""
    for name, given in (
        ("light", "light"),
        ("vsdm", lambda d, context_dim: make(VSDM, d, context_dim=context_dim, **NET)),
    ):
        amortized = an_amortized(rec, bounded, bridge=given, label=name)
        kernel = make(MH, bridge=amortized.condition(IID_Y[:4]), **SIZES)
        run_chains(rec, kernel, label=name)
        mh_facts(rec, kernel, name)


@case
def resumed(rec):
    """Fits that are cut off and go on from their checkpoints."""

    class Cut(RuntimeError):
        pass

    def stop(i):
        raise Cut

    class Law(MultivariateNormal):
        """A target whose draws end at a given call."""

        left = math.inf

        def sample(self, shape=()):
            Law.left -= 1
            if Law.left < 0:
                raise Cut
            return super().sample(shape)

    law, folder = Law(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64)), Path(tempfile.mkdtemp())
    rec.seed("data")
    rows = torch.randn(80, 2, dtype=F64) * torch.tensor([1.0, 3.0], dtype=F64)
    chain, steps = CHAIN | {"num_iterations": 3}, QUICK | {"num_steps": 60, "num_draws": 300}
    for name, build_one, target, options in (
        ("imf", build(DSB, 2, chain_steps=4, **NET), rows, chain),
        ("ipf", build(DSB, 2, chain_steps=4, method="ipf", **NET), rows, chain),
        ("latent", latent(build(DSB, 2, chain_steps=4, **NET), build(PCA, 2)), rows, chain),
        ("tails", tails(build(DSB, 2, chain_steps=4, **NET), df=5.0), rows, chain),
        ("vsdm", build(VSDM, 2, **NET), law, steps),
        ("smoothed", build(SMOOTHED, 2, covariance="learnt", **NET), law, steps),
    ):
        path = folder / f"{name}.pt"
        for stage in ("cut", "resumed", "whole"):
            Law.left = 45 if stage == "cut" and target is law else math.inf
            given = {"on_iteration": stop} if stage == "cut" and target is not law else {}
            rec.seed(f"{name}, build")
            bridge = build_one()
            rec.seed(f"{name}, fit")
            try:
                history = fit(bridge, target, checkpoint=None if stage == "whole" else path, **options, **given)
            except Cut:
                rec.put(f"{name}, {stage}", f"cut, a file: {path.exists()}")
                if path.exists():
                    rec.of(f"{name}, {stage}, checkpoint", lambda: bridges.Bridge.load(path)().sample((4,)))
                continue
            rec.history(f"{name}, {stage}", history)
            rec.put(f"{name}, {stage}, state", state_of(bridge)[0])
            rec.seed(f"{name}, sample")  # the same of both
            rec.put(f"{name}, {stage}, sample", bridge().sample((4,)))


@case
def interrupted(rec):
    """Chains after Ctrl-C, and an amortised fit that goes on with its simulations."""

    def stop(kernel, params, stage, i):
        if stage == "Sample" and i == 9:
            raise KeyboardInterrupt

    kernel = make(KL, two_modes, **SIZES)
    run_chains(rec, kernel, POINT, hook_fn=stop)
    run_chains(rec, kernel, POINT, label="again")  # the same kernel, warmed up before
    path, tries = Path(tempfile.mkdtemp()) / "amortized.pt", []

    def build_one(dim, context_dim):
        tries.append(dim)
        if len(tries) == 1:
            raise RuntimeError("cut")
        return make(LSB, dim, context_dim=context_dim, num_components=3, hidden=(8,))

    amortized = make(AMORT, iid, bridge=build_one)
    for stage in ("cut", "resumed"):
        rec.seed(stage)
        try:
            rec.history(stage, learn(amortized, checkpoint=path, **LEARN))
        except RuntimeError as error:
            rec.put(stage, str(error))
    rec.put("simulations", amortized.simulations)
    rec.of("sample", lambda: amortized.condition(IID_Y).sample(5))


# ---------------------------------------------------------------------------------------------------------------------
# Reports and figures


def container(rec, label, data):
    """Arrays, dimensions and coordinates of an ArviZ container, either version's."""
    groups = list(data.groups()) if callable(data.groups) else [g.strip("/") for g in data.groups if g != "/"]
    rec.put(f"{label}: groups", str(groups))
    for group in groups:
        found = data[group]
        for name in found.data_vars:
            rec.put(f"{label}[{group}][{name}]", found[name].values)
            rec.put(f"{label}[{group}][{name}].dims", str(found[name].dims))


def short_run(rec, model, *args, kernel=KL, label="chains", **options):
    rec.seed(label)
    mcmc = make(infer.MCMC, make(kernel, model, **SIZES), **(CHAINS | {"num_samples": 30} | options))
    mcmc.run(*args)
    return mcmc


@case
def arviz(rec):
    for name, model, args in (
        ("schools", schools, (SCHOOLS, SIGMA)), ("mixture", mixture, (SMALL,)), ("two modes", two_modes, (POINT,)),
        ("regression", regression, (MATRIX, SCHOOLS[:7] / 10)),
    ):  # fmt: skip
        mcmc = short_run(rec, model, *args, label=name)
        rec.seed(f"{name}, container")
        data = call(diagnostics.to_arviz, mcmc, log_likelihood=True, prior=7, posterior_predictive=True)
        container(rec, name, data)
        rec.seed(f"{name}, thinned")
        container(rec, f"{name}, thinned", call(diagnostics.to_arviz, mcmc, posterior_predictive=5))
    amortized = an_amortized(rec, bounded, bridge="light", label="amortized")
    posterior = amortized.condition(IID_Y[:4])
    rec.seed("posterior")
    container(rec, "posterior", call(diagnostics.to_arviz, posterior, log_likelihood=True, posterior_predictive=3))
    rec.seed("posterior, chains")
    made = posterior.mcmc(num_samples=8, num_chains=4, warmup_steps=5, num_proposals=64)
    container(
        rec,
        "posterior, chains",
        call(diagnostics.to_arviz, made, log_likelihood=True, posterior_predictive=True, prior=5),
    )


@case
def arviz_of_pyro(rec):
    rec.seed("nuts")
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(schools), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run(SCHOOLS, SIGMA)
    rec.seed("container")
    container(rec, "nuts", call(diagnostics.to_arviz, mcmc, log_likelihood=True, prior=4, posterior_predictive=True))
    rec.of("report", lambda: repr(call(diagnostics.report, mcmc, modes=False)))


def audit_figures(rec, label, audit):
    for name in (
        "shares",
        "errors",
        "centres",
        "chain_shares",
        "chain_errors",
        "by_chain",
        "places",
        "chain_sizes",
        "pooled",
        "z",
        "chain_z",
    ):
        rec.of(f"{label}.{name}", lambda: getattr(audit, name))
    rec.put(f"{label}.evaluations", audit.evaluations)
    rec.put(f"{label}.text", repr(audit))
    rec.put(f"{label}.table", audit.table())


@case
def audits(rec):
    mcmc = short_run(rec, two_modes, POINT)
    rec.seed("of a run")
    audit = call(diagnostics.mode_audit, mcmc, num_particles=200)
    audit_figures(rec, "of a run", audit)
    rec.of("report", lambda: repr(call(diagnostics.report, mcmc, modes=audit)))
    rec.of("report, no audit", lambda: repr(call(diagnostics.report, mcmc, modes=False)))
    rec.seed("of a model")
    audit_figures(rec, "of a model", call(diagnostics.mode_audit, two_modes, args=(POINT,), num_particles=150))
    rec.seed("of draws")
    draws = {name: value for name, value in mcmc.get_samples(group_by_chain=True).items() if name != "sum"}
    audit_figures(
        rec,
        "of draws",
        call(diagnostics.mode_audit, two_modes, x=draws, args=(POINT,), num_particles=150, start="prior"),
    )
    rec.seed("of a potential")
    given = {"potential_fn": two_modes_potential, "initial_params": {"z": torch.zeros(2, dtype=F64)}}
    audit_figures(rec, "of a potential", call(diagnostics.mode_audit, num_particles=200, **given))
    container_of_run = call(diagnostics.to_arviz, mcmc)
    rec.of(
        "report of a container",
        lambda: repr(call(diagnostics.report, container_of_run, model=two_modes, args=(POINT,), modes=True)),
    )


@case
def reports(rec):
    for name, kernel in (("langevin", KL), ("mh", MH)):
        mcmc = short_run(rec, schools, SCHOOLS, SIGMA, kernel=kernel, label=name)
        rec.of(f"{name}", lambda: repr(call(diagnostics.report, mcmc, modes=False)))
        rec.of(f"{name}, html", lambda: call(diagnostics.report, mcmc, modes=False)._repr_html_())
    amortized = an_amortized(rec, bounded, bridge="light", label="amortized")
    rec.of("amortized", lambda: repr(call(diagnostics.report, amortized, num_data_sets=30)))
    posterior = amortized.condition(IID_Y[:4])
    rec.of("posterior", lambda: repr(call(diagnostics.report, posterior)))
    rec.of("posterior, no audit", lambda: repr(call(diagnostics.report, posterior, modes=False)))


@case
def bridge_reports(rec):
    rec.seed("data")
    target, contexts = training_draws(200)
    for name, bridge, options in (
        ("langevin", make(KLB, 2, num_steps=3, scheme="plain"), {}),
        ("langevin data-aware", make(KLB, 2, num_steps=3), {}),
        ("light", make(LSB, 2, **MIX), QUICK),
        ("light source law", make(LSB, 2, **MIX), QUICK | {"source": SOURCE}),
        ("bass", make(BASS, 2, **MIX), QUICK),
        ("vsdm", make(VSDM, 2, **NET), QUICK),
        ("smoothed", make(SMOOTHED, 2, **NET), QUICK),
        ("dsb", make(DSB, 2, chain_steps=4, **NET), CHAIN),
        ("dsb source law", make(DSB, 2, chain_steps=4, **NET), CHAIN | {"source": SOURCE}),
        ("latent", make(LATENT, make(LSB, 2, **MIX), codec=make(PCA, 2)), QUICK),
        ("latent lossy", make(LATENT, make(LSB, 1, **MIX), codec=make(PCA, 1)), QUICK),
        ("tails", make(TAILS, make(LSB, 2, **MIX), df=4.0), QUICK),
    ):
        rec.seed(f"{name}, fit")
        fit(bridge, target, **options)
        source = {"source": options["source"]} if "source" in options else {}
        rec.of(
            name, lambda: repr(call(diagnostics.bridge_report, bridge, target_draws=target, num_draws=200, **source))
        )
        rec.of(f"{name}, alone", lambda: repr(call(diagnostics.bridge_report, bridge, num_draws=200)))
    rec.of("through report", lambda: repr(call(diagnostics.report, bridge, target_draws=target)))
    for name, bridge, options in (
        ("langevin", make(KLB, 2, context_dim=3, num_steps=3, scheme="plain"), {}),
        ("light", make(LSB, 2, context_dim=3, **MIX), QUICK), ("vsdm", make(VSDM, 2, context_dim=3, **NET), QUICK),
        ("dsb", make(DSB, 2, context_dim=3, chain_steps=4, **NET), CHAIN),
    ):  # fmt: skip
        rec.seed(f"{name}, context, fit")
        fit(bridge, target, context=contexts, **options)
        rec.of(
            f"{name}, context",
            lambda: repr(call(diagnostics.bridge_report, bridge, target_draws=target, context=contexts, num_draws=200)),
        )


def calibration_figures(rec, label, found):
    rec.put(f"{label}.ranks", found.ranks)
    rec.put(f"{label}.uniforms", found.uniforms)
    rec.of(f"{label}.p_values", lambda: found.p_values)
    rec.of(f"{label}.band_p_values", lambda: found.band_p_values)
    rec.of(f"{label}.coverage", lambda: found.coverage())
    rec.of(f"{label}.bands", lambda: found.bands())
    rec.of(f"{label}.ecdf_difference", lambda: found.ecdf_difference(torch.linspace(0.1, 0.9, 5, dtype=F64)))
    rec.of(f"{label}.worst", lambda: list(map(str, found.worst)))
    rec.put(f"{label}.text", f"{found!r} {found.verdict}")


@case
def calibration(rec):
    amortized = an_amortized(rec, bounded, bridge="light", label="amortized")
    for corrected in (False, "importance", "mcmc"):
        rec.seed(f"sbc {corrected}")
        calibration_figures(
            rec,
            f"sbc {corrected}",
            call(diagnostics.sbc, amortized, num_data_sets=25, num_draws=20, corrected=corrected),
        )
    rec.seed("joint")
    joint = call(diagnostics.calibration_draws, amortized, num_data_sets=30, num_draws=20)
    rec.put("joint", joint)
    rec.of("coverage", lambda: call(diagnostics.coverage, joint.draws, joint.truths))
    rec.of("sbc_ranks", lambda: call(diagnostics.sbc_ranks, joint.truths, joint.draws))
    rec.seed("tarp")
    calibration_figures(rec, "tarp", call(diagnostics.tarp, joint.draws, joint.truths))

    def exact(y):
        y = y["y"] if isinstance(y, dict) else y
        precision = 1 + 4 * len(y)
        return {"mu": 4 * y.sum() / precision + torch.randn(40) / precision**0.5}

    rec.seed("sbc of a model")
    calibration_figures(
        rec, "sbc of a model", call(diagnostics.sbc, iid, num_data_sets=25, num_draws=20, sampler=exact)
    )
    rec.of("ecdf_bands", lambda: call(diagnostics.ecdf_bands, 40, num_points=20, num_simulations=500))
    rec.of(
        "ecdf_p_values",
        lambda: call(diagnostics.ecdf_p_values, torch.rand(40, 3, dtype=F64), num_points=20, num_simulations=500),
    )


@case
def local_test(rec):
    amortized = an_amortized(rec, iid, bridge="light", label="amortized")
    rec.seed("global generator")
    found = call(diagnostics.local_c2st, amortized, IID_Y, num_data_sets=100, num_draws=50, num_null=9)
    rec.put("statistic", [found.statistic, found.p_value, found.tail_p_value])
    rec.put("null", found.null)
    rec.put("probabilities", found.probabilities)
    rec.put("text", repr(found))


@case
def pareto(rec):
    rec.seed("weights")
    for name, weights in (
        ("heavy", dist.Pareto(torch.ones((), dtype=F64), 1.2).sample((400,)).log()),
        ("light", torch.randn(400, dtype=F64) * 0.3), ("equal", torch.zeros(50, dtype=F64)),
        ("zeros", torch.where(torch.arange(100) % 3 == 0, -math.inf, torch.randn(100, dtype=F64))),
    ):  # fmt: skip
        found = call(diagnostics.psis, weights)
        rec.put(name, found)
        rec.put(f"{name}.text", f"{found!r} {found.reading} {found.verdict} {found.threshold} {found.k_hat_error}")
    rec.seed("bridge")
    bridge = make(LSB, 2, **MIX)
    fit(bridge, torch.randn(100, 2, dtype=F64), **QUICK)
    rec.of("of draws", lambda: call(diagnostics.psis, bridge().draws((300,)), log_prob=SOURCE.log_prob))


@case
def scores(rec):
    rec.seed("clouds")
    x, y, z = torch.randn(120, 3, dtype=F64), torch.randn(100, 3, dtype=F64) * 1.2 + 0.1, torch.randn(90, 3, dtype=F64)
    centres = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=F64)

    def of(score):
        return [float(score), float(score.floor), float(score.excess)], repr(score), score.describe()

    def generator():
        return torch.Generator().manual_seed(5)

    law = metrics.Moments(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    many = metrics.Moments(torch.zeros(4, 3, dtype=F64), torch.eye(3, dtype=F64).expand(4, 3, 3))
    for name, function in (
        ("mmd", lambda: call(metrics.mmd, x, y)), ("mmd, reference", lambda: call(metrics.mmd, x, y, reference=z)),
        ("w2", lambda: call(metrics.wasserstein2, x, y)), ("w2, reference", lambda: call(metrics.wasserstein2, x, y, reference=z)),
        ("sliced", lambda: call(metrics.sliced_wasserstein2, x, y)),
        ("sliced, generator", lambda: call(metrics.sliced_wasserstein2, x, y, reference=z, num_projections=16, generator=generator())),
        ("c2st", lambda: call(metrics.c2st, x[:100], y)), ("c2st, generator", lambda: call(metrics.c2st, x[:100], y, num_folds=3, generator=generator())),
        ("bures", lambda: call(metrics.bw2_uvp, x, y)), ("bures, moments", lambda: call(metrics.bw2_uvp, x, law)),
        ("conditional bures", lambda: call(metrics.cbw2_uvp, torch.randn(4, 30, 3, dtype=F64), many, variance=4.0)),
        ("shares", lambda: call(metrics.mode_share_tv, x, centres)),
        ("given shares", lambda: call(metrics.mode_share_tv, x, centres, shares=torch.tensor([0.5, 0.3, 0.2], dtype=F64))),
    ):  # fmt: skip
        rec.of(name, lambda: of(function()))
    rec.of("mode_shares", lambda: call(metrics.mode_shares, x, centres))


@case
def planar_laws(rec):
    for kind in (datasets.Checkerboard, datasets.EightGaussians, datasets.Moons, datasets.SCurve, datasets.SwissRoll):
        name = kind.__name__
        for dtype in (None, F64):
            law = make(kind, dtype=dtype)
            x = rec.of(f"{name}, {dtype}", lambda: law.sample((9,)))
            rec.of(f"{name}, {dtype}.log_prob", lambda: law.log_prob(x))
        rec.of(f"{name}.expand", lambda: law.expand((2,)).sample((3,)))
        for extra in ("equal_counts", "stratified"):
            if hasattr(law, extra):
                rec.of(f"{name}.{extra}", lambda: getattr(law, extra)(16))


@case
def simulators(rec):
    for name in (
        "bernoulli_glm",
        "gaussian_linear",
        "gaussian_linear_uniform",
        "gaussian_mixture",
        "lotka_volterra",
        "sir",
        "slcp",
        "two_moons",
    ):
        model = getattr(datasets, name)

        def traced():
            nodes = pyro.poutine.trace(model).get_trace().nodes
            return {
                k: v["value"]
                for k, v in nodes.items()
                if v["type"] == "sample" and isinstance(v["value"], torch.Tensor)
            }

        rec.of(name, traced)


@case
def pyro_nouns(rec):
    """Pyro's Predictive on our draws."""
    mcmc = short_run(rec, schools, SCHOOLS, SIGMA)
    draws = {name: value for name, value in mcmc.get_samples().items() if name in ("mu", "tau", "theta")}
    rec.of("predictive", lambda: pyro.infer.Predictive(schools, draws)(None, SIGMA)["y"])


# ---------------------------------------------------------------------------------------------------------------------


def run_all(out, only):
    found, begun = {}, time.perf_counter()
    for name, function in CASES.items():
        if only and not any(word in name for word in only.split("|")):
            continue
        rec, start = Recorder(name), time.process_time()
        error = None
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            pyro.clear_param_store()
            rec.seed("case")
            try:
                function(rec)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
                print(traceback.format_exc(), file=sys.stderr)
        ours = sorted({str(w.message) for w in heard if issubclass(w.category, RuntimeWarning)})
        rec.put("warnings", "\n".join(ours))
        seconds = time.process_time() - start
        found[name] = {"entries": rec.entries, "error": error, "seconds": round(seconds, 2)}
        print(f"{name:40s} {len(rec.entries):4d} entries {seconds:6.1f} s {error or ''}"[:160], flush=True)
        Path(out).write_text(json.dumps({"cases": found, "torch": torch.__version__}))
    print(f"{len(found)} cases, {time.perf_counter() - begun:.0f} s -> {out}")
    wrong = [name for name, one in found.items() if one["error"]]
    print(f"cases that failed: {wrong}" if wrong else "no case failed")


def gap(a, b):
    """Largest difference of two entries' kept values; None for texts."""
    if "values" not in a or "values" not in b or a["shape"] != b["shape"]:
        return math.inf
    x, y = np.array(a["values"], dtype=float), np.array(b["values"], dtype=float)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(all="ignore"):
        gaps = np.where(same, 0.0, np.abs(x - y))
    return float(np.nan_to_num(gaps, nan=math.inf).max(initial=0.0))


def compare(first, second, verbose, numbers, only):
    a, b = (json.loads(Path(path).read_text())["cases"] for path in (first, second))
    bad, total = 0, 0
    print(f"{'case':40s} {'tensors':>7s}  verdict   largest difference")
    for name in [*a, *(k for k in b if k not in a)]:
        if only and not any(word in name for word in only.split("|")):
            continue
        if name not in a or name not in b:
            print(f"{name:40s} {'':7s}  only in {first if name in a else second}")
            bad += 1
            continue
        one, two = a[name], b[name]
        mine, theirs = one["entries"], two["entries"]
        differing = [k for k in mine.keys() & theirs.keys() if mine[k]["sha"] != theirs[k]["sha"]]
        missing = sorted(mine.keys() ^ theirs.keys())
        if numbers:  # texts may name options
            differing = [k for k in differing if "values" in mine[k] or "values" in theirs[k]]
        number = sum("values" in entry for entry in mine.values())
        total += number
        wrong = bool(differing or missing or one["error"] or two["error"])
        bad += wrong
        gaps = [gap(mine[k], theirs[k]) for k in differing if "values" in mine[k] and "values" in theirs[k]]
        tail = f"{max(gaps):.3g}" if gaps else ("0" if not differing else "texts")
        print(f"{name:40s} {number:7d}  {'differs' if wrong else 'equal':8s}  {tail}")
        for error in (one["error"], two["error"]):
            if error:
                print(f"      error: {error[:200]}")
        if missing:
            print(f"      in one alone: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
        order = [k for k in mine if k in set(differing)]
        for key in order if verbose else order[:6]:
            print(f"      {key}: {show(mine[key], theirs[key])}")
        if len(order) > 6 and not verbose:
            print(f"      and {len(order) - 6} more")
    both = [k for k in a.keys() & b.keys() if not only or any(word in k for word in only.split("|"))]
    print(f"{len(both)} cases, {total} tensors: " + (f"{bad} cases differ" if bad else "all equal, bit for bit"))
    return 1 if bad else 0


def show(a, b):
    if "values" in a and "values" in b:
        if a["shape"] != b["shape"] or a["dtype"] != b["dtype"]:
            return f"{a['dtype']} {a['shape']} became {b['dtype']} {b['shape']}"
        worst = gap(a, b)
        return f"by {worst:.3g} (first values {a['values'][:3]} became {b['values'][:3]})"
    x, y = a.get("text", "a tensor"), b.get("text", "a tensor")
    at = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
    at = max(0, at - 30)
    return f"{x[at : at + 90]!r} became {y[at : at + 90]!r}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--only")
    parser.add_argument("--numbers", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--compare", nargs=2)
    ARGS = parser.parse_args()
    if ARGS.compare:
        sys.exit(compare(*ARGS.compare, ARGS.verbose, ARGS.numbers, ARGS.only))
    if ARGS.list:
        print("\n".join(CASES))
        sys.exit()
    print("pyro_sb from", Path(bridges.__file__).parents[1])
    run_all(ARGS.out, ARGS.only)
