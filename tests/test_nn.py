"""Networks: nothing before they are trained, the identity plus a correction, and a true new start."""

import pytest
import torch
from torch import nn

from pyro_sb.nn import (
    ContextNet,
    ResidualNet,
    SetEmbedding,
    TimeNet,
    embedding_config,
    embedding_from_config,
    embedding_size,
)


def test_a_context_net_says_nothing_before_it_is_trained_and_after_a_reset():
    net, context = ContextNet(3, 5, hidden=(8, 8)), torch.randn(4, 2, 3)
    assert net(context).shape == (4, 2, 5) and net(context).abs().max() == 0
    before = [p.detach().clone() for p in net.layers.parameters()]
    with torch.no_grad():
        net.head.weight.normal_()
    assert net(context).abs().max() > 0
    net.reset()
    assert net(context).abs().max() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, net.layers.parameters()))


def test_a_context_net_can_learn_at_once():
    # A head of zeros on a random body: the head's slope is not zero, or nothing would ever move
    net, context = ContextNet(1, 1, hidden=(8,)), torch.linspace(-1, 1, 9)[:, None]
    (net(context) - context).square().mean().backward()
    assert net.head.weight.grad.abs().max() > 0


def test_a_time_net_is_the_identity_and_a_correction():
    net, x = TimeNet(2), torch.randn(6, 3, 2)
    with torch.no_grad():
        for p in net.body.parameters():
            p.zero_()
    assert torch.equal(net(torch.tensor(0.3), x), x)


def test_a_time_net_broadcasts_times_and_follows_the_dtype_of_points():
    net, x = TimeNet(2).double(), torch.randn(6, 2, dtype=torch.float64)
    times = torch.rand(6)
    together = net(times, x)
    assert together.dtype == torch.float64
    for i in range(6):
        torch.testing.assert_close(together[i], net(times[i], x[i]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(net(torch.tensor(0.0), x), net(torch.tensor(1.0), x))


def test_a_residual_net_says_nothing_before_it_is_trained_and_can_learn_at_once():
    net, x = ResidualNet(2, 3, context_dim=4, hidden=(8, 8, 5)), torch.randn(6, 2)
    context, t = torch.randn(6, 4), torch.rand(6)
    assert torch.equal(net(t, x, context), torch.zeros(6, 3))
    net(t, x, context).sub(1).square().sum().backward()
    assert net.head.weight.grad.abs().max() > 0
    with torch.no_grad():
        net.head.weight.normal_()
    together = net(t, x, context)
    for i in range(6):
        torch.testing.assert_close(net(t[i], x[i], context[i]), together[i], rtol=1e-4, atol=1e-5)
    for changed in (net(1 - t, x, context), net(t, -x, context), net(t, x, -context)):
        assert not torch.allclose(changed, together)
    net.reset()
    assert net(t, x, context).abs().max() == 0


def test_a_set_has_no_order_and_no_number():
    embed, items = SetEmbedding(3, 5, hidden=(8, 8)).double(), torch.randn(4, 6, 3, dtype=torch.float64)
    out = embed(items.flatten(1))
    shuffled = embed(items[:, torch.randperm(6)].flatten(1))
    twice = embed(torch.cat([items, items], 1).flatten(1))
    assert out.shape == (4, 5)
    torch.testing.assert_close(shuffled, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(twice, out, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(embed(-items.flatten(1)), out)
    torch.testing.assert_close(embed.summary(shuffle(items).flatten(1)), embed.summary(items.flatten(1)))
    with pytest.raises(ValueError, match="items of size 3, got 7"):
        embed(torch.zeros(2, 7))


def shuffle(items):
    return items[:, torch.randperm(items.shape[1])]


def test_embeddings_are_saved_as_plain_values_where_they_can():
    embed = SetEmbedding(3, 5, hidden=(8,))
    again = embedding_from_config(embedding_config(embed))
    again.load_state_dict(embed.state_dict())
    context = torch.randn(2, 12)
    assert torch.equal(again(context), embed(context))
    assert embedding_config(None) is None and embedding_from_config(None) is None
    own = embedding_config(nn.Linear(2, 3))
    assert own == {"class": "Linear"}
    with pytest.raises(ValueError, match=r"got Linear\. Build it with embedding="):
        embedding_from_config(own)


def test_the_size_of_an_embedding_is_read_or_probed():
    assert embedding_size(SetEmbedding(3, 5), 12) == 5
    net = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)).double()
    assert embedding_size(net, 4) == 7 and net.training  # probed without a batch's statistics
    with pytest.raises(ValueError, match=r"\(n, 4\) to \(n, out_dim\)"):
        embedding_size(nn.Flatten(0), 4)
