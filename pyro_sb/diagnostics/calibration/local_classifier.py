"""Local classifier two-sample test, E[(d(theta, y) - 1/2)^2], of an amortised posterior at one observation."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.diagnostics.calibration.simulated import calibration_draws
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.metrics.score import Score
from pyro_sb.threads import chosen_threads

__all__ = ["LocalC2ST", "local_c2st"]

LOOK, BAD = 0.05, 0.01
ENOUGH = 99  # null classifiers whose shares can be .01
FEWEST = 100  # data sets that a classifier learns from
PENALTY, EPOCHS = 1.0, 60  # ridge: in trials early stopping saw less, and its null was five times as far from 1/2


@dataclass(frozen=True, eq=False, repr=False)
class LocalC2ST:
    r"""A classifier's opinion of a posterior at one observation.

    Attributes:
        statistic: Mean of :math:`(d(\theta, y) - \tfrac12)^2` over the posterior's draws at y, 0 where d cannot tell.
        null: The same of classifiers that were trained on swapped labels. Shape ``(num_null,)``.
        probabilities: d at each draw: the probability that it comes from the posterior, not from the model. Draws with
            a large one lie where the posterior puts too much. Shape ``(n,)``.

    Example:
        >>> y, noise = torch.randn(300, 1), torch.randn(300, 1)
        >>> result = LocalC2ST.of(y + noise, y + 3 + torch.randn(300, 1), y, torch.zeros(1), 3 + torch.randn(200, 1))
        >>> result.p_value < 0.1, bool(result.score > 0.8)
        (True, True)
    """

    statistic: float
    null: Tensor
    probabilities: Tensor

    @classmethod
    def of(
        cls,
        truths: Tensor,
        draws: Tensor,
        observations: Tensor,
        y: Tensor,
        draws_at_y: Tensor,
        *,
        num_null: int = 20,
        hidden: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> "LocalC2ST":
        r"""The test of anybody's posterior.

        Args:
            truths: Parameters that made each of S data sets, at least 100. Shape ``(S, parameters)``.
            draws: One posterior draw for each data set. Shape ``(S, parameters)``.
            observations: The data sets, or features of them. Shape ``(S, data_dim)``.
            y: The observation, or its features. Shape ``(data_dim,)``.
            draws_at_y: Posterior draws there. Shape ``(n, parameters)``.
            num_null: Classifiers that learn swapped labels, at least 9. From 99 on their shares alone decide,
                under that their spread does.
            hidden: Widths of the classifier. Omitted: two layers of ten times its inputs, at most 100.
            generator: Swaps labels and starts networks. Omitted: torch's global generator.
        """
        _check(truths, draws, observations, y, draws_at_y, num_null)
        location, scale = truths.double().mean(0), truths.double().std(0).clamp_min(1e-300)
        data_location, data_scale = observations.double().mean(0), observations.double().std(0)
        data_scale = torch.where(data_scale > 0, data_scale, 1.0)
        given = (observations.double() - data_location) / data_scale
        real, made = (torch.cat([(part.double() - location) / scale, given], 1) for part in (truths, draws))
        here = ((y.double() - data_location) / data_scale).expand(len(draws_at_y), -1)
        asked = torch.cat([(draws_at_y.double() - location) / scale, here], 1)
        widths = hidden or (min(100, 10 * real.shape[1]),) * 2
        model, posterior, at_y = (part.detach().cpu().numpy() for part in (real, made, asked))
        found = _opinion(model, posterior, at_y, widths, generator)
        null = []
        for _ in range(num_null):
            swap = (_uniform(len(real), generator) < 0.5).numpy()[:, None]
            first, second = np.where(swap, posterior, model), np.where(swap, model, posterior)
            null.append(float(np.square(_opinion(first, second, at_y, widths, generator) - 0.5).mean()))
        statistic = float(np.square(found - 0.5).mean())
        return cls(statistic, torch.tensor(null, dtype=torch.float64), torch.from_numpy(found))

    @property
    def p_value(self) -> float:
        """Share of classifiers on swapped labels, this one counted, that see at least as much."""
        return float((self.null >= self.statistic).sum() + 1) / (len(self.null) + 1)

    @property
    def score(self) -> Score:
        r"""Root mean square of :math:`d - \tfrac12`, plus a half; the floor is the median of the null's.

        Near .5 for an exact posterior, 1 where the classifier is sure.
        """
        return Score(0.5 + self.statistic**0.5, floor=0.5 + float(self.null.median()) ** 0.5)

    @property
    def tail_p_value(self) -> float:
        r"""Probability that the next classifier on swapped labels sees as much, by Student's law: small ones too.

        The null's r.m.s. of :math:`d - \tfrac12` is skewed, its square root nearly normal; so of its mean and standard
        deviation over m null classifiers, :math:`\sqrt{1 + 1/m}` standard deviations make the unit of a t with m - 1
        degrees of freedom. Where the posterior was exact, p was up to .01 in 1.4 % and up to .05 in 6.9 % of trials.
        """
        from scipy.stats import t

        null, num = self.null**0.25, len(self.null)
        unit = float(null.std()) * (1 + 1 / num) ** 0.5
        return float(t.sf((self.statistic**0.25 - float(null.mean())) / max(unit, 1e-300), num - 1))

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"look"`` (p up to .05) or ``"bad"`` (up to .01).

        By `p_value` where there are 99 null classifiers or more, else by `tail_p_value`.
        """
        p = self.p_value if len(self.null) >= ENOUGH else self.tail_p_value
        return "ok" if p > LOOK else "look" if p > BAD else "bad"

    def __repr__(self) -> str:
        return (
            f"LocalC2ST: {self.score.describe()}, p = {self.p_value:.2g} of {len(self.null)} null classifiers, "
            f"{self.tail_p_value:.2g} by their spread: {self.verdict}"
        )


def local_c2st(
    amortized: AmortizedPosterior,
    y: Any,
    num_data_sets: int = 1000,
    num_draws: int = 1000,
    *,
    corrected: bool | str = False,
    num_null: int = 20,
    generator: torch.Generator | None = None,
) -> LocalC2ST:
    r"""Local classifier two-sample test of an amortised posterior at one observation.

    SBC judges a posterior over all data sets of the model; this one judges it at y. A classifier
    :math:`d(\theta, y)` learns to tell pairs :math:`(\theta, y)` of the model from pairs whose parameters were drawn
    from the posterior given y. Where the posterior is exact at y, d is 1/2 at all its draws there; how far it is from
    that by chance, classifiers tell that learn with the labels of random pairs swapped.

    Where the classifier is weak, so is the test: "ok" says that it saw nothing.

    Args:
        amortized: Fitted.
        y: The observation, as for ``amortized.condition``.
        num_data_sets: Pairs that the classifiers learn from, at least 100.
        num_draws: Draws at y.
        corrected: As in `sbc`, for the draws at the pairs and at y.
        num_null: Classifiers with swapped labels, at least 9. From 99 on their shares alone decide, else their spread.
        generator: Swaps labels and starts networks. Omitted: torch's global generator.

    Returns:
        The statistic, its null, p-value and score.

    References:
        L-C2ST: Local Diagnostics for Posterior Approximations in Simulation-Based Inference (Linhart, Gramfort and
        Rodrigues, 2023), https://arxiv.org/abs/2306.03580, algorithms 1 and 2. We swap labels within pairs of one data
        set, which are exchangeable given it.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0))
        >>> amortized = AmortizedPosterior(model, bridge="light")
        >>> history = amortized.fit(num_simulations=500, num_updates=200, progress=False)
        >>> local_c2st(amortized, torch.tensor(0.5), num_data_sets=200, num_null=9).score < 0.7
        True
    """
    joint = calibration_draws(amortized, max(num_data_sets, FEWEST), 20, corrected=corrected)
    posterior = amortized.condition(y)
    if posterior.observation.batched or posterior.observation.missing:
        raise ValueError("y must be one complete observation, got a batch or missing entries. Write y[i].")
    if corrected == "importance":
        sites = posterior.importance(max(num_draws, 2000)).resample(num_draws)
    elif corrected:
        sites = posterior.mcmc(-(-num_draws // 64), num_chains=64).get_samples(num_draws)
    else:
        sites = posterior.sample(num_draws)
    order = list(amortized.simulator.prototype.transforms)
    at_y = torch.cat([sites[name].reshape(num_draws, -1) for name in order], -1)
    return LocalC2ST.of(
        joint.truths,
        joint.draws[0],
        joint.observations,
        posterior.observation.values[0].to(joint.observations),
        at_y,
        num_null=num_null,
        generator=generator,
    )


def _opinion(
    real: np.ndarray, made: np.ndarray, asked: np.ndarray, hidden: tuple[int, ...], generator: torch.Generator | None
) -> np.ndarray:
    """Probability of ``made`` at rows ``asked``, by a network too stiff to learn the pairs by heart."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    state = int(_uniform(1, generator) * (2**31 - 1))
    network = MLPClassifier(hidden, alpha=PENALTY, learning_rate_init=0.01, max_iter=EPOCHS, random_state=state)
    with warnings.catch_warnings(), chosen_threads():  # small products: BLAS's threads would wait for each other
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        network.fit(np.concatenate([real, made]), np.repeat([0, 1], len(real)))
    return network.predict_proba(asked)[:, 1]


def _uniform(num: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.rand(num, dtype=torch.float64, generator=generator, device=device).cpu()


def _check(truths: Tensor, draws: Tensor, observations: Tensor, y: Tensor, draws_at_y: Tensor, num_null: int) -> None:
    if truths.dim() != 2 or draws.shape != truths.shape or draws_at_y.shape[1:] != truths.shape[1:]:
        raise ValueError(
            "truths and draws must have one shape (S, parameters), and draws_at_y the shape (n, parameters), got "
            f"{tuple(truths.shape)}, {tuple(draws.shape)} and {tuple(draws_at_y.shape)}."
        )
    if observations.dim() != 2 or len(observations) != len(truths) or y.shape != observations.shape[1:]:
        raise ValueError(
            f"observations must have the shape ({len(truths)}, data_dim) and y (data_dim,), got "
            f"{tuple(observations.shape)} and {tuple(y.shape)}. Flatten them."
        )
    if len(truths) < FEWEST:
        raise ValueError(f"a classifier needs at least {FEWEST} data sets, got {len(truths)}. Write 1000.")
    if num_null < 9:
        raise ValueError(f"num_null must be at least 9, got {num_null}: fewer have no spread. Write 20.")
