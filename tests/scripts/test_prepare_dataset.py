"""prepare_dataset.py: digits and image folders beside their controls and captions; killed and started again."""

import subprocess
import sys

import datasets
import numpy as np
import pytest
from launching import ROOT
from PIL import Image
from tiny_annotators import tiny_blip, tiny_sam
from transformers import BlipForConditionalGeneration

from noisycond.data.controls import canny_edges, threshold_mask
from noisycond.data.digit_captions import captions_of
from noisycond.data.sources import Digits


prepare_twice = ROOT / "tests/helpers/prepare_twice.py"


def contents(folder) -> dict[str, bytes]:
    """All files but the settings, which tell where the folder lies."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "preparation.json"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three classes, four digits in each, wider than high, and one file that is no image."""
    root, digits = tmp_path_factory.mktemp("data") / "images", Digits("train")
    for number, name in enumerate(("n01440764", "n01443537", "n01484850")):
        (root / name).mkdir(parents=True)
        for place in range(4):
            digits.read(4 * number + place, 24).resize((40, 24)).save(root / name / f"{place}.png")
    (root / "n01484850" / "2.png").write_bytes(b"none")
    return root


def test_the_embedded_default(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script("prepare_dataset", "--max_train_samples", 70)
    assert "70 images were annotated now" in capsys.readouterr().out
    folder = tmp_path / "runs/digits-controls"
    dataset, source = datasets.load_from_disk(str(folder)), Digits("train")
    assert dataset.column_names == ["image", "label", "caption", "canny", "mask", "id"] and len(dataset) == 70
    for index, row in enumerate(dataset):
        image = source.read(index, 32)
        assert (np.array(row["image"]) == np.array(image)).all()
        assert (np.array(row["canny"]) == np.array(canny_edges(image))).all()
        assert (np.array(row["mask"]) == np.array(threshold_mask(image))).all()
    assert all(mine in known for mine, known in zip(dataset["caption"], captions_of(source)[:70], strict=True))
    card = (folder / "README.md").read_text()
    assert "digits, split train" in card and "Canny edges, thresholds 100 and 200" in card and "70" in card
    script("prepare_dataset", "--max_train_samples", 70)
    assert " 0 images were annotated now" in capsys.readouterr().out


def test_classes_of_an_image_folder_with_sam_and_blip(script, refused, images, tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("2\n0\n")  # numbers, for no class is named by one
    flags = {
        "train_data_dir": images,
        "class_subset": tmp_path / "classes.txt",
        "output_dir": tmp_path / "out",
        "sam_model": tiny_sam(tmp_path / "sam"),
        "sam_points_per_side": 1,
        "sam_pred_iou_thresh": 0,
        "sam_stability_score_thresh": 0,
        "caption_model": tiny_blip(tmp_path / "blip"),
        "caption_prompt": "a big",
        "caption_max_tokens": 4,
        "resolution": 16,
        "annotation_batch_size": 4,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--annotations", "canny", "sam", "caption"]
    script("prepare_dataset", *words)
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset.column_names == ["image", "label", "caption", "canny", "sam", "id"]
    assert dataset.features["label"].names == ["n01440764", "n01484850"]
    assert dataset["label"][:] == [0, 0, 0, 0, 1, 1, 1] and dataset["id"][0] == "n01440764/0.png"
    assert dataset["id"][4:] == [f"n01484850/{place}.png" for place in (0, 1, 3)]
    assert all(caption.startswith("a big") for caption in dataset["caption"])
    for row in dataset:
        assert row["image"].size == row["sam"].size == row["canny"].size == (16, 16)
    assert np.array(dataset["sam"][0]).any() and len({np.array(picture).tobytes() for picture in dataset["sam"]}) > 1
    assert "n01484850/2.png" in caplog.text
    card = (tmp_path / "out/README.md").read_text()
    assert "`n01484850/2.png`" in card and str(tmp_path) not in card
    assert "masks of sam" in card and "by blip" in card and "those of classes.txt" in card

    other = tiny_sam(tmp_path / "moved")  # the same weights under another name
    script("prepare_dataset", *words, "--sam_model", other, "--sam_points_per_batch", 3)
    said = refused("prepare_dataset", *words, "--sam_stability_score_thresh", 0.5, "--canny_high", 150)
    assert "--canny_high was 200 and is 150" in said and "--sam_stability_score_thresh was 0.0 and is 0.5" in said
    (tmp_path / "classes.txt").write_text("2\n1\n")
    assert "the dataset changed" in refused("prepare_dataset", *words)
    assert "the caption model changed" in refused("prepare_dataset", *words_of_others(words, tmp_path))


def words_of_others(words, tmp_path) -> list[str]:
    """The same command with other weights of the caption model, and the classes as they were."""
    (tmp_path / "classes.txt").write_text("2\n0\n")
    folder = tiny_blip(tmp_path / "other")
    model = BlipForConditionalGeneration.from_pretrained(folder)
    model.text_decoder.cls.predictions.bias.data += 1
    model.save_pretrained(folder)
    return [*words, "--caption_model", folder]


def test_images_without_classes(script, refused, tmp_path):
    rows = {"picture": [Image.new("RGB", (16, 16), (9 * n, 0, 0)) for n in range(4)], "text": ["a", "b", " ", "d"]}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    words = ["--dataset_name", tmp_path / "set", "--image_column", "picture", "--output_dir", tmp_path / "out"]
    assert "--label_column label" in refused("prepare_dataset", *words, "--caption_column", "text")
    words += ["--label_column", "none"]
    assert "no classes to name; give --caption_model" in refused("prepare_dataset", *words)
    script("prepare_dataset", *words, "--caption_column", "text", "--resolution", 16)
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset["caption"][:] == ["a", "b", "d"] and "label" not in dataset.column_names
    assert dataset["id"][:] == ["train/0", "train/1", "train/3"]
    card = (tmp_path / "out/README.md").read_text()
    assert "could not be read or have no caption: `train/2`" in card


CASES = [
    (["--annotations", "depth"], ["--annotations depth", "canny, caption, mask, sam"]),
    (["--annotations", "sam"], ["--annotations sam needs --sam_model"]),
    (["--annotations", "sam", "--sam_model", "nowhere"], ["--sam_model nowhere", "no folder"]),
    (["--canny_low", "201"], ["--canny_low is 201", "--canny_high is 200"]),
    (["--class_subset", "11"], ["--class_subset 11", "10 classes"]),
    (["--max_bad_images", "-1"], ["--max_bad_images is -1"]),
    (["--output_dir", "."], ["--output_dir", "current"]),
    (["--random_flip"], ["unknown flag --random_flip"]),
    (["--cpu_threads_per_process", "0"], ["--cpu_threads_per_process is 0"]),
    (["--label_column", "none", "--class_subset", "2", "--dataset_name", "x"], ["--class_subset has no effect"]),
    (["--label_column", "none"], ["--label_column has no effect with --dataset_name digits"]),
]


@pytest.mark.parametrize("flags, words", CASES, ids=[" ".join(flags) for flags, _ in CASES])
def test_flag(refused, tmp_path, flags, words):
    sentence = refused("prepare_dataset", "--output_dir", tmp_path / "out", *flags)
    for word in words:
        assert word in sentence
    assert not list(tmp_path.iterdir())


def test_a_folder_within_the_images_is_refused(refused, images):
    said = refused("prepare_dataset", "--train_data_dir", images, "--output_dir", images / "controls")
    assert f"--output_dir {images}/controls lies in --train_data_dir {images}" in said


def test_two_processes_killed_and_two_that_go_on(script, tmp_path):
    """SIGKILL to two processes; two others take up what they left, and end bit for bit as one untouched."""
    words = ["--annotation_batch_size", 4, "--cpu_threads_per_process", 1, "--max_train_samples", 900]
    command = [sys.executable, prepare_twice, 5, tmp_path / "cut", *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    left, now = (next(line for line in done.stdout.splitlines() if word in line) for word in ("left", " now."))
    made = left.split()[1:]
    assert 5 <= len(made) < 14 and f"; {900 - 64 * len(made)} images were annotated now" in now
    script("prepare_dataset", *words, "--output_dir", tmp_path / "straight")
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")
