"""TopP&R: sets whose answer is known, and what it refuses."""

import itertools

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation import topology
from noisycond.evaluation.topology import (
    balloon_bandwidth,
    density_and_band,
    kernel_density,
    topological_precision_recall,
)


def gaussian(size: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def test_a_set_against_itself():
    points = gaussian(300)
    result = topological_precision_recall(real=points, generated=points)
    assert (result.fidelity, result.diversity, result.f1) == (1.0, 1.0, 1.0)


def test_a_collapsed_set_has_fidelity_without_diversity():
    real = gaussian(600)
    real[::2, 0] += 50.0  # two modes, of which the generated images have one
    result = topological_precision_recall(real=real, generated=0.8 * gaussian(300, seed=1))
    assert result.fidelity > 0.95
    assert 0.3 < result.diversity < 0.5


def test_sets_far_apart_share_nothing():
    result = topological_precision_recall(real=gaussian(200), generated=gaussian(200) + 100.0)
    assert (result.fidelity, result.diversity, result.f1) == (0.0, 0.0, 0.0)


def test_real_and_generated_trade_places():
    first, second = gaussian(200), 0.7 * gaussian(250, seed=1)
    one = topological_precision_recall(real=first, generated=second)
    other = topological_precision_recall(real=second, generated=first)
    assert (one.fidelity, one.diversity) == (other.diversity, other.fidelity)
    assert one.fidelity != one.diversity


def test_neither_scale_nor_place_matters():
    first, second = gaussian(200), 0.8 * gaussian(200, seed=1) + 0.3
    one = topological_precision_recall(real=first, generated=second)
    other = topological_precision_recall(real=64 * first + 512, generated=64 * second + 512)
    assert (one.real_in_real == other.real_in_real).all() and one.fidelity == other.fidelity
    assert other.real_bandwidth == pytest.approx(64 * one.real_bandwidth, rel=1e-4)


def test_small_blocks_give_the_same(monkeypatch):
    first, second = gaussian(200), 0.8 * gaussian(250, seed=1) + 0.3
    whole = topological_precision_recall(real=first, generated=second)
    monkeypatch.setattr(topology, "_BLOCK", 999)
    parts = topological_precision_recall(real=first, generated=second)
    for name in ("real_in_real", "real_in_generated", "generated_in_generated", "generated_in_real"):
        assert (getattr(whole, name) == getattr(parts, name)).all()
    assert whole.real_bandwidth == pytest.approx(parts.real_bandwidth, rel=1e-12)


def test_many_features_are_projected():
    first, second = gaussian(250, dim=80), gaussian(250, dim=80, seed=1) + 0.2
    projected = topological_precision_recall(real=first, generated=second, projected_dim=8)
    again = topological_precision_recall(real=first, generated=second, projected_dim=8)
    another = topological_precision_recall(real=first, generated=second, projected_dim=8, seed=1)
    assert projected.real_bandwidth == again.real_bandwidth != another.real_bandwidth
    with pytest.raises(InputError, match="80 dimensions"):
        topological_precision_recall(real=first, generated=second, projected_dim=None)


def test_the_projection_keeps_lengths_on_average():
    difference = gaussian(1, dim=2048)[0]
    lengths = [(difference @ topology._random_projection(2048, 32, seed)).square().sum() for seed in range(60)]
    # The standard deviation of their mean is √(2/32/60) = 3.2 %.
    assert torch.stack(lengths).mean() / difference.square().sum() == pytest.approx(1.0, abs=0.13)


def test_balloon_bandwidth_by_hand():
    # Of 0, 1, 3, 7, 20 the first three have two later points: second nearest at 3, 6 and 17; the lower of the two in
    # the middle of an even number, the one before the middle of an odd one.
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]], dtype=torch.float64)
    assert balloon_bandwidth(points, 2) == 3.0
    assert balloon_bandwidth(points, 1) == 2.0  # 1, 2, 4, 13
    assert balloon_bandwidth(points, 4) == 20.0


def test_kernel_density_by_hand():
    points = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    density = kernel_density(points, torch.tensor([[0.0], [2.0], [9.0]], dtype=torch.float64), 2.0)
    expected = torch.tensor([(1 + 0.5**0.5) / 3, 0.5**0.5 / 3, 0.0], dtype=torch.float64)
    assert (density - expected).abs().max() < 1e-12


def test_the_band_is_as_wide_as_the_greatest_difference_up_or_down():
    points = torch.tensor([[0.0], [0.0], [0.0], [10.0], [20.0]], dtype=torch.float64)
    counts = torch.tensor([[1, 0, 0, 2, 2], [1, 1, 1, 2, 0]], dtype=torch.float64).T
    density, band = density_and_band(points, 1.0, counts, significance=0.25)
    assert (density - torch.tensor([0.6, 0.6, 0.6, 0.2, 0.2], dtype=torch.float64)).abs().max() < 1e-12
    assert band == pytest.approx(0.2 + 0.75 * 0.2)  # the differences are -0.4 and ±0.2


def test_estimates_resample_one_side_while_the_supports_stay():
    first, second = gaussian(200), 0.8 * gaussian(250, seed=1) + 0.3
    result = topological_precision_recall(real=first, generated=second)
    estimates = result.estimates()
    assert {name: estimate.value for name, estimate in estimates.items()} == {
        "topp_fidelity": result.fidelity,
        "topp_diversity": result.diversity,
        "topp_f1": result.f1,
    }
    fidelity, diversity = estimates["topp_fidelity"], estimates["topp_diversity"]
    assert (fidelity.of, fidelity.size, diversity.of, diversity.size) == ("generated", 250, "real", 200)
    assert fidelity.resample(torch.arange(250)) == result.fidelity
    inside = (result.generated_in_real & result.generated_in_generated).nonzero()[:, 0]
    outside = (~result.generated_in_real & result.generated_in_generated).nonzero()[:, 0]
    assert fidelity.resample(torch.cat([inside[:3], outside[:1]])) == 0.75
    assert estimates["topp_f1"].resample is None


@pytest.mark.parametrize(("few", "many"), [("real", "generated"), ("generated", "real")])
def test_too_few_images(few, many):
    with pytest.raises(InputError, match=f"at least 31 {few} images .* but there are 30"):
        topological_precision_recall(**{few: gaussian(30), many: gaussian(300)})


def test_copies_have_no_bandwidth():
    with pytest.raises(InputError, match="half of the generated images have 30 exact copies"):
        topological_precision_recall(real=gaussian(100), generated=gaussian(1).repeat(100, 1))


def test_nothing_stands_out():
    # The centre of 8 dimensions and 40 of the 112 points ±e_i ± e_j around it, none nearer to another than the
    # bandwidth: the density at each is that of the image itself, less than resampling changes it.
    corners = torch.tensor(
        [
            [sign * (axis == i) + other_sign * (axis == j) for axis in range(8)]
            for i, j in itertools.combinations(range(8), 2)
            for sign, other_sign in itertools.product((1.0, -1.0), repeat=2)
        ]
    )
    real = torch.cat([torch.zeros(1, 8), corners[:40]])
    with pytest.raises(InputError, match="none of the 41 real images stands out .* significance above 0.1"):
        topological_precision_recall(real=real, generated=gaussian(100, dim=8))
