"""Batches of a stream, in an order that is a pure function of (seed, epoch, number of processes), so that a run can be
cut anywhere and go on with the example after the last one it trained on.

Shards come in a fresh order every epoch and are dealt to the processes. Each process reads its shards one after the
other in blocks of `--shuffle_buffer_size` examples and shuffles each block. Data-loading workers only decode: what is
read, in what order, and how far, the training process alone knows, whatever their number. Letters: S shards, P
processes, B the batch size per process.
"""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from noisycond import randomness
from noisycond.data.batches import Batches, collate
from noisycond.data.captions import Encode, encoded
from noisycond.data.images import UNREADABLE, BadImages, Transform
from noisycond.data.streams import Broken, RawExample, StreamSource, stable_key
from noisycond.errors import InputError, in_one_line
from noisycond.randomness import Purpose
from noisycond.signals import ignore_in_worker


logger = logging.getLogger(__name__)
SHOWS_CLASSES = 50  # examples, of several classes unless they are sorted
PATIENCE = 5  # seconds, with a shard that is still being read when it is no longer needed


class Cursor(NamedTuple):
    """A place in the stream of one process.

    Attributes:
        epoch: passes over the process's share before this one.
        shard: place of a shard in the order of that epoch. example: number of an example in it, the first that the
            shuffle block could hold.
        offset: how many examples of the shuffled block came before.
    """

    epoch: int = 0
    shard: int = 0
    example: int = 0
    offset: int = 0


@dataclass
class Block:
    """A shuffle block: where it starts, its examples, and what could not be read between them."""

    start: Cursor
    examples: list[RawExample] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def add(self, raw: RawExample, key: int, own_id: bool) -> None:
        """Appends an example; `own_id`: it is of no use where one before it has the same id."""
        if own_id and raw.id is not None:
            if raw.id in self.ids:
                raw = replace(raw, problem=raw.problem or f"its id {raw.id} is that of another example too")
            self.ids.add(raw.id)
        self.examples.append(raw)
        self.keys.append(key)

    def shuffle(self, seed: int) -> "Block":
        keys = torch.tensor(self.keys, dtype=torch.int64)
        words = randomness.random_bits(seed, Purpose.STREAM_ORDER, keys, 2, self.start.epoch)
        order = torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
        self.examples = [self.examples[place] for place in order.tolist()]
        return self


class Lane:
    """The stream of one process: endless, epoch after epoch.

    Every P-th shard of an epoch's order is its share, or, where there are fewer shards than processes, every P-th
    example of all shards.

    Args:
        source: the shards. seed: seed of the order. block_size: examples that are shuffled together.
        number, count: which of the P processes.
    """

    def __init__(self, source: StreamSource, seed: int, block_size: int, number: int = 0, count: int = 1):
        self.source, self.seed, self.block_size = source, seed, block_size
        self.number, self.count = number, count

    def shards_of(self, epoch: int) -> list[int]:
        """The shards that this process reads in this epoch, in order."""
        order = randomness.permutation(self.seed, Purpose.SHARD_ORDER, len(self.source.shards), epoch).tolist()
        return order if self.splits_shards else order[self.number :: self.count]

    @property
    def splits_shards(self) -> bool:
        """Whether each process reads all shards and keeps a part of each."""
        return len(self.source.shards) < self.count

    def blocks(self, start: Cursor) -> Iterator[Block]:
        """Blocks from the one that starts here on, without end.

        Raises:
            InputError: an epoch's share holds no example, and no other shard does, so that none will.
        """
        while True:
            any_example = start.shard > 0 or start.example > 0
            broken: list[str] = []
            for block in self._blocks_of_epoch(start):
                any_example = any_example or bool(block.examples)
                if block.start == Cursor():
                    self._warn_of_one_class(block)
                broken += block.broken
                yield block
            # Where a process has few shards, all of a share may be broken: the next one is another.
            if not any_example and not self._another_holds_an_example(start.epoch):
                raise InputError(
                    f"process {self.number} finds no example in the stream's {len(self.source.shards)} shards"
                    + (f": cannot read {broken[0]}." if broken else ".")
                )
            start = Cursor(start.epoch + 1)

    def _another_holds_an_example(self, epoch: int) -> bool:
        """Whether a shard beside this epoch's does that this process may yet read."""
        others = sorted(set(range(len(self.source.shards))) - set(self.shards_of(epoch)))
        return any(isinstance(item, RawExample) for shard in others for item in self.source.peek(shard, 1))

    def will_meet_more(self, first: int, last: int) -> bool:
        """Whether there are shards that this process does not read in these epochs."""
        met = {shard for epoch in range(first, last) for shard in self.shards_of(epoch)}
        return len(met) < len(self.source.shards)

    def _warn_of_one_class(self, block: Block) -> None:
        labels = {str(raw.label) for raw in block.examples}
        if len(block.examples) >= SHOWS_CLASSES and len(labels) == 1 and len(self.source.class_names) > 1:
            logger.warning(
                "The first %d examples are all of class %s: the stream seems to be sorted by class, and it is shuffled"
                " by shards and within %d examples only. Raise --shuffle_buffer_size, or write mixed shards.",
                len(block.examples),
                block.examples[0].label,
                self.block_size,
            )

    def _blocks_of_epoch(self, start: Cursor) -> Iterator[Block]:
        stride, remainder = (self.count, self.number) if self.splits_shards else (1, 0)
        block = Block(start)
        shards = self.shards_of(start.epoch)
        for place in range(start.shard, len(shards)):
            first = start.example if place == start.shard else 0
            for number, found in enumerate(self.source.examples(shards[place], start.epoch)):
                if isinstance(found, Broken):
                    block.broken.append(found.name)
                elif number >= first and number % stride == remainder:
                    block.add(found, (shards[place] << 32) | number, self.source.ids_needed)
                if len(block.examples) == self.block_size:
                    yield block.shuffle(self.seed)
                    block = Block(Cursor(start.epoch, place, number + 1))
        if block.examples or block.broken:
            yield block.shuffle(self.seed)


def one_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks, each read by a thread while the one before is used. The thread ends with the process."""

    def start() -> Future:
        future: Future = Future()

        def read() -> None:
            try:
                future.set_result(next(blocks))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=read, daemon=True).start()
        return future

    following = start()
    try:
        while True:
            block = following.result()
            following = start()
            yield block
    finally:
        wait([following], timeout=PATIENCE)


class StreamedImages(Dataset):
    """A stream's examples, decoded; the batches ask for (raw example or what is broken, cursor after it).

    Attributes:
        source: the stream. transform: images to tensors.
        encode: captions to tensors, see [`noisycond.data.captions.Captioned`]; None where they are not asked for.
        with_true: see [`noisycond.data.captions.encoded`].
    """

    def __init__(
        self, source: StreamSource, transform: Transform, encode: Encode | None = None, with_true: bool = False
    ):
        self.source, self.transform, self.encode, self.with_true = source, transform, encode, with_true

    def describe(self) -> str:
        """What is known of its size, for the log."""
        return f"A stream of {len(self.source.shards)} shards"

    def __getitem__(self, item: tuple[RawExample | Broken, Cursor]) -> dict:
        """A training example as that of [`noisycond.data.images.LabelledImages`], or of
        [`noisycond.data.captions.Captioned`] with `encode`, with a cursor instead of its position; or `bad`, what a
        message says of one that is of no use, and its `epoch`."""
        raw, cursor = item
        if isinstance(raw, Broken):
            return {"bad": raw.name, "epoch": cursor.epoch}
        try:
            image, label = self.source.decode(raw)
        except UNREADABLE as error:
            return {"bad": f"{raw.name} ({in_one_line(error)})", "epoch": cursor.epoch}
        index = stable_key(raw.id if self.source.has_ids and raw.id is not None else raw.name)
        example = {
            "index": index,
            "epoch": cursor.epoch,
            "pixel_values": self.transform(image, index, cursor.epoch),
            "class_labels": label,
            "cursor": torch.tensor(cursor),
        }
        if self.encode is not None:
            told = encoded(self.encode, [raw.caption], self.with_true)
            example |= {name: value[0] for name, value in told.items()}
        return example


def _collate(decoded: list[dict]) -> dict:
    good = [example for example in decoded if "bad" not in example]
    bad = [example["bad"] for example in decoded if "bad" in example]
    return {"good": collate(good) if good else None, "bad": bad, "epoch": decoded[-1]["epoch"]}


class _Chunks:
    """Lists of what is to be decoded, B examples in each, without end."""

    def __init__(self, lane: Lane, start: Cursor, size: int):
        self.lane, self.start, self.size = lane, start, size

    def __iter__(self) -> Iterator[list]:
        chunk, skipped = [], self.start.offset
        for block in one_ahead(self.lane.blocks(self.start._replace(offset=0))):
            found = [(Broken(name), block.start) for name in block.broken]
            for offset in range(skipped, len(block.examples)):
                found.append((block.examples[offset], block.start._replace(offset=offset + 1)))
            for item in found:
                chunk.append(item)
                if len(chunk) == self.size:
                    yield chunk
                    chunk = []
            skipped = 0


class StreamBatches(Batches):
    """The training batches of this process from a stream. What cannot be read
    is left out and the next example moves up, so every batch is full.

    Args:
        dataset: the stream. batch_size: B. accumulation_steps, num_processes, process_index: how the global batch is
            divided. seed: seed of the order. num_workers: processes that decode. shuffle_buffer_size: examples that
            are shuffled together. max_bad_images: how much may be unreadable; None for any number.
    """

    num_examples = None

    def __init__(
        self,
        dataset: StreamedImages,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        shuffle_buffer_size: int = 1000,
        max_bad_images: int | None = None,
    ):
        super().__init__(dataset, batch_size, accumulation_steps, num_processes, process_index, seed, num_workers)
        self.lane = Lane(dataset.source, seed, shuffle_buffer_size, process_index, num_processes)
        self.cursor, self.max_bad_images = Cursor(), max_bad_images
        if self.lane.splits_shards:
            logger.warning(
                "There are fewer shards (%d) than processes (%d): each process reads all of them and keeps its part.",
                len(dataset.source.shards),
                num_processes,
            )

    def state(self) -> list[list[int]]:
        """The cursor of every process, after the batches that were handed out. All processes take part."""
        return gather_object([list(self.cursor)])

    def load_state(self, state: list[list[int]]) -> None:
        """Takes up what [`state`] gave. On another number of processes the places mean nothing: the stream then goes
        on with the next epoch, and the log says so."""
        cursors = [Cursor(*values) for values in state]
        if len(cursors) != self.num_processes:
            epoch = max(cursor.epoch for cursor in cursors)
            self.cursor = Cursor(epoch + 1)
            logger.warning(
                "The stream was read by %d processes and is now by %d: the rest of epoch %d is passed over.",
                len(cursors),
                self.num_processes,
                epoch,
            )
            return
        self.cursor = cursors[self.process_index]
        for number, cursor in enumerate(cursors):
            lane = Lane(self.dataset.source, self.lane.seed, self.lane.block_size, number, self.num_processes)
            logger.info(
                "Resuming the stream in epoch %d at shard %s, example %d of the shuffle block from example %d on"
                " (process %d).",
                cursor.epoch,
                self.dataset.source.shards[lane.shards_of(cursor.epoch)[cursor.shard]],
                cursor.offset,
                cursor.example,
                number,
            )

    def starting_at(self, step: int) -> Iterator[dict]:
        """Endless batches from the cursor on, `accumulation_steps` of them per step.

        Raises:
            InputError: nothing of all shards can be read, or too much cannot before a batch is full.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Chunks(self.lane, self.cursor, self.batch_size),
            collate_fn=_collate,
            num_workers=self.num_workers,
            worker_init_fn=ignore_in_worker,
            pin_memory=torch.cuda.is_available(),
        )
        held, bad, accumulation = None, [], 0
        fruitful = self.cursor.epoch
        for chunk in loader:
            bad += chunk["bad"]
            fruitful = fruitful if chunk["good"] is None else chunk["epoch"]
            if self.max_bad_images is not None:  # else those of a batch that never comes would not be counted
                BadImages(self.max_bad_images).add(bad, quiet=True)
            if chunk["epoch"] > fruitful + 1 and not self.lane.will_meet_more(fruitful + 1, chunk["epoch"]):
                raise InputError(f"no example of the stream can be read in process {self.process_index}: {bad[0]}.")
            held = _joined(held, chunk["good"])
            while held is not None and len(held["index"]) >= self.batch_size:
                batch, held = _parted(held, self.batch_size)
                self.cursor = Cursor(*batch.pop("cursor")[-1].tolist())
                first = (accumulation * self.num_processes + self.process_index) * self.batch_size
                batch["position"] = torch.arange(first, first + self.batch_size)
                batch["bad_images"], bad = bad, []
                yield batch
                accumulation = (accumulation + 1) % self.accumulation_steps


def _joined(first: dict | None, second: dict | None) -> dict | None:
    if first is None or second is None:
        return second if first is None else first
    return {name: torch.cat([first[name], second[name]]) for name in first}


def _parted(batch: dict, size: int) -> tuple[dict, dict | None]:
    if len(batch["index"]) == size:
        return batch, None
    return {name: value[:size] for name, value in batch.items()}, {name: value[size:] for name, value in batch.items()}
