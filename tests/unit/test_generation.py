"""A folder of generated images: extended to what it were had all been drawn at once, never mixed, one sentence."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from noisycond import generation, sampling
from noisycond.errors import InputError
from noisycond.generation import ImageSettings, OpenPipeline, draw_images


SETTINGS = ImageSettings(8, 6, "random", 2.0, 3, None, "png", 0, "float32")
OPENED = OpenPipeline("runs/x", None, "sha256:ab", 10, ["a"] * 10)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Stands in for a pipeline: the pixels of an image depend on its number, its label and all of its batch."""
    numbers_drawn = []

    def sample(pipeline, labels, numbers, **options):
        numbers_drawn.extend(numbers)
        generators = [np.random.default_rng([number, *labels, *numbers]) for number in numbers]
        return [Image.fromarray(each.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for each in generators]

    monkeypatch.setattr(sampling, "sample", sample)
    return numbers_drawn


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("sampled", ["random", "balanced"])
@pytest.mark.parametrize("counts", [(8, 20), (6, 20), (3, 5, 7, 20), (18, 20)])
def test_a_folder_is_extended_to_what_it_were_had_all_been_drawn_at_once(
    tmp_path, accelerator, drawn, counts, sampled
):
    settings = replace(SETTINGS, class_sampling=sampled)
    assert draw_images(OPENED, replace(settings, num_images=20), tmp_path / "once", accelerator) == 20
    for count in counts:
        drawn.clear()
        draw_images(OPENED, replace(settings, num_images=count), tmp_path / "parts", accelerator)
    assert contents(tmp_path / "parts") == contents(tmp_path / "once")
    full = counts[-2] // 6 * 6  # what stood in full batches is not drawn again
    assert drawn == list(range(full, 20))


def test_an_interrupted_extension_goes_on_to_the_same(tmp_path, accelerator, monkeypatch):
    draw_images(OPENED, replace(SETTINGS, num_images=20), tmp_path / "once", accelerator)
    whole, write = replace(SETTINGS, num_images=20), generation.write_atomically

    def interrupted(path, text):
        raise KeyboardInterrupt

    draw_images(OPENED, SETTINGS, tmp_path / "parts", accelerator)
    monkeypatch.setattr(generation, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):  # when the images of the last batch are gone, and the settings not written
        draw_images(OPENED, whole, tmp_path / "parts", accelerator)
    assert not (tmp_path / "parts" / "000006.png").exists()
    monkeypatch.setattr(generation, "write_atomically", write)
    draw_images(OPENED, SETTINGS, tmp_path / "parts", accelerator)
    draw_images(OPENED, whole, tmp_path / "parts", accelerator)
    assert contents(tmp_path / "parts") == contents(tmp_path / "once")


def test_more_images_than_asked_for_are_refused_and_left(tmp_path, accelerator):
    draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)
    before = contents(tmp_path / "x")
    with pytest.raises(InputError, match=r"--pipeline runs/x, folder .*x: it holds 8 images, more than the 7 asked"):
        draw_images(OPENED, replace(SETTINGS, num_images=7), tmp_path / "x", accelerator)
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"batch_size": 5, "num_images": 20}, "--batch_size was 6 and is 5"),
    ],
)
def test_other_settings_are_refused_and_what_is_there_is_left(tmp_path, accelerator, change, words):
    draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)
    before = contents(tmp_path / "x")
    with pytest.raises(InputError, match=f"--pipeline runs/x, folder .*x: it holds images made .*{words}"):
        draw_images(OPENED, replace(SETTINGS, **change), tmp_path / "x", accelerator)
    with pytest.raises(InputError, match="--pipeline runs/x, folder .*x: .* other weights"):
        retrained = replace(OPENED, weights="sha256:cd")
        draw_images(retrained, replace(SETTINGS, num_images=20), tmp_path / "x", accelerator)
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_images": "8"}'])
def test_damaged_settings_are_one_sentence(tmp_path, accelerator, text):
    draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)
    (tmp_path / "x" / "generation.json").write_text(text)
    with pytest.raises(InputError, match=r"--pipeline runs/x, folder .*x: generation\.json is damaged"):
        draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)


@pytest.mark.parametrize("file", ["generation.json", "000003.png", "metadata.jsonl"])
def test_a_full_disk_is_one_sentence_for_every_file(tmp_path, accelerator, monkeypatch, file):
    write, save = generation.write_atomically, Image.Image.save

    def fill(path):
        if path.name in (file, f".{file}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(generation, "write_atomically", lambda path, text: fill(path) or write(path, text))
    monkeypatch.setattr(Image.Image, "save", lambda image, path, format: fill(path) or save(image, path, format))
    with pytest.raises(InputError, match=f"--pipeline runs/x, folder .*x: no space left while writing {file}"):
        draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)


def test_the_list_has_the_labels(tmp_path, accelerator):
    draw_images(OPENED, SETTINGS, tmp_path / "x", accelerator)
    rows = [json.loads(line) for line in (tmp_path / "x" / "metadata.jsonl").read_text().splitlines()]
    assert torch.equal(torch.tensor([row["label"] for row in rows]), sampling.random_labels(8, 10, 0))
