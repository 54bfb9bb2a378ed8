"""Checks of what `BridgeMH` is given: each refusal says what must hold, what came, and what to write instead."""

from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.checks import number
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.model.log_joint import LogJoint

HAVE_DENSITY = (
    "LightSB, LightSBM, LightSBBM and DSB (source omitted or a distribution), TailMatched around them, VSDM, SGM, "
    'SmoothedBridge, LatentBridge with a bijective codec, KernelLangevinBridge with scheme="plain"'
)


def check_bridge(bridge: Any, context: Any) -> None:
    """Refuse what cannot propose, before a model is looked at."""
    if isinstance(bridge, Posterior):
        if bridge.observation.batched:
            raise ValueError(
                f"a chain has one observation, got a posterior of {len(bridge.observation.values)}. Write "
                "posterior.condition(y[i]) for one, or condition(y).mcmc() for chains of all of them."
            )
        if bridge.law.bridge.density is None:
            check_density(bridge.law.bridge)
        if context is not None:
            raise ValueError("context must be None with a posterior, which has its own. Omit it.")
        return
    if isinstance(bridge, Distribution):
        raise ValueError(
            f"bridge must be a Bridge, got a distribution ({type(bridge).__name__}): a bridge knows how its draws were "
            "made, its law does not. Write BridgeMH(model, bridge), not BridgeMH(model, bridge())."
        )
    if isinstance(bridge, type) and issubclass(bridge, LatentBridge):
        raise ValueError(
            "a LatentBridge needs a bridge and a codec, got the class alone. Write BridgeMH(model, lambda dim: "
            "LatentBridge(LightSB(dim), PCACodec(dim)))."
        )
    if not isinstance(bridge, Bridge):
        if bridge is not None and not callable(bridge):
            raise ValueError(
                "bridge must be a Bridge, a function from the dimension to one, or a conditioned posterior, got "
                f"{type(bridge).__name__}. Write BridgeMH(model, LightSB)."
            )
        return
    check_density(bridge)
    if not bridge.fitted and bridge.context_dim:
        raise ValueError(
            f"a conditional {type(bridge).__name__} must be fitted before, got one that is not: warm-up knows no "
            "contexts. Fit it on pairs, or build it with context_dim=0."
        )
    check_context(bridge, context)


def check_density(bridge: Bridge) -> None:
    """Refuse a bridge whose draws have no density."""
    if bridge.density is None:
        raise NotImplementedError(
            f"BridgeMH corrects draws by their density, and {bridge.describe()} has none. {bridge.density_hint} "
            f"Bridges that have one: {HAVE_DENSITY}."
        )


def check_unused(bridge: Any, fit_options: Any, num_paths: int) -> None:
    """Refuse options that a bridge as it is given would not use."""
    known = isinstance(bridge, Posterior) or (isinstance(bridge, Bridge) and bridge.fitted)
    if known and fit_options:
        raise ValueError(
            f"fit_options are for a bridge that warm-up fits, got {sorted(fit_options)} for one that is fitted. Omit "
            "them."
        )
    if isinstance(bridge, Posterior):
        check_paths(bridge.law.marginal, num_paths)
    elif known:
        check_paths(bridge.density == "marginal", num_paths)
    elif (bridge is None or isinstance(bridge, MixtureBridge)) and "source" not in (fit_options or {}):
        check_paths(True, num_paths)


def check_paths(marginal: bool, num_paths: int) -> None:
    """Refuse several paths of a bridge that has none to average."""
    if marginal and num_paths > 1:
        raise ValueError(
            f"num_paths averages the weights of paths, got {num_paths} for a bridge that knows the density of its "
            "points. Omit it; num_proposals raises the acceptance."
        )


def check_context(bridge: Bridge, context: Any) -> Tensor | None:
    """The one context of a conditional bridge, shape ``(context_dim,)``."""
    if bridge.context_dim and context is None:
        raise ValueError(
            f"{type(bridge).__name__} has context_dim {bridge.context_dim}, got no context. Write "
            "BridgeMH(model, bridge, context=y), or pass a conditioned posterior."
        )
    given = bridge.check_context(context)
    if given is not None and given.dim() != 1:
        raise ValueError(
            f"context must be one context of shape ({bridge.context_dim},), got {tuple(given.shape)}. "
            "Write context=y[i]: the chains of a model have one observation."
        )
    return given


def check_dim(bridge: Bridge, log_joint: LogJoint) -> None:
    """Refuse a bridge of another dimension than the model's; a codec that is not fitted yet must keep it whole."""
    latent, dim = isinstance(bridge, LatentBridge), log_joint.dim
    size = bridge.whole_dim if isinstance(bridge, LatentBridge) else bridge.dim
    if size not in (None, dim):
        name = f"LatentBridge(LightSB({dim}), PCACodec({dim}))" if latent else f"{type(bridge).__name__}({dim}, ...)"
        raise ValueError(
            f"bridge must have the dimension of the model's unconstrained vector, got dim {size} for a model of "
            f"{dim}: {_sites(log_joint.site_shapes)}. Write {name}, fitted on that vector, sites sorted by name."
        )


def check_posterior(posterior: Posterior, log_joint: LogJoint) -> None:
    """Refuse a posterior of other sites than the model's."""
    own = posterior.simulator.prototype.packing.shapes
    if own != log_joint.site_shapes:
        raise ValueError(
            f"a posterior must have the model's latent sites, got {sum(map(_size, own.values()))} numbers "
            f"({_sites(own)}) for a model of {log_joint.dim} ({_sites(log_joint.site_shapes)}). Pass the model that it "
            "was fitted on, conditioned on the observation: BridgeMH(posterior.model, posterior)."
        )


def check_bridge_probability(probability: float | None, local: str | None) -> None:
    """Refuse a probability that leaves one of two moves out."""
    if probability is not None and (local is None or not 0.0 < number("bridge_probability", probability) < 1.0):
        raise ValueError(
            f"bridge_probability must lie in (0, 1), beside a local move, got {probability} with local="
            f"{local!r}. Omit it, or write local=None for the bridge alone."
        )


def check_model(model: Any, bridge: Any, potential_fn: Any) -> None:
    """Refuse a bridge or a potential in the place of a model."""
    if isinstance(model, (Bridge, Posterior)):
        place = "bridge=posterior" if isinstance(model, Posterior) else "model, bridge"
        raise ValueError(f"model must be a Pyro model, got a {type(model).__name__}. Write BridgeMH({place}).")
    given = isinstance(bridge, (Bridge, Posterior, type)) or bridge is None or not callable(bridge)
    if model is None and potential_fn is None and not given:
        raise ValueError(
            "Exactly one of model and potential_fn must be given, got neither, and a function as bridge. If that is "
            "minus the log density of a dict of tensors, write BridgeMH(potential_fn=...)."
        )


def made_bridge(make: Any, log_joint: LogJoint) -> Bridge:
    """The bridge that a function of the dimension makes, checked."""
    advice = "If it is minus the log density of a dict of tensors, write BridgeMH(potential_fn=...)."
    try:
        made = make(log_joint.dim)
    except Exception as error:
        raise ValueError(
            f"bridge must be a Bridge or a function from the dimension to one, got {getattr(make, '__name__', make)}, "
            f"which raised {type(error).__name__} at {log_joint.dim}: {error}. {advice}"
        ) from error
    if not isinstance(made, Bridge):
        raise ValueError(
            f"bridge must be a Bridge or a function from the dimension to one, got "
            f"{getattr(make, '__name__', make)}, which gives a {type(made).__name__} at {log_joint.dim}. {advice}"
        )
    check_bridge(made, None)
    check_dim(made, log_joint)
    return made


def _size(shape: Any) -> int:
    return shape.numel()


def _sites(shapes: Any) -> str:
    """Sites with their sizes, for messages."""
    return ", ".join(f"{name} {shape.numel()}" for name, shape in shapes.items())
