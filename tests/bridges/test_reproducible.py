"""The same seed gives the same draws: for one thread and for two, and whatever the size of blocks of densities."""

import pytest
import torch

from tests.laws import BRIDGES, CONTEXT_DIM, DIM, fitted


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("name", BRIDGES)
def test_draws_do_not_feel_the_number_of_threads(name, conditional, threads):
    bridge, found = fitted(BRIDGES[name], conditional), []
    context = torch.randn(40, CONTEXT_DIM, dtype=torch.float64) if conditional else None
    law = bridge(context) if conditional else bridge()
    for number in (1, 2, 2):
        threads(number)
        torch.manual_seed(0)
        found.append(law.sample((50,)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[2], found[1])


@pytest.mark.parametrize("name", [name for name in BRIDGES if "light" in name])
def test_densities_do_not_feel_the_size_of_blocks(name, monkeypatch):
    bridge = fitted(BRIDGES[name], False)
    x = torch.randn(60, DIM, dtype=torch.float64)
    whole = bridge().log_prob(x)
    monkeypatch.setattr("pyro_sb.bridges.base.MOST", 8)
    torch.testing.assert_close(bridge().log_prob(x), whole, rtol=1e-10, atol=1e-10)
