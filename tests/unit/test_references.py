"""Real images by name: what tells them apart, what is checked before, and what is measured of them."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from noisycond.errors import InputError
from noisycond.evaluation.features import Features
from noisycond.evaluation.moments import Moments
from noisycond.evaluation.references import open_real
from noisycond.evaluation.statistics import save_statistics


EXTRACTOR = {"extractor": "digits", "weights": "ab"}


class Extracting:
    """Stands in for an extraction: features are the first pixel, spatial ones its double."""

    def __init__(self):
        self.wanted = []

    def features(self, option, source, wanted=None):
        self.wanted.append(wanted)
        pooled = torch.stack([torch.from_numpy(np.array(source.read(n, 32))[0, 0].copy()) for n in range(len(source))])
        spatial = None if wanted is not None and "spatial" not in wanted else 2 * pooled.float()
        return Features(pooled.float(), spatial=spatial, labels=None)

    def statistics_settings(self):
        return EXTRACTOR | {"resolution": 32, "interpolation": "lanczos"}


@pytest.fixture
def instruments():
    return SimpleNamespace(extractor=SimpleNamespace(settings=lambda: EXTRACTOR))


@pytest.fixture
def stats(tmp_path):
    features = Features(torch.arange(12.0).reshape(6, 2))
    save_statistics(tmp_path / "stats.npz", features, Extracting().statistics_settings())
    return str(tmp_path / "stats.npz")


@pytest.fixture
def count_moments(monkeypatch):
    counted, of = [], Moments.of
    monkeypatch.setattr(Moments, "of", lambda *args, **options: counted.append(args) or of(*args, **options))
    return counted


def test_the_identity_of_a_folder_of_classes_follows_touched_images(tmp_path):
    for name in ("ant", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    before = open_real("--reference", str(tmp_path), None).identity
    assert open_real("--reference", str(tmp_path), None).identity == before
    os.utime(tmp_path / "ant" / "1.png", (1, 1))
    assert open_real("--reference", str(tmp_path), None).identity != before


def test_the_split_that_is_told_is_the_one_that_is_read(tmp_path):
    assert open_real("--reference", "digits", None).settings() == {"name": "digits", "split": "test", "images": 360}
    assert open_real("--train_data", "digits", "train").settings()["images"] == 1437
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert "split" not in open_real("--train_data", str(tmp_path), "train").settings()


def test_a_check_compares_the_size_where_it_is_known(stats, instruments):
    real = open_real("--reference", stats, None)
    real.check(instruments)
    real.check(instruments, 32, "lanczos")
    with pytest.raises(InputError, match="made with resolution 32, but this run has 64"):
        real.check(instruments, resolution=64)
    with pytest.raises(InputError, match="made with interpolation lanczos, but this run has box"):
        real.check(instruments, interpolation="box")
    another = SimpleNamespace(extractor=SimpleNamespace(settings=lambda: {"extractor": "vgg16"}))
    with pytest.raises(InputError, match="made with extractor digits, but this run has vgg16"):
        real.check(another)


def test_features_alone(count_moments):
    extracting, real = Extracting(), open_real("--train_data", "digits", "test")
    reference = real.measure(extracting, wanted=["pooled"])
    assert extracting.wanted == [["pooled"]] and len(reference.features) == 360
    assert not count_moments  # nobody asked for them
    assert reference.class_names == [str(digit) for digit in range(10)]
    whole = real.measure(extracting)
    assert extracting.wanted[1] is None and whole.moments.count == whole.spatial.count == 360


def test_a_reference_batch_of_others(tmp_path, count_moments):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", pixels)
    extracting, real = Extracting(), open_real("--train_data", str(tmp_path / "batch.npz"), None)
    reference = real.measure(extracting, wanted=["pooled"])
    assert not count_moments and extracting.wanted == [["pooled"]]
    assert (reference.features.pooled[:, 0].numpy() == pixels[:, 0, 0, 0]).all()
    assert real.measure(extracting).moments.count == 9


def test_statistics_stand_in(stats):
    reference = open_real("--reference", stats, None).measure(Extracting())
    assert reference.moments.count == len(reference.features) == 6 and reference.spatial is None
