"""The mode audit: known shares between two populations, and what chains alone cannot see."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import mode_audit, to_arviz
from pyro_sb.diagnostics.modes.clusters import find_modes
from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.log_joint import LogJoint

F64 = torch.float64
CENTRE = torch.tensor([5.0, 0.0], dtype=F64)


def two(weight=0.7, centre=CENTRE):
    """Unit normals at +- centre, the first with this weight."""
    logs = torch.tensor([weight, 1 - weight], dtype=F64).log()[:, None]

    def log_prob(z):
        return torch.logsumexp(
            logs - torch.stack([(z - centre).square().sum(-1), (z + centre).square().sum(-1)]) / 2, 0
        )

    return LogJoint.from_batched(log_prob, len(centre))


def draws_of(weight, chains=4, num=400):
    side = torch.where(torch.rand(chains, num, 1) < weight, 1.0, -1.0).to(F64)
    return side * CENTRE + torch.randn(chains, num, 2, dtype=F64)


def mirrored(y):  # |mu| is what the data tell
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 5.0))
    pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


Y = torch.tensor(6.0, dtype=F64)


# ---- shares ----


@pytest.mark.parametrize("weight", [0.7, 0.5, 0.05])
def test_both_populations_have_the_true_shares(weight):
    audit = mode_audit(two(weight))
    assert audit.num_modes == 2 and audit.verdict == "ok"
    heavy = int(audit.centres[:, 0].argmax())
    z = (audit.shares[:, heavy] - weight) / audit.errors[:, heavy]
    assert (z.abs() < 4).all() and (audit.z.abs() < 4).all()
    torch.testing.assert_close(audit.shares.sum(1), torch.ones(2, dtype=F64))
    assert (audit.errors > 0).all() and (audit.errors < 0.05).all()


def test_independent_draws_pass_and_their_errors_are_binomial():
    audit = mode_audit(draws_of(0.7), two())
    assert audit.verdict == "ok" and audit.missing == []
    expected = math.sqrt(0.21 / 1600)
    assert 0.7 * expected < float(audit.chain_errors[0]) < 2.5 * expected
    assert (audit.by_chain.mean(0) == audit.chain_shares).all() and audit.by_chain.shape == (4, 2)


def test_a_missing_mode_is_named_where_r_hat_is_one():
    draws = CENTRE + torch.randn(4, 400, 2, dtype=F64)
    az = pytest.importorskip("arviz")
    assert float(az.rhat(draws[..., 0].numpy())) < 1.01
    audit = mode_audit(draws, two())
    assert audit.verdict == "bad" and len(audit.missing) == 1
    assert audit.centres[audit.missing[0], 0] < -3
    assert "no draw in mode" in repr(audit) and "z[0]" in repr(audit)


def test_wrong_shares_are_bad_too():
    audit = mode_audit(draws_of(0.5), two())
    assert audit.verdict == "bad" and audit.missing == []
    assert float(audit.chain_z.abs().max()) > 4


def test_chains_that_never_cross_are_told_apart_from_chains_that_do():
    side = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=F64)[:, None, None]
    stuck = side * CENTRE + torch.randn(10, 100, 2, dtype=F64)
    crossing = [line for line in mode_audit(stuck, two()).lines if line.name == "crossing"][0]
    assert crossing.verdict == "bad" and crossing.value.startswith("0%")


def test_chains_that_hardly_cross_cannot_tell():
    labels = torch.zeros(8, 200, 1, dtype=F64)
    labels[0, 40:], labels[1, 100:], labels[2, :20] = 1.0, 1.0, 1.0
    audit = mode_audit((2 * (labels < 1).to(F64) - 1) * CENTRE + torch.randn(8, 200, 2, dtype=F64), two())
    line = [line for line in audit.lines if line.name == "draws"][0]
    assert line.verdict == "look" and "too large to tell" in line.note


def test_a_mode_of_the_draws_alone_is_asked_about():
    def log_prob(z):  # the second mode is so far that no search from near 0 goes there
        return torch.logsumexp(torch.stack([-z.square().sum(-1), -(z - 30_000).square().sum(-1)]) / 2, 0)

    joint = LogJoint.from_batched(log_prob, 2)
    far = torch.cat([torch.randn(4, 300, 2, dtype=F64), 30_000 + torch.randn(4, 100, 2, dtype=F64)], 1)
    audit = mode_audit(far, joint)
    assert audit.num_modes == 2 and audit.verdict != "ok"
    assert float(audit.pooled.min()) < 1e-6


# ---- what is a mode ----


def banana(z):
    return -z[:, 0].square() / 8 - (z[:, 1] - z[:, 0].square() + 4).square()


@pytest.mark.parametrize("name", ["normal", "banana", "ring", "close pair"])
def test_what_no_barrier_parts_is_one_mode(name):
    x = torch.randn(3000, 2, dtype=F64)
    bent = torch.stack([2 * x[:, 0], 4 * x[:, 0].square() - 4 + x[:, 1] / math.sqrt(2)], 1)
    angle = 6.28319 * torch.rand(3000, dtype=F64)
    ring = (6 + 0.5 * x[:, :1]) * torch.stack([angle.cos(), angle.sin()], 1)
    on_ring = LogJoint.from_batched(lambda z: -2 * (z.norm(dim=1) - 6).square(), 2)
    target, points = {
        "ring": (on_ring, ring),
        "normal": (LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, 2), x),
        "banana": (LogJoint.from_batched(banana, 2), bent),
        "close pair": (two(0.5, CENTRE / 5), x + CENTRE / 5 * (torch.rand(3000, 1).round() * 2 - 1)),
    }[name]
    assert find_modes(target, points, 20).num == 1


@pytest.mark.parametrize("dim", [2, 10])
def test_eight_on_a_circle_are_eight(dim):
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    centres = torch.zeros(8, dim, dtype=F64)
    centres[:, 0], centres[:, 1] = 10 * angle.cos(), 10 * angle.sin()
    joint = LogJoint.from_batched(lambda z: torch.logsumexp(-torch.cdist(z, centres).square() / 2, 1), dim)
    points = centres.repeat(200, 1) + torch.randn(1600, dim, dtype=F64)
    modes = find_modes(joint, points, 20)
    labels = modes.labels(points).reshape(200, 8)
    assert modes.num == 8 and (labels == labels[0]).double().mean() > 0.999 and len(set(labels[0].tolist())) == 8


# ---- what it takes ----


def test_runs_posteriors_and_containers_are_read_alike():
    pytest.importorskip("arviz")
    mcmc = MCMC(KernelLangevin(mirrored), num_samples=60, num_chains=8, disable_progbar=True)
    mcmc.run(Y)
    for x in (mcmc, to_arviz(mcmc), mcmc.get_samples(group_by_chain=True)):
        audit = mode_audit(x, mirrored, args=(Y,))
        assert audit.num_modes == 2 and audit.verdict == "ok"
        positive = (mcmc.get_samples()["mu"] > 0).double().mean()
        at = int(audit.centres[:, 0].argmax())
        torch.testing.assert_close(audit.chain_shares[at], positive)
    assert mode_audit(mcmc).chain_shares is not None


def test_a_run_of_pyros_nuts_that_stays_in_one_mode_is_caught():
    nuts = pyro.infer.MCMC(pyro.infer.NUTS(mirrored), num_samples=100, warmup_steps=50, disable_progbar=True)
    nuts.run(Y)
    audit = mode_audit(nuts)
    assert audit.verdict == "bad" and len(audit.missing) == 1


def test_a_potential_is_a_target():
    def potential(params):
        return (params["z"].abs() - 5).square().sum() / 2

    audit = mode_audit(potential_fn=potential, initial_params={"z": torch.zeros(1, dtype=F64) + 1})
    assert audit.num_modes == 2 and audit.verdict == "ok" and audit.names == ("z[0]",)


def test_constrained_draws_are_taken_to_the_targets_coordinates():
    def model():
        pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))

    audit = mode_audit({"s": torch.randn(4, 300, dtype=F64).exp()}, model)
    assert audit.num_modes == 1 and audit.verdict == "ok"
    assert abs(float(audit.centres[0, 0])) < 1


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(5, 3), ValueError, r"unconstrained draws \(chain, draw, 2\) or \(draw, 2\), got \(5, 3\)"),
        (torch.full((5, 2), torch.nan), ValueError, "must be finite.*got 5 draws"),
        ({"w": torch.zeros(2, 5)}, ValueError, r"\['z'\] are missing among \['w'\]"),
        ({"z": torch.zeros(5, 2)}, ValueError, r"shape \(chain, draw, \*site\), got 1 lead"),
        (3.0, TypeError, "finished run.*got float"),
    ],
)
def test_bad_draws_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        mode_audit(x, two())


def test_bad_targets_are_refused():
    with pytest.raises(TypeError, match="target must be a Pyro model.*got int"):
        mode_audit(3)
    with pytest.raises(ValueError, match="max_modes must be at least 1, got 0"):
        mode_audit(two(), max_modes=0)
