"""One progress bar of a run: its stage, evaluations so far, steps, and the time that is left where it is known."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pyro_sb.stages import listening

__all__ = ["Progress"]

OFTEN = 0.2  # seconds between two looks at a stage that has no steps
STEPS = ("warm-up", "sampling")


class Progress:
    """A bar over the steps of a run, which names the stages before the first step too.

    What a kernel learns before its first step has no known length: the bar stands still, its stage and the evaluations
    tell that work goes on. Where there are steps, the time that is left follows from those made so far.

    Args:
        total: Steps of warm-up and sampling.
        done: Steps that were made before.
        evaluations: Gives the evaluations so far.
        disable: Show nothing. The environment variable ``CI`` has the same effect, as in Pyro.
    """

    def __init__(self, total: int, done: int, evaluations: Callable[[], Any], *, disable: bool) -> None:
        self._evaluations = evaluations
        self._words: dict[str, str] = {}
        self._done = self._before = done
        self._begun = self._shown = time.perf_counter()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="setup",
            disable=disable or "CI" in os.environ or "PYTEST_XDIST_WORKER" in os.environ,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Name the stages that are announced inside."""
        if self._bar.disable:
            yield
            return
        with listening(self.begin, self._look):
            yield

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return not self._bar.disable

    def begin(self, stage: str) -> None:
        """Name a stage."""
        if not self.shown:
            return
        if stage in STEPS:
            self._begun, self._before = time.perf_counter(), self._done
        self._bar.set_description_str(stage, refresh=False)
        self._refresh()

    def steps(self, num: int, words: Mapping[str, str]) -> None:
        """So many steps were made; ``words`` are shown."""
        self._done += num
        if not self.shown:
            return
        self._words = dict(words)
        self._bar.set_postfix(self._postfix(), refresh=False)
        self._bar.update(num)

    def close(self) -> None:
        """The last look."""
        if self.shown:
            self._bar.set_postfix(self._postfix(), refresh=False)
        self._bar.close()

    def _look(self) -> None:
        if time.perf_counter() - self._shown > OFTEN:
            self._refresh()

    def _refresh(self) -> None:
        self._shown = time.perf_counter()
        self._bar.set_postfix(self._postfix(), refresh=False)
        self._bar.refresh()

    def _postfix(self) -> dict[str, str]:
        counts = self._evaluations()
        known = {} if counts is None else {"evaluations": f"{counts.density + counts.gradient:,}"}
        made, total = self._done - self._before, self._bar.total
        if made and self._done < total:
            left = (time.perf_counter() - self._begun) / made * (total - self._done)
            known |= {"left": tqdm.format_interval(left)}
        return known | self._words
