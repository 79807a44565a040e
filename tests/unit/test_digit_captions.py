"""Captions of the digits: true of their images, and prompts of which no caption has the phrasing."""

import numpy as np
import pytest

from noisycond.data.digit_captions import (
    NUMBER_WORDS,
    SEEN,
    UNSEEN,
    Attributes,
    attributes_of,
    captions_of,
    digit_prompts,
    ink_mass,
    lean,
    phrased,
    split,
    vocabulary,
)
from noisycond.data.sources import Digits


@pytest.fixture(scope="module")
def digits():
    return Digits("train")


@pytest.fixture(scope="module")
def captions(digits):
    return captions_of(digits)


def skeleton(text: str) -> str:
    """A caption without what fills its template."""
    words = []
    for word in split(text):
        if word in NUMBER_WORDS or word.isdigit():
            word = "#"
        elif word in ("thick", "thin"):
            word = "WEIGHT"
        elif word in ("left", "right"):
            word = "SIDE"
        words.append("a" if word == "an" else word)
    return " ".join(words)


def test_a_caption_names_its_digit_and_no_other(digits, captions):
    for label in range(10):
        own = [captions[i] for i in np.flatnonzero(digits.labels == label)]
        assert all(len(set(texts)) == len(texts) >= 16 for texts in own)
        for text in {text for texts in own for text in texts}:
            named = [word for word in split(text) if word.isdigit() or word in NUMBER_WORDS]
            assert named in ([str(label)], [NUMBER_WORDS[label]])
            assert len(text.split()) <= 14 and text == text.lower()


def test_attributes_are_true_of_the_image(digits, captions):
    mass, leaning = ink_mass(digits.pixels), lean(digits.pixels)
    for digit in range(10):
        here = np.flatnonzero(digits.labels == digit)
        said = {
            word: [i for i in here if word in " ".join(captions[i]).replace(",", "").split()]
            for word in ("thin", "thick", "left", "right", "upright")
        }
        for word, measure in (("thin", mass), ("thick", mass), ("left", leaning), ("right", leaning)):
            assert 0.1 < len(said[word]) / len(here) < 0.25, (digit, word)
            silent = measure[[i for i in here if i not in said[word]]]
            spoken = measure[said[word]]
            assert spoken.max() <= silent.min() if word in ("thin", "left") else spoken.min() >= silent.max()
        assert not set(said["thin"]) & set(said["thick"])
        assert leaning[said["left"]].max() < leaning[said["upright"]].min()
        assert leaning[said["upright"]].max() < leaning[said["right"]].min()


def test_lean_is_that_of_a_drawn_stroke():
    upright, right = np.zeros((2, 9, 9))
    upright[:, 4] = right[range(9), range(8, -1, -1)] = 255
    assert lean(np.stack([upright, right, right[:, ::-1]])) == pytest.approx([0, 1, -1])


def test_the_same_image_has_the_same_attributes_in_any_split(digits):
    test = Digits("test")
    test.pixels, test.labels = (
        np.concatenate([test.pixels, digits.pixels]),
        np.concatenate([test.labels, digits.labels]),
    )
    assert attributes_of(test)[-len(digits) :] == attributes_of(digits)


def test_seen_prompts_occur_in_training_captions(captions):
    texts = {text for own in captions for text in own}
    prompts = digit_prompts("seen")
    assert {prompt for prompt, _ in prompts} <= texts
    assert min(np.bincount([digit for _, digit in prompts], minlength=10)) >= 10


def test_unseen_prompts_are_new_phrasings_of_known_words(captions):
    texts = {text for own in captions for text in own}
    known = {word for text in texts for word in split(text)}
    skeletons = {skeleton(text) for text in texts}
    prompts = digit_prompts("unseen")
    for prompt, digit in prompts:
        assert skeleton(prompt) not in skeletons, prompt
        assert set(split(prompt)) <= known, prompt
        assert {str(digit), NUMBER_WORDS[digit]} & set(split(prompt))
        assert len(prompt.split()) <= 14
    assert min(np.bincount([digit for _, digit in prompts], minlength=10)) >= 10
    assert len({prompt for prompt, _ in prompts}) == len(prompts)


def test_vocabulary_is_that_of_the_captions(captions):
    texts = {text for own in captions for text in own}
    assert set(vocabulary()) == {word for text in texts for word in split(text)}
    assert "," in vocabulary() and "seven" in vocabulary() and "7" in vocabulary()


def test_an_eight_is_not_a_eight():
    assert phrased("a drawing of a {}", "eight") == "a drawing of an eight"
    assert phrased("a {weight} {}", "8", Attributes("thin")) == "a thin 8"
    assert phrased("a photo of a {}", "8") == "a photo of an 8"


def test_no_template_is_both_seen_and_unseen():
    seen = {skeleton(phrased(t, "7", Attributes("thin", "left"))) for kind in SEEN.values() for t in kind}
    unseen = {skeleton(phrased(t, "7", Attributes("thin", "left"))) for kind in UNSEEN.values() for t in kind}
    assert not seen & unseen
