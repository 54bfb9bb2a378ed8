"""Files of pyro_sb that five calls enter, and pairs of files with calls both ways, by sys.setprofile. Run in the tree to be looked at."""

import inspect
import os
import sys
import warnings

warnings.simplefilter("ignore")
import pyro
import pyro.distributions as dist
import torch

import pyro_sb
from pyro_sb import *

ROOT = os.path.dirname(pyro_sb.__file__)
torch.set_num_threads(1)
pyro.set_rng_seed(0)


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def sim():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1))


U = "num_updates" if "num_updates" in inspect.signature(VSDM.fit).parameters else "num_steps"
am = {}


def mcmc():
    MCMC(KernelLangevin(model), num_samples=20, num_chains=8, disable_progbar=True).run(torch.tensor([1.0, 2.0]))


def amort():
    a = AmortizedPosterior(sim)
    am["a"] = a
    a.fit(num_simulations=400, num_copies=1, progress=False, **{U: 30})


def bass():
    LightSBBM(2, num_components=3).fit(torch.randn(300, 2), progress=False, **{U: 20})


def dsb():
    DSB(2, hidden=(16, 16)).fit(torch.randn(300, 2), num_iterations=1, num_pairs=200, progress=False, **{U: 10})


def post():
    am["a"].condition(torch.zeros(2)).mcmc(num_samples=10, num_chains=4)


for name, f in (
    ("MCMC(KernelLangevin).run", mcmc),
    ("AmortizedPosterior.fit", amort),
    ("LightSBBM.fit", bass),
    ("DSB.fit", dsb),
    ("Posterior.mcmc", post),
):
    files = set()
    edges = set()

    def prof(frame, event, arg):
        if event != "call":
            return
        c = frame.f_code.co_filename
        if not c.startswith(ROOT):
            return
        c = c[len(ROOT) + 1 :]
        files.add(c)
        b = frame.f_back
        while b is not None and not b.f_code.co_filename.startswith(ROOT):
            b = b.f_back
        if b is not None:
            d = b.f_code.co_filename[len(ROOT) + 1 :]
            if d != c:
                edges.add((d, c))

    sys.setprofile(prof)
    try:
        f()
    finally:
        sys.setprofile(None)
    trips = sorted({tuple(sorted(e)) for e in edges if (e[1], e[0]) in edges})
    fam = [t for t in trips if os.path.dirname(t[0]) == os.path.dirname(t[1])]
    print(f"{name:28s} files {len(files):3d}  pairs with calls both ways {len(trips):3d} (in one folder {len(fam)})")
    if "-v" in sys.argv:
        print("   ", sorted(files))
        print("   ", trips)
