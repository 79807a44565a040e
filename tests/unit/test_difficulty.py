"""Relative Mahalanobis distance: cases worked out by hand, covariances without an inverse, and what it refuses."""

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation import difficulty
from noisycond.evaluation.difficulty import ClassGaussians, rmd


# Two classes on a line, around -3 and 3 with variance 1: over all images the mean is 0 and the variance 10.
LINE = torch.tensor([[-4.0], [-2.0], [2.0], [4.0]])
CLASSES = torch.tensor([5, 5, 9, 9])


def classes_in(dim: int, size: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % count
    return torch.randn(size, dim, generator=generator) + 2.0 * labels[:, None], labels


def test_by_hand():
    gaussians = ClassGaussians.fit(LINE, CLASSES, ridge=0.0)
    distances = gaussians.relative_mahalanobis(torch.tensor([[-3.0], [-3.0], [0.0]]), torch.tensor([5, 9, 5]))
    expected = torch.tensor([0.0 - 0.9, 36.0 - 0.9, 9.0 - 0.0], dtype=torch.float64)
    assert (distances - expected).abs().max() < 1e-12


def test_the_ridge_is_a_share_of_the_mean_eigenvalue_of_all():
    gaussians = ClassGaussians.fit(LINE, CLASSES, ridge=0.1)  # adds 0.1 · 10 to both variances, 1 and 10
    distance = gaussians.relative_mahalanobis(torch.tensor([[1.0]]), torch.tensor([9]))
    assert distance.item() == pytest.approx(4.0 / 2.0 - 1.0 / 11.0)


def test_small_blocks_give_the_same(monkeypatch):
    features, labels = classes_in(4, 50)
    whole = ClassGaussians.fit(features, labels).relative_mahalanobis(features, labels)
    monkeypatch.setattr(difficulty, "_ROWS", 7)
    parts = ClassGaussians.fit(features, labels).relative_mahalanobis(features, labels)
    assert (whole - parts).abs().max() < 1e-10


def test_directions_without_variance_cancel():
    features, labels = classes_in(4, 50)
    wider = torch.cat([features, torch.full((50, 3), 7.0)], dim=1)
    plain = ClassGaussians.fit(features, labels).relative_mahalanobis(features, labels)
    flat = ClassGaussians.fit(wider, labels)
    assert (flat.relative_mahalanobis(wider, labels) - plain).abs().max() < 1e-3
    wider[:, 4] += 1.0  # an image off the plane of all real ones is so for its class and for all alike
    assert (flat.relative_mahalanobis(wider, labels) - plain).abs().max() < 1e-3


def test_mean_and_hardest():
    features, labels = classes_in(4, 300)
    generated, generated_labels = 1.5 * features[:250], labels[:250]
    estimates = rmd(real=features, real_labels=labels, generated=generated, generated_labels=generated_labels)
    distances = ClassGaussians.fit(features, labels).relative_mahalanobis(generated, generated_labels)
    hardest = distances.sort(descending=True).values[:2]  # 1 % of 250, rounded
    assert estimates["rmd_mean"].value == pytest.approx(distances.mean().item())
    assert estimates["rmd_top"].value == pytest.approx(hardest.mean().item())
    assert estimates["rmd_top"].value > estimates["rmd_mean"].value
    half = rmd(
        real=features, real_labels=labels, generated=generated, generated_labels=generated_labels, top=0.5, ridge=0.0
    )
    assert half["rmd_top"].value == pytest.approx(distances.topk(125).values.mean().item(), rel=1e-4)


def test_at_least_one_image_is_the_hardest():
    features, labels = classes_in(4, 30)
    top = rmd(real=features, real_labels=labels, generated=features, generated_labels=labels)["rmd_top"]
    distances = ClassGaussians.fit(features, labels).relative_mahalanobis(features, labels)
    assert top.value == distances.max().item()
    assert (top.of, top.size) == ("generated", 30)
    assert top.resample(torch.full((30,), 4)) == distances[4].item()


@pytest.mark.parametrize(
    ("real_labels", "generated_labels", "sentence"),
    [
        (None, CLASSES, "the real images have no labels"),
        (CLASSES, None, "the generated images have no labels"),
        (CLASSES[:3], CLASSES, "4 real images, but 3 labels"),
        (torch.arange(4), torch.arange(4), "more real images than classes, but there are 4 images of 4 classes"),
        (CLASSES, torch.tensor([5, 9, 9, 6]), "none of class 6"),
    ],
)
def test_refused(real_labels, generated_labels, sentence):
    with pytest.raises(InputError, match=sentence):
        rmd(real=LINE, real_labels=real_labels, generated=LINE, generated_labels=generated_labels)


def test_no_inverse():
    features = torch.cat([LINE, torch.zeros(4, 1)], dim=1)
    with pytest.raises(InputError, match="no inverse with a ridge of 0.0"):
        ClassGaussians.fit(features, CLASSES, ridge=0.0)
    with pytest.raises(InputError, match="at least 1 generated image"):
        rmd(real=LINE, real_labels=CLASSES, generated=LINE[:0], generated_labels=CLASSES[:0])
