"""Pairs of points and inverses that follow the parameters from minibatch to minibatch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Points x of both sides with their inverses y, in the shapes that a potential takes."""

    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    context: Tensor | None

    def rows(self, index: Tensor) -> "Pairs":
        """Some of the pairs; a single source point serves all."""
        x0, y0 = (v if len(v) == 1 else v[index] for v in (self.x0, self.y0))
        context = None if self.context is None else self.context[index]
        return Pairs(x0, y0, self.x1[index], self.y1[index], context)


class Pool:
    """Pairs to take minibatches from, whose inverses follow the parameters by a Newton step a use."""

    def __init__(self, pairs: Pairs) -> None:
        own = {name: getattr(pairs, name).clone(memory_format=torch.contiguous_format) for name in ("y0", "y1")}
        self.pairs, self.used = pairs._replace(**own), 0  # an inverse may be the very tensor that was inverted
        self._queue = torch.empty(0, dtype=torch.long, device=pairs.x1.device)

    def next(self, num: int) -> Tensor:
        """Indices of a minibatch, each once a round."""
        if len(self._queue) < num:
            self._queue = torch.randperm(len(self.pairs.x1), device=self._queue.device)
        index, self._queue = self._queue[:num], self._queue[num:]
        self.used += num
        return index

    def put(self, index: Tensor, y0: Tensor, y1: Tensor) -> None:
        """Take better inverses."""
        if len(self.pairs.y0) == 1:
            self.pairs.y0.copy_(y0)
        else:
            self.pairs.y0[index] = y0
        self.pairs.y1[index] = y1
