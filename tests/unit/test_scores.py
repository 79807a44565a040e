"""The scores over parts of the images: known values, order, subsets and bad input."""

import math

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation.scores import inception_score, kid, polynomial_mmd


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


# KID


def test_mmd_by_hand():
    # D = 1: k(x, y) = (xy + 1)³. Pairs within: k(0, 1) = 1 and k(1, 2) = 27; across: 1, 1, 8, 27.
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert polynomial_mmd(real=real, generated=generated) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kid_grows_with_the_distance_and_is_near_zero_for_one_distribution():
    real = normal(400, 8)
    values = [
        kid(real=real, generated=normal(400, 8, seed=1, offset=offset), subsets=20, subset_size=100)
        for offset in (0.0, 0.3, 1.0)
    ]
    assert abs(values[0].value) < 0.05 < values[1].value < values[2].value
    assert values[0].std > 0


def test_kid_is_unbiased():
    # Over many independent pairs of sets of one distribution the mean is within its error of 0.
    values = torch.tensor(
        [
            polynomial_mmd(real=normal(20, 3, seed=seed), generated=normal(20, 3, seed=5000 + seed))
            for seed in range(600)
        ]
    )
    assert values.mean().abs() <= 4 * values.std() / len(values) ** 0.5


def test_kid_is_a_function_of_its_seed():
    sets = {"real": normal(60, 4), "generated": normal(50, 4, seed=1)}
    one = kid(**sets, subsets=5, subset_size=20)
    state = torch.get_rng_state()
    again = kid(**sets, subsets=5, subset_size=20)
    assert (one.value, one.std) == (again.value, again.std)
    assert torch.equal(state, torch.get_rng_state())
    assert kid(**sets, subsets=5, subset_size=20, seed=1).value != one.value


def test_the_subsets_of_equal_sets_are_drawn_apart():
    values = normal(100, 4)
    # Drawn alike, each pair of subsets would be one set twice, and the estimate far below 0.
    drawn = kid(real=values, generated=values, subsets=50, subset_size=10)
    alike = polynomial_mmd(real=values[:10], generated=values[:10])
    assert alike < -0.5 < drawn.value


def test_subsets_differ_and_a_whole_set_does_not():
    sets = {"real": normal(40, 4), "generated": normal(40, 4, seed=1)}
    assert kid(**sets, subsets=3, subset_size=39).std > 0
    whole = kid(**sets, subsets=3, subset_size=40)
    assert whole.std == pytest.approx(0, abs=1e-12)
    assert whole.value == pytest.approx(polynomial_mmd(**sets), abs=1e-12)


def test_kid_of_too_few_images_says_how_many_it_needs():
    with pytest.raises(InputError, match=r"at least 1000 real and 1000 generated images, but there are 1200 and 999;"):
        kid(real=normal(1200, 2), generated=normal(999, 2))
    with pytest.raises(InputError, match="--kid_subset_size"):
        kid(real=normal(3, 2), generated=normal(2000, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"subset_size": 1}, "--kid_subset_size 1: at least 2"), ({"subsets": 0}, "--kid_subsets 0: at least 1")],
)
def test_kid_refuses_sizes_that_mean_nothing(options, words):
    with pytest.raises(InputError, match=words):
        kid(real=normal(10, 2), generated=normal(10, 2), **{"subset_size": 5, **options})


def test_kid_refuses_features_of_different_sizes():
    with pytest.raises(InputError, match="have 2 features and the generated ones 3"):
        kid(real=normal(10, 2), generated=normal(10, 3), subset_size=5)


# Inception score


def sure(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits of a classifier that is certain."""
    return torch.nn.functional.one_hot(labels, classes).float() * 200


def test_certain_and_balanced_classes_score_their_number():
    logits = sure(torch.arange(50) % 5, 5)
    assert inception_score(logits=logits, splits=1).value == pytest.approx(5, rel=1e-12)
    in_turn = inception_score(logits=logits, splits=5, seed=None)
    assert in_turn.value == pytest.approx(5, rel=1e-12) and in_turn.std == pytest.approx(0, abs=1e-12)


def test_images_all_alike_score_one():
    logits = normal(1, 5).expand(50, 5)
    assert inception_score(logits=logits).value == pytest.approx(1, rel=1e-12)


def test_two_images_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)  # (3/4, 1/4) and (1/2, 1/2)
    mean = (5 / 8, 3 / 8)
    divergence = 0.5 * (
        0.75 * math.log(0.75 / mean[0])
        + 0.25 * math.log(0.25 / mean[1])
        + 0.5 * math.log(0.5 / mean[0])
        + 0.5 * math.log(0.5 / mean[1])
    )
    assert inception_score(logits=logits, splits=1).value == pytest.approx(math.exp(divergence), rel=1e-12)


def test_a_set_in_the_order_of_its_classes_scores_as_any_other_order():
    labels = torch.arange(10).repeat_interleave(100)
    assert inception_score(logits=sure(labels, 10), seed=None).value == pytest.approx(1)
    assert inception_score(logits=sure(labels, 10)).value > 9


def test_the_order_is_a_function_of_the_seed():
    logits = normal(100, 4) * 3
    one = inception_score(logits=logits)
    assert inception_score(logits=logits).value == one.value
    assert inception_score(logits=logits, seed=1).value != one.value
    assert one.std > 0


def test_resampling_takes_the_chosen_images():
    logits = normal(100, 4) * 3
    estimate = inception_score(logits=logits, splits=4, seed=None)
    assert (estimate.size, estimate.of) == (100, "generated")
    assert estimate.resample(torch.arange(100)) == pytest.approx(estimate.value, rel=1e-12)
    assert estimate.resample(torch.zeros(100, dtype=torch.int64)) == pytest.approx(1, rel=1e-12)


def test_every_image_is_in_a_split():
    # 7 images in 3 splits: 2, 2 and 3.
    logits = sure(torch.tensor([0, 1, 0, 1, 0, 1, 2]), 3)
    assert inception_score(logits=logits, splits=3, seed=None).value == pytest.approx((2 + 2 + 3) / 3, rel=1e-12)


def test_too_few_images_for_the_splits_are_refused():
    with pytest.raises(InputError, match=r"10 splits needs at least 10 images, but there are 9\.$"):
        inception_score(logits=normal(9, 3))
    with pytest.raises(InputError, match="--inception_score_splits 0"):
        inception_score(logits=normal(9, 3), splits=0)
