"""Sample entropy: distributions whose entropy is known, copies, and what it refuses."""

import math

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation.entropy import gaussian_entropy, nearest_neighbour_entropy, sample_entropy


def normal(size: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def uniform(size: int, dim: int) -> torch.Tensor:
    return torch.rand(size, dim, generator=torch.Generator().manual_seed(0))


def true_entropy(covariance: torch.Tensor) -> float:
    return (len(covariance) * math.log(2 * math.pi * math.e) + covariance.double().logdet().item()) / 2


@pytest.mark.parametrize("estimator", ["knn", "gaussian"])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_gaussian(estimator, dim):
    mixing = torch.eye(dim) + 0.3 * normal(dim, dim, seed=1)
    value = sample_entropy(normal(4000, dim) @ mixing.T + 5.0, estimator).value
    assert value == pytest.approx(true_entropy(mixing @ mixing.T), abs=0.05)


@pytest.mark.parametrize("k", [1, 5])
def test_a_uniform_cube(k):
    assert nearest_neighbour_entropy(uniform(4000, 2), k).value == pytest.approx(0.0, abs=0.06)
    assert nearest_neighbour_entropy(8 * uniform(4000, 2), k).value == pytest.approx(2 * math.log(8), abs=0.06)


def test_by_hand():
    # Distances to the nearest are 1, 1 and 2; ψ(3) − ψ(1) = 1 + 1/2; the unit ball of one dimension has length 2.
    value = nearest_neighbour_entropy(torch.tensor([[0.0], [1.0], [3.0]]), k=1).value
    assert value == pytest.approx(1.5 + math.log(2) + math.log(2) / 3)


def test_the_gaussian_sees_the_covariance_alone():
    signs = torch.sign(normal(2000, 2))
    clusters = signs + 0.01 * normal(2000, 2, seed=1)
    filled = normal(2000, 2, seed=2)
    by_gaussian = [gaussian_entropy(points).value for points in (clusters, filled)]
    by_neighbours = [nearest_neighbour_entropy(points).value for points in (clusters, filled)]
    assert abs(by_gaussian[0] - by_gaussian[1]) < 0.1
    assert by_neighbours[0] < by_neighbours[1] - 4


def test_fewer_images_than_features():
    tight, wide = normal(40, 100), 2 * normal(40, 100)
    difference = nearest_neighbour_entropy(wide).value - nearest_neighbour_entropy(tight).value
    assert difference == pytest.approx(100 * math.log(2), abs=1e-6)
    with pytest.raises(InputError, match="more images than the 100 features, at least 101, but there are 40"):
        gaussian_entropy(tight)


def test_more_copies_lower_entropy_and_it_stays_a_number():
    points = normal(300, 4)
    values = [nearest_neighbour_entropy(points, k=3).value]
    for copied in (10, 40):
        with_copies = torch.cat([points[:copied].repeat(4, 1), points[4 * copied :]])
        with pytest.warns(UserWarning, match=f"{4 * copied} of 300 images have 3 or more copies"):
            values.append(nearest_neighbour_entropy(with_copies, k=3).value)
    assert values[0] > values[1] > values[2] > -200


@pytest.mark.filterwarnings("error")
def test_fewer_than_k_copies_need_no_help():
    points = normal(300, 4)
    assert math.isfinite(nearest_neighbour_entropy(torch.cat([points, points]), k=3).value)


def test_resampled():
    points = normal(100, 3)
    estimate = sample_entropy(points)
    assert (estimate.of, estimate.size) == ("generated", 100)
    assert estimate.resample(torch.arange(100)) == estimate.value
    one = estimate.resample(torch.full((100,), 7))
    assert one != estimate.value and math.isfinite(one)
    gaussian = gaussian_entropy(points)
    assert gaussian.resample(torch.arange(100)) == gaussian.value
    half = torch.arange(100) % 50
    assert gaussian.resample(half) == pytest.approx(true_entropy(points[half].T.cov()), rel=1e-5)
    assert gaussian_entropy(normal(5, 3)).resample is None


@pytest.mark.parametrize(
    ("features", "options", "sentence"),
    [
        (normal(5, 3), {}, "k = 5 needs at least 6 images, but there are 5"),
        (normal(5, 3), {"k": 0}, "a k of at least 1, not 0"),
        (normal(1, 3).repeat(9, 1), {}, "all 9 images have the same features"),
        (normal(3, 3), {"estimator": "gaussian"}, "at least 4, but there are 3"),
        (normal(9, 3)[:, [0, 1, 1]], {"estimator": "gaussian"}, "depend linearly on one another"),
        (normal(9, 3), {"estimator": "kde"}, "the estimators knn and gaussian, not 'kde'"),
    ],
)
def test_refused(features, options, sentence):
    with pytest.raises(InputError, match=sentence):
        sample_entropy(features, **options)
