"""LPIPS diversity: means over pairs with a distance whose answer is known, which pairs there are, and resampling."""

import itertools

import pytest
import torch
from torch_fidelity.sample_similarity_base import SampleSimilarityBase

from noisycond.errors import InputError
from noisycond.evaluation import perceptual
from noisycond.evaluation.perceptual import intra_class_pairs, lpips_diversity


class MeanAbsoluteDifference(SampleSimilarityBase):
    """A distance with a known answer, which notes the sizes of its batches."""

    def __init__(self):
        super().__init__("mean-absolute-difference")
        self.batches = []

    def forward(self, first, second):
        assert first.dtype == second.dtype == torch.uint8 and first.shape[1:] == second.shape[1:] == (3, 2, 2)
        self.batches.append(len(first))
        return (first.float() - second.float()).abs().mean(dim=(1, 2, 3))


def flat_images(*values: int):
    """Images of one grey value each."""
    values = torch.tensor(values, dtype=torch.uint8)
    return lambda positions: values[positions][:, None, None, None].expand(-1, 3, 2, 2)


def test_mean_over_classes_of_all_pairs():
    images = flat_images(10, 100, 12, 130, 20, 7)
    labels = torch.tensor([3, 8, 3, 8, 3, 5])  # class 3: 2, 10 and 8; class 8: 30; class 5 has no pair
    similarity = MeanAbsoluteDifference()
    estimate = lpips_diversity(images, labels, similarity, batch_size=3)
    assert estimate.value == pytest.approx((20 / 3 + 30) / 2)
    assert similarity.batches == [3, 1]


def test_without_labels_pairs_are_of_all_images():
    images = flat_images(10, 12, 20)
    assert lpips_diversity(images, None, MeanAbsoluteDifference(), count=3).value == pytest.approx(20 / 3)
    with pytest.raises(InputError, match="needs to know how many"):
        lpips_diversity(images, None, MeanAbsoluteDifference())


@pytest.mark.parametrize("listed", [1 << 20, 0])
def test_random_pairs(monkeypatch, listed):
    monkeypatch.setattr(perceptual, "_LISTED_PAIRS", listed)
    labels = torch.arange(300) % 3
    first, second, groups = intra_class_pairs(labels, 50, seed=1)
    assert (first != second).all() and (labels[first] == labels[second]).all()
    assert (labels[first] == groups).all() and groups.bincount().tolist() == [50, 50, 50]
    again, other = intra_class_pairs(labels, 50, seed=1), intra_class_pairs(labels, 50, seed=2)
    assert (again[0] == first).all() and (again[1] == second).all()
    assert (other[0] != first).any()
    # Classes do not share their draws.
    assert (first[groups == 0] // 3 != first[groups == 1] // 3).any()


@pytest.mark.parametrize("listed", [1 << 20, 0])
def test_every_pair_is_as_likely(monkeypatch, listed):
    monkeypatch.setattr(perceptual, "_LISTED_PAIRS", listed)
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for seed in range(300):
        first, second, _ = intra_class_pairs(torch.zeros(5, dtype=torch.int64), 5, seed)
        for pair in zip(first.tolist(), second.tolist(), strict=True):
            counts[tuple(sorted(pair))] += 1
    # 1,500 draws of 10 pairs: 150 ± 12 each.
    assert len(counts) == 10 and all(100 < count < 200 for count in counts.values())


def test_listed_pairs_are_different():
    first, second, _ = intra_class_pairs(torch.zeros(8, dtype=torch.int64), 28, seed=0)
    assert len({tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}) == 28
    assert len(intra_class_pairs(torch.zeros(8, dtype=torch.int64), 29, seed=0)[0]) == 28


def test_resampled_over_images():
    images = flat_images(10, 12, 20, 100, 130)
    estimate = lpips_diversity(images, torch.tensor([0, 0, 0, 1, 1]), MeanAbsoluteDifference())
    assert (estimate.of, estimate.size) == ("generated", 5)
    assert estimate.resample(torch.arange(5)) == pytest.approx(estimate.value)
    # Image 0 twice, 1 and 2 once, 3 twice: pair (0, 1) counts twice, (0, 2) twice, (1, 2) once; class 1 has none.
    assert estimate.resample(torch.tensor([0, 3, 1, 2, 0, 3])) == pytest.approx((2 * 2 + 2 * 10 + 8) / 5)


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, "at least 2 generated images, but there are 0"),
        (torch.tensor([0, 1, 2]), {}, "2 generated images of one class, but there are 3 images of 3 classes"),
        (torch.tensor([0, 0, 0]), {"pairs": 0}, "at least 1 pair per class, not 0"),
    ],
)
def test_refused(labels, options, sentence):
    with pytest.raises(InputError, match=sentence):
        lpips_diversity(flat_images(1, 2, 3), labels, MeanAbsoluteDifference(), **options)
