"""Streams: what shards and what `datasets` streams hold, their stable ids, and what of them cannot be read."""

import bz2
import gzip
import io
import lzma
import os

import datasets
import numpy as np
import pytest
from braceexpand import braceexpand
from PIL import Image
from shards import json_label, png, write_class_names, write_one, write_shards

from noisycond.arguments import StreamArguments
from noisycond.data.shard_names import redacted, shard_name
from noisycond.data.sources import Digits
from noisycond.data.streams import (
    Broken,
    HubStream,
    RawExample,
    WebDatasetShards,
    label_number,
    open_stream,
    require_ids,
    stable_key,
)
from noisycond.errors import InputError


NAMES = [str(digit) for digit in range(10)]


def read(source, shard: int = 0) -> tuple[list[RawExample], list[str]]:
    items = list(source.read(shard))
    broken = [item.name for item in items if isinstance(item, Broken)]
    assert len(broken) <= 1 and not any(isinstance(item, Broken) for item in items[:-1])
    return [item for item in items if isinstance(item, RawExample)], broken


def refusal(action, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        action(*args, **options)
    return str(caught.value)


# Labels and keys


@pytest.mark.parametrize(
    ("value", "label"),
    [(2, 2), (b"2\n", 2), ("bee", 1), (b" bee ", 1), ("0", 0), (np.int64(1), 1)],
)
def test_a_label_is_a_name_or_a_number(value, label):
    assert label_number(value, ["ant", "bee", "cat"]) == label


def test_a_name_goes_before_a_number():
    assert label_number("1", ["1", "0"]) == 0 and label_number(1, ["1", "0"]) == 1


@pytest.mark.parametrize("value", [3, -1, "dog", b"", None, 1.0, True, b"\xff", [1]])
def test_labels_that_are_no_class(value):
    with pytest.raises(ValueError):
        label_number(value, ["ant", "bee", "cat"])


def test_keys_are_fixed_and_fit_in_an_int64():
    # A fixed number: which examples are corrupted must not change from version to version.
    assert stable_key("00000.tar/0003") == KEY
    keys = [stable_key(f"{number}") for number in range(2000)]
    assert len(set(keys)) == 2000 and min(keys) >= 0 and max(keys) < 2**63
    assert max(keys) > 2**62


KEY = 3805339017273202304


# WebDataset


def test_a_shard_holds_its_examples(tmp_path):
    write_shards(tmp_path, [5, 3])
    source = WebDatasetShards(f"{tmp_path}/{{00000..00001}}.tar", NAMES)
    assert source.shards == ["00000.tar", "00001.tar"] and source.has_ids
    digits = Digits("train")
    examples, broken = read(source, 1)
    assert not broken and [raw.id for raw in examples] == [f"00001.tar/{place:04d}" for place in range(3)]
    for place, raw in enumerate(examples):
        image, label = source.decode(raw)
        assert label == digits.labels[5 + place]
        assert (np.array(image) == np.array(digits.read(5 + place, 8))).all() and image.mode == "RGB"


@pytest.mark.parametrize("pattern", ["{}/*.tar", "{}/0000[01].tar", "{}/{{00000,00001}}.tar", "file://{}/*.tar"])
def test_ways_to_name_shards(tmp_path, pattern):
    write_shards(tmp_path, [1, 1])
    assert WebDatasetShards(pattern.format(tmp_path), NAMES).shards == ["00000.tar", "00001.tar"]


def test_ids_and_fingerprint_do_not_tell_where_the_shards_lie(tmp_path):
    for folder in ("here", "else/where"):
        write_shards(tmp_path / folder, [2, 1])
    one, other = (WebDatasetShards(f"{tmp_path}/{folder}/*.tar", NAMES) for folder in ("here", "else/where"))
    assert one.fingerprint == other.fingerprint
    assert [raw.id for raw in read(one)[0]] == [raw.id for raw in read(other)[0]]
    both = refusal(WebDatasetShards, f"{tmp_path}/{{here,else/where}}/00000.tar", NAMES)
    assert "00000.tar is named more than once" in both
    # What else is in the set does not change an id.
    (tmp_path / "else/where/00000.tar").rename(tmp_path / "else/where/7.tar")
    more = WebDatasetShards(f"{tmp_path}/here/*.tar::{tmp_path}/else/where/7.tar", NAMES)
    assert [raw.id for raw in read(more)[0]] == [raw.id for raw in read(one)[0]]
    assert more.fingerprint != one.fingerprint


@pytest.mark.parametrize("changed", ["size", "content"])
def test_another_dataset_of_the_usual_names_has_another_fingerprint(tmp_path, changed):
    # Digits of other pixels as PNGs of other sizes, which the blocks of a tar hide.
    write_shards(tmp_path / "one", [2, 1])
    write_shards(tmp_path / "other", [2, 30] if changed == "size" else [2, 1], first=0 if changed == "size" else 100)
    one, other = (WebDatasetShards(f"{tmp_path}/{folder}/*.tar", NAMES) for folder in ("one", "other"))
    assert one.shards == other.shards and one.fingerprint != other.fingerprint
    sizes = [[os.path.getsize(url) for url in source.urls] for source in (one, other)]
    assert (sizes[0] == sizes[1]) == (changed == "content")


ADDRESSES = [
    ("pipe:curl 'https://h/d/{0..1}.tar?X-Amz-Signature=SECRET'", "pipe: {0..1}.tar", "0.tar"),
    ("pipe:curl -H 'Authorization: Bearer SECRET' https://SECRET:SECRET@h/{0..1}.tar.gz", None, "0.tar.gz"),
    ("https://me:SECRET@h/d/{0..1}.tar?sig=1/SECRET#SECRET", "https://h/d/{0..1}.tar", "0.tar"),
    ("{https://a:SECRET@h/0.tar?s=SECRET,https://h/1.tar?s=SECRET}", None, "0.tar"),
    ("gs://bucket/{0..1}.tar", "gs://bucket/{0..1}.tar", "0.tar"),
    ("hf://datasets/me/it@main/{0..1}.tar", "hf://datasets/me/it@main/{0..1}.tar", "0.tar"),
]


@pytest.mark.parametrize(("pattern", "shown", "name"), ADDRESSES)
def test_what_may_be_shown_of_an_address(pattern, shown, name):
    said = redacted(pattern)
    assert "SECRET" not in said and ".tar" in said and (shown is None or said == shown)
    assert shard_name(next(iter(braceexpand(pattern)))) == name


def test_local_patterns_are_shown_as_they_are():
    assert redacted("d/?.tar::file:///e/[0#].tar") == "d/?.tar::file:///e/[0#].tar"
    assert shard_name("d/e#1?.tar") == "e#1?.tar"


def test_a_secret_is_in_no_key_and_no_message(tmp_path):
    write_shards(tmp_path, [1, 1])
    command = f"pipe:cat {tmp_path}/{{00000..00001}}.tar # https://h/?X-Amz-Signature="
    one, other = (WebDatasetShards(command + secret, NAMES) for secret in ("SECRET", "ROTATED"))
    assert [raw.id for raw in read(one)[0]] == [raw.id for raw in read(other)[0]] == ["00000.tar/0000"]
    assert one.shards == ["00000.tar", "00001.tar"] and one.fingerprint == other.fingerprint
    for pattern in ("pipe:cat SECRET", "pipe:curl SECRET::SECRET 0.tar", "pipe:cat {SECRET,SECRET}/0.tar"):
        message = refusal(WebDatasetShards, pattern, NAMES)
        assert "--train_shards" in message and "SECRET" not in message


def test_shards_that_are_not_there(tmp_path):
    write_shards(tmp_path, [1, 1])
    message = refusal(WebDatasetShards, f"{tmp_path}/{{00000..00002}}.tar", NAMES)
    assert "--train_shards" in message and "there is no file" in message and message.endswith("00002.tar.")
    assert "more than once" in refusal(WebDatasetShards, f"{tmp_path}/*.tar::{tmp_path}/00000.tar", NAMES)


def test_every_cut_keeps_what_is_whole_and_is_named(tmp_path):
    path = write_shards(tmp_path, [6])[0]
    content = path.read_bytes().rstrip(b"\0")
    source = WebDatasetShards(str(path), NAMES)
    counts = []
    for size in range(1, len(content), 211):
        path.write_bytes(content[:size])
        examples, broken = read(source)
        assert len(broken) == 1 and f"the shard 00000.tar after {len(examples)} examples (" in broken[0]
        assert " @ " not in broken[0] and " object at " not in broken[0]
        for raw in examples:
            source.decode(raw)
        counts.append(len(examples))
    assert counts == sorted(counts) and set(counts) == set(range(6))


def test_a_damaged_header_ends_a_shard_and_is_named(tmp_path):
    path = write_shards(tmp_path, [6])[0]
    content = bytearray(path.read_bytes())
    place = content.index(b"0003.png")
    content[place : place + 300] = bytes(range(100)) * 3
    path.write_bytes(content)
    examples, broken = read(WebDatasetShards(str(path), NAMES))
    assert [raw.id for raw in examples] == [f"00000.tar/{place:04d}" for place in range(3)] and len(broken) == 1


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(tmp_path, compress):
    path = write_shards(tmp_path, [40])[0]
    content = compress(path.read_bytes())
    path.write_bytes(content)
    examples, broken = read(WebDatasetShards(str(path), NAMES))
    assert len(examples) == 40 and not broken
    for size in range(1, len(content), 499):
        path.write_bytes(content[:size])
        examples, broken = read(WebDatasetShards(str(path), NAMES))
        assert len(examples) <= 40 and len(broken) == 1, size
    assert len(examples) > 30 or compress is bz2.compress  # which packs it all in one block


def test_a_shard_through_a_pipe_and_one_that_fails(tmp_path):
    write_shards(tmp_path, [4])
    source = WebDatasetShards(f"pipe:exec cat {tmp_path}/{{00000..00001}}.tar 2> /dev/null", NAMES)
    examples, broken = read(source)
    assert len(examples) == 4 and not broken
    with (tmp_path / "00000.tar").open("ab") as file:
        file.write(bytes(1 << 20))  # more than a pipe holds: who writes it must not be cut off
    examples, broken = read(source)
    assert len(examples) == 4 and not broken
    examples, broken = read(source, 1)
    assert not examples and "after 0 examples (its command ended with status 1)" in broken[0]


def test_an_access_token_is_not_logged(tmp_path):
    _, broken = read(WebDatasetShards("pipe:echo Bearer-secret; exit 3 # 0.tar", NAMES))
    assert "ended with status 3" in broken[0] and "secret" not in broken[0].split(" after ")[1]


def test_an_address_that_does_not_answer_is_named(tmp_path):
    examples, broken = read(WebDatasetShards("nowhere://example.org/0.tar", NAMES))
    assert not examples and "the shard 0.tar after 0 examples" in broken[0]


def test_examples_of_no_use_say_why(tmp_path):
    samples = [
        {"png": png(0), "cls": b"3"},
        {"png": b"nonsense", "cls": b"3"},
        {"png": png(0), "cls": b"12"},
        {"png": png(0), "cls": b"x"},
        {"png": png(0)},
        {"cls": b"3"},
        {"png": png(0), "json": b"{"},
        {"png": png(0), "json": json_label(4)},
    ]
    write_one(tmp_path / "0.tar", samples)
    source = WebDatasetShards(str(tmp_path / "0.tar"), NAMES)
    examples, broken = read(source)
    assert len(examples) == 8 and not broken
    said = {}
    for raw in examples:
        try:
            assert source.decode(raw)[1] == {"0.tar/0000": 3, "0.tar/0007": 4}[raw.name]
        except (ValueError, OSError) as error:
            said[raw.name] = str(error)
    words = {1: "cannot identify", 2: "12", 3: "'x'", 4: "no label: its files are png", 5: "no image", 6: "json"}
    assert said.keys() == {f"0.tar/{place:04d}" for place in words}
    assert all(word in said[f"0.tar/{place:04d}"] for place, word in words.items()), said


def test_other_extensions_and_fields(tmp_path):
    write_one(tmp_path / "0.tar", [{"left.png": png(1), "png": png(2), "json": b'{"kind": "7"}', "cls": b"1"}])
    raw = read(WebDatasetShards(str(tmp_path / "0.tar"), NAMES, "left.png", "kind"))[0][0]
    assert raw.image == png(1) and raw.label == "7"
    raw = read(WebDatasetShards(str(tmp_path / "0.tar"), NAMES))[0][0]
    assert raw.image == png(2) and raw.label == b"1"


# `datasets`


def colour(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (0, number, 0)).save(file, "PNG")
    return file.getvalue()


def table(count: int, first: int = 0, paths: bool = True, label=None, **more) -> datasets.Dataset:
    numbers = range(first, first + count)
    images = [{"bytes": colour(number), "path": f"{number}.png" if paths else None} for number in numbers]
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["ant", "bee", "cat"])}
    columns = {"image": images, "label": [number % 3 for number in numbers], **more}
    features |= {name: datasets.Value("string") for name in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(folder, sizes, **options) -> list:
    folder.mkdir()
    paths = [folder / f"train-{number:05d}-of-{len(sizes):05d}.parquet" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        table(size, sum(sizes[:number]), **options).to_parquet(str(path))
    return paths


def stream(folder, **options) -> HubStream:
    args = StreamArguments.__new__(StreamArguments)  # its checks need the flags of a whole script
    fields = {name: item.default for name, item in StreamArguments.__dataclass_fields__.items()}
    args.__dict__ |= fields | {"dataset_name": str(folder), "streaming": True} | options
    return open_stream(args)


def test_a_dataset_in_shards(tmp_path):
    parquet(tmp_path / "data", [3, 2, 4])
    source = stream(tmp_path / "data")
    assert len(source.shards) == 3 and source.class_names == ["ant", "bee", "cat"] and source.has_ids
    for shard, numbers in enumerate([[0, 1, 2], [3, 4], [5, 6, 7, 8]]):
        examples, broken = read(source, shard)
        assert not broken and [raw.id for raw in examples] == [f"{number}.png" for number in numbers]
        for number, raw in zip(numbers, examples, strict=True):
            image, label = source.decode(raw)
            assert image.getpixel((0, 0)) == (0, number, 0) and label == number % 3


def test_a_broken_image_and_a_cut_file_do_not_end_the_stream(tmp_path):
    paths = parquet(tmp_path / "data", [3, 2, 4])
    paths[1].write_bytes(paths[1].read_bytes()[:400])
    broken_image = table(4, 5).to_list()
    broken_image[1]["image"] = {"bytes": b"nonsense", "path": "6.png"}
    broken_image[2]["image"] = None
    broken_image[3]["label"] = None
    datasets.Dataset.from_list(broken_image, features=table(1).features).to_parquet(str(paths[2]))
    source = stream(tmp_path / "data")
    assert len(read(source, 0)[0]) == 3
    examples, broken = read(source, 1)
    assert not examples and "data shard 1 after 0 examples" in broken[0]
    examples, broken = read(source, 2)
    assert len(examples) == 4 and not broken
    source.decode(examples[0])
    for raw in examples[1:]:
        with pytest.raises((OSError, ValueError)):
            source.decode(raw)
    assert "6.png" in examples[1].name


def test_an_image_folder_as_a_stream(tmp_path):
    for folder in ("here", "there"):
        for number, name in enumerate(["bee", "ant", "bee"]):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name / f"{number}.png").write_bytes(colour(number))
    here, there = stream(tmp_path / "here"), stream(tmp_path / "there")
    examples, _ = read(here)
    assert [raw.id for raw in examples] == [os.path.join("ant", "1.png"), "bee/0.png", "bee/2.png"]
    assert here.class_names == ["ant", "bee"] and [here.decode(raw)[1] for raw in examples] == [0, 1, 1]
    assert here.fingerprint == there.fingerprint  # it moved, and is the same
    (tmp_path / "here" / "bee" / "2.png").unlink()
    with pytest.raises(OSError):
        here.decode(examples[2])


def test_the_fingerprint_changes_with_the_content(tmp_path):
    parquet(tmp_path / "a", [3, 2])
    parquet(tmp_path / "b", [3, 2])
    parquet(tmp_path / "c", [3, 2], paths=False)
    parquet(tmp_path / "d", [2, 3])
    parquet(tmp_path / "e", [3, 1, 1])
    prints = [stream(tmp_path / name).fingerprint for name in "abcde"]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_a_column_of_ids(tmp_path):
    parquet(tmp_path / "data", [3], paths=False, code=["x", "y", "z"])
    assert not stream(tmp_path / "data").has_ids
    source = stream(tmp_path / "data", id_column="code")
    assert source.has_ids and [raw.id for raw in read(source)[0]] == ["x", "y", "z"]


@pytest.mark.parametrize("codes", [["x", "y", "x"], ["x", None, "y"]])
def test_ids_that_are_missing_or_repeat_are_none(tmp_path, codes):
    parquet(tmp_path / "data", [3], code=codes)
    source = stream(tmp_path / "data", id_column="code")
    message = refusal(require_ids, source, "--corruption_mode fixed")
    assert "--corruption_mode fixed" in message and "no" in message and "--id_column" in message


def test_ids_that_repeat_in_another_shard_are_none(tmp_path):
    parquet(tmp_path / "data", [3, 3])
    table(3, 1).to_parquet(str(tmp_path / "data/train-00001-of-00002.parquet"))  # 1.png to 3.png, after 0.png to 2.png
    source = stream(tmp_path / "data")
    assert not source.has_ids and "or some of them repeat" in refusal(require_ids, source, "--cep_mode fixed")


def test_keys_do_not_tell_where_the_dataset_lies(tmp_path):
    parquet(tmp_path / "data", [1], paths=False)
    source = stream(tmp_path / "data")
    assert source.shards == ["shard 0"] and read(source)[0][0].name == "shard 0 example 0"


def test_a_dataset_without_examples(tmp_path):
    parquet(tmp_path / "data", [2])
    source = stream(tmp_path / "data")
    table(0).to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    assert "no example can be read in its 1 shards" in refusal(source._look_at_the_first)
    source.shards = []
    assert "no example can be read in its 0 shards" in refusal(source._look_at_the_first)


def test_an_example_without_an_id_is_of_no_use_where_ids_are_needed(tmp_path):
    parquet(tmp_path / "data", [1], paths=False)
    source = stream(tmp_path / "data")
    raw = read(source)[0][0]
    source.decode(raw)
    source.has_ids = True
    require_ids(source, "--cep_mode fixed")
    with pytest.raises(ValueError, match="no stable id"):
        source.decode(raw)


def test_classes_that_the_stream_does_not_know(tmp_path):
    parquet(tmp_path / "data", [4], label=datasets.Value("int64"))
    assert "--class_names FILE is needed" in refusal(stream, tmp_path / "data")
    names = write_class_names(tmp_path / "names.txt")
    source = stream(tmp_path / "data", class_names=str(names))
    assert source.class_names == NAMES and [source.decode(raw)[1] for raw in read(source)[0]] == [0, 1, 2, 0]
    parquet(tmp_path / "known", [1])
    assert "--class_names has no effect" in refusal(stream, tmp_path / "known", class_names=str(names))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "imge"}, ["--image_column imge", "image, label", "did you mean 'image'"]),
        ({"label_column": "lable"}, ["--label_column lable", "did you mean 'label'"]),
        ({"id_column": "key"}, ["--id_column key", "image, label"]),
        ({"image_column": "label"}, ["--image_column label", "holds no images"]),
        ({"dataset_split": "tset"}, ["--dataset_name", "cannot stream it", "tset"]),
    ],
)
def test_what_a_dataset_does_not_have(tmp_path, options, words):
    parquet(tmp_path / "data", [2])
    message = refusal(stream, tmp_path / "data", **options)
    assert all(word in message for word in words) and "\n" not in message


def test_a_dataset_of_which_nothing_can_be_read(tmp_path):
    paths = parquet(tmp_path / "data", [2, 2])
    schema = paths[0].read_bytes()
    source = stream(tmp_path / "data")
    for path in paths:
        path.write_bytes(schema[:100])
    assert "no example can be read" in refusal(source._look_at_the_first)


def test_a_saved_dataset_needs_no_stream(tmp_path):
    table(3).save_to_disk(str(tmp_path / "saved"))
    message = refusal(stream, tmp_path / "saved")
    assert "--streaming has no effect" in message and "leave it off" in message
