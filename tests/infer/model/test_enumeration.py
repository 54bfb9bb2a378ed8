"""Discrete latents: the log joint sums over every configuration, and draws follow the exact posterior."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sb.infer.model.enumeration import discrete_by_loop, discrete_in_turn
from pyro_sb.infer.model.log_joint import log_joint
from tests.infer.models import SMALL, control_flow, f64, grouped, hmm, joint_of, mixture_plain, mixture_vindex


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def configurations(joint, model, args, z):
    """Log joint of the continuous latents with every configuration of the discrete ones, by brute force."""
    latents = joint.constrain(z)
    names = list(joint.prototype.enumerated)
    sizes = [joint.prototype.enumerated[name].numel() for name in names]
    table = {}
    for bits in itertools.product((0, 1), repeat=sum(sizes)):
        values = dict(zip(names, torch.tensor(bits).split(sizes)))
        values = {name: value.reshape(joint.prototype.enumerated[name]) for name, value in values.items()}
        trace = poutine.trace(poutine.condition(model, latents | values)).get_trace(*args)
        table[bits] = trace.log_prob_sum()
    return torch.tensor(list(table)), torch.stack(list(table.values()))


def log_jacobian(joint, z):
    values, latents = joint.unpack(z), joint.constrain(z)
    return -sum(t.log_abs_det_jacobian(latents[k], values[k]).sum() for k, t in joint.transforms.items())


CASES = {
    "mixture by plate": (mixture_vindex, (SMALL,)),
    "mixture by vmap": (mixture_plain, (SMALL,)),
    "groups by plate": (grouped, (SMALL, True)),
    "groups by vmap": (grouped, (SMALL, False)),
    "hmm by plate": (hmm, (SMALL, True)),
    "hmm by vmap": (hmm, (SMALL, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_log_joint_sums_over_every_configuration(name):
    model, args = CASES[name]
    joint = log_joint(model, args=args)
    assert joint.route in name
    for z in joint.start(2):
        _, table = configurations(joint, model, args, z)
        torch.testing.assert_close(joint.log_prob(z[None])[0], table.logsumexp(0) + log_jacobian(joint, z))


def flat(draws):
    return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in draws], -1)


@pytest.mark.parametrize("name", CASES)
def test_discrete_draws_follow_the_exact_posterior(name):
    model, args = CASES[name]
    joint, num = log_joint(model, args=args), 4000
    z = joint.start(1)
    bits, table = configurations(joint, model, args, z[0])
    probability = table.softmax(0)
    draws = flat(joint.discrete(z.expand(num, -1)))
    codes, counts = (draws @ (2 ** torch.arange(draws.shape[1]))).unique(return_counts=True)
    share = torch.zeros(2 ** draws.shape[1]).index_put((codes,), counts / num)
    order = bits @ (2 ** torch.arange(bits.shape[1]))
    z_scores = (share[order] - probability) / (probability * (1 - probability) / num).sqrt()
    seen = probability > 1e-2  # enough expected counts for a normal score
    assert z_scores[seen].abs().max() < 4.5
    marginal = (draws.double().mean(0) - probability @ bits.double()) * num**0.5
    assert (marginal / (probability @ bits.double() * (1 - probability @ bits.double())).sqrt()).abs().max() < 4.5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_chains", [1, 2, 5])
def test_the_most_probable_configuration_of_each_chain(name, num_chains):
    model, args = CASES[name]
    joint = log_joint(model, args=args)
    z = joint.start(num_chains)
    best = flat(joint.discrete(z, temperature=0))
    for row, found in zip(z, best, strict=True):
        bits, table = configurations(joint, model, args, row)
        assert found.tolist() == bits[table.argmax()].tolist()
    for way in (discrete_by_loop, discrete_in_turn):
        with torch.no_grad(), pyro.validation_enabled(False):
            assert flat(way(joint.prototype, joint.constrain(z), num_chains, 0)).tolist() == best.tolist()


def scaled_and_masked(x, plain):
    loc = pyro.sample("loc", dist.Normal(f64(0.0, 0.0), 3.0).to_event(1))
    with pyro.plate("data", len(x)), poutine.scale(scale=4.0), poutine.mask(mask=x > 0):
        which = pyro.sample("which", dist.Bernoulli(0.3))
        centre = loc[which.long()] if plain else torch.where(which > 0, loc[..., 1], loc[..., 0])
        pyro.sample("x", dist.Normal(centre, 1.0), obs=x)


@pytest.mark.parametrize("plain, route", [(False, "plate"), (True, "vmap")])
def test_draws_heed_masks_but_not_scales(plain, route):  # as Pyro's infer_discrete, whatever the route
    joint, num = log_joint(scaled_and_masked, args=(SMALL, plain)), 4000
    assert joint.route == route
    z = f64(0.0, 1.0)
    odds = torch.tensor(0.3 / 0.7).log() + (
        dist.Normal(z[1], 1.0).log_prob(SMALL) - dist.Normal(z[0], 1.0).log_prob(SMALL)
    )
    share, p = joint.discrete(z.expand(num, -1))["which"].mean(0), odds.sigmoid()
    visible = SMALL > 0
    assert ((share - p)[visible].abs() < 4.5 * (p * (1 - p) / num).sqrt()[visible]).all()


@pytest.mark.parametrize("name", ["mixture, Vindex", "mixture, plain index"])
def test_deterministic_sites_belong_to_the_discrete_draws_given(name):
    joint = joint_of(name)
    z = joint.start(6).reshape(2, 3, -1)
    which = joint.discrete(z)
    assert which["which"].shape == (2, 3, 5) and not which["which"].is_floating_point()
    centre = joint.deterministic(z, which)["centre"]
    torch.testing.assert_close(centre, joint.constrain(z)["loc"].gather(-1, which["which"]))
    assert joint.deterministic(z)["centre"].shape == (2, 3, 5)


def test_discrete_draws_go_through_in_chunks(monkeypatch):
    joint = joint_of("mixture, Vindex")
    z = joint.start(20)
    whole = joint.discrete(z, temperature=0)["which"]
    monkeypatch.setattr("pyro_sb.infer.model.runs.MAX_NUMBERS", 2000)
    assert torch.equal(joint.discrete(z, temperature=0)["which"], whole)


def branch_and_choose(y):
    control_flow(y)
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    pyro.sample("coin", dist.Bernoulli(p))


def test_the_loop_draws_discrete_sites_too():
    with pytest.warns(RuntimeWarning, match="one by one"):
        joint = log_joint(branch_and_choose, args=(SMALL,))
    z = joint.start(1).expand(300, -1)
    share, p = joint.discrete(z)["coin"].mean(), joint.constrain(z[0])["p"]
    assert abs(share - p) < 4.5 * (p * (1 - p) / 300) ** 0.5


def test_models_without_discrete_sites_have_no_draws_of_them():
    assert joint_of("eight schools").discrete(torch.zeros(3, 10)) == {}


@pytest.mark.parametrize("name", ["z", "c"])
def test_no_name_of_a_discrete_site_collides_with_the_vector(name):
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.deterministic("twice", 2 * w)
        with pyro.plate("coins", 2):
            pyro.sample(name, dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)), infer={"enumerate": "parallel"})

    joint = log_joint(model)
    z = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(joint.deterministic(z)["twice"], 2 * z)
