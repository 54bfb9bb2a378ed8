"""Stochastic dynamics by conditional sampling: a two-scale system's closure, and Lorenz-63 emulated from its own past.

Run as `python -m benchmarks.bridge_dynamics`. A bridge is fitted to pairs of states, now and later; its context is then
clamped to the state now, its draw is the next state, and so on. Long runs of it are held against the true system's.
"""

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import ot
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.report import RESULTS, header, table, write
from pyro_sb.bridges import KernelLangevinBridge

SEED, F64 = 0, torch.float64
SCALE, COUPLING = 0.1, 0.09  # square root of the time-scale ratio; a fast drive of variance rate about .46
Rate = Callable[[Tensor], Tensor]


def runge_kutta(rate: Rate, x: Tensor, step: float, num_steps: int, every: int) -> Tensor:
    """States after every ``every`` steps, the first included. Shape ``(num_steps // every + 1, N, d)``."""
    states = [x]
    for i in range(num_steps):
        k1 = rate(x)
        k2 = rate(x + 0.5 * step * k1)
        k3 = rate(x + 0.5 * step * k2)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + step * k3))
        if (i + 1) % every == 0:
            states.append(x)
    return torch.stack(states)


def lorenz(x: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def two_scale(x: Tensor) -> Tensor:
    """dx = x - x^3 + (coupling / scale) y_2, dy = Lorenz(y) / scale^2: a double well driven by fast chaos."""
    slow = x[:, :1]
    return torch.cat([slow - slow**3 + COUPLING / SCALE * x[:, 2:3], lorenz(x[:, 1:]) / SCALE**2], 1)


def spun_up(num: int) -> Tensor:
    return runge_kutta(lorenz, torch.randn(num, 3, dtype=F64) + torch.tensor([0, 0, 25.0]), 0.02, 500, 500)[-1]


def double_well_truth(num: int, length: float, lag: float) -> Tensor:
    """Slow paths, sampled every ``lag``. Shape ``(length / lag + 1, num)``."""
    step = 0.02 * SCALE**2
    start = torch.cat([3 * torch.rand(num, 1, dtype=F64) - 1.5, spun_up(num)], 1)
    return runge_kutta(two_scale, start, step, round(length / step), round(lag / step))[:, :, :1]


def fitted(paths: Tensor, num_pairs: int) -> tuple[KernelLangevinBridge, float]:
    """The bridge of one lag: increments given the state, from consecutive states of true paths."""
    now, later = paths[:-1].flatten(0, 1), paths[1:].flatten(0, 1)
    chosen = torch.randperm(len(now))[:num_pairs]
    begun = time.process_time()
    bridge = KernelLangevinBridge(paths.shape[-1], context_dim=paths.shape[-1], num_steps=5)
    bridge.fit((later - now)[chosen], context=now[chosen], progress=False)
    return bridge, time.process_time() - begun


def emulated(bridge: KernelLangevinBridge, start: Tensor, num_steps: int) -> Tensor:
    """Paths of the emulator. Shape ``(num_steps + 1, N, d)``."""
    states = [start]
    for _ in range(num_steps):
        states.append(states[-1] + bridge(states[-1]).sample())
    return torch.stack(states)


def autocorrelation(paths: Tensor, lags: int) -> Tensor:
    """Of one coordinate, over time and paths. ``(T, N)`` to ``(lags,)``."""
    centred = paths - paths.mean()
    return (
        torch.stack([(centred[: len(paths) - k] * centred[k:]).mean() for k in range(lags)]) / centred.square().mean()
    )


def wasserstein(x: Tensor, y: Tensor) -> float:
    """W1 between two samples of one coordinate, over the second's standard deviation."""
    return ot.wasserstein_1d(x.flatten().numpy(), y.flatten().numpy()) / float(y.std())


def switches(paths: Tensor, lag: float) -> float:
    """Mean time between changes of well, a change counted from +-.5 to the other side's."""
    well = torch.where(paths.abs() > 0.5, paths.sign(), 0.0)
    for i in range(1, len(well)):
        well[i] = torch.where(well[i] == 0, well[i - 1], well[i])
    changes = int((well[1:] * well[:-1] < 0).sum())
    return (len(paths) - 1) * lag * paths.shape[1] / max(changes, 1)


def closure(axes: list[Axes]) -> tuple[list[list[object]], str]:
    """The double well: rows of the table, and a line about the fit."""
    lag, length = 0.25, 20.0
    truth = double_well_truth(400, length, lag)
    half = truth[len(truth) // 4 :]  # past the uniform start
    bridge, seconds = fitted(half[:, :200], 6000)
    runs = emulated(bridge, truth[0], len(truth) - 1)[len(truth) // 4 :]
    a, b, c = half[:, :200, 0], half[:, 200:, 0], runs[:, :, 0]
    now = torch.full((2000, 1), -0.9, dtype=F64)
    near = (half[:-1] + 0.9).abs() < 0.03
    later, ours = half[1:][near], (now + bridge(now).sample())[:, 0]

    rows = [
        ["two-scale: mean of x^2", *(float(v.square().mean()) for v in (b, c))],
        ["two-scale: mean time between switches", switches(b, lag), switches(c, lag)],
        ["two-scale: autocorrelation at 5", *(float(autocorrelation(v, 21)[20]) for v in (b, c))],
        ["two-scale: sd of x after .25, from -.9", float(later.std()), float(ours.std())],
        ["two-scale: W1 of x", wasserstein(a, b), wasserstein(c, b)],
    ]
    times = lag * torch.arange(len(half))
    axes[0].plot(times, half[:, 203, 0], "k", lw=1, label="truth")
    axes[0].plot(times, runs[:, 203, 0] - 4, "tab:green", lw=1, label="bridge (shifted)")
    axes[0].set(title="slow variable of the two-scale system", xlabel="time", ylabel="x")
    bins = torch.linspace(-2, 2, 41).numpy()
    axes[1].hist(half.flatten(), bins, density=True, color="0.7", label="truth")
    axes[1].hist(c.flatten(), bins, density=True, histtype="step", color="tab:green", lw=1.6, label="bridge")
    axes[1].set(title="long-run density", xlabel="x")
    axes[2].plot(lag * torch.arange(40), autocorrelation(half[:, :, 0], 40), "k")
    axes[2].plot(lag * torch.arange(40), autocorrelation(c, 40), "tab:green", ls="--")
    axes[2].set(title="autocorrelation of x", xlabel="time")
    narrow = torch.linspace(-1.8, 0.4, 41).numpy()
    axes[3].hist(later, narrow, density=True, color="0.7")
    axes[3].hist(ours, narrow, density=True, histtype="step", color="tab:green", lw=1.6)
    axes[3].set(title="next x, given x = -0.9", xlabel="x after 0.25")
    axes[0].set_ylim(-6.2, 3.4)
    axes[0].legend(fontsize=8, loc="upper right", ncols=2)
    axes[1].legend(fontsize=8)
    return rows, described("two-scale", bridge, seconds)


def emulator(axes: list[Axes]) -> tuple[list[list[object]], str]:
    """Lorenz-63, deterministic: the bridge has to add as little noise as its draws allow."""
    lag = 0.1
    truth = runge_kutta(lorenz, spun_up(100), 0.01, 4000, 10)
    bridge, seconds = fitted(truth[:, :50], 4000)
    runs = emulated(bridge, truth[0, 50:], 200)
    a, b, c = truth[:, :50], truth[:, 50:], runs[50:]
    rows = []
    for k, name in enumerate("xyz"):
        rows.append(
            [f"Lorenz-63: mean, sd of {name}", *(f"{v[..., k].mean():.2f}, {v[..., k].std():.2f}" for v in (b, c))]
        )
        rows.append([f"Lorenz-63: W1 of {name}", wasserstein(a[..., k], b[..., k]), wasserstein(c[..., k], b[..., k])])
    forecast = (truth[1:201, 50:] - truth[:200, 50:] - bridge(truth[:200, 50:]).sample()).flatten(0, 1).square().mean(0)
    rows.append(["Lorenz-63: error of one step over its sd", 0.0, float((forecast / b.var((0, 1))).mean().sqrt())])
    rows.append(["Lorenz-63: autocorrelation of z at .7", *(float(autocorrelation(v[..., 2], 8)[7]) for v in (b, c))])

    axes[0].plot(b[:151, :20, 0], b[:151, :20, 2], ".", ms=1.5, color="0.3")
    axes[0].set(title="Lorenz-63", xlabel="x", ylabel="z")
    axes[1].plot(c[:, :20, 0], c[:, :20, 2], ".", ms=1.5, color="tab:green")
    axes[1].set(title="its emulation by the bridge", xlabel="x", ylabel="z")
    axes[2].plot(lag * torch.arange(40), autocorrelation(b[..., 2], 40), "k")
    axes[2].plot(lag * torch.arange(40), autocorrelation(c[..., 2], 40), "tab:green", ls="--")
    axes[2].set(title="autocorrelation of z", xlabel="time")
    bins = torch.linspace(0, 50, 51).numpy()
    axes[3].hist(b[..., 2].flatten(), bins, density=True, color="0.7")
    axes[3].hist(c[..., 2].flatten(), bins, density=True, histtype="step", color="tab:green", lw=1.6)
    axes[3].set(title="long-run density of z", xlabel="z")
    return rows, described("Lorenz-63", bridge, seconds)


def described(name: str, bridge: KernelLangevinBridge, seconds: float) -> str:
    bandwidths = f"epsilon {bridge.epsilon:.3g}, context_epsilon {bridge.context_epsilon:.3g}"
    fit = f"{bridge.num_steps} steps, fit {seconds:.1f} CPU s"
    return f"{name}: {len(bridge.points)} pairs, {bandwidths} (unattended), {fit}."


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    RESULTS.mkdir(exist_ok=True)
    begun = time.process_time()
    fig, axes = plt.subplots(2, 4, figsize=(16, 7), constrained_layout=True)
    first, note = closure(axes[0])
    second, other = emulator(axes[1])
    fig.savefig(RESULTS / "bridge_dynamics.png", dpi=100)
    lines = [
        header("Stochastic dynamics by conditional sampling: long runs of the bridge against the system", SEED),
        note,
        other,
    ]
    lines += ["", table(["statistic", "truth", "bridge"], first + second)]
    lines.append(
        "\nW1 is in standard deviations; its 'truth' is the distance between two halves of the true paths, the floor."
    )
    lines.append(f"{time.process_time() - begun:.0f} CPU s in all, the true systems included.")
    write("bridge_dynamics", "\n".join(lines))


if __name__ == "__main__":
    main()
