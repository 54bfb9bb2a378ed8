"""Threads: chosen by calls' own times, and put back whatever happens."""

import json
import linecache
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import pyro_sb.threads as module
from pyro_sb.bridges.codecs.autoencoder import AutoencoderCodec
from pyro_sb.bridges.diffusion.smoothed import SmoothedBridge
from pyro_sb.bridges.diffusion.vsdm import VSDM
from pyro_sb.bridges.dsb.bridge import DSB
from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.latent.bridge import LatentBridge
from pyro_sb.bridges.light.bass import LightSBBM
from pyro_sb.bridges.light.fit import Likelihood
from pyro_sb.bridges.light.light import LightSB, LightSBM
from pyro_sb.bridges.tails.bridge import TailMatched
from pyro_sb.diagnostics import mode_audit
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.kernels.bridge_mh import BridgeMH
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.build import populate
from pyro_sb.threads import Pace, Trial, chosen_threads


def counts() -> dict[str, int]:
    """Threads of torch, and of each library that is loaded."""
    return {"torch": torch.get_num_threads()} | {lib["filepath"]: lib["num_threads"] for lib in threadpool_info()}


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads of torch and of every library, as on a user's machine; afterwards those of the tests."""
    import sklearn.cluster  # noqa: F401  its libraries are then known to every count

    with threadpool_limits(2):  # OMP_NUM_THREADS may say one
        torch.set_num_threads(2)
        assert set(counts().values()) == {2}
        yield
        torch.set_num_threads(1)


# ---- the choice ----


@pytest.fixture(autouse=True)
def no_losses():
    """No trial of another test has lost anything."""
    module.COUNTS.own.even = 0.0


def warm_trial(most=2, size=1):
    """A trial after its first call, which is slow and does not count."""
    trial = Trial()
    trial.note(trial.next(most), most, 9.0, size)
    return trial


def choice(one, many, size=1, most=4):
    """The number that a trial comes to, given the seconds of calls with one thread and with many after a cold one."""
    trial, one, many = warm_trial(most, size), iter(one), iter(many)
    for _ in range(6):
        num = trial.next(most)
        trial.note(num, most, next(one if num == 1 else many), size)
    return trial.next(most)


@pytest.mark.parametrize(
    ("one", "many", "expected"),
    [
        ([0.010] * 6, [0.006] * 3, 4),
        ([0.010] * 6, [0.0099] * 3, 1),  # hardly faster
        ([0.010] * 6, [0.021], 1),  # hopeless: one call is enough
        ([0.010] * 6, [0.004, 0.004, 0.019], 4),
        ([0.010] * 6, [0.006, 0.006, 0.019], 1),  # a stall speaks against many
        ([0.010, 0.500, 0.010] * 2, [0.012] * 3, 1),  # and one of one thread does not
        ([0.00005] * 9, [], 1),  # nothing to share: many are not even tried
        ([1.0] * 2, [0.6] * 4, 4),  # long calls: two of each are enough
    ],
)
def test_the_better_number_is_chosen(one, many, expected):
    assert choice(one, many) == expected


def test_calls_are_compared_by_their_time_over_their_size():
    trial = warm_trial(4)
    for num, rows in ((1, 1024), (4, 1024), (1, 1536), (4, 1100), (1, 2000), (4, 1050)):
        assert trial.next(4) == num
        trial.note(num, 4, rows * (2e-5 if num == 1 else 1.9e-5), rows)  # many are no faster, their calls are smaller
    assert trial.next(4) == 1


def test_losses_of_one_kind_of_call_put_off_trials_of_another(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module, "perf_counter", lambda: now)
    trial, other = warm_trial(), warm_trial()
    for seconds in [0.010, 0.610]:  # threads that wait for each other: .6 seconds lost
        trial.note(trial.next(2), 2, seconds, 1)
    now = 100.0 + 0.6 / module.SHARE - 0.1
    for _ in range(5):
        assert other.next(2) == 1
        other.note(1, 2, 0.010, 1)
    now += 0.2
    other.note(other.next(2), 2, 0.010, 1)
    assert other.next(2) == 2


def test_the_choice_is_made_again_after_a_while(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module, "perf_counter", lambda: now)
    trial = warm_trial()
    for seconds in [0.010, 0.005] * 3:
        trial.note(trial.next(2), 2, seconds, 1)
    assert trial.next(2) == 2
    now = 0.9
    assert trial.next(2) == 2
    now = 1.1
    for seconds in [0.010, 0.030]:  # a busy machine
        trial.note(trial.next(2), 2, seconds, 1)
    assert trial.next(2) == 1
    assert trial.verdict == "1 of 2 (10 ms for 30 ms a call)"


def test_a_trial_that_cost_much_is_not_made_again_soon(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module, "perf_counter", lambda: now)
    trial = warm_trial()
    for seconds in [0.010, 2.010]:
        trial.note(trial.next(2), 2, seconds, 1)
    now = 99.0
    trial.note(trial.next(2), 2, 0.010, 1)
    assert trial.verdict == "1 of 2 (10 ms for 2.01 s a call)"
    assert trial.next(2) == 1
    assert not trial.due
    now = 101.0
    assert trial.due


def test_a_choice_keeps_to_a_smaller_bound():
    trial = warm_trial(8)
    for seconds in [0.010, 0.005] * 3:
        trial.note(trial.next(8), 8, seconds, 1)
    assert (trial.next(8), trial.next(2)) == (8, 2)


def test_choices_grow_rarer(monkeypatch):
    now, times = 0.0, []
    monkeypatch.setattr(module, "perf_counter", lambda: now)
    trial = warm_trial()
    for _ in range(6):
        while not trial.due and trial.verdict:
            now += 0.25
        times.append(now)
        for seconds in [0.010, 0.005] * 3:
            trial.note(trial.next(2), 2, seconds, 1)
    waits = [late - early for early, late in zip(times, times[1:], strict=False)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0]


# ---- runs ----


def test_a_run_holds_one_thread_and_tries_the_number_found():
    pace, seen = Pace(), []
    with chosen_threads():
        assert set(counts().values()) == {1}
        for _ in pace.each(range(8)):
            seen.append(counts())
            torch.linalg.eigvalsh(torch.eye(100))
        assert set(counts().values()) == {1}
    assert [set(number.values()) for number in seen[:4]] == [{1}, {1}, {2}, {1}]
    assert pace.describe().startswith("threads: ")
    assert " of 2 (" in pace.describe()


def test_outside_a_run_nothing_is_timed():
    pace = Pace()
    for _ in pace.each(range(8)):
        assert torch.get_num_threads() == 2
    assert pace.describe() == "threads: 2"


def test_the_users_number_is_an_upper_bound():
    torch.set_num_threads(1)
    pace, before = Pace(), counts()
    assert set(before.values()) == {1, 2}
    with chosen_threads():
        for _ in pace.each(range(8)):
            assert set(counts().values()) == {1}
    assert counts() == before
    assert pace.describe() == "threads: 1"


def test_calls_within_a_timed_call_are_part_of_it():
    outer, inner = Pace(), Pace()
    with chosen_threads():
        for _ in outer.each(range(8)):
            with inner.call():
                pass
    assert inner.describe() == "threads: 2"  # never timed


def test_runs_within_a_run_and_in_other_python_threads_put_back_what_the_first_found():
    before, inside, leave = counts(), threading.Event(), threading.Event()

    def other() -> None:
        with chosen_threads():
            inside.set()
            leave.wait(10)

    second = threading.Thread(target=other)
    with chosen_threads():
        second.start()
        inside.wait(10)
        with chosen_threads():
            pass
        assert torch.get_num_threads() == 1
    leave.set()
    second.join()
    assert counts() == before


def test_another_device_leaves_all_as_found():
    before = counts()
    with chosen_threads(torch.zeros(2, device="meta")):
        assert counts() == before
        pace = Pace()
        with pace.call(device=torch.device("meta")):
            assert counts() == before
    with chosen_threads(), Pace().call(device=torch.device("meta")):
        assert torch.get_num_threads() == 1


@pytest.mark.cuda
def test_cuda_leaves_all_as_found(monkeypatch, device="cuda"):
    before, seen, loss = counts(), [], Likelihood.loss

    def watched(self, *args):
        seen.append(counts())
        return loss(self, *args)

    monkeypatch.setattr(Likelihood, "loss", watched)
    law = dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1)
    for target in (law, law.sample((500,))):
        bridge = LightSB(2, num_components=3).to(device)
        history = bridge.fit(target, num_updates=10, progress=False)
        assert len(seen) == 10
        assert all(number == before for number in seen)
        assert history.threads == "threads: 2"
        seen.clear()


@pytest.mark.parametrize(
    "value",
    [
        torch.device("meta"),
        torch.nn.Linear(2, 2, device="meta"),
        dist.Normal(torch.zeros(2, device="meta"), 1.0, validate_args=False).to_event(1),
        {"data": [torch.zeros(2, device="meta")]},
        LogJoint.from_batched(lambda z: -z.square().sum(-1), dim=2, device="meta"),
    ],
    ids=["device", "module", "law", "containers", "log joint"],
)
def test_whatever_lies_on_another_device_leaves_all_as_found(value):
    before = counts()
    with chosen_threads(value):
        assert counts() == before


def test_doors_see_the_device_of_a_log_joint(monkeypatch):
    joint = LogJoint.from_batched(lambda z: -z.square().sum(-1), dim=2, device="meta")
    kernel, before = KernelLangevin(normal, num_particles=200), counts()
    kernel.log_joint = joint

    def seen(*args, **kwargs):
        raise LookupError(counts() == before)

    monkeypatch.setattr("pyro_sb.infer.population.build.find_optima", seen)
    monkeypatch.setattr("pyro_sb.diagnostics.modes.mode_audit.populate", seen)
    monkeypatch.setattr(kernel, "_prepare", seen)
    doors = (
        lambda: populate(joint),
        lambda: mode_audit(target=joint),
        lambda: kernel.initial_params,
        lambda: kernel.sample_block({}, 1),
    )
    for door in doors:
        with pytest.raises(LookupError, match="True"):
            door()


def test_an_interrupt_at_any_line_of_the_opening_leaves_no_run_open(monkeypatch):
    before, left = counts(), 0

    def tracer(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name not in ("open", "_find", "set"):
            return None
        locking = "self._lock" in linecache.getline(module.__file__, frame.f_lineno)  # the interpreter guards its end
        if event == "line" and not locking:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer

    for lines in range(1, 200):
        left = lines
        monkeypatch.setattr(module.COUNTS, "_num_modules", 0)
        sys.settrace(tracer)
        try:
            with chosen_threads():
                sys.settrace(None)
                assert lines > 20
                break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert counts() == before
        assert not Pace().start()
    assert counts() == before


def test_a_call_left_open_ends_with_its_run():
    kept, pace = Pace().each(range(3)), Pace()
    with chosen_threads():
        with chosen_threads():
            next(kept)
        assert pace.start()
        kept.close()  # ends no call of others
        pace.stop()
        with pace.call(), chosen_threads():
            assert not Pace().start()  # the call outside goes on
        assert pace.start()
        pace.stop()


def test_a_solve_that_fails_leaves_no_call_open(monkeypatch):
    pace = Pace()

    def failing(*args, callback, **kwargs):
        callback(1, 0.5)
        raise OSError("no memory")

    monkeypatch.setattr("pyro_sb.bridges.langevin.setup.symmetric_sinkhorn", failing)
    monkeypatch.setattr("pyro_sb.bridges.langevin.bridge.chosen_threads", lambda *values: nullcontext())
    with chosen_threads():
        with pytest.raises(OSError, match="no memory"):
            KernelLangevinBridge(2).fit(torch.randn(300, 2), progress=False)
        assert pace.start()
        pace.stop()


def test_each_python_thread_has_its_own_bound():
    before, found = counts(), {}

    def other():
        torch.set_num_threads(1)
        with chosen_threads():
            found["timed"] = Pace().start()
        found["after"] = torch.get_num_threads()

    second, pace = threading.Thread(target=other), Pace()
    with chosen_threads():
        second.start()
        second.join()
        assert pace.start()
        pace.stop()
    assert found == {"timed": False, "after": 1}
    assert counts() == before


def test_the_last_run_puts_back_the_number_of_threads_to_come():
    inside, leave, found = threading.Event(), threading.Event(), []

    def other():
        with chosen_threads():  # finds one: that of the run in the first thread
            inside.set()
            leave.wait(10)

    second = threading.Thread(target=other)
    with chosen_threads():
        second.start()
        inside.wait(10)
    leave.set()
    second.join()
    third = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    third.start()
    third.join()
    assert found == [2]


# ---- doors ----


class Failing(dist.Normal):
    """A law that fails at its third draw."""

    def __init__(self):
        super().__init__(torch.zeros(2), 1.0)
        self.left = 2

    def sample(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise OSError("no more draws")
        return super().sample(*args, **kwargs)


BRIDGES = {
    "LightSB": (lambda: LightSB(2, num_components=3), {"num_updates": 30}),
    "LightSB moments": (lambda: LightSB(2, num_components=3), {"num_updates": 12, "solver": "moments"}),
    "LightSBM": (lambda: LightSBM(2, num_components=3), {"num_updates": 30}),
    "LightSBBM": (lambda: LightSBBM(2, num_components=3), {"num_updates": 30}),
    "LightSBBM moments": (lambda: LightSBBM(2, num_components=3), {"num_updates": 12, "solver": "moments"}),
    "LightSBBM alternating": (lambda: LightSBBM(2, num_components=3), {"num_updates": 100, "solver": "alternating"}),
    "VSDM": (lambda: VSDM(2), {"num_updates": 30}),
    "SmoothedBridge": (lambda: SmoothedBridge(2), {"num_updates": 30}),
    "DSB": (lambda: DSB(2), {"num_iterations": 1, "num_updates": 30, "num_pairs": 512}),
    "KernelLangevinBridge": (lambda: KernelLangevinBridge(2), {}),
    "LatentBridge": (
        lambda: LatentBridge(LightSB(1, num_components=2), AutoencoderCodec(1)),
        {"num_updates": 30, "codec_options": {"num_updates": 30}},
    ),
    "TailMatched": (lambda: TailMatched(LightSB(2, num_components=3)), {"num_updates": 30}),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # short fits do not converge
@pytest.mark.parametrize("name", BRIDGES)
def test_a_fit_puts_threads_back_and_says_what_it_chose(name):
    make, options = BRIDGES[name]
    before, bridge = counts(), make()
    history = bridge.fit(torch.randn(300, 2), progress=False, **options)
    assert counts() == before
    assert " of 2 (" in history.threads or "too few" in history.threads
    assert history.threads in repr(history)
    with pytest.raises(OSError, match="no more draws"):
        law = dist.Independent(Failing(), 1)
        law.base_dist.left = 0 if name in ("KernelLangevinBridge", "LatentBridge") else 2
        make().fit(law, progress=False, **options)
    assert counts() == before


def normal(y):
    """A model of a mean."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 3.0))
    with pyro.plate("rows", y.shape[-1]):
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1) if mu.dim() else mu, 1.0), obs=y)


def open_normal():
    """The same with its data left open."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, 0.5))


DATA = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)


def chains(kernel):
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=8, num_chains=8, disable_progbar=True)
    mcmc.run(DATA)
    return mcmc


def amortised():
    amortized = AmortizedPosterior(open_normal, bridge="light")
    amortized.fit(num_simulations=300, num_updates=60, progress=False)
    return amortized


RUNS = {
    "KernelLangevin": lambda: chains(KernelLangevin(normal, num_particles=200)),
    "BridgeMH": lambda: chains(BridgeMH(normal, num_particles=200)),
    "pyro's MCMC": lambda: pyro.infer.MCMC(
        KernelLangevin(normal, num_particles=200), num_samples=5, warmup_steps=2, disable_progbar=True
    ).run(DATA),
    "populate": lambda: populate(log_joint(normal, args=(DATA,)), 200),
    "mode_audit": lambda: mode_audit(log_joint(normal, args=(DATA,)), num_particles=200),
    "amortised importance": lambda: amortised().condition(DATA.float()).importance(200),
    "amortised mcmc": lambda: amortised().condition(DATA.float()).mcmc(10, 8, 5, 200),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_puts_threads_back(name, monkeypatch):
    before = counts()
    result = RUNS[name]()
    assert counts() == before
    if name in ("KernelLangevin", "BridgeMH"):  # they say what they chose
        said = result.kernel.describe().splitlines()[-1]
        assert said.startswith("threads: ") and " of 2 (" in said
    left, density = 6 if "importance" in name else 25, module.Pace.start  # past what is tried and done without

    def failing(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError("interrupted in a call")
        return density(self, *args, **kwargs)

    monkeypatch.setattr(module.Pace, "start", failing)
    with pytest.raises(OSError, match="interrupted in a call"):
        RUNS[name]()
    assert counts() == before


def test_the_random_stream_is_the_same_with_any_number_of_threads():
    found = []
    for num in (1, 2):
        torch.set_num_threads(num)
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            bridge = LightSB(2, num_components=3)
            bridge.fit(torch.randn(300, 2), num_updates=50, progress=False)
        mcmc = chains(KernelLangevin(normal, num_particles=200))
        found.append((torch.get_rng_state(), bridge.parameters_of.locs.detach(), mcmc.get_samples()["mu"]))
    for one, two in zip(*found, strict=True):  # tensors this short are never split
        assert torch.equal(one, two)


# ---- what it costs ----

COST = """
import json, sys, time, warnings
import pyro, pyro.distributions as dist, torch
from pyro_sb import MCMC, KernelLangevin
torch.set_num_threads(int(sys.argv[1]))
warnings.simplefilter("ignore")
pyro.set_rng_seed(0)
X = torch.randn(100, 6, dtype=torch.float64)
y = X @ torch.linspace(-1, 1, 6, dtype=torch.float64) + 0.5 * torch.randn(100, dtype=torch.float64)
def model(X, y):
    b = pyro.sample("b", dist.Normal(X.new_zeros(6), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(X.new_ones(())))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal((X @ b[..., None])[..., 0], s[..., None] if s.dim() else s), obs=y)
begun, cpu = time.perf_counter(), time.process_time()
MCMC(KernelLangevin(model), 500, num_chains=64, disable_progbar=True).run(X, y)
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - begun}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_threads_cost_no_more_cpu_than_one():
    root, seconds = Path(__file__).parents[1], {1: [], 2: []}
    for _ in range(3):
        for num, found in seconds.items():
            done = subprocess.run(
                [sys.executable, "-c", COST, str(num)], cwd=root, capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1])["cpu"])
    assert median(seconds[2]) <= 1.3 * median(seconds[1]), seconds


def test_one_stalled_call_ends_the_choice_of_many():
    trial = warm_trial()
    for num in (1, 2, 1, 2, 1, 2):
        assert trial.next(2) == num
        trial.note(num, 2, 1e-2 if num == 1 else 5e-3, 1)
    trial.note(trial.next(2), 2, 1.9e-2, 1)
    assert trial.next(2) == 2  # slow, and not a stall
    trial.note(2, 2, 2.1e-2, 1)
    assert trial.next(2) == 1
