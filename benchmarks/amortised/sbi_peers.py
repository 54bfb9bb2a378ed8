"""The peers of the amortised posteriors: sbi's NPE, FMPE and NPSE with their defaults on sbibm's tasks.

Runs in .venv-bench (`make sbi-peers`), on one thread: `.venv-bench/bin/python -m benchmarks.amortised.sbi_peers
[CELL ...]`, a cell being `two_moons-NPE-1000` or the like. What is in results/sbi_peers.json is not run again.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.lib.report import processor
from benchmarks.lib.store import Store, command
from pyro_sb.datasets import SBITask, sbi_task
from pyro_sb.metrics import c2st

try:
    from sbi.inference import FMPE, NPE, NPSE
    from sbi.samplers.rejection import rejection
    from sbi.utils import BoxUniform
except ModuleNotFoundError as error:
    need = "sbi must be there, as in .venv-bench. Run `make bench-env`, and this script by .venv-bench/bin/python."
    raise SystemExit(f"{error}: {need}") from None

METHODS = {"NPE": NPE, "FMPE": FMPE, "NPSE": NPSE}
PLANE = ("two_moons", "gaussian_mixture")
HIGHER = ("slcp", "gaussian_linear", "gaussian_linear_uniform", "bernoulli_glm")
NUM_OBSERVATIONS = {10_000: 3, 1_000: 5}
TRAIN_CAP = {10_000: 75.0, 1_000: 300.0}  # CPU seconds
DRAW_CAP = 300.0  # seconds an observation
NUM_DRAWS, MANY_DRAWS, SEED = 2000, 10_000, 1
TERMS = (
    "c2st: one a observation, 2,000 draws against the 2,000 reference draws (fewer a side where `draws` is less); "
    "train_seconds: CPU; capped: ended at 75 CPU s (10,000 simulations), best validation weights kept; "
    "seconds_10000_draws: CPU, observation 1, scaled up from fewer draws where `scaled`; evaluations: passes of the "
    "network a proposed draw, observation 1 (null for NPE: a masked autoregressive flow is inverted one dimension at a "
    "time); outside_prior: share of proposals outside the prior's support, which sbi rejects, one an observation."
)


def header() -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("sbi", "torch", "scikit-learn", "pyro-ppl")}
    facts = {"cpu": processor(), "threads": 1, "seed": SEED, "python": platform.python_version()}
    return facts | versions | {"terms": TERMS}


def order() -> Iterator[tuple[str, str, int]]:
    """The cells in the order they are run in."""
    for simulations in NUM_OBSERVATIONS:
        for tasks in (PLANE, HIGHER):
            for task in tasks:
                for method in METHODS:
                    yield task, method, simulations


def simulated(task: SBITask, num: int) -> tuple[Tensor, Tensor]:
    """Joint draws of the model: theta, (num, d), and y flattened, (num, dx)."""
    pyro.set_rng_seed(SEED)
    with torch.no_grad(), pyro.plate("simulations", num, dim=-2):
        trace = poutine.trace(task.model).get_trace()
    return tuple(trace.nodes[site]["value"].flatten(1) for site in ("theta", "y"))


def prior_of(task: SBITask) -> torch.distributions.Distribution:
    """The model's prior as sbi wants it."""
    law = poutine.trace(task.model).get_trace().nodes["theta"]["fn"]
    if hasattr(law, "scale_tril"):
        return torch.distributions.MultivariateNormal(law.loc, scale_tril=law.scale_tril)
    base = law.base_dist
    if hasattr(base, "low"):
        return BoxUniform(base.low, base.high)
    return torch.distributions.Independent(torch.distributions.Normal(base.loc, base.scale), 1)


def end_at(inference: object, seconds: float) -> Callable[[], bool]:
    """Make training end after so many CPU seconds, with its best validation weights; the result says if it did."""
    own, deadline, ended = inference._converged, time.process_time() + seconds, []

    def converged(epoch: int, stop_after_epochs: int) -> bool:
        if own(epoch, stop_after_epochs):
            return True
        if time.process_time() > deadline:
            inference._neural_net.load_state_dict(inference._best_model_state_dict)
            ended.append(epoch)
        return bool(ended)

    inference._converged = converged
    return lambda: bool(ended)


@contextlib.contextmanager
def counting(network: torch.nn.Module | None) -> Iterator[dict]:
    """Counts proposed and accepted draws, and rows that pass the network."""
    count, own = {"proposed": 0, "accepted": 0, "rows": 0}, rejection.accept_reject_sample

    def counted(proposal: Callable, accept_reject_fn: Callable, **options: object) -> object:
        def accept(theta: Tensor) -> Tensor:
            inside = accept_reject_fn(theta)
            count["proposed"] += inside.numel()
            count["accepted"] += int(inside.sum())
            return inside

        return own(proposal=proposal, accept_reject_fn=accept, **options)

    def row(module: torch.nn.Module, inputs: tuple) -> None:
        count["rows"] += inputs[0].shape[0]

    rejection.accept_reject_sample = counted
    handle = network.register_forward_pre_hook(row) if network is not None else None
    try:
        yield count
    finally:
        rejection.accept_reject_sample = own
        if handle is not None:
            handle.remove()


def train(task: SBITask, method: str, simulations: int) -> tuple[object, dict]:
    """A trained posterior, and what training took."""
    theta, y = simulated(task, simulations)
    inference = METHODS[method](prior=prior_of(task), show_progress_bars=False).append_simulations(theta, y)
    was_capped, began = end_at(inference, TRAIN_CAP[simulations]), time.process_time()
    network = inference.train()
    seconds = time.process_time() - began
    facts = {
        "train_seconds": round(seconds, 2),
        "capped": was_capped(),
        "epochs": inference.summary["epochs_trained"][-1],
        "weights": sum(p.numel() for p in network.parameters()),
    }
    return inference.build_posterior(), facts


def draw(posterior: object, task: SBITask, num_observations: int) -> tuple[list[np.ndarray], dict]:
    """Draws for each observation, and what they took; the first observation's are timed at 10,000."""
    network = getattr(getattr(posterior, "vector_field_estimator", None), "net", None)
    take = partial(
        posterior.sample, show_progress_bars=False, max_sampling_time=DRAW_CAP, return_partial_on_timeout=True
    )
    observations = task.observations[:num_observations].flatten(1)
    take((100,), x=observations[0])  # what is made at the first call
    kept, outside, facts = [], [], {}
    for k, y in enumerate(observations):
        num = NUM_DRAWS if k else MANY_DRAWS
        began = time.process_time()
        with counting(network) as count:
            try:
                draws = take((num,), x=y)
            except RuntimeError as error:  # not one accepted, or a partial answer of the wrong shape
                print(f"    observation {k + 1}: {error}", flush=True)
                draws = torch.empty(0, task.reference_draws.shape[-1])
        seconds = time.process_time() - began
        draws = draws[torch.isfinite(draws).all(-1)]
        if k == 0:
            facts["seconds_10000_draws"] = round(seconds * MANY_DRAWS / max(len(draws), 1), 3)
            facts["scaled"] = len(draws) < MANY_DRAWS
            facts["evaluations"] = round(count["rows"] / count["proposed"], 1) if count["rows"] else None
        outside.append(round(1 - count["accepted"] / count["proposed"], 5))
        kept.append(draws[:NUM_DRAWS].numpy())
    return kept, facts | {"outside_prior": outside, "draws": [len(draws) for draws in kept]}


def score(draws: np.ndarray, reference: Tensor) -> float | None:
    """C2ST at as many draws a side as there are; none below 100."""
    if len(draws) < 100:
        return None
    return round(float(c2st(draws, reference[: len(draws)], generator=torch.Generator().manual_seed(SEED))), 4)


def cell(name: str, method: str, simulations: int) -> dict:
    """One method on one task."""
    task = sbi_task(name)
    posterior, trained = train(task, method, simulations)
    print(f"  {name}, {method}, {simulations}: {trained}", flush=True)
    draws, drawn = draw(posterior, task, NUM_OBSERVATIONS[simulations])
    scores = [score(some, reference) for some, reference in zip(draws, task.reference_draws)]
    return {"task": name, "method": method, "simulations": simulations, **trained, **drawn, "c2st": scores}


def main() -> None:
    asked = command(__doc__, cells={"nargs": "*", "metavar": "CELL"})
    store = Store("sbi_peers")
    store.put("header", store.rows.get("header", header()))
    with warnings.catch_warnings(), threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # sbi writes its training logs into the working folder
        warnings.simplefilter("ignore")
        for one in order():
            key = "-".join(map(str, one))
            if not asked.cells or key in asked.cells:
                print(key, json.dumps(store.once(key, lambda one=one: cell(*one))), flush=True)


if __name__ == "__main__":
    main()
