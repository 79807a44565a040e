"""Scores averaged over parts of the images: the kernel inception distance and the inception score.

Letters: N generated images, M real ones, S images of a subset, D features, K classes of the extractor.
"""

from dataclasses import dataclass

import torch

from noisycond.errors import require
from noisycond.evaluation.estimates import Estimate
from noisycond.randomness import Purpose, permutation


@dataclass(frozen=True)
class PartsEstimate(Estimate):
    """An estimate that is a mean over parts of the images.

    Attributes:
        std: the standard deviation over the parts (of these parts, not of their mean: divided by their number).
    """

    std: float = 0.0


def kid(
    *, real: torch.Tensor, generated: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> PartsEstimate:
    """The kernel inception distance (arXiv:1801.01401): the unbiased squared maximum mean discrepancy, averaged over
    pairs of random subsets. Being unbiased, it may be slightly negative.

    Args:
        real [M, D], generated [N, D]: float32 features.
        subsets: number of pairs of subsets.
        subset_size: S, drawn from either set without replacement.
        seed: of the draws.

    Returns:
        Mean and standard deviation over the subsets. There is no resampling: two copies of an image would count as a
        pair of images that are alike, and the estimate be no longer unbiased.

    Raises:
        InputError: fewer images than a subset has, features of different sizes, or subsets of one image.
    """
    require(
        real.shape[1] == generated.shape[1],
        f"KID needs features of one extractor, but the real images have {real.shape[1]} features and the generated "
        f"ones {generated.shape[1]}.",
    )
    require(subsets >= 1, f"--kid_subsets {subsets}: at least 1 is needed.")
    require(subset_size >= 2, f"--kid_subset_size {subset_size}: at least 2 is needed.")
    require(
        min(len(real), len(generated)) >= subset_size,
        f"KID over subsets of {subset_size} images needs at least {subset_size} real and {subset_size} generated "
        f"images, but there are {len(real)} and {len(generated)}; give more images, or a smaller --kid_subset_size.",
    )

    def subset(features: torch.Tensor, number: int) -> torch.Tensor:
        return features[permutation(seed, Purpose.KID_SUBSET, len(features), number)[:subset_size]]

    # Numbers of their own for either set: one order for both would pair equal sets image by image.
    values = [
        polynomial_mmd(real=subset(real, 2 * number), generated=subset(generated, 2 * number + 1))
        for number in range(subsets)
    ]
    return _over_parts(torch.tensor(values, dtype=torch.float64))


def polynomial_mmd(*, real: torch.Tensor, generated: torch.Tensor) -> float:
    """The unbiased squared maximum mean discrepancy (Lemma 6 of Gretton et al., "A kernel two-sample test", JMLR 2012)
    under the kernel (xᵀy / D + 1)³ of arXiv:1801.01401.

    Args:
        real [M, D], generated [N, D]: at least 2 each.
    """
    real, generated = real.to(torch.float64), generated.to(torch.float64)
    across = _kernel(real, generated).mean()
    return (_mean_over_pairs(real) + _mean_over_pairs(generated) - 2 * across).item()


def _kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left @ right.T).div_(left.shape[1]).add_(1).pow_(3)


def _mean_over_pairs(features: torch.Tensor) -> torch.Tensor:
    """The kernel's mean over pairs of different images."""
    kernel, size = _kernel(features, features), len(features)
    return (kernel.sum() - kernel.trace()) / (size * (size - 1))


def inception_score(*, logits: torch.Tensor, splits: int = 10, seed: int | None = 0) -> PartsEstimate:
    """The inception score (Section 4 of arXiv:1606.03498): exp of the mean Kullback-Leibler divergence between an
    image's class probabilities and those of its split, averaged over splits.

    The images are shuffled first: a set in the order of its classes has splits of a few classes each, and a score far
    too low.

    Args:
        logits [N, K]: float32, before the softmax.
        splits: number of equal parts.
        seed: of the order; None takes the images as they come.

    Returns:
        Mean and standard deviation over the splits, the mean resampled over images. In [1, K].

    Raises:
        InputError: fewer images than splits.
    """
    require(splits >= 1, f"--inception_score_splits {splits}: at least 1 is needed.")
    count = len(logits)
    require(
        count >= splits,
        f"The inception score over {splits} splits needs at least {splits} images, but there are {count}.",
    )

    def scores(order: torch.Tensor) -> torch.Tensor:
        bounds = [split * count // splits for split in range(splits + 1)]
        parts = [order[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
        return torch.stack([_score(logits[part]) for part in parts])

    def resample(chosen: torch.Tensor) -> float:
        # The positions come in random order, with nothing of the order of the images.
        return scores(chosen).mean().item()

    order = torch.arange(count) if seed is None else permutation(seed, Purpose.SPLIT_ORDER, count)
    return _over_parts(scores(order), resample, count)


def _score(logits: torch.Tensor) -> torch.Tensor:
    """exp of the mean divergence, which is the entropy of the mean less the mean entropy."""
    probabilities = logits.to(torch.float64).softmax(dim=1)
    own = torch.special.entr(probabilities).sum(dim=1).mean()
    return (torch.special.entr(probabilities.mean(dim=0)).sum() - own).exp()


def _over_parts(values: torch.Tensor, resample=None, size: int = 0) -> PartsEstimate:
    return PartsEstimate(values.mean().item(), resample, size, std=values.std(correction=0).item())
