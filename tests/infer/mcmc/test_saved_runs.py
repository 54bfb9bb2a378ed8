"""Runs in files: what is resumed, loaded and drawn out is bit for bit what was never interrupted."""

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import report, to_arviz
from pyro_sb.files import read_file, write_file
from pyro_sb.fingerprint import fingerprint
from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.mcmc import saved
from pyro_sb.stages import listening
from tests.infer.mcmc.test_going_on import Y, chains, finished, model, rows, wider
from tests.infer.mcmc.test_mcmc import Count

F64 = torch.float64


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr(saved, "SHARE", 1e9)


def enumerated(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    with pyro.plate("rows", len(y)):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, dtype=F64)), infer={"enumerate": "parallel"})
        pyro.deterministic("mean", loc + 2 * side)
        pyro.sample("y", dist.Normal(loc + 2 * side, 1.0), obs=y)


def funnel(y):
    tau = pyro.sample("tau", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0 * tau, (tau / 2).exp()))
        pyro.sample("y", dist.Normal(theta, 3.0), obs=y)


def potential(sites):
    return 0.5 * ((sites["z"] - 1) ** 2).sum()


KERNELS = {
    "hmc": lambda: KernelLangevin(model, num_particles=100),
    "mala, a coupled index": lambda: KernelLangevin(model, num_particles=100, local="mala", index_time=3),
    "enumerated sites": lambda: KernelLangevin(enumerated, num_particles=100),
    "a funnel": lambda: KernelLangevin(funnel, num_particles=100),
}


def dies(kernel, num_calls):
    """A kernel whose process ends at a block."""
    real, calls = kernel.sample_block, []

    def sample_block(params, num):
        calls.append(num)
        if len(calls) == num_calls:
            raise Killed
        return real(params, num)

    kernel.sample_block = sample_block
    return kernel


def same_run(a, b):
    torch.testing.assert_close(a.get_samples(group_by_chain=True), b.get_samples(group_by_chain=True), rtol=0, atol=0)
    torch.testing.assert_close(a.sample_stats, b.sample_stats, rtol=0, atol=0)
    assert a.evaluations == b.evaluations and a.num_samples == b.num_samples
    found, expected = a.diagnostics(), b.diagnostics()
    assert found.keys() == expected.keys()
    for key in ("acceptance rate", "divergences", "density evaluations"):
        assert found[key] == expected[key]


# ---- killed ----


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_run_that_was_killed_goes_on_bit_for_bit(name, block, tmp_path):
    pyro.set_rng_seed(1)
    whole = finished(KERNELS[name](), 40)
    if name == "a funnel":
        assert whole.kernel.coordinates is not None
    pyro.set_rng_seed(1)
    with pytest.raises(Killed):
        finished(dies(KERNELS[name](), block), 40, checkpoint=tmp_path / "run.pt")
    pyro.set_rng_seed(2)
    resumed = finished(KERNELS[name](), 40, checkpoint=tmp_path / "run.pt")
    same_run(resumed, whole)
    assert rows(resumed.evaluations) > 0


@pytest.mark.parametrize("name", ["hmc", "a funnel"])
def test_a_run_that_was_killed_while_it_learnt_its_moves_keeps_the_population(name, tmp_path):
    pyro.set_rng_seed(1)
    whole = finished(KERNELS[name]())
    pyro.set_rng_seed(1)
    seen = []

    def work():
        if seen[-1:] == ["moves"]:  # its first evaluation
            raise Killed

    with pytest.raises(Killed), listening(seen.append, work):
        chains(KERNELS[name](), checkpoint=tmp_path / "run.pt").run(Y)
    assert "search" in seen
    seen.clear()
    with listening(seen.append):
        resumed = finished(KERNELS[name](), checkpoint=tmp_path / "run.pt")
    assert seen == ["moves"]
    same_run(resumed, whole)


@pytest.mark.slow
def test_a_process_that_ends_at_any_line_loses_nothing_but_steps(tmp_path):
    script = Path(__file__).with_name("killed.py")

    def process(path, stage, step):
        done = subprocess.run(
            [sys.executable, script, str(path), stage, str(step)], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == (0 if stage == "none" else 9), done.stderr
        return done.stdout

    whole = process(tmp_path / "whole.pt", "none", 0)
    path = tmp_path / "run.pt"
    for stage, step in (("Warmup", 2), ("Sample", 1), ("Sample", 9)):  # three times, each from where the last ended
        assert process(path, stage, step) == ""
    assert process(path, "none", 0) == whole


def test_an_interrupted_run_is_finished_from_its_file(tmp_path):
    pyro.set_rng_seed(1)
    whole = finished(num_samples=40)
    pyro.set_rng_seed(1)
    kernel = KERNELS["hmc"]()
    real, calls = kernel.sample_block, []

    def sample_block(params, num):
        calls.append(num)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(params, num)

    kernel.sample_block = sample_block
    mcmc = chains(kernel, 40, checkpoint=tmp_path / "run.pt")
    with pytest.warns(UserWarning, match="16 of 40 draws"):
        mcmc.run(Y)
    assert mcmc.num_samples == 16
    mcmc.run(Y)
    same_run(mcmc, whole)


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    path, fails = tmp_path / "run.pt", []
    pyro.set_rng_seed(1)
    whole = finished(num_samples=40)
    real = saved.write_file

    def full(value, where):
        fails.append(where)
        if len(fails) == 4:
            raise OSError("No space left on device")
        real(value, where)

    monkeypatch.setattr(saved, "write_file", full)
    pyro.set_rng_seed(1)
    with pytest.raises(OSError, match="No space left"):
        finished(num_samples=40, checkpoint=path)
    monkeypatch.setattr(saved, "write_file", real)
    same_run(finished(num_samples=40, checkpoint=path), whole)


def test_a_finished_run_is_taken_from_its_file_and_said(tmp_path):
    path = tmp_path / "run.pt"
    first = finished(checkpoint=path)
    with pytest.warns(UserWarning, match="holds this run, finished: its 20 draws a chain are taken"):
        again = finished(checkpoint=path)
    same_run(again, first)
    again.extend(5)
    assert MCMC.load(path, model).num_samples == 25


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SHARE", 1e-9)
    written = []
    monkeypatch.setattr(saved, "write_file", lambda value, path: written.append(value["going"]))
    finished(num_samples=40, checkpoint=tmp_path / "run.pt")
    stages = [None if going is None else (going["stage"], going["params"] is None) for going in written]
    assert stages == [(0, True), (0, False), None]  # what was learnt, the starts, the end


# ---- refused ----


def others(path):
    return {
        "data": (lambda: finished(y=Y + 1, checkpoint=path), [fingerprint((Y,), {}), fingerprint((Y + 1,), {})]),
        "model": (lambda: finished(KernelLangevin(wider, num_particles=100), checkpoint=path), ["model (", "wider ("]),
        "option": (lambda: finished(KernelLangevin(model, num_particles=90), checkpoint=path), ["the options is"]),
        "draws": (lambda: finished(num_samples=21, checkpoint=path), ["the number of draws is 20 there and 21 here"]),
        "chains": (lambda: finished(num_chains=9, checkpoint=path), ["the number of chains is 8 there and 9 here"]),
    }


@pytest.mark.parametrize("what", others(None))
@pytest.mark.parametrize("ended", [True, False])
def test_a_file_of_another_run_is_refused_with_both_named_and_stays(what, ended, tmp_path):
    path = tmp_path / "run.pt"
    if ended:
        finished(checkpoint=path)
    else:
        with pytest.raises(Killed):
            finished(dies(KERNELS["hmc"](), 3), checkpoint=path)
    before = path.read_bytes()
    run, named = others(path)[what]
    with pytest.raises(ValueError, match="checkpoint must be of this run to go on from") as caught:
        run()
    assert all(word in str(caught.value) for word in named) and str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_what_no_file_keeps_is_refused_before_any_work(tmp_path):
    path, seen = tmp_path / "run.pt", []
    shift = torch.distributions.transforms.ExpTransform().inv
    with listening(seen.append):
        with pytest.raises(TypeError, match="Count cannot be written. Use KernelLangevin"):
            finished(Count(model), checkpoint=path)
        with pytest.raises(ValueError, match="transforms are functions, which no file keeps"):
            finished(transforms={"sd": shift}, checkpoint=path)
        with pytest.raises(ValueError, match="checkpoint must lie in a folder that exists"):
            finished(checkpoint=tmp_path / "none" / "run.pt")
        path.write_text("a letter")
        with pytest.raises(ValueError, match="must not overwrite a file that this package did not write"):
            finished(checkpoint=path)
        assert path.read_text() == "a letter"
        write_file({"format": 1}, path)
        with pytest.raises(ValueError, match="must hold a run that MCMC.save or checkpoint= wrote"):
            finished(checkpoint=path)
    assert not seen


# ---- loaded ----


@pytest.mark.parametrize("name", KERNELS)
def test_a_loaded_run_has_all_figures_and_goes_on_as_the_run_itself(name, tmp_path, capsys):
    mcmc = finished(KERNELS[name]())
    mcmc.save(tmp_path / "run.pt")
    there = MCMC.load(tmp_path / "run.pt", mcmc.kernel.model)
    same_run(there, mcmc)
    assert there.kernel is not mcmc.kernel and there.seconds == mcmc.seconds
    assert repr(there) == repr(mcmc)
    mcmc.summary()
    table = capsys.readouterr().out
    there.summary()
    assert capsys.readouterr().out == table
    assert there.kernel.describe().splitlines()[:-1] == mcmc.kernel.describe().splitlines()[:-1]
    exported = to_arviz(there, log_likelihood=True)
    assert exported["log_likelihood"]["y"].shape == (8, 20, 4)
    lines = [line.name for line in report(mcmc, audit=None).lines]
    assert [line.name for line in report(there, audit=None).lines] == lines
    for one in (mcmc, there):
        pyro.set_rng_seed(5)
        one.extend(12)
    same_run(there, mcmc)
    pyro.set_rng_seed(6)
    again = chains(there.kernel, warmup_steps=0)
    again.run(Y)  # the loaded kernel is a warmed one
    assert rows(again.evaluations) < 0.3 * rows(mcmc.evaluations)


def test_a_loaded_run_of_a_potential_needs_its_kernel(tmp_path):
    start = {"z": torch.zeros(8, 2, dtype=F64)}
    mcmc = chains(KernelLangevin(potential_fn=potential, num_particles=100), initial_params=start)
    mcmc.run()
    mcmc.save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"options that no file keeps.*MCMC.load\(path, KernelLangevin\(\.\.\.\)\)"):
        MCMC.load(tmp_path / "run.pt", potential)
    there = MCMC.load(tmp_path / "run.pt", KernelLangevin(potential_fn=potential, num_particles=100))
    there.extend(3)
    assert there.get_samples()["z"].shape == (8 * 23, 2)


def test_a_run_that_did_not_end_is_loaded_with_its_draws(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        finished(dies(KERNELS["hmc"](), 4), 40, checkpoint=path)
    mcmc = MCMC.load(path, model)
    assert mcmc.num_samples == 16 and mcmc.get_samples(group_by_chain=True)["ratio"].shape == (8, 16)
    mcmc.extend(4)
    assert mcmc.num_samples == 20
    path.unlink()
    with pytest.raises(Killed):
        finished(dies(KERNELS["hmc"](), 1), 40, checkpoint=path)
    early = MCMC.load(path, model)
    with pytest.raises(RuntimeError, match="no draws yet"):
        early.get_samples()
    population = early.kernel.population
    early.run(Y)
    assert early.kernel.population is population


def test_arguments_that_no_file_holds_are_asked_for(tmp_path):
    def of_list(rows):
        model(torch.as_tensor(rows["y"], dtype=F64))

    import pandas as pd

    frame = pd.DataFrame({"y": Y.numpy()})
    mcmc = finished(KernelLangevin(of_list, num_particles=100), y=frame)
    mcmc.save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"does not hold the model's arguments.*args=\(y,\)"):
        MCMC.load(tmp_path / "run.pt", of_list)
    there = MCMC.load(tmp_path / "run.pt", of_list, args=(frame,))
    same_run(there, mcmc)
    with pytest.raises(ValueError, match="must be given the model, data and options that it was drawn with"):
        MCMC.load(tmp_path / "run.pt", of_list, args=(frame + 1,))


def test_another_model_and_other_data_are_refused(tmp_path):
    mcmc = finished()
    mcmc.save(tmp_path / "run.pt")
    for given, named in ((wider, "wider ("), (KernelLangevin(model, num_particles=90), "the options is")):
        with pytest.raises(ValueError, match="got others: ") as caught:
            MCMC.load(tmp_path / "run.pt", given)
        assert named in str(caught.value)
    with pytest.raises(ValueError, match=f"the data is {fingerprint((Y,), {})} there and"):
        MCMC.load(tmp_path / "run.pt", model, args=(Y + 1,))


def changed(path, change):
    contents = read_file(path)
    change(contents)
    write_file(contents, path)


ATTACKS = {
    "a class of another package": lambda c: c["kernel"]["population"].update({"~class": "os:system"}),
    "a function of ours": lambda c: c["kernel"]["population"].update({"~class": "pyro_sb.files:write_file"}),
    "no class at all": lambda c: c["kernel"]["population"].update({"~class": "pyro_sb.files:none"}),
    "a network": lambda c: c["kernel"]["population"].update({"~class": "pyro_sb.bridges.light.light:LightSB"}),
    "fewer parts": lambda c: c["kernel"].pop("frozen"),
    "no draws": lambda c: c["results"].pop("samples"),
    "no state": lambda c: c["rest"]["walk"].pop("x"),
    "fewer chains": lambda c: c["rest"]["walk"].update(x=c["rest"]["walk"]["x"][1:]),
    "other moves": lambda c: c["rest"]["walk"]["ahead"].clear(),
    "a later format": lambda c: c.update(format=2),
    "another kind": lambda c: c.update(kind="Population"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_that_was_altered_is_refused(name, tmp_path):
    path = tmp_path / "run.pt"
    finished(num_samples=4).save(path)
    changed(path, ATTACKS[name])
    with pytest.raises(ValueError, match=r"must h(old|ave)|the file asks for|must be one of the moves"):
        MCMC.load(path, model)


def test_torn_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(FileNotFoundError):
        MCMC.load(path, model)
    finished(num_samples=4).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="must be a whole file that this package wrote"):
        MCMC.load(path, model)
    with pytest.raises(RuntimeError, match="Call run"):
        chains().save(path)
