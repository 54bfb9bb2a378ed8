"""Classifier two-sample test: how well a network tells draws from the target's."""

from typing import Any

import numpy as np
import torch

from pyro_sb.checks import generator_of, whole
from pyro_sb.metrics.score import Score, clouds


def c2st(x: Any, y: Any, *, num_folds: int = 5, generator: torch.Generator | None = None) -> Score:
    r"""Accuracy of a classifier that is to tell the model's draws from the target's, by the benchmarks' definition.

    .. math:: \tfrac1K \sum_{k=1}^{K} \text{share of fold } k \text{ that the classifier of the other folds gets right}

    Both clouds are standardised by the mean and standard deviation of ``y``. The classifier has two hidden layers of 10
    d ReLU units and is trained by Adam for up to 10,000 epochs (it stops when its loss no longer falls). 0.5 is
    indistinguishable, 1 apart; between two densities the best classifier scores 1/2 + TV/2.

    The value rises with n at one and the same model, by .01 to .02 from 1,000 to 2,000 draws a side: compare scores of
    one n. It counts every draw as independent, so a chain's draws score higher than they should. A pair of 2,000 draws
    a side takes some 15 CPU seconds in the plane and half a minute in ten dimensions. (A hundred draws may take as
    long: the network learns them by heart.)

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        y: Draws of the target, as many. Shape ``(n, d)``; or a distribution, of which n are drawn.
        num_folds: K, from 2 to 2 n.
        generator: Draws from a distribution, shuffles the folds and starts the network. Omitted: torch's global one.

    Returns:
        The accuracy, with the floor 0.5: the expected value for a perfect sampler. Exact draws score .48 to .52 at
        n = 1,000, so a value within .02 of the floor, or below it, is as good as exact.

    Raises:
        ValueError: As many draws of both are not given, or the target is constant along an axis.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017), https://arxiv.org/abs/1610.06545;
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), https://arxiv.org/abs/2101.04653

    Example:
        >>> x, y = torch.randn(300, 1), torch.randn(300, 1)
        >>> bool(c2st(x + 9, y) > 0.95), c2st(x + 9, y).floor
        (True, 0.5)
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    num_folds, generator = whole("num_folds", num_folds, 2), generator_of(generator)
    x, y, _, _ = clouds(x, y, x, generator)  # x as the floor's draws: the floor is known, and needs no further draws
    if len(x) != len(y):
        small, name = min((len(x), "y"), (len(y), "x"))
        raise ValueError(
            f"x and y must hold as many draws, or the classifier gains by guessing, got {len(x)} and {len(y)}. "
            f"Write {name}[torch.randperm(len({name}))[:{small}]]."
        )
    if num_folds > 2 * len(x):
        raise ValueError(f"num_folds must be from 2 to the number of draws, {2 * len(x)}, got {num_folds}.")
    sd = y.std(0)
    if bool((sd == 0).any()):
        raise ValueError(
            f"y must vary along every axis, got axis {int(sd.argmin())} constant. Leave it out, or compare it alone."
        )
    data = ((torch.cat([x, y]) - y.mean(0)) / sd).cpu().numpy()
    label = np.repeat([0, 1], len(x))
    device = None if generator is None else generator.device
    state = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    width = 10 * x.shape[-1]
    network = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=10_000, random_state=state)
    folds = KFold(num_folds, shuffle=True, random_state=state)
    return Score(float(cross_val_score(network, data, label, cv=folds, scoring="accuracy").mean()), floor=0.5)
