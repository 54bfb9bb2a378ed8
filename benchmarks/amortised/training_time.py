"""CPU seconds to train at 1,000 simulations: the light bridge and sbi's NPE, one after the other in one process.

Run in sbi's environment (`make bench-env`), on a quiet machine:
`.venv-bench/bin/python -m benchmarks.amortised.training_time`.
"""

import os
import statistics
import tempfile
import warnings

import pyro
import torch
from threadpoolctl import threadpool_limits

from benchmarks.amortised.sbi_peers import HIGHER, PLANE, train
from benchmarks.lib.fits import cpu_seconds
from benchmarks.lib.report import header, table, write
from benchmarks.lib.store import command
from pyro_sb.datasets import sbi_task
from pyro_sb.infer import AmortizedPosterior

SEED, SIMULATIONS, TIMES = 1, 1_000, 3
NOTE = f"""Simulation included, one thread, medians of {TIMES} fits, taken in turn. Both fits import torch's compiler
when they build their first optimiser; that second is spent before the clock starts."""


def ours(name: str) -> float:
    """CPU seconds of one fit."""
    pyro.set_rng_seed(SEED)
    posterior = AmortizedPosterior(sbi_task(name).model, bridge="light")
    return cpu_seconds(posterior.fit, num_simulations=SIMULATIONS, progress=False)


def main() -> None:
    command(__doc__)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    rows = []
    with warnings.catch_warnings(), threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # sbi writes its logs here
        warnings.simplefilter("ignore")
        for name in (*PLANE, *HIGHER):
            pairs = []
            for _ in range(TIMES):
                pairs.append((ours(name), train(sbi_task(name), "NPE", SIMULATIONS)[1]["train_seconds"]))
            light, npe = (statistics.median(values) for values in zip(*pairs, strict=True))
            rows.append([name, light, npe, light / npe])
            print(rows[-1], flush=True)
    columns = ["task", "light bridge, s", "sbi NPE, s", "ratio"]
    title = header(f"Training at {SIMULATIONS:,} simulations", SEED)
    write("training_time", "\n".join([title, NOTE, "", table(columns, rows)]))


if __name__ == "__main__":
    main()
