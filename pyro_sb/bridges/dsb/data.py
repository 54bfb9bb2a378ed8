"""Data of a diffusion Schrödinger bridge: pairs of ends, whole paths of the other chain, and the source."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.data import PairsReading, read_source
from pyro_sb.bridges.dsb.half import Chain, Given, Guide, spread_times
from pyro_sb.checks import as_draws
from pyro_sb.fingerprint import fingerprint
from pyro_sb.ops.brownian import pinned
from pyro_sb.ops.regression import Affine
from pyro_sb.ops.sinkhorn import sinkhorn

BLOCK = 1024  # points a side of one transport problem
SWEEPS = 500  # of Sinkhorn's; the fit corrects what they leave


class Lesson(NamedTuple):
    """States at own times, the end ahead that each should expect, contexts, and a step size where there is one.

    Args:
        u: Shape ``(n,)``.
        states: Shape ``(n, dim)``.
        ends: Shape ``(n, dim)``.
        context: Standardised. Shape ``(n, context_dim)``, or None.
        sizes: Of the steps that the ends were read from. Shape ``(n,)``, or None.
    """

    u: Tensor
    states: Tensor
    ends: Tensor
    context: Tensor | None = None
    sizes: Tensor | None = None


class EndPairs(NamedTuple):
    """Ends of paths, in the order of the half that learns from them.

    Args:
        begin: Where its paths begin. Shape ``(n, dim)``.
        end: The end ahead. Shape ``(n, dim)``.
        context: Shape ``(n, context_dim)``, or None.
    """

    begin: Tensor
    end: Tensor
    context: Tensor | None

    def lesson(self, num: int, epsilon: float) -> Lesson:
        """States of Brownian bridges between some of the pairs."""
        index = torch.randint(len(self.begin), (num,), device=self.begin.device)
        return self.at(spread_times(num, self.begin), index, epsilon)

    def at(self, u: Tensor, index: Tensor | slice, epsilon: float) -> Lesson:
        """The same at given times."""
        begin, end = self.begin[index], self.end[index]
        context = None if self.context is None else self.context[index]
        return Lesson(u, pinned(begin, end, u, epsilon), end, context)


class Paths(NamedTuple):
    """Paths of the other chain, in the order of the half that learns to reverse it, with goals.

    Args:
        states: Shape ``(K + 1, n, dim)``.
        goals: Of all but the last. Shape ``(K, n, dim)``.
        times: Own times. Shape ``(K + 1,)``.
        context: Shape ``(n, context_dim)``, or None.
    """

    states: Tensor
    goals: Tensor
    times: Tensor
    context: Tensor | None

    def lesson(self, num: int, epsilon: float) -> Lesson:
        """States of some paths at random steps; the end ahead is where the goal's drift would lead."""
        step = torch.randint(len(self.goals), (num,), device=self.goals.device)
        index = torch.randint(self.goals.shape[1], (num,), device=self.goals.device)
        states, u = self.states[step, index], self.times[step]
        sizes = self.times[step + 1] - u
        ends = states + ((1 - u) / sizes)[:, None] * (self.goals[step, index] - states)
        return Lesson(u, states, ends, None if self.context is None else self.context[index], sizes)


class ReferenceChain(NamedTuple):
    r"""The noising chain that iterative proportional fitting starts from: Brownian, or Ornstein-Uhlenbeck.

    .. math:: x' = x - \tfrac{\epsilon h}{2} \frac{x - m}{v} + \sqrt{\epsilon h}\, z ,

    without the second term where it is Brownian.

    Args:
        times: Shape ``(K + 1,)``.
        epsilon: Variance over [0, 1].
        variance: v of the end that it noises to, ``(dim,)``; None for Brownian motion.
    """

    times: Tensor
    epsilon: float
    variance: Tensor | None

    def run(self, x: Tensor, given: Given) -> list[Tensor]:
        """States at all times."""
        states = [x]
        for k, size in enumerate(self.times.diff()):
            x = self.mean(k, x, given) + (self.epsilon * size).sqrt() * torch.randn_like(x)
            states.append(x)
        return states

    def mean(self, k: int, x: Tensor, given: Given) -> Tensor:
        """Mean of the state after step k."""
        if self.variance is None:
            return x
        return x - 0.5 * self.epsilon * (self.times[k + 1] - self.times[k]) * (x - given.ahead) / self.variance


def reversed_paths(
    chain: Chain | ReferenceChain, x: Tensor, given: Given, context: Tensor | None, matched: bool = False
) -> Paths:
    r"""Paths of a chain from x, as what its reversal learns from.

    A state y was stepped to from y', by a step of mean B(y') . Its goal is y', whose mean given y is that of the
    reversed step; or, ``matched``, the published :math:`y + B(y') - B(y)`, which has the mean of a reversed step of
    unchanged variance, up to the second order in the step's size.
    """
    states = chain.run(x, given)
    goals = states[:-1]
    if matched:
        pairs = enumerate(zip(states[:-1], states[1:]))
        goals = [y + chain.mean(k, before, given) - chain.mean(k, y, given) for k, (before, y) in pairs]
    return Paths(torch.stack(states[::-1]), torch.stack(goals[::-1]), chain.times, context)


def sinkhorn_pairs(begin: Tensor, end: Tensor, epsilon: float) -> Tensor:
    """An index among the beginnings for each end, drawn from entropic plans between blocks. Shape ``(n,)``."""
    chosen = []
    for first in range(0, len(end), BLOCK):
        x, y = begin[first : first + BLOCK], end[first : first + BLOCK]
        points, others = y.double() / epsilon**0.5, x.double() / epsilon**0.5
        scaling = sinkhorn(points, others, tolerance=1e-3, max_iter=SWEEPS)
        affinity = -0.5 * torch.cdist(points, others).square()
        plan = (affinity + scaling.log_v).softmax(1)
        chosen.append(first + torch.multinomial(plan, 1)[:, 0])
    return torch.cat(chosen)


def packed(rows: EndPairs | Paths) -> dict[str, Any]:
    """As tensors by name, for a checkpoint."""
    return {"kind": type(rows).__name__} | rows._asdict()


def unpacked(saved: dict[str, Any]) -> EndPairs | Paths:
    """The inverse of `packed`."""
    fields = {key: value for key, value in saved.items() if key != "kind"}
    return EndPairs(**fields) if saved["kind"] == "EndPairs" else Paths(**fields)


FEW = 20  # draws of which none is held out


class SourceReading(NamedTuple):
    """The source, read.

    Args:
        kind: ``"moments"``, ``"law"`` or ``"draws"``.
        guide: Mean and covariance.
        deviations: Of independent normals, where the source is these. Shape ``(dim,)``, else ``(0,)``.
        points: Of draws. Shape ``(M, dim)``, else ``(0, dim)``.
        law: The distribution, if it is one.
        train: Indices of the points to learn from.
        test: Of those to judge by.
    """

    kind: str
    guide: Guide
    deviations: Tensor
    points: Tensor
    law: Distribution | None
    train: Tensor
    test: Tensor

    def digest(self) -> str:
        """Text that tells this source from others."""
        return fingerprint(self.kind, self.guide.affine.location, self.guide.covariance, self.points)


def read_source_law(
    read: PairsReading, source: Any, dim: int, num_law_draws: int, held_out: float | Tensor
) -> SourceReading:
    """The source checked and measured; a share of its draws is held out, a tenth where the target has a mask."""
    like = read.affine.location
    none, no_points, index = like.new_empty(0), like.new_empty(0, dim), torch.empty(0, dtype=torch.long)
    if source is None:
        variances = read.covariance.diagonal()
        guide = Guide(read.affine, variances.diag())
        return SourceReading("moments", guide, variances.sqrt(), no_points, None, index, index)
    source = read_source(source, dim, like, point=False)
    law = source if isinstance(source, Distribution) else None
    draws = source if law is None else as_draws("source", law, dim, num_draws=num_law_draws, like=like)
    if bool((draws == draws[0]).all()):
        raise ValueError(
            f"source must vary, got {len(draws)} equal draws. From a point take LightSB(dim).fit(target, source=point)."
        )
    centred = (draws - draws.mean(0)).double()
    guide = Guide(Affine(draws.mean(0), like.new_empty(dim, 0)), (centred.T @ centred / len(draws)).to(like))
    if law is not None:
        return SourceReading("law", guide, none, no_points, law, index, index)
    order = torch.randperm(len(draws), device=like.device)
    share = held_out if isinstance(held_out, float) else 0.1
    num = int(share * len(draws)) if len(draws) >= FEW else 0
    return SourceReading("draws", guide, none, draws.clone(), None, order[num:], order[:num])
