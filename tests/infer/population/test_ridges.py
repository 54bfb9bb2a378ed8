"""Pieces along ridges: they follow curves of any kind as far as there is mass, and leave alone what is not curved."""

import math

import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.ridges import follow_ridges
from pyro_sb.weights import log_evidence, normalise

F64 = {"dtype": torch.float64}
GUARD = (0.1, 3.0, 4.0)


def banana(dim, bend, spread):
    """x1 given x0 about a parabola; normalised."""

    def log_density(x):
        gap = x[:, 1] - bend * (x[:, 0].square() - spread**2)
        rest = x[:, 2:].square().sum(1) + gap.square() + (x[:, 0] / spread).square()
        return -0.5 * rest - math.log(spread) - 0.5 * dim * math.log(2 * math.pi)

    return log_density


def arms(x):
    """Two straight arms that meet at an angle, normalised: x0 is normal, x1 about its absolute value."""
    gap = (x[:, 1] - 2 * x[:, 0].abs()) / 0.5
    return -0.5 * ((x[:, 0] / 5).square() + gap.square()) - math.log(5 * 0.5 * 2 * math.pi)


def ring(x):
    """A circle of radius 10 and width .5 in the first two coordinates, normal in the third; normalised to 1e-9."""
    radius = x[:, :2].norm(dim=1)
    mass = 2 * math.pi * 10 * 0.5 * math.sqrt(2 * math.pi)
    return -2 * (radius - 10).square() - 0.5 * x[:, 2].square() - math.log(mass) - 0.5 * math.log(2 * math.pi)


def funnel(x):
    """Neal's funnel, normalised."""
    rest = x[:, 1:].square().sum(1) * (-x[:, 0]).exp() + (len(x[0]) - 1) * x[:, 0] + (x[:, 0] / 3).square()
    return -0.5 * rest - math.log(3) - 0.5 * len(x[0]) * math.log(2 * math.pi)


CURVES = {
    "banana, d 2": (banana(2, 0.1, 10.0), 2, [0.0, -10.0]),
    "banana, d 10": (banana(10, 0.1, 10.0), 10, [0.0, -10.0]),
    "a sharp banana, d 4": (banana(4, 1.0, 4.0), 4, [0.0, -16.0]),
    "a flat banana, d 20": (banana(20, 0.02, 10.0), 20, [0.0, -2.0]),
    "ring": (ring, 3, [10.0, 0.0]),
    "funnel, d 5": (funnel, 5, [0.0, 0.1]),
    "two arms": (arms, 2, [1.0, 2.0]),
}


@pytest.mark.parametrize("name", CURVES)
def test_pieces_cover_a_curve_to_its_ends(name):
    log_density, dim, seed = CURVES[name]
    torch.manual_seed(0)
    seeds = torch.zeros(1, dim, **F64)
    seeds[0, :2] = torch.tensor(seed, **F64)
    found = follow_ridges(LogJoint.from_batched(log_density, dim), seeds, torch.eye(dim, **F64)[None], 1024)
    points = found.with_guard(*GUARD).sample(20_000)
    log_weights = log_density(points) - found.with_guard(*GUARD).log_prob(points)
    value, error = log_evidence(log_weights)
    assert abs(value) < 4 * error < 0.2
    share = 1 / float(normalise(log_weights).square().sum()) / len(points)
    assert share > 0.25


def test_what_is_normal_has_no_ridge():
    factor = torch.linalg.cholesky(torch.tensor([[4.0, 1.9], [1.9, 1.0]], **F64))
    joint = LogJoint.from_batched(lambda z: -0.5 * torch.linalg.solve(factor, z.T).square().sum(0), 2)
    assert follow_ridges(joint, torch.zeros(1, 2, **F64), factor[None], 1024) is None


def test_units_do_not_matter():
    log_density, dim, seed = CURVES["banana, d 2"]
    units, place = torch.tensor([1e-3, 1e5], **F64), torch.tensor([7.0, -2e6], **F64)
    seeds = torch.tensor([seed], **F64)
    torch.manual_seed(0)
    one = follow_ridges(LogJoint.from_batched(log_density, 2), seeds, torch.eye(2, **F64)[None], 1024)
    torch.manual_seed(0)
    other = follow_ridges(
        LogJoint.from_batched(lambda z: log_density((z - place) / units), 2),
        seeds * units + place,
        torch.diag(units)[None],
        1024,
    )
    assert one.num_components == other.num_components
    points = one.sample(100)
    torch.testing.assert_close(
        other.log_prob(points * units + place) + units.log().sum(), one.log_prob(points), rtol=0, atol=0.05
    )
