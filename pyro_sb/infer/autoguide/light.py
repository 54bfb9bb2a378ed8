r"""`AutoLightBridge`: the Föllmer bridge from a point to a Gaussian mixture, as a Pyro guide."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sb.checks import whole
from pyro_sb.infer.autoguide.blocks import adds_up, block_joint, independent_blocks, visited
from pyro_sb.infer.autoguide.fit import BlockFit, fit_block, moved
from pyro_sb.infer.autoguide.guide import BridgeGuide, GuideFit, init_somewhere
from pyro_sb.infer.autoguide.law import BlockMixture, MixtureBlock
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.threads import chosen_threads
from pyro_sb.weights import effective_sample_size, pareto_k

__all__ = ["AutoLightBridge"]

COLD_COMPONENTS, COLD_SCALE = 8, 0.5
FEWEST = 512  # draws of a round of a small block
ORIGINS, MOVED = ("locs", "trils"), ("logits", "shifts", "stretches")
PARAMETERS = ORIGINS + MOVED


class AutoLightBridge(BridgeGuide):
    r"""Guide of a Gaussian mixture, :math:`q(z) = \sum_k \pi_k N(z; m_k, L_k L_k^\top)`, on the unconstrained latents.

    It is the law at time 1 of the Schrödinger bridge from a point with a mixture potential, so its density, drift and
    paths are closed forms. :meth:`fit` is mass-covering and unattended: it finds modes by two sources that differ in
    kind and weighs them. Stochastic variational inference trains it too, from the fit (``SVI(model, guide, optim,
    Trace_ELBO())``), with gradients in the mixture's weights; cold it finds the modes near its start.

    Where the log joint is a sum over blocks of coordinates, each block gets a mixture of its own: a product of 16
    mixtures of two components has :math:`2^{16}` modes.

    Args:
        model: Pyro model; its latents continuous.
        num_components: Most components of a block. None: as many as weighted draws support, and 8 without a fit.
        num_particles: Draws of a round of the fit's population, at least 50.
        num_updates: Updates of the ELBO that compete with the fit; 0 for none.
        init_loc_fn: Pyro's initialisation, for SVI without a fit.
        name: Under which Pyro's store and optimisers know its parameters; see `BridgeGuide`.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(x.square(), 1.0), obs=y)  # two modes, near -2 and 2
        >>> guide = AutoLightBridge(model)
        >>> fit = guide.fit(torch.tensor(4.0))
        >>> guide(torch.tensor(4.0))["x"].shape
        torch.Size([])
        >>> bool(fit.k_hat < 0.7)
        True

    References:
        Schrödinger-Föllmer sampler (Huang et al., 2021), https://arxiv.org/abs/2106.10880; Light Schrödinger Bridge
        (Korotin, Gushchin and Burnaev, 2024), https://arxiv.org/abs/2310.01174, section 3, for the mixture potential.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_components: int | None = None,
        num_particles: int = 1024,
        num_updates: int = 300,
        init_loc_fn: Callable[..., Any] = init_somewhere,
        name: str | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, name=name)
        cure = "Omit it for as many as it takes."
        self.num_components = None if num_components is None else whole("num_components", num_components, cure=cure)
        self.num_particles = whole("num_particles", num_particles)
        self.num_updates = whole("num_updates", num_updates, 0, cure="Write 0 for none.")
        self.num_blocks = 0
        self.baseline: Tensor
        self.register_buffer("baseline", torch.zeros(()))

    def get_posterior(self, *args: Any, **kwargs: Any) -> BlockMixture:
        """Law of the packed latent: a `BlockMixture`."""
        return BlockMixture([self._block(b) for b in range(self.num_blocks)], self.baseline)

    def fit(self, *args: Any, **kwargs: Any) -> GuideFit:
        r"""Fit to the model at its arguments: mass-covering, unattended.

        1. Independent blocks of the log joint are told apart by its slopes, and fitted one by one.
        2. `populate`: modes by a search and by particles tempered from the prior, weighed by importance.
        3. Rounds of importance EM: components are added where :math:`\log p - \log q` is largest.
        4. Updates of the ELBO, and of the two the one with the smaller sum of both Kullback-Leibler divergences.
        5. Evidence by fresh draws of the frozen mixture and a wide guard, which does not stay in the guide.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Figures of the fit; a RuntimeWarning where the mixture does not cover the target.

        Raises:
            NotImplementedError: Subsampled plates: a fit needs the full log joint. Train by SVI instead.
            ValueError: Discrete latents, or a log joint that is finite nowhere.
        """
        joint = self._target(args, kwargs)
        order = self._order(joint)
        with chosen_threads(joint):
            blocks, fits, at = self._fit_blocks(joint)
        inverse = order.argsort()
        self._adopt([MixtureBlock(inverse[places], f.mixture) for places, f in zip(blocks, fits)])
        with torch.no_grad():
            z, log_weights = _weigh(joint, self.get_posterior(), order, 4000)
        level = float(joint.log_prob(at[None])) if len(fits) > 1 else 0.0
        value = level + sum(f.log_evidence for f in fits)
        error = math.hypot(*(f.log_evidence_error for f in fits))
        self.baseline.fill_(value)
        stages = [f"{len(fits)} independent blocks"] * (len(fits) > 1) + [s for f in fits for s in f.stages]
        fit = GuideFit(
            joint,
            args,
            kwargs,
            float(log_weights.mean()),
            value,
            error,
            pareto_k(log_weights),
            effective_sample_size(log_weights) / len(log_weights),
            tuple(stages),
            tuple(f.population for f in fits),
        )
        return self._finish(
            fit, f"Raise num_particles (now {self.num_particles}), or refine it by AutoBridge(model, base=guide)."
        )

    def weighted(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws in the log joint's order ``(num, dim)``, and the log of target over guide ``(num,)``."""
        joint = self._known("weighted").target
        with torch.no_grad():
            return _weigh(joint, self.get_posterior(), self._order(joint), num)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Drift of the bridge at times in [0, 1] and unconstrained points ``(n, latent_dim)``, in the guide's order."""
        with torch.no_grad():
            return self.get_posterior().drift(t, x)

    def paths(self, num_paths: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """Times ``(num_steps + 1,)`` and exact paths of the bridge ``(num_paths, num_steps + 1, latent_dim)``."""
        with torch.no_grad():
            return self.get_posterior().paths(num_paths, num_steps)

    def marginal_quantiles(self, probs: Tensor) -> Tensor:
        """Quantiles of each unconstrained coordinate. ``(Q,)`` to ``(Q, latent_dim)``."""
        return self.get_posterior().marginal_quantiles(probs)

    def _fit_blocks(self, joint: LogJoint) -> tuple[list[Tensor], list[BlockFit], Tensor]:
        points = joint.start(8).to(torch.float64)
        at, blocks = points[0], independent_blocks(joint, points)
        if len(blocks) > 1 and adds_up(joint, blocks, at, visited(joint, self.num_particles)):
            num = max(FEWEST, self.num_particles // len(blocks))
            fits = [self._fit_one(block_joint(joint, places, at), num) for places in blocks]
            law = BlockMixture([MixtureBlock(places, f.mixture) for places, f in zip(blocks, fits)])
            if adds_up(joint, blocks, at, law.sample((256,))):
                return blocks, fits, at
        return [torch.arange(joint.dim, device=joint.device)], [self._fit_one(joint, self.num_particles)], at

    def _fit_one(self, joint: LogJoint, num_particles: int) -> BlockFit:
        return fit_block(joint, num_particles, self.num_components, self.num_updates)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        if not self.num_blocks:
            num = COLD_COMPONENTS if self.num_components is None else self.num_components
            spread = torch.rand(num, len(loc), dtype=loc.dtype, device=loc.device) * 4 - 2
            locs = loc + (spread if num > 1 else torch.zeros_like(spread))
            eye = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
            even = locs.new_zeros(num)
            mixture = StudentMixture(
                torch.log_softmax(even, 0), locs, COLD_SCALE * eye.repeat(num, 1, 1), torch.full_like(even, torch.inf)
            )
            self._adopt([MixtureBlock(torch.arange(len(loc), device=loc.device), mixture)])
        held = sum(len(getattr(self, f"places_{b}")) for b in range(self.num_blocks))
        if held != self.latent_dim:
            raise ValueError(
                f"the guide's state must be that of a model of {self.latent_dim} unconstrained numbers, got one of "
                f"{held}. Load it into a guide of the same model."
            )

    def _adopt(self, blocks: list[MixtureBlock]) -> None:
        """Take a law over: its components are where the parameters begin, in units of themselves."""
        self._forget()
        like = self._init_loc()
        self.baseline = self.baseline.to(like)
        for b, (places, mixture) in enumerate(blocks):
            mixture = StudentMixture(*(value.detach().to(like) for value in mixture))
            self.register_buffer(f"places_{b}", places.to(like.device))
            zeros = torch.zeros_like(mixture.locs), torch.zeros_like(mixture.scale_trils)
            starts = (mixture.locs, mixture.scale_trils, mixture.log_weights, *zeros)
            for name, start in zip(PARAMETERS, starts):
                setattr(self, f"{name}_{b}", nn.Parameter(start.clone(), requires_grad=name in MOVED))
        self.num_blocks = len(blocks)
        extra = f"{self._pyro_name}.logits_{self.num_blocks}"
        if extra in pyro.get_param_store():
            raise ValueError(
                f"the parameter store must hold a guide of {self.num_blocks} block, got one of more ({extra}). Load a "
                "fitted guide by guide.load_state_dict(state)."
            )

    def _forget(self) -> None:
        store = pyro.get_param_store()
        for b in range(self.num_blocks):
            for name in ("places", *PARAMETERS):
                delattr(self, f"{name}_{b}")
            for name in PARAMETERS:
                full = f"{self._pyro_name}.{name}_{b}"
                if full in store:
                    del store[full]
        self.num_blocks = 0

    def _block(self, b: int) -> MixtureBlock:
        places, locs, trils, logits, shifts, stretches = (getattr(self, f"{n}_{b}") for n in ("places", *PARAMETERS))
        core = StudentMixture(logits, locs, trils, torch.full_like(logits, torch.inf))
        return MixtureBlock(places, moved(core, logits, shifts, stretches))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        num = sum(name.startswith("places_") for name in saved)
        mine = [tuple(getattr(self, f"logits_{b}").shape) for b in range(self.num_blocks)]
        theirs = [tuple(saved[f"logits_{b}"].shape) for b in range(num) if f"logits_{b}" in saved]
        if self.num_components is not None and max(theirs, default=(0,))[0] > self.num_components:
            raise ValueError(
                f"the state must have at most num_components={self.num_components} components a block, got "
                f"{max(theirs)[0]}. Write AutoLightBridge(model, num_components={max(theirs)[0]}), or omit it."
            )
        if num and mine != theirs:
            self._forget()
            for b in range(num):
                self.register_buffer(f"places_{b}", torch.empty_like(saved[f"places_{b}"]))
                for name in PARAMETERS:
                    value = torch.empty_like(saved[f"{name}_{b}"])
                    setattr(self, f"{name}_{b}", nn.Parameter(value, requires_grad=name in MOVED))
            self.num_blocks = num
        self.fitted = None  # figures of another law
        super()._load_from_state_dict(state_dict, prefix, *args)


def _weigh(joint: LogJoint, law: BlockMixture, order: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Draws of a law in the guide's order, put into the log joint's, with their log weights."""
    x = law.sample((num,))
    z = torch.empty_like(x).index_copy(1, order, x)
    log_p = joint.log_prob(z.to(torch.float64))
    return z, log_p - law.log_prob(x).to(torch.float64)
