"""The latent cache: the same examples as without it, made once, and made anew where something else would come out."""

import errno
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image

from noisycond.data.images import BadImages, LabelledImages, Transform
from noisycond.data.latent_cache import cache_key, open_latent_cache
from noisycond.data.sources import Digits, ImageFolder, Subset
from noisycond.errors import InputError
from noisycond.first_stage import FirstStage


pytestmark = pytest.mark.usefixtures("one_thread")


SHAPE = {
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 0.5,
}


@pytest.fixture
def folder(tmp_path):
    """Seven images of noise in three classes, of several sizes."""
    random = np.random.default_rng(0)
    for number in range(7):
        path = tmp_path / "images" / "abc"[number // 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + 3 * number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def first_stage(kind: str = "kl", seed: int = 0) -> FirstStage:
    torch.manual_seed(seed)
    if kind == "kl":
        return FirstStage(AutoencoderKL(**SHAPE, latent_channels=4))
    return FirstStage(VQModel(**SHAPE, latent_channels=3, num_vq_embeddings=16))


def labelled(folder, resolution: int = 16, **options) -> LabelledImages:
    return LabelledImages(ImageFolder(str(folder)), Transform(resolution, center_crop=True, **options))


def damage(folder, *numbers: int) -> None:
    for number in numbers:
        next(folder.rglob(f"{number}.png")).write_bytes(b"this is no image")


class Calls:
    """Counts the images that go through the encoder."""

    def __init__(self, stage: FirstStage):
        self.images = 0
        stage.model.encoder.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.images += len(inputs[0])


def caches(place) -> list:
    return sorted(path for path in place.iterdir() if path.is_dir())


@pytest.fixture
def opened(tmp_path, accelerator):
    """Opens a cache below tmp_path."""

    def call(images, stage, limit: int = 10):
        bad = BadImages(limit)
        cached = open_latent_cache(images, stage, tmp_path / "latents", accelerator, bad)
        cached.bad = bad
        return cached

    return call


def compare(cached, images: LabelledImages, stage: FirstStage, epochs: int = 3, indices=None) -> None:
    """Every example from the cache is what encoding it on the way gives."""
    assert len(cached) == len(images)
    for index in range(len(images)) if indices is None else indices:
        for epoch in range(epochs):
            expected, example = images[(index, epoch, 5)], cached[(index, epoch, 5)]
            for name in ("index", "epoch", "position", "class_labels"):
                assert example[name] == expected[name], name
            moments = stage.moments(expected["pixel_values"][None])[0]
            assert example["moments"].dtype == torch.float32 and example["moments"].shape == moments.shape
            assert (example["moments"] - moments).abs().max() < 1e-5


# The same examples


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_moments_are_those_of_encoding_on_the_way(folder, opened, kind, flip):
    images, stage = labelled(folder, random_flip=flip), first_stage(kind)
    cached = opened(images, stage)
    assert cached.memory.shape == (7, 2 if flip else 1, 8 if kind == "kl" else 3, 4, 4)
    compare(cached, images, stage)
    if flip:
        flips = {images.transform.is_flipped(index, epoch) for index in range(7) for epoch in range(3)}
        assert flips == {True, False}


def test_the_second_view_is_the_mirrored_image(folder, opened):
    images, stage = labelled(folder, random_flip=True), first_stage()
    memory = opened(images, stage).memory
    for index in range(7):
        pixels = images.transform.pixels(images.source.read(index, 16), index, 0)[None]
        for view, shown in enumerate((pixels, pixels.flip(-1))):
            assert np.abs(memory[index, view] - stage.moments(shown)[0].numpy()).max() < 1e-5
        assert np.abs(memory[index, 0] - memory[index, 1]).max() > 1e-3
        # The moments of a mirror are not the mirror of the moments.
        assert np.abs(memory[index, 0][..., ::-1] - memory[index, 1]).max() > 1e-3


def test_more_images_than_one_batch_of_the_encoder(opened):
    source = Subset(Digits("test"), np.arange(70))
    images, stage = LabelledImages(source, Transform(16)), first_stage("vq")
    calls = Calls(stage)
    cached = opened(images, stage)
    assert calls.images == 70
    compare(cached, images, stage, epochs=1, indices=(0, 1, 62, 63, 64, 65, 69))


def test_unreadable_images_are_replaced_as_without_a_cache(folder, opened):
    damage(folder, 2, 3, 6)
    images, stage = labelled(folder, random_flip=True), first_stage()
    cached = opened(images, stage)
    compare(cached, images, stage)
    assert [cached[(index, 0, 0)]["index"] for index in range(7)] == [0, 1, 4, 4, 4, 5, 0]
    assert sorted(name.split(" ")[0][-7:] for name in cached.bad.names) == ["a/2.png", "b/3.png", "c/6.png"]


def test_a_run_of_pixels_names_the_same_bad_images(folder, opened):
    damage(folder, 2, 3, 6)
    images = labelled(folder)
    met = {name for index in range(7) for name in images[(index, 0, 0)]["bad_images"]}
    assert opened(images, first_stage()).bad.names == met


def test_bad_images_are_known_and_limited_on_the_second_opening_too(folder, opened):
    damage(folder, 2, 3)
    images, stage = labelled(folder), first_stage()
    names = opened(images, stage).bad.names
    calls = Calls(stage)
    assert opened(images, stage).bad.names == names and calls.images == 0
    with pytest.raises(InputError) as caught:
        opened(images, stage, limit=1)
    assert "--max_bad_images 1" in str(caught.value) and "a/2.png" in str(caught.value)


def test_no_image_can_be_read(folder, opened, tmp_path):
    damage(folder, *range(7))
    with pytest.raises(InputError) as caught:
        opened(labelled(folder), first_stage())
    assert "none of the 7 images can be read" in str(caught.value) and "0.png" in str(caught.value)
    assert caches(tmp_path / "latents") == []


# Made once, and anew where it must be


def test_the_second_opening_encodes_nothing(folder, opened, tmp_path):
    stage = first_stage()
    calls = Calls(stage)
    first = opened(labelled(folder, random_flip=True), stage)
    assert calls.images == 14
    second = opened(labelled(folder, random_flip=True), stage)
    assert calls.images == 14 and len(caches(tmp_path / "latents")) == 1
    assert (first.memory == second.memory).all()


def test_a_seed_does_not_make_another_cache(folder, opened, tmp_path):
    for seed in (0, 1):
        opened(labelled(folder, random_flip=True, seed=seed), first_stage())
    assert len(caches(tmp_path / "latents")) == 1


def nudged(stage: FirstStage) -> FirstStage:
    with torch.no_grad():
        stage.model.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    return stage


@pytest.mark.parametrize(
    "change", ["weight", "resolution", "flip", "interpolation", "dataset", "fewer examples", "kind", "scaling factor"]
)
def test_what_the_moments_depend_on_makes_another_cache(folder, opened, tmp_path, change):
    opened(labelled(folder), first_stage())
    images, stage = labelled(folder), first_stage()
    if change == "weight":
        nudged(stage)
    elif change == "resolution":
        images = labelled(folder, 20)
    elif change == "flip":
        images = labelled(folder, random_flip=True)
    elif change == "interpolation":
        images = labelled(folder, interpolation="nearest")
    elif change == "dataset":
        Image.new("RGB", (30, 30)).save(folder / "a" / "0.png")
        images = labelled(folder)
    elif change == "fewer examples":
        images = LabelledImages(Subset(images.source, np.arange(5)), images.transform)
    elif change == "kind":
        stage = first_stage("vq")
    else:
        stage.model.register_to_config(scaling_factor=0.25)
    calls = Calls(stage)
    cached = opened(images, stage)
    assert calls.images == len(images) * (2 if change == "flip" else 1)
    assert len(caches(tmp_path / "latents")) == 2
    compare(cached, images, stage, epochs=1)


def test_the_crop_is_part_of_the_key(folder):
    centre, random = labelled(folder), labelled(folder)
    random.transform = Transform(16)
    assert cache_key(centre, first_stage()) != cache_key(random, first_stage())


def test_a_first_stage_is_the_same_wherever_it_lies(tmp_path):
    first_stage().model.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    prints = {FirstStage(AutoencoderKL.from_pretrained(tmp_path / name)).fingerprint for name in "ab"}
    assert len(prints) == 1


def test_a_first_stage_is_the_same_in_every_process():
    # diffusers lists a set of names here, so the order changes with Python's hash seed.
    stages = [first_stage(), first_stage()]
    stages[0].model.register_to_config(_use_default_values=["shift_factor", "force_upcast"])
    stages[1].model.register_to_config(_use_default_values=["force_upcast", "shift_factor"])
    assert stages[0].fingerprint == stages[1].fingerprint


def cut_moments(path):
    content = (path / "moments.npy").read_bytes()
    (path / "moments.npy").write_bytes(content[:-40])


def lose_moments(path):
    (path / "moments.npy").unlink()


def cut_manifest(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])


def empty_manifest(path):
    (path / "manifest.json").write_text("{}")


def lose_manifest(path):
    (path / "manifest.json").unlink()


def foreign_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["key"]["resolution"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (cut_moments, "moments.npy has"),
        (lose_moments, "moments.npy"),
        (cut_manifest, ""),
        (empty_manifest, "key"),
        (lose_manifest, "manifest.json"),
        (foreign_manifest, "belongs to other data"),
    ],
)
def test_a_broken_cache_is_made_anew_and_the_log_says_so(folder, opened, tmp_path, caplog, broken, words):
    images, stage = labelled(folder), first_stage()
    opened(images, stage)
    (path,) = caches(tmp_path / "latents")
    broken(path)
    calls = Calls(stage)
    with caplog.at_level(logging.INFO, logger="noisycond"):
        cached = opened(images, stage)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1 and str(path) in messages[0] and "made anew" in messages[0] and words in messages[0]
    assert calls.images == 7 and caches(tmp_path / "latents") == [path]
    compare(cached, images, stage, epochs=1)
    opened(images, stage)
    assert calls.images == 7 + 7  # seven more by the comparison, none by the second opening


def test_a_killed_encoding_leaves_no_cache_and_is_done_again(opened, tmp_path):
    images = LabelledImages(Subset(Digits("test"), np.arange(70)), Transform(16))
    stage = first_stage()

    def kill(module, inputs, output):
        if len(inputs[0]) < 64:  # the last batch
            raise KeyboardInterrupt

    hook = stage.model.encoder.register_forward_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        opened(images, stage)
    assert not any((path / "manifest.json").exists() for path in caches(tmp_path / "latents"))
    hook.remove()
    compare(opened(images, stage), images, stage, epochs=1, indices=(0, 63, 64, 69))
    assert len(caches(tmp_path / "latents")) == 1  # and the half one is gone


def test_too_little_space_is_said_before_anything_is_encoded(folder, opened, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=7 * 8 * 4 * 4 * 4 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    stage = first_stage()
    calls = Calls(stage)
    with pytest.raises(InputError) as caught:
        opened(labelled(folder), stage)
    message = str(caught.value)
    assert f"--latent_cache_dir {tmp_path / 'latents'}" in message and "no space left" in message
    assert "--cache_latents" in message and calls.images == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=free.free + 1))
    assert len(opened(labelled(folder), stage)) == 7


def test_a_disk_that_fills_up_on_the_way_is_said_in_a_sentence(folder, opened):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    images, stage = labelled(folder), first_stage()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError) as caught:
            opened(images, stage)
    except OSError as error:
        assert error.errno == errno.EFBIG
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--latent_cache_dir" in str(caught.value) and "no space left" in str(caught.value)
