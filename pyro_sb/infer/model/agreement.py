r"""A model on many rows: routes, the fastest first, and the test that a batch is what single rows are.

A `Runner` takes the first route that serves, whatever is read off a batch: log densities with gradients, or values and
log densities of sites. A route is right if

- **figures are those of single rows**, entry by entry, up to an absolute amount and to what sums in another order are
  rounded by. For a log joint, with :math:`S_i = \sum |\text{terms}|` at row i, :math:`\epsilon` the precision of the
  numbers that are compared (float64 wherever the model runs in it), and random points :math:`z_k`,

  .. math::
      |\log p_i - \log p(z_i)| &\le 10^{-4} + 64\, \epsilon S_i \\
      |\partial_j \log p_i - \partial_j \log p(z_i)| &\le 10^{-6} + \sqrt\epsilon \max_k |\partial_j \log p(z_k)| ;

- **row i does not move when all other rows change**: its arithmetic is then the same, so that :math:`8\, \epsilon S_i`
  is left to it.

A log joint may be huge where its differences are small: no amount here is a share of it, beyond rounding. Values of
sites have units of their own: they may differ by :math:`\sqrt\epsilon` of the largest, and move by
:math:`8\, \epsilon` of it.
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_sb.threads import Pace
from pyro_sb.warn import warn

__all__ = [
    "NATS",
    "ROUNDING",
    "SLOPE",
    "STILL",
    "Runner",
    "disagreement",
    "precision",
    "same",
    "vmapped",
]

logger = logging.getLogger(__name__)
Figures = Mapping[str, Tensor]
Result = TypeVar("Result")
CPU = torch.device("cpu")
NATS, SLOPE = 1e-4, 1e-6  # by which log densities may differ, and slopes, in nats per unit of z, beyond rounding
ROUNDING, STILL = 64, 8  # multiples of eps S: of a sum in another order, and of one in the same order


class Runner:
    r"""Routes of a model on many rows, and why some were dropped: it may change its route, never its results.

    Args:
        routes: Names, the fastest first. The last is taken to be right.
        admission: What speaks against a route before it is used; None where nothing does. Omitted: nothing ever.
        advice: Said in a warning where only the last route is left.
        pace: Times the calls; a new one if omitted.

    Attributes:
        reasons: Why routes were dropped, ``"route: reason"``.
    """

    def __init__(
        self,
        routes: Sequence[str],
        admission: Callable[[str], str | None] | None = None,
        *,
        advice: str = "",
        pace: Pace | None = None,
    ) -> None:
        self.left, self.reasons = list(routes), list[str]()
        self.admission, self.advice = admission, advice
        self.pace = Pace() if pace is None else pace
        self._sizes: set[int] = set()
        self._admit()

    @property
    def route(self) -> str:
        """The route in use."""
        return self.left[0]

    def attempt(
        self,
        ask: Callable[[str], Result],
        num: int,
        objection: Callable[[str, Result], str | None],
        *,
        kind: Hashable = None,
        device: torch.device = CPU,
    ) -> Result | None:
        """A batch of ``num`` rows by the route in use; None where the route was dropped: ask again.

        A new number of rows is looked at by ``objection``, and may raise an error: one that equals a size of the model
        can broadcast in silence.
        """
        if len(self.left) == 1:
            with self.pace.call(num, kind=(self.route, kind), device=device):
                return ask(self.route)
        try:
            with self.pace.call(num, kind=(self.route, kind), device=device):
                result = ask(self.route)
            reason = None if num in self._sizes else objection(self.route, result)
        except Exception as error:  # whatever the user's model raises when it meets a batch
            if num in self._sizes or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reason = described(error)
        if reason is None:
            self._sizes.add(num)
            return result
        self.drop(reason)
        return None

    def drop(self, reason: str) -> None:
        """Leave the route in use for the next one that is admitted."""
        self._leave(reason)
        self._admit()

    def _admit(self) -> None:
        """Make the first route that nothing speaks against the one in use."""
        while len(self.left) > 1 and self.admission is not None:
            try:
                reason = self.admission(self.route)
            except Exception as error:  # as above
                reason = described(error)
            if reason is None:
                return
            self._leave(reason)

    def _leave(self, reason: str) -> None:
        logger.info("The model cannot be run by %s: %s.", self.route, reason)
        self.reasons.append(f"{self.left.pop(0)}: {reason}")
        self._sizes.clear()
        if len(self.left) == 1 and self.advice:
            warn(self.advice.format(reasons="; ".join(self.reasons)))


def described(error: Exception) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def disagreement(
    found: Figures, known: Figures, rows: Sequence[int], strangers: Figures | None, allowed: Figures, still: Figures
) -> str | None:
    r"""What speaks against a batch; None if nothing does.

    Args:
        found: Figures of the batch. Shape ``(num, *)`` each.
        known: Figures of single runs of some of its rows. Shape ``(len(rows), *)`` each.
        rows: Which.
        strangers: Figures of another batch, whose row ``rows[-1]`` is the same and whose other rows are not; None
            where there are no others.
        allowed: By how much ``found`` may differ from ``known``.
        still: By how much that row may differ between the batches.
    """
    picked, alone = list(rows), rows[-1]
    for name, figure in known.items():
        batch = found[name][picked]
        if batch.shape != figure.shape:
            return f"{name} of shape {tuple(batch.shape[1:])} and not {tuple(figure.shape[1:])}"
        if not same(batch, figure, allowed[name]):
            return f"wrong {name}"
    for name, figure in (strangers or {}).items():
        if not same(figure[alone], found[name][alone], still[name]):
            return f"{name} of a row move with the other rows"
    return None


def same(a: Tensor, b: Tensor, allowed: Tensor) -> bool:
    """Whether figures are equal, entry by entry, up to what is allowed; NaN and infinities are equal to themselves."""
    equal = (a == b) | (a != a) & (b != b)
    if b.is_floating_point():
        equal |= (a - b).abs() <= allowed
    return bool(equal.all())


def precision(*dtypes: torch.dtype) -> float:
    """The coarsest epsilon of some dtypes; those that hold whole numbers have none."""
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def vmapped(one: Callable[..., Any], *rows: Any, randomness: str = "error") -> Any:
    """``torch.func.vmap`` without torch's remarks on operations that it batches slowly, of no use to a model's user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.func.vmap(one, randomness=randomness)(*rows)
