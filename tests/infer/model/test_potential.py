import copy
import logging
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_sb.infer.model.joint import Known, Oracle
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.model.routes import Size
from tests.infer.models import CASES, joint_of, regression_left, regression_right
from tests.infer.zoo.check import pyros
from tests.infer.zoo.registry import zoo

IDS = list(CASES)


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


# ---- the log joint is Pyro's ----


@pytest.mark.parametrize("name", IDS)
def test_value_and_gradient_are_pyros_for_every_batch_size(name):
    joint = joint_of(name)
    assert joint.route == CASES[name].route
    z = joint.start(8)
    with pyro.validation_enabled(False):
        value, grad = pyros(zoo()[name], joint, z)
    for size in (1, 2, 3, 5, 7, 8):  # 2, 3, 5, 7 and 8 are also sizes of data and sites
        found, slope = joint.value_and_grad(z[:size])
        torch.testing.assert_close(found, value[:size], rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(slope, grad[:size], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(joint.log_prob(z[:size]), value[:size], rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("name", IDS)
def test_packing_and_constraining_invert_each_other(name):
    joint = joint_of(name)
    z = joint.start(6).reshape(2, 3, -1)
    torch.testing.assert_close(joint.pack(joint.unpack(z)), z)
    sites = joint.constrain(z)
    assert set(sites) == set(joint.site_shapes)
    back = joint.pack({key: joint.transforms[key](x) for key, x in sites.items()})
    torch.testing.assert_close(back, z, rtol=1e-8, atol=1e-8)


def test_a_flat_prior_alone_has_a_constant_log_joint():
    joint = log_joint(lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (2,), ())))
    value, grad = joint.value_and_grad(torch.randn(3, 2))
    assert value.tolist() == [0, 0, 0] and not grad.any()


def test_the_jacobian_makes_a_density_on_the_line():  # the integral of p(x(z)) |dx/dz| over z is 1
    joint = log_joint(lambda: pyro.sample("x", dist.Gamma(2.0, 3.0)))
    z = torch.linspace(-20, 6, 4001)
    assert abs(torch.trapezoid(joint.log_prob(z[:, None]).exp(), z) - 1) < 1e-8


# ---- batch sizes that coincide with data sizes ----


def centred(y):  # a scalar of shape (C,) under an undeclared batch of N: right for C = 1 alone, silent for C = N
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("likelihood", -((y - mu.reshape(-1)) ** 2).sum(-1) / 2)


def test_a_model_that_broadcasts_in_silence_is_not_trusted():
    y = torch.randn(9)
    joint = log_joint(centred, args=(y,))
    assert joint.route == "vmap"
    z = joint.start(9)
    expected = -((y - z) ** 2).sum(-1) / 2 - z[:, 0] ** 2 / 2 - torch.tensor(2 * torch.pi).log() / 2
    torch.testing.assert_close(joint.log_prob(z), expected)


def sorted_by_size(y):  # right at small batches, wrong at 11 chains: what the check of a new batch size is for
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    shift = mu.flip(0) if mu.shape[:1] == (11,) else mu
    pyro.sample("y", dist.Normal(shift, 1.0), obs=y)


@pytest.mark.parametrize("equal_rows", [False, True])
def test_every_new_batch_size_is_checked_against_the_single_chain(equal_rows, caplog):
    joint = log_joint(sorted_by_size, args=(torch.tensor(0.3),))
    assert joint.route == "plate"
    z = torch.ones(11, 1) if equal_rows else torch.randn(11, 1)
    with caplog.at_level(logging.INFO):
        value = joint.log_prob(z)
    assert joint.route == "vmap" and "for 11 chains" in caplog.text
    mu = z[:, 0]
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(value, expected)


def test_the_regression_that_needs_vmap_survives_as_many_chains_as_columns_and_rows():
    x, y = torch.randn(3, 3), torch.randn(3)
    right, left = log_joint(regression_right, args=(x, y)), log_joint(regression_left, args=(x, y))
    assert (right.route, left.route) == ("vmap", "plate")
    z = torch.randn(3, 3)
    torch.testing.assert_close(right.log_prob(z), left.log_prob(z))


class Total:
    """The sum of a row."""

    name = "total"

    def __call__(self, z):
        return z.sum()

    def size(self, z):
        return Size(float(z.abs().sum()), torch.finfo(z.dtype).eps)


class Batch:
    """A route to it."""

    name = "plate"

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, z):
        return self.fn(z)


@pytest.mark.parametrize(
    ("fn", "objection"),
    [
        (lambda z: z.sum(-1), None),
        (lambda z: z.sum(-1).detach(), "wrong gradients for 1 chains"),
        (lambda z: z.sum(-1) + 1e-3, "wrong values for 1 chains"),
        (lambda z: z.sum(-1) + 1e-5 * (z.mean() - z.mean(-1)), "values of a row move with the other rows for 2 chains"),
        (lambda z: z.sum(-1) + 1e-7 * z.detach().mean(), "values of a row move with the other rows for 2 chains"),
        (lambda z: z.sum(0), r"values of shape (2,) for 1 chains"),
    ],
)
def test_what_speaks_against_a_route(fn, objection):
    oracle = Oracle(Total(), Known.at(Total(), torch.randn(6, 2)))
    try:
        found = oracle.objection(Batch(fn))
    except ValueError as error:
        found = str(error)
    assert found is None if objection is None else objection in found


def test_the_loop_warns_with_its_reasons():
    case = CASES["control flow"]
    with pytest.warns(RuntimeWarning, match="one by one.*plate: .*vmap: .*torch.where"):
        assert log_joint(case.model, args=case.args).route == "loop"


# ---- what cannot be evaluated ----


def test_values_that_are_not_finite_become_minus_infinity_without_a_gradient():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("log", torch.log(x))

    joint = log_joint(model)
    value, grad = joint.value_and_grad(torch.tensor([[1.0], [-1.0], [0.0]]))
    assert value[1] == value[2] == -torch.inf and torch.isfinite(value[0])
    assert grad[:, 0].tolist() == [0.0, 0.0, 0.0]  # 1 / x - x at 1, and none elsewhere
    assert joint.log_prob(torch.tensor([[-1.0]])) == -torch.inf


def test_a_row_that_cannot_be_factored_does_not_spoil_its_neighbours():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = torch.linalg.cholesky(torch.diag_embed(1 + x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale), obs=torch.ones(2))

    joint = log_joint(model)
    z = torch.tensor([[0.5, 0.1], [-2.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, -1.5]])
    value, grad = joint.value_and_grad(z)
    assert torch.isfinite(value).tolist() == [True, False, True, True, False]
    torch.testing.assert_close(value[[0, 2, 3]], joint.log_prob(z[[0, 2, 3]]))
    assert torch.isfinite(grad).all() and grad[0].abs().sum() > 0


def test_no_chains_is_no_work():
    joint = joint_of("eight schools")
    assert joint.log_prob(torch.zeros(0, 10)).shape == (0,)
    assert joint.value_and_grad(torch.zeros(0, 10))[1].shape == (0, 10)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(chains, 10\), got \(3, 9\)"):
        joint_of("eight schools").log_prob(torch.zeros(3, 9))


# ---- counting ----


def test_rows_are_counted():
    joint = joint_of("eight schools")
    assert (joint.evaluations.density, joint.evaluations.gradient) == (0, 0)
    z = torch.zeros(6, 10)
    joint.log_prob(z)
    joint.log_prob(z[:1])
    joint.value_and_grad(z[:4])
    assert (joint.evaluations.density, joint.evaluations.gradient) == (7, 4)


# ---- dtypes ----


@pytest.mark.parametrize("default, model_dtype", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_the_models_dtype_is_its_own_and_the_answer_has_the_callers(default, model_dtype):
    torch.set_default_dtype(default)
    x, y = torch.randn(7, 3, dtype=model_dtype), torch.randn(7, dtype=model_dtype)

    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=model_dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ x.T, 1.0).to_event(1), obs=y)

    joint = log_joint(model)
    assert joint.dtype == model_dtype and joint.route == "plate" and joint.start(2).dtype == model_dtype
    for dtype in (torch.float32, torch.float64):
        value, grad = joint.value_and_grad(torch.ones(2, 3, dtype=dtype))
        assert value.dtype == grad.dtype == dtype
        assert joint.log_prob(torch.ones(2, 3, dtype=dtype)).dtype == dtype


def test_sites_of_two_dtypes_keep_their_own():
    def model(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        with pyro.plate("data", 7):
            pyro.sample("y", dist.Normal((beta @ x.T).double(), scale), obs=torch.ones(7, dtype=torch.float64))

    joint = log_joint(model, args=(torch.ones(7, 3, dtype=torch.float32),))
    assert joint.dtype == torch.float64
    assert {k: v.dtype for k, v in joint.constrain(joint.start(2)).items()} == {
        "beta": torch.float32,
        "scale": torch.float64,
    }


def test_improper_sites_take_their_dtype_from_the_data():
    torch.set_default_dtype(torch.float32)

    def model(x, y):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (3,)))
        pyro.sample("y", dist.Normal(beta @ x.T, 1.0).to_event(1), obs=y)

    assert log_joint(model, args=(torch.randn(7, 3).double(), torch.randn(7).double())).dtype == torch.float64


# ---- carrying it around ----


@pytest.mark.parametrize("name", ["eight schools", "mixture, Vindex", "mixture, plain index", "improper, ordered"])
def test_it_can_be_pickled_and_copied_before_and_after_use(name):
    joint = joint_of(name)
    before, z = pickle.dumps(joint), joint.start(3)
    value = joint.log_prob(z)
    for twin in (pickle.loads(before), pickle.loads(pickle.dumps(joint)), copy.deepcopy(joint)):
        torch.testing.assert_close(twin.log_prob(z), value)
        assert twin.evaluations is not joint.evaluations


def test_from_batched():
    joint = LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, dim=2)
    assert (joint.route, joint.dtype, dict(joint.site_shapes)) == ("batched", torch.float64, {"z": (2,)})
    assert joint.start(3).shape == (3, 2) and joint.constrain(torch.zeros(4, 2))["z"].shape == (4, 2)


def test_many_rows_over_much_data_are_evaluated_in_parts():
    data, sizes = torch.randn(200_000, dtype=torch.float64), []

    def log_density(z):
        sizes.append(len(z))
        return -(z[:, :1] - data).square().sum(-1)

    joint = LogJoint.from_batched(log_density, 1)
    z = torch.randn(300, 1, dtype=torch.float64)
    assert joint.run_size > 10_000
    sizes.clear()
    exact = -(len(data) * (z[:, 0] - data.mean()).square() + (data - data.mean()).square().sum())
    torch.testing.assert_close(joint.log_prob(z), exact)
    value, grad = joint.value_and_grad(z)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad[:, 0], -2 * len(data) * (z[:, 0] - data.mean()))
    assert max(sizes) * joint.run_size < 2**24 and joint.evaluations.density == 300
