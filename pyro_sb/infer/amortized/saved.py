"""A fitted amortised posterior as one file of tensors and plain values, and back, given its model."""

from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge, check_format
from pyro_sb.fingerprint import differences, fingerprint, named
from pyro_sb.infer.amortized.features import Features
from pyro_sb.infer.amortized.latent_law import Residuals
from pyro_sb.infer.amortized.simulator import Simulations, Simulator

__all__ = ["SavedPosterior", "packed_posterior", "unpacked_posterior", "words_for"]

FORMAT = 1
NEEDED = {
    "format",
    "kind",
    "words",
    "observed",
    "args",
    "kwargs",
    "bridge",
    "figures",
    "features",
    "residuals",
    "pairs",
}
FEATURES = (
    "masked",
    "raw",
    "references",
    "quantiles",
    "location",
    "scale",
    "farthest",
    "raw_location",
    "raw_scale",
    "levels",
)
TENSORS = ("location", "scale", "farthest", "raw_location", "raw_scale", "levels")


class SavedPosterior:
    """What a file holds, checked against itself: the parts of an `AmortizedPosterior`.

    Attributes:
        observed: Names of the observed sites.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        bridge: The fitted bridge.
        residuals: Coordinates of the latents.
        simulations: What it was fitted to.
        figures: Its scores, its exchangeable sites, and the first simulations.
    """

    def __init__(self, saved: dict[str, Any], path: str) -> None:
        self.observed, self.args, self.kwargs = tuple(saved["observed"]), tuple(saved["args"]), dict(saved["kwargs"])
        self.bridge: Bridge = Bridge.rebuilt(saved["bridge"], path)
        self.residuals = Residuals(*saved["residuals"])
        self.simulations = Simulations(*saved["pairs"])
        self.figures: dict[str, Any] = saved["figures"]
        self._features = {name: saved["features"][name] for name in FEATURES}

    def features(self, source: Simulator) -> Features:
        """The features of an observation, for a model's layout of it."""
        from sklearn.preprocessing import QuantileTransformer

        saved = self._features
        features = Features(source.data, self.figures["exchangeable"], masked=saved["masked"], raw=saved["raw"])
        for name in TENSORS:
            setattr(features, name, saved[name])
        references, quantiles = (saved[name].numpy() for name in ("references", "quantiles"))
        transform = QuantileTransformer(n_quantiles=len(references), output_distribution="normal", subsample=None)
        transform.references_, transform.quantiles_ = references, quantiles
        transform.n_quantiles_, transform.n_features_in_ = len(references), quantiles.shape[1]
        features.quantiles = transform
        return features

    def check(self, source: Simulator, path: str) -> None:
        """Refuse parts that are not of one size, or not of the model's."""
        dim, width = source.dim, source.data.dim
        columns = len(self._features["location"])
        sizes = {
            "latents": (tuple(self.simulations.latents.shape[1:]), (dim,)),
            "observations": (tuple(self.simulations.observations.shape), (len(self.simulations.latents), width)),
            "bounded latents": (tuple(self.residuals.bounded.shape), (dim,)),
            "factor of the residuals": (tuple(self.residuals.factor.shape), (dim, dim)),
            "weights of the regression": (tuple(self.residuals.weights.shape[1:]), (dim,)),
            "columns of the observation": (tuple(self._features["quantiles"].shape[1:]), (columns,)),
            "the bridge": ((self.bridge.dim,), (dim,)),
        }
        for name, (came, wanted) in sizes.items():
            if came != wanted:
                raise ValueError(
                    f"{path} must hold the posterior of a model with {dim} latents and {width} numbers observed, got "
                    f"{name} of shape {came} for {wanted}. Fit and save it again."
                )


def words_for(model: Any, observed: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, str]:
    """What a model and its arguments are known by."""
    return {"the model": named(model), "its arguments": fingerprint(args, kwargs), "observed": repr(observed)}


def packed_posterior(
    model: Any, source: Simulator, features: Features, residuals: Residuals, simulations: Simulations, **parts: Any
) -> dict[str, Any]:
    """Contents of a file.

    Args:
        model: The Pyro model, of which a fingerprint is kept.
        source: The model as a giver of pairs.
        features: Of an observation.
        residuals: Coordinates of the latents.
        simulations: What it was fitted to.
        **parts: The bridge, and ``figures``.
    """
    _check_plain("the model's arguments", [list(source.args), dict(source.kwargs)])
    about = {name: getattr(features, name) for name in (*TENSORS, "masked", "raw")}
    about |= {
        "references": torch.from_numpy(features.quantiles.references_).clone(),
        "quantiles": torch.from_numpy(features.quantiles.quantiles_).clone(),
    }
    return {
        "format": FORMAT,
        "kind": "AmortizedPosterior",
        "words": words_for(model, source.observed, source.args, source.kwargs),
        "observed": list(source.observed),
        "args": list(source.args),
        "kwargs": dict(source.kwargs),
        "bridge": parts["bridge"].contents(),
        "figures": parts["figures"],
        "features": about,
        "residuals": [residuals.bounded, residuals.weights, residuals.factor],
        "pairs": list(simulations),
    }


def unpacked_posterior(saved: Any, model: Any, path: str) -> SavedPosterior:
    """A file's contents, which must be those of this model's posterior."""
    if not isinstance(saved, dict) or not saved.keys() >= NEEDED or saved["kind"] != "AmortizedPosterior":
        raise ValueError(f"{path} must hold what AmortizedPosterior.save wrote, got other contents.")
    check_format(path, saved["format"], FORMAT)
    try:
        read = SavedPosterior(saved, path)
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} must hold an amortised posterior as this version writes it, got one that differs ({error}). Fit "
            "and save it again."
        ) from error
    differ = differences(saved["words"], words_for(model, read.observed, read.args, read.kwargs))
    if differ:
        raise ValueError(
            f"{path} must be given the model that it was fitted to, got another: {differ}. Load it with that model, or "
            "fit this one."
        )
    return read


def _check_plain(name: str, value: Any) -> None:
    """Refuse what no file of tensors and plain values holds."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return
    inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else None
    if inner is None:
        raise ValueError(
            f"{name} must be tensors and plain values to be saved, got a {type(value).__name__}. Pass "
            "torch.as_tensor(...) to fit, or bind it to the model: functools.partial(model, x=...)."
        )
    for each in inner:
        _check_plain(name, each)
