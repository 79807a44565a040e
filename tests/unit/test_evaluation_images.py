"""Sets of images to measure: labels, order, one size, and a sentence for what cannot be read."""

import json
import tracemalloc

import datasets
import numpy as np
import pytest
from PIL import Image

from noisycond.errors import InputError
from noisycond.evaluation.images import Resize, open_images, read_image


def write_images(folder, names, side=8):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (side, side), (number, 0, 0)).save(folder / name)
    return folder


def test_a_generated_folder_has_the_labels_of_its_list(tmp_path):
    folder = write_images(tmp_path / "x", ["b.png", "a.png", "c.png"])
    rows = [{"file_name": name, "label": label} for name, label in (("b.png", 7), ("a.png", 1), ("c.png", 0))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "generation.json").write_text(json.dumps({"class_names": ["x", "y"]}))
    source = open_images("--images", str(folder))
    assert source.labels.tolist() == [7, 1, 0] and source.class_names == ["x", "y"]
    assert [source.read(n).getpixel((0, 0))[0] for n in range(3)] == [0, 1, 2]

    (folder / "c.png").unlink()
    with pytest.raises(InputError, match=r"lists c\.png, but there is no such file"):
        open_images("--images", str(folder))


def test_a_flat_folder_has_no_labels_and_a_folder_of_classes_has(tmp_path):
    flat = open_images("--reference", str(write_images(tmp_path / "flat", ["2.png", "1.png", "note.txt.png"])))
    assert flat.labels is None and flat.class_names is None and len(flat) == 3
    classes = open_images("--reference", str(write_images(tmp_path / "classes", ["cat/1.png", "ant/1.png"])))
    assert classes.labels.tolist() == [0, 1] and classes.class_names == ["ant", "cat"]


def test_the_fingerprint_follows_content_and_labels(tmp_path):
    folder = write_images(tmp_path / "x", ["1.png", "2.png"])
    before = open_images("--images", str(folder)).fingerprint
    assert open_images("--images", str(folder)).fingerprint == before
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "2.png")
    changed = open_images("--images", str(folder)).fingerprint
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "label": 0}\n{"file_name": "2.png", "label": 1}\n')
    assert len({before, changed, open_images("--images", str(folder)).fingerprint}) == 3


def test_a_batch_in_an_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", pixels, np.arange(5))
    source = open_images("--images", str(tmp_path / "batch.npz"))
    assert (np.asarray(source.read(3)) == pixels[3]).all() and source.labels.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "float.npz", pixels.astype(np.float32))
    with pytest.raises(InputError, match="arr_0 is float32"):
        open_images("--images", str(tmp_path / "float.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="not a readable npz file"):
        open_images("--images", str(tmp_path / "broken.npz"))


@pytest.mark.parametrize("name, sentence", [("empty", "there is no image"), ("./nowhere", "no such folder")])
def test_what_is_not_there(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"--reference {name}: .*{sentence}"):
        open_images("--reference", name)


def test_an_unreadable_image_is_named(tmp_path):
    folder = write_images(tmp_path / "x", ["1.png", "2.png"])
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = open_images("--images", str(folder))
    with pytest.raises(InputError, match=r"--images: .*2\.png cannot be read"):
        read_image("--images", source, 1, Resize())


def test_resize_keeps_the_centre_and_leaves_the_right_size_alone():
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (16, 0, 48, 32))  # the centre square is white
    assert np.asarray(Resize(32)(wide)).min() == 255
    assert Resize(16)(wide).size == (16, 16)
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    assert Resize(32)(image) is image and Resize()(wide) is wide


def test_digits_come_at_the_asked_size():
    source = open_images("--reference", "digits", "test")
    assert len(source) == 360 and read_image("--reference", source, 0, Resize(48)).size == (48, 48)


@pytest.mark.parametrize("split, count", [(None, 360), ("test", 360), ("train", 1437)])
def test_digits_by_name_are_drawn_at_32_pixels(split, count):
    source = open_images("--images", "digits", split)
    assert len(source) == count and read_image("--images", source, 0, Resize()).size == (32, 32)


@pytest.mark.parametrize(
    "option, said",
    [
        ("--images", "--reference_split valid: "),
        ("--reference", "--reference_split valid: "),
        ("--eval_reference", "--eval_reference_split valid: "),
        ("--train_data", "--train_data digits: there is no split 'valid'; "),
    ],
)
def test_an_unknown_split_of_digits(option, said):
    with pytest.raises(InputError, match=f"^{said}digits has the splits train and test"):
        open_images(option, "digits", "valid")


def write_dataset(folder, **columns):
    whole = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 3, "label": [0, 1, 0], **columns})
    if "image" in whole.column_names:
        whole = whole.cast_column("image", datasets.Image())
    whole.save_to_disk(folder / "whole")
    datasets.DatasetDict({"train": whole, "held_out": whole}).save_to_disk(folder / "splits")
    whole.rename_column("image", "img").save_to_disk(folder / "renamed")
    whole.rename_column("image", "img").rename_column("label", "image").add_column("label", [0, 1, 0]).save_to_disk(
        folder / "numbers"
    )


@pytest.mark.parametrize("split", [None, "train"])
def test_a_dataset_without_splits_needs_no_split(tmp_path, split):
    write_dataset(tmp_path)
    assert len(open_images("--reference", str(tmp_path / "whole"), split)) == 3


@pytest.mark.parametrize(
    "option, name, split, said",
    [
        ("--reference", "whole", "test", "--reference_split test: NAME holds one dataset without splits; leave it"),
        (
            "--reference",
            "splits",
            None,
            "--reference NAME: there is no split 'validation'; NAME has the splits train, held_out; name one with "
            "--reference_split.",
        ),
        ("--reference", "splits", "test", "--reference_split test: NAME has the splits train, held_out."),
        ("--eval_reference", "splits", "test", "--eval_reference_split test: NAME has the splits train, held_out."),
        ("--reference", "renamed", None, "--reference NAME: the column 'image' is needed; the dataset NAME has the"),
        ("--images", "numbers", None, "--images NAME: the column 'image' is needed; this column of NAME holds no"),
        ("--train_data", "broken", "train", "--train_data NAME: `datasets` cannot open it"),
        ("--images", "hollow", None, "--images NAME: the class cat has no image"),
    ],
)
def test_messages_name_the_flag_that_was_given(tmp_path, option, name, split, said):
    write_dataset(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(InputError) as raised:
        open_images(option, str(tmp_path / name), split)
    assert str(raised.value).startswith(said.replace("NAME", str(tmp_path / name)))
    assert not any(flag in str(raised.value) for flag in ("--dataset", "_column", "--train_data_dir"))


def test_images_beside_folders_of_images_are_refused(tmp_path):
    folder = write_images(tmp_path / "x", ["cat/1.png", "cat/2.png", "1.png"])
    with pytest.raises(InputError, match=r"--reference .*x: there are images in it \(1\.png\) and .* \(cat\); move"):
        open_images("--reference", str(folder))
    (folder / "metadata.jsonl").write_text('{"file_name": "cat/1.png"}\n{"file_name": "1.png"}\n')
    assert len(open_images("--reference", str(folder))) == 2

    folder = write_images(tmp_path / "y", ["1.png"])
    (folder / "logs").mkdir()
    (folder / "logs" / "log.txt").write_text("")
    assert len(open_images("--reference", str(folder))) == 1  # no images in the sub-folder


@pytest.mark.parametrize("text", ["{", "[]", '{"class_names": 3}', '{"class_names": [1, 2]}', "\xff"])
def test_a_damaged_generation_json_is_one_sentence(tmp_path, text):
    folder = write_images(tmp_path / "x", ["1.png"])
    (folder / "generation.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"--images .*x: generation\.json is damaged \(.*\); remove it"):
        open_images("--images", str(folder))


def test_a_batch_is_not_read_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", pixels)
    open_images("--images", str(tmp_path / "batch.npz"))
    tracemalloc.start()
    source = open_images("--images", str(tmp_path / "batch.npz"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < pixels.nbytes / 3
    assert (np.asarray(source.read(999)) == pixels[999]).all()
    one = source.fingerprint
    pixels[999, 63, 63, 2] ^= 1
    np.savez(tmp_path / "batch.npz", pixels)
    assert open_images("--images", str(tmp_path / "batch.npz")).fingerprint != one


def test_grey_images_of_a_batch_become_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", pixels)
    image = np.asarray(open_images("--images", str(tmp_path / "batch.npz")).read(2))
    assert (image == np.repeat(pixels[2], 3, axis=-1)).all()


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"mu": np.zeros(3)}, "it holds no images"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "images must be uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "images must be uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, "one class for each of the 2 images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "one class for each of the 2 images"),
    ],
)
def test_batches_of_something_else(tmp_path, arrays, words):
    np.savez(tmp_path / "batch.npz", **arrays)
    with pytest.raises(InputError, match=rf"--images .*batch\.npz: .*{words}"):
        open_images("--images", str(tmp_path / "batch.npz"))


def test_texts_of_a_list(tmp_path):
    folder = write_images(tmp_path / "x", ["1.png", "2.png"])

    def listed(*rows):
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_images("--images", str(folder))

    first, second = {"file_name": "1.png", "text": "a\u2028cat"}, {"file_name": "2.png", "text": "a dog"}
    source = listed(first, second)
    assert source.texts == ["a\u2028cat", "a dog"] and source.labels is None
    other = listed(first, second | {"text": "a dog."})
    assert other.texts[1] == "a dog." and other.fingerprint != source.fingerprint
    both = listed(first | {"label": 1}, second | {"label": 0})
    assert both.texts == source.texts and both.labels.tolist() == [1, 0]
    assert listed(first, {"file_name": "2.png"}).texts is None
