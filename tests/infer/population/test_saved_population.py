"""Populations in files."""

import pytest
import torch

from pyro_sb.files import read_file, write_file
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population import Population, populate


def test_a_population_comes_back_from_its_file(tmp_path):
    joint = LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, dim=2)
    made = populate(joint, 100)
    made.save(tmp_path / "population.pt")
    back = Population.load(tmp_path / "population.pt")
    assert back.stages == made.stages and back.evaluations == made.evaluations and back.sources == made.sources
    for name in ("points", "log_weights", "log_density"):
        torch.testing.assert_close(getattr(back, name), getattr(made, name), rtol=0, atol=0)
    torch.testing.assert_close(tuple(back.core), tuple(made.core), rtol=0, atol=0)
    assert repr(back) == repr(made) and back.resample(5).shape == (5,)
    again = populate(joint, 100, start=back.points)  # it serves as a start
    assert again.ess_share > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="MCMC"), "must hold what Population.save wrote"),
        (lambda c: c.update(format=9), "must have format 1, got 9"),
        (lambda c: c["population"]["~state"].update(log_weights=torch.zeros(3)), "whose parts are of one size"),
        (lambda c: c["population"]["~state"].pop("core"), "as this version writes it"),
        (lambda c: c.update(population=3), "as this version writes it"),
    ],
)
def test_another_file_is_no_population(tmp_path, change, message):
    populate(LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, dim=1), 60).save(tmp_path / "p.pt")
    contents = read_file(tmp_path / "p.pt")
    change(contents)
    write_file(contents, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=message):
        Population.load(tmp_path / "p.pt")
