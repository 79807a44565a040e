"""Memorization: copies are found, also of training images that occur twice, and unseen digits are no copies."""

import numpy as np
import pytest
import torch

from noisycond.data.sources import Digits
from noisycond.errors import InputError
from noisycond.evaluation.memorization import memorization


def pixels(split: str) -> torch.Tensor:
    digits = Digits(split).pixels
    return torch.from_numpy(digits.reshape(len(digits), -1).astype(np.float32))


@pytest.mark.parametrize("order", ["same", "reversed"])
def test_a_copied_training_set_is_memorized(order):
    train = pixels("train")
    positions = torch.arange(len(train)) if order == "same" else torch.arange(len(train)).flip(0)
    found = memorization(train=train, generated=train[positions])
    assert found.ratio == 1
    assert found.mean_distance == 0
    assert torch.equal(train[found.nearest], train[positions])


def test_unseen_digits_are_not():
    found = memorization(train=pixels("train"), generated=pixels("test"))
    assert found.ratio < 0.01
    assert found.distances.min() > 0


def test_copies_of_what_occurs_twice():
    train = torch.tensor([[0.0, 0.1], [0.0, 0.1], [5.0, 5.0]])
    found = memorization(train=train, generated=torch.tensor([[0.0, 0.1], [0.0, 0.2]]))
    assert found.memorized.tolist() == [True, False]


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("ratio", 1 / 3, [False, True, False]),
        ("ratio", 0.5, [True, True, False]),
        ("distance", 1.5, [False, True, True]),
        ("distance", 3.0, [False, True, True]),
        ("distance", 3.1, [True, True, True]),
    ],
)
def test_rules(rule, threshold, expected):
    train = torch.tensor([[0.0], [10.0], [100.0], [101.0]])
    generated = torch.tensor([[3.0], [9.0], [100.4]])  # distances to the nearest two: 3 and 7, 1 and 9, 0.4 and 0.6
    found = memorization(train=train, generated=generated, rule=rule, threshold=threshold)
    assert found.memorized.tolist() == expected
    assert found.nearest.tolist() == [0, 1, 2]
    assert (found.distances - torch.tensor([3, 1, 0.4])).abs().max() < 1e-5
    assert found.mean_distance == pytest.approx(4.4 / 3, rel=1e-5)


def test_which_set_is_which():
    train = torch.arange(40, dtype=torch.float32)[:, None]
    generated = torch.tensor([[0.0], [100.0]])
    assert memorization(train=train, generated=generated).memorized.tolist() == [True, False]
    assert len(memorization(train=generated, generated=train).memorized) == 40


def test_estimates():
    train = torch.tensor([[0.0], [10.0]])
    estimates = memorization(train=train, generated=torch.tensor([[1.0], [5.0], [4.0]])).estimates()
    assert list(estimates) == ["memorization_ratio", "nearest_train_distance"]
    assert estimates["memorization_ratio"].value == pytest.approx(1 / 3)
    assert estimates["nearest_train_distance"].resample(torch.tensor([0, 0, 2])) == 2
    assert {(estimate.of, estimate.size) for estimate in estimates.values()} == {("generated", 3)}


@pytest.mark.parametrize(
    ("train", "generated", "options", "sentence"),
    [
        ((1, 2), (3, 2), {}, "memorization by ratio needs at least 2 training images, but there is 1."),
        (
            (0, 2),
            (3, 2),
            {"rule": "distance"},
            "by distance needs at least 1 training image, but there are 0.",
        ),
        ((3, 2), (0, 2), {}, "memorization needs at least 1 generated image, but there are none."),
        ((3, 2), (3, 4), {}, "training images have features of shape [2], but generated ones of [4]"),
        ((3, 2), (3, 2), {"rule": "distanc"}, "(did you mean 'distance'?)"),
        ((3, 2), (3, 2), {"threshold": 0.0}, "expected a number above 0."),
        ((3, 2), (3, 2), {"threshold": 1.5}, "expected at most 1"),
    ],
)
def test_bad_input(train, generated, options, sentence):
    with pytest.raises(InputError) as caught:
        memorization(train=torch.zeros(train), generated=torch.zeros(generated), **options)
    assert sentence in str(caught.value)
