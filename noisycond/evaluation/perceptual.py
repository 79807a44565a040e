"""Perceptual diversity: how far apart generated images of one class look.

Letters: M generated images, B images of a batch, H, W height and width, P pairs.
"""

import math
from collections.abc import Callable

import torch
from tqdm import tqdm

from noisycond import randomness
from noisycond.errors import require
from noisycond.evaluation.estimates import Estimate
from noisycond.randomness import Purpose


# Up to so many, all pairs of a class are put in random order and the first taken; of more, single ones are drawn.
_LISTED_PAIRS = 1 << 20


@torch.no_grad()
def lpips_diversity(
    images_of: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor | None,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    count: int | None = None,
    pairs: int = 100,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Estimate:
    """Intra-class LPIPS: the mean over classes of the mean distance between two images of the class, over random
    pairs (LPIPS: Zhang et al., arXiv:1801.03924; within groups as a measure of diversity: Ojha et al.,
    arXiv:2104.06820). The higher, the more diverse. Classes with one image have no pair and are left out.

    Resampled over images: a pair counts as often as both of its images are drawn together. Where each image is in few
    pairs, intervals come out wider than they need be.

    Args:
        images_of: gives images by their positions, int64 [B] in [0, M): uint8 [B, 3, H, W].
        labels [M]: int64, classes; None where there are none, and pairs are drawn from all images.
        similarity: takes two batches, uint8 [B, 3, H, W] in [0, 255], and returns distances [B], as a torch-fidelity
            `SampleSimilarityBase` does (`lpips-vgg16`). It is called as it is: move it to the device before.
        count: M; needed where there are no labels.
        pairs: per class, different ones (of more than 1,448 images one may come twice); all there are where a class
            has no more.
        seed: of the pairs. batch_size: pairs at a time. device: where the similarity runs. progress: shows a bar.

    Raises:
        InputError: no two images of one class, or fewer than 1 pair asked for.
    """
    require(pairs >= 1, f"LPIPS diversity needs at least 1 pair per class, not {pairs}.")
    if labels is None:
        require(count is not None, "LPIPS diversity of images without labels needs to know how many there are.")
        labels = torch.zeros(count, dtype=torch.int64)
    require(len(labels) > 0, "LPIPS diversity needs at least 2 generated images, but there are 0.")
    first, second, groups = intra_class_pairs(labels, pairs, seed)
    require(
        len(first) > 0,
        f"LPIPS diversity needs at least 2 generated images of one class, but there are {len(labels)} images of "
        f"{len(labels.unique())} classes.",
    )
    distances = []
    for start in tqdm(range(0, len(first), batch_size), desc="LPIPS diversity", delay=2, disable=not progress):
        batch = slice(start, start + batch_size)
        two = (images_of(positions[batch]).to(device) for positions in (first, second))
        distances.append(similarity(*two).reshape(-1).to("cpu", torch.float64))
    distances = torch.cat(distances)

    def mean_of_classes(times: torch.Tensor) -> float:
        """The mean over classes of the mean over pairs that count so many times, float64 [P]."""
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
        weights = sums.index_add(0, groups, times)
        sums = sums.index_add(0, groups, times * distances)
        return (sums[weights > 0] / weights[weights > 0]).mean().item() if (weights > 0).any() else math.nan

    def resample(chosen: torch.Tensor) -> float:
        drawn = chosen.bincount(minlength=len(labels)).to(torch.float64)
        return mean_of_classes(drawn[first] * drawn[second])

    return Estimate(mean_of_classes(torch.ones_like(distances)), resample, len(labels))


def intra_class_pairs(
    labels: torch.Tensor, pairs: int, seed: int
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """Random pairs of different images of one class.

    Args:
        labels [M]: int64. pairs: per class. seed: of the draws, which for a class depend on its label and size alone.

    Returns:
        Positions of the two images and the place of their class in ascending order: int64 [P] each.
    """
    firsts, seconds, groups = [], [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        smaller, larger = _pairs_among(len(members), pairs, seed, label % 2**32)
        firsts.append(members[smaller])
        seconds.append(members[larger])
        groups.append(torch.full_like(smaller, len(groups)))
    return torch.cat(firsts), torch.cat(seconds), torch.cat(groups)


def _pairs_among(size: int, pairs: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different numbers of range(size) for each pair: int64 [P] each."""
    total = size * (size - 1) // 2
    if total <= _LISTED_PAIRS:
        smaller, larger = torch.triu_indices(size, size, offset=1)
        chosen = randomness.permutation(seed, Purpose.IMAGE_PAIRS, total, epoch)[:pairs]
        return smaller[chosen], larger[chosen]
    keys = torch.arange(2 * pairs)
    draws = randomness.randint(
        seed, Purpose.IMAGE_PAIRS, keys, torch.tensor([size, size - 1]).repeat_interleave(pairs), epoch
    )
    first, second = draws.split(pairs)
    return first, second + (second >= first)
