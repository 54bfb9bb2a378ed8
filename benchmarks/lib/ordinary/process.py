"""What both kinds of child process share: arguments, a limit of CPU seconds, clocks, the file of what came out.

Standard library and numpy alone: it runs in both environments, before JAX or torch is imported.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.ordinary.quantities import columns


def asked(samplers: Sequence[str]) -> argparse.Namespace:
    """Arguments of a child; held to one core from here on, unless ``--threads``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sampler", choices=samplers)
    parser.add_argument("model")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=0, help="of a long run, a chain")
    parser.add_argument("--limit", type=float, required=True, help="CPU seconds")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--threads", action="store_true", help="as many as a user finds")
    options = parser.parse_args()
    if not options.threads and hasattr(os, "sched_setaffinity"):  # the one way that holds XLA to one thread
        os.sched_setaffinity(0, {idlest(sorted(os.sched_getaffinity(0)))})
    return options


def idlest(cores: Sequence[int]) -> int:
    """The core that was idle for longest in the last fifth of a second."""

    def idle() -> dict[int, int]:
        stat = Path("/proc/stat")
        lines = [line.split() for line in stat.read_text().splitlines()] if stat.exists() else []
        return {int(line[0][3:]): int(line[4]) for line in lines if line[0][:3] == "cpu" and line[0] != "cpu"}

    before = idle()
    time.sleep(0.2)
    after = idle()
    return max(cores, key=lambda core: after.get(core, 0) - before.get(core, 0))


def cpu() -> float:
    """CPU seconds of this process and of children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


class Clock:
    """CPU and wall seconds from its making; the process is ended at so many CPU seconds."""

    def __init__(self, limit: float) -> None:
        until = int(cpu() + limit) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        self.began, self.wall, self.warm = cpu(), time.perf_counter(), float("nan")

    def warmed(self) -> None:
        """Warm-up is over."""
        self.warm = cpu() - self.began

    def stop(self) -> dict[str, float]:
        """Seconds until now, and no limit from here on."""
        seconds = {"cpu": cpu() - self.began, "wall": time.perf_counter() - self.wall, "warm": self.warm}
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        return seconds


Sites = dict[str, np.ndarray]


def run(options: argparse.Namespace, sample: Callable[[Clock], tuple[Sites, dict[str, Any]]]) -> None:
    """Sample under the clock, and leave the quantities' draws, seconds and notes."""
    clock = Clock(options.limit)
    sites, facts = sample(clock)
    seconds = clock.stop()
    names, draws = columns(sites, options.sites)
    np.savez(options.outputs, names=np.array(names), draws=draws, facts=np.array(json.dumps(facts | seconds)))
