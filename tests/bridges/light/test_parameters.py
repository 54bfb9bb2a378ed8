"""Parameters of a mixture: its factored form, the floor of its covariances, networks with dropout and embeddings."""

import math

import pytest
import torch

from pyro_sb.bridges import Bridge, LightSB
from pyro_sb.bridges.light.fit import Likelihood
from pyro_sb.bridges.light.process import MixtureParameters, lower_triangular
from pyro_sb.bridges.light.solvers import LIGHT
from pyro_sb.nn import SetEmbedding
from tests.bridges.light.fits import QUICK, clusters, pairs, quick, quiet_fit
from tests.ops.potentials import F64, random_potential


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


def test_no_precision_exceeds_the_floors_however_far_the_network_goes():
    module = parameters(1)
    for parameter in module.net.head.parameters():
        torch.nn.init.normal_(parameter, std=1e4)
    module.floor.fill_(1e-4)
    law = module.law(torch.randn(50, 2, **F64), 1.0)
    assert float(law.covariances().detach().min()) >= 1e-4 * (1 - 1e-9)
    assert bool(torch.isfinite(law.log_prob(torch.zeros(50, 1, **F64))).all())


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_entries_fill_the_lower_triangle_row_by_row(dim):
    entries = torch.arange(1.0, 1 + 3 * dim * (dim + 1) // 2).reshape(3, -1)
    matrices = lower_triangular(entries, dim)
    rows, columns = torch.tril_indices(dim, dim)
    assert torch.equal(matrices[:, rows, columns], entries)
    assert torch.equal(matrices.triu(1), torch.zeros_like(matrices))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("width", [1e-2, 1e-4])
def test_a_narrow_axis_keeps_its_width(covariance, width):
    draws = torch.randn(400, 2, **F64) * torch.tensor([1.0, width], **F64)
    bridge = LightSB(2, num_components=4, covariance=covariance)
    bridge.fit(draws, num_updates=200, progress=False)
    ratio = bridge().sample((20_000,)).std(0) / draws.std(0)
    assert bool((ratio - 1).abs().max() < 0.1)


@pytest.mark.parametrize("dim", [1, 3])
def test_the_law_is_the_plan_from_the_origin(dim):
    module, context, y = parameters(dim), torch.randn(6, 2, **F64), torch.randn(6, 5, dim, **F64)
    for epsilon in (0.3, 2.0):
        potential, law = module(context, epsilon), module.law(context, epsilon)
        expected = potential.plan_log_prob(y, torch.zeros_like(y))
        found = torch.stack([law.log_prob(y[:, i]) for i in range(5)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Dropout


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
    monkeypatch.setitem(LIGHT, "likelihood", Watched())
    bridge = LightSB(2, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16), dropout=0.5)
    with pytest.raises(KeyError, match="enough"):
        bridge.fit(target, context=context, **QUICK)
    assert seen == [True] and not bridge.parameters_of.net.noisy


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_bad_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got"):
        LightSB(2, context_dim=1, dropout=dropout)


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


def test_with_a_context_too_a_second_fit_forgets_the_first():
    target, context, bridge = (
        clusters(300),
        torch.randn(300, 1, **F64),
        LightSB(2, num_components=3, epsilon=0.5, context_dim=1),
    )
    quick(bridge, target, context=context, num_updates=100, learning_rate=0.05)
    before = [p.detach().clone() for p in bridge.parameters_of.net.layers.parameters() if p.dim() == 2]
    bridge.parameters_of.reset()
    after = [p for p in bridge.parameters_of.net.layers.parameters() if p.dim() == 2]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
