"""Sources of labelled images: the digits, image folders, everything that `datasets` opens, and subsets of them."""

import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from noisycond.arguments import DataArguments
from noisycond.data.sources import Digits, ImageFolder, MetadataFolder, Subset, choose_classes, open_source
from noisycond.errors import InputError


def colour(number: int) -> Image.Image:
    """An image that says which one it is."""
    return Image.new("RGB", (12, 8), (number * 7 % 256, number, 5))


def number_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[1]


def labelled(feature, labels, images=None) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    images = [colour(number) for number in range(len(labels))] if images is None else images
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def source_of(name, **options):
    return open_source(DataArguments(dataset_name=str(name), **options))


def refusal(name, **options) -> str:
    with pytest.raises(InputError) as caught:
        source_of(name, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """An image folder: three of class ant, two of bee, one of cat."""
    number = 0
    for name, count in (("bee", 2), ("ant", 3), ("cat", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(count):
            colour(number).save(tmp_path / "images" / name / f"{place}.png")
            number += 1
    return tmp_path / "images"


@pytest.fixture
def saved(tmp_path):
    """A dataset with class names, written by `save_to_disk`."""
    feature = datasets.ClassLabel(names=["zebra", "ant", "cat"])
    labelled(feature, [2, 0, 1, 1, 2]).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


# Digits


def test_digits_are_split_in_a_stratified_way():
    from sklearn.datasets import load_digits

    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train.positions, *test.positions]) == list(range(1797))  # disjoint, and nothing is lost
    assert train.class_names == test.class_names == [str(digit) for digit in range(10)]
    shares = [np.bincount(source.labels, minlength=10) / len(source) for source in (train, test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.003
    labels = load_digits().target
    assert (train.labels == labels[train.positions]).all() and (test.labels == labels[test.positions]).all()
    assert train.labels.dtype == np.int64


def test_digits_are_split_always_in_the_same_way():
    state = np.random.get_state()
    np.random.seed(5)
    first = Digits("test")
    np.random.seed(6)
    again = Digits("test")
    np.random.set_state(state)
    assert (first.positions == again.positions).all() and first.fingerprint == again.fingerprint
    # A fixed number: figures on the held-out digits stay comparable from version to version.
    assert first.positions[:8].tolist() == FIRST_HELD_OUT
    assert Digits("train").fingerprint != first.fingerprint


FIRST_HELD_OUT = [21, 24, 28, 34, 35, 37, 39, 42]


@pytest.mark.parametrize("resolution", [8, 32, 50])
def test_digits_have_the_asked_resolution(resolution):
    image = Digits("train").read(3, resolution)
    assert image.size == (resolution, resolution) and image.mode == "RGB"


def test_digits_are_white_on_black_and_use_the_whole_range():
    source = Digits("train")
    assert source.pixels.min() == 0 and source.pixels.max() == 255
    pixels = np.array(source.read(0, 8))
    assert (pixels == source.pixels[0][..., None]).all()
    assert pixels[:, 0].max() < 60  # the margin is black


def test_digits_have_two_splits():
    message = refusal("digits", dataset_split="validation")
    assert "--dataset_split validation" in message and "train and test" in message


def test_the_split_can_be_asked_for():
    args = DataArguments(dataset_name="digits")
    assert (len(open_source(args)), len(open_source(args, "test"))) == (1437, 360)
    assert len(source_of("digits", dataset_split="test")) == 360


# Image folders


def test_a_sub_folder_is_a_class(folder):
    source = open_source(DataArguments(train_data_dir=str(folder)))
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2] and source.labels.dtype == np.int64
    assert [number_of(source.read(index, 8)) for index in range(6)] == [2, 3, 4, 0, 1, 5]
    assert source.name(3).endswith("bee/0.png")


def test_a_grey_image_is_read_as_rgb(folder):
    Image.new("L", (5, 5), 77).save(folder / "cat" / "0.png")
    image = ImageFolder(str(folder)).read(5, 8)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (77, 77, 77)


def test_a_folder_without_classes(tmp_path):
    colour(0).save(tmp_path / "a.png")
    with pytest.raises(InputError) as caught:
        open_source(DataArguments(train_data_dir=str(tmp_path)))
    assert f"--train_data_dir {tmp_path}" in str(caught.value)
    assert "one sub-folder of images per class" in str(caught.value)


def test_a_class_without_images(folder):
    (folder / "dog").mkdir()
    (folder / "dog" / "notes.txt").write_text("none yet")
    with pytest.raises(InputError) as caught:
        open_source(DataArguments(train_data_dir=str(folder)))
    assert "--train_data_dir" in str(caught.value) and "dog" in str(caught.value)


def test_the_fingerprint_of_a_folder_changes_with_its_content(folder):
    first = ImageFolder(str(folder))
    again = ImageFolder(str(folder))
    assert (again.fingerprint, again.version) == (first.fingerprint, first.version)
    path = folder / "ant" / "1.png"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10_000_000))
    touched = ImageFolder(str(folder))
    # The same data for a run that resumes (a copy has other times), another version for the latent cache.
    assert touched.fingerprint == first.fingerprint and touched.version != first.version
    path.rename(folder / "bee" / "7.png")
    moved = ImageFolder(str(folder)).fingerprint
    colour(9).save(folder / "cat" / "1.png")
    assert len({first.fingerprint, moved, ImageFolder(str(folder)).fingerprint}) == 3


def test_the_fingerprint_of_a_folder_stays_where_the_folder_moves(folder, tmp_path):
    first = ImageFolder(str(folder)).fingerprint
    folder.rename(tmp_path / "elsewhere")
    assert ImageFolder(str(tmp_path / "elsewhere")).fingerprint == first


# datasets


def test_a_saved_dataset_with_class_names(saved):
    source = source_of(saved)
    assert source.class_names == ["zebra", "ant", "cat"]  # the dataset's own order
    assert source.labels.tolist() == [2, 0, 1, 1, 2] and source.labels.dtype == np.int64
    assert [number_of(source.read(index, 8)) for index in range(5)] == [0, 1, 2, 3, 4]
    assert source.read(0, 8).mode == "RGB"
    assert source.name(3).startswith(f"{saved}[3]")


@pytest.mark.parametrize(
    ("kind", "labels", "names", "numbers"),
    [
        ("string", ["pear", "fig", "pear"], ["fig", "pear"], [1, 0, 1]),
        ("int64", [30, 7, 30], ["7", "30"], [1, 0, 1]),
        ("uint8", [2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
    ],
)
def test_labels_without_class_names_are_numbered(tmp_path, kind, labels, names, numbers):
    labelled(datasets.Value(kind), labels).save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved")
    assert source.class_names == names and source.labels.tolist() == numbers and source.labels.dtype == np.int64


def test_labels_that_are_no_classes(tmp_path):
    labelled(datasets.Value("float32"), [0.5, 1.5]).save_to_disk(str(tmp_path / "saved"))
    message = refusal(tmp_path / "saved")
    assert "--label_column label" in message and "integers or names" in message and "float32" in message


def test_a_dictionary_of_splits(tmp_path):
    feature = datasets.Value("int64")
    splits = {"train": labelled(feature, [0, 1, 0]), "test": labelled(feature, [1, 0])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    assert len(source_of(tmp_path / "both")) == 3
    assert len(source_of(tmp_path / "both", dataset_split="test")) == 2
    message = refusal(tmp_path / "both", dataset_split="tset")
    assert "--dataset_split tset" in message and "train, test" in message


@pytest.mark.parametrize(
    ("options", "flag", "nearest"),
    [
        ({"image_column": "imge"}, "--image_column imge", "'image'"),
        ({"label_column": "lable"}, "--label_column lable", "'label'"),
    ],
)
def test_a_wrong_column_names_the_nearest(saved, options, flag, nearest):
    message = refusal(saved, **options)
    assert flag in message and "has the columns image, label" in message and f"did you mean {nearest}" in message


def test_a_column_that_holds_no_images(saved):
    message = refusal(saved, image_column="label")
    assert "--image_column label" in message and "holds no images" in message


def test_other_column_names(tmp_path):
    dataset = labelled(datasets.Value("int64"), [4, 4, 5]).rename_columns({"image": "photo", "label": "kind"})
    dataset.save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved", image_column="photo", label_column="kind")
    assert source.labels.tolist() == [0, 0, 1] and number_of(source.read(2, 8)) == 2


def test_a_folder_that_datasets_opens(folder, tmp_path):
    source = source_of(folder, cache_dir=str(tmp_path / "cache"))
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert [number_of(source.read(index, 8)) for index in range(6)] == [2, 3, 4, 0, 1, 5]
    assert "cat" in source.name(5)


def test_a_folder_with_metadata(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"file_name": f"{number}.png", "kind": kind} for number, kind in enumerate(["b", "a", "b"])]
    for number in range(3):
        colour(number).save(tmp_path / "data" / f"{number}.png")
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = source_of(tmp_path / "data", label_column="kind", cache_dir=str(tmp_path / "cache"))
    assert source.class_names == ["a", "b"]
    found = [
        (number_of(source.read(index, 8)), source.class_names[label]) for index, label in enumerate(source.labels)
    ]
    assert sorted(found) == [(0, "b"), (1, "a"), (2, "b")]
    message = refusal(tmp_path / "data", dataset_split="test", cache_dir=str(tmp_path / "cache"))
    assert "--dataset_name" in message and "test" in message


def test_a_name_that_nobody_knows():
    message = refusal("no/such-dataset")
    assert "--dataset_name no/such-dataset" in message and "cannot open it" in message and "\n" not in message


def test_the_fingerprint_of_a_dataset_changes_with_content_and_columns(tmp_path):
    feature = datasets.Value("int64")
    labelled(feature, [0, 1, 0]).save_to_disk(str(tmp_path / "a"))
    labelled(feature, [0, 1, 1]).save_to_disk(str(tmp_path / "b"))
    labelled(feature, [0, 1, 0], [colour(7)] * 3).add_column("other", [1, 2, 3]).save_to_disk(str(tmp_path / "c"))
    options = [{}, {}, {}, {"label_column": "other"}]
    prints = [source_of(tmp_path / name, **more).fingerprint for name, more in zip("abcc", options, strict=True)]
    assert len(set(prints)) == 4
    assert source_of(tmp_path / "a").fingerprint == prints[0]


def test_a_missing_image_is_an_unreadable_one(tmp_path):
    labelled(datasets.Value("int64"), [0, 1], [colour(0), None]).save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved")
    assert source.name(1).startswith(str(tmp_path / "saved"))
    with pytest.raises((OSError, ValueError)):
        source.read(1, 8)


@pytest.mark.parametrize("label", [-1, None])
def test_an_example_without_a_label_is_refused(tmp_path, label):
    labelled(datasets.ClassLabel(names=["a", "b"]), [0, label]).save_to_disk(str(tmp_path / "saved"))
    message = refusal(tmp_path / "saved")
    assert "--label_column label" in message


# Subsets


def test_a_number_of_classes_is_drawn_by_its_seed():
    names = [str(number) for number in range(100)]
    chosen = choose_classes(names, "10", seed=0)
    assert chosen == sorted(set(chosen)) and len(chosen) == 10 and min(chosen) >= 0 and max(chosen) < 100
    assert choose_classes(names, "10", seed=0) == chosen
    assert choose_classes(names, "10", seed=1) != chosen
    assert choose_classes(names, "100", seed=3) == list(range(100))
    assert set(choose_classes(names, "5", seed=0)) < set(chosen)  # a smaller subset lies in the larger


@pytest.mark.parametrize("count", ["0", "4", "99"])
def test_more_or_fewer_classes_than_there_are(folder, count):
    with pytest.raises(InputError) as caught:
        open_source(DataArguments(train_data_dir=str(folder), class_subset=count))
    assert f"--class_subset {count}" in str(caught.value) and "has 3 classes" in str(caught.value)


def test_the_classes_of_a_file_are_numbered_anew_in_the_old_order(saved, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n  zebra \n")
    source = source_of(saved, class_subset=str(tmp_path / "names.txt"))
    assert source.class_names == ["zebra", "cat"]  # the dataset's order, not the file's
    assert source.labels.tolist() == [1, 0, 1]
    assert [number_of(source.read(index, 8)) for index in range(3)] == [0, 1, 4]
    assert source.name(2).startswith(f"{saved}[4]")


def test_the_seed_of_the_flags_reaches_the_draw():
    first, again, other = (
        source_of("digits", class_subset="4", class_subset_seed=seed).class_names for seed in (0, 0, 1)
    )
    assert first == again and first != other and len(first) == 4


def test_a_subset_keeps_every_example_of_its_classes():
    whole, source = Digits("train"), source_of("digits", class_subset="3")
    names = [whole.class_names[label] for label in whole.labels]
    assert len(source) == sum(names.count(name) for name in source.class_names)
    assert set(source.labels.tolist()) == {0, 1, 2}
    kept = [name for name in names if name in source.class_names]
    assert [source.class_names[label] for label in source.labels] == kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ant\nzebr\n", ["no class 'zebr'", "did you mean 'zebra'"]),
        ("ant\ncat\nant\n", ["each once"]),
        ("\n\n", ["empty"]),
    ],
)
def test_a_wrong_file_of_classes(saved, tmp_path, text, words):
    path = tmp_path / "names.txt"
    path.write_text(text)
    message = refusal(saved, class_subset=str(path))
    assert f"--class_subset {path}" in message and all(word in message for word in words)


def test_classes_of_a_file_by_number(saved, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("2\nzebra\n")
    assert source_of(saved, class_subset=str(path)).class_names == ["zebra", "cat"]
    for text, words in (("3\n", "no class '3'"), ("0\nzebra\n", "'0' and 'zebra' are one class; list it once")):
        path.write_text(text)
        assert words in refusal(saved, class_subset=str(path))


def test_classes_that_are_named_by_numbers_are_chosen_by_name(tmp_path):
    labelled(datasets.Value("int64"), [30, 7, 30]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "ids.txt").write_text("30\n")
    assert source_of(tmp_path / "saved", class_subset=str(tmp_path / "ids.txt")).class_names == ["30"]
    (tmp_path / "ids.txt").write_text("1\n")
    assert "no class '1'" in refusal(tmp_path / "saved", class_subset=str(tmp_path / "ids.txt"))


def test_an_id_stays_where_the_data_move_and_in_a_subset(folder, saved, tmp_path):
    images = open_source(DataArguments(train_data_dir=str(folder)))
    assert [images.id(index) for index in (0, 3)] == ["ant/0.png", "bee/0.png"]
    (tmp_path / "names.txt").write_text("bee\n")
    subset = open_source(DataArguments(train_data_dir=str(folder), class_subset=str(tmp_path / "names.txt")))
    assert subset.id(0) == "bee/0.png"
    assert source_of(saved).id(3) == "train/3" and Digits("test").id(7) == "test/7"
    listed = [json.dumps({"file_name": "bee/1.png"}), json.dumps({"file_name": "cat/0.png"})]
    (folder / "metadata.jsonl").write_text("\n".join(listed))
    assert MetadataFolder(str(folder)).id(1) == "cat/0.png"


def test_a_file_of_classes_that_is_not_there(saved):
    message = refusal(saved, class_subset="nowhere.txt")
    assert "--class_subset nowhere.txt" in message and "a number of classes or a file" in message


def test_a_classless_subset_is_empty(saved, tmp_path):
    dataset = datasets.load_from_disk(str(saved)).select([1])
    dataset.save_to_disk(str(tmp_path / "one"))
    (tmp_path / "names.txt").write_text("cat\n")
    message = refusal(tmp_path / "one", class_subset=str(tmp_path / "names.txt"))
    assert "empty" in message and "no image is left" in message


def test_the_first_samples_only(saved):
    source = source_of(saved, max_train_samples=3)
    assert source.labels.tolist() == [2, 0, 1] and source.class_names == ["zebra", "ant", "cat"]
    assert len(source_of(saved, max_train_samples=99)) == 5


def test_the_sample_limit_counts_after_the_class_subset(saved, tmp_path):
    (tmp_path / "names.txt").write_text("ant\n")
    source = source_of(saved, class_subset=str(tmp_path / "names.txt"), max_train_samples=1)
    assert number_of(source.read(0, 8)) == 2 and len(source) == 1


def test_the_fingerprint_of_a_subset_changes_with_what_is_kept():
    whole = Digits("train")
    prints = [Subset(whole, np.array(kept)).fingerprint for kept in ([0, 1], [0, 2], [0], [0, 1])]
    assert prints[0] == prints[3] and len({*prints, whole.fingerprint}) == 4
    assert Subset(Digits("test"), np.array([0, 1])).fingerprint != prints[0]
