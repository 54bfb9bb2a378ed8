"""Bridges that an amortised posterior learns with: those that are tried, their defaults, their fits and scores."""

import copy
import difflib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pyro_sb.bridges.base import Bridge, check_fit_options
from pyro_sb.bridges.diffusion.vsdm import SGM, VSDM
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.options import check_names
from pyro_sb.infer.amortized.latent_law import LatentLaw
from pyro_sb.infer.amortized.training_set import TrainingSet
from pyro_sb.training import FitHistory

__all__ = ["build", "candidates", "check_bridge_options", "fit_bridge", "held_out_score", "nearest"]

logger = logging.getLogger(__name__)
Spec = Bridge | type[Bridge] | Callable[..., Bridge] | str | None
FULL_DIM = 50  # covariances of a mixture are full up to here
FEW = 2000  # simulations up to which fits are short and regularised
JUDGES, JUDGE_PATHS = 1024, 16
GIVEN = ("context", "weights", "checkpoint", "held_out", "progress")  # arguments of a bridge's fit that ours gives


def candidates(spec: Spec) -> dict[str, Any]:
    """The bridges to try, by name: those of ``None`` are the light bridge and VSDM."""
    if spec is None:
        return {"light": "light", "vsdm": "vsdm"}
    if spec not in ("light", "vsdm") if isinstance(spec, str) else not callable(spec):
        raise ValueError(f'bridge must be "light", "vsdm", a bridge, its class or a function, got {spec!r}.')
    return {spec if isinstance(spec, str) else _name(spec): spec}


def check_bridge_options(tried: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse options that the ``fit`` of a bridge to be tried does not have, before anything is simulated.

    What a function will build is not known yet: its ``fit`` refuses them itself.
    """
    for name, spec in tried.items():
        kind = {"light": LightSB, "vsdm": VSDM}.get(spec, spec) if isinstance(spec, str) else spec
        if isinstance(kind, Bridge) or (isinstance(kind, type) and issubclass(kind, Bridge)):
            check_fit_options("bridge_options", kind, options, GIVEN)
        else:
            check_names(f"{name}.fit (bridge_options)", options, options, GIVEN)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a misspelt one; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)), None)


def build(spec: Any, dim: int, context_dim: int, num_simulations: int, embedding: nn.Module | None) -> Bridge:
    """An unfitted bridge of the right sizes.

    Args:
        spec: ``"light"``, ``"vsdm"``; a bridge, whose options are kept and whose sizes are not; its class; or a
            function of ``dim`` and ``context_dim``.
        dim: Number of latents.
        context_dim: Size of the context.
        num_simulations: How many there are to learn from.
        embedding: Module from contexts to features; each bridge learns its own copy.
    """
    more: dict[str, Any] = {} if embedding is None else {"embedding": copy.deepcopy(embedding)}
    if spec == "light":
        return LightSB(
            dim,
            num_components=16 if dim <= 5 else 8,
            context_dim=context_dim,
            covariance="full" if dim <= FULL_DIM else "diagonal",
            hidden=(128, 128),
            dropout=0.2 if num_simulations <= FEW else 0.1,
            **more,
        )
    if spec == "vsdm":
        return VSDM(dim, context_dim=context_dim, **more)
    if isinstance(spec, Bridge):
        config = spec.config() | {"dim": dim, "context_dim": context_dim}
        if more:
            return with_sampler(type(spec)(**config | more), spec)
        if config.get("embedding") is not None:
            raise ValueError(
                f"bridge must not bring an embedding of its own, got {config['embedding']}: it would see summaries. "
                "Write AmortizedPosterior(..., embedding=...)."
            )
        return with_sampler(type(spec).from_config(config), spec)
    if more and not isinstance(spec, type):
        raise ValueError(
            "embedding goes into a bridge of yours by your own hand, got a function as bridge. Write it into the "
            "function, and leave embedding out; or give the bridge's class."
        )
    bridge = spec(dim, context_dim=context_dim, **more)
    if not isinstance(bridge, Bridge) or (bridge.dim, bridge.context_dim) != (dim, context_dim):
        raise ValueError(
            f"bridge(dim, context_dim=...) must give a bridge of these sizes, ({dim}, {context_dim}), got {bridge!r}. "
            "Write lambda dim, context_dim: LightSB(dim, context_dim=context_dim)."
        )
    return bridge


def fit_bridge(bridge: Bridge, rows: TrainingSet, **options: Any) -> FitHistory:
    """Fit a bridge on the whitened residuals of a training set.

    The regression has used the context already: where the posterior is Gaussian about an affine mean, a bridge that
    keeps its start has nothing left to learn, and is not warned about.
    """
    with torch.no_grad():
        residual, _ = rows.residuals.encode(rows.latents, rows.features)
    few = int(rows.num_simulations) <= FEW
    defaults: dict[str, Any] = {}
    if isinstance(bridge, MixtureBridge):
        defaults = few_options(int(rows.num_simulations)) if few else {"num_updates": 2500}
    elif isinstance(bridge, VSDM | SGM):
        defaults = {"num_updates": 1000 if few else 3000}
    learner: Any = bridge
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*kept its start", RuntimeWarning)  # it may be the truth: see the docstring
        if "held_out" in inspect.signature(learner.fit).parameters:
            return learner.fit(residual, context=rows.context, held_out=rows.held_out, **(defaults | options))
        learnt = ~rows.held_out  # a bridge that judges nothing sees the other rows alone
        return learner.fit(residual[learnt], context=rows.context[learnt], **(defaults | options))


def few_options(num: int) -> dict[str, Any]:
    """Options of a light bridge's fit to few simulations: as many passes over them, whatever their number.

    A minibatch of an eighth of the simulations' number, for half as many updates, meets each 62 times, each time with
    another of its copies. Small minibatches are cheap, and their noise keeps the network from learning the simulations
    by heart; where it does so all the same, its held-out loss rises early, and the fit ends after five checks of 20.
    """
    size, steps = max(64, num // 8), max(300, num // 2)
    return {"num_updates": steps, "batch_size": size, "learning_rate": 5e-3, "patience": 5}


def held_out_score(bridge: Bridge, rows: TrainingSet) -> float:
    """Mean log density of held-out latents in nats; of a path sampler its importance-weighted lower bound, or NaN."""
    if bridge.density != "marginal" and not hasattr(bridge, "path_log_prob"):
        return float("nan")
    judged = rows.held_out.nonzero().flatten()
    judged = judged[torch.randperm(len(judged), device=judged.device)[:JUDGES]]
    law = LatentLaw(bridge, rows.residuals, rows.context[judged], rows.features[judged])
    with torch.no_grad():
        return float(law.path_log_prob(rows.latents[judged], JUDGE_PATHS).mean())


def with_sampler(bridge: Any, like: Any) -> Bridge:
    """The bridge, drawing as another one does: how many steps and which solver are no part of a configuration."""
    if hasattr(like, "sampler"):
        bridge.sampler = like.sampler
    return bridge


def _name(spec: Any) -> str:
    kind = type(spec) if isinstance(spec, Bridge) else spec
    return getattr(kind, "__name__", "bridge")
