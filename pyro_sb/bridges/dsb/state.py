"""What a diffusion Schrödinger bridge holds: two halves, its source, and how rows pass through both."""

import copy
import math
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.dsb.data import SourceReading
from pyro_sb.bridges.dsb.half import Chain, Given, Guide, HalfBridge
from pyro_sb.bridges.options import check_choice
from pyro_sb.bridges.pairs import Reading, summarise
from pyro_sb.nn import embedding_config, embedding_from_config
from pyro_sb.ops.brownian import SCHEDULES, step_times

METHODS = ("imf", "ipf")
DEFAULT_STEPS = {"imf": (50, "triangular"), "ipf": (20, "constant")}
VARIANCES = ("measured", "reference")


class DSBState(Bridge):
    """The half of `DSB` that is read, started, saved and loaded; arguments as there."""

    context_location: Tensor
    context_scale: Tensor
    source_deviations: Tensor
    source_points: Tensor

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        epsilon: float = 1.0,
        method: str = "imf",
        chain_steps: int | None = None,
        schedule: str | None = None,
        variance: str = "measured",
        hidden: tuple[int, ...] = (128, 128, 128),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        if not 0 < (float(epsilon) if isinstance(epsilon, SupportsFloat) else math.nan) < math.inf:
            raise ValueError(
                f"epsilon must be positive and finite, got {epsilon}. Write the variance of the reference over [0, 1]."
            )
        if embedding is not None and not context_dim:
            raise ValueError("embedding needs context_dim > 0, got 0: it maps contexts to features.")
        check_choice("method", method, METHODS)
        steps, grid = DEFAULT_STEPS[method]
        chain_steps, schedule = steps if chain_steps is None else chain_steps, schedule or grid
        if not chain_steps >= 1 or chain_steps % 1 != 0 or not hidden:
            raise ValueError(
                "chain_steps must be a whole number, at least 1, and hidden name a layer, "
                f"got {chain_steps} and {hidden}."
            )
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("variance", variance, VARIANCES)
        self.epsilon, self.method, self.chain_steps = float(epsilon), method, int(chain_steps)
        self.schedule, self.variance, self.hidden = schedule, variance, tuple(map(int, hidden))
        self.ahead = HalfBridge(dim, context_dim, self.hidden, embedding)
        self.back = HalfBridge(dim, context_dim, self.hidden, copy.deepcopy(embedding))
        for name in DSBState.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.source: Distribution | None = None
        self._source_kind = "moments"
        self._learnt_steps: tuple[int, str] | None = None  # of IPF, whose networks know no other times
        self.eval()

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """Path, where the source has a density; None where it is draws."""
        return None if self._source_kind == "draws" else "path"

    @property
    def density_hint(self) -> str:  # type: ignore[override]
        """What would have one."""
        return "Its source is draws; fit with source omitted, or a distribution."

    def like(self) -> Tensor:
        """A fitted tensor; an error before ``fit``."""
        if not len(self.ahead.gain):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.ahead.gain

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("epsilon", "method", "chain_steps", "schedule", "variance", "hidden")
        embedding = {"embedding": embedding_config(self.ahead.embedding)}
        return super().config() | {name: getattr(self, name) for name in names} | embedding

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Bridge":
        """Build the bridge that `config` describes."""
        return cls(**(config | {"embedding": embedding_from_config(config["embedding"])}))

    def get_extra_state(self) -> dict[str, Any]:
        """What the source was, and the steps that IPF learnt."""
        return {"source_kind": self._source_kind, "learnt_steps": self._learnt_steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a saved kind of source and steps; a distribution must be given again."""
        self._source_kind, self._learnt_steps = state["source_kind"], state.get("learnt_steps")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "ahead.gain")
        if isinstance(saved, Tensor) and len(saved):
            self.to(saved)
            if prefix + "ahead.step_starts" not in state_dict:
                raise ValueError(
                    "a saved DSB must hold the variances of its steps, got a file without them, of an earlier version. "
                    "Fit the bridge again."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _adopt(self, read: Reading, source: SourceReading) -> None:
        """Take units, the source and the Gaussian bridge between the ends; the networks start anew."""
        target = Guide(read.affine, read.covariance)
        self.to(read.affine.location)
        self.source_deviations, self.source_points = source.deviations, source.points
        self.source, self._source_kind = source.law, source.kind
        self._learnt_steps = (self.chain_steps, self.schedule) if self.method == "ipf" else None
        self.context_location, self.context_scale = read.contexts
        self.ahead.adopt(source.guide, target, self.epsilon)
        self.back.adopt(target, source.guide, self.epsilon)
        if self.method == "ipf" or self.variance == "reference":
            self.ahead.take_steps(self._times())
            self.back.take_steps(self._times())

    def _chain(self, forward: bool, num_steps: int | None = None) -> Chain:
        """One of the chains; the grid is symmetric, so that both have the same own times."""
        return Chain(self.ahead if forward else self.back, self._times(num_steps), self.epsilon)

    def _times(self, num_steps: int | None = None) -> Tensor:
        """Times of the chain, from 0 to 1; refused where IPF has learnt others."""
        steps = self.chain_steps, self.schedule
        if self._learnt_steps is not None and steps != self._learnt_steps:
            raise ValueError(
                "IPF learns its own steps: chain_steps and schedule must stay as in fit, "
                f"{self._learnt_steps}, got {steps}. Set them back, fit again, or "
                'take method="imf", whose steps are free after the fit.'
            )
        return step_times(num_steps or self.chain_steps, self.schedule).to(self.like())

    def _given(self, half: HalfBridge, rows: Tensor | None) -> Given:
        """What a half knows of standardised contexts."""
        return half.given(rows, None if rows is None else summarise(half.embedding, rows))

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.context_location) / self.context_scale

    def _start(self, num: int, given: Given) -> Tensor:
        """Source points, those of given contexts where the source depends on them."""
        like = self.like()
        if self._source_kind == "moments":
            noise = torch.randn(num, self.dim, dtype=like.dtype, device=like.device)
            return given.begin + self.source_deviations * noise
        if self._source_kind == "draws":
            return self.source_points[torch.randint(len(self.source_points), (num,), device=like.device)]
        return self._law().sample((num,)).to(like)

    def _start_log_prob(self, x: Tensor, given: Given) -> Tensor:
        """Log density of the source. Shape ``(n,)``."""
        if self._source_kind == "law":
            return self._law().log_prob(x).to(x)
        noise = (x - given.begin) / self.source_deviations
        return -0.5 * noise.square().sum(-1) - (self.source_deviations * math.sqrt(2 * math.pi)).log().sum()

    def _law(self) -> Distribution:
        if self.source is None:
            raise RuntimeError(
                "a loaded bridge must be told its source, which was a distribution and is not saved. "
                "Write bridge.source = ..., or use transport(x0)."
            )
        return self.source

    def _rows(self, x: Any, context: Any) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Points and standardised contexts, broadcast, as flat rows; the points' shape before."""
        x, context, shape = self.flat_rows(x, context)
        return x, self._context_rows(context), shape
