r"""Is an observation of the model's world? Its place among prior predictive draws, with an exact p-value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.infer.amortized.features import Features, Observation

__all__ = ["Surprise", "surprise", "whitening"]

MOST = 4000  # simulations that an observation is compared with
SCALES = (1 / 256, 1 / 16, 1.0)  # of the kernels' squared widths, in median squared distances
SWAPS, SOME = 499, 500  # permutations of the test of a batch; simulations in it
LOOK, BAD = 0.05, 0.01


@dataclass(frozen=True, eq=False, repr=False)
class Surprise:
    r"""How unlike the model's own data an observation is; made by `AmortizedPosterior.surprise`.

    .. math:: T(y) = -\sum_h \log \tfrac1n \sum_j k_h(s(y), s(y_j)), \qquad
        p = \frac{1 + \#\{i: T(y_i) \ge T(y)\}}{1 + m}

    with Gaussian kernels of three widths (wide ones see outliers, narrow ones gaps), s whitened summaries, :math:`y_j`
    some simulations and :math:`y_i` m others. Where y is of the model too it is exchangeable with the :math:`y_i`, so p
    is uniform whatever the kernels are: alarms at p < .05 are false in 5 % of cases, exactly.

    Attributes:
        p_value: A number, for a batch ``(B,)``: small where the observation is unlike the simulations.
        statistic: T. A number, or ``(B,)``.
        column_p_values: Two-sided, of each number or summary alone. Shape ``(C,)``, or ``(B, C)``.
        columns: Their names.
        group_p_value: Of a batch, by the maximum mean discrepancy between it and simulations under permutations; None
            for one observation.
        num_simulations: How many simulations there are in the comparison.
    """

    p_value: Tensor | float
    statistic: Tensor | float
    column_p_values: Tensor
    columns: tuple[str, ...]
    group_p_value: float | None
    num_simulations: int

    @property
    def standing_out(self) -> dict[str, float]:
        """Columns with their p-values, times the number of columns and of observations, where that is below .05."""
        rows = self.column_p_values.reshape(-1, len(self.columns))
        p = (rows.amin(0) * rows.numel()).clamp_max(1.0)
        return {self.columns[i]: float(p[i]) for i in p.argsort().tolist() if float(p[i]) < LOOK}

    @property
    def smallest_p_value(self) -> float:
        """Of all tests together: the smallest, times their number."""
        p = torch.as_tensor(self.p_value).reshape(-1)
        each = min(1.0, float(p.min()) * len(p))
        return each if self.group_p_value is None else min(1.0, 2 * min(each, self.group_p_value))

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"look"`` (p up to .05) or ``"bad"`` (up to .01)."""
        return "ok" if self.smallest_p_value > LOOK else "look" if self.smallest_p_value > BAD else "bad"

    def __repr__(self) -> str:
        values = torch.as_tensor(self.p_value).reshape(-1)
        shown = f"p = {float(values[0]):.2g}" if len(values) == 1 else f"smallest p = {float(values.min()):.2g}"
        of = "" if len(values) == 1 else f" of {len(values)} observations"
        group = "" if self.group_p_value is None else f", together p = {self.group_p_value:.2g}"
        lines = [f"Surprise: {shown}{of}{group}, among {self.num_simulations} simulations: {self.verdict}"]
        if self.standing_out:
            names = ", ".join(f"{name} (p {p:.2g})" for name, p in list(self.standing_out.items())[:6])
            lines.append(f"  stand out alone: {names}")
        if self.verdict != "ok":
            lines.append(
                "  no posterior of this model is to be trusted there: look at those numbers, then widen the prior, "
                "correct the simulator, let it make the contamination (an outlier's share, a noise scale as latents), "
                "or condition on summaries that do not feel it"
            )
        return "\n".join(lines)


def surprise(observation: Observation, simulated: Tensor, features: Features) -> Surprise:
    """Place of observations among simulations ``(N, data_dim)``, at least 40."""
    if observation.missing:
        raise NotImplementedError(
            "surprise needs whole observations, got missing entries. Fill them in, or leave those observations out."
        )
    if len(simulated) < 40:
        raise ValueError(f"surprise needs at least 40 simulations, got {len(simulated)}. Fit on more.")
    given = features.columns(observation.values).double()
    made = features.columns(simulated.to(observation.values)).double()
    made = made[torch.randperm(len(made), device=made.device)[:MOST]]
    half = len(made) // 2  # one half is the law, the other is ranked: exchangeable with an observation given the first
    white = whitening(made[:half])
    base, ranked, placed = (rows @ white for rows in (made[:half], made[half:], given))
    widths = torch.cdist(base[:1000], base[:1000]).square()
    scale = widths[widths > 0].median() if bool((widths > 0).any()) else widths.new_ones(())
    own, others = (negative_log_density(rows, base, scale) for rows in (placed, ranked))
    p = (1.0 + (others >= own[:, None]).sum(1)) / (1 + len(others))
    above = (made[None] >= given[:, None]).sum(1)
    below = (made[None] <= given[:, None]).sum(1)
    single = (2 * (1.0 + torch.minimum(above, below)) / (1 + len(made))).clamp_max(1.0)
    if not observation.batched:
        return Surprise(float(p[0]), float(own[0]), single[0], features.names(), None, len(made))
    group = group_test(placed, ranked[:SOME], scale) if len(placed) > 1 else None
    return Surprise(p, own, single, features.names(), group, len(made))


def whitening(rows: Tensor) -> Tensor:
    """Matrix to whitened coordinates; directions without variance are left out. ``(n, C)`` to ``(C, r)``."""
    deviation = rows.std(0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    values, vectors = torch.linalg.eigh((rows / deviation).T.cov().reshape(rows.shape[1], rows.shape[1]))
    kept = values > 1e-8 * values.max().clamp_min(1e-300)
    return vectors[:, kept] / values[kept].sqrt() / deviation[:, None]


def log_kernels(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Logarithms of Gaussian kernels of three widths. ``(n, r)`` and ``(m, r)`` to ``(3, n, m)``."""
    squared = torch.cdist(a, b).square()
    return torch.stack([-squared / (2 * share * scale) for share in SCALES])


def negative_log_density(rows: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    """T of rows, up to a constant. Shape ``(n,)``."""
    return -torch.cat([log_kernels(part, base, scale).logsumexp(-1).sum(0) for part in rows.split(1000)])


def group_test(given: Tensor, made: Tensor, scale: Tensor) -> float:
    """Permutation p-value of the maximum mean discrepancy between a batch and simulations."""
    rows, num = torch.cat([given, made]), len(given)
    kernel = log_kernels(rows, rows, scale).exp().mean(0)
    order = torch.stack([torch.arange(len(rows)), *(torch.randperm(len(rows)) for _ in range(SWAPS))]).to(rows.device)
    marks = torch.zeros(len(order), len(rows), dtype=rows.dtype, device=rows.device)
    marks.scatter_(1, order[:, :num], 1.0)
    weights = marks / num - (1 - marks) / len(made)
    distance = ((weights @ kernel) * weights).sum(1)
    return float((distance >= distance[0] * (1 - 1e-12)).double().mean())
