"""CPU seconds of fits on a fixed budget, and what is measured between their iterations."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from sklearn.exceptions import ConvergenceWarning

T = TypeVar("T")


def timed(run: Callable[..., T], *arguments: Any, **options: Any) -> tuple[T, float]:
    """A result and its CPU seconds in this process."""
    begun = time.process_time()
    return run(*arguments, **options), time.process_time() - begun


@contextmanager
def quiet() -> Iterator[None]:
    """That a budget ends before a fit has converged is no news."""
    with warnings.catch_warnings():
        for category in (RuntimeWarning, ConvergenceWarning):
            warnings.simplefilter("ignore", category)
        yield


def cpu_seconds(run: Callable[..., object], *arguments: Any, **options: Any) -> float:
    """CPU seconds of a fit, quietly."""
    with quiet():
        return timed(run, *arguments, **options)[1]


class Watch:
    """Scores of every iteration, taken by `on_iteration` of a fit, with the CPU seconds that are the fit's own.

    Args:
        measure: Scores the bridge as it stands; the fit's random numbers are not touched by it.
    """

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self.measure, self.rows = measure, list[dict[str, float]]()
        self.begun = time.process_time()

    def __call__(self, iteration: int) -> None:
        now, state = time.process_time(), torch.get_rng_state()
        self.rows.append(self.measure() | {"seconds": now - self.begun})
        torch.set_rng_state(state)
        self.begun += time.process_time() - now
