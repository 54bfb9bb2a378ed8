"""Networks of bridges: of a context, of time and state, of exchangeable items."""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_sb.checks import whole, widths
from pyro_sb.threads import Pace

__all__ = [
    "ContextNet",
    "ResidualNet",
    "SetEmbedding",
    "TimeNet",
    "embedding_config",
    "embedding_from_config",
    "embedding_size",
    "with_constant_parameters",
]


def __dir__() -> list[str]:
    return sorted(__all__)


Answer = TypeVar("Answer")


class ContextNet(nn.Module):
    """Network from a context to a vector, zero before it is trained; layers as wide as the one before are residual.

    Args:
        context_dim: Size of the context, standardised.
        out_dim: Size of the output.
        hidden: Widths of the hidden layers.
        dropout: Share of the features that a residual layer drops while ``noisy`` is set, in [0, 1): a fit sets it,
            so that a fitted network is the same whatever ``train()`` and ``eval()`` say.

    Example:
        >>> ContextNet(3, 5)(torch.ones(2, 3)).abs().max().item()
        0.0
    """

    def __init__(
        self, context_dim: int, out_dim: int, *, hidden: tuple[int, ...] = (64, 64), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.noisy = dropout, False
        self.first = nn.Linear(context_dim, hidden[0])
        self.layers = nn.ModuleList(ResidualLayer(a, b) for a, b in zip(hidden[:1] + hidden[:-1], hidden))
        self.head = nn.Linear(hidden[-1], out_dim)
        self.reset()

    def reset(self) -> None:
        """New random layers, a head of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, context: Tensor) -> Tensor:
        """Shapes ``(*, context_dim)`` to ``(*, out_dim)``."""
        h = self.first(context)
        for layer in self.layers:
            h = layer(h, self.dropout if self.noisy else 0.0)
        return self.head(nn.functional.silu(h))


class ResidualLayer(nn.Module):
    """A normalised two-layer step, added to its input where the widths agree. ``(*, a)`` to ``(*, b)``."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, h: Tensor, dropout: float = 0.0) -> Tensor:
        """A step with a share of its inner features dropped."""
        inner = nn.functional.silu(self.up(self.norm(h)))
        ahead = self.down(nn.functional.dropout(inner, dropout, training=dropout > 0))
        return h + ahead if ahead.shape == h.shape else ahead


class TimeNet(nn.Module):
    """Network of time and state, a correction to the identity: ``(t, x)`` to a point of the same shape as x.

    Args:
        dim: Size of the state.
        hidden: Widths of the hidden layers.

    Example:
        >>> TimeNet(2)(torch.tensor(0.5), torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, dim: int, *, hidden: tuple[int, ...] = (32, 32)) -> None:
        from zuko.nn import MLP

        super().__init__()
        self.body = MLP(dim + 1, dim, hidden_features=hidden, activation=nn.SiLU)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Shapes ``(*)`` that broadcast and ``(*, dim)`` to ``(*, dim)``."""
        time = t.to(x).expand(x.shape[:-1])[..., None]
        return x + self.body(torch.cat([time, x], -1))


class ResidualNet(nn.Module):
    """Residual network of a time, a state and a context, zero before it is trained.

    Args:
        dim: Size of the state.
        out_dim: Size of the output.
        context_dim: Size of the context's features, 0 for none.
        hidden: Widths of the layers; those as wide as the one before are residual.
        num_frequencies: Fourier features of the time, a sine and a cosine each.

    Example:
        >>> ResidualNet(2, 3)(torch.tensor(0.5), torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        context_dim: int = 0,
        hidden: tuple[int, ...] = (128, 128, 128),
        num_frequencies: int = 16,
    ) -> None:
        super().__init__()
        self.state = nn.Linear(dim, hidden[0])
        self.time = nn.Linear(2 * num_frequencies + 1, hidden[0], bias=False)
        self.context = nn.Linear(context_dim, hidden[0], bias=False) if context_dim else None
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(hidden[:1] + hidden[:-1], hidden))
        self.head = nn.Linear(hidden[-1], out_dim)
        waves = 2 * math.pi * 2.0 ** torch.linspace(-2, 3, num_frequencies)
        self.register_buffer("frequencies", waves, persistent=False)
        self.pace = Pace()
        self.reset()

    def reset(self) -> None:
        """New random layers, a head of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Times ``(*)`` in about [0, 1], states ``(*, dim)``, contexts ``(*, context_dim)``, to ``(*, out_dim)``."""
        with self.pace.call(x[..., 0].numel(), device=x.device):
            return self._answer(t, x, context)

    def _answer(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        waves = t[..., None] * self.frequencies
        h = self.state(x) + self.time(torch.cat([t[..., None], waves.sin(), waves.cos()], -1))
        if self.context is not None:
            h = h + self.context(context)
        for layer in self.layers:
            ahead = layer(nn.functional.silu(h))
            h = h + ahead if ahead.shape == h.shape else ahead
        return self.head(nn.functional.silu(h))


class SetEmbedding(nn.Module):
    """Features of exchangeable items: a net of each item, their mean, a net of the mean.

    The order of the items does not matter, and their number enters nowhere.

    Args:
        item_dim: Size of an item.
        out_dim: Size of the features.
        hidden: Widths of both nets.

    Example:
        >>> embed = SetEmbedding(2, 5)
        >>> items = torch.randn(3, 4, 2)
        >>> torch.allclose(embed(items.flatten(1)), embed(items.flip(1).flatten(1)), atol=1e-6)
        True
    """

    def __init__(self, item_dim: int, out_dim: int, *, hidden: tuple[int, ...] = (64, 64)) -> None:
        from zuko.nn import MLP

        super().__init__()
        self.item_dim = whole("item_dim", item_dim, cure="Write the number of columns of an item.")
        self.out_dim, self.hidden = whole("out_dim", out_dim, cure="Write 16."), widths("hidden", hidden)
        self.item = MLP(self.item_dim, self.hidden[-1], hidden_features=self.hidden, activation=nn.SiLU)
        self.pooled = MLP(self.hidden[-1], self.out_dim, hidden_features=self.hidden, activation=nn.SiLU)

    def reset(self) -> None:
        """New random layers."""
        for module in self.modules():
            if callable(getattr(module, "reset_parameters", None)):  # zuko's linear layer is no nn.Linear
                cast(Any, module).reset_parameters()

    def items(self, context: Tensor) -> Tensor:
        """The items ``(*, k, item_dim)`` of a flat context ``(*, k * item_dim)``."""
        if context.shape[-1] % self.item_dim:
            raise ValueError(
                f"context must hold items of size {self.item_dim}, got {context.shape[-1]} columns. "
                "Flatten (k, item_dim) to k * item_dim."
            )
        return context.unflatten(-1, (-1, self.item_dim))

    def summary(self, context: Tensor) -> Tensor:
        """Mean and mean square of the items ``(*, 2 * item_dim)``: what an affine regression can see."""
        items = self.items(context)
        return torch.cat([items.mean(-2), items.square().mean(-2)], -1)

    def forward(self, context: Tensor) -> Tensor:
        """Shapes ``(*, k * item_dim)`` to ``(*, out_dim)``."""
        return self.pooled(self.item(self.items(context)).mean(-2))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"item_dim": self.item_dim, "out_dim": self.out_dim, "hidden": self.hidden}


class Call(nn.Module):
    """A function of a module's own, such as a method, as the forward of a module that holds it."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        """The function's answer."""
        return self.function(*args)


def with_constant_parameters(module: nn.Module, function: Callable[..., Answer], *args: Any) -> Answer:
    """Answer of a module's method, with gradients in its arguments and none in the module's parameters.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with_constant_parameters(layer, layer.forward, torch.zeros(2)).requires_grad
        False
    """
    constants = {f"module.{name}": value.detach() for name, value in module.named_parameters()}
    return functional_call(Call(module, function), constants, args)


def embedding_config(module: nn.Module | None) -> dict[str, Any] | None:
    """An embedding as plain values: a `SetEmbedding` whole, of a user's own module the name of its class alone.

    Example:
        >>> embedding_config(SetEmbedding(2, 5))
        {'class': 'SetEmbedding', 'item_dim': 2, 'out_dim': 5, 'hidden': (64, 64)}
    """
    if module is None:
        return None
    if type(module) is SetEmbedding:
        return {"class": "SetEmbedding"} | module.config()
    return {"class": type(module).__name__}


def embedding_from_config(config: dict[str, Any] | None) -> nn.Module | None:
    """The embedding that `embedding_config` describes; an error for a user's own module, which no file can rebuild."""
    if config is None:
        return None
    if config["class"] != "SetEmbedding" or len(config) == 1:
        raise ValueError(
            f"a bridge with an embedding of your own class cannot be rebuilt from a file, got {config['class']}. Build "
            'it with embedding=..., then bridge.load_state_dict(torch.load(path, weights_only=True)["state"]).'
        )
    return SetEmbedding(**{key: value for key, value in config.items() if key != "class"})


def embedding_size(module: nn.Module, context_dim: int) -> int:
    """Size of an embedding's features: its ``out_dim``, else the width of its answer to one row of zeros.

    Example:
        >>> embedding_size(nn.Linear(3, 4), 3)
        4
    """
    out_dim = getattr(module, "out_dim", None)
    if isinstance(out_dim, int):
        return out_dim
    like = next((p for p in module.parameters()), torch.zeros(()))
    training = module.training
    module.eval()
    with torch.no_grad():
        features = module(like.new_zeros(1, context_dim))
    module.train(training)
    if features.dim() != 2 or len(features) != 1:
        raise ValueError(
            f"embedding must map (n, {context_dim}) to (n, out_dim), got {tuple(features.shape)} for one row. "
            "Flatten what it returns."
        )
    return int(features.shape[1])
