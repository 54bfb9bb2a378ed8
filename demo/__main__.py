"""The main job on two posteriors, each beside its reference: `make demo`, or `python -m demo [--out FOLDER]`.

Eight schools, and a mixture of two Gaussians whose posterior has two separated modes, with Pyro's NUTS beside it. The
references are computed by quadrature (`pyro_sb.datasets.exact_task`).
Prints ArviZ's summaries and the report of both samplers on the two modes; writes the draws (netCDF) and three
pictures. The environment variable PYRO_SB_SHORT makes it short, for the tests.
"""

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import arviz as az
import pandas as pd
import pyro
import torch
from pyro.infer import MCMC as PyroMCMC  # noqa: N811
from pyro.infer import NUTS

from demo.pictures import draw_modes, draw_reports, draw_schools
from pyro_sb.datasets import PosteriorTask, exact_task
from pyro_sb.diagnostics import report, to_arviz
from pyro_sb.infer import MCMC, KernelLangevin

SHORT = "PYRO_SB_SHORT" in os.environ
CHAINS, DRAWS = (32, 100) if SHORT else (256, 500)
NUTS_WARMUP, NUTS_DRAWS = (10, 20) if SHORT else (150, 300)


def sample(task: PosteriorTask) -> MCMC:
    """Our draws of a task's posterior, timed."""
    print(f"\n=== {task.name}: KernelLangevin, {CHAINS} chains of {DRAWS} draws ===")
    began = time.perf_counter()
    mcmc = MCMC(KernelLangevin(task.model), num_samples=DRAWS, num_chains=CHAINS)
    mcmc.run(*task.args)
    print(f"{time.perf_counter() - began:.1f} s, warm-up included; {mcmc.evaluations}")
    print("Warm-up:", "; ".join(mcmc.kernel.population.stages))
    print("Moves:", mcmc.kernel.frozen.describe())
    return mcmc


def beside_reference(task: PosteriorTask, idata: Any) -> pd.DataFrame:
    """ArviZ's summary beside the reference; z is the difference of the means in standard errors."""
    sites = list(dict.fromkeys(name.split("[")[0] for name in task.parameters))
    table = az.summary(idata, var_names=sites, round_to="none")
    error = (table["mcse_mean"] ** 2 + task.reference_mcse.numpy() ** 2) ** 0.5
    return pd.DataFrame(
        {
            "mean": table["mean"].round(3),
            "reference": task.reference_mean.numpy().round(3),
            "z": ((table["mean"] - task.reference_mean.numpy()) / error).round(1),
            "sd": table["sd"].round(3),
            "ref. sd": task.reference_sd.numpy().round(3),
            "ess_bulk": table["ess_bulk"].round(),
            "ess_tail": table["ess_tail"].round(),
            "r_hat": table["r_hat"].round(3),
        }
    )


def eight_schools(out: Path) -> None:
    """Eight schools: draws, summary, picture."""
    task = exact_task("eight_schools_noncentered")
    mcmc = sample(task)
    idata = to_arviz(mcmc, log_likelihood=True, coords={"schools": list("ABCDEFGH")})
    print(beside_reference(task, idata).to_string())
    print(az.loo(idata))
    idata.to_netcdf(str(out / "eight_schools.nc"))
    draw_schools(task, task.columns(mcmc.get_samples()), out / "eight_schools.png")


def separated_modes(out: Path) -> None:
    """Two mirrored modes of mass 1/2 each, and where NUTS ends up."""
    task = exact_task("low_dim_gauss_mix_unordered")
    mcmc = sample(task)
    idata = to_arviz(mcmc)
    print(beside_reference(task, idata).to_string())
    idata.to_netcdf(str(out / "modes.nc"))

    print(f"\nPyro's NUTS on the same model: one chain, {NUTS_WARMUP} + {NUTS_DRAWS} ...")
    began = time.perf_counter()
    nuts = PyroMCMC(NUTS(task.model), num_samples=NUTS_DRAWS, warmup_steps=NUTS_WARMUP)
    nuts.run(*task.args)
    r_hat = float(nuts.diagnostics()["mu"]["r_hat"].max())
    print(f"{time.perf_counter() - began:.1f} s; its R-hat of mu is {r_hat:.3f}\n")

    ours, theirs = mcmc.get_samples(group_by_chain=True)["mu"], nuts.get_samples()["mu"]
    print("Share of the mode mu[0] < mu[1]   truth 0.500")
    for name, mu in (("KernelLangevin", ours), ("NUTS", theirs)):
        print(f"{name:>26}   {float((mu[..., 0] < mu[..., 1]).double().mean()):11.3f}")
    draw_modes(task, ours, theirs, out / "modes.png")

    reports = {"KernelLangevin": report(mcmc), "Pyro's NUTS": report(nuts)}
    for name, found in reports.items():
        print(f"\nThe report of {name}\n{found}")
    draw_reports(reports, out / "report.png")


def main() -> None:
    """Run both and say what was written."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="The main job on two posteriors.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to; default: demo/")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # batches this small are no faster on two cores
    pyro.set_rng_seed(0)
    warnings.filterwarnings("ignore", message="More chains", category=UserWarning)  # many chains are the point
    warnings.filterwarnings("ignore", message="overflow encountered in exp", category=RuntimeWarning)  # inside az.loo
    eight_schools(out)
    separated_modes(out)
    written = ("eight_schools.nc", "eight_schools.png", "modes.nc", "modes.png", "report.png")
    print("\nWritten:", *(f"{out.name}/{name}" for name in written))


if __name__ == "__main__":
    main()
