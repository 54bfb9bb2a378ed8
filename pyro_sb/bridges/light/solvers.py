r"""Solvers of the light bridges: ways to the potential's parameters, each down or up one function of them.

==============  ==================  =======  =======================================================================
solver          bridges             updates  way
==============  ==================  =======  =======================================================================
likelihood      LightSB, LightSBM     5,000  Adam down :math:`L = E \log c(y_0) - E \log v(y_1)`
matching        LightSB, LightSBM     5,000  Adam down the regression of the drift on slopes of Brownian bridges
moments         all                     200  moment steps on all draws; for finite beta each as long as G allows
dual            LightSBBM             5,000  Adam up the dual G at inverse points that Newton's method finds
alternating     LightSBBM            10,000  matching and a learnt inverse in turn: the published algorithm
==============  ==================  =======  =======================================================================

L and :math:`-G / \epsilon` of held-out points judge all but the last.
"""

from pyro_sb.bridges.light.alternating import Alternating
from pyro_sb.bridges.light.fit import Dual, Likelihood, Matching, Solver
from pyro_sb.bridges.light.moments import MomentSteps

SOLVERS: dict[str, Solver] = {s.name: s for s in (Likelihood(), Matching(), MomentSteps(), Dual(), Alternating())}
LIGHT = {name: SOLVERS[name] for name in ("likelihood", "matching", "moments")}  # of LightSB and LightSBM
BASS = {name: SOLVERS[name] for name in ("moments", "dual", "alternating")}  # of LightSBBM
