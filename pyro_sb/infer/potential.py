"""Door to the batched log joint of a Pyro model or a ``potential_fn``, under Pyro's word for it."""

from pyro_sb.infer.model.log_joint import LogJoint, log_joint

__all__ = ["LogJoint", "log_joint"]
