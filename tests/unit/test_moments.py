"""Moments gathered in parts, and what the Fréchet distance says of small, odd and wrong input."""

import logging

import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation.moments import Moments, fid, frechet_distance


def features(count: int, dim: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, dim, generator=generator) @ mixing + offset


def difference(one: Moments, other: Moments) -> float:
    """The greatest difference of two moments, relative to their size."""
    assert one.count == other.count
    mean = (one.mean - other.mean).abs().max() / other.mean.abs().max()
    return max(mean, (one.covariance - other.covariance).abs().max() / other.covariance.abs().max()).item()


# Gathering


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_mean_and_unbiased_covariance(offset):
    values = features(300, 7, offset=offset)
    moments = Moments.of(values)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert (moments.mean - values.double().mean(dim=0)).abs().max() <= 1e-12 * max(1, offset)
    expected = torch.cov(values.double().T)
    assert (moments.covariance - expected).abs().max() <= 1e-12 * expected.abs().max() * max(1, offset**0.5)
    assert torch.equal(moments.covariance, moments.covariance.T)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 299, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_result_does_not_depend_on_the_chunks(chunk, offset):
    values = features(300, 7, offset=offset)
    assert difference(Moments.of(values, chunk), Moments.of(values, 300)) <= 1e-12


def test_a_great_offset_loses_no_digits():
    # Sums of squares would leave nothing of a variance of 1 beside a square of 1e18.
    values = torch.tensor([[1e9 - 1], [1e9], [1e9 + 1]], dtype=torch.float64)
    assert Moments.of(values, chunk=1).covariance.item() == pytest.approx(1.0, abs=1e-6)


def test_updates_and_merges_extend_and_keep_the_order_open():
    values = features(90, 5)
    whole = Moments.of(values)
    parts = [Moments.of(values[start : start + 30]) for start in (0, 30, 60)]
    assert difference(Moments.empty(5).merge(parts[2]).merge(parts[0]).merge(parts[1]), whole) <= 1e-12
    single = Moments.of(values[:1])
    assert single.covariance.abs().max() == 0
    assert difference(single.update(values[1:2]).update(values[:0]).update(values[2:]), whole) <= 1e-12
    assert difference(whole.merge(Moments.empty(5)), Moments.of(values)) == 0
    assert Moments.empty(5).merge(Moments.empty(5)).count == 0


def test_moments_merged_with_themselves_are_those_of_every_image_twice():
    values = features(20, 3)
    moments = Moments.of(values)
    assert difference(moments.merge(moments), Moments.of(torch.cat([values, values]))) <= 1e-12


def test_copies_count_as_often_as_they_say():
    values = features(50, 4)
    copies = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    copies[:10] = 0
    expected = Moments.of(values.repeat_interleave(copies, dim=0))
    for chunk in (8, 50):
        assert difference(Moments.of(values, chunk, copies), expected) <= 1e-12


# The distance


def test_a_set_is_at_no_distance_from_itself():
    values = features(500, 20)
    assert 0 <= fid(real=values, generated=values).value <= 1e-10


@pytest.mark.parametrize("count", [5, 40, 400])
def test_the_distance_is_symmetric(count):
    one, other = Moments.of(features(count, 40)), Moments.of(features(2 * count, 40, seed=1, offset=1))
    forth, back = frechet_distance(real=one, generated=other), frechet_distance(real=other, generated=one)
    assert forth == pytest.approx(back, rel=1e-12) and forth > 40


def test_rounding_makes_no_square_root_of_a_negative_number():
    """Two sets that share one direction of eleven: all other eigenvalues are zero but for rounding, of either sign."""
    for seed in range(10):
        values = torch.randn(21, 21, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turn = torch.linalg.qr(values)[0]
        covariances = [turn[:, part] @ turn[:, part].T for part in (slice(0, 11), slice(10, 21))]
        real, generated = (Moments(None, torch.zeros(21, dtype=torch.float64), matrix) for matrix in covariances)
        assert frechet_distance(real=real, generated=generated) == pytest.approx(11 + 11 - 2, rel=1e-6)


def test_rounding_never_makes_it_negative():
    for seed in range(30):
        values = features(12, 40, seed)
        assert 0 <= fid(real=values, generated=values.flip(0)).value <= 1e-10


def test_fewer_images_than_features_give_one_warning_that_says_what_it_means(caplog):
    few, many = features(30, 40), features(400, 40, seed=1)
    estimate = fid(real=few, generated=features(20, 40, seed=2))
    estimate.resample(torch.arange(20))
    assert torch.tensor(estimate.value).isfinite()
    (record,) = caplog.records
    assert record.name == "noisycond.evaluation.moments" and record.levelno == logging.WARNING
    message = record.getMessage()
    assert "30 real and 20 generated images are too few for 40 features" in message and "biased upwards" in message
    caplog.clear()
    fid(real=many, generated=features(41, 40))
    assert not caplog.records
    fid(real=many, generated=features(40, 40))
    assert len(caplog.records) == 1


def test_features_that_never_change_do_not_matter():
    real, generated = features(200, 6), features(200, 6, seed=1)
    expected = fid(real=real, generated=generated).value
    constant = torch.full((200, 3), 0.1)
    with_dead = fid(real=torch.cat([real, constant], dim=1), generated=torch.cat([generated, constant], dim=1)).value
    assert with_dead == pytest.approx(expected, rel=1e-12)


def test_sets_without_spread_are_as_far_apart_as_their_means():
    real, generated = torch.zeros(5, 3), torch.full((5, 3), 2.0)
    assert fid(real=real, generated=generated).value == 12


def test_it_takes_moments_for_the_real_images():
    real, generated = features(100, 8), features(100, 8, seed=1)
    assert fid(real=Moments.of(real), generated=generated).value == fid(real=real, generated=generated).value
    unknown = Moments(None, *(lambda moments: (moments.mean, moments.covariance))(Moments.of(real)))
    assert fid(real=unknown, generated=generated).value == fid(real=real, generated=generated).value


def test_resampling_takes_the_chosen_images():
    real, generated = features(100, 8), features(60, 8, seed=1)
    estimate = fid(real=real, generated=generated)
    assert (estimate.size, estimate.of) == (60, "generated")
    assert estimate.resample(torch.arange(60)) == pytest.approx(estimate.value, rel=1e-12)
    chosen = torch.randint(60, (60,), generator=torch.Generator().manual_seed(2))
    assert estimate.resample(chosen) == pytest.approx(fid(real=real, generated=generated[chosen]).value, rel=1e-10)
    assert abs(estimate.resample(chosen) - estimate.value) > 1e-3


def test_real_moments_are_left_as_they_were():
    real = Moments.of(features(50, 4))
    before = (real.count, real.mean.clone(), real.covariance.clone())
    fid(real=real, generated=features(50, 4, seed=1)).resample(torch.zeros(50, dtype=torch.int64))
    assert real.count == before[0]
    assert torch.equal(real.mean, before[1]) and torch.equal(real.covariance, before[2])


# Bad input


def test_features_of_different_sizes_are_refused():
    with pytest.raises(InputError, match=r"real images have 4 features and the generated ones 5\.$"):
        fid(real=features(10, 4), generated=features(10, 5))


@pytest.mark.parametrize(
    ("counts", "words"), [((1, 9), "2 real images, but 1 was"), ((9, 0), "2 generated images, but 0")]
)
def test_too_few_images_are_refused(counts, words):
    with pytest.raises(InputError, match=words):
        fid(real=features(counts[0], 4), generated=features(counts[1], 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["real", "generated"])
def test_features_that_are_not_finite_are_refused(value, which):
    sets = {"real": features(30, 3), "generated": features(30, 3, seed=1)}
    sets[which][7, 1] = value
    with pytest.raises(InputError, match=f"finite features, but those of the {which} images"):
        fid(**sets)
    with pytest.raises(InputError, match=f"finite features, but those of the {which} images"):
        frechet_distance(**{name: Moments.of(rows) for name, rows in sets.items()})
