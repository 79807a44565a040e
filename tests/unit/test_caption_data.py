"""Captions of map-style data: the same for an example on any number of processes, with what has none left out."""

import csv
import itertools
import json
import logging
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from captioned import arguments, decode, encode
from PIL import Image

from noisycond.arguments import DataArguments, LoopArguments
from noisycond.captions import Caption, CaptionCorruption
from noisycond.data.captions import Captioned, Captions
from noisycond.data.corruption_map import save_caption_map
from noisycond.data.latent_cache import CachedLatents
from noisycond.data.opening import open_batches, open_training_data
from noisycond.data.sources import Digits, MetadataFolder, _numbered
from noisycond.errors import InputError


SIZE = 60
OWN = [[f"caption {n}", f"text {n}"][: 1 + n % 2] for n in range(SIZE)]
EPOCHS = range(6)
LABELS = np.arange(SIZE) % 5


def captions(ratio=0.3, type="swap", mode="fixed", own=OWN, **options) -> Captions:
    rewritten = options.pop("rewritten", None)
    labels = options.pop("labels", None)
    return Captions(own, CaptionCorruption(ratio, type, mode, **options), labels, rewritten)


def used(made: Captions, epoch: int) -> list[Caption]:
    index = torch.arange(len(made))
    return made.use_all(index, torch.full_like(index, epoch))


def texts(made: Captions, epoch: int) -> list[str]:
    return [caption.text for caption in used(made, epoch)]


def alone(accelerator=None, processes=1, process=0) -> SimpleNamespace:
    """What `open_batches` asks of an accelerator."""
    return SimpleNamespace(num_processes=processes, process_index=process)


# Drawing


def test_of_several_captions_one_is_drawn_anew_every_epoch():
    clean = captions(0.0)
    drawn = [texts(clean, epoch) for epoch in range(20)]
    for index in range(SIZE):
        assert {epoch[index] for epoch in drawn} == set(OWN[index])
    assert drawn[0] == texts(clean, 0) and drawn[0] != drawn[1]
    assert not any(caption.is_corrupted for caption in used(clean, 0))


def test_one_example_gets_what_it_gets_in_a_batch():
    for type in ("swap", "token", "shuffle"):
        made = captions(0.5, type, "random")
        again = captions(0.5, type, "random")
        together = [used(made, epoch) for epoch in EPOCHS]
        for epoch, index in itertools.product(EPOCHS, range(0, SIZE, 17)):
            assert again.use(index, epoch) == together[epoch][index]
    mixed = made.use_all(torch.tensor([3, 3, 5]), torch.tensor([0, 2, 1]))
    assert mixed == [together[0][3], together[2][3], together[1][5]]


# Swap


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_within_an_epoch_a_swap_loses_and_doubles_no_caption(mode):
    made, clean = captions(0.3, mode=mode), captions(0.0)
    for epoch in EPOCHS:
        assert Counter(texts(made, epoch)) == Counter(texts(clean, epoch))
        flags = [caption.is_corrupted for caption in used(made, epoch)]
        assert sum(flags) == 18
        moved = [a != b for a, b in zip(texts(made, epoch), texts(clean, epoch), strict=True)]
        assert moved == flags  # every caption is another's, so that none that moved is where it was


def test_fixed_swaps_stay_and_random_ones_do_not():
    def swapped(made, epoch):
        return [caption.is_corrupted for caption in used(made, epoch)]

    fixed, random = captions(mode="fixed"), captions(mode="random")
    assert swapped(fixed, 0) == swapped(fixed, 5)
    assert len({tuple(swapped(random, epoch)) for epoch in EPOCHS}) == len(EPOCHS)


def test_swaps_that_are_still_true_are_told():
    made = captions(1.0, labels=LABELS)
    for index, caption in enumerate(used(made, 0)):
        other = int(caption.text.split()[1])
        assert caption.is_corrupted and other != index
        assert caption.is_still_true == (LABELS[index] == LABELS[other])
    assert 0 < sum(caption.is_still_true for caption in used(made, 0)) < SIZE / 2
    same = captions(1.0, own=[["a dog"], ["a dog"]])
    assert used(same, 0) == [Caption("a dog", True, True, "a dog")] * 2
    assert not any(caption.is_still_true for caption in used(captions(1.0), 0))


# Words


def test_token_takes_words_of_other_captions():
    own = [["a dog runs fast"], ["two cats sleep"], ["red kites fly high"]] * 30
    made = captions(0.5, "token", own=own, token_ratio=0.4)
    words = {word for [text] in own for word in text.split()}
    seen = used(made, 0)
    assert seen == used(made, 3)
    for [text], caption in zip(own, seen, strict=True):
        assert caption.is_corrupted == (caption.text != text)
        assert set(caption.text.split()) <= words and len(caption.text.split()) == len(text.split())
        assert not caption.is_still_true
    assert 25 < sum(caption.is_corrupted for caption in seen) < 65
    foreign = [set(caption.text.split()) - set(text.split()) for [text], caption in zip(own, seen, strict=True)]
    assert sum(map(bool, foreign)) > 20  # some words are of a caption that says the same


def test_shuffled_captions_that_cannot_change_do_not_count():
    made = captions(1.0, "shuffle", own=[["red sea"], ["sea"], ["sea sea"]])
    assert used(made, 0) == [Caption("sea red", True, own="red sea"), Caption("sea"), Caption("sea sea")]


# Rewritten


def test_llm_takes_the_rewriting_of_the_caption_that_is_drawn():
    lists = [[f"new {text}" for text in own] for own in OWN]
    for rewritten in (lists, {text: f"new {text}" for own in OWN for text in own}):
        made = captions(0.4, "llm", rewritten=rewritten)
        for epoch in EPOCHS:
            clean = texts(captions(0.0), epoch)
            for own, caption in zip(clean, used(made, epoch), strict=True):
                assert caption == (Caption(f"new {own}", True, own=own) if caption.is_corrupted else Caption(own))
        assert 10 < sum(caption.is_corrupted for caption in used(made, 0)) < 40


def test_a_rewriting_that_changes_nothing_does_not_count():
    own = [["a dog"], ["a cat"]]
    assert used(captions(1.0, "llm", own=own, rewritten=[["a dog"], ["a kite"]]), 0) == [
        Caption("a dog"),
        Caption("a kite", True, own="a cat"),
    ]


def test_chosen_captions_without_a_rewriting_are_named():
    made = captions(0.4, "llm", rewritten={})
    chosen = made.texts_to_rewrite()
    with pytest.raises(InputError) as caught:
        made.require_rewritings("--rewritten_captions file", lambda index: f"image {index}")
    assert f"{len(chosen)} captions" in str(caught.value) and repr(chosen[0]) in str(caught.value)
    assert f"of image {chosen[0].split()[1]};" in str(caught.value)
    captions(0.4, "llm", rewritten=dict.fromkeys(chosen, "x")).require_rewritings("", str)
    captions(0.0, "llm", rewritten={}).require_rewritings("", str)


def test_only_the_chosen_captions_are_to_be_rewritten():
    fixed = captions(0.4, "llm")
    index = torch.arange(SIZE)
    chosen = index[fixed.corruption.chosen(index)].tolist()
    assert fixed.texts_to_rewrite() == [text for index in chosen for text in OWN[index]]
    assert captions(0.4, "llm", "random").texts_to_rewrite() == [text for own in OWN for text in own]
    assert captions(0.0, "llm").texts_to_rewrite() == captions(0.4, "swap").texts_to_rewrite() == []


# All texts


@pytest.mark.parametrize(
    ("type", "mode"),
    [
        ("swap", "fixed"),
        ("swap", "random"),
        ("token", "fixed"),
        ("shuffle", "fixed"),
        ("llm", "fixed"),
        ("llm", "random"),
    ],
)
def test_all_texts_are_those_that_come_up(type, mode):
    rewritten = [[f"new {text}" for text in own] for own in OWN] if type == "llm" else None
    made = captions(0.4, type, mode, rewritten=rewritten)
    everything = made.all_texts()
    assert len(set(everything)) == len(everything)
    assert set(everything) == {text for epoch in range(14 if type == "token" else 30) for text in texts(made, epoch)}


@pytest.mark.parametrize("type", ["swap", "token", "shuffle", "llm"])
def test_a_corrupted_caption_knows_the_example_s_own(type):
    rewritten = [[f"new {text}" for text in own] for own in OWN] if type == "llm" else None
    made = captions(0.4, type, rewritten=rewritten)
    everything = set(made.all_texts(with_true=True))
    for epoch in range(30):
        seen = used(made, epoch)
        assert [caption.true_text for caption in seen] == texts(captions(0.0), epoch)
        assert all((caption.own is not None) == caption.is_corrupted for caption in seen)
        assert everything >= {text for caption in seen for text in (caption.text, caption.true_text)}
    assert everything == {text for own in OWN for text in own} | set(made.all_texts())


@pytest.mark.parametrize("type", ["token", "shuffle"])
def test_words_drawn_anew_have_no_end(type):
    with pytest.raises(InputError, match="--corruption_mode fixed"):
        captions(0.4, type, "random").all_texts()
    assert captions(0.0, type, "random").all_texts()


def test_the_fingerprint_tells_captions_and_rewritings_apart():
    shifted = [OWN[0] + OWN[1][:1], OWN[1][1:], *OWN[2:]]  # the same texts, of other examples
    made = [
        captions(),
        captions(own=OWN[::-1]),
        captions(own=shifted),
        captions(type="llm", rewritten={"text 1": "x"}),
        captions(type="llm", rewritten={"text 1": "y"}),
    ]
    assert len({each.fingerprint for each in made}) == len(made)
    assert captions().fingerprint == captions(0.7, "token").fingerprint


# Sources


@pytest.fixture
def folder(tmp_path):
    """A folder of ten images with a metadata.jsonl; the fourth and the eighth have no caption."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    with (tmp_path / "images" / "metadata.jsonl").open("w") as file:
        for number in range(10):
            name = f"deep/{number}.png" if number % 2 else f"{number}.png"
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / name)
            text = {3: "  ", 7: None}.get(number, f"picture {number}")
            kind = "odd" if number % 2 else "even"
            file.write(json.dumps({"file_name": name, "text": text, "kind": kind, "new": f"new {number}"}) + "\n")
    return tmp_path / "images"


def shown(data, epochs: int = 1, **accelerator) -> list[dict]:
    """The examples of the first epochs: red value, text, flags, label."""
    args = arguments(dataset_name="digits", train_batch_size=2)
    batches = open_batches(args, data, alone(**accelerator), encode=encode)
    seen = []
    for batch in itertools.islice(batches.starting_at(0), epochs * len(data.images) // batches.global_batch_size):
        reds = ((batch["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        rows = zip(reds, decode(batch["input_ids"]), batch["caption_flags"].tolist(), batch["class_labels"].tolist(),
                   batch["index"].tolist(), batch["position"].tolist(), strict=True)  # fmt: skip
        seen += [dict(zip(("red", "text", "flags", "label", "index", "position"), row, strict=True)) for row in rows]
    return seen


def test_a_folder_with_metadata_gives_its_captions(folder, caplog):
    with caplog.at_level(logging.WARNING):
        data = open_training_data(arguments(train_data_dir=folder))
    assert len(data.images) == 8 and data.source.class_names == []
    for row in shown(data):
        assert row["text"] == f"picture {row['red']}" and row["flags"] == [0, 0] and row["label"] == 0
    [warning] = [record.getMessage() for record in caplog.records]
    assert "2 of 10 examples have no caption" in warning and "3.png" in warning and "7.png" in warning
    assert len(data.bad_images.names) == 2


def test_labels_tell_which_swaps_are_true(folder):
    data = open_training_data(
        arguments(train_data_dir=folder, label_column="kind", corruption_ratio=1.0, corruption_mode="random")
    )
    assert data.source.class_names == ["even", "odd"]
    rows = shown(data, epochs=4)
    for row in rows:
        other = int(row["text"].split()[1])
        assert other != row["red"] and row["flags"] == [1, int(other % 2 == row["red"] % 2)]
        assert row["label"] == row["red"] % 2
    assert 0 < sum(row["flags"][1] for row in rows) < len(rows)


def test_two_processes_give_what_one_gives(folder):
    args = arguments(train_data_dir=folder, corruption_ratio=0.5)
    whole = shown(open_training_data(args), epochs=3)
    assert sum(row["flags"][0] for row in whole) == 3 * 4
    parts = [shown(open_training_data(args), 3, processes=2, process=process) for process in (0, 1)]

    def by_index(rows):
        return Counter((row["index"], row["text"], *row["flags"]) for row in rows)

    assert by_index(whole) == by_index(parts[0] + parts[1])


def test_too_many_without_a_caption_are_refused_in_one_sentence(folder):
    with pytest.raises(InputError) as caught:
        open_training_data(arguments(train_data_dir=folder, max_bad_images=1))
    assert "2 of 10 examples have no caption in the column text" in str(caught.value)
    assert "--max_bad_images allows 1" in str(caught.value) and "3.png" in str(caught.value)


def test_rewritings_come_from_a_column(folder):
    args = arguments(
        train_data_dir=folder, corruption_type="llm", rewritten_caption_column="new", corruption_ratio=0.5
    )
    rows = shown(open_training_data(args), epochs=2)
    assert {row["text"].split()[0] for row in rows} == {"picture", "new"}
    for row in rows:
        assert row["text"] == f"{'new' if row['flags'][0] else 'picture'} {row['red']}"


def test_rewritings_come_from_a_file(folder, tmp_path):
    file = tmp_path / "new.jsonl"
    lines = [{"caption": f"picture {number}", "rewritten": f"painting {number}"} for number in range(10)]
    file.write_text("\n".join(map(json.dumps, lines)))
    wanted = {"train_data_dir": folder, "corruption_type": "llm", "corruption_ratio": 1.0}
    data = open_training_data(arguments(**wanted, rewritten_captions=file))
    assert all(row["text"] == f"painting {row['red']}" and row["flags"] == [1, 0] for row in shown(data))
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(InputError, match=r"7 captions that are chosen .* 'picture 1' of .*1\.png"):
        open_training_data(arguments(**wanted, rewritten_captions=file))


def write_metadata(folder, rows) -> None:
    """An image and a line for each row, which JSON spells in ASCII."""
    for number, row in enumerate(rows):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        rows[number] = {"file_name": f"{number}.png"} | row
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_half_of_a_surrogate_pair_is_a_broken_caption(tmp_path, caplog):
    write_metadata(tmp_path, [{"text": "half \ud83d"}, {"text": "one"}, {"text": ["\ud83d", "two"]}, {"text": ""}])
    with caplog.at_level(logging.WARNING):
        data = open_training_data(arguments(train_data_dir=tmp_path))
    assert {(row["red"], row["text"]) for row in shown(data)} == {(1, "one"), (2, "two")}
    [warning] = [record.getMessage() for record in caplog.records]
    assert "2 of 4 examples have no caption in the column text (1 of them one that is no text in UTF-8)" in warning
    assert "0.png" in warning and any("0.png (its caption is no" in name for name in data.bad_images.names)
    with pytest.raises(InputError, match="--max_bad_images allows 1"):
        open_training_data(arguments(train_data_dir=tmp_path, max_bad_images=1))


def test_half_of_a_surrogate_pair_is_no_rewriting(tmp_path):
    write_metadata(tmp_path, [{"text": "one", "new": "\ud83d"}, {"text": "two", "new": "new"}])
    values = {"train_data_dir": tmp_path, "corruption_type": "llm", "corruption_ratio": 1.0}
    lines = [{"caption": "one", "rewritten": "\ud83d"}, {"caption": "two", "rewritten": "a"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"caption": "\ud83d", "rewritten": "a"}])))
    for ways in ({"rewritten_caption_column": "new"}, {"rewritten_captions": tmp_path / "new.jsonl"}):
        with pytest.raises(InputError, match="1 captions that are chosen .* have no rewriting, for example 'one'"):
            open_training_data(arguments(**values, **ways))


@pytest.mark.parametrize(("size", "ratio", "least"), [(32, 0.025, "0.0313"), (8, 0.1, "0.126"), (3, 0.33, "0.334")])
def test_a_ratio_that_rounds_to_no_pair_is_refused(size, ratio, least):
    values = {"dataset_name": "digits", "max_train_samples": size}
    with pytest.raises(InputError) as caught:
        open_training_data(arguments(**values, corruption_ratio=ratio))
    for words in (f"--corruption_ratio {ratio} corrupts none of {size} examples", f" {least} is the least ratio"):
        assert words in str(caught.value)
    made = open_training_data(arguments(**values, corruption_ratio=least)).captions
    assert sum(caption.is_corrupted for caption in used(made, 0)) == 2
    open_training_data(arguments(**values, corruption_ratio=ratio, corruption_type="shuffle"))


def test_a_single_example_cannot_be_swapped():
    with pytest.raises(InputError, match="--corruption_ratio 1.0 corrupts none of 1 examples: `swap` needs two"):
        open_training_data(arguments(dataset_name="digits", max_train_samples=1, corruption_ratio=1.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"caption_column": "test"}, "--caption_column test: the lines of"),
        ({"caption_column": "test"}, "did you mean 'text'"),
        ({"label_column": "kin"}, "--label_column kin"),
        ({"label_column": "text"}, "example 7 has no label"),
        (
            {"corruption_type": "llm", "rewritten_caption_column": "nwe"},
            "--rewritten_caption_column nwe",
        ),
    ],
)
def test_a_missing_key_is_named(folder, values, words):
    with pytest.raises(InputError) as caught:
        open_training_data(arguments(train_data_dir=folder, **values))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [("nonsense", "line 2 is no JSON"), ("[1]", "line 2 is no JSON object"), ('{"text": "a"}', "`file_name`")],
)
def test_a_damaged_line_is_named(tmp_path, line, words):
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "a"}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        MetadataFolder(str(tmp_path))
    assert words in str(caught.value) and "metadata.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "a\0.png"}, ["line 2", "'a\\x00.png'", "NUL"]),
        ({"file_name": "a\ud83d.png"}, ["line 2", "'a\\ud83d.png'", "no text in UTF-8"]),
        ({"file_name": "b.png", "kind": ["x", "y"]}, ["--label_column kind", "line 2", "['x', 'y']"]),
        ({"file_name": "b.png", "kind": "\ud83d"}, ["--label_column kind", "line 2", "'\\ud83d'"]),
        ({"file_name": "b.png", "kind": True}, ["--label_column kind", "line 2", "True"]),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, row, words):
    rows = [{"file_name": "a.png", "kind": "x"}, row]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        MetadataFolder(str(tmp_path), "kind")
    assert "metadata.jsonl" in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_lists_of_labels_of_unequal_length_are_refused():
    for values in ([["a"], ["a", "b"]], [["a"], ["b"]], [1.5, 2.5], [{"a": 1}]):
        with pytest.raises(InputError, match="--label_column kind: expected class labels .* not this"):
            _numbered("kind", values, "this")
    labels, names = _numbered("kind", [3, 10, 3], "this")
    assert labels.tolist() == [0, 1, 0] and names == ["3", "10"]


def test_a_folder_of_metadata_holds_no_column_it_was_not_asked_for(tmp_path):
    rows = [{"file_name": f"{n:05}.png", "text": f"caption {n}", "more": "x" * 1000} for n in range(2000)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    MetadataFolder(str(tmp_path))
    tracemalloc.start()
    try:
        source = MetadataFolder(str(tmp_path))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2000 * 100 and source.captions("text")[1999] == ["caption 1999"]
    assert source.name(7).endswith("00007.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(InputError, match="changed while it was read"):
        source.captions("text")


def test_a_folder_without_metadata_is_named(tmp_path):
    with pytest.raises(InputError, match="its metadata.jsonl, which holds the captions, cannot be read"):
        open_training_data(arguments(train_data_dir=tmp_path))


def test_a_caption_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 3}\n')
    with pytest.raises(InputError, match="--caption_column text: expected captions.*3, not text"):
        open_training_data(arguments(train_data_dir=tmp_path))


def test_a_value_that_is_no_text_is_named_by_its_type(tmp_path):
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(2)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": images, "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError) as caught:
        open_training_data(arguments(dataset_name=tmp_path / "saved", caption_column="image"))
    assert "its caption is of type dict, not text" in str(caught.value) and "PNG" not in str(caught.value)


def test_a_dataset_with_lists_of_captions(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))})
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(6)]
    own = [["one 0", "two 0"], ["one 1", ""], ["one 2"], ["", ""], [], ["one 5", "two 5", "three 5"]]
    rows = {"image": images, "texts": own}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    data = open_training_data(arguments(dataset_name=tmp_path / "saved", caption_column="texts"))
    assert len(data.images) == 4 and len(data.bad_images.names) == 2
    seen = shown(data, epochs=20)
    assert {row["text"] for row in seen} == {text for texts in own for text in texts if text}
    assert all(row["text"].endswith(f" {row['red']}") for row in seen)
    with pytest.raises(InputError, match="--caption_column text: the dataset .*did you mean 'texts'"):
        open_training_data(arguments(dataset_name=tmp_path / "saved"))


def test_what_datasets_reads_of_a_folder_is_the_same(folder):
    data = open_training_data(arguments(dataset_name=folder))
    assert len(data.images) == 8 and all(row["text"] == f"picture {row['red']}" for row in shown(data))


def test_digits_bring_captions_and_labels():
    data = open_training_data(arguments(dataset_name="digits", max_train_samples=12, corruption_ratio=1.0))
    assert data.captions.labels is not None and len(data.captions) == 12
    clean = Captions(Digits("train").captions("text")[:12], CaptionCorruption())
    assert set(data.captions.all_texts()) == set(clean.all_texts())
    assert len(open_training_data(arguments(dataset_name="digits", class_subset=3)).source.class_names) == 3


def test_a_resumed_run_must_share_captions_and_corruption(folder):
    def facts(**values) -> dict:
        return json.loads(json.dumps(open_training_data(arguments(train_data_dir=folder, **values)).facts))

    assert facts() == facts() and facts().keys() >= {"dataset", "examples", "captions", "caption_corruption"}
    assert facts()["captions"] != facts(caption_column="new")["captions"]
    assert facts()["caption_corruption"] != facts(corruption_ratio=0.5)["caption_corruption"]


@dataclass
class AutoencoderLike(DataArguments, LoopArguments):
    pass


def test_the_class_scripts_data_know_nothing_of_captions():
    data = open_training_data(AutoencoderLike(dataset_name="digits", resolution=8))
    assert data.captions is None and data.facts.keys() == {"dataset", "examples", "class_names"}
    assert data.images[(0, 0, 0)].keys().isdisjoint({"caption_flags", "input_ids"})


# With their images


def test_a_stand_in_brings_its_own_caption(folder):
    (folder / "4.png").write_bytes(b"nonsense")
    data = open_training_data(arguments(train_data_dir=folder))
    rows = shown(data, epochs=2)
    assert 4 not in {row["red"] for row in rows}
    assert all(row["text"] == f"picture {row['red']}" for row in rows)
    assert sum(row["red"] == 5 for row in rows) == 4  # in place of the fourth too


def test_cached_latents_have_the_captions_of_their_images(folder):
    data = open_training_data(arguments(train_data_dir=folder, corruption_ratio=0.5))
    size = len(data.images)
    memory = np.arange(size, dtype=np.float32).reshape(size, 1, 1, 1, 1)
    readable = np.arange(size) != 2
    cached = Captioned(CachedLatents(data.images, memory, readable), data.captions, encode)
    items = [(index, 1, place) for place, index in enumerate([5, 2, 0, 2])]
    batch = cached.__getitems__(items)
    assert batch["index"].tolist() == batch["moments"].flatten().tolist() == [5, 3, 0, 3]
    expected = [data.captions.use(index, 1) for index in (5, 3, 0, 3)]
    assert decode(batch["input_ids"]) == [caption.text for caption in expected]
    assert batch["caption_flags"].tolist() == [[int(flag) for flag in caption[1:3]] for caption in expected]
    one = cached[items[1]]
    for name, value in batch.items():
        assert torch.equal(torch.as_tensor(one[name]), value[1]), name


def test_one_example_and_a_batch_are_the_same(folder):
    data = open_training_data(arguments(train_data_dir=folder, corruption_ratio=0.5))
    dataset = Captioned(data.images, data.captions, encode)
    items = [(index, 0, index) for index in range(len(dataset))]
    batch = dataset.__getitems__(items)
    for item in items:
        for name, value in dataset[item].items():
            assert name == "bad_images" or torch.equal(torch.as_tensor(value), batch[name][item[0]]), name
    assert batch["bad_images"] == [] and batch["is_truncated"].dtype == torch.bool


def test_the_map_holds_true_and_corrupted_text(tmp_path):
    made = captions(0.5, own=[[f"caption {n}"] for n in range(20)])
    save_caption_map(made, tmp_path / "map.csv")
    rows = list(csv.DictReader((tmp_path / "map.csv").open()))
    assert [row["true"] for row in rows] == [f"caption {n}" for n in range(20)]
    assert [row["corrupted"] for row in rows] == texts(made, 0)
    assert sum(row["true"] != row["corrupted"] for row in rows) == 10


def test_true_captions_come_beside_the_corrupted_ones(folder):
    data, clean = (
        open_training_data(arguments(train_data_dir=folder, corruption_ratio=ratio)) for ratio in (1.0, 0.0)
    )
    items = [(index, 1, index) for index in range(len(data.images))]
    both = Captioned(data.images, data.captions, encode, with_true=True)
    batch, own = both.__getitems__(items), Captioned(clean.images, clean.captions, encode).__getitems__(items)
    assert torch.equal(batch["true_input_ids"], own["input_ids"]) and "true_is_truncated" not in batch
    assert not torch.equal(batch["input_ids"], own["input_ids"])
    assert torch.equal(both[items[1]]["true_input_ids"], own["input_ids"][1])
    assert "true_input_ids" not in own
