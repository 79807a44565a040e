"""A prepared dataset: the same whatever the number of processes and interruptions; nothing lost, nothing repeated."""

import errno
import io
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image

from noisycond.arguments import DataArguments
from noisycond.data import preparation
from noisycond.data.controls import canny_edges
from noisycond.data.images import BadImages, Transform
from noisycond.data.preparation import Preparation, prepare
from noisycond.data.sources import Digits, ImageSource, Subset, open_source
from noisycond.errors import InputError


class Annotators:
    """Edges and captions; remembers which images it has seen, and may stop after some."""

    def __init__(self):
        self.seen: list[int] = []
        self.stop_after = None
        self.by_column = {"caption": self.caption, "canny": self.canny}

    def caption(self, images, indices):
        return [f"number {index} of {len(indices)}" for index in indices]

    def canny(self, images, indices):
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.extend(indices)
        return [canny_edges(image) for image in images]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 6)


@pytest.fixture
def annotators() -> Annotators:
    return Annotators()


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits("train")


def preparation_of(digits: Digits, annotators: Annotators) -> Preparation:
    source = Subset(digits, np.arange(5, 36))
    settings = {"arguments": {"seed": 0, "canny_low": 100, "output_dir": "a"}, "facts": {"dataset": "abc"}}
    return Preparation(
        source,
        Transform(16, center_crop=True),
        annotators.by_column,
        3,
        settings,
        lambda count, unreadable: f"{count} examples, without {unreadable}",
    )


@pytest.fixture
def asked(digits, annotators) -> Preparation:
    return preparation_of(digits, annotators)


def run(asked, folder, accelerator, limit: int = 10) -> int:
    return prepare(asked, folder, BadImages(limit), accelerator)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """The folder of a run that was never touched."""
    folder = tmp_path_factory.mktemp("finished") / "straight"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preparation, "CHUNK", 6)
        assert run(preparation_of(digits, Annotators()), folder, Accelerator(cpu=True)) == 31
    return folder


@pytest.fixture
def straight(finished) -> dict[str, bytes]:
    """What is in it."""
    return contents(finished)


# What is in it


def test_datasets_and_the_training_scripts_open_it(asked, tmp_path, accelerator):
    run(asked, tmp_path / "x", accelerator)
    dataset = datasets.load_from_disk(str(tmp_path / "x"))
    assert dataset.column_names == ["image", "label", "caption", "canny", "id"] and len(dataset) == 31
    assert dataset.features["label"].names == asked.source.class_names
    for index in (0, 17, 30):
        row, image = dataset[index], asked.source.read(index, 16)
        assert (np.array(row["image"]) == np.array(image)).all() and row["image"].size == (16, 16)
        assert (np.array(row["canny"]) == np.array(canny_edges(image))).all() and row["canny"].mode == "RGB"
        assert row["label"] == asked.source.labels[index] and row["id"] == f"train/{index + 5}"
    assert dataset["caption"][:2] == ["number 0 of 3", "number 1 of 3"] and dataset["caption"][30] == "number 30 of 1"
    source = open_source(DataArguments(dataset_name=str(tmp_path / "x")))
    assert (source.labels == asked.source.labels).all() and source.class_names == asked.source.class_names
    assert source.captions("caption")[4] == ["number 4 of 3"] and source.id(3) == "train/3"
    assert (np.array(source.read(3, 16)) == np.array(asked.source.read(3, 16))).all()
    assert not (tmp_path / "x.preparing").exists()
    assert (tmp_path / "x" / "README.md").read_text() == "31 examples, without []"


def test_images_without_classes_have_no_labels(asked, tmp_path, accelerator):
    asked.source = Subset(asked.source, np.arange(4))
    asked.source.class_names = []
    run(asked, tmp_path / "x", accelerator)
    assert datasets.load_from_disk(str(tmp_path / "x")).column_names == ["image", "caption", "canny", "id"]


def test_images_are_cropped_to_their_centre(asked, tmp_path, accelerator):
    wide = Image.fromarray(np.arange(24 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(24, 40, 3))
    asked.source.read = lambda index, resolution: wide
    asked.transform = Transform(24, center_crop=True)
    run(asked, tmp_path / "x", accelerator)
    image = datasets.load_from_disk(str(tmp_path / "x"))[0]["image"]
    assert (np.array(image) == np.array(wide)[:, 8:32]).all()


def test_it_is_divided_into_shards(asked, tmp_path, finished, straight, accelerator, monkeypatch):
    size = len(straight["data-00000-of-00001.arrow"])
    monkeypatch.setattr(preparation, "SHARD_BYTES", size // 2)
    run(asked, tmp_path / "x", accelerator)
    assert len(list((tmp_path / "x").glob("data-*.arrow"))) > 1
    one, many = (datasets.load_from_disk(str(folder)) for folder in (finished, tmp_path / "x"))
    assert one[:] == many[:] and one._fingerprint == many._fingerprint


def test_another_content_has_another_fingerprint(asked, tmp_path, finished, accelerator):
    source = open_source(DataArguments(dataset_name=str(finished), max_train_samples=31))
    asked.annotators["caption"] = lambda images, indices: ["else"] * len(images)
    run(asked, tmp_path / "x", accelerator)
    other = open_source(DataArguments(dataset_name=str(tmp_path / "x"), max_train_samples=31))
    assert source.fingerprint != other.fingerprint


# Interruptions and processes


@pytest.mark.parametrize("moment", [1, 20])
def test_an_interrupted_run_goes_on_to_the_same(asked, annotators, tmp_path, straight, accelerator, moment):
    annotators.stop_after = moment
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "x", accelerator)
    assert not (tmp_path / "x").exists()
    whole = len(annotators.seen) // 6 * 6  # images in chunks that were finished
    annotators.seen.clear()
    annotators.stop_after = None
    assert run(asked, tmp_path / "x", accelerator) == 31 - whole
    assert annotators.seen == list(range(whole, 31))
    assert contents(tmp_path / "x") == straight


@pytest.mark.parametrize("last", ["_put_together", "_save_without_examples"])
def test_interrupted_while_it_is_put_together(asked, annotators, tmp_path, straight, accelerator, monkeypatch, last):
    function = getattr(preparation, last)

    def interrupted(*arguments):
        function(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preparation, last, interrupted)
        run(asked, tmp_path / "x", accelerator)
    assert not (tmp_path / "x").exists()
    annotators.seen.clear()
    assert run(asked, tmp_path / "x", accelerator) == 0 and not annotators.seen
    assert contents(tmp_path / "x") == straight


def test_interrupted_before_the_last_renaming(asked, tmp_path, straight, accelerator, monkeypatch):
    def interrupted(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupted)
        run(asked, tmp_path / "x", accelerator)
    assert not (tmp_path / "x").exists()
    assert run(asked, tmp_path / "x", accelerator) == 0 and contents(tmp_path / "x") == straight


def test_shards_of_an_interrupted_run_do_not_stay(asked, tmp_path, straight, accelerator, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preparation, "SHARD_BYTES", 1)
        patched.setattr(preparation.shutil, "copyfile", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        run(asked, tmp_path / "x", accelerator)
    assert len(list((tmp_path / "x.preparing/dataset").glob("*.arrow"))) == 6
    run(asked, tmp_path / "x", accelerator)
    assert contents(tmp_path / "x") == straight


def test_killed_after_the_last_renaming(asked, annotators, tmp_path, straight, accelerator, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(preparation.shutil, "rmtree", lambda path, ignore_errors: None)
        run(asked, tmp_path / "x", accelerator)
    assert (tmp_path / "x.preparing").exists()
    annotators.seen.clear()
    assert run(asked, tmp_path / "x", accelerator) == 0 and not annotators.seen
    assert not (tmp_path / "x.preparing").exists() and contents(tmp_path / "x") == straight


def test_two_processes_make_what_one_makes(asked, annotators, tmp_path, straight, accelerator, monkeypatch):
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_finish", lambda *arguments: None)
        for rank in (1, 0):
            process = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=True)
            run(asked, tmp_path / f"process-{rank}", process)
            seen.append(sorted(annotators.seen))
            annotators.seen.clear()
    assert len(seen[0]) > 6 and len(seen[1]) > 6 and sorted(seen[0] + seen[1]) == list(range(31))
    for path in (tmp_path / "process-1.preparing").glob("chunk-*"):
        path.rename(tmp_path / "process-0.preparing" / path.name)
    assert run(asked, tmp_path / "process-0", accelerator) == 0
    assert contents(tmp_path / "process-0") == straight


def test_what_a_kill_left_half_written_is_made_anew(asked, tmp_path, straight, accelerator):
    making = tmp_path / "x.preparing"
    making.mkdir()
    for name in ("preparation.json.part", "lock"):
        (making / name).write_text("{")
    run(asked, tmp_path / "x", accelerator)
    assert contents(tmp_path / "x") == straight


def test_damaged_chunks_are_made_anew(asked, annotators, tmp_path, straight, accelerator, caplog):
    """One without its facts, one whose facts are cut, one cut, one with zeros in it; one is sound."""
    annotators.stop_after = 30
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "x", accelerator)
    annotators.stop_after = None
    annotators.seen.clear()
    making = tmp_path / "x.preparing"
    (making / "chunk-000000.json").unlink()
    for name, keep, zeros in (("1.json", 20, 0), ("2.arrow", 900, 0), ("4.arrow", 900, 40)):
        path = making / f"chunk-00000{name}"
        content = path.read_bytes()
        path.write_bytes(content[:keep] + bytes(zeros) + (content[keep + zeros :] if zeros else b""))
    (making / "chunk-000005.arrow.part").write_bytes(b"half")
    assert run(asked, tmp_path / "x", accelerator) == 25 and contents(tmp_path / "x") == straight
    assert annotators.seen == [*range(18), *range(24, 31)]
    assert [number for number in range(6) if f"chunk-{number:06d}.arrow is damaged" in caplog.text] == [0, 1, 2, 4]


# Other settings, other folders


def test_a_finished_folder_is_left(asked, annotators, finished, accelerator):
    times = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run(asked, finished, accelerator) == 0 and not annotators.seen
    assert times == {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert not finished.with_name("straight.preparing").exists()


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_other_settings_are_refused(asked, annotators, tmp_path, accelerator, state):
    annotators.stop_after = 7 if state == "begun" else None
    with suppress(KeyboardInterrupt):
        run(asked, tmp_path / "x", accelerator)
    place = tmp_path / ("x.preparing" if state == "begun" else "x")
    before = contents(place)
    arguments = {"seed": 3, "canny_low": 100, "output_dir": "b"}
    with pytest.raises(InputError, match=r"--output_dir .*x.* was begun with other settings: --seed was 0 and is 3\."):
        run(replace(asked, settings=asked.settings | {"arguments": arguments}), tmp_path / "x", accelerator)
    with pytest.raises(InputError, match="the dataset changed"):
        run(replace(asked, settings=asked.settings | {"facts": {"dataset": "abd"}}), tmp_path / "x", accelerator)
    assert contents(place) == before
    annotators.stop_after = None
    (place / "preparation.json").write_text("[]")
    with pytest.raises(InputError, match=r"preparation\.json is damaged"):
        run(asked, tmp_path / "x", accelerator)


def test_a_folder_of_something_else_is_refused(asked, annotators, tmp_path, accelerator):
    for name in ("x", "y.preparing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "z").write_text("a file")
    for name, words in (("x", "holds something else"), ("y", "holds something else"), ("z", "is a file")):
        with pytest.raises(InputError, match=f"--output_dir .*{name}.* {words}"):
            run(asked, tmp_path / name, accelerator)
    assert not annotators.seen and (tmp_path / "x/notes.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(asked, tmp_path, straight, accelerator):
    (tmp_path / "x").mkdir()
    run(asked, tmp_path / "x", accelerator)
    assert contents(tmp_path / "x") == straight


def test_a_folder_that_another_run_works_on_is_refused(asked, tmp_path, accelerator):
    (tmp_path / "x.preparing").mkdir()
    with FileLock(tmp_path / "x.preparing" / "lock"), pytest.raises(InputError, match="another run is preparing it"):
        run(asked, tmp_path / "x", accelerator)
    assert run(asked, tmp_path / "x", accelerator) == 31


@pytest.mark.parametrize("file", ["preparation.json", "chunk-000001.arrow", "state.json"])
def test_a_full_disk_is_one_sentence_and_nothing_saved_is_lost(
    asked, annotators, tmp_path, straight, accelerator, monkeypatch, file
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, content, of=preparation._write):
        if path.name == file:
            raise full
        of(path, content)

    def write_atomically(path, text, of=preparation.write_atomically):
        if path.name == file:
            raise full
        of(path, text)

    def put_together(chunks, whole, of=preparation._put_together):
        if file == "state.json":
            raise full
        of(chunks, whole)

    with monkeypatch.context() as patched:
        for function in (write, write_atomically, put_together):
            name = function.__name__ if function is write_atomically else f"_{function.__name__}"
            patched.setattr(preparation, name, function)
        with pytest.raises(InputError, match="--output_dir .*x.*: no space left while writing"):
            run(asked, tmp_path / "x", accelerator)
    assert not (tmp_path / "x").exists()
    kept = {"preparation.json": 0, "chunk-000001.arrow": 6, "state.json": 31}[file]
    annotators.seen.clear()
    assert run(asked, tmp_path / "x", accelerator) == 31 - kept and annotators.seen == list(range(kept, 31))
    assert contents(tmp_path / "x") == straight


# Broken images


class Broken(ImageSource):
    """Digits, of which some cannot be read."""

    def __init__(self, digits, broken):
        self.digits, self.broken = Subset(digits, np.arange(20)), broken
        self.labels, self.class_names = self.digits.labels, self.digits.class_names
        self.fingerprint = self.digits.fingerprint

    def read(self, index, resolution):
        return self.digits.read(index, resolution) if index not in self.broken else Image.open(io.BytesIO(b"none"))

    def name(self, index):
        return f"/data/{index}.png"

    def id(self, index):
        return f"{index}.png"


def test_broken_images_and_those_without_a_caption_are_named_and_left_out(
    asked, digits, annotators, tmp_path, accelerator, caplog
):
    asked.source = Broken(digits, {4, *range(6, 12)})  # with a chunk of nothing else
    asked.annotators["caption"] = lambda images, indices: ["" if index == 13 else f"{index}" for index in indices]
    run(asked, tmp_path / "x", accelerator)
    dataset = datasets.load_from_disk(str(tmp_path / "x"))
    kept = [0, 1, 2, 3, 5, 12, *range(14, 20)]
    assert dataset["id"][:] == [f"{index}.png" for index in kept]
    assert dataset["caption"][:] == [f"{index}" for index in kept]
    for row, index in zip(dataset, kept, strict=True):
        assert (np.array(row["canny"]) == np.array(canny_edges(row["image"]))).all()
        assert (np.array(row["image"]) == np.array(digits.read(index, 16))).all()
    assert annotators.seen == sorted([*kept, 13])
    assert dataset["label"][:] == asked.source.labels[kept].tolist()
    assert "/data/4.png (cannot identify image file)" in caplog.text and "/data/11.png" in caplog.text
    assert "/data/13.png (it has no caption)" in caplog.text
    named = [f"{index}.png" for index in (4, *range(6, 12), 13)]
    assert (tmp_path / "x/README.md").read_text() == f"12 examples, without {named}"


def test_too_many_broken_images_stop_the_run_and_more_may_be_allowed(asked, digits, annotators, tmp_path, accelerator):
    asked.source = Broken(digits, {1, 7, 14})
    with pytest.raises(InputError, match=r"3 images .* more than --max_bad_images 2: /data/1\.png"):
        run(asked, tmp_path / "x", accelerator, limit=2)
    seen = len(annotators.seen)
    with pytest.raises(InputError, match="more than --max_bad_images 2"):  # those of finished chunks count
        run(asked, tmp_path / "x", accelerator, limit=2)
    assert len(annotators.seen) == seen
    run(asked, tmp_path / "x", accelerator, limit=3)
    assert sorted(annotators.seen) == sorted({*range(20)} - {1, 7, 14})
    assert len(datasets.load_from_disk(str(tmp_path / "x"))) == 17


def test_no_image_can_be_read(asked, digits, tmp_path, accelerator):
    asked.source = Broken(digits, range(20))
    with pytest.raises(InputError, match="none of the 20 images can be used: /data/0.png"):
        run(asked, tmp_path / "x", accelerator, limit=20)
    assert not (tmp_path / "x").exists()


def test_a_path_that_is_no_text(asked, tmp_path, accelerator):
    asked.source.id = lambda index: f"{index}-\udcff.png"
    run(asked, tmp_path / "x", accelerator)
    assert datasets.load_from_disk(str(tmp_path / "x"))[2]["id"] == "2-\\udcff.png"


def test_the_settings_are_kept(asked, tmp_path, accelerator):
    run(asked, tmp_path / "x", accelerator)
    assert json.loads((tmp_path / "x/preparation.json").read_text()) == asked.settings
