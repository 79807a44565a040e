"""Precision, recall, density and coverage against the `prdc` package and torch-fidelity, on features without ties."""

import pytest
import torch
from prdc import compute_prdc
from torch_fidelity.metric_prc import prc_features_to_metric

from noisycond.evaluation import distances
from noisycond.evaluation.neighbours import precision_recall_density_coverage


SHAPES = [(40, 30, 2), (300, 200, 8), (128, 64, 16), (129, 193, 64), (500, 650, 200), (7, 300, 3)]


def sets(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Real features with a mean and a heavier tail, and generated ones that are a little off."""
    size, other, dim = shape
    generator = torch.Generator().manual_seed(size)
    real = torch.randn(size, dim, generator=generator).exp() + 1
    return real, torch.randn(other, dim, generator=generator).mul_(0.9).exp() + 1.1


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(distances, "TILE", 64)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_prdc(shape, k):
    real, generated = sets(shape)
    found = precision_recall_density_coverage(real=real, generated=generated, precision_k=k, coverage_k=k)
    # In float64: prdc rounds distances of float32 features to float32, which makes ties.
    expected = compute_prdc(real.double().numpy(), generated.double().numpy(), k)
    assert found.precision == expected["precision"]
    assert found.recall == expected["recall"]
    assert found.density == pytest.approx(expected["density"], rel=1e-12)
    assert found.coverage == expected["coverage"]
    swapped = compute_prdc(generated.double().numpy(), real.double().numpy(), k)
    assert (swapped["precision"], swapped["recall"]) != (expected["precision"], expected["recall"])


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_fidelity(shape, parts):
    real, generated = sets(shape)
    found = precision_recall_density_coverage(real=real, generated=generated)
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": parts, "verbose": False}
    # In float64: torch-fidelity's products of float32 features are off by more than some distances differ.
    expected = prc_features_to_metric(generated.double(), real.double(), **options)
    assert found.precision == pytest.approx(expected["precision"], abs=1e-7)  # its mean is in float32
    assert found.recall == pytest.approx(expected["recall"], abs=1e-7)
    swapped = prc_features_to_metric(real.double(), generated.double(), **options)
    assert abs(swapped["precision"] - found.precision) + abs(swapped["recall"] - found.recall) > 1e-3
