"""Memorization: which generated images are copies of training images, and how far all are from the training set.

Letters: T training images, M generated images, D features (pixels, latents or what an extractor says).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from noisycond.errors import closest, require
from noisycond.evaluation.estimates import Estimate
from noisycond.evaluation.neighbours import nearest


Rule = Literal["ratio", "distance"]


@dataclass(frozen=True)
class Memorization:
    """How near generated images are to the training set.

    Attributes:
        memorized [M]: bool.
        distances [M]: float64, the Euclidean distance to the nearest training image.
        nearest [M]: int64 in [0, T), which one that is.
    """

    memorized: torch.Tensor
    distances: torch.Tensor
    nearest: torch.Tensor

    @property
    def ratio(self) -> float:
        """The share of generated images that are memorized, in [0, 1]."""
        return self.estimates()["memorization_ratio"].value

    @property
    def mean_distance(self) -> float:
        """The mean distance to the nearest training image."""
        return self.estimates()["nearest_train_distance"].value

    def estimates(self) -> dict[str, Estimate]:
        """Both by name."""
        return {
            "memorization_ratio": Estimate.mean(self.memorized),
            "nearest_train_distance": Estimate.mean(self.distances),
        }


def memorization(
    *,
    train: torch.Tensor,
    generated: torch.Tensor,
    rule: Rule = "ratio",
    threshold: float = 1 / 3,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Memorization:
    """Which generated images are memorized.

    By `ratio`, those whose distance to the nearest training image is below `threshold` times that to the second
    nearest (Yoon et al., "Diffusion probabilistic models generalize when they fail to memorize", 2023, with 1/3). An
    image at distance 0 is memorized in any case: a training image that occurs twice would hide its copies otherwise.
    By `distance`, those nearer than `threshold` to a training image, in units of the features.

    Args:
        train [T, D], generated [M, D]: float32 or float64, finite; may be memory-mapped.
        device: where the matrix products run; the CPU by default. progress: shows a bar.

    Raises:
        InputError: an unknown rule, a threshold that is not positive or, for `ratio`, above 1, no generated image,
            fewer than two training images (`ratio`) or none (`distance`), or sets with different D.
    """
    require(rule in get_args(Rule), f"rule {rule!r}: expected ratio or distance{closest(rule, get_args(Rule))}.")
    require(threshold > 0, f"threshold {threshold} of memorization: expected a number above 0.")
    require(
        rule != "ratio" or threshold <= 1,
        f"threshold {threshold} of memorization: expected at most 1, as the second nearest is no nearer.",
    )
    needed = 2 if rule == "ratio" else 1
    require(len(generated), "memorization needs at least 1 generated image, but there are none.")
    require(
        len(train) >= needed,
        f"memorization by {rule} needs at least {needed} training image{'s' * (needed > 1)}, but there "
        f"{'is' if len(train) == 1 else 'are'} {len(train)}.",
    )
    require(
        train.shape[1:] == generated.shape[1:],
        f"training images have features of shape {list(train.shape[1:])}, but generated ones of "
        f"{list(generated.shape[1:])}; both need the same extractor.",
    )
    distances, indices = nearest(queries=generated, points=train, k=needed, device=device, progress=progress)
    if rule == "ratio":
        memorized = (distances[:, 0] < threshold * distances[:, 1]) | (distances[:, 0] == 0)
    else:
        memorized = distances[:, 0] < threshold
    return Memorization(memorized, distances[:, 0], indices[:, 0])
