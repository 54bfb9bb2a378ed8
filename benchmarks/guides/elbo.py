"""The claim: guides fitted to the log joint cover what Pyro's own guides miss, at equal time.

`AutoLightBridge` and `AutoBridge` over it, beside AutoNormal, AutoMultivariateNormal, AutoIAFNormal and
AutoLaplaceApproximation by SVI (Adam, 16 vectorised particles) for the CPU seconds that the fit of AutoLightBridge
took, at least four. gap: log evidence less ELBO. EUBO: mean of log p - log q over exact draws, less the log evidence.
dlz: error of the log evidence by 4,000 importance draws. Modes: those with .5 % of the draws, of those that exact
draws have. W2: to exact draws, 1,000 of each, beside the distance of two exact samples.

Run as `python -m benchmarks.guides.elbo [--seeds 3] [--only WORD] [--report]`.
"""

import math
import time
import warnings
from functools import partial
from statistics import mean
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from benchmarks.guides.targets import GuideTarget, all_targets
from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import Store, command
from pyro_sb.infer import LogJoint, log_joint
from pyro_sb.infer.autoguide import AutoBridge, AutoLightBridge
from pyro_sb.metrics import wasserstein2
from pyro_sb.weights import effective_sample_size, log_evidence, pareto_k

DRAWS, POINTS, LEAST = 4000, 1000, 4.0
PYROS = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoLaplace": AutoLaplaceApproximation,
}
OURS = ("AutoLightBridge", "AutoBridge")


def packed(guide: Any, joint: LogJoint, rows: Tensor) -> Tensor:
    """Rows in the guide's order of coordinates, in the log joint's."""
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    sizes = [joint.site_shapes[name].numel() for name in names]
    parts = dict(zip(names, rows.split(sizes, -1), strict=True))
    return torch.cat([parts[name] for name in joint.site_shapes], -1).to(torch.float64)


def unpacked(guide: Any, joint: LogJoint, z: Tensor) -> Tensor:
    """The way back."""
    sizes = [shape.numel() for shape in joint.site_shapes.values()]
    parts = dict(zip(joint.site_shapes, z.split(sizes, -1), strict=True))
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    return torch.cat([parts[name] for name in names], -1)


def free(joint: LogJoint, sites: dict[str, Tensor]) -> Tensor:
    """Draws in the sites' own spaces, unconstrained: rows of the log joint."""
    return joint.pack({name: joint.transforms[name](sites[name]) for name in joint.site_shapes})


def law_of(guide: Any) -> Any:
    """Law of a guide's packed latent."""
    if not isinstance(guide, AutoNormal):
        return guide.get_posterior()
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    loc, scale = (
        torch.cat([torch.as_tensor(getattr(part, name)).detach().reshape(-1) for name in names])
        for part in (guide.locs, guide.scales)
    )
    return pyro.distributions.Normal(loc, scale).to_event(1)


def trained(kind: Any, target: GuideTarget, seconds: float) -> tuple[Any, int]:
    """One of Pyro's guides after so many CPU seconds of SVI, and its updates."""
    pyro.clear_param_store()
    guide, updates, begun = kind(target.model), 0, time.process_time()
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=target.nesting)
    svi = SVI(target.model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    while time.process_time() - begun < seconds:
        svi.step()
        updates += 1
    return (guide.laplace_approximation() if kind is AutoLaplaceApproximation else guide), updates


def scores(guide: Any, joint: LogJoint, target: GuideTarget, log_z: float) -> dict[str, Any]:
    """Figures of a guide."""
    with torch.no_grad(), pyro.validation_enabled(False):
        if type(guide).__name__ in OURS:
            z, log_weights = guide.weighted(DRAWS)
        else:
            x = law_of(guide).sample((DRAWS,))
            z, log_q = packed(guide, joint, x), law_of(guide).log_prob(x).to(torch.float64)
            log_weights = joint.log_prob(z) - log_q
        row = {
            "gap": log_z - float(log_weights.mean()),
            "dlz": log_evidence(log_weights)[0] - log_z,
            "ess": effective_sample_size(log_weights) / DRAWS,
            "k": pareto_k(log_weights),
        }
        if target.exact is not None:
            torch.manual_seed(12345)
            exact = target.exact(DRAWS)
            points = free(joint, exact)
            if not isinstance(guide, AutoBridge):
                log_q = law_of(guide).log_prob(unpacked(guide, joint, points)).to(torch.float64)
                row["eubo"] = float((joint.log_prob(points) - log_q).mean()) - log_z
            other = free(joint, target.exact(POINTS))
            row["w2"] = float(wasserstein2(z[:POINTS], points[:POINTS]))
            row["floor"] = float(wasserstein2(other, points[:POINTS]))
            if target.labels is not None:
                known = torch.bincount(target.labels(exact))
                mine = torch.bincount(target.labels(joint.constrain(z)), minlength=len(known))
                there = known > 0.005 * DRAWS
                row["modes"] = f"{int(((mine > 0.25 * known) & there).sum())}/{int(there.sum())}"
    return row


def reference(target: GuideTarget) -> tuple[float, float]:
    """Log evidence by long bridges of fitted guides, and its standard error."""
    values = []
    for seed in range(2):
        pyro.set_rng_seed(100 + seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide = AutoBridge(target.model, base=AutoLightBridge(target.model), num_steps=24)
            guide.fit()
            values.append(log_evidence(guide.weighted(10_000)[1])[0])
    spread = torch.tensor(values)
    return mean(values), float(spread.std()) / math.sqrt(len(values))


def run(target: GuideTarget, seed: int, log_z: float) -> dict[str, Any]:
    """All guides on one target."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    joint, rows, begun = log_joint(target.model), {}, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        light = AutoLightBridge(target.model)
        light.fit()
        seconds = time.process_time() - begun
        rows["AutoLightBridge"] = {"seconds": seconds, **scores(light, joint, target, log_z)}
        rows["AutoLightBridge"]["evaluations"] = light.fitted.target.evaluations.gradient
        begun = time.process_time()
        bridge = AutoBridge(target.model, base=light)
        bridge.fit()
        more = time.process_time() - begun
        rows["AutoBridge"] = {"seconds": seconds + more, **scores(bridge, joint, target, log_z)}
        for name, kind in PYROS.items():
            try:
                guide, updates = trained(kind, target, max(LEAST, seconds))
                rows[name] = {"seconds": max(LEAST, seconds), **scores(guide, joint, target, log_z)}
                rows[name]["evaluations"] = 16 * updates
            except Exception as error:  # a guide of Pyro's that ends in NaN or in a singular Hessian has a row too
                rows[name] = {"failed": f"{type(error).__name__}"}
    return rows


COLUMNS = ("gap", "eubo", "dlz", "ess", "k", "w2", "floor", "seconds", "evaluations")


def text(store: Store, seeds: int) -> str:
    """The table."""
    lines = []
    for target in all_targets():
        cells = [
            store.rows[f"{target.name}, seed {s}"] for s in range(seeds) if f"{target.name}, seed {s}" in store.rows
        ]
        if not cells:
            continue
        known = store.rows.get(f"reference {target.name}")
        log_z = f"{target.log_evidence:.4f} exact" if known is None else f"{known[0]:.3f} +- {known[1]:.3f}"
        lines.append(f"\n## {target.name}, log evidence {log_z}, {len(cells)} seed{'s' * (len(cells) > 1)}\n")
        rows = []
        for name in (*OURS, *PYROS):
            found = [cell[name] for cell in cells if "failed" not in cell[name]]
            row: list[Any] = [name]
            for column in COLUMNS:
                values = [f[column] for f in found if column in f]
                row.append(mean(values) if values else "-")
            row.append(" ".join(f.get("modes", "-") for f in found) if found else cells[0][name]["failed"])
            rows.append(row)
        lines.append(table(["guide", *COLUMNS, "modes"], rows))
    return "\n".join(lines)


def main() -> None:
    options = command(__doc__, seeds=3, cached=True, only={"default": ""})
    torch.set_default_dtype(torch.float64)  # AutoIAFNormal's networks take the default
    store = Store("guides")
    if not options.report:
        for seed in range(options.seeds):
            for target in all_targets():
                if options.only not in target.name:
                    continue
                log_z = target.log_evidence
                if log_z is None:
                    log_z = store.once(f"reference {target.name}", partial(reference, target))[0]
                store.once(f"{target.name}, seed {seed}", partial(run, target, seed, log_z))
                print(target.name, seed, flush=True)
    title = "Guides: means over seeds; fits by the log joint, and SVI of Pyro's guides for the same CPU seconds"
    write("guides", header(title, 0) + "\n" + text(store, options.seeds) + "\n" + reading("guides"))


if __name__ == "__main__":
    main()
