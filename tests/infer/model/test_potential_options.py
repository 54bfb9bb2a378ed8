import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from torch.distributions.transforms import ExpTransform, SoftplusTransform

from pyro_sb.infer.model.log_joint import log_joint
from tests.infer.models import CASES, SIGMA, Y, eight_schools, f64, joint_of, narrow, quadratic


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


# ---- what the user may hand over ----


def test_init_strategy_decides_the_starts_and_serves_improper_sites():
    case = CASES["improper, ordered"]
    values = {"loc": torch.tensor(3.0), "scale": torch.tensor(2.0)}
    joint = log_joint(case.model, args=case.args, init_strategy=init_to_value(values=values))
    sites = joint.constrain(joint.start(4))
    assert sites["loc"].tolist() == [3.0] * 4 and sites["scale"].tolist() == pytest.approx([2.0] * 4)
    assert len(sites["cuts"].unique()) == 12  # fell back on a draw in unconstrained space
    assert log_joint(case.model, args=case.args, init_strategy=init_to_median).start(1).shape == (1, 5)


def test_transforms_of_the_user_are_used_and_completed():
    plain = log_joint(eight_schools, args=(Y, SIGMA))
    joint = log_joint(eight_schools, args=(Y, SIGMA), transforms={"tau": SoftplusTransform().inv})
    z = joint.start(3)
    tau = torch.nn.functional.softplus(joint.unpack(z)["tau"])
    torch.testing.assert_close(joint.constrain(z)["tau"], tau)
    same = plain.pack(joint.unpack(z) | {"tau": tau.log()})
    jacobian = torch.sigmoid(joint.unpack(z)["tau"]).log() - tau.log()  # of the two maps to tau
    torch.testing.assert_close(joint.log_prob(z) - plain.log_prob(same), jacobian)
    with pytest.raises(ValueError, match=r"got \['nu'\]; the model has \['mu', 'tau', 'z'\]"):
        log_joint(eight_schools, args=(Y, SIGMA), transforms={"nu": ExpTransform()})


def test_a_larger_max_plate_nesting_changes_nothing():
    joint, wider = joint_of("mixture, Vindex"), CASES["mixture, Vindex"]
    wider = log_joint(wider.model, args=wider.args, max_plate_nesting=3)
    z = joint.start(4)
    assert wider.route == "plate"
    torch.testing.assert_close(wider.log_prob(z), joint.log_prob(z))


def test_initial_params_help_where_no_start_is_finite():
    joint = log_joint(narrow, args=(torch.tensor(50.0),), initial_params={"mu": torch.tensor([50.01, 49.98])})
    assert torch.isfinite(joint.log_prob(torch.tensor([[50.05]])))
    log_joint(narrow, args=(torch.tensor(50.0),), initial_params={"mu": torch.tensor(50.01)})
    with pytest.raises(ValueError, match=r"sites \['mu'\], got \['nu'\]"):
        log_joint(narrow, args=(torch.tensor(50.0),), initial_params={"nu": torch.tensor(50.01)})


def test_prior_draws_are_the_priors():
    joint = joint_of("eight schools")
    sites = joint.constrain(joint.prior(4000))
    assert abs(sites["mu"].mean() / (5 / 4000**0.5)) < 4
    assert abs((sites["tau"] < 5).double().mean() - 0.5) < 4 * 0.5 / 4000**0.5  # the median of HalfCauchy(5) is 5
    assert len(sites["z"].unique()) == 8 * 4000


def test_prior_of_an_improper_site_is_refused():
    with pytest.raises(ValueError, match=r"improper sites \['cuts', 'loc', 'scale'\].*start\(\)"):
        joint_of("improper, ordered").prior(3)


# ---- potential_fn ----


def branching(params):
    return params["a"].sum() ** 2 if params["a"].sum() > 0 else params["a"].sum() ** 4


def test_potential_fn_is_batched():
    joint = log_joint(potential_fn=quadratic, initial_params={"b": torch.tensor(0.0), "a": torch.zeros(2)})
    assert (joint.route, joint.dim, joint.model, joint.transforms) == ("vmap", 3, None, {})
    value, grad = joint.value_and_grad(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
    assert value.tolist() == [-6.5, 0.0] and grad.tolist() == [[-1.0, -2.0, -4.0], [0.0, 0.0, 0.0]]
    assert joint.constrain(torch.ones(4, 3))["a"].shape == (4, 2)
    assert joint.discrete(torch.ones(4, 3)) == joint.deterministic(torch.ones(4, 3)) == {}
    with pytest.raises(ValueError, match="potential_fn"):
        joint.prior(2)


def test_potential_fn_with_chains_in_its_initial_params():
    start = {"b": torch.zeros(5), "a": torch.zeros(5, 2)}
    assert log_joint(potential_fn=quadratic, initial_params=start, batched_initial=True).dim == 3


def test_potential_fn_that_cannot_be_batched_goes_to_the_loop():
    with pytest.warns(RuntimeWarning, match="one by one"):
        joint = log_joint(potential_fn=branching, initial_params={"a": torch.zeros(2)})
    torch.testing.assert_close(joint.log_prob(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])), f64(-4.0, -16.0))


def test_potential_fn_takes_the_users_transforms_for_the_results():
    setup = {"initial_params": {"a": torch.zeros(2), "b": torch.tensor(0.0)}, "transforms": {"a": ExpTransform().inv}}
    joint = log_joint(potential_fn=quadratic, **setup)
    torch.testing.assert_close(joint.constrain(torch.zeros(1, 3))["a"], torch.ones(1, 2))


# ---- deterministic sites ----


def shapes_of_all_kinds():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("shifted", theta + mu)
    pyro.deterministic("scalar", mu * 2)
    pyro.deterministic("stacked", torch.stack([mu, -mu]))  # a chain dimension in the middle under a plate
    pyro.deterministic("total", theta.sum())
    pyro.deterministic("constant", torch.arange(4.0))


@pytest.mark.filterwarnings("ignore:.*batch_shape.*")
def test_deterministic_sites_have_their_own_shape_and_their_chains_value():
    joint = log_joint(shapes_of_all_kinds)
    z = joint.start(6).reshape(2, 3, 4)
    found, mu, theta = joint.deterministic(z), z[..., 0], z[..., 1:]
    assert set(found) == {"shifted", "scalar", "stacked", "total", "constant"}
    torch.testing.assert_close(found["shifted"], theta + mu[..., None])
    torch.testing.assert_close(found["scalar"], 2 * mu)
    torch.testing.assert_close(found["stacked"], torch.stack([mu, -mu], -1))
    torch.testing.assert_close(found["total"], theta.sum(-1))
    torch.testing.assert_close(found["constant"], torch.arange(4.0).expand(2, 3, 4))


def test_reparametrised_sites_come_back_under_their_name():
    joint = joint_of("reparam")
    z = joint.start(5)
    sites = joint.constrain(z)
    expected = sites["mu"][:, None] + sites["tau"][:, None] * sites["theta_decentered"]
    torch.testing.assert_close(joint.deterministic(z)["theta"], expected)


def test_many_draws_go_through_in_chunks(monkeypatch):
    joint = joint_of("eight schools")
    z = joint.start(50)
    whole = joint.deterministic(z)["theta"], joint.constrain(z)["tau"]
    monkeypatch.setattr("pyro_sb.infer.model.runs.MAX_NUMBERS", 200)
    torch.testing.assert_close((joint.deterministic(z)["theta"], joint.constrain(z)["tau"]), whole)
