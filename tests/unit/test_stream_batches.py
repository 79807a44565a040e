"""Batches of a stream: full, in an order that one can take up anywhere, dealt to processes, with what cannot be read
left out and named."""

import io
import itertools
import logging
import threading
from collections import Counter

import pytest
import torch
from PIL import Image

from noisycond.data.images import Transform
from noisycond.data.stream_batches import Cursor, Lane, StreamBatches, StreamedImages, one_ahead
from noisycond.data.streams import Broken, RawExample, StreamSource, stable_key
from noisycond.errors import InputError


class Shards(StreamSource):
    """Shards of so many examples, whose labels say which they are: 100 · shard + place.

    Args:
        sizes: of the shards. bad: labels of examples whose image is broken. cut: shards that end with a break.
    """

    def __init__(self, sizes, bad=(), cut=()):
        self.sizes, self.bad, self.cut = sizes, set(bad), set(cut)
        self.shards = [f"{number}.tar" for number in range(len(sizes))]
        self.class_names = [str(number) for number in range(100 * len(sizes))]
        self.has_ids = True

    def read(self, shard):
        for place in range(self.sizes[shard]):
            label = 100 * shard + place
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (place, shard, 0)).save(file, "PNG")
            content = b"nonsense" if label in self.bad else file.getvalue()
            yield RawExample(f"{shard}/{place}", f"{shard}/{place}", content, label)
        if shard in self.cut:
            yield Broken(f"the shard {shard}.tar after {self.sizes[shard]} examples")


def batches_of(source, batch_size=4, block=5, **options) -> StreamBatches:
    return StreamBatches(StreamedImages(source, Transform(8)), batch_size, shuffle_buffer_size=block, **options)


def take(batches: StreamBatches, count: int) -> list[dict]:
    return list(itertools.islice(batches.starting_at(0), count))


def labels(taken: list[dict]) -> list[int]:
    return [label for batch in taken for label in batch["class_labels"].tolist()]


def everything(source) -> set[int]:
    return {100 * shard + place for shard, size in enumerate(source.sizes) for place in range(size)}


def test_every_epoch_holds_every_example_once_in_a_fresh_order():
    source = Shards([7, 5, 8])
    taken = take(batches_of(source), 15)
    epochs = [labels(taken)[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(everything(source)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(batch["index"]) == 4 and batch["index"].dtype == torch.int64 for batch in taken)
    assert [batch["epoch"].unique().tolist() for batch in taken] == [[0]] * 5 + [[1]] * 5 + [[2]] * 5
    orders = [list(dict.fromkeys(label // 100 for label in epoch)) for epoch in epochs]
    assert len({tuple(order) for order in orders}) > 1  # the shards' order is fresh too


def test_blocks_are_shuffled_within_and_run_across_shards():
    lane = Lane(Shards([7, 5, 8]), 0, 5)
    blocks = list(itertools.islice(lane.blocks(Cursor()), 4))
    straight = [raw.label for shard in lane.shards_of(0) for raw in lane.source.read(shard)]
    for number, block in enumerate(blocks):
        found = [raw.label for raw in block.examples]
        assert sorted(found) == sorted(straight[5 * number : 5 * number + 5])
    assert [raw.label for block in blocks for raw in block.examples] != straight
    unshuffled = list(itertools.islice(Lane(Shards([7, 5, 8]), 0, 1).blocks(Cursor()), 20))
    assert [raw.label for block in unshuffled for raw in block.examples] == straight


def test_shuffling_is_uniform_within_a_block():
    first = Counter()
    lane = Lane(Shards([4]), 0, 4)
    for block in itertools.islice(lane.blocks(Cursor()), 2000):
        first[block.examples[0].label] += 1
    assert all(abs(count - 500) < 80 for count in first.values()) and len(first) == 4


def test_the_seed_changes_the_order():
    orders = {tuple(labels(take(batches_of(Shards([9, 9]), seed=seed), 4))) for seed in (0, 1, 2)}
    assert len(orders) == 3


def test_positions_and_epochs_key_the_draws_as_for_other_data():
    taken = take(batches_of(Shards([20]), 2, accumulation_steps=2, num_processes=2, process_index=1), 4)
    assert [batch["position"].tolist() for batch in taken] == [[2, 3], [6, 7]] * 2
    assert batches_of(Shards([20]), 2, accumulation_steps=2, num_processes=2).global_batch_size == 8


def test_the_index_is_the_key_of_the_stable_id():
    for batch in take(batches_of(Shards([5, 5])), 5):
        for index, label in zip(batch["index"].tolist(), batch["class_labels"].tolist(), strict=True):
            assert index == stable_key(f"{label // 100}/{label % 100}")


@pytest.mark.parametrize("sizes", [[7, 5, 8, 4], [13], [6, 6]])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch_without_overlap(sizes, processes):
    source = Shards(sizes)
    shares = []
    for process in range(processes):
        lane = Lane(source, 0, 3, process, processes)
        share = [
            raw.label
            for block in itertools.takewhile(lambda block: block.start.epoch == 0, lane.blocks(Cursor()))
            for raw in block.examples
        ]
        assert share
        shares += share
    assert sorted(shares) == sorted(everything(source))


def test_fewer_shards_than_processes_are_announced(caplog):
    with caplog.at_level(logging.WARNING):
        batches_of(Shards([9]), num_processes=2)
    assert "fewer shards (1) than processes (2)" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_goes_on_from_its_cursor(workers, processes):
    source = Shards([7, 5, 8, 6, 3], bad=[3, 101, 300], cut=[1])
    for process in range(processes):
        options = {"num_processes": processes, "process_index": process}
        straight = take(batches_of(source, 3, 4, **options), 24)
        for cut in range(0, 20, 3):
            first = batches_of(source, 3, 4, **options, num_workers=workers if cut == 9 else 0)
            stream = first.starting_at(0)
            begun = [next(stream) for _ in range(cut)]
            state = [list(first.cursor)] * processes
            second = batches_of(source, 3, 4, **options, num_workers=workers if cut == 6 else 0)
            second.load_state(state)
            rest = list(itertools.islice(second.starting_at(cut), 24 - cut))
            for mine, theirs in zip(straight, begun + rest, strict=True):
                for name in ("index", "epoch", "class_labels", "pixel_values", "position"):
                    assert torch.equal(mine[name], theirs[name])


def test_the_place_is_logged(caplog):
    batches = batches_of(Shards([7, 5]), 3, 4)
    with caplog.at_level(logging.INFO):
        batches.load_state([[1, 1, 2, 3]])
    shard = batches.lane.shards_of(1)[1]
    assert f"in epoch 1 at shard {shard}.tar, example 3 of the shuffle block from example 2 on" in caplog.text


def test_another_number_of_processes_goes_on_with_the_next_epoch(caplog):
    batches = batches_of(Shards([7, 5]), 3, 4)
    with caplog.at_level(logging.WARNING):
        batches.load_state([[1, 0, 2, 1], [2, 0, 0, 3]])
    assert batches.cursor == Cursor(3) and "the rest of epoch 2 is passed over" in caplog.text
    assert next(batches.starting_at(0))["epoch"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_left_out_and_named(workers):
    source = Shards([7, 5, 8], bad=[2, 203, 204], cut=[1])
    taken = take(batches_of(source, num_workers=workers), 17)
    assert all(len(batch["index"]) == 4 and batch["pixel_values"].shape == (4, 3, 8, 8) for batch in taken)
    found = labels(taken)
    good = everything(source) - source.bad
    assert [set(found[start : start + 17]) for start in (0, 17, 34, 51)] == [good] * 4
    names = Counter(name for batch in taken for name in batch["bad_images"])
    assert {name.split(" (")[0] for name in names} == {
        "0/2", "2/3", "2/4", "the shard 1.tar after 5 examples",
    }  # fmt: skip
    assert set(names.values()) <= {3, 4, 5}  # once in every epoch, in the same words


def test_a_whole_batch_of_broken_images():
    source = Shards([12], bad=range(8))
    taken = take(batches_of(source, 2, 1), 4)
    assert sorted(labels(taken)) == [8, 8, 9, 9, 10, 10, 11, 11]
    assert sum(len(batch["bad_images"]) for batch in taken) >= 8


def test_a_stream_of_broken_images_only():
    with pytest.raises(InputError, match="no example of the stream can be read") as caught:
        take(batches_of(Shards([5, 5], bad=[*range(5), *range(100, 105)])), 1)
    assert "cannot identify image file)" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_examples(workers):
    with pytest.raises(InputError, match="finds no example") as caught:
        take(batches_of(Shards([0, 0], cut=[1]), num_workers=workers), 1)
    assert "1.tar after 0 examples" in str(caught.value)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("broken", [{"cut": [0]}, {"bad": range(4)}])
def test_a_process_whose_share_is_broken_goes_on_with_the_next(process, broken):
    source = Shards([0 if "cut" in broken else 4, 4], **broken)
    batches = batches_of(source, num_processes=2, process_index=process, max_bad_images=4)
    taken = take(batches, 3)
    assert all(sorted(batch["class_labels"].tolist()) == [100, 101, 102, 103] for batch in taken)
    names = {name.split(" (")[0] for batch in taken for name in batch["bad_images"]}
    expected = {"the shard 0.tar after 0 examples"} if "cut" in broken else {f"0/{place}" for place in range(4)}
    assert names in ([expected] if batches.lane.shards_of(0) == [0] else [expected, set()])


def test_a_share_without_examples_is_empty_for_ever_where_processes_share_shards():
    with pytest.raises(InputError, match="process 1 finds no example"):
        take(batches_of(Shards([1]), num_processes=2, process_index=1), 1)


def test_too_much_that_cannot_be_read_ends_the_run_before_a_batch_is_full():
    with pytest.raises(InputError, match="--max_bad_images 3"):
        take(batches_of(Shards([100], bad=range(90)), max_bad_images=3), 1)


@pytest.mark.parametrize("needed", [False, True])
def test_ids_that_repeat_within_a_block(needed):
    class Repeating(Shards):
        def read(self, shard):
            for raw in super().read(shard):
                yield RawExample(raw.name, "same" if raw.label in (1, 3) else raw.id, raw.image, raw.label)

    source = Repeating([5])
    source.ids_needed = needed
    taken = take(batches_of(source), 5)
    names = {name for batch in taken for name in batch["bad_images"]}
    assert set(labels(taken)) == ({0, 1, 2, 4} if needed else {0, 1, 2, 3, 4})
    assert names == ({"0/3 (its id same is that of another example too)"} if needed else set())


def test_ids_that_are_not_stable_are_no_keys():
    source = Shards([4])
    source.has_ids = False
    source.read = lambda shard: (
        RawExample(f"place {raw.name}", "same", raw.image, raw.label) for raw in Shards.read(source, shard)
    )
    batch = take(batches_of(source), 1)[0]
    assert set(batch["index"].tolist()) == {stable_key(f"place 0/{place}") for place in range(4)}


def test_an_epoch_cut_short_by_a_resume_is_no_empty_one():
    batches = batches_of(Shards([4]))
    batches.load_state([[0, 0, 4, 0]])
    assert sorted(labels(take(batches, 1))) == [0, 1, 2, 3]


def test_a_stream_sorted_by_class_is_announced(caplog):
    class Sorted(Shards):
        def read(self, shard):
            return (RawExample(raw.name, raw.id, raw.image, raw.label // 60) for raw in super().read(shard))

    with caplog.at_level(logging.WARNING):
        next(Lane(Sorted([90]), 0, 80).blocks(Cursor()))
        assert not caplog.records
        next(Lane(Sorted([90]), 0, 55).blocks(Cursor()))
    assert "The first 55 examples are all of class 0" in caplog.text and "--shuffle_buffer_size" in caplog.text


def test_one_block_is_read_ahead_and_no_more():
    read = []

    def blocks():
        for number in itertools.count():
            read.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    ahead = one_ahead(blocks())
    assert next(ahead) == 0
    assert next(ahead) == 1
    ahead.close()  # waits for the thread
    assert read == [(0, False), (1, False), (2, False)]
