"""Captions of streams: corrupted within windows of a shard, the same on any number of processes and after a resume;
what is broken or has no caption is passed over and named."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from captioned import arguments, decode, encode
from PIL import Image
from shards import captioned, png, write_captioned_shards, write_class_names, write_one

from noisycond.captions import Caption, CaptionCorruption, window_partners
from noisycond.data.captions import StreamCaptions
from noisycond.data.opening import open_batches, open_training_data
from noisycond.data.sources import Digits
from noisycond.data.stream_batches import Cursor, Lane
from noisycond.data.streams import Broken, RawExample, StreamSource
from noisycond.errors import InputError


SIZES = (25, 7, 12, 1)


class Told(StreamSource):
    """Shards of so many examples without images, whose captions say which they are.

    Args:
        sizes: of the shards. silent: (shard, place) of examples of no use. lists: of two captions each.
    """

    class_names: list[str] = []
    has_ids = False
    fingerprint = ""

    def __init__(self, sizes=SIZES, silent=(), lists=False):
        self.sizes, self.silent, self.lists = sizes, set(silent), lists
        self.shards = [f"{number}.tar" for number in range(len(sizes))]

    def read(self, shard):
        for place in range(self.sizes[shard]):
            text = f"shard {shard} place {place}"
            captions = (text, f"again {text}") if self.lists else (text,)
            raw = RawExample(text, None, None, None, None, captions, tuple(f"new {text}" for text in captions))
            yield replace(raw, problem="silence", captions=()) if (shard, place) in self.silent else raw
        yield Broken(f"end of {shard}")


def told(type="swap", ratio=0.5, mode="fixed", window=10, source=None, **options) -> Told:
    source = source or Told()
    source.captioning = StreamCaptions(CaptionCorruption(ratio, type, mode, **options), window)
    return source


def examples(source, shard=0, epoch=0) -> list[RawExample]:
    return [item for item in source.examples(shard, epoch) if isinstance(item, RawExample)]


def captions(source, shard=0, epoch=0) -> list[Caption]:
    return [raw.caption for raw in examples(source, shard, epoch)]


# Windows


def test_captions_are_swapped_within_windows_of_a_shard():
    made = captions(told())
    for number, first in enumerate((0, 10, 20)):
        size = min(10, 25 - first)
        partners = window_partners(size, 0.5, 0, "0.tar", number).tolist()
        for place, partner in enumerate(partners):
            text = f"shard 0 place {first + partner}"
            own = f"shard 0 place {first + place}"
            is_swapped = partner != place
            assert made[first + place] == Caption(text, is_swapped, False, own if is_swapped else None)
    assert Counter(caption.text for caption in made) == Counter(raw.captions[0] for raw in examples(Told()))
    assert 8 <= sum(caption.is_corrupted for caption in made) <= 14


def test_what_is_broken_stays_in_its_place_and_keeps_out_of_swaps():
    silent = [(0, 3), (0, 4), (0, 20)]
    items = list(told(ratio=1.0, source=Told(silent=silent)).examples(0, 0))
    assert isinstance(items[-1], Broken) and len(items) == 26
    for place in (3, 4, 20):
        assert items[place].problem == "silence" and items[place].caption is None
    sound = [raw for raw in items[:-1] if raw.problem is None]
    assert [raw.name for raw in sound] == [f"shard 0 place {n}" for n in range(25) if (0, n) not in silent]
    assert Counter(raw.caption.text for raw in sound) == Counter(raw.name for raw in sound)
    assert all(raw.caption.is_corrupted for raw in sound[:8])


@pytest.mark.parametrize("type", ["swap", "token", "shuffle", "llm"])
@pytest.mark.parametrize("lists", [False, True])
def test_fixed_knows_no_epoch_and_random_does(type, lists):
    def flags(mode, epoch):
        return [
            caption.is_corrupted for caption in captions(told(type, mode=mode, source=Told(lists=lists)), 0, epoch)
        ]

    assert flags("fixed", 0) == flags("fixed", 3)
    assert flags("random", 0) != flags("random", 3)
    assert flags("random", 3) == flags("random", 3)
    assert 0 < sum(flags("fixed", 0)) < 25


def test_shards_are_corrupted_each_in_its_own_way():
    source = told(source=Told((20, 20)))
    assert [c.is_corrupted for c in captions(source, 0)] != [c.is_corrupted for c in captions(source, 1)]


def test_windows_of_a_shard_are_corrupted_each_in_its_own_way():
    flags = [caption.is_corrupted for caption in captions(told("token", window=8, source=Told((40,))))]
    assert len({tuple(flags[first : first + 8]) for first in range(0, 40, 8)}) == 5


def test_of_several_captions_one_is_drawn_anew_every_epoch():
    drawn = [[c.text for c in captions(told(ratio=0.0, source=Told(lists=True)), 0, epoch)] for epoch in range(12)]
    for place in range(25):
        text = f"shard 0 place {place}"
        assert {epoch[place] for epoch in drawn} == {text, f"again {text}"}


def test_words_come_from_the_window():
    made = captions(told("token", ratio=1.0, token_ratio=1.0, window=2))
    for place, caption in enumerate(made[:24]):
        own, other = place, place + 1 if place % 2 == 0 else place - 1
        assert caption.is_corrupted
        words = set(caption.text.split())
        assert words <= {"shard", "place", "0", str(other)} and str(own) not in words - {"0"}
    assert made[24] == Caption("shard 0 place 24")  # alone in its window
    dropped = captions(told("token", ratio=1.0, token_operation="drop"))
    assert all(len(caption.text.split()) < 4 for caption in dropped)


def test_llm_takes_the_rewriting_beside_the_caption_or_of_its_text():
    for caption, raw in zip(captions(told("llm")), examples(Told()), strict=True):
        assert caption.text == (f"new {raw.name}" if caption.is_corrupted else raw.name)
    source = told("llm", ratio=1.0)
    source.captioning.rewritten = {"shard 0 place 3": "painting"}
    source.captioning.where = "in FILE"
    seen = examples(source)
    assert seen[3].caption == Caption("painting", True, own="shard 0 place 3")
    assert (
        seen[4].caption is None and seen[4].problem == "its caption is to be corrupted, but has no rewriting in FILE"
    )


# Lanes


def lane_texts(source, start=Cursor(), block=4, number=0, count=1, epochs=2) -> list[tuple]:  # noqa: B008
    """What the process's blocks hold: (epoch, name, caption)."""
    seen = []
    for block_ in Lane(source, 0, block, number, count).blocks(start):
        if block_.start.epoch >= epochs:
            return seen
        seen += [(block_.start.epoch, raw.name, raw.caption) for raw in block_.examples]


@pytest.mark.parametrize("type", ["swap", "token"])
@pytest.mark.parametrize("mode", ["fixed", "random"])
@pytest.mark.parametrize("count", [3, 6])
def test_any_number_of_processes_sees_the_same_captions(type, mode, count):
    def source():
        return told(type, mode=mode)

    one = lane_texts(source())
    many = [row for number in range(count) for row in lane_texts(source(), number=number, count=count)]
    assert Counter(one) == Counter(many)
    assert 20 < sum(caption.is_corrupted for _, _, caption in one) < 70
    epochs = [{name: caption for epoch, name, caption in one if epoch == number} for number in (0, 1)]
    assert (epochs[0] == epochs[1]) == (mode == "fixed")


def test_a_lane_taken_up_in_a_window_sees_the_same_captions():
    whole = {(epoch, name): caption for epoch, name, caption in lane_texts(told(mode="random"))}
    shard = Lane(told(), 0, 4).shards_of(1).index(0)
    rest = lane_texts(told(mode="random"), Cursor(1, shard, 13))
    assert len(rest) >= 12 and all(whole[epoch, name] == caption for epoch, name, caption in rest)


# Shards and what `datasets` streams


def batches_of(args, processes=1, process=0, **options):
    data = open_training_data(args)
    alone = SimpleNamespace(num_processes=processes, process_index=process)
    return data, open_batches(args, data, alone, encode=encode, **options)


def rows_of(args, count) -> list[tuple[str, list[int], int]]:
    _, batches = batches_of(args)
    rows = []
    for batch in itertools.islice(batches.starting_at(0), count):
        flags, labels = batch["caption_flags"].tolist(), batch["class_labels"].tolist()
        rows += list(zip(decode(batch["input_ids"]), flags, labels, strict=True))
    return rows


@pytest.fixture
def shards(tmp_path):
    """Four shards of captioned digits; the third is cut short, the last holds a broken image, one without a caption,
    one with a blank one, one whose caption is no text, and a good one."""
    paths = write_captioned_shards(tmp_path, [12, 8, 30])
    paths[2].write_bytes(paths[2].read_bytes()[: paths[2].stat().st_size // 2])
    good = captioned(Digits("train"), 60)
    bad = [good | {"png": b"nonsense"}, {"png": png(1)}, good | {"txt": b" \n"}, good | {"txt": b"\xff\xfe"}]
    write_one(tmp_path / "00003.tar", [*bad, good])
    write_class_names(tmp_path / "names.txt")
    return tmp_path


def stream_arguments(shards, **values):
    flags = {"train_shards": shards / "{00000..00003}.tar", "shuffle_buffer_size": 6, "max_train_steps": 9}
    return arguments(**flags | values)


def test_true_captions_come_beside_the_corrupted_ones(shards):
    def first(ratio, **options) -> list[dict]:
        _, batches = batches_of(stream_arguments(shards, corruption_ratio=ratio), **options)
        return list(itertools.islice(batches.starting_at(0), 5))

    changed = 0
    for both, own in zip(first(1.0, with_true_captions=True), first(0.0), strict=True):
        assert torch.equal(both["index"], own["index"]) and "true_input_ids" not in own
        assert torch.equal(both["true_input_ids"], own["input_ids"]) and "true_is_truncated" not in both
        changed += (both["input_ids"] != own["input_ids"]).any(dim=1).sum()
    assert changed > 15


def test_a_run_goes_on_past_what_is_broken_and_names_it(shards):
    data, batches = batches_of(stream_arguments(shards, corruption_ratio=0.5))
    bad, texts = [], set()
    for batch in itertools.islice(batches.starting_at(0), 20):
        bad += batch["bad_images"]
        texts.update(decode(batch["input_ids"]))
        assert batch["caption_flags"].shape == (4, 2) and batch["is_truncated"].dtype == torch.bool
        assert batch["class_labels"].tolist() == [0] * 4
    bad = " | ".join(sorted(set(bad)))
    assert "the shard 00002.tar after" in bad and "00003.tar/0000 (" in bad
    assert "00003.tar/0001 (its caption is empty or missing: its files are png)" in bad
    assert "00003.tar/0002 (its caption is empty or missing: its files are json, png, txt)" in bad
    assert "00003.tar/0003 (its caption is no text in UTF-8)" in bad
    numbers = {int(text.split()[-1]) for text in texts}
    assert numbers >= {*range(20), 60} and len(numbers) > 25


@pytest.mark.parametrize("column", ["text", "txt", "caption"])
def test_captions_of_shards_are_files_or_fields(tmp_path, column):
    write_captioned_shards(tmp_path, [8])
    rows = rows_of(stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", caption_column=column), 2)
    labels = Digits("train").labels
    assert sorted(text for text, _, _ in rows) == sorted(f"digit {labels[n]}, number {n}" for n in range(8))
    assert all(flags == [0, 0] for _, flags, _ in rows)


def test_labels_tell_which_swaps_are_true(tmp_path):
    write_captioned_shards(tmp_path, [40])
    args = stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", label_column="label",
                            class_names=write_class_names(tmp_path / "names.txt"), corruption_ratio=1.0,
                            shuffle_buffer_size=20)  # fmt: skip
    rows = rows_of(args, 10)
    for text, flags, label in rows:
        assert flags == [1, int(text.startswith(f"digit {label},"))]
    assert 0 < sum(flags[1] for _, flags, _ in rows) < 20


def test_rewritings_of_shards_are_fields(tmp_path):
    write_captioned_shards(tmp_path, [8])
    args = stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", corruption_type="llm",
                            rewritten_caption_column="new", corruption_ratio=0.5)  # fmt: skip
    rows = rows_of(args, 2)
    assert {(text.split()[0], *flags) for text, flags, _ in rows} == {("rewritten", 1, 0), ("digit", 0, 0)}


def test_a_resumed_stream_goes_on_with_the_same_captions(shards):
    args = stream_arguments(shards, corruption_ratio=0.5, corruption_mode="random")
    _, straight = batches_of(args)
    expected = list(itertools.islice(straight.starting_at(0), 12))
    _, first = batches_of(args)
    list(itertools.islice(first.starting_at(0), 5))
    _, second = batches_of(args)
    second.cursor = first.cursor
    for batch, other in zip(second.starting_at(5), expected[5:], strict=False):
        assert decode(batch["input_ids"]) == decode(other["input_ids"])
        assert torch.equal(batch["caption_flags"], other["caption_flags"])


def test_workers_change_nothing(tmp_path):
    write_captioned_shards(tmp_path, [20])
    flags = {"train_shards": tmp_path / "00000.tar", "corruption_ratio": 0.5, "corruption_type": "token"}
    alone, helped = (rows_of(stream_arguments(tmp_path, **flags, dataloader_num_workers=n), 5) for n in (0, 1))
    assert alone == helped


@pytest.mark.parametrize("workers", [0, 1])
def test_half_of_a_surrogate_pair_is_a_broken_caption(tmp_path, workers):
    good = captioned(Digits("train"), 1)
    half = {"png": good["png"], "json": json.dumps({"text": "half \ud83d", "cls": "\ud83d"}).encode()}
    write_one(tmp_path / "00000.tar", [half, *[good] * 4])
    args = stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", dataloader_num_workers=workers)
    _, batches = batches_of(args)
    found = list(itertools.islice(batches.starting_at(0), 2))
    assert "00000.tar/0000 (its caption is no text in UTF-8)" in [
        name for each in found for name in each["bad_images"]
    ]
    assert all("half" not in text for each in found for text in decode(each["input_ids"]))


@pytest.mark.parametrize("option", ["caption_column", "rewritten_caption_column"])
def test_a_column_that_shards_do_not_have_is_named(tmp_path, option):
    write_captioned_shards(tmp_path, [3, 3])
    values = {"corruption_type": "llm", "corruption_ratio": 0.5, "rewritten_caption_column": "new"}
    args = stream_arguments(tmp_path, train_shards=tmp_path / "{00000..00001}.tar", **values | {option: "captoin"})
    with pytest.raises(InputError) as caught:
        open_training_data(args)
    for words in (f"--{option} captoin: none of the first 6 examples", "png, txt", "new", "did you mean 'caption'"):
        assert words in str(caught.value), caught.value


def test_a_column_of_a_later_example_will_do(tmp_path):
    write_one(tmp_path / "00000.tar", [{"png": png(0)}] * 5)
    write_one(tmp_path / "00001.tar", [{"png": png(0)}] * 5 + [captioned(Digits("train"), 1)])
    data = open_training_data(stream_arguments(tmp_path, train_shards=tmp_path / "{00000..00001}.tar"))
    assert len(data.source.shards) == 2


def test_too_many_without_a_caption_end_the_run(tmp_path):
    write_one(tmp_path / "00000.tar", [{"png": png(0)}] * 5 + [captioned(Digits("train"), 1)] * 5)
    args = stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", max_bad_images=2)
    with pytest.raises(InputError, match="more than --max_bad_images 2: .*its caption is empty or missing"):
        rows_of(args, 3)


@pytest.fixture
def folder(tmp_path):
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for number in range(12):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
            text = "" if number == 5 else f"picture {number}"
            file.write(json.dumps({"file_name": f"{number}.png", "text": text, "new": f"new {number}"}) + "\n")
    return tmp_path


def test_what_datasets_streams_has_captions(folder):
    flags = {"dataset_name": folder, "streaming": "yes", "max_train_steps": 3, "shuffle_buffer_size": 6}
    args = arguments(**flags, corruption_ratio=0.5, corruption_type="llm", rewritten_caption_column="new")
    data, batches = batches_of(args)
    assert data.source.class_names == []
    bad, seen = [], set()
    for batch in itertools.islice(batches.starting_at(0), 6):
        bad += batch["bad_images"]
        reds = ((batch["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        for red, text, (corrupted, _) in zip(
            reds, decode(batch["input_ids"]), batch["caption_flags"].tolist(), strict=True
        ):
            assert text == f"{'new' if corrupted else 'picture'} {red}"
            seen.add(red)
    assert seen == set(range(12)) - {5} and "its caption is empty or missing" in bad[0]
    with pytest.raises(InputError, match="--caption_column txt: .*did you mean 'text'"):
        open_training_data(arguments(**flags, caption_column="txt"))


def test_a_streamed_list_of_captions(tmp_path):
    own = [["one 0", "two 0"], ["one 1", None], ["one 2"], []]
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(4)]
    features = datasets.Features({"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))})
    made = datasets.Dataset.from_dict({"image": images, "texts": own}, features=features)
    made.to_parquet(str(tmp_path / "data.parquet"))
    args = arguments(dataset_name=tmp_path, streaming="yes", max_train_steps=3, caption_column="texts")
    rows = rows_of(args, 12)
    assert {text for text, _, _ in rows} == {"one 0", "two 0", "one 1", "one 2"}


def test_facts_tell_windows_and_captions_apart(tmp_path):
    write_captioned_shards(tmp_path, [4])

    def facts(**values) -> dict:
        args = stream_arguments(tmp_path, train_shards=tmp_path / "00000.tar", **values)
        return json.loads(json.dumps(open_training_data(args).facts))

    assert facts() == facts()
    assert facts()["captions"] != facts(shuffle_buffer_size=7)["captions"]
    assert facts()["dataset"] != facts(caption_column="new")["dataset"]
    assert facts()["caption_corruption"] != facts(corruption_ratio=0.1)["caption_corruption"]
