"""The operations that the solver is made of, and the choice of who computes them."""

from rlsedit_fast.ops.reference import correct_, downdate_, factor, moment_, panel

__all__ = ["correct_", "downdate_", "factor", "moment_", "panel"]
