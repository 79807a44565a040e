"""Control images: drawn from toys, cut as their images are, and what happens where one is missing or does not fit."""

import logging

import numpy as np
import pytest
import torch
from captioned import arguments, decode, encode
from controlled import controlled_rows, noise_image, save_dataset
from PIL import Image
from tiny_models import tiny_vq

from noisycond.data.batches import Batches
from noisycond.data.captions import Captioned, open_captions
from noisycond.data.controlled import LOOKED_AT, Controlled, Controls
from noisycond.data.controls import CANNY_HIGH, CANNY_LOW, canny_edges, threshold_mask
from noisycond.data.images import BadImages, LabelledImages, Transform
from noisycond.data.latent_cache import open_latent_cache
from noisycond.data.sources import Digits, HuggingFaceDataset, ImageFolder, MetadataFolder, Subset
from noisycond.errors import InputError
from noisycond.first_stage import FirstStage


pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 16


def prepared(folder, rows=None, label_column: str | None = "label") -> HuggingFaceDataset:
    save_dataset(folder, rows or controlled_rows())
    return HuggingFaceDataset(str(folder), None, "train", "image", label_column, None)


def examples(source, column: str = "canny", **options) -> Controlled:
    transform = Transform(**{"resolution": SIZE, "center_crop": True} | options)
    return Controlled(LabelledImages(source, transform), Controls(source, column, transform))


def read(dataset, *indices: int, epoch: int = 0) -> dict:
    return dataset.__getitems__([(index, epoch, place) for place, index in enumerate(indices)])


# Annotators


def square() -> Image.Image:
    """A bright square on a dark ground, off the centre."""
    pixels = np.full((20, 24, 3), 30, dtype=np.uint8)
    pixels[5:15, 8:18] = 220
    return Image.fromarray(pixels)


def grey(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    pixels = np.array(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def test_canny_draws_the_outline_and_a_mask_what_is_bright():
    edges, mask = grey(canny_edges(square())), grey(threshold_mask(square()))
    assert edges.shape == mask.shape == (20, 24)
    assert set(np.unique(edges)) == set(np.unique(mask)) == {0, 255}
    bright = np.zeros((20, 24), dtype=bool)
    bright[5:15, 8:18] = True
    assert np.array_equal(mask == 255, bright)
    rows, columns = np.nonzero(edges)
    assert {4, 5} & set(rows) and {14, 15} & set(rows) and {7, 8} & set(columns) and {17, 18} & set(columns)
    assert not edges[7:13, 10:16].any() and not edges[:3].any() and not edges[:, :6].any()


def test_a_flat_image_has_no_edges_and_faint_ones_need_lower_thresholds():
    assert not grey(canny_edges(Image.new("RGB", (12, 12), (90, 90, 90)))).any()
    faint = np.full((12, 12, 3), 100, dtype=np.uint8)
    faint[:, 6:] = 110
    faint = Image.fromarray(faint)
    assert not grey(canny_edges(faint)).any() and grey(canny_edges(faint, 10, 20)).any()
    assert np.array_equal(grey(canny_edges(square())), grey(canny_edges(square(), CANNY_LOW, CANNY_HIGH)))


def test_the_digits_draw_theirs():
    source = Subset(Digits("test"), np.arange(4, 12))
    source.check_control("canny")
    for column, annotate in (("canny", canny_edges), ("mask", threshold_mask)):
        drawn = source.control(column, 3, 32)
        assert np.array_equal(np.array(drawn), np.array(annotate(source.read(3, 32)))) and grey(drawn).any()
    with pytest.raises(InputError, match="--control_column cany: the digits have .*canny and mask.*canny"):
        source.check_control("cany")


# Cut and mirrored as the image


@pytest.mark.parametrize("center_crop", [False, True])
def test_a_control_comes_as_its_image_in_every_epoch(tmp_path, center_crop):
    source = prepared(tmp_path / "data")
    dataset = examples(source, center_crop=center_crop, random_flip=True, interpolation="bilinear", seed=3)
    seen = []
    for epoch in range(4):
        batch = read(dataset, *range(len(source)), epoch=epoch)
        assert batch["control"].shape == (12, 3, SIZE, SIZE) and batch["control"].dtype == torch.float32
        assert torch.equal(batch["control"], (batch["pixel_values"] + 1) / 2)
        seen.append(batch["control"])
    assert not any(torch.equal(seen[0], later) for later in seen[1:])  # crop and mirror differ
    one = dataset[5, 2, 0]
    assert torch.equal(one["control"], seen[2][5]) and int(one["index"]) == 5 and one["bad_images"] == []


def test_a_control_is_scaled_without_overshoot(tmp_path):
    """Lanczos, which is for images, goes beyond black and white at edges, and rounds them to grey inside."""
    edge = np.zeros((40, 40, 3), dtype=np.uint8)
    edge[:, 20:] = 200
    image = Image.fromarray(edge)
    source = prepared(tmp_path / "data", {"image": [image], "label": [0], "depth": [image]})
    batch = read(examples(source, "depth"), 0)
    assert batch["control"].max() * 255 <= 200.01 < (batch["pixel_values"].max() + 1) * 127.5


def test_masks_are_scaled_without_mixed_colours_and_edges_not_at_all(tmp_path):
    stripes = np.zeros((40, 40, 3), dtype=np.uint8)
    stripes[:, 13:24], stripes[:, 24:31] = (250, 10, 90), (20, 160, 30)
    image, columns = Image.fromarray(stripes), ("mask", "sam", "depth", "canny")
    source = prepared(tmp_path / "data", {"image": [image], "label": [0]} | dict.fromkeys(columns, [image]))
    colours = {}
    for column in columns[:3]:
        control = read(examples(source, column), 0)["control"][0].flatten(1).T * 255
        colours[column] = {tuple(colour) for colour in control.round().int().tolist()}
    assert colours["mask"] == colours["sam"] == {(0, 0, 0), (250, 10, 90), (20, 160, 30)}
    assert len(colours["depth"]) > 3
    with pytest.raises(InputError, match=r"canny: .*\[0\].* is 40 × 40 .*but 16 .*prepare_dataset.py --resolution 16"):
        examples(source)
    assert read(examples(source, resolution=40), 0)["control"].shape == (1, 3, 40, 40)


def test_batches_are_the_same_with_workers(tmp_path):
    source = prepared(tmp_path / "data")
    dataset = examples(source, center_crop=False, random_flip=True)
    alone, helped = (Batches(dataset, 4, num_workers=count).starting_at(2) for count in (0, 1))
    for _ in range(2):
        one, other = next(alone), next(helped)
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["control"], other["control"])


# What cannot be read or does not fit


def test_columns_that_are_no_controls_are_refused(tmp_path):
    source = prepared(tmp_path / "data")
    with pytest.raises(InputError, match="--control_column cany: .*has the columns image, label, canny.*canny"):
        examples(source, "cany")
    with pytest.raises(InputError, match="--control_column caption: this column of .* holds no images"):
        examples(source, "caption")


def test_folders_of_images_say_what_to_do(tmp_path):
    (tmp_path / "ant").mkdir()
    noise_image(0).save(tmp_path / "ant" / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "ant/0.png", "text": "an ant"}\n')
    for source in (ImageFolder(str(tmp_path)), MetadataFolder(str(tmp_path))):
        with pytest.raises(InputError, match="--control_column canny: .*prepare_dataset.py.*--dataset_name"):
            Controls(source, "canny", Transform(SIZE))


def test_a_control_of_another_size_is_refused_at_the_start(tmp_path):
    rows = controlled_rows()
    rows["canny"][7] = noise_image(7, 20, 16)
    with pytest.raises(InputError) as caught:
        examples(prepared(tmp_path / "data", rows))
    said = str(caught.value)
    assert "--control_column canny" in said and "[7]" in said and said.count("\n") == 0
    assert "20 × 16 pixels" in said and "17 × 16 pixels" in said


LATE = LOOKED_AT + 2


@pytest.fixture
def damaged(tmp_path) -> HuggingFaceDataset:
    """Past those that are looked at when a run starts: one control of another size, one missing, an image that is
    none, and one with its control too large; and one control that is none at the very start."""
    rows = controlled_rows(LATE + 8)
    rows["image"][LATE + 4] = rows["canny"][LATE + 4] = noise_image(2, 20, 20)
    rows["canny"][LATE] = noise_image(1, 30, 16)
    rows["canny"][LATE + 1] = None
    rows["image"][LATE + 2] = {"bytes": b"this is no image", "path": None}
    rows["canny"][0] = {"bytes": b"nor is this", "path": None}
    return prepared(tmp_path / "data", rows)


def cached(source, accelerator, tmp_path, bad: BadImages) -> Controlled:
    transform = Transform(SIZE, center_crop=True)
    images = LabelledImages(source, transform)
    latents = open_latent_cache(images, FirstStage(tiny_vq()), tmp_path / "latents", accelerator, bad)
    return Controlled(latents, Controls(source, "canny", transform))


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_what_has_no_control_is_named_and_another_stands_in(damaged, accelerator, tmp_path, kind):
    before = BadImages(limit=9)
    dataset = cached(damaged, accelerator, tmp_path, before) if kind == "latents" else examples(damaged)
    wanted = [3, LATE, LATE + 1, LATE + 2, 0, LATE + 4]
    batch = read(dataset, *wanted)
    # The one after the two without a control has no image: what stands in for it stands in for them.
    found = [3, LATE + 3, LATE + 3, LATE + 3, 1, LATE + 5]
    assert batch["index"].tolist() == found
    assert batch["position"].tolist() == list(range(len(wanted))) and batch["epoch"].tolist() == [0] * len(wanted)
    assert batch["class_labels"].tolist() == [damaged.labels[index] for index in found]
    sound = read(dataset, *found)
    for name in ("control", "pixel_values" if kind == "pixels" else "moments"):
        assert torch.equal(batch[name], sound[name])
    assert not torch.equal(sound["control"][0], sound["control"][1])
    names = " ".join(set(batch["bad_images"]) | before.names)
    for index, reason in (
        (LATE, "30 × 16 pixels"),
        (LATE + 1, "no image here"),
        (LATE + 2, ""),
        (0, ""),
        (LATE + 4, "20 × 20"),
    ):
        assert f"[{index}]" in names and reason in names
    assert "[3]" not in names and sound["bad_images"] == []


def test_captions_follow_what_stands_in(damaged):
    args = arguments(dataset_name=damaged.title, caption_column="caption")
    source, captions = open_captions(args, damaged, BadImages(9))
    dataset = Captioned(examples(source), captions, encode)
    batch = read(dataset, 3, LATE, LATE + 2)
    theirs = damaged.captions("caption")
    assert decode(batch["input_ids"]) == [theirs[index][0] for index in (3, LATE + 3, LATE + 3)]
    assert theirs[LATE] != theirs[LATE + 3] or theirs[LATE + 2] != theirs[LATE + 3]


def test_bad_controls_count_toward_the_limit(damaged, caplog):
    batch = read(examples(damaged), LATE, LATE + 1, 0)
    bad = BadImages(limit=1)
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="--max_bad_images 1"):
        bad.add(batch["bad_images"])
    assert f"[{LATE}]" in caplog.text


@pytest.mark.parametrize("only", ["controls", "pairs"])
def test_where_nothing_can_be_read_it_is_said(tmp_path, only):
    """No control at all; or each example has one without an image or an image without one."""
    rows = controlled_rows(4)
    broken = {"bytes": b"this is no image", "path": None}
    rows["canny"] = [broken if only == "controls" or number % 2 else rows["canny"][number] for number in range(4)]
    rows["image"] = [rows["image"][number] if only == "controls" or number % 2 else broken for number in range(4)]
    dataset = examples(prepared(tmp_path / "data", rows))
    with pytest.raises(InputError, match="control"):
        read(dataset, 0, 1, 2)
