"""The small law that a kernel's warm-up makes is the bridge's own."""

import torch

from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.langevin.setup import MetricTransitions


def test_the_law_of_a_kernel_is_the_bridges():
    points, weights = torch.randn(200, 3, dtype=torch.float64), torch.rand(200, dtype=torch.float64) + 0.1
    metric = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    bridge = KernelLangevinBridge(3, metric=metric, epsilon=0.7, scheme="plain")
    bridge.fit(points, weights=weights, progress=False)
    law, x = MetricTransitions(points, weights, metric, 0.7), torch.randn(50, 3, dtype=torch.float64)
    assert torch.equal(law.conditional_mean(x), bridge.conditional_mean(x))
    assert torch.equal(law.transition_probabilities(x), bridge.transition_probabilities(x))
    assert torch.equal(law.metric_cholesky, bridge.metric_cholesky)
    assert law.epsilon == bridge.epsilon
