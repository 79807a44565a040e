"""Images to tensors: range, resize, crop and flip as pure functions, and what takes an unreadable image's place."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from noisycond.data.images import BadImages, LabelledImages, Transform
from noisycond.data.sources import ImageFolder
from noisycond.errors import InputError


pytestmark = pytest.mark.usefixtures("one_thread")


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, one grey value a pixel."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def values(pixels: torch.Tensor) -> np.ndarray:
    """[-1, 1] back to grey values."""
    return ((pixels + 1) * 127.5).round().to(torch.int64).numpy()


@pytest.fixture
def folder(tmp_path):
    """Nine images in three classes; number n has red n in every pixel."""
    for number in range(9):
        path = tmp_path / "abc"[number // 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return tmp_path


def damage(folder, *numbers: int, how: str = "truncated") -> None:
    for number in numbers:
        path = next(folder.rglob(f"{number}.png"))
        if how == "truncated":
            noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[:3000])
        else:
            path.write_bytes({"text": b"this is no image", "empty": b""}[how])


# Transform


def test_the_range_is_minus_one_to_one():
    transform = Transform(2, center_crop=True)
    black, white, grey = (
        transform(Image.new("RGB", (2, 2), (value,) * 3), index=0, epoch=0) for value in (0, 255, 128)
    )
    assert black.unique().tolist() == [-1.0] and white.unique().tolist() == [1.0]
    assert (grey - (128 / 127.5 - 1)).abs().max() < 1e-6
    assert white.shape == (3, 2, 2) and white.dtype == torch.float32


def test_channels_rows_and_columns_keep_their_places():
    pixels = values(Transform(5, center_crop=True)(ramp(5, 5), 0, 0))
    assert (pixels[0] == np.arange(5)[None, :]).all() and (pixels[1] == np.arange(5)[:, None]).all()
    assert (pixels[2] == 0).all()


@pytest.mark.parametrize("size", [(40, 20), (60, 40), (16, 10), (30, 90), (10, 15), (20, 20)])
def test_the_shorter_side_is_resized(size):
    # One colour gradient over the whole image: after the resize the crop shows its middle, whatever the scale.
    image = Image.fromarray(np.tile(np.linspace(0, 255, size[0]).astype(np.uint8)[None, :, None], (size[1], 1, 3)))
    pixels = Transform(20, center_crop=True, interpolation="bilinear")(image, 0, 0)
    assert pixels.shape == (3, 20, 20)
    shown = values(pixels)[0, 10]
    visible = min(1.0, size[1] / size[0])
    assert abs(int(shown[-1]) - int(shown[0]) - 255 * visible) < 255 * 0.12
    assert abs(int(shown[9]) + int(shown[10]) - 255) < 16  # the middle of the image is in the middle


def test_the_centre_is_cropped():
    assert values(Transform(4, center_crop=True)(ramp(10, 4), 0, 0))[0, 0].tolist() == [3, 4, 5, 6]
    assert values(Transform(4, center_crop=True)(ramp(4, 10), 0, 0))[1, :, 0].tolist() == [3, 4, 5, 6]


def crop_place(seed: int, index: int, epoch: int, width: int = 24) -> int:
    return int(values(Transform(8, seed=seed)(ramp(width, 8), index, epoch))[0, 0, 0])


def test_a_random_crop_is_a_pure_function():
    places = [crop_place(0, index, 1) for index in range(40)]
    assert [crop_place(0, index, 1) for index in reversed(range(40))] == places[::-1]
    assert [crop_place(1, index, 1) for index in range(40)] != places
    assert [crop_place(0, index, 2) for index in range(40)] != places
    assert len(set(places)) > 8


def test_a_random_crop_reaches_every_place_about_equally():
    places = [crop_place(0, index, 0, width=10) for index in range(900)]
    counts = np.bincount(places, minlength=3)
    assert len(counts) == 3 and np.abs(counts / 900 - 1 / 3).max() < 0.06


def test_a_random_crop_moves_up_and_down_too():
    tops = {int(values(Transform(8)(ramp(8, 12), index, 0))[1, 0, 0]) for index in range(60)}
    assert tops == {0, 1, 2, 3, 4}


def test_about_half_are_flipped_as_a_pure_function():
    transform = Transform(4, center_crop=True, random_flip=True, seed=3)
    flips = [transform.is_flipped(index, 0) for index in range(800)]
    assert abs(np.mean(flips) - 0.5) < 0.05
    assert [transform.is_flipped(index, 0) for index in reversed(range(800))] == flips[::-1]
    later = [transform.is_flipped(index, 1) for index in range(800)]
    other = [Transform(4, random_flip=True, seed=4).is_flipped(index, 0) for index in range(800)]
    assert abs(np.mean(np.array(flips) == later) - 0.5) < 0.05
    assert abs(np.mean(np.array(flips) == other) - 0.5) < 0.05
    assert not any(Transform(4, seed=3).is_flipped(index, 0) for index in range(50))


def test_a_flip_mirrors_left_and_right():
    transform = Transform(4, center_crop=True, random_flip=True)
    flipped = next(index for index in range(50) if transform.is_flipped(index, 0))
    straight = next(index for index in range(50) if not transform.is_flipped(index, 0))
    assert values(transform(ramp(4, 4), flipped, 0))[0, 0].tolist() == [3, 2, 1, 0]
    assert values(transform(ramp(4, 4), flipped, 0))[1, :, 0].tolist() == [0, 1, 2, 3]
    assert values(transform(ramp(4, 4), straight, 0))[0, 0].tolist() == [0, 1, 2, 3]


def test_switching_flips_on_leaves_the_crops_as_they_were():
    for index in range(10):
        plain, flipping = Transform(8), Transform(8, random_flip=True)
        expected = plain(ramp(24, 8), index, 0)
        expected = expected.flip(-1) if flipping.is_flipped(index, 0) else expected
        assert (flipping(ramp(24, 8), index, 0) - expected).abs().max() == 0


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_every_interpolation_mode_resizes_in_its_own_way(mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    pixels = {
        name: Transform(8, interpolation=name)(noise, 0, 0)
        for name in ("nearest", "bilinear", "bicubic", "lanczos", "box")
    }
    assert pixels[mode].shape == (3, 8, 8)
    assert all((pixels[mode] - other).abs().max() > 0.01 for name, other in pixels.items() if name != mode)


# Examples


def test_an_example_holds_what_a_batch_needs(folder):
    images = LabelledImages(ImageFolder(str(folder)), Transform(8, center_crop=True))
    assert len(images) == 9
    example = images[(4, 6, 11)]
    assert (example["index"], example["epoch"], example["position"]) == (4, 6, 11)
    assert (example["class_labels"], example["bad_images"]) == (1, [])
    assert values(example["pixel_values"])[0].max() == 4


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_an_unreadable_image_gives_way_to_the_next_one(folder, how):
    damage(folder, 4, 5, how=how)
    images = LabelledImages(ImageFolder(str(folder)), Transform(8, center_crop=True))
    example = images[(4, 2, 7)]
    assert (example["index"], example["class_labels"], example["epoch"], example["position"]) == (6, 2, 2, 7)
    assert values(example["pixel_values"])[0].max() == 6
    assert len(example["bad_images"]) == 2
    assert "b/4.png" in example["bad_images"][0] and "b/5.png" in example["bad_images"][1]
    assert images[(3, 2, 7)]["bad_images"] == []


def test_the_last_image_gives_way_to_the_first_readable_one(folder):
    damage(folder, 8, 0, how="text")
    example = LabelledImages(ImageFolder(str(folder)), Transform(8, center_crop=True))[(8, 0, 0)]
    assert (example["index"], example["class_labels"], len(example["bad_images"])) == (1, 0, 2)


def test_a_stand_in_is_flipped_as_itself(folder):
    for number in range(9):
        ramp(8, 8).save(next(folder.rglob(f"{number}.png")))
    whole = LabelledImages(ImageFolder(str(folder)), Transform(8, random_flip=True, seed=1))
    pairs = [(n, e) for n in range(8) for e in range(5)]
    n, e = next((n, e) for n, e in pairs if whole.transform.is_flipped(n, e) != whole.transform.is_flipped(n + 1, e))
    expected = whole[(n + 1, e, 0)]["pixel_values"]
    damage(folder, n, how="text")
    assert (whole[(n, e, 0)]["pixel_values"] - expected).abs().max() == 0


def test_nothing_can_be_read(folder):
    damage(folder, *range(9), how="text")
    with pytest.raises(InputError) as caught:
        LabelledImages(ImageFolder(str(folder)), Transform(8))[(5, 0, 0)]
    assert "none of the 9 images can be read" in str(caught.value) and "5.png" in str(caught.value)


# The limit


def test_bad_images_raise_past_the_limit():
    bad = BadImages(2)
    bad.add(["a.png", "b.png"])
    with pytest.raises(InputError) as caught:
        bad.add(["c.png"])
    message = str(caught.value)
    assert "3 images" in message and "--max_bad_images 2" in message
    assert all(name in message for name in ("a.png", "b.png", "c.png"))


def test_a_bad_image_counts_once(caplog):
    bad = BadImages(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bad.add(["a.png"])
    assert bad.names == {"a.png"}
    assert [record.getMessage() for record in caplog.records] == ["Skipping what cannot be read: a.png."]


def test_a_limit_of_none():
    BadImages(0).add([])
    with pytest.raises(InputError, match="--max_bad_images 0"):
        BadImages(0).add(["a.png"])


def test_quiet_counts_without_a_word(caplog):
    bad = BadImages(5)
    with caplog.at_level(logging.WARNING):
        bad.add(["a.png"], quiet=True)
    assert bad.names == {"a.png"} and not caplog.records
