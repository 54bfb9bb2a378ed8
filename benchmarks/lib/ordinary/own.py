"""KernelLangevin with its defaults, or Pyro's NUTS, on one row, in a process of its own.

Run by `benchmarks.posteriors.ordinary`; imports are not counted.
"""

import warnings
from typing import Any

import numpy as np
import pyro
import torch

from benchmarks.lib.ordinary.process import Clock, asked, run
from benchmarks.lib.ordinary.pyro_models import MODELS
from benchmarks.lib.peers import NUTS_DRAWS, NUTS_WARMUP, init_uniform
from pyro_sb.infer import MCMC, KernelLangevin

CHAINS, DRAWS = 64, 500


def ours(model: Any, args: list[torch.Tensor], clock: Clock) -> Any:
    """64 chains of 500, defaults: sites and facts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc = MCMC(KernelLangevin(model), DRAWS, num_chains=CHAINS, disable_progbar=True)
        mcmc.run(*args)
        sites = {name: value.numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()}
    seconds = mcmc.seconds  # wall: its shares are those of the CPU seconds
    counts = mcmc.evaluations
    facts = {
        "share": seconds["warmup"] / (seconds["warmup"] + seconds["sampling"]),
        "gradients": counts.gradient,
        "densities": counts.density,
        "warned": next((str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)), ""),
    }
    return sites, facts


def nuts(model: Any, args: list[torch.Tensor], clock: Clock) -> Any:
    """Pyro's NUTS: one chain, 300 + 500, no JIT."""
    strategy = init_uniform(torch.get_default_dtype())
    kernel = pyro.infer.NUTS(model, init_strategy=strategy, max_plate_nesting=2)  # improper sites cannot be sampled

    def hook(kernel: Any, params: Any, stage: str, i: int) -> None:
        if stage == "Sample" and i == 0:
            clock.warmed()

    mcmc = pyro.infer.MCMC(kernel, NUTS_DRAWS, warmup_steps=NUTS_WARMUP, hook_fn=hook, disable_progbar=True)
    mcmc.run(*args)
    sites = mcmc.get_samples(group_by_chain=True)
    missing = {site for site in OPTIONS.sites if site not in sites}
    if missing:
        flat = {name: value.flatten(0, 1) for name, value in sites.items()}
        extra = pyro.infer.Predictive(model, flat, return_sites=tuple(missing))(*args)
        sites |= {name: value[None] for name, value in extra.items()}
    return {name: value.numpy() for name, value in sites.items()}, {}


def main() -> None:
    if not OPTIONS.threads:
        torch.set_num_threads(1)
    dtype = torch.float64 if OPTIONS.float64 else torch.float32
    torch.set_default_dtype(dtype)
    with np.load(OPTIONS.inputs) as stored:
        args = [torch.as_tensor(stored[key], dtype=dtype) for key in stored]
    pyro.set_rng_seed(OPTIONS.seed)
    sampler = {"ours": ours, "pyro": nuts}[OPTIONS.sampler]
    run(OPTIONS, lambda clock: sampler(MODELS[OPTIONS.model], args, clock))


if __name__ == "__main__":
    OPTIONS = asked(("ours", "pyro"))
    main()
