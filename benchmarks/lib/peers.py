"""The peers on the posterior tasks: Pyro's NUTS in this process, NumPyro's in its own environment."""

import json
import math
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS, Predictive
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.lib.scores import Row, score
from pyro_sb.datasets import PosteriorTask

ROOT = Path(__file__).parents[2]
BENCH_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
NUTS_WARMUP, NUTS_DRAWS = 300, 500


class CountingNUTS(NUTS):
    """Pyro's NUTS that counts evaluations of its potential (each is one value with its gradient)."""

    evaluations = 0

    def _initialize_model_properties(self, model_args: tuple, model_kwargs: dict) -> None:
        super()._initialize_model_properties(model_args, model_kwargs)
        potential_fn = self.potential_fn

        def counted(params: dict[str, Tensor]) -> Tensor:
            self.evaluations += 1
            return potential_fn(params)

        self.potential_fn = counted


class OutOfTimeError(Exception):
    """The wall limit has passed."""


class Recorder:
    """A hook that keeps NUTS's draws and ends the run at a wall limit, so that what was drawn by then is not lost."""

    def __init__(self, limit: float):
        self.deadline = time.perf_counter() + limit
        self.draws: list[dict[str, Tensor]] = []
        self.steps = 0
        self.warm = 0.0  # the processor's time when warm-up was over
        self.transforms: dict = {}

    def __call__(self, kernel: NUTS, params: dict[str, Tensor], stage: str, i: int) -> None:
        self.steps += 1
        self.transforms = kernel.transforms
        if stage == "Sample":
            self.warm = self.warm or time.process_time()
            self.draws.append({name: value.detach().clone() for name, value in params.items()})
        if time.perf_counter() > self.deadline:
            raise OutOfTimeError

    def samples(self) -> dict[str, Tensor]:
        """Constrained latents, one chain: (1, draw, ...)."""
        stacked = {name: torch.stack([draw[name] for draw in self.draws])[None] for name in self.draws[0]}
        return {name: self.transforms[name].inv(value) for name, value in stacked.items()}


def init_uniform(dtype: torch.dtype) -> Callable[[dict], Tensor]:
    """Uniform(-2, 2) on the unconstrained space, as Pyro's default, but also for sites that cannot be sampled."""

    def init(site: dict) -> Tensor:
        transform = biject_to(site["fn"].support)
        return transform(torch.empty(transform.inverse_shape(site["fn"].shape()), dtype=dtype).uniform_(-2, 2))

    return init


@dataclass(frozen=True)
class Run:
    """A run of Pyro's NUTS: draws ``(chain, draw, p)``, wall and CPU seconds, evaluations, whether it was cut."""

    draws: np.ndarray
    seconds: float
    cpu: float
    warm: float  # of the CPU seconds, those before the first kept draw
    evaluations: int
    steps: int
    cut: bool


def pyro_nuts(
    task: PosteriorTask,
    seed: int,
    limit: float,
    num_chains: int = 1,
    max_plate_nesting: int = 1,  # given, as Pyro would sample the improper sites to find it
) -> Run:
    """Chain after chain, no JIT, Pyro's defaults; warm-up counted; ended at ``limit`` seconds of wall time in all."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began, cpu, warm, chains, evaluations, cut = time.perf_counter(), time.process_time(), math.nan, [], 0, False
    for _ in range(num_chains):
        kernel = CountingNUTS(
            task.model, init_strategy=init_uniform(task.reference_mean.dtype), max_plate_nesting=max_plate_nesting
        )
        recorder = Recorder(limit - (time.perf_counter() - began))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run = MCMC(kernel, NUTS_DRAWS, warmup_steps=NUTS_WARMUP, hook_fn=recorder, disable_progbar=True)
                run.run(*task.args)
            except OutOfTimeError:
                cut = True
        evaluations += kernel.evaluations
        if recorder.draws:
            warm = recorder.warm - cpu
            chains.append(recorder)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    made = [columns(task, recorder.samples())[0] for recorder in chains] or [np.empty((0, len(task.parameters)))]
    length = min(map(len, made))
    draws = np.stack([chain[:length] for chain in made])
    return Run(draws, seconds, cpu, warm, evaluations, recorder.steps, cut)


def columns(task: PosteriorTask, samples: dict[str, Tensor]) -> np.ndarray:
    """The reference's quantities out of latents (chain, draw, ...), the model run again for deterministic sites."""
    missing = {name.split("[")[0] for name in task.parameters} - samples.keys()
    if missing:
        chains, length = next(iter(samples.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in samples.items()}
        extra = Predictive(task.model, flat, return_sites=tuple(missing))(*task.args)
        samples = samples | {name: value.unflatten(0, (chains, length)) for name, value in extra.items()}
    return task.columns(samples).numpy()


def numpyro_nuts(task: PosteriorTask, seed: int, limit: float = 900.0) -> Row:
    """Four vectorised chains of 1,000 + 1,000, float64 on one core, compilation counted, imports not."""
    if not BENCH_PYTHON.exists():
        raise FileNotFoundError("NumPyro's environment .venv-bench must be there. Run `make bench-env`.")
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in.npz", Path(folder) / "out.npz"
        arrays = {f"arg{i}": value.numpy() for i, value in enumerate(task.args)}
        np.savez(inputs, parameters=np.array(task.parameters), **arrays)
        script = Path(__file__).with_name("numpyro_nuts.py")
        command = [BENCH_PYTHON, script, task.name, inputs, outputs, "--seed", str(seed)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=limit)
        if done.returncode:
            raise RuntimeError(f"NumPyro's run on {task.name} failed:\n{done.stderr[-2000:]}")
        result = np.load(outputs)
        divergences = json.loads(done.stdout.splitlines()[-1])["divergences"]
        note = f"{divergences} divergences" if divergences else ""
        return score(task, "NumPyro NUTS", result["draws"], float(result["seconds"]), int(result["evaluations"]), note)
