"""Where a distance is least."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize


@dataclass(frozen=True)
class Best:
    """Where the squared W2 is least.

    Attributes:
        strength: γ or η there. squared_w2, without: there, and without corruption.
    """

    strength: float
    squared_w2: float
    without: float

    @property
    def gain(self) -> float:
        """The share of the squared W2 that the best corruption takes away, in [0, 1]; 0 where all is 0."""
        return 1 - self.squared_w2 / self.without if self.without > 0 else 0.0


def least(at: Callable[[float], float], low: float, high: float) -> Best:
    """The least value of a function of a strength in [low, high], beside that at 0."""
    grid = np.geomspace(low, high, 60)
    values = [at(strength) for strength in grid]
    place = int(np.argmin(values))
    ends = np.log(grid[max(place - 1, 0)]), np.log(grid[min(place + 1, len(grid) - 1)])
    found = optimize.minimize_scalar(
        lambda log: at(float(np.exp(log))), bounds=ends, method="bounded", options={"xatol": 1e-6}
    )
    without = at(0.0)
    if without <= found.fun:
        return Best(0.0, without, without)
    return Best(float(np.exp(found.x)), float(found.fun), without)
