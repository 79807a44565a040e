"""Captions of a dataset: which one an example trains with in an epoch, after corruption, and whether it is still true.

Letters: N examples, C captions of all of them, B examples in a batch, L the length of a text.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from noisycond import randomness
from noisycond.captions import (
    MASK_WORD,
    Caption,
    CaptionCorruption,
    other_examples,
    others_of_all,
    swap_partners,
    window_partners,
)
from noisycond.data.batches import collate
from noisycond.data.caption_options import CaptionCorruptionArguments
from noisycond.data.folder_index import Names
from noisycond.data.images import BadImages
from noisycond.data.rewriting import read_rewritings
from noisycond.data.sources import NO_UTF8, ImageSource, Subset, is_utf8
from noisycond.data.streams import Broken, RawExample, StreamSource, stable_key
from noisycond.errors import InputError, is_main_process, require
from noisycond.randomness import Purpose


logger = logging.getLogger(__name__)
Encode = Callable[[list[str]], dict[str, torch.Tensor]]
CHUNK = 256  # captions that are corrupted at once
NO_CAPTION, BAD_CAPTION = "it has no caption", f"its caption is {NO_UTF8}"
SHOWN = 3  # examples without a caption that a message names


class Texts(Names):
    """C texts in one array of bytes; see [`noisycond.data.folder_index.Names`]."""

    def __init__(self, texts: Sequence[str]):
        encoded = [text.encode("utf-8") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        super().__init__(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def decoded(self, text: bytes) -> str:
        return text.decode("utf-8")

    def update(self, content) -> None:
        """Adds what tells these texts from others to a hash."""
        content.update(self.ends.tobytes() + self.content.tobytes())


def corruption_of(args, mask_word: str = MASK_WORD) -> CaptionCorruption:
    """The corruption that the flags ask for; none for arguments without such flags."""
    if not isinstance(args, CaptionCorruptionArguments):
        return CaptionCorruption(seed=args.seed)
    return CaptionCorruption(
        ratio=args.corruption_ratio,
        type=args.corruption_type,
        mode=args.corruption_mode,
        seed=args.seed,
        token_ratio=args.token_ratio,
        token_operation=args.token_operation,
        mask_word=mask_word,
    )


def _changed(text: str, new: str) -> Caption:
    return Caption(new, True, own=text) if new != text else Caption(text)


class Captions:
    """The captions of a map-style dataset. What an example gets depends on (seed, index, epoch) alone.

    Args:
        captions: N lists of texts, at least one in each; of several, one is drawn anew every epoch.
        corruption: how captions are corrupted.
        labels [N]: int64, by which swapped captions that are still true are told; None leaves it to equal texts.
        rewritten: for `llm`, the rewriting of each caption, in lists like `captions`, or a mapping from texts. May be
            given later, see [`take_rewritings`].
    """

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        corruption: CaptionCorruption,
        labels: np.ndarray | None = None,
        rewritten: Sequence[Sequence[str]] | Mapping[str, str] | None = None,
    ):
        self.corruption, self.labels = corruption, labels
        self.counts = torch.tensor([len(own) for own in captions], dtype=torch.int64)
        self.first = torch.cumsum(self.counts, 0) - self.counts
        self.texts = Texts([text for own in captions for text in own])
        self.rewritten: Texts | Mapping[str, str] | None = None
        if isinstance(rewritten, Mapping):
            self.take_rewritings(rewritten)
        elif rewritten is not None:
            self.rewritten = Texts([text for own in rewritten for text in own])
        self.partners: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def fingerprint(self) -> str:
        """A hash of the captions and of what they are rewritten to."""
        content = hashlib.sha256(self.counts.numpy().tobytes())
        self.texts.update(content)
        for number in range(len(self.texts)) if self.rewritten is not None else ():
            content.update(f"\0{self._rewriting(number)}".encode())
        return content.hexdigest()

    def take_rewritings(self, rewritten: Mapping[str, str]) -> None:
        """Takes what texts are rewritten to. One that is missing, empty or the text itself leaves a caption as it
        is."""
        self.rewritten = rewritten

    def _rewriting(self, number: int) -> str | None:
        if isinstance(self.rewritten, Texts):
            return self.rewritten[number] or None
        return (self.rewritten or {}).get(self.texts[number]) or None

    def use(self, index: int, epoch: int) -> Caption:
        """The caption of one example in this epoch."""
        return self.use_all(torch.tensor([index]), torch.tensor([epoch]))[0]

    def use_all(self, index: torch.Tensor, epoch: torch.Tensor) -> list[Caption]:
        """The captions of examples, int64 [B], each in its epoch, int64 [B]: B captions."""
        corruption = self.corruption
        own = self._drawn(index, epoch)
        if corruption.ratio == 0:
            return [Caption(self.texts[number]) for number in own]
        if corruption.type == "swap":
            return self._swapped(index, epoch, own)
        captions = [Caption(self.texts[number]) for number in own]
        chosen = torch.nonzero(corruption.chosen(index, epoch)).flatten()
        corrupted = self._corrupted(index[chosen], [own[place] for place in chosen], epoch[chosen])
        for place, caption in zip(chosen.tolist(), corrupted, strict=True):
            captions[place] = caption
        return captions

    def true_texts(self, index: torch.Tensor, epoch: torch.Tensor) -> list[str]:
        """The examples' own captions of an epoch; arguments as in [`use_all`]."""
        return [self.texts[number] for number in self._drawn(index, epoch)]

    def _drawn(self, index: torch.Tensor, epoch: torch.Tensor | int) -> list[int]:
        """The numbers of the captions that are drawn for examples, int64 [B], in an epoch: B of 0 to C - 1."""
        if len(self.texts) == len(self):
            return index.tolist()
        seed, counts = self.corruption.seed, self.counts[index]
        places = randomness.randint(seed, Purpose.CAPTION_CHOICE, index, counts, epoch)
        return (self.first[index] + places).tolist()

    def _partners(self, epoch: int) -> torch.Tensor:
        epoch = self.corruption.epochs(epoch)
        if epoch not in self.partners:  # a batch may lie in two epochs
            kept = dict(list(self.partners.items())[-1:])
            self.partners = kept | {
                epoch: swap_partners(len(self), self.corruption.ratio, self.corruption.seed, epoch)
            }
        return self.partners[epoch]

    def _swapped(self, index: torch.Tensor, epoch: torch.Tensor, own: list[int]) -> list[Caption]:
        partners = torch.empty_like(index)
        for time in epoch.unique().tolist():
            here = epoch == time
            partners[here] = self._partners(time)[index[here]]
        told = self._drawn(partners, epoch)  # by the partner's own key: what it gives away is what it would have had
        return [
            self._swap(key, partner, self.texts[mine], self.texts[theirs])
            for key, partner, mine, theirs in zip(index.tolist(), partners.tolist(), own, told, strict=True)
        ]

    def _swap(self, index: int, partner: int, mine: str, theirs: str) -> Caption:
        if partner == index:
            return Caption(mine)
        same_class = self.labels is not None and self.labels[index] == self.labels[partner]
        return Caption(theirs, True, bool(same_class) or mine == theirs, mine)

    def _corrupted(self, index: torch.Tensor, numbers: list[int], epoch: torch.Tensor) -> list[Caption]:
        """What `token`, `shuffle` or `llm` make of chosen examples' captions of these numbers; int64 [B], B numbers,
        int64 [B]."""
        corruption, texts = self.corruption, [self.texts[number] for number in numbers]
        if corruption.type == "llm":
            assert self.rewritten is not None, "captions are rewritten before they are used"
            return [
                _changed(text, self._rewriting(number) or text) for number, text in zip(numbers, texts, strict=True)
            ]
        epoch = corruption.epochs(epoch)
        pools: list[list[str]] = [[]] * len(texts)
        if corruption.type == "token":
            others = others_of_all(len(self), index, index, corruption.seed, epoch)
            told = self._drawn(others.flatten(), epoch.repeat_interleave(others.shape[1]))
            pools = [
                [self.texts[number] for number in row] for row in torch.tensor(told).reshape(others.shape).tolist()
            ]
        new = corruption.changed_all(texts, pools, index, epoch)
        return [_changed(text, changed) for text, changed in zip(texts, new, strict=True)]

    def _candidates(self) -> np.ndarray:
        """The examples that `token`, `shuffle` and `llm` corrupt in any epoch, in order: int64."""
        everyone = torch.arange(len(self))
        if self.corruption.ratio == 0 or self.corruption.type == "swap":
            return everyone[:0].numpy()
        if self.corruption.mode == "random":
            return everyone.numpy()
        return everyone[self.corruption.chosen(everyone)].numpy()

    def _numbers_of(self, examples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """These examples' captions, in order: whose each is, and its number; both int64."""
        examples = torch.from_numpy(examples)
        counts = self.counts[examples]
        index = examples.repeat_interleave(counts)
        places = torch.arange(len(index)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return index, self.first[index] + places

    def all_texts(self, with_true: bool = False) -> list[str]:
        """Every text that can come up in any epoch, each once, in a fixed order.

        Args:
            with_true: beside what examples train with also the captions that are corrupted, as they were.

        Raises:
            InputError: there is no end of them: words are drawn anew every epoch.
        """
        corruption, candidates = self.corruption, self._candidates()
        require(
            not (corruption.changes_words and corruption.mode == "random"),
            f"--corruption_type {corruption.type} with --corruption_mode random makes new captions every epoch, so "
            "that their embeddings cannot be cached; say --corruption_mode fixed, or leave --cache_text_embeddings "
            "off.",
        )
        always = np.arange(len(self))
        if corruption.mode == "fixed" and not with_true:
            always = np.setdiff1d(always, candidates)
        texts = {self.texts[number]: None for number in self._numbers_of(always)[1].tolist()}
        bar = {"desc": "corrupting captions", "unit": "caption", "delay": 2, "disable": not is_main_process()}
        index, numbers = self._numbers_of(candidates)
        with tqdm(total=len(index), **bar) as shown:
            for some, chunk in zip(index.split(CHUNK), numbers.split(CHUNK), strict=True):
                for caption in self._corrupted(some, chunk.tolist(), torch.zeros_like(some)):
                    texts[caption.text] = None
                shown.update(len(some))
        return list(texts)

    def texts_to_rewrite(self) -> list[str]:
        """The captions that `llm` may replace, each once, in order: those of the chosen examples, or with `random` of
        all."""
        return list({self.texts[number]: None for number in self._numbers_of(self._candidates())[1].tolist()})

    def require_rewritings(self, where: str, name: Callable[[int], str]) -> None:
        """Raises InputError where captions that may be corrupted have no rewriting; names this flag, their count and
        one of them."""
        index, numbers = self._numbers_of(self._candidates())
        pairs = zip(index.tolist(), numbers.tolist(), strict=True)
        missing = [(index, number) for index, number in pairs if not self._rewriting(number)]
        if missing:
            index, number = missing[0]
            raise InputError(
                f"{where}: {len(missing)} captions that are chosen for corruption have no rewriting, for example "
                f"{self.texts[number]!r} of {name(index)}; add them, or lower --corruption_ratio."
            )


def open_captions(
    args, source: ImageSource, bad_images: BadImages, mask_word: str = MASK_WORD
) -> tuple[ImageSource, Captions]:
    """The captions of a source, as the flags say, and the source without the examples that have none, which count as
    bad images.

    Raises:
        InputError: no such column, no text in it, a ratio that rounds to no swapped pair, more examples without a
            caption than --max_bad_images, a file of rewritings that cannot be read, or captions that are chosen for
            corruption and have no rewriting.
    """
    captions, rewritten = source.captions(args.caption_column), None
    column, file = (getattr(args, name, None) for name in ("rewritten_caption_column", "rewritten_captions"))
    if column is not None:
        rewritten = source.captions(column, "--rewritten_caption_column")
        pairs = zip(captions, rewritten, strict=True)
        # Before captions of no use go, whose rewritings go with them.
        rewritten = [
            [new if is_utf8(new) else "" for old, new in zip(own, _paired(own, new), strict=True) if _is_caption(old)]
            for own, new in pairs
        ]
    elif file is not None:
        rewritten = read_rewritings(file)
    usable = [own if all(map(_is_caption, own)) else list(filter(_is_caption, own)) for own in captions]
    kept = np.flatnonzero([bool(own) for own in usable])
    if len(kept) < len(captions):
        missing = np.setdiff1d(np.arange(len(captions)), kept)
        reasons = {int(index): BAD_CAPTION if any(captions[index]) else NO_CAPTION for index in missing}
        _leave_out(reasons, args.caption_column, source, bad_images)
        source, usable = Subset(source, kept), [usable[index] for index in kept]
        rewritten = [rewritten[index] for index in kept] if isinstance(rewritten, list) else rewritten
    made = Captions(usable, corruption_of(args, mask_word), source.labels if source.class_names else None, rewritten)
    _require_a_swap(made)
    if rewritten is not None:
        flag = f"--rewritten_caption_column {column}" if column else f"--rewritten_captions {file}"
        made.require_rewritings(flag, source.name)
    return source, made


def _is_caption(text: str) -> bool:
    return bool(text) and is_utf8(text)


def _require_a_swap(captions: Captions) -> None:
    """Raises InputError where captions are to be swapped, but the ratio of them rounds to no pair."""
    corruption, size = captions.corruption, len(captions)
    if corruption.type != "swap" or corruption.ratio == 0 or round(corruption.ratio * size / 2) * min(size - 1, 1):
        return
    sentence = f"--corruption_ratio {corruption.ratio} corrupts none of {size} examples"
    require(size > 1, f"{sentence}: `swap` needs two; add examples, or choose another --corruption_type.")
    digits = len(str(size)) + 2
    least = (10**digits // size + 1) / 10**digits  # above 1 / size, half a pair
    raise InputError(f"{sentence}: `swap` needs a pair, for which {least:.{digits}f} is the least ratio; or say 0.")


def _leave_out(reasons: Mapping[int, str], column: str, source: ImageSource, bad_images: BadImages) -> None:
    """Counts examples without a usable caption, by their index and what is wrong, and says so in one sentence."""
    names = [source.name(index) for index in reasons]
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    unwritable = sum(reason == BAD_CAPTION for reason in reasons.values())
    which = f" ({unwritable} of them one that is {NO_UTF8})" if unwritable else ""
    what = f"{len(reasons)} of {len(source)} examples have no caption in the column {column}{which}: {shown}"
    require(
        len(reasons) <= bad_images.limit and len(reasons) < len(source),
        f"{what}; --max_bad_images allows {bad_images.limit}. Mend or remove them, or allow more.",
    )
    logger.warning("Left out: %s.", what)
    bad_images.add([f"{name} ({reason})" for name, reason in zip(names, reasons.values(), strict=True)], quiet=True)


def _paired(captions: Sequence[str], rewritten: Sequence[str]) -> list[str]:
    """The rewriting of each caption: one for all, or as many as there are captions; else none."""
    if len(rewritten) == 1:
        return list(rewritten) * len(captions)
    return list(rewritten) if len(rewritten) == len(captions) else [""] * len(captions)


class StreamCaptions:
    """Draws and corrupts the captions of a stream while it is read, within windows of consecutive examples of one
    shard, so that what an example gets depends on (seed, shard, place in it, epoch) alone: not on the processes, on
    where the reading began, or on ids.

    `swap` keeps the captions of a window together. An image that cannot be decoded is found too late to leave its
    caption out. Beside the shuffle block, one window of undecoded examples is held in memory.

    Args:
        corruption: how captions are corrupted. window: consecutive examples that are looked at together.
        rewritten: for `llm`, what texts are rewritten to; None: it stands with the examples.
        where: what a message calls the place of the rewritings.
    """

    def __init__(
        self,
        corruption: CaptionCorruption,
        window: int,
        rewritten: Mapping[str, str] | None = None,
        where: str = "",
    ):
        self.corruption, self.window, self.rewritten, self.where = corruption, window, rewritten, where

    @property
    def fingerprint(self) -> str:
        """A hash of the window's size and of what texts are rewritten to."""
        content = hashlib.sha256(f"{self.window}".encode())
        for pair in sorted((self.rewritten or {}).items()):
            content.update("\0".join(pair).encode() + b"\n")
        return content.hexdigest()

    def __call__(self, items: Iterator[RawExample | Broken], shard: str, epoch: int) -> Iterator[RawExample | Broken]:
        """The items of a shard of this name, in their order, examples with the caption of this epoch."""
        window: list[RawExample | Broken] = []
        with closing(items):
            number = 0
            for item in items:
                window.append(item)
                if len(window) == self.window:
                    yield from self._told(window, shard, number, epoch)
                    window, number = [], number + 1
            yield from self._told(window, shard, number, epoch)

    def _told(
        self, window: list[RawExample | Broken], shard: str, number: int, epoch: int
    ) -> list[RawExample | Broken]:
        corruption, told = self.corruption, list(window)
        sound = [
            place
            for place, item in enumerate(window)
            if isinstance(item, RawExample) and item.problem is None and any(item.captions)
        ]
        if not sound:
            return told
        keys = torch.tensor([stable_key(f"{shard}/{number * self.window + place}") for place in sound])
        examples = [window[place] for place in sound]
        places = [self._drawn(raw, key, epoch) for raw, key in zip(examples, keys, strict=True)]
        texts = [raw.captions[place] for raw, place in zip(examples, places, strict=True)]
        captions = [Caption(text) for text in texts]
        if corruption.ratio > 0 and corruption.type == "swap":
            captions = self._swapped(examples, texts, shard, number, epoch)
        elif corruption.ratio > 0:
            for place in torch.nonzero(corruption.chosen(keys, epoch)).flatten().tolist():
                captions[place] = self._corrupted(examples, keys, place, places[place], epoch)
        for place, raw, caption in zip(sound, examples, captions, strict=True):
            if caption is None:
                told[place] = replace(
                    raw, problem=f"its caption is to be corrupted, but has no rewriting {self.where}"
                )
            else:
                told[place] = replace(raw, caption=caption)
        return told

    def _drawn(self, raw: RawExample, key: torch.Tensor, epoch: int) -> int:
        places = [place for place, text in enumerate(raw.captions) if text]
        if len(places) == 1:
            return places[0]
        drawn = randomness.randint(self.corruption.seed, Purpose.CAPTION_CHOICE, key[None], len(places), epoch)
        return places[int(drawn)]

    def _swapped(
        self, examples: list[RawExample], texts: list[str], shard: str, number: int, epoch: int
    ) -> list[Caption]:
        corruption = self.corruption
        partners = window_partners(
            len(texts), corruption.ratio, corruption.seed, shard, number, corruption.epochs(epoch)
        )
        captions = [Caption(text) for text in texts]
        for place, partner in enumerate(partners.tolist()):
            if partner != place:
                label, other = examples[place].label, examples[partner].label
                same = texts[place] == texts[partner] or (label is not None and label == other)
                captions[place] = Caption(texts[partner], True, same, texts[place])
        return captions

    def _corrupted(
        self, examples: list[RawExample], keys: torch.Tensor, own: int, drawn: int, epoch: int
    ) -> Caption | None:
        """What `token`, `shuffle` or `llm` make of an example's drawn caption; None where its rewriting is missing."""
        corruption, raw, text = self.corruption, examples[own], examples[own].captions[drawn]
        if corruption.type == "llm":
            if self.rewritten is not None:
                new = self.rewritten.get(text)
            else:
                new = _paired(raw.captions, raw.rewritten)[drawn]
            return _changed(text, new) if new else None
        epoch, key = corruption.epochs(epoch), int(keys[own])
        others = other_examples(len(examples), own, key=key, seed=corruption.seed, epoch=epoch)
        pool = [examples[other].captions[self._drawn(examples[other], keys[other], epoch)] for other in others]
        return _changed(text, corruption.changed(text, pool, key, epoch))


def caption_stream(args, source: StreamSource, mask_word: str = MASK_WORD) -> StreamCaptions:
    """Makes a stream draw and corrupt its captions, as the flags say.

    Raises:
        InputError: the file of rewritings cannot be read.
    """
    rewritten, where = None, f"in the column {getattr(args, 'rewritten_caption_column', None)}"
    if getattr(args, "rewritten_captions", None) is not None:
        rewritten, where = read_rewritings(args.rewritten_captions), f"in {args.rewritten_captions}"
    source.captioning = StreamCaptions(corruption_of(args, mask_word), args.shuffle_buffer_size, rewritten, where)
    return source.captioning


def encoded(encode: Encode, captions: Sequence[Caption], with_true: bool = False) -> dict[str, torch.Tensor]:
    """What a text encoder needs of B captions, and `caption_flags` int64 [B, 2]: 1 where a caption is corrupted, and
    where it is corrupted but still true.

    Args:
        with_true: whether what it needs of the examples' own captions comes too, by the same names after `true_`.
    """
    flags = [[caption.is_corrupted, caption.is_still_true] for caption in captions]
    texts = encode([caption.text for caption in captions])
    if with_true:
        own = encode([caption.true_text for caption in captions])
        texts |= {f"true_{name}": value for name, value in own.items() if name != "is_truncated"}
    return texts | {"caption_flags": torch.tensor(flags, dtype=torch.int64)}


class Captioned(Dataset):
    """Training examples with what a text encoder needs of their captions, and `caption_flags`; see [`encoded`].

    Args:
        dataset: [`noisycond.data.images.LabelledImages`] or [`noisycond.data.latent_cache.CachedLatents`].
        captions: of the same examples. A caption belongs to the image that is there in the end: what stands in for an
            unreadable one brings its own.
        encode: B texts to tensors [B, …] on the CPU, of one shape whatever the texts.
        with_true: see [`encoded`].
    """

    def __init__(self, dataset: Dataset, captions: Captions, encode: Encode, with_true: bool = False):
        self.dataset, self.captions, self.encode, self.with_true = dataset, captions, encode, with_true

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        example = self.dataset[item]
        caption = self.captions.use(int(example["index"]), int(example["epoch"]))
        return example | {name: value[0] for name, value in encoded(self.encode, [caption], self.with_true).items()}

    def __getitems__(self, items: list[tuple[int, int, int]]) -> dict:
        """A whole batch at once, as torch's data loader asks for it."""
        whole = getattr(self.dataset, "__getitems__", None)
        batch = collate(whole(items) if whole else [self.dataset[item] for item in items])
        captions = self.captions.use_all(batch["index"], batch["epoch"])
        return batch | encoded(self.encode, captions, self.with_true)


def caption_facts(captions: Captions | StreamCaptions) -> dict:
    """What a resumed run must share, as JSON values."""
    return {"captions": captions.fingerprint, "caption_corruption": dataclasses.asdict(captions.corruption)}
