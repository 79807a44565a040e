"""KID and the inception score against torch-fidelity on the same features."""

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from noisycond.evaluation.scores import inception_score, kid


def normal(*shape: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def torch_fidelity_kid(real: torch.Tensor, generated: torch.Tensor, subsets: int, size: int) -> tuple[float, float]:
    metric = kid_features_to_metric(
        generated, real, kid_subsets=subsets, kid_subset_size=size, kid_kernel="poly", verbose=False
    )
    return metric["kernel_inception_distance_mean"], metric["kernel_inception_distance_std"]


@pytest.mark.parametrize(("count", "dim"), [(50, 3), (300, 64), (100, 300)])
def test_kid_of_one_subset_of_all_is_that_of_torch_fidelity(count, dim):
    real, generated = normal(count, dim, seed=0), normal(count, dim, seed=1, offset=0.2)
    expected, _ = torch_fidelity_kid(real, generated, 1, count)
    assert kid(real=real, generated=generated, subsets=1, subset_size=count).value == pytest.approx(
        expected, rel=1e-10
    )


def test_kid_over_subsets_is_that_of_torch_fidelity_within_their_noise():
    real, generated = normal(500, 16, seed=0), normal(600, 16, seed=1, offset=0.2)
    expected, std = torch_fidelity_kid(real, generated, 100, 50)
    ours = kid(real=real, generated=generated, subsets=100, subset_size=50)
    assert abs(ours.value - expected) <= 4 * std * (2 / 100) ** 0.5
    assert ours.std == pytest.approx(std, rel=0.3)


@pytest.mark.parametrize(("count", "splits"), [(100, 10), (107, 10), (50, 1), (33, 4)])
def test_the_inception_score_in_the_same_order_is_that_of_torch_fidelity(count, splits):
    logits = (normal(count, 20, seed=0) * 3).float()
    expected = isc_features_to_metric(logits, splits, shuffle=False)
    ours = inception_score(logits=logits, splits=splits, seed=None)
    assert ours.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert ours.std == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_the_inception_score_in_another_random_order_is_near():
    logits = (normal(5000, 10, seed=0) * 3).float()
    expected = isc_features_to_metric(logits, 10, shuffle=True)["inception_score_mean"]
    ours = inception_score(logits=logits)
    assert ours.value != expected and ours.value == pytest.approx(expected, rel=1e-3)


def test_kid_in_single_precision_is_that_of_double_precision():
    """torch-fidelity multiplies in the features' own precision; ours are raised to float64 first."""
    real, generated = normal(200, 64, seed=0).float(), normal(200, 64, seed=1).float()
    expected, _ = torch_fidelity_kid(real.double(), generated.double(), 1, 200)
    ours = kid(real=real, generated=generated, subsets=1, subset_size=200).value
    assert ours == pytest.approx(expected, rel=1e-10)
