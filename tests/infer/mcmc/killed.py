"""A run that a test kills, resumes and compares: python killed.py PATH STAGE STEP; STAGE "none" lets it end."""

import os
import sys

import pyro
import pyro.distributions as dist
import torch

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.mcmc import saved
from pyro_sb.stages import listening

saved.SHARE = 1e9  # write after every block
Y = torch.tensor([0.9, 0.2, 0.7, -0.4], dtype=torch.float64)


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def main(path, stage, step):
    def hook(kernel, params, now, i):
        if (now, i) == (stage, step):
            os._exit(9)

    def begin(name):
        if name == stage and os.path.exists(path):
            os._exit(9)

    torch.set_num_threads(1)
    pyro.set_rng_seed(7 if not os.path.exists(path) else 8)  # the seed of a resumed run does not matter
    kernel = KernelLangevin(model, num_particles=100)
    run = MCMC(kernel, 12, 6, num_chains=4, hook_fn=hook, disable_progbar=True, checkpoint=path)
    with listening(begin):
        run.run(Y)
    mu = run.get_samples(group_by_chain=True)["mu"]
    print(mu.flatten().tolist(), run.evaluations.density, run.evaluations.gradient, run.num_samples)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
