"""Weighted draws of self-normalised importance sampling: sum_i w_i f(theta_i) / sum_i w_i."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.infer.model.run import Run, html_table
from pyro_sb.weights import effective_sample_size, log_evidence, pareto_k

__all__ = ["ImportanceDraws", "weigh"]


@dataclass(frozen=True, repr=False)
class ImportanceDraws:
    r"""Weighted draws: :math:`\log w = \log p(\theta, y) - \log q(\theta | y)`.

    For a batch of B observations every figure is a tensor ``(B,)``; for one it is a number.

    Attributes:
        sites: Draws in their own space. Shape ``(n, *site)`` or ``(n, B, *site)``.
        log_weights: Not normalised. Shape ``(n,)`` or ``(n, B)``.
        k_hat: Pareto k of the weights: above 0.7 they cannot be trusted.
        ess_share: Effective sample size over n, in [0, 1].
        log_evidence: Of the model, in nats: unbiased for the evidence itself.
        log_evidence_error: Its standard error.
    """

    sites: dict[str, Tensor]
    log_weights: Tensor
    k_hat: Tensor | float
    ess_share: Tensor | float
    log_evidence: Tensor | float
    log_evidence_error: Tensor | float

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one over the draws. Shape of ``log_weights``."""
        if bool(torch.isneginf(self.log_weights).all(0).any()):
            raise ValueError("some weight must be positive, but every weight is zero. Use mcmc(), or check the data.")
        return torch.softmax(self.log_weights, 0)

    def expectation(self, values: Tensor) -> Tensor:
        """Self-normalised mean of ``values``, ``(n, *)`` or ``(n, B, *)``, over the draws."""
        weights = self.weights
        extra = values.dim() - weights.dim()
        return (weights.reshape(*weights.shape, *[1] * extra) * values).sum(0)

    def resample(self, num: int) -> dict[str, Tensor]:
        """Equally weighted draws, with replacement. Shape ``(num, *site)`` or ``(num, B, *site)``."""
        weights = self.weights
        if weights.dim() == 1:
            index = torch.multinomial(weights, num, replacement=True)
            return {name: value[index] for name, value in self.sites.items()}
        index = torch.multinomial(weights.T, num, replacement=True).T  # (num, B)
        column = torch.arange(weights.shape[1], device=weights.device)
        return {name: value[index, column] for name, value in self.sites.items()}

    def as_run(self) -> Run:
        """One chain of equally weighted draws, as many as the effective size: as exports and audits read them."""
        num = max(1, round(float(torch.as_tensor(self.ess_share).min()) * len(self.log_weights)))
        return Run(lambda: {name: value[None] for name, value in self.resample(num).items()})

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {name}: {value}" for name, value in self._figures())])

    def _repr_html_(self) -> str:
        """Table of the weights' figures."""
        return html_table(self._title(), self._figures())

    def _title(self) -> str:
        num, batch = len(self.log_weights), self.log_weights.shape[1:]
        of = f" for each of {batch[0]} observations" if batch else ""
        sites = ", ".join(f"{name} {tuple(value.shape[1 + len(batch) :])}" for name, value in self.sites.items())
        return f"ImportanceDraws: {num} weighted draws of {sites}{of}"

    def _figures(self) -> list[tuple[str, str]]:
        return [
            ("Pareto k", _range(self.k_hat, ".2f")),
            ("effective share", _range(self.ess_share, ".3f")),
            ("log evidence", _range(self.log_evidence, ".3f")),
            ("its standard error", _range(self.log_evidence_error, ".3f")),
        ]


def weigh(sites: dict[str, Tensor], log_weights: Tensor, batched: bool) -> ImportanceDraws:
    """Weighted draws with their figures. ``log_weights`` has the shape ``(n, B)``."""
    columns = log_weights.unbind(1)
    num = len(log_weights)
    evidence = [log_evidence(column) for column in columns]
    figures = [
        [pareto_k(column) for column in columns],
        [effective_sample_size(column) / num for column in columns],
        [value for value, _ in evidence],
        [error for _, error in evidence],
    ]
    if batched:
        return ImportanceDraws(sites, log_weights, *(torch.tensor(column) for column in figures))
    return ImportanceDraws(sites, log_weights[:, 0], *(column[0] for column in figures))


def _range(value: Tensor | float, form: str) -> str:
    """A figure; of a batch its smallest and largest."""
    values = torch.as_tensor(value).reshape(-1)
    low, high = float(values.min()), float(values.max())
    return f"{low:{form}}" if len(values) == 1 else f"{low:{form}} to {high:{form}}"
