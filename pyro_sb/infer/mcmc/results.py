"""Draws of a run by site, with their statistics and figures: made of a record, joined to others, kept in files."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.mcmc.figures import per_chain
from pyro_sb.infer.mcmc.record import Block, Record, in_chunks, states
from pyro_sb.infer.model.log_joint import Evaluations
from pyro_sb.plain import to_plain

__all__ = ["Results"]

Sites = dict[str, Tensor]


@dataclass(frozen=True)
class Results:
    """Draws of all chains, each of shape ``(chains, draws, *site)``.

    Attributes:
        samples: Latent and deterministic sites in their own space.
        unconstrained: Latent sites, unconstrained.
        discrete: Enumerated sites that belong to the draws; None where none were drawn.
        stats: The kernel's statistics, ``(chains, draws)`` each.
        figures: The kernel's figures, a dict a chain.
        seconds: Wall time of ``"warmup"`` and of ``"sampling"``.
        evaluations: Of the log joint, in rows.
        num_samples: Draws of a chain.
    """

    samples: Sites
    unconstrained: Sites
    discrete: Sites | None
    stats: Sites
    figures: list[dict[str, Any]]
    seconds: dict[str, float]
    evaluations: Evaluations
    num_samples: int

    @classmethod
    def of(cls, record: Record, kernel: Any, transforms: Any, num_chains: int) -> "Results":
        """Those of a record, made by a kernel; ``transforms[site].inv`` maps to the sites' own space."""
        unconstrained, stats = record.sites(), record.statistics()
        samples = dict(unconstrained)
        for name in transforms.keys() & samples.keys():
            samples[name] = transforms[name].inv(samples[name])
        samples.update(record.deterministic())
        return cls(
            samples=samples,
            unconstrained=unconstrained,
            discrete=record.discrete() or None,
            stats=stats,
            figures=per_chain(kernel.diagnostics(), stats.get("diverging"), num_chains),
            seconds={"warmup": record.warmup_seconds, "sampling": record.seconds - record.warmup_seconds},
            evaluations=dataclasses.replace(kernel.log_joint.evaluations),
            num_samples=record.num_draws,
        )

    def after(self, earlier: "Results", log_joint: Any) -> "Results":
        """Earlier draws and then these; evaluations and the kernel's figures are of both already."""
        discrete = self.discrete
        if discrete is None and earlier.discrete is not None:
            discrete = self.drawn_discrete(log_joint)
        both = earlier.discrete is not None and discrete is not None
        stats = _joined(earlier.stats, self.stats)
        figures = [dict(chain) for chain in self.figures]
        for i, chain in enumerate(figures):
            if "diverging" in stats:
                chain["divergences"] = stats["diverging"][i].nonzero().flatten().tolist()
        return Results(
            samples=_joined(earlier.samples, self.samples),
            unconstrained=_joined(earlier.unconstrained, self.unconstrained),
            discrete=_joined(earlier.discrete or {}, discrete or {}) if both else None,
            stats=stats,
            figures=figures,
            seconds={name: value + self.seconds[name] for name, value in earlier.seconds.items()},
            evaluations=self.evaluations,
            num_samples=earlier.num_samples + self.num_samples,
        )

    def drawn_discrete(self, log_joint: Any) -> Sites:
        """New draws of the enumerated sites given those of the others."""
        return in_chunks(log_joint.discrete, states(Block(self.unconstrained, self.stats), log_joint))

    @property
    def num_divergences(self) -> int:
        """Draws that diverged, of all chains."""
        return sum(len(chain["divergences"]) for chain in self.figures)

    def packed(self) -> dict[str, Any]:
        """Tensors and plain values, for a file."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts = {"evaluations": [self.evaluations.density, self.evaluations.gradient]}
        return own | counts | {"figures": to_plain(self.figures, name="figures")}

    @classmethod
    def unpacked(cls, saved: dict[str, Any]) -> "Results":
        """Those that `packed` gave."""
        made = cls(**saved | {"evaluations": Evaluations(*saved["evaluations"])})
        sizes = {value.shape[1] for value in (made.samples | made.unconstrained | made.stats).values()}
        if not sizes <= {made.num_samples}:
            raise ValueError(f"draws must be {made.num_samples} a chain at every site, got {sorted(sizes)}.")
        return made


def _joined(before: Sites, further: Sites) -> Sites:
    """Draws ``(chains, draws, ...)``, and further ones after them."""
    return {name: torch.cat([value, further[name].to(value)], 1) for name, value in before.items()}
