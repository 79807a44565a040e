"""FID and sFID against torch-fidelity, closed forms and a case computed by hand."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from noisycond.evaluation.moments import Moments, fid, frechet_distance


def correlated(count: int, dim: int, seed: int, decay: float = 3.0, offset: float = 0.0) -> torch.Tensor:
    """Features whose standard deviations fall from 1 to e^-decay, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    scales = torch.linspace(0, -decay, dim, dtype=torch.float64).exp()
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) * scales) @ turn + offset


def torch_fidelity_fid(real: torch.Tensor, generated: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(features) for features in (generated, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def gaussian(mean, covariance) -> Moments:
    return Moments(None, torch.tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64))


# torch-fidelity


@pytest.mark.parametrize(("count", "dim"), [(500, 64), (3000, 256), (60, 64), (100, 300)])
def test_fid_is_that_of_torch_fidelity(count, dim):
    """In float64, also with fewer images than features."""
    real, generated = correlated(count, dim, 0), correlated(count + 20, dim, 1, offset=0.1)
    expected = torch_fidelity_fid(real, generated)
    assert fid(real=real, generated=generated).value == pytest.approx(expected, rel=1e-6)


def test_fid_of_features_in_float32_is_that_of_the_same_numbers_in_float64():
    real, generated = correlated(500, 64, 0).float(), correlated(500, 64, 1).float()
    assert fid(real=real, generated=generated).value == pytest.approx(
        torch_fidelity_fid(real.double(), generated.double()), rel=1e-6
    )


def test_moments_are_those_of_torch_fidelity():
    features = correlated(300, 32, 0, offset=2.0)
    expected, moments = fid_features_to_statistics(features), Moments.of(features, chunk=64)
    assert np.abs(moments.mean.numpy() - expected["mu"]).max() <= 1e-12
    assert np.abs(moments.covariance.numpy() - expected["sigma"]).max() <= 1e-12


# Closed forms


def test_one_dimension_is_the_distance_of_means_and_of_standard_deviations():
    distance = frechet_distance(real=gaussian([1.0], [[9.0]]), generated=gaussian([3.0], [[16.0]]))
    assert distance == pytest.approx((3 - 1) ** 2 + (4 - 3) ** 2, rel=1e-12)


def test_covariances_that_commute():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    real, generated = torch.tensor([4.0, 1, 9, 1, 0.25, 0]), torch.tensor([1.0, 1, 4, 25, 0, 0])
    moments = [gaussian([0.0] * 6, turn @ values.double().diag() @ turn.T) for values in (real, generated)]
    expected = (real.sqrt() - generated.sqrt()).square().sum().item()
    assert frechet_distance(real=moments[0], generated=moments[1]) == pytest.approx(expected, rel=1e-8)


def test_covariances_that_do_not_commute():
    """tr √(AB) of 2 × 2 matrices is √(tr AB + 2 √det AB)."""
    real, generated = torch.tensor([[2.0, 1], [1, 3]]), torch.tensor([[5.0, -2], [-2, 1]])
    product = real @ generated
    assert (product - generated @ real).abs().max() > 1
    common = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (2**2 + real.trace() + generated.trace() - 2 * common).item()
    distance = frechet_distance(real=gaussian([0.0, 0], real), generated=gaussian([0.0, 2], generated))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_a_plane_turned_out_of_itself():
    """Rank 1 against rank 1: of the trace remains the cosine of the angle, of a square angle nothing."""
    for angle in (0.0, 0.3, torch.pi / 2):
        direction = torch.tensor([np.cos(angle), np.sin(angle), 0], dtype=torch.float64)
        real, generated = gaussian([0.0] * 3, torch.diag(torch.tensor([4.0, 0, 0]))), direction.outer(direction) * 9
        distance = frechet_distance(real=real, generated=gaussian([0.0] * 3, generated))
        assert distance == pytest.approx(4 + 9 - 2 * 6 * np.cos(angle), rel=1e-12)


def test_large_samples_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200_000, 4, generator=generator)
    generated = torch.randn(200_000, 4, generator=generator) * 2 + 1
    assert fid(real=real, generated=generated).value == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, rel=0.01)


# What a square root of the product of the covariances gets wrong


@pytest.mark.parametrize("counts", [(20, 20), (6, 50), (50, 6)])
def test_near_singular_covariances_have_no_imaginary_part(counts):
    """scipy.linalg.sqrtm of the product of the covariances has one here; ours keeps twelve digits. With centred sets X
    and Y the trace is the sum of the singular values of X Yᵀ."""
    sets = [correlated(count, 60, seed) for seed, count in enumerate(counts)]
    real, generated = (Moments.of(features) for features in sets)
    root = scipy.linalg.sqrtm((real.covariance @ generated.covariance).numpy())
    assert np.iscomplexobj(root) and np.abs(root.imag).max() > 0
    factors = [(features - features.mean(dim=0)) / (len(features) - 1) ** 0.5 for features in sets]
    common = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    spread = sum(factor.square().sum() for factor in factors)
    expected = (real.mean - generated.mean).square().sum() + spread - 2 * common
    assert frechet_distance(real=real, generated=generated) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("decay", [0, 6, 12, 18])
def test_ill_conditioned_sets_are_at_no_distance_from_themselves(decay):
    values = correlated(300, 100, 0, decay=decay)
    assert 0 <= fid(real=values, generated=values).value <= 1e-8 * values.var(dim=0).sum()


# sFID


def test_sfid_by_hand():
    """Maps of one channel and 1 × 2 places, so S = 2 numbers each. Real: (0, 0), (4, 0), mean (2, 0), covariance
    diag(8, 0). Generated: (0, 1), (2, 1), (1, 0), (1, 2), mean (1, 1), covariance diag(2/3, 2/3). The distance is
    1 + 1 + 8 + 4/3 − 2 √(8 · 2/3)."""
    real = torch.tensor([[[[0.0, 0]]], [[[4, 0]]]])
    generated = torch.tensor([[[[0.0, 1]]], [[[2, 1]]], [[[1, 0]]], [[[1, 2]]]])
    value = fid(real=real.flatten(1), generated=generated.flatten(1)).value
    assert value == pytest.approx(2 + 8 + 4 / 3 - 2 * (16 / 3) ** 0.5, rel=1e-12)


def test_sfid_sees_where_things_are():
    """Two places that change together or apart: the same mean over the map, another sFID."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5000, generator=generator)
    apart, swapped = torch.stack([3 * left, right], dim=1), torch.stack([right, 3 * left], dim=1)
    assert fid(real=apart.mean(dim=1, keepdim=True), generated=swapped.mean(dim=1, keepdim=True)).value < 1e-10
    assert fid(real=apart, generated=swapped).value == pytest.approx(2 * (3 - 1) ** 2, rel=0.1)
