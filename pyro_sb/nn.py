"""Networks that more than one bridge learns with."""

import torch
from torch import Tensor, nn
from zuko.nn import MLP


class ContextNet(nn.Module):
    """Network from a context to a vector, zero before it is trained.

    Args:
        context_dim: Size of the context, standardised.
        out_dim: Size of the output.
        hidden: Widths of the hidden layers.

    Example:
        >>> ContextNet(3, 5)(torch.ones(2, 3)).abs().max().item()
        0.0
    """

    def __init__(self, context_dim: int, out_dim: int, hidden: tuple[int, ...] = (64, 64)) -> None:
        super().__init__()
        self.body = MLP(context_dim, hidden[-1], hidden_features=hidden, activation=nn.SiLU)
        self.head = nn.Linear(hidden[-1], out_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def reset(self) -> None:
        """Start anew: a random body, a head of zeros."""
        for module in self.body.modules():
            if hasattr(module, "reset_parameters"):  # zuko's linear layer is no nn.Linear
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, context: Tensor) -> Tensor:
        """Shapes ``(*, context_dim)`` to ``(*, out_dim)``."""
        return self.head(nn.functional.silu(self.body(context)))


class TimeNet(nn.Module):
    """Network of time and state, a correction to the identity: ``(t, x)`` to a point of the same shape as x.

    Args:
        dim: Size of the state.
        hidden: Widths of the hidden layers.

    Example:
        >>> TimeNet(2)(torch.tensor(0.5), torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, dim: int, hidden: tuple[int, ...] = (32, 32)) -> None:
        super().__init__()
        self.body = MLP(dim + 1, dim, hidden_features=hidden, activation=nn.SiLU)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Shapes ``(*)`` that broadcast and ``(*, dim)`` to ``(*, dim)``."""
        time = t.to(x).expand(x.shape[:-1])[..., None]
        return x + self.body(torch.cat([time, x], -1))
