"""KernelLangevin: exact posteriors, repaired warm-ups, Pyro's contract, and errors that help."""

import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer.mcmc.api as pyro_mcmc
import pytest
import torch
from torch import Tensor

from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC

Y = torch.tensor([1.2, 0.3, 2.1, 0.8], dtype=torch.float64)


def conjugate(y: Tensor) -> None:
    """Normal mean with known variance: the posterior is N(sum y / (n + 1/4), 1 / (n + 1/4))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu[..., None], 1.0), obs=y)


def posterior() -> tuple[float, float]:
    precision = len(Y) + 0.25
    return float(Y.sum()) / precision, precision**-0.5


def two_modes(z: Tensor, separation: float = 10.0, share: float = 0.3) -> Tensor:
    log_one = math.log(share) - 0.5 * (z + separation / 2 * first_axis(z)).square().sum(-1)
    log_two = math.log1p(-share) - 0.5 * (z - separation / 2 * first_axis(z)).square().sum(-1)
    return torch.logaddexp(log_one, log_two)


def first_axis(z: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(0), z.shape[-1]).to(z.dtype)


def two_modes_potential(params: dict[str, Tensor]) -> Tensor:
    return -two_modes(params["z"])


def share_of_first_mode(mcmc: MCMC) -> float:
    return float((mcmc.get_samples()["z"][:, 0] < 0).double().mean())


def run(kernel: KernelLangevin, *args: Tensor, **options: object) -> MCMC:
    mcmc = MCMC(kernel, **({"num_samples": 200, "num_chains": 64, "disable_progbar": True} | options))
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("local", ["hmc", "mala", None])
def test_posterior_of_a_conjugate_model(local: str | None) -> None:
    kernel = KernelLangevin(conjugate, local=local)
    mcmc = run(kernel, Y)
    draws, (mean, sd) = mcmc.get_samples(group_by_chain=True)["mu"], posterior()
    assert draws.shape == (64, 200)
    n_eff = float(mcmc.diagnostics()["mu"]["n_eff"])
    assert n_eff > 5000
    assert abs(float(draws.mean()) - mean) < 4 * sd / math.sqrt(n_eff)
    assert abs(float(draws.std()) / sd - 1) < 4 / math.sqrt(2 * n_eff)
    assert set(kernel.frozen.moves) == ({"bridge", "index"} if local is None else {"bridge", "index", "local"})
    evidence = float(dist.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() + 4.0).log_prob(Y))
    assert abs(kernel.population.log_evidence - evidence) < 4 * kernel.population.log_evidence_error


@pytest.mark.parametrize("dim", [2, 10])
def test_population_with_95_percent_in_the_wrong_mode_is_repaired(dim: int) -> None:
    points = torch.randn(1000, dim, dtype=torch.float64)
    points[:, 0] += torch.where(torch.arange(1000) < 950, -5.0, 5.0)  # the truth has 30 % there
    start = {"z": points[:64].clone()}  # all chains start in the wrong mode as well
    kernel = KernelLangevin(potential_fn=two_modes_potential, start=points)
    mcmc = run(kernel, initial_params=start)
    n_eff = float(mcmc.diagnostics()["z"]["n_eff"][0])
    assert abs(share_of_first_mode(mcmc) - 0.3) < 4 * math.sqrt(0.21 / n_eff)
    assert float(mcmc.diagnostics()["z"]["r_hat"].max()) < 1.02


def test_everything_is_frozen_after_warm_up() -> None:
    kernel = KernelLangevin(conjugate)
    kernel.num_chains = 8
    kernel.setup(5, Y)
    params = kernel.initial_params
    frozen = kernel.frozen
    before = pickle.dumps(
        (frozen.probabilities, [move.step_size for move in frozen.moves.values()], frozen.moves["bridge"].bridge.log_v)
    )
    proposal = [value.clone() for value in frozen.moves["index"].mixture]
    for _ in range(3):
        params = {name: value[-1] for name, value in kernel.sample_block(params, 20).draws.items()}
    after = pickle.dumps(
        (frozen.probabilities, [move.step_size for move in frozen.moves.values()], frozen.moves["bridge"].bridge.log_v)
    )
    assert kernel.frozen is frozen and before == after
    assert all(torch.equal(one, two) for one, two in zip(proposal, frozen.moves["index"].mixture, strict=True))


def test_bridge_keeps_its_probability_and_every_move_reports_its_acceptance() -> None:
    mcmc = run(KernelLangevin(conjugate), Y)
    diagnostics = mcmc.diagnostics()
    assert diagnostics["probability bridge"]["chain 0"] >= 0.1
    total = sum(diagnostics[f"probability {role}"]["chain 0"] for role in ("bridge", "index", "local"))
    assert total == pytest.approx(1.0)
    for role in ("bridge", "index", "local"):
        assert 0.2 < diagnostics[f"acceptance {role}"]["chain 5"] <= 1.0
    shares = torch.bincount(mcmc.sample_stats["move"][0], minlength=3) / 200
    for share, role in zip(shares, ("bridge", "index", "local"), strict=True):
        probability = diagnostics[f"probability {role}"]["chain 0"]
        assert abs(float(share) - probability) < 4 * math.sqrt(probability * (1 - probability) / 200) + 1e-9


def test_reports_speak_of_the_draws_that_are_kept() -> None:
    kernel = KernelLangevin(conjugate)
    kernel.num_chains = 4
    kernel.setup(12, Y)
    params = kernel.initial_params
    for _ in range(2):  # the warm-up, then as many draws
        params = {name: value[-1] for name, value in kernel.sample_block(params, 12).draws.items()}
    assert kernel.walk.num_steps == 12


def test_evaluations_are_counted() -> None:
    mcmc = run(KernelLangevin(conjugate, probabilities={"index": 1.0}), Y, num_samples=100, warmup_steps=0)
    assert mcmc.evaluations.density >= 100 * 64
    assert mcmc.diagnostics()["density evaluations"]["chain 0"] == mcmc.evaluations.density


def test_finite_index_time_targets_the_same_law() -> None:
    kernel = KernelLangevin(potential_fn=two_modes_potential, index_time=2, epsilons=(400.0,), local=None)
    mcmc = run(kernel, initial_params={"z": torch.zeros(64, 2, dtype=torch.float64)}, num_samples=400)
    n_eff = float(mcmc.diagnostics()["z"]["n_eff"][0])
    assert kernel.frozen.moves["index"].transition is not None
    assert abs(share_of_first_mode(mcmc) - 0.3) < 4 * math.sqrt(0.21 / n_eff)


def test_seed_fixes_the_draws() -> None:
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        draws.append(run(KernelLangevin(conjugate), Y, num_samples=20).get_samples()["mu"])
    assert torch.equal(*draws)


def test_float32_model_gives_float32_draws() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor(3.0), 2.0))

    draws = run(KernelLangevin(model)).get_samples()["x"]
    assert draws.dtype == torch.float32
    assert abs(float(draws.mean()) - 3.0) < 0.15


# ---- pyro.infer.MCMC ----


def test_one_chain_in_pyro_mcmc() -> None:
    mcmc = pyro_mcmc.MCMC(KernelLangevin(conjugate), num_samples=400, warmup_steps=10, disable_progbar=True)
    mcmc.run(Y)
    mean, sd = posterior()
    assert mcmc.get_samples()["mu"].shape == (400,)
    assert abs(float(mcmc.get_samples()["mu"].mean()) - mean) < 4 * sd / math.sqrt(150)
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {"chain 0": []}
    assert 0.3 < diagnostics["acceptance rate"]["chain 0"] <= 1.0


def test_two_chains_one_after_the_other_in_pyro_mcmc_are_independent() -> None:
    kernel = KernelLangevin(conjugate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pyro: sequential, as there are few cores
        mcmc = pyro_mcmc.MCMC(kernel, num_samples=30, warmup_steps=5, num_chains=2, disable_progbar=True)
        mcmc.run(Y)
    draws = mcmc.get_samples(group_by_chain=True)["mu"]
    assert draws.shape == (2, 30) and not torch.equal(draws[0], draws[1])


@pytest.mark.multiproc
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # each imports all again
def test_processes_of_pyro_mcmc(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_mcmc.mp, "cpu_count", lambda: 8)
    mcmc = pyro_mcmc.MCMC(
        KernelLangevin(potential_fn=two_modes_potential),
        num_samples=40,
        warmup_steps=5,
        num_chains=2,
        initial_params={"z": torch.zeros(2, 2, dtype=torch.float64)},
        mp_context=context,
        disable_progbar=True,
    )
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["z"]
    assert draws.shape == (2, 40, 2) and not torch.equal(draws[0], draws[1])


@pytest.mark.multiproc
def test_processes_of_pyro_mcmc_with_a_model_and_no_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_mcmc.mp, "cpu_count", lambda: 8)
    kernel = KernelLangevin(conjugate)
    mcmc = pyro_mcmc.MCMC(kernel, num_samples=40, warmup_steps=5, num_chains=2, mp_context="fork", disable_progbar=True)
    mcmc.run(Y)
    draws = mcmc.get_samples(group_by_chain=True)["mu"]
    assert draws.shape == (2, 40) and not torch.equal(draws[0], draws[1])


def test_kernel_pickles_before_and_after_a_run() -> None:
    kernel = KernelLangevin(conjugate)
    pickle.loads(pickle.dumps(kernel))
    run(kernel, Y, num_samples=10)
    copy = pickle.loads(pickle.dumps(kernel))
    assert copy.population.log_evidence == kernel.population.log_evidence


def test_cleanup_is_idempotent_and_setup_starts_anew() -> None:
    kernel = KernelLangevin(conjugate)
    first = run(kernel, Y, num_samples=20).get_samples()["mu"]
    kernel.cleanup()
    kernel.cleanup()
    second = run(kernel, Y + 100.0, num_samples=20).get_samples()["mu"]
    assert float(second.mean() - first.mean()) > 50


def test_search_starts_from_initial_params_where_nothing_else_is_finite() -> None:
    def far_box(params: dict[str, Tensor]) -> Tensor:
        z = params["z"]
        inside = ((z > 100) & (z < 101)).all()
        return torch.where(inside, (z - 100.4).square().sum() * 50, torch.full_like(z.sum(), math.inf))

    start = {"z": torch.full((16, 1), 100.5, dtype=torch.float64)}
    draws = run(KernelLangevin(potential_fn=far_box), initial_params=start, num_chains=16).get_samples()["z"]
    assert abs(float(draws.mean()) - 100.4) < 0.02


def test_sites_of_two_dtypes_stay_one_walk() -> None:
    def model() -> None:
        pyro.sample("narrow", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        pyro.sample("wide", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    kernel = KernelLangevin(model)
    kernel.num_chains = 4
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(3):
        params = {name: value[-1] for name, value in kernel.sample_block(params, 10).draws.items()}
    assert kernel.walk.num_steps == 30  # a new walk forgets its counts and its proposals


def test_interrupted_run_leaves_no_start_behind() -> None:
    kernel = KernelLangevin(conjugate)
    kernel.setup(0, Y)
    assert kernel.initial_params["mu"].shape == ()  # as pyro.infer.MCMC reads it; then Ctrl-C, and no cleanup
    assert run(kernel, Y, num_samples=5).get_samples(group_by_chain=True)["mu"].shape == (64, 5)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": "nuts"}, "local must be"),
        ({"epsilons": ()}, "epsilons must be"),
        ({"epsilons": (0.0,)}, "positive finite bandwidths"),
        ({"epsilons": 4.0}, "epsilons must be a sequence"),
        ({"num_particles": 10}, "num_particles must be a whole number of at least 50"),
        ({"num_particles": 1e3}, "num_particles must be a whole number of at least 50"),
        ({"start": "nuts"}, "start must be"),
        ({"probabilities": {"bridge": math.nan, "index": 1.0}}, "sum to 1"),
        ({"index_time": 0}, "index_time"),
        ({"min_bridge_probability": 1.0}, "min_bridge_probability"),
        ({"probabilities": {"bridge": 0.5}}, "sum to 1"),
        ({"probabilities": {"nuts": 1.0}}, "named among"),
        ({"local": None, "probabilities": {"local": 1.0}}, "named among"),
    ],
)
def test_bad_options_are_refused_at_the_door(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelLangevin(conjugate, **options)


def test_model_and_potential_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="Exactly one"):
        KernelLangevin()
    with pytest.raises(ValueError, match="Exactly one"):
        KernelLangevin(conjugate, two_modes_potential)


def test_pyro_mcmc_refuses_an_unknown_site_before_any_work() -> None:
    mcmc = pyro_mcmc.MCMC(KernelLangevin(conjugate), num_samples=5, save_params=["nu"], disable_progbar=True)
    with pytest.raises(ValueError, match="save_params must name sites"):
        mcmc.run(Y)


def test_starts_of_the_wrong_shape_or_not_finite_are_refused() -> None:
    kernel = KernelLangevin(conjugate)
    kernel.initial_params = {"mu": torch.tensor(math.nan, dtype=torch.float64)}
    with pytest.raises(ValueError, match="initial_params must be finite"):
        kernel.setup(0, Y)
    kernel.initial_params = {"mu": torch.zeros(3, 1, dtype=torch.float64)}
    with pytest.raises(ValueError, match="no chain dimension"):
        kernel.setup(0, Y)


def test_start_outside_the_support_is_named() -> None:
    def half_line(params: dict[str, Tensor]) -> Tensor:
        z = params["z"].sum()
        return torch.where(z > 0, 0.5 * z**2, torch.full_like(z, math.inf))

    start = torch.ones(64, 1, dtype=torch.float64)
    start[7] = -1.0
    with pytest.raises(ValueError, match=r"at chain 7\. "):
        run(KernelLangevin(potential_fn=half_line), initial_params={"z": start})


def test_log_joint_that_is_nan_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="(?i)nan"):
        run(KernelLangevin(conjugate), Y * math.nan)


def two_plateaus(dim: int = 30) -> Callable[..., None]:
    """Two normal modes of unlike shape, shares .3 and .7, about -3 and 3 in every coordinate."""
    width = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(dim, dtype=torch.float64), 10.0).to_event(1))
        low = math.log(0.3) - 0.5 * (x + 3).square().sum(-1)
        high = math.log(0.7) - 0.5 * ((x - 3) / width).square().sum(-1) - width.log().sum()
        pyro.factor("modes", torch.logaddexp(low, high) + 0.005 * x.square().sum(-1))

    return model


def test_modes_of_many_dimensions_get_their_shares_and_stay_with_a_saved_run(tmp_path: Path) -> None:
    pyro.set_rng_seed(0)
    model = two_plateaus()
    mcmc = MCMC(KernelLangevin(model), num_samples=100, num_chains=32, disable_progbar=True)
    mcmc.run()
    assert mcmc.kernel.frozen.then == ("jump",)
    high = (mcmc.get_samples(group_by_chain=True)["x"].mean(-1) > 0).double()
    error = float(high.mean(1).std()) / math.sqrt(32)
    assert abs(float(high.mean()) - 0.7) < 4 * error and error < 0.03
    mcmc.save(tmp_path / "run.pt")
    loaded = MCMC.load(tmp_path / "run.pt", model)
    state = torch.get_rng_state()
    mcmc.extend(5)
    torch.set_rng_state(state)
    loaded.extend(5)
    assert torch.equal(loaded.get_samples()["x"], mcmc.get_samples()["x"])


def correlated_regression(X: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(40, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((X @ b[..., None])[..., 0], 0.5), obs=y)


def test_an_ordinary_model_of_forty_unknowns_is_right_after_a_warm_up_of_few_gradients() -> None:
    pyro.set_rng_seed(0)
    X = torch.randn(200, 40, dtype=torch.float64).cumsum(1)
    y = X @ torch.randn(40, dtype=torch.float64) + 0.5 * torch.randn(200, dtype=torch.float64)
    precision = X.T @ X / 0.25 + torch.eye(40, dtype=torch.float64)
    mean, sd = torch.linalg.solve(precision, X.T @ y / 0.25), torch.linalg.inv(precision).diagonal().sqrt()
    mcmc = MCMC(KernelLangevin(correlated_regression), num_samples=200, num_chains=64, disable_progbar=True)
    mcmc.run(X, y)
    draws = mcmc.get_samples(group_by_chain=True)["b"]
    figures = mcmc.diagnostics()["b"]
    z = (draws.mean((0, 1)) - mean) / (sd / figures["n_eff"].sqrt())
    assert float(z.abs().max()) < 4 and float(figures["r_hat"].max()) < 1.01
    assert abs(float((draws.flatten(0, 1).std(0) / sd).log().abs().max())) < 0.06
    population = mcmc.kernel.population
    log_evidence = dist.MultivariateNormal(
        torch.zeros(200, dtype=torch.float64), X @ X.T + 0.25 * torch.eye(200, dtype=torch.float64)
    ).log_prob(y)
    assert abs(population.log_evidence - float(log_evidence)) < 4 * population.log_evidence_error + 1e-6
    assert population.evaluations.gradient < 64 * 1000


def test_a_budget_that_is_spent_leaves_out_what_may_be_and_says_so() -> None:
    pyro.set_rng_seed(0)
    model = two_plateaus(4)
    free = KernelLangevin(model)
    MCMC(free, num_samples=4, num_chains=8, disable_progbar=True).run()
    bound = KernelLangevin(model, warmup_budget=2000)
    with pytest.warns(
        RuntimeWarning, match=r"ended by its budget of 2,000 rows, without .* may be missed. Raise warmup"
    ):
        MCMC(bound, num_samples=4, num_chains=8, disable_progbar=True).run()
    assert "budget of 2,000 rows was spent: left out" in bound.describe()
    assert "budget" not in free.describe()
    assert bound.population.evaluations.gradient < 0.7 * free.population.evaluations.gradient
    with pytest.raises(ValueError, match="warmup_budget must be positive"):
        KernelLangevin(model, warmup_budget=0)
