"""Sets of images to measure: labels, order, one size, and a sentence for what cannot be read."""

import json

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
