"""MCMC: a counting kernel makes every draw known beforehand, so that order, shapes and bookkeeping are exact truths."""

import dataclasses
import pickle
import signal
import sys
from collections import OrderedDict
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.mcmc import util
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from pyro_sb.infer.mcmc.figures import PerChain
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import log_joint

F64 = torch.float64
DATA = torch.tensor([0.3, -0.4, 1.2], dtype=F64)


def model(y, shift=0.0):
    zero = torch.zeros((), dtype=F64)
    loc = pyro.sample("loc", dist.Normal(zero, 10.0))
    with pyro.plate("rows", 3):
        scale = pyro.sample("scale", dist.LogNormal(zero, 1.0))
        pyro.deterministic("ratio", (loc + shift) / scale)
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def pair_of_normals():
    for name, mean in (("a", 10.0), ("b", -10.0)):
        pyro.sample(name, dist.Normal(torch.tensor(mean, dtype=F64), 0.1))


class Steps(NamedTuple):
    draws: dict
    stats: dict


class BatchedKernel(MCMCKernel):
    """The batched protocol, short of the move."""

    default_warmup_steps = 3
    num_chains = None
    transforms = None
    log_joint = None

    def __init__(self, model):
        self.model = model
        self.calls = []
        self._starts = None

    def setup(self, warmup_steps, *args, **kwargs):
        self.log_joint = log_joint(self.model, args=args, kwargs=kwargs)
        self.transforms = self.log_joint.transforms
        self.steps = 0

    @property
    def initial_params(self):
        return self._starts or self.log_joint.unpack(self.log_joint.start(self.num_chains))

    @initial_params.setter
    def initial_params(self, params):
        self._starts = params

    def sample(self, params):
        return {name: value[0] for name, value in self.sample_block(params, 1).draws.items()}

    def sample_block(self, params, num_transitions):
        self.calls.append(num_transitions)
        states, statistics = [], []
        for _ in range(num_transitions):
            self.steps += 1
            params, figures = self.move(params)
            states.append(params)
            statistics.append(figures)
        stack = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
        return Steps(stack(states), stack(statistics))

    def logging(self):
        return OrderedDict(step=str(self.steps))

    def diagnostics(self):
        return {
            "acceptance rate": PerChain(0.5 + i for i in range(self.num_chains)),
            "kind": "test",
            "log evidence": [float(b) for b in range(self.num_chains)],  # of as many observations
        }

    def cleanup(self):
        self.log_joint = None
        self._starts = None


class Count(BatchedKernel):
    """Adds 1 to every coordinate at every step. Step n of chain c diverges if n = c."""

    def move(self, params):
        num_chains = next(iter(params.values())).shape[0]
        diverging = torch.arange(num_chains) == self.steps
        rate = torch.full((num_chains,), 0.25, dtype=F64)
        return {name: value + 1 for name, value in params.items()}, {"acceptance_rate": rate, "diverging": diverging}


class RandomWalk(BatchedKernel):
    """Metropolis with a normal proposal: exact, and that is all."""

    def __init__(self, model, step_size=0.8):
        super().__init__(model)
        self.step_size = step_size

    def move(self, params):
        z = self.log_joint.pack(params)
        proposal = z + self.step_size * torch.randn_like(z)
        log_ratio = self.log_joint.log_prob(proposal) - self.log_joint.log_prob(z)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        z = torch.where(accepted[:, None], proposal, z)
        return self.log_joint.unpack(z), {"acceptance_rate": log_ratio.exp().clamp(max=1)}


def starts(num_chains):
    """Chain c starts at 1000 c in loc, and near 0 in the logarithm of scale."""
    loc = 1000.0 * torch.arange(num_chains, dtype=F64)
    return {"loc": loc, "scale": -0.001 * torch.arange(3 * num_chains, dtype=F64).reshape(num_chains, 3)}


def counted(num_samples=40, num_chains=5, kernel=None, **options):
    mcmc = MCMC(
        kernel or Count(model),
        num_samples,
        num_chains=num_chains,
        initial_params=starts(num_chains),
        disable_progbar=True,
        **options,
    )
    mcmc.run(DATA)
    return mcmc


def interrupt_at(stage, step):
    """A hook that presses Ctrl-C."""

    def hook(kernel, params, now, i):
        if (now, i) == (stage, step):
            signal.raise_signal(signal.SIGINT)

    return hook


@pytest.mark.parametrize("num_chains", [1, 5])
@pytest.mark.parametrize(("warmup_steps", "num_samples"), [(None, 40), (0, 1), (17, 23)])
def test_draw_n_of_chain_c_is_the_state_after_warmup_and_n_steps(num_chains, warmup_steps, num_samples):
    mcmc = counted(num_samples, num_chains, warmup_steps=warmup_steps)
    samples = mcmc.get_samples(group_by_chain=True)
    step = (3 if warmup_steps is None else warmup_steps) + torch.arange(1, num_samples + 1, dtype=F64)
    loc = starts(num_chains)["loc"][:, None] + step
    scale = (starts(num_chains)["scale"][:, None, :] + step[:, None]).exp()
    torch.testing.assert_close(samples["loc"], loc, rtol=0, atol=0)
    torch.testing.assert_close(samples["scale"], scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(samples["ratio"], loc[..., None] / scale, rtol=1e-12, atol=0)


def test_chains_are_flattened_chain_after_chain():
    mcmc = counted()
    flat, grouped = mcmc.get_samples(), mcmc.get_samples(group_by_chain=True)
    for name in ("loc", "scale", "ratio"):
        torch.testing.assert_close(flat[name], grouped[name].flatten(0, 1), rtol=0, atol=0)


def test_resampled_draws_keep_sites_together():
    samples = counted().get_samples(num_samples=11)
    assert samples["loc"].shape == (11,)
    torch.testing.assert_close(samples["ratio"], samples["loc"][:, None] / samples["scale"], rtol=1e-12, atol=0)


def test_blocks_never_cross_the_end_of_warm_up():
    kernel = Count(model)
    counted(1000, kernel=kernel, warmup_steps=100)
    sizes = torch.tensor(kernel.calls).cumsum(0).tolist()
    assert 100 in sizes and sizes[-1] == 1100 and max(kernel.calls) == 63


@pytest.mark.parametrize("save_params", [["b", "a"], ["a", "b"], ("b",)])
def test_saved_sites_keep_their_names_in_any_order(save_params):
    torch.manual_seed(0)
    kernel = Count(pair_of_normals)
    start = {"a": torch.full((2,), 10.0, dtype=F64), "b": torch.full((2,), -10.0, dtype=F64)}
    mcmc = MCMC(kernel, 2, 0, start, num_chains=2, save_params=save_params, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    assert set(samples) == set(save_params)
    for name in save_params:
        assert samples[name].tolist() == [start[name][0] + n for n in (1, 2, 1, 2)]
    again = MCMC(kernel, 2, 0, start, num_chains=2, disable_progbar=True)  # the list does not stick to the kernel
    again.run()
    assert set(again.get_samples()) == {"a", "b"}


def test_a_deterministic_site_may_be_saved_alone():
    assert set(counted(save_params=["ratio"]).get_samples()) == {"ratio"}


def test_an_unknown_saved_site_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"got \['mu'\]. Known sites: \['loc', 'ratio', 'scale'\]"):
        counted(save_params=["loc", "mu"])
    with pytest.raises(TypeError, match=r"save_params=\['loc'\]"):
        counted(save_params="loc")


def test_hook_sees_every_step_of_every_chain():
    seen = []
    hook = lambda kernel, params, stage, i: seen.append((stage, i, params["loc"].tolist()))  # noqa: E731
    counted(2, 2, warmup_steps=2, hook_fn=hook)
    assert seen == [
        ("Warmup", 0, [1.0, 1001.0]),
        ("Warmup", 1, [2.0, 1002.0]),
        ("Sample", 0, [3.0, 1003.0]),
        ("Sample", 1, [4.0, 1004.0]),
    ]


def test_diagnostics_are_pyros_figures_and_one_entry_a_chain():
    mcmc = counted(40, 12, warmup_steps=0)
    found, samples = mcmc.diagnostics(), mcmc.get_samples(group_by_chain=True)
    for name, figures in util.diagnostics(samples).items():
        torch.testing.assert_close(found[name]["n_eff"], figures["n_eff"], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found[name]["r_hat"], figures["r_hat"], rtol=0, atol=0, equal_nan=True)
    assert found["acceptance rate"] == {f"chain {i}": 0.5 + i for i in range(12)}
    assert found["kind"]["chain 11"] == "test"
    assert found["log evidence"] == dict.fromkeys(found["kind"], [float(b) for b in range(12)])
    # step n, draw n - 1, of chain c diverges if n = c
    assert found["divergences"] == {f"chain {c}": [c - 1] if c > 0 else [] for c in range(12)}
    assert mcmc.sample_stats["diverging"].shape == mcmc.sample_stats["acceptance_rate"].shape == (12, 40)


def test_a_kernel_that_cannot_diverge_reports_no_divergences():
    torch.manual_seed(0)
    mcmc = MCMC(RandomWalk(model), 5, num_chains=2, disable_progbar=True)
    mcmc.run(DATA)
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": []}


def test_summary_prints_pyros_table(capsys):
    mcmc = counted(40, 12, warmup_steps=0)
    mcmc.summary(prob=0.8)
    table = capsys.readouterr().out
    util.print_summary(mcmc.get_samples(group_by_chain=True), prob=0.8)
    assert table == capsys.readouterr().out + "Number of divergences: 11\n"


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_tells_acceptance_and_divergences(capsys, monkeypatch, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if not shown:
        monkeypatch.setenv("CI", "1")
    mcmc = MCMC(Count(model), 40, 0, starts(12), num_chains=12)
    mcmc.run(DATA)
    said = capsys.readouterr().err
    assert ("40/40" in said and "acc. prob=0.250" in said and "divergences=11" in said and "step=40" in said) == shown


def test_ctrl_c_while_drawing_returns_the_draws_made(capsys):
    mcmc = MCMC(Count(model), 10, 3, starts(2), num_chains=2, hook_fn=interrupt_at("Sample", 5), disable_progbar=True)
    with pytest.warns(UserWarning, match="6 of 10 draws a chain were made"):
        mcmc.run(DATA)
    assert mcmc.num_samples == 6
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["loc"].dtype == F64 and samples["loc"][1].tolist() == [1000.0 + 3 + n for n in range(1, 7)]
    assert samples["ratio"].shape == (2, 6, 3) and mcmc.sample_stats["diverging"].shape == (2, 6)
    mcmc.summary()
    mcmc.hook_fn = None
    mcmc.run(DATA)
    assert mcmc.num_samples == 10


def test_three_draws_are_too_few_for_a_table_but_not_for_diagnostics():
    mcmc = counted(3)
    assert mcmc.diagnostics()["scale"]["r_hat"].isnan().all()
    with pytest.raises(ValueError, match="at least 4 draws a chain, got 3"):
        mcmc.summary()


def test_ctrl_c_in_warm_up_says_that_nothing_was_drawn():
    mcmc = MCMC(Count(model), 10, 3, num_chains=2, hook_fn=interrupt_at("Warmup", 1), disable_progbar=True)
    with pytest.raises(KeyboardInterrupt, match="no draws were made"):
        mcmc.run(DATA)
    with pytest.raises(RuntimeError, match="there are no draws yet"):
        mcmc.get_samples()
    assert mcmc.kernel.num_chains is None and mcmc.kernel.log_joint is None


class Breaks(Count):
    def move(self, params):
        if self.steps == 20:
            raise ArithmeticError("step 20")
        return super().move(params)


def test_an_error_keeps_the_draws_made_and_says_so():
    mcmc = MCMC(Breaks(model), 40, 0, starts(2), num_chains=2, disable_progbar=True)  # blocks of 8
    with pytest.raises(ArithmeticError, match="step 20") as caught:
        mcmc.run(DATA)
    assert any("first 16 draws" in note for note in getattr(caught.value, "__notes__", ["first 16 draws"]))
    assert mcmc.get_samples(group_by_chain=True)["loc"][0].tolist() == list(range(1, 17))
    assert mcmc.kernel.log_joint is None


def test_a_second_run_starts_afresh():
    mcmc = counted(10, 2)
    first, evaluations = mcmc.get_samples()["loc"], mcmc.evaluations
    mcmc.run(DATA + 1, shift=1000.0)
    second = mcmc.get_samples()
    torch.testing.assert_close(second["loc"], first, rtol=0, atol=0)
    torch.testing.assert_close(second["ratio"] * second["scale"], (first + 1000.0)[:, None].expand(20, 3))
    assert mcmc.evaluations == evaluations and mcmc.kernel.num_chains is None
    assert mcmc._args[0] is not DATA and mcmc._kwargs == {"shift": 1000.0}


def test_evaluations_are_counted_in_rows():
    torch.manual_seed(0)
    mcmc = MCMC(RandomWalk(model), 6, 4, starts(7), num_chains=7, disable_progbar=True)
    mcmc.run(DATA)
    assert mcmc.evaluations.density >= 2 * 10 * 7  # two densities a step and chain
    assert mcmc.evaluations.density % 7 < 7


def test_predictive_takes_the_samples_with_their_deterministic_sites():
    mcmc = counted(4, 2)
    predicted = Predictive(model, mcmc.get_samples())(None)
    assert predicted["y"].shape == (8, 3)
    ratio = Predictive(model, mcmc.get_samples(), return_sites=("ratio",))(None)["ratio"]
    torch.testing.assert_close(ratio, mcmc.get_samples()["ratio"], rtol=0, atol=0)


def test_arviz_from_pyro_reads_it():
    az = pytest.importorskip("arviz")
    if not hasattr(az, "from_pyro"):
        pytest.skip("ArviZ 1.x has no from_pyro")
    mcmc = counted(40, 3)
    idata = az.from_pyro(mcmc, log_likelihood=False)
    assert idata.posterior["scale"].shape == (3, 40, 3) and idata.posterior["ratio"].shape == (3, 40, 3)
    assert idata.sample_stats["diverging"].shape == (3, 40)
    assert az.convert_to_inference_data(mcmc).posterior["loc"].shape == (3, 40)


def switch(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("rows", 2):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, dtype=F64)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc + 100.0 * side, 1.0), obs=y)


def test_enumerated_sites_are_drawn_given_the_others():
    torch.manual_seed(0)
    mcmc = MCMC(RandomWalk(switch), 5, num_chains=3, disable_progbar=True)
    mcmc.run(torch.tensor([0.0, 100.0], dtype=F64))
    assert set(mcmc.get_samples()) == {"loc"}
    side = mcmc.get_discrete_samples(group_by_chain=True)["side"]
    assert side.shape == (3, 5, 2)
    assert (side == torch.tensor([0.0, 1.0])).all()  # 100 sd apart: certain
    again = pickle.loads(pickle.dumps(mcmc))
    again._drawn = dataclasses.replace(again._drawn, discrete=None)
    assert (again.get_discrete_samples()["side"] == torch.tensor([0.0, 1.0])).all()


def test_enumerated_sites_need_every_continuous_site():
    mcmc = counted(4, 2, save_params=["loc"])
    with pytest.raises(RuntimeError, match=r"save_params dropped \['scale'\]"):
        mcmc.get_discrete_samples()
    assert counted(4, 2).get_discrete_samples() == {}


def test_it_pickles_after_a_run():
    mcmc = counted(8, 2)
    again = pickle.loads(pickle.dumps(mcmc))
    torch.testing.assert_close(again.get_samples(), mcmc.get_samples(), rtol=0, atol=0)
    again.run(DATA)
    torch.testing.assert_close(again.get_samples(), mcmc.get_samples(), rtol=0, atol=0)


def test_argument_checks_are_switched_off_during_the_run_alone():
    seen = []
    flag = lambda *_: seen.append(torch.distributions.Distribution._validate_args)  # noqa: E731
    outside = torch.distributions.Distribution._validate_args
    for disable in (True, False, None):
        counted(1, 1, warmup_steps=0, hook_fn=flag, disable_validation=disable)
    assert seen == [False, True, outside]
    assert torch.distributions.Distribution._validate_args == outside


def test_users_transforms_replace_the_kernels():
    shift = torch.distributions.transforms.AffineTransform(torch.tensor(-5.0, dtype=F64), torch.tensor(1.0, dtype=F64))
    samples = counted(2, 1, warmup_steps=0, transforms={"loc": shift}).get_samples()
    assert samples["loc"].tolist() == [6.0, 7.0]


def test_a_random_walk_finds_the_moments_of_a_normal():
    torch.manual_seed(0)
    mcmc = MCMC(RandomWalk(pair_of_normals, step_size=0.2), 300, 200, num_chains=200, disable_progbar=True)
    start = torch.zeros(200, dtype=F64)
    mcmc.initial_params = {"a": start + 10, "b": start - 10}
    mcmc.run()
    for name, mean in (("a", 10.0), ("b", -10.0)):
        chain_means = mcmc.get_samples(group_by_chain=True)[name].mean(1)
        z = (chain_means.mean() - mean) / (chain_means.std() / 200**0.5)
        assert abs(z) < 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be a whole number of at least 1, got 2.5"),
        ({"num_chains": 0}, ValueError, "num_chains must be a whole number of at least 1, got 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be a whole number of at least 0, got -1"),
        ({"mp_context": "spawn"}, ValueError, "mp_context must be None, got 'spawn'"),
        ({"initial_params": {"a": torch.zeros(())}}, ValueError, r"shape \(4, \*site\), got \(\)\. .*value\.expand"),
        ({"initial_params": {"a": torch.zeros(3, 4)}}, ValueError, r"'a' must have shape \(4, \*site\), got \(3, 4\)"),
        ({"kernel": pyro.infer.NUTS(model)}, TypeError, "got NUTS. Use pyro.infer.MCMC for it"),
    ],
)
def test_bad_arguments_are_refused_at_the_door(options, error, message):
    with pytest.raises(error, match=message):
        MCMC(**{"kernel": Count(model), "num_samples": 2, "num_chains": 4, **options})


def test_results_before_a_run_are_refused():
    mcmc = MCMC(Count(model), 2)
    assert mcmc.num_chains == 64 and isinstance(mcmc, pyro.infer.MCMC)
    for read in (mcmc.get_samples, mcmc.diagnostics, mcmc.summary, mcmc.get_discrete_samples):
        with pytest.raises(RuntimeError, match="Call run"):
            read()
