"""The choice of an eps for a layer, from what it truly left out with some."""

from __future__ import annotations

import math
from collections.abc import Mapping

DIGITS = 4  # of an eps in a file


def choose(measured: Mapping[float, float], target: float) -> float | None:
    """The largest eps with which a layer leaves out no more than `target`; None where it leaves out more with each.

    Args:
        measured: the true mass left out on average, by eps: above 0 and at most `target`.
        target: a share of mass.

    Returns:
        A measured eps, or one between two of them: logarithms of eps against the mass left out. That mass goes about
        as a power of eps, and a straight line lies above such a curve, so that the eps is rather too small than too
        large.
    """
    above = None
    # From the largest on: where the curve isn't monotone, a smaller eps that leaves out too much doesn't matter.
    for eps in sorted(measured, reverse=True):
        if measured[eps] <= target:
            return eps if above is None else _between(eps, above, measured, target)
        above = eps
    return None


def _between(low: float, high: float, measured: Mapping[float, float], target: float) -> float:
    part = (target - measured[low]) / (measured[high] - measured[low])
    eps = low * (high / low) ** part
    digits = 10.0 ** (DIGITS - 1 - math.floor(math.log10(eps)))
    return max(low, math.floor(eps * digits) / digits)  # rounded down
