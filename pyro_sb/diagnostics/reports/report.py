"""`report`: one table and one figure of whatever was fitted or run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.diagnostics.export.container import is_container
from pyro_sb.diagnostics.export.draws_of import is_run
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit
from pyro_sb.diagnostics.reports.bridge_report import bridge_report
from pyro_sb.diagnostics.reports.chain_report import chain_report
from pyro_sb.diagnostics.reports.guide_report import guide_report
from pyro_sb.diagnostics.reports.likelihood_report import likelihood_report
from pyro_sb.diagnostics.reports.lines import Report
from pyro_sb.diagnostics.reports.posterior_report import amortised_report, posterior_report
from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.amortized.likelihood.likelihood import AmortizedLikelihood
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.autoguide.guide import BridgeGuide

__all__ = ["report"]


def report(
    x: Any,
    target: Any = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    audit: str | ModeAudit | None = "quick",
    num_data_sets: int = 200,
    source: Any = None,
    context: Any = None,
    progress: bool = True,
) -> Report:
    r"""A verdict on whatever was fitted or run: ok, look, or bad, line by line, and what to do.

    - A finished `MCMC`, ours or Pyro's, or an ArviZ container: R-hat, bulk and tail effective sizes, divergences,
      figures of the kernel's warm-up, and what a weighted population says of the draws, where chains cannot look: modes
      and their shares, tails, the evidence, and what its sources could have missed.
    - A conditioned `Posterior`: the importance weights' k-hat and effective size under the model, and the audit.
    - A fitted guide, `AutoLightBridge` or `AutoBridge`: the same, and its evidence.
    - A fitted `AmortizedPosterior`: calibration of each parameter and of all together (`sbc`, `tarp`).
    - A fitted `AmortizedLikelihood`: ranks of held-out data among its draws, and a local classifier test.
    - A fitted `Bridge`: `bridge_report`.

    The population is the run's own, with fresh draws of its frozen proposal, where warm-up made one: then a report
    takes seconds. For other runs, and by ``audit="full"``, `mode_audit` makes two that differ in kind.

    ``verdict`` is the worst of the lines, and ``reason`` says whether something is wrong or there are not enough draws
    yet. **No line proves a posterior right**; each names what it would have seen.

    Args:
        x: One of these.
        target: What ``x`` is compared with. Of a run or container: the Pyro model for the audit, where ``x`` does not
            know it (an ArviZ container). Of a bridge: draws of its target, or a distribution.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        audit: Of a run, container or posterior. ``"quick"``: by the run's own population; by two that are made for it
            where it has none. ``"full"``: by two in any case. None: no audit. A `ModeAudit`: one made before, with
            other options: ``audit=mode_audit(run, num_particles=4096)``.
        num_data_sets: Of an amortised posterior: data sets of its calibration, at least 20.
        source: Of a bridge: what it was to leave from.
        context: Of a bridge: contexts of the target's draws.
        progress: Show a bar while populations are made.

    Raises:
        ImportError: Chains, and ArviZ is not installed.
        RuntimeError: ``x`` was not fitted, or has not run.
        TypeError: ``x`` is none of these.
        ValueError: An option that a report of ``x`` has no use for, or fewer than four draws a chain.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_sb.infer.kernels.langevin import KernelLangevin
        >>> from pyro_sb.infer.mcmc.mcmc import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(KernelLangevin(model), num_samples=100, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.tensor(0.5))
        >>> found = report(mcmc)
        >>> found.verdict, found["R-hat"].verdict
        ('ok', 'ok')
    """
    if not (audit is None or isinstance(audit, ModeAudit) or audit in ("quick", "full")):
        raise ValueError(f'audit must be "quick", "full", None or a ModeAudit, got {audit!r}. Omit it for "quick".')
    idle = audit is None or isinstance(audit, ModeAudit)
    if target is not None and idle and not isinstance(x, Bridge):
        raise ValueError(
            "a run's target is for the audit, got it together with audit=None or one made before, which need none. "
            "Leave one of them out."
        )
    _check_options(
        x,
        target=target is not None,
        args=args != (),
        kwargs=bool(kwargs),
        audit=audit != "quick",
        num_data_sets=num_data_sets != 200,
        source=source is not None,
        context=context is not None,
    )
    if isinstance(x, Bridge):
        return bridge_report(x, target, source=source, context=context)
    if isinstance(x, AmortizedPosterior):
        return amortised_report(x, num_data_sets)
    if isinstance(x, AmortizedLikelihood):
        return likelihood_report(x)
    if isinstance(x, Posterior):
        return posterior_report(x, audit, progress)
    if isinstance(x, BridgeGuide):
        return guide_report(x, audit, progress)
    return chain_report(x, target, args, dict(kwargs or {}), audit, progress)


def _check_options(x: Any, **given: bool) -> None:
    """Every option that is given is used by the report of ``x``, or refused by name."""
    used = _options_of(x)
    unused = [name for name, is_given in given.items() if is_given and name not in used]
    if unused:
        raise ValueError(
            f"a report of {type(x).__name__} uses {', '.join(used) or 'no option'}, got {', '.join(unused)} too. Leave "
            "those out."
        )
    if (given["args"] or given["kwargs"]) and not given["target"]:
        raise ValueError(
            "args and kwargs are the model's, got them without a model. Write report(x, model, args=(y,)), or leave "
            "them out: a run knows its own."
        )


def _options_of(x: Any) -> tuple[str, ...]:
    if isinstance(x, Bridge):
        return ("target", "source", "context")
    if isinstance(x, AmortizedPosterior):
        return ("num_data_sets",)
    if isinstance(x, AmortizedLikelihood):
        return ()
    if isinstance(x, Posterior | BridgeGuide):
        return ("audit",)
    if (is_run(x) and not hasattr(x, "log_weights")) or is_container(x):
        return ("target", "args", "kwargs", "audit")
    raise TypeError(
        "x must be a finished MCMC, an ArviZ container, a Posterior, an AmortizedPosterior, an AmortizedLikelihood or "
        f"a Bridge, got {type(x).__name__}. {_cure(x)}"
    )


def _cure(x: Any) -> str:
    if isinstance(x, MCMCKernel):
        return "A kernel has no draws: write mcmc = MCMC(kernel, num_samples=1000), mcmc.run(...), report(mcmc)."
    if isinstance(x, (Mapping, np.ndarray, Tensor)):
        return (
            "Draws by site, each (chain, draw, *shape), go in by az.from_dict(posterior=draws), in ArviZ 1 "
            'az.from_dict({"posterior": draws}); log weights by psis(log_weights); draws of a bridge by '
            "bridge_report(bridge, draws)."
        )
    if hasattr(x, "log_weights"):
        return "For weighted draws write psis(x)."
    return "Call run() or fit() and pass the object itself."
