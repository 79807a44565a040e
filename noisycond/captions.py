"""Caption corruption: captions change places, lose, change or shuffle words, or are rewritten, for a given share of
the examples.

Section 3.1 of arXiv:2405.20494. Needs torch, NumPy and `randomness.py` only. Letters: N examples, B of them in a
batch.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from noisycond import randomness
from noisycond.corruption import CORRUPTION_MODES, check_ratio
from noisycond.randomness import Purpose


CORRUPTION_TYPES = ("swap", "token", "shuffle", "llm")
TOKEN_OPERATIONS = ("replace", "drop", "mask")
MASK_WORD = "[MASK]"  # how BERT's tokenizers spell their mask token
POOLED = 4  # other captions that give words to replace with; one alone often shares its words
_AROUND = re.compile(r"^\W+|\W+$")


class Caption(NamedTuple):
    """The caption that an example trains with.

    Attributes:
        text: the caption. is_corrupted: whether it is another than the example's own. is_still_true: whether it is,
            and yet describes the image: the caption of an image of the same class, or of the same text.
        own: of a corrupted caption, what the example's own was in this epoch; None: `text` is its own.
    """

    text: str
    is_corrupted: bool = False
    is_still_true: bool = False
    own: str | None = None

    @property
    def true_text(self) -> str:
        """The example's own caption."""
        return self.text if self.own is None else self.own


def swap_partners(size: int, ratio: float, seed: int, epoch: int = 0) -> torch.LongTensor:
    """Whose caption each example gets: chosen examples exchange theirs in pairs, so that no caption is lost or doubled
    (Section 3.1 of arXiv:2405.20494).

    Args:
        size: N. ratio: share of examples that are swapped, in [0, 1]. seed: another seed pairs others.
        epoch: 0 for fixed corruption; the epoch for pairs that are drawn anew each time.

    Returns:
        int64 [N], an involution. 2·round(ratio·N/2) examples, at most N, have a partner other than themselves.

    Raises:
        ValueError: ratio outside [0, 1].
    """
    check_ratio("corruption ratio", ratio)
    return _paired(size, round(ratio * size / 2), seed, Purpose.CAPTION_SWAP, epoch)


def window_partners(size: int, ratio: float, seed: int, shard: str, window: int, epoch: int = 0) -> torch.LongTensor:
    """As [`swap_partners`], within a window of a stream: int64 [size].

    The number of pairs is rounded up or down at random, so that in the mean over windows `ratio` comes out however
    small they are (an odd window at a ratio near 1 excepted: one example of it stays alone).

    Args:
        size: examples in the window. shard: name of the shard. window: number of the window in the shard.
    """
    check_ratio("corruption ratio", ratio)
    purpose = f"{Purpose.CAPTION_SWAP.value}/{shard}/{window}"
    pairs, rest = divmod(ratio * size / 2, 1)
    drawn = randomness.bernoulli(seed, f"{purpose}/pairs", torch.tensor([window]), rest, epoch)
    return _paired(size, int(pairs) + int(drawn), seed, purpose, epoch)


def _paired(size: int, pairs: int, seed: int, purpose: str, epoch: int) -> torch.LongTensor:
    partners = torch.arange(size)
    chosen = randomness.permutation(seed, purpose, size, epoch)[: 2 * min(pairs, size // 2)]
    partners[chosen[::2]], partners[chosen[1::2]] = chosen[1::2], chosen[::2]
    return partners


def corrupt_words(
    text: str,
    pool: Sequence[str] = (),
    *,
    key: int,
    ratio: float,
    operation: str,
    seed: int = 0,
    epoch: int = 0,
    mask_word: str = MASK_WORD,
) -> str:
    """Replaces, drops or masks words of a caption, each with probability `ratio` and at least one.

    Words are what white space divides; punctuation around a word stays where the word is replaced or masked. The
    result is never empty: of a caption whose words are all chosen, `drop` keeps one, and where there is but one, that
    is replaced, or masked where the pool has no other word.

    Args:
        text: the caption. pool: texts whose words replace its words, each another than the one it replaces.
        key: the example's own. ratio: probability per word, in (0, 1].
        operation: `replace`, `drop` or `mask`. epoch: 0 for fixed corruption.

    Returns:
        Another text; or this one where it cannot be changed so: it has no word, or the pool has no other.
    """
    words = text.split()
    bits = _word_bits([words], torch.tensor([key]), seed, epoch)[0]
    return _with_words_corrupted(words, pool, bits, ratio, operation, mask_word) or text


def _word_bits(
    texts: Sequence[list[str]], keys: torch.Tensor, seed: int, epoch: torch.Tensor | int
) -> list[np.ndarray]:
    """What the draws for each text's words, n of them, rest on: 2n + 1 words of 32 bits, at least 3."""
    sizes = [max(2 * len(words) + 1, 3) for words in texts]
    bits = randomness.random_bits(seed, Purpose.CAPTION_WORDS, keys, max(sizes, default=3), epoch).numpy()
    return [row[:size] for row, size in zip(bits, sizes, strict=True)]


def _with_words_corrupted(
    words: list[str], pool: Sequence[str], bits: np.ndarray, ratio: float, operation: str, mask_word: str
) -> str | None:
    """The text of these words as [`corrupt_words`] leaves it; None where it cannot be changed."""
    if operation == "drop" and len(words) == 1:
        replaced = _with_words_corrupted(words, pool, bits, 1.0, "replace", mask_word)
        changed = replaced is not None and replaced != words[0]
        return replaced if changed else _with_words_corrupted(words, (), bits, 1.0, "mask", mask_word)
    if operation == "drop":
        possible = np.ones(len(words), dtype=bool)
    else:
        cores = [_core(word) for word in words]
        others = _Pool(pool) if operation == "replace" else None
        unmasked = _core(mask_word)
        possible = np.array([core != unmasked if others is None else others.has_another(core) for core in cores])
    if not possible.any():
        return None
    chosen = (bits[: len(words)] < round(ratio * 2**32)) & possible
    last = int(bits[2 * len(words)])
    if not chosen.any():
        places = np.flatnonzero(possible)
        chosen[places[last * len(places) >> 32]] = True
    if operation == "drop":
        if chosen.all():
            chosen[last * len(words) >> 32] = False
        return " ".join(word for word, is_chosen in zip(words, chosen, strict=True) if not is_chosen)
    changed_words = list(words)
    for place in np.flatnonzero(chosen):
        new = mask_word if others is None else others.another(cores[place], int(bits[len(words) + place]))
        before, _, after = words[place].partition(cores[place])  # the punctuation around it
        changed_words[place] = before + new + after
    return " ".join(changed_words)


class _Pool:
    """Words to replace with, without the punctuation around them."""

    def __init__(self, texts: Sequence[str]):
        self.words = [core for text in texts for core in map(_core, text.split()) if core]
        # Of every word, how many others stand before each of its places.
        self.others_before: dict[str, list[int]] = {}
        for place, word in enumerate(self.words):
            own = self.others_before.setdefault(word.lower(), [])
            own.append(place - len(own))

    def _own(self, core: str) -> list[int]:
        return self.others_before.get(core.lower(), [])

    def has_another(self, core: str) -> bool:
        return len(self._own(core)) < len(self.words)

    def another(self, core: str, bits: int) -> str:
        own = self._own(core)
        number = bits * (len(self.words) - len(own)) >> 32
        return self.words[number + bisect_right(own, number)]


def _core(word: str) -> str:
    """A word without the punctuation around it; all of it where it is nothing else."""
    return word if word.isalnum() else _AROUND.sub("", word) or word


def shuffle_words(text: str, *, key: int, seed: int = 0, epoch: int = 0) -> str:
    """The caption's words in a random order that gives another text; itself where it has no two different words.
    Arguments as in [`corrupt_words`]."""
    words = text.split()
    bits = _word_bits([words], torch.tensor([key]), seed, epoch)[0]
    return _with_words_shuffled(words, bits) or text


def _with_words_shuffled(words: list[str], bits: np.ndarray) -> str | None:
    if len(set(words)) < 2:
        return None
    shuffled = [words[place] for place in np.argsort(bits[: len(words)], kind="stable")]
    if shuffled == words:
        shuffled = words[1:] + words[:1]  # another text, since the words are not all the same
    return " ".join(shuffled)


def other_examples(size: int, place: int, *, key: int, seed: int = 0, epoch: int = 0) -> list[int]:
    """Examples, of `size`, whose captions give words to the one at this place: [`POOLED`] of them, never itself; none
    where there is no other."""
    return others_of_all(size, torch.tensor([place]), torch.tensor([key]), seed, epoch)[0].tolist()


def others_of_all(
    size: int, places: torch.Tensor, keys: torch.Tensor, seed: int = 0, epoch: torch.Tensor | int = 0
) -> torch.LongTensor:
    """As [`other_examples`] for B places and keys, int64 [B]: int64 [B, [`POOLED`]], or [B, 0]."""
    if size < 2:
        return places.new_empty((len(places), 0))
    bits = randomness.random_bits(seed, Purpose.CAPTION_POOL, keys, POOLED, epoch)
    return (places[:, None] + 1 + (bits * (size - 1) >> 32)) % size


@dataclass(frozen=True)
class CaptionCorruption:
    """How captions are corrupted.

    Attributes:
        ratio: the share of corrupted captions, in [0, 1]. type: one of [`CORRUPTION_TYPES`].
        mode: `fixed` ignores the epoch (the same examples stay corrupted in the same way), `random` uses it.
        seed: another seed corrupts others. token_ratio, token_operation, mask_word: as in [`corrupt_words`].

    Raises:
        ValueError: a share outside [0, 1], or an unknown type, mode or operation.
    """

    ratio: float = 0.0
    type: str = "swap"
    mode: str = "fixed"
    seed: int = 0
    token_ratio: float = 0.3
    token_operation: str = "replace"
    mask_word: str = MASK_WORD

    def __post_init__(self):
        check_ratio("corruption ratio", self.ratio)
        check_ratio("token ratio", self.token_ratio)
        known = {"type": CORRUPTION_TYPES, "mode": CORRUPTION_MODES, "token_operation": TOKEN_OPERATIONS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                value, allowed = getattr(self, name), ", ".join(values)
                raise ValueError(f"caption corruption: {name} is {value!r}, but it must be one of {allowed}.")

    @property
    def changes_words(self) -> bool:
        """Whether it makes texts that no caption was."""
        return self.ratio > 0 and self.type in ("token", "shuffle")

    def epochs(self, epoch: torch.Tensor | int) -> torch.Tensor | int:
        """The epoch, an int or int64 [B], as the draws see it."""
        return epoch * 0 if self.mode == "fixed" else epoch

    def chosen(self, keys: torch.Tensor, epoch: torch.Tensor | int = 0) -> torch.BoolTensor:
        """Which examples, int64 [B], `token`, `shuffle` and `llm` corrupt: bool [B]."""
        return randomness.bernoulli(self.seed, Purpose.CORRUPTED, keys, self.ratio, self.epochs(epoch))

    def changed(self, text: str, pool: Sequence[str], key: int, epoch: int) -> str:
        """The caption as `token` or `shuffle` leave it."""
        return self.changed_all([text], [pool], torch.tensor([key]), epoch)[0]

    def changed_all(
        self, texts: Sequence[str], pools: Sequence[Sequence[str]], keys: torch.Tensor, epoch: torch.Tensor | int
    ) -> list[str]:
        """As [`changed`] for B texts, each with its pool and key, int64 [B], in an epoch, an int or int64 [B]; the
        draws of all at once."""
        words = [text.split() for text in texts]
        made = []
        for own, pool, bits in zip(words, pools, _word_bits(words, keys, self.seed, self.epochs(epoch)), strict=True):
            if self.type == "shuffle":
                made.append(_with_words_shuffled(own, bits))
            else:
                made.append(
                    _with_words_corrupted(own, pool, bits, self.token_ratio, self.token_operation, self.mask_word)
                )
        return [text if new is None else new for text, new in zip(texts, made, strict=True)]


class CaptionTally:
    """Counts what happened to the captions that were trained on.

    Attributes:
        counts [4]: int64, examples seen, corrupted, of these still true, and captions that were longer than the text
            encoder takes. Filled by [`count`] alone.
    """

    NAMES = ("examples_seen", "examples_corrupted", "corrupted_but_still_true", "captions_truncated")

    def __init__(self):
        self.counts = torch.zeros(len(self.NAMES), dtype=torch.int64)

    def count(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Adds a batch: its `caption_flags` int64 [B, 2] and, where it has that, `is_truncated` bool [B]."""
        flags = batch["caption_flags"]
        truncated = batch["is_truncated"].sum() if "is_truncated" in batch else flags.new_zeros(())
        seen = flags.new_full((), len(flags))
        self.counts = self.counts.to(flags.device) + torch.stack([seen, *flags.sum(0), truncated.to(flags)])

    def summary(self, counts: torch.Tensor | None = None) -> Mapping[str, object]:
        """The realized ratio and the counts, as plain numbers for a log or a JSON file."""
        values = dict(zip(self.NAMES, (self.counts if counts is None else counts).tolist(), strict=True))
        return values | {"realized_ratio": values["examples_corrupted"] / max(values["examples_seen"], 1)}
