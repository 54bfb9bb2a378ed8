"""`Score`, a number with its floor, and the clouds of draws that a score and its floor are taken from."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.checks import finite, floats


class Score(float):
    r"""A metric's value that knows its floor: what a perfect sampler would score, given as many draws.

    It is a float in every respect; only its `repr` shows the floor too.

    Attributes:
        floor: The same metric for draws of the target itself. Two scores compare only where their floors do.

    Example:
        >>> score = Score(0.0312, floor=0.024)
        >>> score
        0.0312 (floor 0.024)
        >>> round(score.excess, 4), f"{score:.2f}"
        (0.0072, '0.03')
    """

    floor: float

    def __new__(cls, value: float, floor: float = 0.0) -> "Score":
        """A score of a value and its floor."""
        score = super().__new__(cls, value)
        score.floor = float(floor)
        return score

    @property
    def excess(self) -> float:
        """The value less its floor: near 0 for a perfect sampler, on either side of it where the floor is random."""
        return float(self) - self.floor

    def describe(self) -> str:
        """The value and its floor, to three digits."""
        return f"{float(self):.3g} (floor {self.floor:.3g})"

    def __repr__(self) -> str:
        return self.describe()


class Clouds(NamedTuple):
    """Clouds that a metric compares, in float64: x against y, and for the floor y0 against y1."""

    x: Tensor
    y: Tensor
    y0: Tensor
    y1: Tensor


def clouds(x: Any, y: Any, floor_draws: Any = None, generator: torch.Generator | None = None) -> Clouds:
    r"""The model's draws, the target's, and two independent clouds of the target.

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        y: Draws of the target, shape ``(m, d)``, or a distribution, of which n are drawn.
        floor_draws: Further draws of the target, or a distribution, of which n are drawn. Omitted: n fresh draws if
            ``y`` is a distribution, else ``y`` is split into random halves.
        generator: Makes the draws and parts the halves. Omitted: torch's global generator.
    """
    model = cloud("x", x)
    target = _like("y", y, model, generator)
    if floor_draws is None and not isinstance(y, Distribution):
        half = len(target) // 2
        if half < 2:
            raise ValueError(
                f"y must hold at least 4 draws to be halved for the floor, got {len(target)}. "
                "Pass more, or floor_draws."
            )
        device = None if generator is None else generator.device
        order = torch.randperm(len(target), generator=generator, device=device).to(target.device)
        return Clouds(model, target, target[order[:half]], target[order[half:]])
    return Clouds(
        model, target, target, _like("floor_draws", y if floor_draws is None else floor_draws, model, generator)
    )


def cloud(name: str, draws: Any, ndim: int = 2) -> Tensor:
    """Draws in float64 without gradients, checked: shape ``(n, d)`` with n at least 2 (more axes lead it), finite."""
    shape = "(n, d)" if ndim == 2 else "(num_points, n, d)"
    if isinstance(draws, Distribution):
        raise TypeError(f"{name} must be draws of shape {shape}, got a distribution. Write {name}.sample((n,)).")
    value = floats(name, draws).detach().to(torch.float64)
    if value.dim() != ndim or value.shape[-2] < 2 or value.shape[-1] < 1:
        raise ValueError(
            f"{name} must be at least two draws of shape {shape}, got {tuple(value.shape)}. "
            f"For scalar draws write {name}[..., None]."
        )
    return finite(name, value, "Correct the sampler: a score of the other draws alone would hide them.")


def _like(name: str, draws: Any, model: Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(draws, Distribution):
        draws = _drawn(draws, len(model), generator)
    value = cloud(name, draws).to(model.device)
    if value.shape[-1] != model.shape[-1]:
        raise ValueError(
            f"x and {name} must have one dimension, got {model.shape[-1]} and {value.shape[-1]}. "
            "Pass draws of the same law, (n, d) each."
        )
    return value


def _drawn(law: Distribution, num: int, generator: torch.Generator | None) -> Tensor:
    """Draws of a law, which knows torch's global generator alone: seeded by the given one for that long."""
    if generator is None:
        return law.sample(torch.Size([num]))
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return law.sample(torch.Size([num]))
