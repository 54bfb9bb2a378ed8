"""Networks: nothing before they are trained, the identity plus a correction, and a true new start."""

import torch

from pyro_sb.nn import ContextNet, TimeNet


def test_a_context_net_says_nothing_before_it_is_trained_and_after_a_reset():
    net, context = ContextNet(3, 5, (8, 8)), torch.randn(4, 2, 3)
    assert net(context).shape == (4, 2, 5) and net(context).abs().max() == 0
    before = [p.detach().clone() for p in net.body.parameters()]
    with torch.no_grad():
        net.head.weight.normal_()
    assert net(context).abs().max() > 0
    net.reset()
    assert net(context).abs().max() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, net.body.parameters()))


def test_a_context_net_can_learn_at_once():
    # A head of zeros on a random body: the head's slope is not zero, or nothing would ever move
    net, context = ContextNet(1, 1, (8,)), torch.linspace(-1, 1, 9)[:, None]
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
