r"""Law p(y | theta) that was learnt from simulations: :math:`p(c | \theta)\, p(x | \theta, c)` of its parts c and x."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution, is_validation_enabled
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.checks import broadcast, floats, sample_size
from pyro_sb.infer.amortized.latent_law import Residuals
from pyro_sb.nn import ContextNet, with_constant_parameters
from pyro_sb.ops.factor_mixture import FactorMixture
from pyro_sb.ops.regression import regress

__all__ = ["DataColumns", "LikelihoodDistribution", "LikelihoodParts", "ParameterColumns"]

ROWS = 2**16  # draws made at once
WIDE = 3.0  # ratio of a positive parameter's extremes from which its logarithm stands beside it


@dataclass
class ParameterColumns:
    r"""Parameters :math:`\theta` as regressors: standardised, and beside them logarithms of skewed positive ones.

    Args:
        shapes: Of each parameter, by name, in the order of the columns.
        location: Means. Shape ``(k,)``.
        scale: Standard deviations. Shape ``(k,)``.
        low: Least values of the simulations. Shape ``(k,)``.
        high: Largest values. Shape ``(k,)``.
        logged: Columns whose logarithm is a regressor too.
        log_location: Means of the logarithms. Shape ``(len(logged),)``.
        log_scale: Their standard deviations. Shape ``(len(logged),)``.
    """

    shapes: dict[str, Size]
    location: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    logged: tuple[int, ...]
    log_location: Tensor
    log_scale: Tensor

    @classmethod
    def fit(cls, theta: Tensor, shapes: dict[str, Size]) -> "ParameterColumns":
        """Moments and ranges of simulated parameters. Shape ``(N, k)``."""
        low, high, (location, scale) = theta.amin(0), theta.amax(0), moments(theta)
        skewed = (low > 0) & (high > WIDE * low)
        logs = torch.where(skewed, theta, torch.ones_like(theta)).log()
        skewed &= skewness(logs).abs() < skewness(theta).abs()
        logged = tuple(skewed.nonzero().flatten().tolist())
        return cls(shapes, location, scale, low, high, logged, *moments(logs[:, list(logged)]))

    @property
    def dim(self) -> int:
        """Number of columns k."""
        return len(self.location)

    @property
    def num_features(self) -> int:
        """Number of regressors."""
        return self.dim + len(self.logged)

    def design(self, theta: Tensor) -> Tensor:
        """Regressors ``(*, F)`` of parameters ``(*, k)``: affine beyond the simulations' region."""
        standard = (theta - self.location) / self.scale
        if not self.logged:
            return standard
        positive = torch.maximum(theta, self.low)[..., list(self.logged)]
        return torch.cat([standard, (positive.log() - self.log_location) / self.log_scale], -1)

    def context(self, theta: Tensor) -> Tensor:
        """What the networks see ``(*, F)``: beyond the simulations' region, its nearest point."""
        return self.design(torch.minimum(torch.maximum(theta, self.low), self.high))

    def outside(self, theta: Tensor) -> Tensor:
        """Which parameters lie outside the simulations' region, by column. Shape ``(*, k)``, bool."""
        return (theta < self.low) | (theta > self.high)


@dataclass
class DataColumns:
    r"""Data of one run as a class of its discrete numbers and a vector of the others, some by their logarithm.

    Args:
        event_shape: Of one run's data.
        discrete: Columns that are discrete.
        categories: Values of the discrete columns that were simulated, a row a class. Shape ``(K, len(discrete))``.
        logged: Which of the other columns are taken by their logarithm.
    """

    event_shape: Size
    discrete: tuple[int, ...]
    categories: Tensor
    logged: tuple[int, ...] = ()

    @property
    def dim(self) -> int:
        """Number of columns m."""
        return self.event_shape.numel()

    @property
    def continuous(self) -> list[int]:
        """Columns that are not discrete."""
        return [i for i in range(self.dim) if i not in self.discrete]

    @property
    def num_classes(self) -> int:
        """Number of classes K; 0 without discrete columns."""
        return len(self.categories) if self.discrete else 0

    def classes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Class of each row ``(*, m)``, and whether there is one: ``(*,)`` both."""
        same = (y[..., None, list(self.discrete)] == self.categories).all(-1)
        return same.to(torch.uint8).argmax(-1), same.any(-1)

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continuous part ``(*, d)`` of rows ``(*, m)``, log of its Jacobian, and whether it is in the support."""
        x = y[..., self.continuous]
        if not self.logged:
            return x, torch.zeros_like(y[..., 0]), torch.ones_like(y[..., 0], dtype=torch.bool)
        taken = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        taken[list(self.logged)] = True
        positive = x > 0
        logs = torch.where(positive, x, torch.ones_like(x)).log()
        inside = (positive | ~taken).all(-1)
        return torch.where(taken, logs, x), -torch.where(taken, logs, torch.zeros_like(logs)).sum(-1), inside

    def decode(self, x: Tensor, classes: Tensor) -> Tensor:
        """Rows ``(n, m)`` of continuous parts ``(n, d)`` and classes ``(n,)``."""
        y = self.categories.new_empty(len(classes), self.dim)
        if self.logged:
            x = x.clone()
            x[:, list(self.logged)] = x[:, list(self.logged)].exp()
        y[:, self.continuous] = x
        if self.discrete:
            y[:, list(self.discrete)] = self.categories[classes]
        return y

    @staticmethod
    def better_logged(x: Tensor, features: Tensor) -> tuple[int, ...]:
        """Positive columns that an affine Gaussian regression describes better by their logarithm, in nats."""
        weights, chosen = features.new_full((len(x),), 1 / len(x)), []
        for i in (x > 0).all(0).nonzero().flatten().tolist():
            column = x[:, i : i + 1]
            logs = column.log()
            raw, log = ((v - regress(v, features, weights)(features)).std().log() for v in (column, logs))
            if float(log + logs.mean()) < float(raw):
                chosen.append(i)
        return tuple(chosen)


@dataclass
class LikelihoodParts:
    r"""Fitted parts of a likelihood: a classifier of the discrete numbers, a bridge of the others given them.

    Args:
        columns: The parameters.
        data: The data.
        classifier: Network from regressors to logits of the classes, beside their shares. None: all is continuous.
        log_shares: Log shares of the classes. Shape ``(K,)``.
        bridge: Of whitened residuals, given regressors and class. None: all is discrete.
        residuals: Coordinates of the continuous part.
    """

    columns: ParameterColumns
    data: DataColumns
    classifier: ContextNet | None
    log_shares: Tensor
    bridge: MixtureBridge | None
    residuals: Residuals | None

    def class_log_probs(self, theta: Tensor) -> Tensor:
        r"""Values :math:`\log p(c | \theta)`. ``(*, k)`` to ``(*, K)``."""
        assert self.classifier is not None
        context = self.columns.context(theta)
        logits = with_constant_parameters(self.classifier, self.classifier.forward, context)
        return torch.log_softmax(logits + self.log_shares, -1)

    def with_class(self, features: Tensor, classes: Tensor | None) -> Tensor:
        """Features ``(*, F)`` and an indicator of the class ``(*,)``; without classes the features."""
        if classes is None:
            return features
        marks = torch.nn.functional.one_hot(classes, self.data.num_classes).to(features)
        shape = torch.broadcast_shapes(features.shape[:-1], marks.shape[:-1])
        return torch.cat([features.expand(*shape, -1), marks.expand(*shape, -1)], -1)

    def log_prob(self, y: Tensor, theta: Tensor, shape: Size) -> Tensor:
        """Log density of data ``(*, m)`` at parameters ``(*, k)`` whose batches broadcast to a shape."""
        value, jacobian, inside = self.data.encode(y)
        total, classes = jacobian.expand(shape), None
        if self.data.num_classes:
            classes, known = self.data.classes(y)
            inside, classes = inside & known, classes.expand(shape)
            log_probs = self.class_log_probs(theta).expand(*shape, -1)
            total = total + torch.gather(log_probs, -1, classes[..., None])[..., 0]
        if self.bridge is not None:
            total = total + self._continuous(value.expand(*shape, -1), theta, classes)
        return torch.where(inside, total, torch.full_like(total, -torch.inf))

    def _continuous(self, value: Tensor, theta: Tensor, classes: Tensor | None) -> Tensor:
        """Log density of the continuous part ``(*S, d)`` given classes ``(*S,)``, the network asked once a theta."""
        assert self.bridge is not None and self.residuals is not None
        features = self.with_class(self.columns.design(theta), classes)
        residual, slope = self.residuals.whitened(value, features)
        context, every = self.columns.context(theta), self.data.num_classes
        alone = classes is not None and context[..., 0].numel() * every < classes.numel()
        if alone:  # parameters that many rows share: at each of them the law of every class
            context = self.with_class(context[..., None, :], torch.arange(every, device=context.device))
        else:
            context = self.with_class(context, classes)
        law = self.bridge.fixed(context)
        if law is None:
            rows = self.with_class(self.columns.context(theta), classes)
            return self.bridge(rows).log_prob(residual) + slope
        if alone and classes is not None:
            law = law._replace(law=FactorMixture(*(_of_class(part, classes, theta.dim() - 1) for part in law.law)))
        return law.log_prob(residual) + slope

    @torch.no_grad()
    def sample(self, theta: Tensor) -> Tensor:
        """A draw at each row of parameters. ``(n, k)`` to ``(n, m)``."""
        parts = [self._drawn(rows) for rows in theta.split(ROWS)]
        return torch.cat(parts) if parts else theta.new_empty(0, self.data.dim)

    def _drawn(self, theta: Tensor) -> Tensor:
        classes = None
        if self.data.num_classes:
            classes = torch.multinomial(self.class_log_probs(theta).exp(), 1)[:, 0]
        x = theta.new_empty(len(theta), 0)
        if self.bridge is not None:
            assert self.residuals is not None
            residual = self.bridge(self.with_class(self.columns.context(theta), classes)).sample()
            x = self.residuals.coloured(residual, self.with_class(self.columns.design(theta), classes))
        return self.data.decode(x, torch.zeros(len(theta), dtype=torch.long) if classes is None else classes)


class LikelihoodDistribution(TorchDistribution):
    r"""Law :math:`p(y | \theta)` of a simulator's data, learnt: what `AmortizedLikelihood` gives for parameters.

    ``log_prob`` is the exact density of the fitted mixture (probability, for discrete parts), with gradients in
    :math:`\theta` and in continuous y; how far the fit is from the simulator, `AmortizedLikelihood.scores` and
    `report` say. ``batch_shape`` is that of the parameters, ``event_shape`` one run's data. In a plate the network is
    asked once a parameter, however many rows share it.

    Args:
        parts: The fitted parts.
        theta: Parameters in columns. Shape ``(*batch, k)``.
        batch_shape: A larger batch, for plates. Omitted: that of the parameters.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, parts: LikelihoodParts, theta: Tensor, batch_shape: Size | None = None) -> None:
        self.parts, self.theta = parts, theta
        batch_shape = theta.shape[:-1] if batch_shape is None else sample_size(batch_shape, "batch_shape")
        super().__init__(batch_shape, parts.data.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Real numbers; outside the simulations' own support the density is zero."""
        num = len(self.event_shape)
        return constraints.independent(constraints.real, num) if num else constraints.real

    def __repr__(self) -> str:
        batch = f", batch_shape {tuple(self.batch_shape)}" if self.batch_shape else ""
        given = ", ".join(self.parts.columns.shapes)
        return f"LikelihoodDistribution: data {tuple(self.event_shape)} given {given}{batch}"

    def expand(self, batch_shape: Size, _instance: Any = None) -> "LikelihoodDistribution":
        """The same law over a larger batch."""
        shape = sample_size(batch_shape, "batch_shape")
        if broadcast("batch_shape and the batch", shape, self.batch_shape) != shape:
            raise ValueError(
                f"batch_shape must be one that {tuple(self.batch_shape)} expands to, got {tuple(shape)}. Write "
                f"{(2, *self.batch_shape)}."
            )
        return LikelihoodDistribution(self.parts, self.theta, shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradients. Shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        shape = sample_size(sample_shape) + self.batch_shape
        rows = self.theta.detach().expand(*shape, self.theta.shape[-1]).reshape(-1, self.theta.shape[-1])
        return self.parts.sample(rows).reshape(*shape, *self.event_shape)

    def log_prob(self, value: Any) -> Tensor:
        """Log density of data ``(*, *event_shape)``, the batches broadcast; -inf outside the simulations' support."""
        value = floats("value", value, self.theta)
        num = len(self.event_shape)
        if value.dim() < num or value.shape[value.dim() - num :] != self.event_shape:
            raise ValueError(
                f"value must have the shape (*batch, *{tuple(self.event_shape)}) of one run's data, got "
                f"{tuple(value.shape)}. Runs at the same parameters are rows of a plate: y[..., None, :] or a plate."
            )
        lead = value.shape[: value.dim() - num]
        shape = broadcast("value and the batch", lead, self.batch_shape)
        y = value.reshape(*lead, self.parts.data.dim)
        if is_validation_enabled():
            self._check(y)
        return self.parts.log_prob(y, self.theta, shape)

    def _check(self, y: Tensor) -> None:
        """Refuse data that no simulation could have been, where values may be looked at."""
        data = self.parts.data
        try:
            if bool(torch.isnan(y).any()):
                raise ValueError(
                    f"value must hold no NaN, got {int(torch.isnan(y).sum())}. Leave those rows out: they "
                    "have no likelihood."
                )
            inside = data.encode(y)[2]
            known = data.classes(y)[1] if data.num_classes else inside
            low, strange = int((~inside).sum()), int((~known).sum())
        except RuntimeError:  # inside torch.func.vmap no branch may look at values
            return
        if low:
            logged = [data.continuous[i] for i in data.logged]
            raise ValueError(
                f"value must be positive in columns {logged}, as in every simulation, got {low} rows that are not. "
                "Check the data's units, or simulate such data."
            )
        if strange:
            row = y[~known].reshape(-1, data.dim)[0, list(data.discrete)].tolist()
            seen = data.categories[:6].tolist()
            raise ValueError(
                f"value must have discrete columns {list(data.discrete)} that were simulated, such as {seen}, got "
                f"{row} and {strange - 1} more. Check the coding of the data, or simulate with a wider proposal."
            )


def _of_class(part: Tensor, classes: Tensor, num: int) -> Tensor:
    """Of a tensor ``(*B, K, *rest)`` the entries of each row's class ``(*S,)``; B, of num axes, is broadcast to S."""
    shape, (every, *rest) = classes.shape, part.shape[num:]
    index = classes.reshape(*shape, *[1] * (1 + len(rest))).expand(*shape, 1, *rest)
    return torch.gather(part.expand(*shape, every, *rest), len(shape), index).squeeze(len(shape))


def moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column; 1 where it is constant."""
    location = columns.mean(0)
    scale = (columns - location).square().mean(0).sqrt()
    return location, torch.where(scale > 1e-12 * (1 + location.abs()), scale, torch.ones_like(scale))


def skewness(columns: Tensor) -> Tensor:
    """Third standardised moment of every column."""
    location, scale = moments(columns)
    return ((columns - location) / scale).pow(3).mean(0)
