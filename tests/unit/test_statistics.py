"""Reference statistics: what is written is read, what does not fit is refused in one sentence."""

import errno
import json
import logging
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from noisycond.errors import InputError
from noisycond.evaluation import statistics
from noisycond.evaluation.features import Features
from noisycond.evaluation.moments import Moments, fid
from noisycond.evaluation.statistics import check_statistics, load_statistics, save_statistics


SETTINGS = {
    "extractor": "digits",
    "weights": "sha256:ab",
    "resolution": 32,
    "resize": "center crop",
    "interpolation": "lanczos",
    "image_format": "png",
    "num_images": 20,
    "source": "digits test",
}
INCEPTION = {"extractor": "inception-v3-compat", "weights": "sha256:cd", "resolution": 256}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_features() -> Features:
    return Features(normal(20, 6), normal(20, 3, seed=1), normal(20, 4, seed=2), torch.arange(20) % 3)


def adm_batch(path, dim: int = 2048, count: int = 5, compressed: bool = False, **others):
    """A file laid out as the reference batches of the ADM evaluator."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    moments = {"mu": np.arange(dim, dtype=np.float64), "sigma": np.eye(dim)}
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    write = np.savez_compressed if compressed else np.savez
    write(path, **{"arr_0": images, "arr_1": np.arange(count), **moments, **spatial, **others})
    return images


def refusal(path, settings=SETTINGS) -> str:
    with pytest.raises(InputError) as raised:
        load_statistics(path, settings)
    sentence = str(raised.value)
    assert str(path) in sentence and "\n" not in sentence and sentence.endswith(".")
    return sentence


# Our own


def test_what_is_saved_is_loaded(tmp_path):
    features = all_features()
    save_statistics(tmp_path / "a" / "stats.npz", features, SETTINGS)
    loaded = load_statistics(tmp_path / "a" / "stats.npz", SETTINGS)
    for name in ("pooled", "logits", "spatial", "labels"):
        ours, theirs = getattr(features, name), getattr(loaded.features, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for moments, of in ((loaded.moments, features.pooled), (loaded.spatial_moments, features.spatial)):
        expected = Moments.of(of)
        assert moments.count == 20
        assert torch.equal(moments.mean, expected.mean) and torch.equal(moments.covariance, expected.covariance)
    assert loaded.settings == SETTINGS
    assert loaded.images is None and loaded.labels is None


def test_what_was_not_there_is_none(tmp_path):
    save_statistics(tmp_path / "stats.npz", Features(normal(20, 6)), SETTINGS)
    loaded = load_statistics(tmp_path / "stats.npz", SETTINGS)
    assert (
        loaded.features.logits is loaded.features.spatial is loaded.features.labels is loaded.spatial_moments is None
    )


def test_loaded_moments_serve_and_may_be_extended(tmp_path):
    features, generated = all_features(), normal(30, 6, seed=5)
    save_statistics(tmp_path / "stats.npz", features, SETTINGS)
    moments = load_statistics(tmp_path / "stats.npz", SETTINGS).moments
    assert fid(real=moments, generated=generated).value == fid(real=features.pooled, generated=generated).value
    both = moments.update(generated).covariance
    assert (both - torch.cov(torch.cat([features.pooled, generated]).double().T)).abs().max() <= 1e-12


def test_the_names_are_those_of_adm_reference_batches(tmp_path):
    save_statistics(tmp_path / "stats.npz", all_features(), SETTINGS)
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as arrays:
        assert {name: str(arrays[name].dtype) for name in ("mu", "sigma", "mu_s", "sigma_s")} == dict.fromkeys(
            ("mu", "sigma", "mu_s", "sigma_s"), "float64"
        )
        assert json.loads(str(arrays["settings"])) == SETTINGS


@pytest.mark.parametrize("key", ["extractor", "weights", "resolution", "resize", "interpolation"])
def test_a_setting_that_matters_must_agree(tmp_path, key):
    path = tmp_path / "stats.npz"
    save_statistics(path, all_features(), SETTINGS)
    sentence = refusal(path, {**SETTINGS, key: "another"})
    assert f"made with {key} {SETTINGS[key]}, but this run has another" in sentence and "--save_stats" in sentence
    absent = {name: value for name, value in SETTINGS.items() if name != key}
    assert "but this run has none" in refusal(path, absent)
    save_statistics(path, all_features(), absent)
    assert f"made with {key} none" in refusal(path, SETTINGS)


def test_a_setting_that_is_only_told_may_differ(tmp_path):
    save_statistics(tmp_path / "stats.npz", all_features(), SETTINGS)
    run = {**SETTINGS, "image_format": "jpeg", "num_images": 3, "source": "elsewhere"}
    assert load_statistics(tmp_path / "stats.npz", run).settings == SETTINGS


def test_settings_are_compared_as_json_keeps_them(tmp_path):
    settings = {**SETTINGS, "resolution": (32, 32)}
    save_statistics(tmp_path / "stats.npz", all_features(), settings)
    assert load_statistics(tmp_path / "stats.npz", settings).settings["resolution"] == [32, 32]


def test_our_features_are_mapped_where_they_lie_well(tmp_path):
    features = Features(normal(5000, 16), spatial=normal(5000, 512, seed=2))
    save_statistics(tmp_path / "stats.npz", features, SETTINGS)
    tracemalloc.start()
    loaded = load_statistics(tmp_path / "stats.npz", SETTINGS)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < features.spatial.nbytes / 2
    assert loaded.features.pooled.data_ptr() % 64 == loaded.features.spatial.data_ptr() % 64 == 0
    assert torch.equal(loaded.features.spatial, features.spatial)
    loaded.features.pooled[:] = 0  # leaves the file
    assert torch.equal(load_statistics(tmp_path / "stats.npz", SETTINGS).features.pooled, features.pooled)


def test_our_features_as_numpy_writes_them_are_read(tmp_path):
    features = all_features()
    save_statistics(tmp_path / "stats.npz", features, SETTINGS)
    with np.load(tmp_path / "stats.npz") as arrays:
        np.savez(tmp_path / "numpy.npz", **arrays)
        np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    for name in ("numpy", "compressed"):
        loaded = load_statistics(tmp_path / f"{name}.npz", SETTINGS).features
        assert torch.equal(loaded.pooled, features.pooled) and torch.equal(loaded.labels, features.labels)
        assert loaded.pooled.numpy().flags.aligned


# Checking before anything is drawn


def test_a_check_compares_what_is_known(tmp_path):
    path = tmp_path / "stats.npz"
    save_statistics(path, all_features(), SETTINGS)
    check_statistics(path, SETTINGS)
    other = {**SETTINGS, "resolution": 64, "interpolation": "box"}
    check_statistics(path, other, ["resolution", "interpolation"])
    with pytest.raises(InputError, match="made with resolution 32, but this run has 64"):
        check_statistics(path, other, ["interpolation"])
    with pytest.raises(InputError, match="made with interpolation lanczos, but this run has box"):
        check_statistics(path, other, ["resolution"])
    with pytest.raises(InputError, match="made with weights sha256:ab, but this run has sha256:00"):
        check_statistics(path, {**other, "weights": "sha256:00"}, ["resolution", "interpolation"])


def test_a_check_reads_neither_features_nor_images(tmp_path, caplog):
    features = Features(normal(5000, 300))
    save_statistics(tmp_path / "stats.npz", features, SETTINGS)
    images = adm_batch(tmp_path / "VIRTUAL.npz", dim=768, count=20_000, compressed=True)
    for name, most in (("stats", features.pooled.nbytes / 10), ("VIRTUAL", images.nbytes / 3)):
        tracemalloc.start()
        check_statistics(tmp_path / f"{name}.npz", SETTINGS)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()
    assert not caplog.records  # it is said once, when the file is used


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "run with that extractor"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is float64"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "arr_1": np.zeros(3, int)}, "one class for"),
        ({"settings": json.dumps(SETTINGS)}, "features or moments are missing"),
        ({"settings": "{"}, "cannot be read"),
        ({"weights": np.zeros(2)}, "only weights"),
    ],
)
def test_a_check_refuses_what_loading_refuses(tmp_path, arrays, words):
    np.savez(tmp_path / "stats.npz", **arrays)
    assert words in refusal(tmp_path / "stats.npz")
    with pytest.raises(InputError, match=words):
        check_statistics(tmp_path / "stats.npz", SETTINGS)


# Writing


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    save_statistics(path, all_features(), SETTINGS)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(statistics, "save_npz", full)
    with pytest.raises(InputError, match=r"--save_stats .*stats\.npz: no space left while writing"):
        save_statistics(path, all_features(), {**SETTINGS, "source": "new"})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["stats.npz"]


def test_statistics_are_replaced_while_they_are_in_use(tmp_path):
    path = tmp_path / "stats.npz"
    save_statistics(path, all_features(), SETTINGS)
    loaded = load_statistics(path, SETTINGS)
    save_statistics(path, loaded.features, {**SETTINGS, "source": "again"})
    assert load_statistics(path, SETTINGS).settings["source"] == "again"
    assert os.listdir(tmp_path) == ["stats.npz"]


def test_another_ending_and_too_few_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.npz"):
        save_statistics(tmp_path / "stats", all_features(), SETTINGS)
    with pytest.raises(InputError, match="at least 2 images, but there were 1"):
        save_statistics(tmp_path / "stats.npz", Features(normal(1, 6)), SETTINGS)
    assert os.listdir(tmp_path) == []


# Others'


def test_an_adm_reference_batch(tmp_path):
    images = adm_batch(tmp_path / "VIRTUAL.npz")
    loaded = load_statistics(tmp_path / "VIRTUAL.npz", INCEPTION)
    assert loaded.features is None and loaded.moments.count is None
    assert torch.equal(loaded.moments.mean, torch.arange(2048, dtype=torch.float64))
    assert torch.equal(loaded.moments.covariance, torch.eye(2048, dtype=torch.float64))
    assert loaded.spatial_moments.mean.shape == (7,)
    assert loaded.images.dtype == np.uint8 and np.array_equal(loaded.images, images)
    assert loaded.labels.dtype == torch.int64 and loaded.labels.tolist() == [0, 1, 2, 3, 4]


def test_its_images_are_mapped_and_writing_to_them_leaves_the_file(tmp_path):
    images = adm_batch(tmp_path / "VIRTUAL.npz")
    loaded = load_statistics(tmp_path / "VIRTUAL.npz", INCEPTION).images
    assert isinstance(loaded, np.memmap)
    torch.from_numpy(loaded)[:] = 0
    assert np.array_equal(load_statistics(tmp_path / "VIRTUAL.npz", INCEPTION).images, images)


def test_compressed_images_are_read(tmp_path):
    images = adm_batch(tmp_path / "VIRTUAL.npz", compressed=True)
    assert np.array_equal(load_statistics(tmp_path / "VIRTUAL.npz", INCEPTION).images, images)


def test_images_in_column_order_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", np.asfortranarray(images))
    assert np.array_equal(load_statistics(tmp_path / "images.npz", INCEPTION).images, images)


def test_with_another_extractor_a_reference_batch_is_its_images(tmp_path, caplog):
    adm_batch(tmp_path / "VIRTUAL.npz")
    loaded = load_statistics(tmp_path / "VIRTUAL.npz", SETTINGS)
    assert loaded.moments is loaded.spatial_moments is None and len(loaded.images) == 5
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING and "inception-v3-compat" in message and "digits" in message
    assert "the 5 images in the file are the reference" in message


def test_a_batch_of_images_alone(tmp_path, caplog):
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    loaded = load_statistics(tmp_path / "samples.npz", SETTINGS)
    assert loaded.moments is None and loaded.labels is None and loaded.images.shape == (4, 8, 8, 3)
    assert loaded.settings == {} and not caplog.records


def test_statistics_of_pytorch_fid(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    loaded = load_statistics(tmp_path / "fid.npz", INCEPTION)
    assert loaded.moments.mean.dtype == loaded.moments.covariance.dtype == torch.float64
    assert loaded.spatial_moments is None and loaded.images is None
    sentence = refusal(tmp_path / "fid.npz")
    assert "inception-v3-compat" in sentence and "digits" in sentence and "folder" in sentence


def test_moments_of_another_size_are_not_those_of_the_extractor(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(768), sigma=np.eye(768))
    assert "of 768 features, and those of inception-v3-compat are 2048" in refusal(tmp_path / "fid.npz", INCEPTION)


# Bad files


def test_no_file_and_no_npz(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("mu sigma")
    assert "no whole .npz file" in refusal(tmp_path / "text.npz")
    assert "no whole .npz file" in refusal(tmp_path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "no whole .npz file" in refusal(tmp_path / "array.npy")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "neither moments" in refusal(tmp_path / "other.zip") and "readme.txt" in refusal(tmp_path / "other.zip")


def test_a_cut_file(tmp_path):
    save_statistics(tmp_path / "stats.npz", all_features(), SETTINGS)
    whole = (tmp_path / "stats.npz").read_bytes()
    (tmp_path / "stats.npz").write_bytes(whole[: len(whole) // 2])
    assert "no whole .npz file" in refusal(tmp_path / "stats.npz")


def flip(path, member: str) -> None:
    """One bit of an array's last number is another."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    content = bytearray(path.read_bytes())
    content[content.index(member.encode(), info.header_offset) + info.compress_size] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["pooled", "mu", "settings"])
def test_a_changed_bit_of_ours(tmp_path, name):
    save_statistics(tmp_path / "stats.npz", all_features(), SETTINGS)
    flip(tmp_path / "stats.npz", f"{name}.npy")
    assert "make or download it again" in refusal(tmp_path / "stats.npz")


def test_a_changed_bit_of_a_reference_batch_s_images(tmp_path):
    adm_batch(tmp_path / "VIRTUAL.npz", count=100)  # more than is read ahead with the header
    flip(tmp_path / "VIRTUAL.npz", "arr_0.npy")
    assert "CRC" in refusal(tmp_path / "VIRTUAL.npz", INCEPTION)


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it ran"),))

    bomb = np.array([Bomb()], dtype=object)
    for name in ("mu", "arr_0", "settings"):
        np.savez(tmp_path / "bomb.npz", **{"mu": np.zeros(1), "sigma": np.eye(1), name: bomb})
        assert "allow_pickle=False" in refusal(tmp_path / "bomb.npz", INCEPTION)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(2048), "sigma": np.eye(2047)}, "are no mean"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
        ({"mu": np.zeros(2048)}, "sigma"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is float64 [2, 8, 8, 3]; images must be uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "one class for each of the 2 images"),
        ({"settings": "{}"}, "made with extractor none"),
        ({"settings": json.dumps(INCEPTION)}, "features or moments are missing"),
        ({"settings": "{"}, "cannot be read"),
        ({"weights": np.zeros(2)}, "only weights"),
    ],
)
def test_files_that_hold_something_else(tmp_path, arrays, words):
    np.savez(tmp_path / "stats.npz", **arrays)
    assert words in refusal(tmp_path / "stats.npz", INCEPTION)
