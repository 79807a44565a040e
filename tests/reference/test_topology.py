"""TopP&R against the authors' package: bandwidths, densities and bands exactly, the ratios within its own noise."""

import numpy as np
import pytest
import top_pr.top_pr as package
import torch

from noisycond.evaluation import topology
from noisycond.evaluation.topology import density_and_band, topological_precision_recall


def two_sets(dim: int, size: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian set, and a tighter and smaller one beside it."""
    generator = torch.Generator().manual_seed(dim)
    real = torch.randn(size, dim, generator=generator)
    return real, 0.9 * torch.randn(size - 20, dim, generator=generator) + shift


def packaged(real: torch.Tensor, generated: torch.Tensor, seed: int) -> dict:
    """What the package says; it draws from NumPy's global generator."""
    np.random.seed(seed)
    return package.compute_top_pr(real_features=real, fake_features=generated)


@pytest.mark.parametrize(("dim", "size", "shift"), [(4, 150, 0.4), (8, 150, 0.3), (20, 200, 0.2)])
def test_ratios_lie_within_the_noise_of_the_package(dim, size, shift):
    real, generated = two_sets(dim, size, shift)
    theirs = [packaged(real, generated, seed) for seed in range(8)]
    for seed in range(3):
        ours = topological_precision_recall(real=real, generated=generated, seed=seed)
        for name, value in (("fidelity", ours.fidelity), ("diversity", ours.diversity), ("Top_F1", ours.f1)):
            spread = [result[name] for result in theirs]
            # A quarter of its own range to either side, and two images.
            margin = (max(spread) - min(spread)) / 4 + 2 / size
            assert min(spread) - margin <= value <= max(spread) + margin, name


@pytest.mark.parametrize(("dim", "size"), [(4, 121), (4, 200), (12, 150)])
def test_bandwidths_are_those_of_the_package(monkeypatch, dim, size):
    bandwidths, estimate = [], package.confband_est
    monkeypatch.setattr(
        package, "confband_est", lambda data, h, **options: bandwidths.append(h) or estimate(data, h, **options)
    )
    real, generated = two_sets(dim, size, 0.3)
    packaged(real, generated, 0)
    ours = topological_precision_recall(real=real, generated=generated)
    assert [ours.real_bandwidth, ours.generated_bandwidth] == pytest.approx(bandwidths, rel=1e-6)


@pytest.mark.parametrize("block", [1 << 23, 1000])
def test_densities_and_bands_are_those_of_the_package_up_to_the_factor_left_out(monkeypatch, block):
    monkeypatch.setattr(topology, "_BLOCK", block)
    points, _ = two_sets(8, 200, 0.0)
    bandwidth, replicates = 2.5, 7
    np.random.seed(3)
    band, densities = package.confband_est(points.numpy(), bandwidth, repeat=replicates)
    np.random.seed(3)  # the same draws again, as counts
    draws = [np.random.choice(np.arange(200), size=200, replace=True) for _ in range(replicates)]
    counts = torch.tensor(np.stack([np.bincount(draw, minlength=200) for draw in draws], axis=1), dtype=torch.float64)
    factor = (np.pi / (4 * bandwidth)) ** 8
    ours, our_band = density_and_band(points.double(), bandwidth, counts, 0.1)
    assert (ours * factor / torch.tensor(densities) - 1).abs().max() < 1e-6
    assert our_band * factor == pytest.approx(band, rel=1e-5)
