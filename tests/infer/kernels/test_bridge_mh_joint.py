"""BridgeMH's joint distribution test: the smallest cells here, the whole matrix in benchmarks/results/geweke.txt."""

import pytest
import torch

from benchmarks.exactness.geweke import (
    CASES,
    FUNCTIONS,
    Score,
    fitted,
    joint_at,
    model,
    observe,
    scores,
    simulate,
    stale,
    successive,
    warmed,
)
from pyro_sb.infer.amortized.simulator import simulator
from pyro_sb.infer.model.log_joint import log_joint


def largest(score: Score) -> float:
    assert len(score.z) == len(FUNCTIONS) >= 10
    return float(score.z.abs().max())


def test_the_test_simulates_and_scores_one_model() -> None:
    z, y = simulate(6)
    own = log_joint(simulator(model).conditioned({"y": y[0]}))
    there = torch.randn(12, 2, dtype=torch.float64)
    torch.testing.assert_close(joint_at(y[:1]).log_prob(there), own.log_prob(there))
    rows = joint_at(y).log_prob(there)
    torch.testing.assert_close(rows[7], joint_at(y[1:2]).log_prob(there[7:8])[0])
    assert observe(z).shape == (6, 3)


@pytest.mark.parametrize("name, fit, num_proposals", [("LightSB", "too narrow", 1), ("VSDM", "untrained", 1),
                                                      ("LightSB", "well", 3),
                                                      ("Latent, LightSB, sinh", "too wide", 1)])  # fmt: skip
def test_invariance_does_not_depend_on_the_fit(name: str, fit: str, num_proposals: int) -> None:
    bridge = fitted(CASES[name], fit)
    kernel = warmed(bridge, "hmc", bridge_probability=0.5, num_proposals=num_proposals)
    assert largest(successive(kernel, 500, 3, 10)) < 4


@pytest.mark.parametrize("name", ["LightSB", pytest.param("LightSB, Gaussian source", marks=pytest.mark.slow)])
def test_a_stale_path_is_found(name: str) -> None:
    kernel = warmed(fitted(CASES[name], "too narrow"), "hmc", bridge_probability=0.5)
    assert largest(successive(kernel, 1500, 3, 16)) < 4
    assert largest(successive(stale(kernel), 1500, 3, 16)) > 6


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["well", "a mode thinned"])
@pytest.mark.parametrize("name", ["DSB", "KernelLangevin, plain", "posterior, light", "Latent, VSDM, sinh"])
def test_more_of_the_matrix(name: str, fit: str) -> None:
    for score in scores(name, fit, 400):
        assert largest(score) < 4
