"""Relative Mahalanobis distance against scikit-learn's covariances, and on digits that are known to be hard."""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.svm import SVC

from noisycond.data.sources import Digits
from noisycond.evaluation.difficulty import ClassGaussians, rmd


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels in [0, 1], float32 [N, 64], and labels of both splits."""
    splits = {split: Digits(split) for split in Digits.SPLITS}
    return {
        split: (torch.tensor(source.pixels.reshape(-1, 64) / 255, dtype=torch.float32), torch.tensor(source.labels))
        for split, source in splits.items()
    }


def test_scikit_learn_says_the_same():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + labels[:, None]
    asked, asked_labels = features[:50] + 0.5, labels[50:100].flip(0)
    array, classes = features.double().numpy(), labels.numpy()
    means = np.stack([array[classes == label].mean(axis=0) for label in range(4)])
    within = EmpiricalCovariance(assume_centered=True).fit(array - means[classes])  # about the class means
    total = EmpiricalCovariance().fit(array)
    points = asked.double().numpy()
    expected = within.mahalanobis(points - means[asked_labels]) - total.mahalanobis(points)
    ours = ClassGaussians.fit(features, labels, ridge=0.0).relative_mahalanobis(asked, asked_labels)
    assert (ours - torch.tensor(expected)).abs().max() < 1e-8
    nearly = ClassGaussians.fit(features, labels).relative_mahalanobis(asked, asked_labels)
    assert (nearly / ours - 1).abs().max() < 1e-3  # the default ridge


def test_digits_that_classifiers_get_wrong_or_are_unsure_about_are_harder(digits):
    (train, train_labels), (test, test_labels) = digits["train"], digits["test"]
    distances = ClassGaussians.fit(train, train_labels).relative_mahalanobis(test, test_labels)
    means = torch.stack([train[train_labels == label].mean(dim=0) for label in range(10)])
    wrong = torch.cdist(test, means).argmin(dim=1) != test_labels
    scores = torch.tensor(SVC().fit(train, train_labels).decision_function(test))
    of_class = scores.gather(1, test_labels[:, None])[:, 0]
    margin = of_class - scores.scatter(1, test_labels[:, None], -torch.inf).amax(dim=1)
    unsure = margin <= margin.quantile(0.1)
    for hard in (wrong, unsure):
        assert 20 < hard.sum() < 60
        assert distances[hard].median() > distances[~hard].quantile(0.75)


def test_digits_under_a_wrong_label_are_harder(digits):
    (train, train_labels), (test, test_labels) = digits["train"], digits["test"]
    known = {"real": train, "real_labels": train_labels, "generated": test}
    right, wrong = (rmd(**known, generated_labels=labels) for labels in (test_labels, (test_labels + 1) % 10))
    assert wrong["rmd_mean"].value > right["rmd_top"].value > right["rmd_mean"].value
