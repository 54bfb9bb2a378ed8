"""What an audit says of given shares: exact probabilities decide, words can be followed, numbers can be read."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import ModeAudit, mode_audit
from pyro_sb.infer.model.log_joint import LogJoint

F64 = torch.float64


def audited(pooled, by_chain=None, sizes=100, error=0.01):
    """An audit of two populations that agree, and of chains with these shares."""
    pooled = torch.tensor(pooled, dtype=F64)
    population = SimpleNamespace(weights=torch.full((1000,), 1e-3), ess_share=0.9, points=torch.zeros(1000, 1))
    given = {} if by_chain is None else {"chain_sizes": torch.full((len(by_chain),), float(sizes), dtype=F64)}
    chains = None if by_chain is None else torch.tensor(by_chain, dtype=F64)
    return ModeAudit(
        shares=pooled.expand(2, -1),
        errors=torch.full((2, len(pooled)), 0.01, dtype=F64),
        centres=torch.arange(len(pooled), dtype=F64)[:, None],
        names=("z[0]",),
        chain_shares=None if chains is None else chains.mean(0),
        chain_errors=None if chains is None else torch.full((len(pooled),), error, dtype=F64),
        by_chain=chains,
        populations=(population, population),
        evaluations=0,
        **given,
    )


def line(audit, name):
    return next(one for one in audit.lines if one.name == name)


STAYED = [[1.0, 0.0]] * 4


@pytest.mark.parametrize(
    ("share", "sizes", "verdict"),
    [
        (0.3, 100, "bad"),
        (0.006, 100, "-"),  # .994^400 = .09
        (0.02, 100, "bad"),  # .98^400 = 3e-4
        (0.3, 1, "-"),  # a chain of effective size one sees one mode
        (1e-300, 100, "-"),
    ],
)
def test_no_crossing_is_bad_only_where_independent_draws_would_have_crossed(share, sizes, verdict):
    found = line(audited([1 - share, share], STAYED, sizes), "crossing")
    assert found.verdict == verdict and ("too few draws" in found.note) == (verdict == "-")


def test_independent_draws_are_called_stuck_at_most_once_in_a_hundred():
    bad = 0
    for _ in range(300):
        second = (torch.rand(4, 100) < 0.006).double().mean(1)
        bad += line(audited([0.994, 0.006], torch.stack([1 - second, second], 1).tolist()), "crossing").verdict == "bad"
    assert bad <= 9  # binomial(300, .01) has more once in 900


def test_few_crossings_are_held_against_what_was_due():
    seldom = [[1.0, 0.0]] * 60 + [[0.9, 0.1]] * 4
    assert line(audited([0.9, 0.1], seldom), "crossing").verdict == "look"
    assert line(audited([0.9994, 0.0006], seldom), "crossing").verdict == "ok"  # 1 - .9994^100 = 6 % were due


@pytest.mark.parametrize("error", [float("nan"), math.inf])
def test_what_cannot_be_compared_is_not_ok(error):
    assert line(audited([0.6, 0.4], [[0.6, 0.4]] * 4, error=error), "draws").verdict != "ok"


def test_a_difference_without_error_is_shown_in_few_digits():
    far = audited([0.6, 0.4], [[1.0, 0.0]] * 4, error=0.0)
    object.__setattr__(far, "errors", torch.zeros(2, 2, dtype=F64))
    assert line(far, "draws").value.endswith("z > 99") and "< -99" in far.table()
    assert max(map(len, repr(far).splitlines())) < 200


@pytest.mark.parametrize("seed", range(4))
def test_one_chain_in_the_wrong_mode_is_bad(seed):
    torch.manual_seed(seed)

    def log_prob(z):  # the mode at 12 has a share of e^-40
        return torch.logsumexp(torch.stack([-(z + 12).square().sum(-1) / 2, -(z - 12).square().sum(-1) / 2 - 40]), 0)

    audit = mode_audit(12 + torch.randn(1, 300, 1, dtype=F64), LogJoint.from_batched(log_prob, dim=1))
    assert line(audit, "draws").verdict == "bad" and not bool(audit.chain_z.isnan().any())
    assert (audit.pooled <= 1).all() and "nan" not in repr(audit)


def test_more_draws_are_no_cure_for_chains_that_do_not_cross():
    stuck = line(audited([0.5, 0.5], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], error=0.31), "draws")
    assert stuck.verdict == "look" and "would not help" in stuck.note and "global move" in stuck.note
    crossing = line(audited([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]], error=0.31), "draws")
    assert crossing.note.endswith("draw more")


@pytest.mark.parametrize("num", [1, 2, 3, 12])
def test_an_audit_prints_itself_in_ten_lines(num):
    text = repr(audited([1 / num] * num, [[1 / num] * num] * 4))
    assert len(text.splitlines()) <= 10 and (num <= 3) == ("more: see table()" not in text)
    assert len(audited([1 / num] * num).table().splitlines()) == 1 + num


def test_shares_are_named():
    found = line(audited([0.712, 0.288], [[1.0, 0.0]] * 2 + [[0.9, 0.1]] * 2), "draws")
    assert found.value.startswith("mode 0: share 0.950, populations 0.712, z ")
    assert "all in the mode that the populations see" in line(audited([1.0], [[1.0]] * 4), "draws").note


def test_modes_are_shown_in_the_sites_own_space():
    def model():
        pyro.sample("rate", dist.LogNormal(torch.tensor(-5.0, dtype=F64), 0.1))

    audit = mode_audit(model, num_particles=100)
    name, value = audit.where[0].split(" = ")
    assert name == "rate" and float(value) == pytest.approx(math.exp(float(audit.centres[0, 0])), rel=0.01)


def test_what_has_other_numbers_in_its_own_space_is_said_to_be_unconstrained():
    def model():
        pyro.sample("shares", dist.Dirichlet(torch.full((3,), 5.0, dtype=F64)))

    audit = mode_audit(model, num_particles=100)
    assert audit.where[0].startswith("unconstrained shares[")
    torch.testing.assert_close(audit.places, audit.centres)
