"""Fit of a likelihood: classes found, a classifier of them, a conditional bridge of the rest, and held-out scores."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.infer.amortized.choice import build, fit_bridge
from pyro_sb.infer.amortized.latent_law import Residuals
from pyro_sb.infer.amortized.likelihood.law import DataColumns, LikelihoodParts, ParameterColumns
from pyro_sb.infer.amortized.training_set import TrainingSet
from pyro_sb.nn import ContextNet
from pyro_sb.training import FitHistory, train
from pyro_sb.warn import warn

__all__ = ["classes_of", "held_out_scores", "learn", "new_classifier"]

MOST_CLASSES = 64  # of the discrete part
FEW, MANY = 2000, 20_000  # pairs up to which the network drops a fifth; from which it needs no dropout
FULL_DIM = 50  # covariances of a mixture are full up to here


def classes_of(flat: Tensor, discrete: tuple[int, ...] | None) -> tuple[tuple[int, ...], Tensor]:
    """Discrete columns, and the values of them that were simulated."""
    if discrete is None:
        marks = (flat == flat.round()).all(0).nonzero().flatten().tolist()
        discrete = tuple(i for i in marks if 1 < len(flat[:, i].unique()) <= MOST_CLASSES)
        if discrete:
            counts = [len(flat[:, i].unique()) for i in discrete]
            warn(
                f"columns {list(discrete)} of the data hold whole numbers alone, {counts} different ones, and are "
                f"taken as discrete. Write discrete={discrete} to say so, or discrete=() for none.",
            )
    if any(i >= flat.shape[1] for i in discrete):
        raise ValueError(f"discrete must name columns of {flat.shape[1]}, got {discrete}. They count from 0.")
    constant = [i for i in range(flat.shape[1]) if i not in discrete and bool((flat[:, i] == flat[0, i]).all())]
    if constant:
        raise ValueError(f"the simulations must vary in every column, got constant ones, {constant}. Leave those out.")
    if not discrete:
        return (), flat.new_empty(0, 0)
    categories = flat[:, list(discrete)].unique(dim=0)
    if len(categories) > MOST_CLASSES:
        raise ValueError(
            f"discrete columns must have at most {MOST_CLASSES} combinations, got {len(categories)} for {discrete}. "
            "Leave counts of many values out of discrete and add uniform noise in [0, 1) to them, in the simulator and "
            "in the data."
        )
    return discrete, categories


def learn(
    columns: ParameterColumns,
    data: DataColumns,
    theta: Tensor,
    flat: Tensor,
    judged: Tensor,
    spec: Any,
    options: dict[str, Any],
    bridge_options: dict[str, Any],
) -> tuple[LikelihoodParts, FitHistory]:
    """Classifier and bridge, fitted."""
    parts = LikelihoodParts(columns, data, None, flat.new_empty(0), None, None)
    history, classes, context = FitHistory(), None, columns.context(theta)
    if data.num_classes:
        classes = data.classes(flat)[0]
        shares = torch.bincount(classes[~judged], minlength=data.num_classes).to(flat) + 0.5
        parts.log_shares = (shares / shares.sum()).log()
        parts.classifier = new_classifier(columns, data, 0.1 if len(theta) < MANY else 0.0).to(flat)
        history = fit_classifier(parts, context, classes, judged, options)
    if not data.continuous:
        return parts, history
    features = parts.with_class(columns.design(theta), classes)
    data.logged = data.better_logged(flat[~judged][:, data.continuous], features[~judged])
    value = data.encode(flat)[0]
    unbounded = torch.zeros(value.shape[1], dtype=torch.bool, device=flat.device)
    parts.residuals = Residuals.fit(value[None], features, unbounded, judged)
    seen = parts.with_class(context, classes)
    rows = TrainingSet(parts.residuals, value, seen, features, judged, len(theta))
    bridge = new_bridge(spec, value.shape[1], seen.shape[1], len(theta))
    more = {"num_updates": 5000} if len(theta) >= MANY else {}
    history = fit_bridge(bridge, rows, **(more | options | bridge_options))
    parts.bridge = bridge
    return parts, history


def new_bridge(spec: Any, dim: int, context_dim: int, num: int) -> MixtureBridge:
    """An unfitted bridge whose density has gradients in its context."""
    bridge: Bridge
    if spec == "light":  # smaller than a posterior's: errors of a log density add up over observations
        bridge = LightSB(
            dim,
            num_components=4 if dim == 1 else 8,
            context_dim=context_dim,
            covariance="full" if dim <= FULL_DIM else "diagonal",
            hidden=(64, 64),
            dropout=0.2 if num <= FEW else 0.1 if num < MANY else 0.0,
        )
    else:
        bridge = build(spec, dim, context_dim, num, None)
    if not isinstance(bridge, MixtureBridge) or not math.isinf(bridge.beta) or bridge.asked_beta is not None:
        raise NotImplementedError(
            f"a likelihood needs a light bridge, whose density of a point has gradients in the parameters, got "
            f'{bridge.describe()}. Write bridge="light", or a LightSB.'
        )
    return bridge


def new_classifier(columns: ParameterColumns, data: DataColumns, dropout: float = 0.0) -> ContextNet:
    """An untrained network to the logits of the classes."""
    return ContextNet(columns.num_features, data.num_classes, hidden=(64, 64), dropout=dropout)


def fit_classifier(
    parts: LikelihoodParts, context: Tensor, classes: Tensor, judged: Tensor, options: dict[str, Any]
) -> FitHistory:
    """Logistic regression by the network; its parameters of the lowest held-out loss are kept."""
    net = parts.classifier
    assert net is not None
    learnt, tested = (~judged).nonzero().flatten(), judged.nonzero().flatten()[:8192]

    def loss_at(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(context[rows]) + parts.log_shares, classes[rows])

    def noisy_loss() -> Tensor:
        net.noisy = True
        try:
            return loss_at(learnt[torch.randint(len(learnt), (min(512, len(learnt)),), device=learnt.device)])
        finally:
            net.noisy = False

    @torch.no_grad()
    def held_out_loss() -> float:
        return float(loss_at(tested))

    given = {"num_updates": 2000} | options
    return train(
        net.parameters(),
        noisy_loss,
        learning_rate=2e-3,
        validate=held_out_loss,
        keep_best=True,
        patience=10,
        description="classifier",
        **given,
    )


@torch.no_grad()
def held_out_scores(parts: LikelihoodParts, theta: Tensor, flat: Tensor, judged: Tensor) -> dict[str, float]:
    """Mean log density of held-out runs: of the fit, and of an affine Gaussian regression with the classes' shares."""
    y, theta = flat[judged], theta[judged]
    value, plain, _ = parts.data.encode(y)
    classes = None
    if parts.data.num_classes:
        classes = parts.data.classes(y)[0]
        plain = plain + parts.log_shares[classes]
    if parts.residuals is not None:
        features = parts.with_class(parts.columns.design(theta), classes)
        residual, slope = parts.residuals.whitened(value, features)
        normal = -0.5 * residual.square().sum(-1) - 0.5 * value.shape[1] * math.log(2 * math.pi)
        plain = plain + normal + slope
    learnt = parts.log_prob(y, theta, y.shape[:1])
    return {"learnt": float(learnt.mean()), "affine Gaussian": float(plain.mean())}
