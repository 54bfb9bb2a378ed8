"""Pyro's own potential beside the batched log joint, at random points."""

from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.model.prototype import Start
from tests.infer.zoo.registry import Idiom


class Agreement(NamedTuple):
    """Largest gaps between the two in nats: of differences between rows, and of gradients; and the route taken."""

    route: str
    values: float
    gradients: float
    eps: float


def without_nan(x: Any) -> Any:
    """Pyro's gradients are NaN where data are, even where masked: any number will do there."""
    return x.nan_to_num(nan=0.5) if isinstance(x, Tensor) and x.is_floating_point() else x


def pyros(idiom: Idiom, joint: LogJoint, z: Tensor) -> tuple[Tensor, Tensor]:
    """Minus Pyro's potential and its gradient in our latents, row after row. Shapes ``(C,)`` and ``(C, dim)``."""
    model, args, kwargs = idiom.build()
    known, gaps = joint.prototype, joint.prototype.gaps.latent
    # supports for which Pyro knows no bijection take ours
    setup = {"init_strategy": Start(), "initial_params": {}, "max_plate_nesting": known.max_plate_nesting}
    given = {name: t for name, t in known.transforms.items() if name not in gaps} if idiom.ours else None
    _, potential, transforms, _ = initialize_model(model, tuple(map(without_nan, args)), kwargs, given, **setup)
    values, grads = [], []
    for row in z:
        sites, whole = joint.unpack(row), joint.constrain(row)
        free = {}
        for name, t in transforms.items():
            if name in gaps:  # Pyro has all entries; those with data are flat, and may be anywhere inside the support
                free[name] = t(whole[name] if name in whole else gaps[name].filled)
            else:
                free[name] = sites[name]
        grad, value = potential_grad(potential, free)
        values.append(-value)
        grads.append(-joint.pack({name: grad[name] for name in sites}))
    return torch.stack(values), torch.stack(grads)


def agreement(idiom: Idiom, num: int = 5) -> Agreement:
    """Compare at random points."""
    model, args, kwargs = idiom.build()
    joint = log_joint(model, args=args, kwargs=kwargs)
    z = joint.start(num)
    z = z + 0.1 * torch.randn_like(z)
    with pyro.validation_enabled(False):
        value, grad = pyros(idiom, joint, z)
    found, slope = joint.value_and_grad(z)
    usable = torch.isfinite(value) & torch.isfinite(found)
    assert usable.sum() >= 2, "fewer than two points to compare"
    gaps = (found - found[usable][0]) - (value - value[usable][0])
    slopes = (slope - grad).abs() / (1 + grad.abs())  # of steep ones a share, as they may be sums of large numbers
    eps = torch.finfo(joint.dtype).eps
    return Agreement(joint.route, float(gaps[usable].abs().max()), float(slopes[usable].max()), eps)
