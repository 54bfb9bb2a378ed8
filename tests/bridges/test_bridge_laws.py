"""Every bridge of the registry passes every law."""

import math

import pyro
import pytest
import torch
from pyro.distributions import TorchDistribution
from torch.distributions import MultivariateNormal

from pyro_sb.bridges import Bridge
from pyro_sb.distributions import Draws
from pyro_sb.training import FitHistory
from tests.laws import BRIDGES, CONTEXT_DIM, DIM, fitted, training_draws

every_bridge = pytest.mark.parametrize("name", BRIDGES)
both_forms = pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])


def a_context(conditional, batch, dtype=torch.float64):
    return torch.randn(*batch, CONTEXT_DIM, dtype=dtype) if conditional else None


def call(bridge, context):
    return bridge() if context is None else bridge(context)


@every_bridge
@both_forms
def test_fit_returns_its_history(name, conditional):
    target, context = training_draws(torch.float64)
    bridge = BRIDGES[name](context_dim=CONTEXT_DIM) if conditional else BRIDGES[name]()
    history = bridge.fit(target.numpy(), context=context.numpy() if conditional else None, progress=False)
    assert isinstance(history, FitHistory) and history.seconds > 0


@every_bridge
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_shapes_and_dtypes(name, conditional, dtype):
    bridge = fitted(BRIDGES[name], conditional, dtype)
    for batch in [(), (4,), (2, 3)] if conditional else [()]:
        context = a_context(conditional, batch, dtype)
        law = call(bridge, context)
        assert isinstance(law, TorchDistribution)
        assert (law.batch_shape, law.event_shape) == (batch, (DIM,))
        for sample_shape in [(), (5,), (2, 1)]:
            value = law.sample(sample_shape)
            assert value.shape == (*sample_shape, *batch, DIM)
            assert value.dtype == dtype and bool(torch.isfinite(value).all()) and not value.requires_grad
        x0 = torch.randn(7, *batch, DIM, dtype=dtype)
        assert bridge.transport(x0, context).shape == x0.shape
        assert bridge.drift(0.5, x0, context).shape == x0.shape
        times, states = bridge.paths(6, 4, context)
        assert times[0] == 0 and times[-1] == 1 and bool((times.diff() > 0).all())
        assert states.shape == (5, 6, *batch, DIM) and states.dtype == times.dtype == dtype


@every_bridge
@both_forms
def test_saved_and_loaded_is_the_same_law(name, conditional, tmp_path):
    bridge, context = fitted(BRIDGES[name], conditional), a_context(conditional, (4,))
    bridge.save(tmp_path / "bridge.pt")
    torch.load(tmp_path / "bridge.pt", weights_only=True)  # tensors and plain values alone
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert type(loaded) is type(bridge)
    draws = []
    for each in (bridge, loaded, type(bridge).load(tmp_path / "bridge.pt")):
        pyro.set_rng_seed(1)
        draws.append(call(each, context).sample((3,)))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


@every_bridge
def test_the_state_dict_goes_into_a_fresh_bridge(name):
    bridge, fresh = fitted(BRIDGES[name], False), BRIDGES[name]()
    fresh.load_state_dict(bridge.state_dict())
    x = torch.randn(5, DIM, dtype=torch.float64)
    assert torch.equal(fresh.drift(0.5, x), bridge.drift(0.5, x))


@every_bridge
def test_moved_to_another_dtype_it_follows(name):
    bridge = fitted(BRIDGES[name], False)
    x = torch.randn(5, DIM, dtype=torch.float64)
    before = bridge.drift(0.5, x)
    after = bridge.float().drift(0.5, x.float())
    assert after.dtype == torch.float32 and bridge().sample().dtype == torch.float32
    torch.testing.assert_close(after.double(), before, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@every_bridge
@both_forms
def test_on_cuda_as_on_cpu(name, conditional):
    bridge, x = fitted(BRIDGES[name], conditional), torch.randn(5, DIM, dtype=torch.float64)
    context = a_context(conditional, (5,))
    before = bridge.drift(0.5, x, context)
    bridge = bridge.cuda()
    context = None if context is None else context.cuda()
    torch.testing.assert_close(bridge.drift(0.5, x.cuda(), context).cpu(), before, rtol=1e-9, atol=1e-9)
    assert call(bridge, context).sample((3,)).device.type == "cuda"


@every_bridge
@both_forms
def test_the_density_is_the_one_promised(name, conditional):
    # E_q exp(log p - log q) = 1 for a normalised p, whatever log q is the density of
    bridge = fitted(BRIDGES[name], conditional)
    context = torch.zeros(CONTEXT_DIM, dtype=torch.float64) if conditional else None
    law, value = call(bridge, context), torch.zeros(DIM, dtype=torch.float64)
    if bridge.density != "marginal" and not bridge.approximate_log_prob:
        with pytest.raises(NotImplementedError, match=r"draws\(\)"):
            law.log_prob(value)
    if bridge.density is None:
        with pytest.raises(NotImplementedError, match="density"):
            law.draws((5,))
        return
    draws = law.draws((4000,))
    assert isinstance(draws, Draws) and draws.log_q.shape == (4000,)
    target = MultivariateNormal(draws.value.mean(0), 0.5 * draws.value.T.cov())  # narrower: the weights have moments
    weights = (target.log_prob(draws.value) - draws.log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(4000)
    assert weights.std() < 10  # else the line above says nothing
    if bridge.density == "marginal":
        torch.testing.assert_close(law.log_prob(draws.value), draws.log_q)
    elif bridge.approximate_log_prob:  # the path's less its own scatter: E_q[log_q] >= E_q[log q]
        gaps = draws.log_q - law.log_prob(draws.value)
        assert bool(torch.isfinite(gaps).all()) and abs(gaps.mean()) < 0.5


@every_bridge
@both_forms
def test_it_is_a_pyro_distribution(name, conditional):
    bridge = fitted(BRIDGES[name], conditional)

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("x", call(bridge, a_context(conditional, ())))

    assert model().shape == (4, DIM)
    assert call(bridge, a_context(conditional, (4,))).expand((3, 4)).sample().shape == (3, 4, DIM)


@every_bridge
def test_a_bridge_that_is_not_fitted_says_so(name):
    with pytest.raises(RuntimeError, match="fit"):
        BRIDGES[name]()()


BAD_TARGETS = {
    "one draw": (torch.zeros(1, DIM), "at least 2 draws"),
    "NaN": (torch.tensor([[0.0, 1.0], [math.nan, 0.0], [1.0, 1.0]]), "finite.* 1 of 3"),
    "infinity": (torch.tensor([[0.0, 1.0], [math.inf, 0.0], [1.0, 1.0]]), "finite"),
    "columns": (torch.zeros(10, DIM + 1), rf"shape \(draws, {DIM}\), got \(10, {DIM + 1}\)"),
    "axes": (torch.zeros(10), "shape"),
}
BAD_WEIGHTS = {
    "negative": (torch.linspace(-1, 1, 60), "non-negative"),
    "NaN": (torch.full((60,), math.nan), "finite"),
    "zero": (torch.zeros(60), "zero"),
    "one draw": (torch.eye(60)[0], "one draw"),
    "length": (torch.ones(59), r"shape \(60,\)"),
}


@every_bridge
@pytest.mark.parametrize("bad", BAD_TARGETS)
def test_bad_draws_are_refused_and_nothing_is_lost(name, bad):
    bridge, (target, message) = fitted(BRIDGES[name], False), BAD_TARGETS[bad]
    before = dict(bridge.state_dict())
    with pytest.raises(ValueError, match=message):
        bridge.fit(target, progress=False)
    assert all(
        v is before[key] or bool((v == before[key]).all())
        for key, v in bridge.state_dict().items()
        if torch.is_tensor(v)
    )


@every_bridge
@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_bad_weights_are_refused(name, bad):
    weights, message = BAD_WEIGHTS[bad]
    with pytest.raises(ValueError, match=message):
        BRIDGES[name]().fit(training_draws(torch.float64)[0], weights=weights, progress=False)


@every_bridge
def test_bad_contexts_are_refused(name):
    target, context = training_draws(torch.float64)
    for options, message in [
        ({}, "context must be given"),
        ({"context": context[:-1]}, "a row a draw"),
        ({"context": context[:, :1]}, "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            BRIDGES[name](context_dim=CONTEXT_DIM).fit(target, progress=False, **options)
    with pytest.raises(ValueError, match="context_dim = 0"):
        BRIDGES[name]().fit(target, context=context, progress=False)
    conditional, plain = fitted(BRIDGES[name], True), fitted(BRIDGES[name], False)
    with pytest.raises(ValueError, match="call it on a context"):
        conditional()
    with pytest.raises(ValueError, match="shape"):
        conditional(torch.zeros(CONTEXT_DIM + 1))
    with pytest.raises(ValueError, match="context_dim 0"):
        plain(torch.zeros(CONTEXT_DIM))


@every_bridge
def test_a_misspelt_option_is_refused_by_name_before_anything_is_learnt(name):
    with pytest.raises(TypeError, match="hiden"):
        BRIDGES[name](hiden=(8,))
    bridge = BRIDGES[name]()
    with pytest.raises(TypeError, match="wieghts"):
        bridge.fit(training_draws(torch.float64)[0], wieghts=torch.ones(60), progress=False)
    assert not bridge.fitted and not getattr(getattr(bridge, "codec", None), "fitted", False)


@every_bridge
@both_forms
def test_rows_without_weight_teach_nothing(name, conditional):
    # weights that sum exactly, so that the zeros change no rounding: equal bit for bit
    (target, context), weights = training_draws(torch.float64), torch.ones(64, dtype=torch.float64)
    target, context = torch.cat([target, target[:4]]), torch.cat([context, context[:4]])
    states = []
    for extra in (0, 64):
        bridge = BRIDGES[name](context_dim=CONTEXT_DIM) if conditional else BRIDGES[name]()
        rows, contexts = (
            torch.cat([x, 100 + torch.arange(extra).to(x)[:, None] + x[:extra]]) for x in (target, context)
        )
        pyro.set_rng_seed(3)
        bridge.fit(
            rows,
            context=contexts if conditional else None,
            weights=torch.cat([weights, torch.zeros(extra, dtype=torch.float64)]),
            progress=False,
        )
        states.append(bridge.state_dict())
    for key, value in states[0].items():
        assert not torch.is_tensor(value) or torch.equal(value, states[1][key]), key


@every_bridge
@both_forms
def test_it_prints_itself_in_a_few_lines(name, conditional, tmp_path):
    made = BRIDGES[name](context_dim=CONTEXT_DIM) if conditional else BRIDGES[name]()
    bridge, context = fitted(BRIDGES[name], conditional), a_context(conditional, (4,))
    bridge.save(tmp_path / "bridge.pt")
    for each, words in ((made, "not fitted"), (bridge, "fitted"), (Bridge.load(tmp_path / "bridge.pt"), "fitted")):
        lines = repr(each).splitlines()
        assert type(each).__name__ in lines[0] and f"dim={DIM}" in lines[0] and 2 <= len(lines) <= 10
        assert lines[-1].strip().startswith(words) and ("60 draws" in lines[-1]) == bool(each.fitted_to)
        assert conditional == (f"context_dim={CONTEXT_DIM}" in lines[0])
    text = repr(call(bridge, context))
    assert text.startswith("BridgeDistribution") and bridge.describe() in text and len(text.splitlines()) == 1
    assert ("batch_shape (4,)" in text) == conditional
