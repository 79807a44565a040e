"""Corruption of captions: what is swapped, which words change, on text that one can read."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
import torch

from noisycond import captions, randomness
from noisycond.captions import (
    Caption,
    CaptionCorruption,
    CaptionTally,
    corrupt_words,
    other_examples,
    others_of_all,
    shuffle_words,
    swap_partners,
    window_partners,
)
from noisycond.randomness import Purpose


TEXT = "a small dog, brown and wet, runs home"
POOL = ("two red kites over the sea", "an old clock")


def changed(operation: str, text: str = TEXT, ratio: float = 0.4, pool=POOL, **options) -> str:
    return corrupt_words(text, pool, operation=operation, ratio=ratio, **({"key": 3} | options))


# Swap


@pytest.mark.parametrize("size", [2, 7, 100, 1001])
@pytest.mark.parametrize("ratio", [0.0, 0.025, 0.3, 1.0])
def test_chosen_examples_change_places_in_pairs_and_others_stay(size, ratio):
    partners = swap_partners(size, ratio, seed=5)
    own = torch.arange(size)
    assert partners.dtype == torch.int64 and torch.equal(partners[partners], own)
    assert int((partners != own).sum()) == min(2 * round(ratio * size / 2), size - size % 2)


def test_a_swap_loses_and_doubles_no_caption():
    captions = [f"caption {number}" for number in range(1000)]
    told = [captions[partner] for partner in swap_partners(1000, 0.2, seed=0).tolist()]
    assert Counter(told) == Counter(captions)
    assert sum(new != old for new, old in zip(told, captions, strict=True)) == 200


def test_seed_and_epoch_pair_others():
    first = swap_partners(1000, 0.2, seed=0)
    assert torch.equal(first, swap_partners(1000, 0.2, seed=0))
    assert not torch.equal(first, swap_partners(1000, 0.2, seed=1))
    assert not torch.equal(first, swap_partners(1000, 0.2, seed=0, epoch=1))


def test_pairs_are_not_those_of_another_purpose():
    order = randomness.permutation(0, Purpose.DATA_ORDER, 1000)[:200]
    chosen = torch.nonzero(swap_partners(1000, 0.2, 0) != torch.arange(1000)).flatten()
    assert len(set(order.tolist()) & set(chosen.tolist())) < 100


@pytest.mark.parametrize(("size", "ratio"), [(3, 0.1), (10, 0.025), (50, 0.15)])
def test_small_windows_have_the_asked_ratio_in_the_mean(size, ratio):
    windows = 4000
    swapped = [int((window_partners(size, ratio, 0, "7.tar", n) != torch.arange(size)).sum()) for n in range(windows)]
    assert all(count % 2 == 0 for count in swapped)
    share = sum(swapped) / (windows * size)
    # One of two neighbouring numbers of pairs each time: a variance of at most 1/4 of a pair.
    assert abs(share - ratio) < 4 * (0.25 / windows) ** 0.5 * 2 / size
    assert max(swapped) - min(swapped) <= 2


def test_windows_differ_by_shard_number_and_epoch():
    first = window_partners(100, 0.5, 0, "7.tar", 3)
    assert torch.equal(first, window_partners(100, 0.5, 0, "7.tar", 3))
    assert torch.equal(first[first], torch.arange(100))
    for other in (("8.tar", 3, 0), ("7.tar", 4, 0), ("7.tar", 3, 1)):
        assert not torch.equal(first, window_partners(100, 0.5, 0, *other))


# Words


def test_replaced_words_come_from_the_pool_and_keep_the_punctuation():
    new = changed("replace").split()
    old = TEXT.split()
    assert len(new) == len(old)
    pooled = {word for text in POOL for word in text.split()}
    places = [place for place, (a, b) in enumerate(zip(new, old, strict=True)) if a != b]
    assert places
    for place in places:
        assert new[place].rstrip(",") in pooled and new[place].endswith(",") == old[place].endswith(",")


def test_replacing_every_word_leaves_none():
    for key in range(50):
        new = changed("replace", "the red sea", 1.0, ("the red sea at night",), key=key).split()
        assert len(new) == 3 and all(a != b for a, b in zip(new, ["the", "red", "sea"], strict=True))


def test_what_is_drawn_stays_as_it_was():
    """Values of the first implementation: runs that go on, and cached embeddings, rest on them."""
    text = "A small dog, brown and wet, runs home: (a DOG!) -- 'tis über Straße ... ok"
    pool = ("two red Dogs over the sea", "an old clock, a DOG; a dog", "!!! über A b c", "Straße STRASSE home.")
    assert [changed("replace", text, 0.5, pool, key=key) for key in range(3)] == [
        "A small Straße, brown and over, runs home: (a over!) -- 'tis home Straße ... an",
        "DOG small clock, brown Straße wet, runs Dogs: (a DOG!) red 'tis a over a ok",
        "dog small clock, STRASSE red red, runs over: (a DOG!) -- 'home über dog DOG ok",
    ]
    made = [
        changed(operation, told, ratio, pool, key=key, seed=key % 3, epoch=key % 2)
        for operation in ("replace", "drop", "mask")
        for key in range(40)
        for ratio in (0.1, 0.5, 1.0)
        for told in (text, "dog", "...", "a dog a dog")
    ]
    expected = "46cbebe03515d1ec693e274664982e8eb32f1aed02b584b5c134e128d4497db7"
    assert hashlib.sha256("\n".join(made).encode()).hexdigest() == expected


def test_replacing_takes_time_in_proportion_to_the_words(monkeypatch):
    looked_at = []
    core = captions._core
    monkeypatch.setattr(captions, "_core", lambda word: looked_at.append(word) or core(word))
    words = " ".join(f"word{place}," for place in range(100))
    changed("replace", words, 0.5, (words,) * 4)
    assert len(looked_at) <= 501


@pytest.mark.parametrize("type", ["token", "shuffle"])
def test_all_at_once_are_as_one_by_one(type):
    corruption = CaptionCorruption(0.2, type, "random")
    texts, keys, epochs = [TEXT, "dog", "a wet dog"], torch.tensor([3, 9, 4]), torch.tensor([0, 2, 1])
    alone = [corruption.changed(texts[n], POOL, int(keys[n]), int(epochs[n])) for n in range(3)]
    assert corruption.changed_all(texts, [POOL] * 3, keys, epochs) == alone
    shared = {"seed": 0, "epoch": 0}
    several = others_of_all(9, torch.arange(9), keys[:1].expand(9), **shared).tolist()
    assert several == [other_examples(9, place, key=3, **shared) for place in range(9)]


def test_dropped_words_leave_the_others_in_order():
    for key in range(50):
        kept = changed("drop", key=key).split()
        rest = iter(TEXT.split())
        assert 0 < len(kept) < len(TEXT.split()) and all(word in rest for word in kept)


def test_masked_words_stand_in_their_place():
    new = changed("mask", mask_word="<mask>").split()
    for a, b in zip(new, TEXT.split(), strict=True):
        assert a in (b, "<mask>", "<mask>,")
    assert 0 < sum("<mask>" in word for word in new) < len(new)
    assert changed("mask", "wet, brown", 1.0) == "[MASK], [MASK]"


@pytest.mark.parametrize("operation", ["replace", "drop", "mask"])
def test_the_share_of_words_is_the_one_asked_for(operation):
    text = " ".join(f"word{place}" for place in range(50))
    hits = 0
    for key in range(300):
        new = changed(operation, text, 0.2, key=key).split()
        hits += 50 - len(set(new) & set(text.split()))
    assert abs(hits / (300 * 50) - 0.2) < 4 * (0.16 / (300 * 50)) ** 0.5


@pytest.mark.parametrize("operation", ["replace", "drop", "mask"])
def test_at_least_one_word_changes_and_one_remains(operation):
    for key in range(50):
        assert changed(operation, "a dog", 1e-6, key=key) != "a dog"
        assert changed(operation, "a dog", 1.0, key=key).split()
        assert changed(operation, "dog", 1.0, key=key) not in ("dog", "")


def test_a_caption_of_one_word_is_replaced_or_masked_rather_than_dropped():
    assert changed("drop", "dog", pool=("cat",)) == "cat"
    assert changed("drop", "dog", pool=("dog",)) == "[MASK]"


def test_a_caption_that_cannot_change_stays():
    assert changed("replace", "dog dog", pool=("dog",)) == "dog dog"
    assert changed("replace", "dog", pool=()) == "dog"
    assert changed("mask", "[MASK]") == "[MASK]"


def test_words_are_drawn_by_key_seed_and_epoch():
    assert changed("mask") == changed("mask")
    variants = {
        changed("mask", key=key, seed=seed, epoch=epoch) for key in (3, 4) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(variants) > 4


def test_shuffled_words_are_the_same_in_another_order():
    orders = set()
    for key in range(100):
        new = shuffle_words(TEXT, key=key)
        assert new != TEXT and sorted(new.split()) == sorted(TEXT.split())
        orders.add(new)
        assert shuffle_words("dog runs", key=key) == "runs dog"
        assert sorted(shuffle_words("dog dog runs", key=key).split()) == ["dog", "dog", "runs"]
    assert len(orders) > 90
    assert shuffle_words("dog", key=0) == "dog" and shuffle_words("dog dog", key=0) == "dog dog"


def test_other_examples_are_others():
    for place in range(5):
        for key in range(30):
            assert place not in other_examples(5, place, key=key)
    assert {other for key in range(30) for other in other_examples(5, 2, key=key)} == {0, 1, 3, 4}
    assert other_examples(1, 0, key=0) == []


# Settings


def test_fixed_ignores_the_epoch_and_random_does_not():
    keys = torch.arange(1000)
    fixed, random = (CaptionCorruption(0.2, "token", mode) for mode in ("fixed", "random"))
    assert torch.equal(fixed.chosen(keys, 0), fixed.chosen(keys, 7))
    assert not torch.equal(random.chosen(keys, 0), random.chosen(keys, 7))
    assert 150 < int(fixed.chosen(keys).sum()) < 250
    assert fixed.changed(TEXT, POOL, 3, epoch=0) == fixed.changed(TEXT, POOL, 3, epoch=7)
    assert len({random.changed(TEXT, POOL, 3, epoch=epoch) for epoch in range(5)}) > 2


def test_settings_reach_the_words():
    masked = CaptionCorruption(0.2, "token", token_ratio=1.0, token_operation="mask", mask_word="#")
    assert masked.changed("a wet dog", (), 0, 0) == "# # #"
    assert CaptionCorruption(0.2, "shuffle").changed("wet dog", (), 0, 0) == "dog wet"


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"ratio": 1.5}, "1.5"), ({"type": "swop"}, "swop"), ({"mode": "often"}, "often"), ({"token_ratio": -1}, "-1")],
)
def test_wrong_settings_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        CaptionCorruption(**settings)


# Tally


def test_the_tally_counts_flags_and_truncations():
    tally = CaptionTally()
    flags = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 0]])
    tally.count({"caption_flags": flags, "is_truncated": torch.tensor([True, False, True, False])})
    tally.count({"caption_flags": flags})
    assert tally.counts.dtype == torch.int64
    assert tally.summary() == {
        "examples_seen": 8,
        "examples_corrupted": 4,
        "corrupted_but_still_true": 2,
        "captions_truncated": 2,
        "realized_ratio": 0.5,
    }
    assert tally.summary(torch.tensor([10, 1, 0, 0]))["realized_ratio"] == 0.1
    assert CaptionTally().summary()["realized_ratio"] == 0.0


def test_a_caption_is_its_own_unless_said_otherwise():
    assert Caption("a dog") == ("a dog", False, False, None) and Caption("a dog").true_text == "a dog"


def test_the_floor_needs_torch_and_numpy_only():
    code = (
        "import sys, noisycond.captions; "
        "print([m for m in ('diffusers', 'transformers', 'datasets', 'accelerate', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
