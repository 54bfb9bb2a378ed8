"""One peer on one row, in a process of its own in `.venv-bench`: NumPyro's NUTS, BlackJAX's ChEES, nutpie.

Run by `benchmarks.posteriors.ordinary`; compilation is counted, imports are not.
"""

import os

from benchmarks.lib.ordinary.process import Clock, Sites, asked, run

SAMPLERS = ("numpyro", "chees", "nutpie", "reference")
if __name__ == "__main__":  # before JAX is imported
    OPTIONS = asked(SAMPLERS)
    if not OPTIONS.threads:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import initialize_model

from benchmarks.lib.ordinary.numpyro_models import MODELS

CHAINS, WARMUP, DRAWS = 4, 500, 1000
MANY = 64  # chains of ChEES, which adapts by them


def nuts(model: Callable[..., None], args: list[Any], key: Any, warmup: int, draws: int, accept: float) -> Any:
    """NumPyro's NUTS, chains vectorised: sites and facts."""
    kernel = NUTS(model, target_accept_prob=accept)
    chains = {"num_chains": CHAINS, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, **chains)
    mcmc.run(key, *args, extra_fields=("num_steps", "diverging"))
    sites = {name: np.asarray(value) for name, value in mcmc.get_samples(group_by_chain=True).items()}
    fields = mcmc.get_extra_fields()
    return sites, {"divergences": int(fields["diverging"].sum()), "gradients": int(fields["num_steps"].sum())}


def constrained(info: Any, z: Any) -> Sites:
    """Sites of unconstrained draws ``(chain, draw, ...)``, deterministic ones among them."""
    sites = jax.jit(jax.vmap(jax.vmap(info.postprocess_fn)))(z)
    return {name: np.asarray(value) for name, value in sites.items()}


def chees(model: Callable[..., None], args: list[Any], key: Any, clock: Clock) -> Any:
    """BlackJAX's ChEES-HMC, 64 chains, no metric: it has none. Adam at rate .5: .025, the paper's, is too slow here."""
    import blackjax
    import optax
    from blackjax.adaptation.base import get_filter_adapt_info_fn

    start, warm, walk = jax.random.split(key, 3)
    info = initialize_model(key, model, model_args=tuple(args), init_strategy=init_to_uniform(), dynamic_args=False)
    flat, unravel = ravel_pytree(info.param_info.z)
    starts = jax.random.uniform(start, (MANY, len(flat)), flat.dtype, -2.0, 2.0)

    def log_density(v: Any) -> Any:  # of a vector: its adaptation fails on sites of matrices
        return -info.potential_fn(unravel(v))

    adaptation = blackjax.chees_adaptation(log_density, num_chains=MANY, adaptation_info_fn=get_filter_adapt_info_fn())
    optim = optax.adam(0.5, b1=0.0, b2=0.95)
    (states, parameters), _ = jax.block_until_ready(adaptation.run(warm, starts, 0.1, optim, WARMUP))
    clock.warmed()
    step = blackjax.dynamic_hmc(log_density, **parameters).step

    def transition(states: Any, key: Any) -> Any:
        states, facts = jax.vmap(step)(jax.random.split(key, MANY), states)
        return states, (states.position, facts.is_divergent, facts.num_integration_steps)

    keys = jax.random.split(walk, DRAWS // 2)
    _, (z, diverging, steps) = jax.jit(lambda states: jax.lax.scan(transition, states, keys))(states)
    z = jax.vmap(jax.vmap(unravel))(jnp.swapaxes(z, 0, 1))
    return constrained(info, z), {"divergences": int(diverging.sum()), "gradients": int(steps.sum())}


def nutpie(model: Callable[..., None], args: list[Any], key: Any, seed: int) -> Any:
    """nutpie's defaults, one core, on the potential compiled by JAX."""
    import nutpie

    info = initialize_model(key, model, model_args=tuple(args), init_strategy=init_to_uniform(), dynamic_args=False)
    flat, unravel = ravel_pytree(info.param_info.z)
    value_and_grad = jax.jit(jax.value_and_grad(lambda v: -info.potential_fn(unravel(v))))

    def make_log_density() -> Callable[..., tuple[float, np.ndarray]]:
        def log_density(v: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = value_and_grad(v)
            return float(value), np.asarray(grad, dtype=np.float64)

        return log_density

    def make_expand(*_: int) -> Callable[..., dict[str, np.ndarray]]:
        return lambda v: {"z": np.asarray(v, dtype=np.float64)}

    def start(chain: int) -> np.ndarray:
        return np.random.default_rng([seed, chain]).uniform(-2, 2, len(flat))

    compiled = nutpie.compiled_pyfunc.from_pyfunc(
        len(flat), make_log_density, make_expand, [np.dtype("float64")], [(len(flat),)], ["z"],
        make_initial_point_fn=start,
    )  # fmt: skip
    trace = nutpie.sample(compiled, draws=DRAWS, chains=CHAINS, cores=1, seed=seed, progress_bar=False)
    z = np.asarray(trace.posterior["z"])
    divergences = int(np.asarray(trace.sample_stats["diverging"]).sum())
    gradients = int(np.asarray(trace.sample_stats["n_steps"]).sum())
    return constrained(info, jax.vmap(jax.vmap(unravel))(jnp.asarray(z))), {
        "divergences": divergences,
        "gradients": gradients,
    }


def main() -> None:
    numpyro.set_platform("cpu")
    numpyro.enable_x64(OPTIONS.float64 or OPTIONS.sampler in ("nutpie", "reference"))
    with np.load(OPTIONS.inputs) as stored:
        args = [jnp.asarray(stored[key], dtype=float) for key in stored]
    model, key = MODELS[OPTIONS.model], jax.random.PRNGKey(OPTIONS.seed)

    def sample(clock: Clock) -> Any:
        if OPTIONS.sampler == "numpyro":
            return nuts(model, args, key, WARMUP, DRAWS, 0.8)
        if OPTIONS.sampler == "reference":
            return nuts(model, args, key, 2 * WARMUP, OPTIONS.draws, 0.9)
        if OPTIONS.sampler == "chees":
            return chees(model, args, key, clock)
        return nutpie(model, args, key, OPTIONS.seed)

    run(OPTIONS, sample)


if __name__ == "__main__":
    main()
