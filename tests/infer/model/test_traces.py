"""A traced log joint is the model: the same numbers everywhere, run eagerly where its operations follow its values."""

import copy
import logging
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.log_joint import log_joint
from pyro_sb.infer.model.sight import Sight
from pyro_sb.infer.model.tape import RefusalError, record
from pyro_sb.infer.model.traces import PATIENCE, Traces
from pyro_sb.threads import chosen_threads
from tests.infer.models import CASES, joint_of

F64 = {"dtype": torch.float64}
ONE = torch.tensor(1.0, **F64)
Y = torch.tensor([0.3, -1.0, 2.0], **F64)


def often(joint, z, num=PATIENCE + 4):
    """A batch size that comes often."""
    for _ in range(num):
        joint.value_and_grad(z), joint.log_prob(z)
    return joint._density.traces.describe(joint.route)


def eager(joint, monkeypatch):
    """The figures of the model's own code from here on."""
    monkeypatch.setattr(Traces, "_tape", lambda *_: None)
    return joint


def assert_same(joint, z, monkeypatch):
    traced = joint.log_prob(z), *joint.value_and_grad(z)
    with monkeypatch.context() as patch:
        own = eager(joint, patch).log_prob(z), *joint.value_and_grad(z)
    for a, b in zip(traced, own):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_traced_is_eager_at_every_point_bit_for_bit(name, monkeypatch):
    joint = joint_of(name)
    start = joint.start(7)
    said = often(joint, start)
    assert said == ("eager (no batch size came often)" if joint.route == "loop" else "traced for 2 batch sizes")
    for scale in (0.0, 0.3, 3.0, 1e3):  # far out there are infinities and NaN
        assert_same(joint, start + scale * torch.randn(7, joint.dim), monkeypatch)
    assert_same(joint, start[[0] * 7], monkeypatch)


def bounded(y):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Uniform(mu - 3, mu + 3).to_event(1) if mu.dim() else dist.Uniform(mu - 3, mu + 3), obs=y)


def test_outside_the_support_and_where_no_matrix_can_be_factored_it_is_eager(monkeypatch):
    def covariance(y):
        rho = pyro.sample("rho", dist.Normal(torch.zeros(2, **F64), 2.0).to_event(1))
        a, b = rho[..., 0], rho[..., 1]
        matrix = torch.stack([torch.stack([a + 2, b], -1), torch.stack([b, 2 - a], -1)], -2)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, **F64), matrix), obs=y)

    joint = log_joint(covariance, args=(Y[:2],))
    z = 0.3 * torch.randn(6, 2, **F64)
    assert "traced for 2" in often(joint, z)
    z[2], z[4] = torch.tensor([0.0, 9.0]), torch.tensor([5.0, 0.0])  # not positive definite
    value, grad = joint.value_and_grad(z)
    assert torch.isneginf(value).tolist() == [False, False, True, False, True, False] and not grad[2].any()
    assert_same(joint, z, monkeypatch)

    def half_line(y):
        mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
        pyro.factor("edge", torch.where(mu > 0.5, -torch.inf, mu.log1p()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    joint = log_joint(half_line, args=(ONE,))
    z = torch.tensor([[0.1], [0.2], [-0.4]], **F64)
    assert "traced for 2" in often(joint, z)
    z = torch.tensor([[0.1], [0.7], [-2.0]], **F64)
    assert torch.isneginf(joint.log_prob(z)).tolist() == [False, True, True]
    assert_same(joint, z, monkeypatch)


def test_rows_are_counted_as_they_are_asked_for():
    joint = joint_of("eight schools")
    often(joint, joint.start(5), 40)
    before = copy.copy(joint.evaluations)
    joint.value_and_grad(torch.zeros(5, joint.dim)), joint.log_prob(torch.zeros(5, joint.dim))
    assert (joint.evaluations.since(before).density, joint.evaluations.since(before).gradient) == (5, 5)


# ---- graphs that change with values ----


def any_branch(y):
    mu = pyro.sample("mu", dist.Normal(0 * ONE, 10.0))
    pyro.factor("far", -mu.abs() if (mu > 20).any() else torch.zeros_like(mu))


def iterates(y):
    mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
    x = mu
    while float((x - torch.cos(x)).detach().abs().max()) > 1e-12:  # to the fixed point, the same from everywhere
        x = x - (x - torch.cos(x)) / (1 + torch.sin(x))
    pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y[0])


def selects(y):
    mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
    pyro.factor("some", mu - mu[mu > 0].sum() * 0 if mu.dim() else mu)


def by_numpy(y):
    mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
    pyro.factor("high", mu * float(mu.detach().numpy().max() > 30))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (any_branch, "looks at values"),
        (iterates, "looks at values"),
        (selects, "shapes follow values"),
        (by_numpy, "looks at values"),
    ],
)
def test_a_model_whose_operations_follow_its_values_is_run_eagerly(model, why, caplog, monkeypatch):
    monkeypatch.setattr("pyro_sb.infer.model.joint.CheckedDensity._admission", lambda *_: None)
    monkeypatch.setattr("pyro_sb.infer.model.joint.CheckedDensity._objection", lambda *_: None)
    joint, z = log_joint(model, args=(Y,)), 0.1 * torch.randn(4, 1, **F64)
    with caplog.at_level(logging.INFO, "pyro_sb"):
        said = often(joint, z)
    assert joint.route == "plate" and said.startswith("eager") and why in said
    assert why in caplog.text
    assert_same(joint, z + 30, monkeypatch)


def test_random_numbers_and_writes_into_the_models_own_tensors_are_refused():
    kept, z = torch.zeros(3), torch.ones(3)
    for function, why in [
        (lambda z: (z + torch.rand(3),), "random"),
        (lambda z: (kept.add_(z),), "writes into a tensor"),
        (lambda z: (z.mul_(2),), "writes into a tensor"),
        (lambda z: (z[z > 0],), "shapes follow values"),
        (lambda z: (z * z.tolist()[0],), "looks at values"),
        (lambda z: (z * z.sum().item(),), "looks at values"),
        (lambda z: (z if torch.equal(z, z) else -z,), "looks at values"),
    ]:
        with pytest.raises(RefusalError, match=why):
            record(function, z)


def test_a_function_may_write_into_what_it_made(monkeypatch):
    def function(z):
        out, total = torch.zeros(4), torch.tensor([1.0])
        for i in range(4):
            out[i] = z[i].exp() * total[0]
            total += z[i]
        out[1:].mul_(2.0)
        ramp = torch.zeros(4)
        before = z + ramp
        return out, total, before, z + ramp.add_(1)

    for part, interpreted in ((1000, True), (3, True), (0, False)):  # steps that torch's interpreter is given at once
        monkeypatch.setattr("pyro_sb.infer.model.tape.PART", part)
        tape = record(function, torch.ones(4))
        for _ in range(3):
            z = torch.randn(4)
            assert all(map(torch.equal, tape(z), function(z)))
        assert tape.interpreted == interpreted


def test_what_does_not_depend_on_the_argument_is_computed_once_and_nothing_twice():
    data = torch.randn(50, 50)
    tape = record(lambda z: ((data @ data).logdet() + z.exp().sum() + z.exp().sum() + z.detach().sum(),), torch.ones(3))
    assert tape.num_steps == 6  # exp, two different sums, three additions


# ---- what a model looks at ----

SCALE = 1.0


class Model:
    def __init__(self):
        self.shift, self.parts = 0.0, [1.0, 2.0]

    def __call__(self, y):
        p = pyro.param("p", ONE.clone())
        mu = pyro.sample("mu", dist.Normal(self.shift * ONE, SCALE))
        pyro.factor("more", p.exp() * mu + self.parts[1] * mu.square() + y.exp().sum() * mu)


def global_scale(model, y):
    globals()["SCALE"] = 3.0


CHANGES = {
    "a parameter, in place": lambda model, y: pyro.param("p").data.add_(1.0) if False else _bump(pyro.param("p")),
    "a parameter, replaced": lambda model, y: pyro.get_param_store().__setitem__("p", 5 * ONE),
    "an attribute": lambda model, y: setattr(model, "shift", 2.0),
    "an entry of a list": lambda model, y: model.parts.__setitem__(1, 7.0),
    "data, in place": lambda model, y: y.add_(1.0),
    "a global": global_scale,
}


def _bump(p):
    with torch.no_grad():
        p.unconstrained().add_(1.0) if hasattr(p, "unconstrained") else p.add_(1.0)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_looks_at_may_change_between_calls(change, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    model, y, z = Model(), Y.clone(), torch.randn(5, 1, **F64)
    joint = log_joint(model, args=(y,))
    assert "traced for 2" in often(joint, z)
    before = joint.log_prob(z)
    CHANGES[change](model, y)
    after = joint.log_prob(z)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, log_joint(model, args=(y,)).log_prob(z))
    assert_same(joint, z, monkeypatch)
    assert "traced for 2" in often(joint, z, 5 * PATIENCE)
    assert_same(joint, z, monkeypatch)


def test_a_size_that_is_recorded_after_a_change_does_not_end_tracing():
    model, z = Model(), torch.randn(5, 1, **F64)
    joint = log_joint(model, args=(Y,))
    often(joint, z)
    for _ in range(PATIENCE + 2):
        model.shift = 3.0
        joint.log_prob(z[:3])
    assert joint.traced == "traced for 1 batch size"
    torch.testing.assert_close(joint.log_prob(z), log_joint(model, args=(Y,)).log_prob(z))


def test_a_model_that_counts_its_runs_is_not_traced():
    class Counting(Model):
        runs = 0

        def __call__(self, y):
            self.runs += 1
            super().__call__(y)

    joint = log_joint(Counting(), args=(Y,))
    assert "changes what it looks at" in often(joint, torch.randn(5, 1, **F64))


def test_a_change_that_cannot_be_seen_is_noticed_by_comparison():
    array = np.zeros(2)

    def model():
        mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
        pyro.factor("array", mu * torch.tensor(array).sum())

    joint, z = log_joint(model), torch.randn(5, 1, **F64)
    assert "traced for 2" in often(joint, z)
    array += 1.0
    with pytest.warns(RuntimeWarning, match="other figures than its own code") as caught:
        for _ in range(2 * PATIENCE):
            found = joint.value_and_grad(z)[0]
    assert len(caught) == 1
    torch.testing.assert_close(found, (dist.Normal(0 * ONE, 1.0).log_prob(z) + 2 * z)[:, 0])
    assert joint.recheck(z) is None


def test_chains_are_compared_where_they_stand(monkeypatch):
    joint, z = joint_of("eight schools"), None
    z = joint.start(5)
    often(joint, z)
    assert joint.recheck(z + 1) is None
    tape = joint._density.traces._tape(joint._density.routes["plate"], z, True)
    monkeypatch.setattr(type(tape), "attempt", lambda self, z: ((z.sum(-1), z), ()))
    assert joint.recheck(z + 1) == "wrong figures of its tape"
    assert joint._density.traces.describe("plate").startswith("eager")


def test_handlers_outside_are_obeyed():
    joint = joint_of("eight schools")
    z = joint.start(5)
    often(joint, z)
    plain = joint.log_prob(z)
    with poutine.scale(scale=2.0):
        doubled = joint.log_prob(z)
    assert not torch.allclose(plain, doubled) and torch.equal(plain, joint.log_prob(z))
    with poutine.block():  # as a run of MCMC does
        assert torch.equal(plain, joint.log_prob(z)) and joint._density.traces._tape(*joint_tape(joint, z))


def joint_tape(joint, z):
    return joint._density.routes[joint.route], z, True


def test_a_run_of_chains_is_traced():
    mcmc = MCMC(KernelLangevin(CASES["eight schools"].model), num_samples=100, num_chains=16, disable_progbar=True)
    mcmc.run(*CASES["eight schools"].args)
    assert mcmc.kernel.log_joint.traced.startswith("traced for") or mcmc.kernel._target.traced.startswith("traced for")


def test_a_sight_sees_closures_partials_methods_and_modules():
    inner = {"a": [1.0]}
    net = torch.nn.Linear(2, 1)

    def model():
        return inner["a"][0] + net.bias

    for change in (lambda: inner["a"].append(2.0), lambda: net.eval(), lambda: setattr(net, "bias", None)):
        sight = Sight(model)
        assert sight.same
        change()
        assert not sight.same
    assert not Sight([float(i) for i in range(10_000)]).complete


# ---- rows a call ----


def test_rows_over_much_data_are_evaluated_a_few_at_a_time_and_long_runs_over_little_many_at_a_time():
    sizes, data = [], torch.randn(30_000, **F64)

    def wide():
        mu = pyro.sample("mu", dist.Normal(0 * ONE, 1.0))
        sizes.append(mu.numel())
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data)

    joint, z = log_joint(wide), torch.randn(100, 1, **F64)
    assert joint.part_size <= 2**16 / 20_000 and "no batch size" in joint.traced
    sizes.clear()
    value, _ = joint.value_and_grad(z)
    assert 2 <= max(sizes) <= 3 and sum(sizes) >= 100
    exact = dist.Normal(0 * ONE, 1.0).log_prob(z)[:, 0] + dist.Normal(z, 1.0).log_prob(data).sum(-1)
    torch.testing.assert_close(value, exact)
    assert "changes what it looks at" in joint.traced  # it notes its sizes

    def long():
        x = pyro.sample("x", dist.Normal(0 * ONE, 1.0))
        for _ in range(400):
            x = x - 0.01 * x.sin()
        pyro.factor("end", -x.square())

    assert log_joint(long).part_size > 2_000


# ---- its surroundings ----


def test_copies_and_pickles_record_their_own():
    joint = joint_of("eight schools")
    z = joint.start(5)
    often(joint, z)
    for twin in (pickle.loads(pickle.dumps(joint)), copy.deepcopy(joint)):
        assert twin._density.traces.describe(twin.route) == "eager (no batch size came often)"
        assert torch.equal(twin.log_prob(z), joint.log_prob(z))


def test_threads_are_chosen_for_traced_and_eager_batches_apart(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    joint = joint_of("eight schools")
    with chosen_threads():
        often(joint, joint.start(5))
    kinds = {kind for kind, _ in joint._density.runner.pace._trials}
    assert {("plate", (True, False)), ("plate", (True, True))} <= kinds


def test_no_random_number_is_drawn_for_it():
    joint = joint_of("eight schools")
    z = joint.start(5)
    pyro.set_rng_seed(3)
    often(joint, z)
    drawn = torch.rand(3)
    pyro.set_rng_seed(3)
    assert torch.equal(torch.rand(3), drawn)


CODE = """
import sys, torch, pyro, pyro.distributions as dist
from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.log_joint import log_joint
joint = log_joint(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
for _ in range(40): joint.value_and_grad(torch.randn(4, 3))
print(joint.run_size > 0, joint._density.traces.describe(joint.route), "torch._dynamo" in sys.modules)
"""


def test_torchs_compiler_is_not_imported():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True traced for 1 batch size False"


def test_an_interrupt_leaves_it_as_it_was(monkeypatch):
    joint = joint_of("eight schools")
    z = joint.start(5)
    before = joint.log_prob(z)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pyro_sb.infer.model.traces.record", interrupted)
        often(joint, z)
    assert torch.equal(joint.log_prob(z), before)
    assert "traced for" in often(joint, z, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(joint.log_prob(z), before)
