"""LightSB on contexts with full covariances: one law by every route, dropout, embeddings, draws held out by a mask."""

import math
import warnings

import pytest
import torch

from pyro_sb.bridges import Bridge, LightSB
from pyro_sb.bridges.ends import DrawsEnd, read_held_out
from pyro_sb.bridges.light.parameters import MixtureParameters
from pyro_sb.bridges.light.solvers import SOLVERS, Likelihood
from pyro_sb.nn import SetEmbedding
from tests.ops.potentials import F64, random_potential

QUICK = {"progress": False, "num_updates": 40}


def quiet_fit(bridge, target, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        return bridge.fit(target, **(QUICK | options))


def pairs(num=400, dim=2):
    context = torch.randn(num, 3, **F64)
    return context[:, :dim] ** 2 + 0.5 * torch.randn(num, dim, **F64), context


def fitted(dim=2, **options):
    target, context = pairs(dim=dim)
    bridge = LightSB(dim, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16), **options)
    quiet_fit(bridge, target, context=context)
    torch.nn.init.normal_(bridge.parameters_of.net.head.weight, std=0.2)  # what is exact is exact of any parameters
    return bridge, target, context


def parameters(dim):
    """Parameters with a network whose head is no longer zero."""
    module = MixtureParameters(dim, 3, 2, "full", (8,)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


# The factored form


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_given_covariances_are_taken_exactly(dim):
    module = MixtureParameters(dim, 4, 2, "full", (8,)).double()  # its network adds nothing yet
    potential = random_potential(dim, 4, full=True)
    module.set(potential, 1e-6)
    context = torch.randn(5, 2, **F64)
    found = module(context, potential.epsilon)
    torch.testing.assert_close(found.scales, potential.scales.expand(5, -1, -1, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.locs, potential.locs.expand(5, -1, -1), rtol=1e-12, atol=1e-12)
    law = module.law(context, potential.epsilon)
    covariances = potential.epsilon * potential.scales
    torch.testing.assert_close(law.covariances(), covariances.expand(5, -1, -1, -1), rtol=1e-9, atol=1e-9)


def test_eigenvalues_under_the_floor_are_raised_to_twice_it():
    module = MixtureParameters(2, 1, 2, "full", (8,)).double()
    potential = random_potential(2, 1, full=True)
    scales = torch.tensor([[[1.0, 0.0], [0.0, 1e-9]]], **F64)
    module.set(potential._replace(scales=scales), 1e-4)
    values = torch.linalg.eigvalsh(module(torch.zeros(1, 2, **F64), 1.0).scales)[0, 0]
    torch.testing.assert_close(values, torch.tensor([2e-4, 1.0], **F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [1, 3])
def test_the_law_is_the_plan_from_the_origin(dim):
    module, context, y = parameters(dim), torch.randn(6, 2, **F64), torch.randn(6, 5, dim, **F64)
    for epsilon in (0.3, 2.0):
        potential, law = module(context, epsilon), module.law(context, epsilon)
        expected = potential.plan_log_prob(y, torch.zeros_like(y))
        found = torch.stack([law.log_prob(y[:, i]) for i in range(5)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_no_precision_exceeds_the_floors_however_far_the_network_goes():
    module = parameters(1)
    for parameter in module.net.head.parameters():
        torch.nn.init.normal_(parameter, std=1e4)
    module.floor.fill_(1e-4)
    law = module.law(torch.randn(50, 2, **F64), 1.0)
    assert float(law.covariances().detach().min()) >= 1e-4 * (1 - 1e-9)
    assert bool(torch.isfinite(law.log_prob(torch.zeros(50, 1, **F64))).all())


# The bridge


def test_the_density_is_that_of_the_plan_from_the_source_point():
    bridge, target, context = fitted()
    x, rows = target[:20], context[:20]
    expected = bridge.plan(bridge.source_points.expand(20, -1), rows).log_prob(x)
    torch.testing.assert_close(bridge(rows).log_prob(x), expected, rtol=1e-8, atol=1e-8)


def test_the_loss_is_minus_the_density_of_what_was_held_out():
    target, context = pairs()
    held = torch.arange(400) % 4 == 0
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16))
    history = quiet_fit(bridge, target, context=context, held_out=held)
    # units of the bridge are those of the data over a scale: the losses differ by dim log scale
    mean = float(bridge(context[held]).log_prob(target[held]).mean()) + 2 * float(bridge.scale.log())
    assert min(history.validation_losses) == pytest.approx(-mean, abs=1e-6)


def test_draws_have_the_density():
    bridge, _, context = fitted()
    one = context[:1]
    draws = bridge(one[0]).sample((20_000,))
    axis = torch.linspace(-30, 30, 601, **F64)
    grid = torch.cartesian_prod(axis, axis)
    mass = bridge(one[0]).log_prob(grid).exp() * float(axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    for value, truth in ((draws, grid), (draws**2, grid**2), (draws[:, :1] * draws[:, 1:], grid[:, :1] * grid[:, 1:])):
        z = (value.mean(0) - mass @ truth) / value.std(0) * math.sqrt(20_000)
        assert z.abs().max() < 4


def test_a_context_matters_and_a_batch_is_its_rows():
    bridge, target, context = fitted()
    law = bridge(context[:4])
    assert law.sample((3,)).shape == (3, 4, 2)
    rows = torch.stack([bridge(context[i]).log_prob(target[0]) for i in range(4)])
    torch.testing.assert_close(law.log_prob(target[0]), rows, rtol=1e-10, atol=1e-10)
    assert rows.std() > 0.1


def test_the_gradient_of_the_density_is_the_points():
    bridge, target, context = fitted()
    x = target[:6].clone().requires_grad_()
    (slope,) = torch.autograd.grad(bridge(context[:6]).log_prob(x).sum(), x)
    for axis in range(2):
        step = torch.zeros(2, **F64)
        step[axis] = 1e-6
        ahead, behind = (bridge(context[:6]).log_prob(target[:6] + sign * step) for sign in (1, -1))
        torch.testing.assert_close(slope[:, axis], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-5)


# Dropout


def test_dropout_is_off_outside_the_fit():
    bridge, target, context = fitted(dropout=0.5)
    x, rows = target[:10], context[:10]
    once = bridge(rows).log_prob(x)
    for mode in (True, False):
        bridge.train(mode)
        assert torch.equal(bridge(rows).log_prob(x), once)
    assert not bridge.parameters_of.net.noisy


def test_dropout_is_on_in_the_fit_alone(monkeypatch):
    seen = []

    class Watched(Likelihood):
        def loss(self, process, ends, batch_size):
            net, rows = process.parameters.net, torch.zeros(1, 3, **F64)
            seen.append(net.noisy)
            torch.nn.init.ones_(net.head.weight)
            assert not torch.equal(net(rows), net(rows))
            net.noisy = False
            assert torch.equal(net(rows), net(rows))
            raise KeyError("enough")

    target, context = pairs()
    monkeypatch.setitem(SOLVERS, "likelihood", Watched())
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16), dropout=0.5)
    with pytest.raises(KeyError, match="enough"):
        bridge.fit(target, context=context, **QUICK)
    assert seen == [True] and not bridge.parameters_of.net.noisy


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_bad_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got"):
        LightSB(2, context_dim=1, dropout=dropout)


# Held out by a mask


def test_rows_of_a_mask_are_never_learnt_from():
    held = torch.rand(50) < 0.3
    points = torch.arange(50.0, **F64)[:, None]
    end = DrawsEnd(points, None, points, held)
    learnt = torch.cat([end.batch(7).points for _ in range(40)]).flatten().long()
    assert set(learnt.tolist()) == set((~held).nonzero().flatten().tolist()) and end.num_train == int((~held).sum())
    judged = end.held_out(1000)
    assert set(judged.points.flatten().long().tolist()) == set(held.nonzero().flatten().tolist())
    assert torch.equal(judged.points, judged.context)


def test_a_mask_is_of_all_draws_also_where_some_weigh_nothing():
    target, context = pairs()
    weights, held = torch.ones(400), torch.arange(400) % 5 == 0
    weights[::7] = 0.0
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16,))
    history = quiet_fit(bridge, target, context=context, weights=weights, held_out=held, num_updates=200)
    rows = held & (weights > 0)
    mean = float(bridge(context[rows]).log_prob(target[rows]).mean()) + 2 * float(bridge.scale.log())
    assert min(history.validation_losses) == pytest.approx(-mean, abs=1e-6)


BAD_MASKS = {
    "numbers": (torch.ones(400), r"boolean mask of shape \(400,\), got torch.float32 of shape \(400,\)"),
    "another length": (
        torch.ones(3, dtype=torch.bool),
        r"boolean mask of shape \(400,\), got torch.bool of shape \(3,\)",
    ),
    "all": (torch.ones(400, dtype=torch.bool), "held_out must mark some draws and leave some, got 400 of 400"),
    "none": (torch.zeros(400, dtype=torch.bool), "held_out must mark some draws and leave some, got 0 of 400"),
}


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_bad_masks_are_refused(bad):
    target, context = pairs()
    mask, message = BAD_MASKS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(2, num_components=3, context_dim=3).fit(target, context=context, held_out=mask, **QUICK)


def test_a_mask_needs_draws():
    law = torch.distributions.MultivariateNormal(torch.zeros(2, **F64), torch.eye(2, **F64))
    with pytest.raises(ValueError, match="held_out must be a share where the target is a distribution"):
        LightSB(2, num_components=3).fit(law, held_out=torch.tensor([True, False]), **QUICK)
    assert read_held_out([True, False], 2).tolist() == [True, False]
    assert read_held_out(0.3, 10) == 0.3


# Embeddings


def sets(num=600):
    """A target that depends on the spread of four items: nothing affine in them knows it."""
    spread = torch.rand(num, 1, **F64) * 3 + 0.2
    items = spread * torch.randn(num, 4, **F64).sign() * (1 + 0.1 * torch.randn(num, 4, **F64))
    return torch.cat([spread, -spread], 1) + 0.1 * torch.randn(num, 2, **F64), items


def with_embedding(num_updates=40):
    target, context = sets()
    bridge = LightSB(
        2,
        num_components=2,
        epsilon=0.5,
        context_dim=4,
        covariance="full",
        hidden=(32,),
        embedding=SetEmbedding(1, 6, hidden=(32,)),
    )
    return bridge, target, context, quiet_fit(bridge, target, context=context, num_updates=num_updates)


def test_an_embedding_is_learnt_with_the_rest():
    bridge, target, context, history = with_embedding(400)
    spread = (target[:, 0] - bridge(context).sample()[:, 0]).std()
    assert float(spread) < 0.5 * float(target[:, 0].std()) * 2**0.5  # draws given nothing differ by sqrt 2 deviations
    assert min(history.validation_losses) < history.validation_losses[0] - 0.5
    before = [p.detach().clone() for p in bridge.parameters_of.embedding.parameters()]
    bridge.parameters_of.reset()
    assert any(not torch.equal(a, b) for a, b in zip(before, bridge.parameters_of.embedding.parameters()))


def test_a_set_embedding_knows_no_order():
    bridge, target, context, _ = with_embedding()
    moved = context[:, torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(
        bridge(moved[:20]).log_prob(target[:20]), bridge(context[:20]).log_prob(target[:20]), rtol=1e-13, atol=1e-13
    )


def test_a_set_embedding_is_saved(tmp_path):
    bridge, target, context, _ = with_embedding()
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert isinstance(loaded.parameters_of.embedding, SetEmbedding)
    assert torch.equal(loaded(context[:9]).log_prob(target[:9]), bridge(context[:9]).log_prob(target[:9]))


def test_a_users_own_embedding_is_saved_but_not_rebuilt(tmp_path):
    target, context = sets()

    def make():
        return LightSB(
            2, num_components=2, context_dim=4, covariance="full", hidden=(8,), embedding=torch.nn.Linear(4, 3)
        )

    bridge = make()
    quiet_fit(bridge, target, context=context)
    bridge.save(tmp_path / "bridge.pt")
    with pytest.raises(ValueError, match="own class cannot be rebuilt from a file, got Linear.*load_state_dict"):
        Bridge.load(tmp_path / "bridge.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "bridge.pt", weights_only=True)["state"])
    assert torch.equal(other(context[:9]).log_prob(target[:9]), bridge(context[:9]).log_prob(target[:9]))


def test_bad_embeddings_are_refused():
    with pytest.raises(ValueError, match="embedding needs context_dim > 0, got 0"):
        LightSB(2, embedding=SetEmbedding(1, 4))
    with pytest.raises(ValueError, match=r"embedding must map \(n, 4\) to \(n, out_dim\), got \(1, 2, 2\)"):
        LightSB(2, context_dim=4, embedding=torch.nn.Unflatten(1, (2, 2)))
    with pytest.raises(ValueError, match="items of size 3, got 4 columns"):
        SetEmbedding(3, 2)(torch.zeros(1, 4))
