"""What a metric returns: a value, and how to compute it anew from resampled images.

Letters: N things that are resampled (images), R replicates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A metric's value.

    Attributes:
        value: the metric over all images.
        resample: the metric over the images with these positions, int64 [N] in [0, N), drawn with replacement; None
            where a resampled set has no such metric.
        size: N, what the positions index.
        of: what is resampled, `generated` or `real`.
    """

    value: float
    resample: Callable[[torch.Tensor], float] | None = None
    size: int = 0
    of: str = "generated"

    @classmethod
    def mean(cls, contributions: torch.Tensor, of: str = "generated") -> "Estimate":
        """The mean of one number per image, [N], in float64."""
        contributions = contributions.to(torch.float64)
        return cls(
            contributions.mean().item(), lambda chosen: contributions[chosen].mean().item(), len(contributions), of
        )
