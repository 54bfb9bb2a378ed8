"""NumPyro's NUTS on the posterior tasks: 4 vectorised chains, float64, compilation counted, one core.

Run by benchmarks/lib/peers.py in `.venv-bench` (`make bench-env`); it imports neither torch nor Pyro:

    .venv-bench/bin/python benchmarks/lib/numpyro_nuts.py NAME IN.npz OUT.npz [--seed 0]

IN holds the task's arguments and its `parameters`; OUT gets `draws` (chain, draw, p), `seconds`, `evaluations`.
"""

import argparse
import json
import os
import re
import time

if __name__ == "__main__":  # others take the models alone
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if hasattr(os, "sched_setaffinity"):  # the one way that holds XLA to one core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

CHAINS, WARMUP, DRAWS = 4, 1000, 1000


def eight_schools_noncentered(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def low_dim_gauss_mix(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    two_gaussians(mu, y)


def low_dim_gauss_mix_unordered(y):
    two_gaussians(numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1)), y)


def two_gaussians(mu, y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    first = jnp.log(theta) + dist.Normal(mu[0], sigma[0]).log_prob(y)
    second = jnp.log1p(-theta) + dist.Normal(mu[1], sigma[1]).log_prob(y)
    numpyro.factor("y", jnp.logaddexp(first, second).sum())


def ark(lags, y):
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([lags.shape[-1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def logearn_interaction(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore_interaction(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


MODELS = {
    "eight_schools_noncentered": eight_schools_noncentered,
    "eight_schools_centered": eight_schools_centered,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "low_dim_gauss_mix_unordered": low_dim_gauss_mix_unordered,
    "arK": ark,
    "logearn_interaction": logearn_interaction,
    "kidscore_interaction": kidscore_interaction,
}


def sampler(model):
    return MCMC(
        NUTS(model),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )


def column(samples, parameter):
    site, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", parameter).groups()
    return samples[site] if index is None else samples[site][..., int(index) - 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("inputs")
    parser.add_argument("outputs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    numpyro.enable_x64()
    numpyro.set_platform("cpu")
    stored = np.load(options.inputs)
    args = [jnp.asarray(stored[key]) for key in sorted(stored) if key.startswith("arg")]
    model, key = MODELS[options.name], jax.random.PRNGKey(options.seed)

    began = time.perf_counter()
    mcmc = sampler(model)
    mcmc.run(key, *args, extra_fields=("num_steps", "diverging"))
    samples = {name: np.asarray(value) for name, value in mcmc.get_samples(group_by_chain=True).items()}
    seconds = time.perf_counter() - began

    fields = mcmc.get_extra_fields(group_by_chain=True)
    # Warm-up's leapfrog steps are counted in a second warm-up from the same key, outside the clock.
    again = sampler(model)
    again.warmup(key, *args, extra_fields=("num_steps",), collect_warmup=True)
    steps = int(fields["num_steps"].sum()) + int(again.get_extra_fields()["num_steps"].sum())
    draws = np.stack([column(samples, name) for name in stored["parameters"].tolist()], -1)
    np.savez(options.outputs, draws=draws, seconds=seconds, evaluations=steps)
    print(json.dumps({"seconds": seconds, "evaluations": steps, "divergences": int(fields["diverging"].sum())}))


if __name__ == "__main__":
    main()
