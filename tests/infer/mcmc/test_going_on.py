"""Runs that go on: without learning again, after an interrupt, drawn out, and never with other data."""

import pickle
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.fingerprint import fingerprint
from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.mcmc.walk import Walk
from pyro_sb.infer.population import populate
from pyro_sb.stages import announce, listening
from tests.infer.mcmc.test_mcmc import counted

F64 = torch.float64
Y = torch.tensor([0.9, 0.2, 0.7, -0.4], dtype=F64)


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones((), dtype=F64)))
    pyro.deterministic("ratio", mu / sd)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def wider(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 3.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def chains(kernel=None, num_samples=20, **options):
    kernel = KernelLangevin(model, num_particles=100) if kernel is None else kernel
    return MCMC(kernel, num_samples, **({"num_chains": 8, "warmup_steps": 5, "disable_progbar": True} | options))


def finished(*args, y=Y, **options):
    mcmc = chains(*args, **options)
    mcmc.run(y)
    return mcmc


def rows(evaluations):
    return evaluations.density + evaluations.gradient


def last_states(mcmc):
    return {name: value[:, -1] for name, value in mcmc.get_samples(group_by_chain=True).items()}


def starts_of(mcmc, monkeypatch):
    """The states from which each block of a run leaves, constrained."""
    seen, real = [], mcmc.kernel.sample_block

    def spied(params, num):
        seen.append({name: mcmc.kernel.transforms[name].inv(value) for name, value in params.items()})
        return real(params, num)

    monkeypatch.setattr(mcmc.kernel, "sample_block", spied)
    return seen


def interrupting(stage):
    """Ctrl-C at the beginning of a stage."""

    def begin(name):
        if name == stage:
            signal.raise_signal(signal.SIGINT)

    return listening(begin)


# ---- without learning again ----


def test_a_warmed_kernel_goes_on_from_the_last_states_and_does_not_learn_again(monkeypatch):
    first = finished()
    moves, population = first.kernel.frozen, first.kernel.population
    again = chains(first.kernel, 30, warmup_steps=0)
    seen = starts_of(again, monkeypatch)
    again.run(Y)
    assert again.kernel.frozen is moves and again.kernel.population is population
    for name in ("mu", "sd"):
        torch.testing.assert_close(seen[0][name], last_states(first)[name], rtol=0, atol=0)
    assert rows(again.evaluations) < 0.2 * rows(first.evaluations)
    assert first.get_samples(group_by_chain=True)["mu"].shape == (8, 20)  # the first run is as it was
    assert again.get_samples(group_by_chain=True)["mu"].shape == (8, 30)


def test_reports_of_a_second_run_speak_of_its_own_draws():
    first = finished()
    again = finished(first.kernel, 30, warmup_steps=0)
    rate = again.sample_stats["acceptance_rate"].mean(1)
    found = torch.tensor(list(again.diagnostics()["acceptance rate"].values()), dtype=F64)
    torch.testing.assert_close(found, rate)


@pytest.mark.parametrize("num_chains", [3, 12])
def test_another_number_of_chains_starts_from_the_population(num_chains):
    first = finished()
    again = finished(first.kernel, warmup_steps=0, num_chains=num_chains)
    assert again.kernel.population is first.kernel.population
    assert again.get_samples(group_by_chain=True)["mu"].shape == (num_chains, 20)


def test_starts_of_the_users_own_are_kept(monkeypatch):
    start = {"mu": torch.full((8,), 0.3, dtype=F64), "sd": torch.full((8,), -0.2, dtype=F64)}
    again = chains(finished().kernel, warmup_steps=0, initial_params=start)
    seen = starts_of(again, monkeypatch)
    again.run(Y)
    torch.testing.assert_close(seen[0]["mu"], start["mu"], rtol=0, atol=0)


def test_with_warm_up_steps_it_learns_anew():
    first = finished()
    population = first.kernel.population
    first.run(Y)
    assert first.kernel.population is not population
    other = finished(first.kernel, y=Y + 5)
    assert abs(float(other.get_samples()["mu"].mean()) - 5) < 1


OTHERS = {
    "data": (lambda k: k, Y + 1, fingerprint((Y + 1,), {})),
    "shape": (lambda k: k, torch.cat([Y, Y]), fingerprint((torch.cat([Y, Y]),), {})),
    "model": (lambda k: setattr(k, "model", wider), Y, "wider ("),
    "option": (lambda k: setattr(k, "num_particles", 200), Y, "the options"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_target_is_refused_with_both_named_and_nothing_is_lost(what):
    first = finished()
    kernel, (change, y, named), before = first.kernel, OTHERS[what], dict(vars(first.kernel))
    change(kernel)
    with pytest.raises(ValueError, match="warmup_steps=0 goes on with what the kernel has learnt") as caught:
        finished(kernel, y=y, warmup_steps=0)
    message = str(caught.value)
    assert named in message and " there and " in message and "Write warmup_steps=None" in message
    if what in ("data", "shape"):
        assert fingerprint((Y,), {}) in message
    kernel.model, kernel.num_particles = before["model"], before["num_particles"]
    again = finished(kernel, warmup_steps=0)
    assert again.kernel.population is before["population"]


def test_a_model_that_cannot_be_told_from_others_learns_anew():
    class Secret:
        def __getattribute__(self, name):
            if name == "__dict__":
                raise RuntimeError("not to be looked at")
            return super().__getattribute__(name)

    secret = Secret()

    def guarded(y):
        assert secret is not None
        model(y)

    first = finished(KernelLangevin(guarded, num_particles=100))
    assert first.kernel.words is None
    population = first.kernel.population
    again = finished(first.kernel, warmup_steps=0)
    assert again.kernel.population is not population


# ---- interrupted ----


def test_ctrl_c_in_warm_up_keeps_what_was_learnt_and_the_run_goes_on_from_it():
    mcmc = chains()
    with interrupting("moves"), pytest.raises(KeyboardInterrupt, match="no draws were made. What was learnt is kept"):
        mcmc.run(Y)
    population = mcmc.kernel.population
    assert population is not None and mcmc.kernel.frozen is None
    mcmc.run(Y)
    assert mcmc.kernel.population is population
    assert mcmc.get_samples()["mu"].shape == (160,)
    whole = finished()
    cost = rows(whole.kernel.population.evaluations)
    assert rows(mcmc.evaluations) < rows(whole.evaluations) - 0.7 * cost


def test_ctrl_c_in_warm_up_steps_keeps_the_moves():
    def hook(kernel, params, stage, i):
        if (stage, i) == ("Warmup", 2):
            signal.raise_signal(signal.SIGINT)

    mcmc = chains(hook_fn=hook)
    with pytest.raises(KeyboardInterrupt, match="goes on from it"):
        mcmc.run(Y)
    moves = mcmc.kernel.frozen
    mcmc.hook_fn = None
    mcmc.run(Y)
    assert mcmc.kernel.frozen is moves
    mcmc.run(Y)  # that one ended: the next learns anew
    assert mcmc.kernel.frozen is not moves


def test_after_an_interrupt_other_data_are_learnt_from():
    mcmc = chains()
    with interrupting("moves"), pytest.raises(KeyboardInterrupt):
        mcmc.run(Y)
    population = mcmc.kernel.population
    mcmc.run(Y + 5)
    assert mcmc.kernel.population is not population
    assert abs(float(mcmc.get_samples()["mu"].mean()) - 5) < 1


def test_ctrl_c_before_anything_was_learnt_promises_nothing():
    mcmc = chains()
    with interrupting("search"), pytest.raises(KeyboardInterrupt) as caught:
        mcmc.run(Y)
    assert "no draws were made." in str(caught.value) and "kept" not in str(caught.value)
    assert not mcmc.kernel.has_learnt


# ---- drawn out ----


def test_draws_of_an_extension_follow_and_all_figures_speak_of_both(monkeypatch):
    mcmc = finished()
    before, evaluations, seconds = mcmc.get_samples(group_by_chain=True), mcmc.evaluations, mcmc.seconds
    last, moves = last_states(mcmc), mcmc.kernel.frozen
    seen = starts_of(mcmc, monkeypatch)
    mcmc.extend(15)
    for name in ("mu", "sd"):
        torch.testing.assert_close(seen[0][name], last[name], rtol=0, atol=0)
    after = mcmc.get_samples(group_by_chain=True)
    assert set(after) == {"mu", "sd", "ratio"} and mcmc.num_samples == 35 and mcmc.kernel.frozen is moves
    for name, value in after.items():
        assert value.shape == (8, 35)
        torch.testing.assert_close(value[:, :20], before[name], rtol=0, atol=0)
    torch.testing.assert_close(after["ratio"], after["mu"] / after["sd"], rtol=1e-12, atol=0)
    assert all(value.shape == (8, 35) for value in mcmc.sample_stats.values())
    found = torch.tensor(list(mcmc.diagnostics()["acceptance rate"].values()), dtype=F64)
    torch.testing.assert_close(found, mcmc.sample_stats["acceptance_rate"].mean(1))
    assert 0 < rows(mcmc.evaluations) - rows(evaluations) < 0.2 * rows(evaluations)
    assert mcmc.seconds["warmup"] == seconds["warmup"] and mcmc.seconds["sampling"] > seconds["sampling"]
    mcmc.run(Y)
    assert mcmc.num_samples == 20


def test_divergences_of_an_extension_are_counted_on():
    mcmc = finished(hook_fn=lambda kernel, *_: setattr(kernel, "step_size", 1e4))
    mcmc.extend(15)
    flagged = mcmc.sample_stats["diverging"]
    assert mcmc.kernel.diagnostics()["probability local"] > 0 and int(flagged[:, 20:].sum()) > 0
    assert mcmc.diagnostics()["divergences"] == {
        f"chain {i}": row.nonzero().flatten().tolist() for i, row in enumerate(flagged)
    }


def test_a_walk_that_is_interrupted_is_drawn_out_from_its_last_draw(monkeypatch):
    mcmc, run, calls = chains(num_samples=40), Walk.run, []

    def walk_run(walk, num):
        calls.append(num)
        found = run(walk, num)
        if len(calls) == 4:  # the block was walked, and is lost
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(Walk, "run", walk_run)
    with pytest.warns(UserWarning, match="16 of 40 draws"):
        mcmc.run(Y)
    last = last_states(mcmc)
    seen = starts_of(mcmc, monkeypatch)
    mcmc.extend(24)
    torch.testing.assert_close(seen[0]["mu"], last["mu"], rtol=0, atol=0)
    assert mcmc.kernel.rest["walk"]["num_steps"] == 40 == mcmc.num_samples  # the lost block is not counted
    found = torch.tensor(list(mcmc.diagnostics()["acceptance rate"].values()), dtype=F64)
    torch.testing.assert_close(found, mcmc.sample_stats["acceptance_rate"].mean(1))


def test_ctrl_c_in_an_extension_keeps_both():
    mcmc = finished()
    first = mcmc.get_samples(group_by_chain=True)["mu"]

    def hook(kernel, params, stage, i):
        if i == 4:
            signal.raise_signal(signal.SIGINT)

    mcmc.hook_fn = hook
    with pytest.warns(UserWarning, match="5 further draws a chain were made and are kept"):
        mcmc.extend(30)
    assert mcmc.num_samples == 25
    torch.testing.assert_close(mcmc.get_samples(group_by_chain=True)["mu"][:, :20], first, rtol=0, atol=0)


def test_two_runs_of_one_kernel_are_drawn_out_each_from_its_own_states(monkeypatch):
    first = finished()
    second = finished(first.kernel, warmup_steps=0)
    last, before = last_states(first), rows(first.evaluations)
    seen = starts_of(first, monkeypatch)
    first.extend(10)
    torch.testing.assert_close(seen[0]["mu"], last["mu"], rtol=0, atol=0)
    assert rows(first.evaluations) > before
    second.extend(5)
    assert (first.num_samples, second.num_samples) == (30, 25)


def test_data_that_changed_since_are_refused(tmp_path):
    y = Y.clone()
    mcmc = finished(y=y)
    y += 1
    with pytest.raises(ValueError, match=f"have changed since: the data is {fingerprint((Y,), {})} there and"):
        mcmc.extend(10)
    with pytest.raises(ValueError, match="have changed since"):
        mcmc.save(tmp_path / "run.pt")
    assert mcmc.num_samples == 20 and not list(tmp_path.iterdir())


def test_a_kernel_that_has_learnt_anew_draws_no_other_run_out(tmp_path):
    first = finished()
    finished(first.kernel)
    with pytest.raises(ValueError, match="the kernel has learnt others since"):
        first.extend(10)
    with pytest.raises(ValueError, match="the kernel has learnt others since"):
        first.save(tmp_path / "run.pt")
    finished(first.kernel, y=Y + 1)
    with pytest.raises(ValueError, match="the kernel has learnt others since"):
        first.extend(10)


def test_extend_needs_a_run_and_a_number():
    with pytest.raises(RuntimeError, match="Call run"):
        chains().extend(10)
    mcmc = finished()
    for number in (0, 2.5):
        with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1"):
            mcmc.extend(number)


def test_a_kernel_of_anybodys_is_drawn_out_too():
    mcmc = counted(10, 3)
    mcmc.extend(7)
    loc = mcmc.get_samples(group_by_chain=True)["loc"]
    step = 3 + torch.arange(1, 18, dtype=F64)
    torch.testing.assert_close(loc, 1000.0 * torch.arange(3, dtype=F64)[:, None] + step, rtol=0, atol=0)


def test_sites_that_were_not_kept_do_not_stop_an_extension():
    mcmc = finished(save_params=["ratio"])
    mcmc.extend(5)
    assert {name: value.shape for name, value in mcmc.get_samples(group_by_chain=True).items()} == {"ratio": (8, 25)}


def test_a_run_that_travelled_is_drawn_out():
    mcmc = finished()
    there = pickle.loads(pickle.dumps(mcmc))
    pyro.set_rng_seed(3)
    mcmc.extend(10)
    pyro.set_rng_seed(3)
    there.extend(10)
    torch.testing.assert_close(there.get_samples(), mcmc.get_samples(), rtol=0, atol=0)


# ---- seen ----


def test_the_bar_names_the_stages_and_counts_evaluations(capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    seen = []
    with listening(seen.append):
        finished(disable_progbar=False)
    said = capsys.readouterr().err
    for stage in ("search", "tempering", "moves", "warm-up", "sampling"):
        assert f"{stage}:" in said
    assert seen[0] == "search" and seen[-1] == "moves"
    assert "25/25" in said and "evaluations=" in said and "left=" in said and "acc. prob=" in said


def test_stages_reach_those_who_listen_and_nobody_after():
    heard, work = [], []
    with listening(heard.append, lambda: work.append(1)):
        populate(counted(1, 1)._log_joint, 60, exploring=False)
    assert heard[0] == "search" and "mixture rounds" in heard and len(work) > 10
    announce("nobody listens")
    assert "nobody listens" not in heard
