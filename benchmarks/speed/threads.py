"""Chains and fits with one thread, with all, and with those that the run chooses, idle and beside busy processes.

Run as `python -m benchmarks.speed.threads [--only WORD] [--repeats 3] [--busy 0 2]`. Every run has a process
of its own, and the settings take turns:

- ``one``: ``OMP_NUM_THREADS=1``;
- ``all``: as many threads as torch takes by itself, with the choice switched off;
- ``chosen``: what a user gets who has set nothing.

The claim: wall seconds as chosen are at most 1.2 times those of the better of the two others.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_sb.threads as threads
from benchmarks.lib.report import header, table, write
from pyro_sb import MCMC, VSDM, AmortizedPosterior, KernelLangevin, LightSB

CLAIM = 1.2
LIMIT = 90  # seconds of a run, after which it is stopped and counts as so long
SETTINGS = ("one", "all", "chosen")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DIM = 6


def regression(X: Tensor, y: Tensor | None = None) -> None:
    """Six coefficients and a scale: seven unknowns."""
    b = pyro.sample("b", dist.Normal(X.new_zeros(DIM), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(X.new_ones(())))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal((X @ b[..., None])[..., 0], s[..., None]), obs=y)


def data(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Covariates and answers."""
    X = torch.randn(rows, DIM, dtype=dtype)
    return X, X @ torch.linspace(-1, 1, DIM, dtype=dtype) + 0.5 * torch.randn(rows, dtype=dtype)


def chains(rows: int, num_samples: int) -> str:
    """64 chains of `KernelLangevin`."""
    kernel = KernelLangevin(regression)
    MCMC(kernel, num_samples, num_chains=64, disable_progbar=True).run(*data(rows))
    return kernel.describe().splitlines()[-1]


def vsdm(dim: int, num_updates: int, **options: Any) -> str:
    """A diffusion of correlated draws."""
    draws = torch.randn(4000, dim) @ torch.randn(dim, dim)
    return VSDM(dim).fit(draws, num_updates=num_updates, progress=False, **options).threads


def light() -> str:
    """Fifty components of draws in five dimensions."""
    return LightSB(5).fit(torch.randn(4000, 5).exp(), num_updates=2000, progress=False).threads


def amortised() -> str:
    """The regression's posterior, given any answers to twenty covariates."""
    X, y = data(20, torch.float32)
    amortized = AmortizedPosterior(regression, bridge="light")
    history = amortized.fit(X, num_simulations=2000, num_updates=1000, progress=False)
    amortized.condition(y).importance(2000)
    return history.threads


TASKS: dict[str, Callable[[], str]] = {
    "regression, 100 rows, 64 x 500 draws": lambda: chains(100, 500),
    "VSDM, 2 dimensions, batches of 512": lambda: vsdm(2, 1000),
    "VSDM, 64 dimensions, batches of 4,000": lambda: vsdm(64, 200, batch_size=4000),
    "LightSB, 5 dimensions": light,
    "AmortizedPosterior of the regression": amortised,
}


def measured(task: str, setting: str) -> dict[str, Any]:
    """One run in this process."""
    if setting == "all":
        threads.COUNTS.open = threads.COUNTS.close = lambda *_: None  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(0)
    wall, cpu = time.perf_counter(), time.process_time()
    said = TASKS[task]()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "said": said}


def started(task: str, setting: str) -> dict[str, Any]:
    """One run in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"OMP_NUM_THREADS": "1"} if setting == "one" else {}
    command = [sys.executable, "-m", "benchmarks.speed.threads", "--run", task, setting]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"wall": float(LIMIT), "cpu": float("nan"), "said": "stopped"}
    if done.returncode:
        raise RuntimeError(f"{task} with {setting} threads failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy(num: int) -> Iterator[None]:
    """So many processes that do nothing but run, until this one ends, however it does."""
    endless = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    others = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(num)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def compare(task: str, num_busy: int, repeats: int) -> list[list[object]]:
    """A row a setting, medians of the repeats; the ratio to the better of one and all stands last but one."""
    found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    with busy(num_busy):
        for _ in range(repeats):
            for setting in SETTINGS:
                found[setting].append(started(task, setting))
    middle = {s: {key: median(run[key] for run in runs) for key in ("wall", "cpu")} for s, runs in found.items()}
    best = min(middle["one"]["wall"], middle["all"]["wall"])
    said = found["chosen"][-1]["said"].removeprefix("threads: ")
    return [
        [task, num_busy, s, *middle[s].values(), middle[s]["wall"] / best, said if s == "chosen" else ""]
        for s in SETTINGS
    ]


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, metavar=("TASK", "SETTING"), help="one run in this process")
    parser.add_argument("--only", default="", help="tasks whose names hold this word")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 2], help="numbers of busy processes beside")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measured(*args.run)))
        return
    rows: list[list[object]] = []
    for num_busy in args.busy:
        for task in TASKS:
            if args.only in task:
                rows += compare(task, num_busy, args.repeats)
                print(table([""] * 7, rows[-3:]), flush=True)
    worst = max((row for row in rows if row[2] == "chosen"), key=lambda row: float(str(row[5])))
    verdict = "holds" if float(str(worst[5])) <= CLAIM else "does not hold"
    columns = ["task", "busy beside", "threads", "wall s", "CPU s", "wall / better", "what was chosen"]
    lines = [
        header("Threads of a run: one, all, or chosen by the run", 0),
        f"Medians of {args.repeats} runs, each its own process, stopped after {LIMIT} s; {os.cpu_count()} cores.",
        table(columns, rows),
        f"\nLargest ratio of the chosen {worst[5]:.2f} ({worst[0]}, {worst[1]} busy): the claim of {CLAIM} {verdict}.",
    ]
    write("threads", "\n".join(lines), keep=not args.only)


if __name__ == "__main__":
    main()
