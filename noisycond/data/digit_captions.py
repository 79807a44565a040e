"""Captions of the handwritten digits in many phrasings, with attributes that are true of the image, and prompts in
phrasings that no caption has.

Letters: N images, H × W their size.
"""

import functools
import re
from typing import Literal, NamedTuple

import numpy as np

from noisycond.data.sources import Digits


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OUTER = 0.2  # share of a class's images at either end that an attribute is said of, and as many around the middle
UPRIGHT = "upright"

# {} is the digit, as a word or a numeral; {weight} is thick or thin, {side} is left or right.
SEEN = {
    "plain": (
        "{}",
        "number {}",
        "the digit {}",
        "a handwritten {}",
        "a photo of the number {}",
        "a drawing of a {}",
        "an image of the digit {}",
        "the number {} written by hand",
    ),
    "weight": (
        "a {weight} {}",
        "number {} in {weight} strokes",
        "the digit {}, drawn with {weight} lines",
        "a handwritten {} in {weight} ink",
    ),
    "side": (
        "{}, slanted to the {side}",
        "the number {} leaning to the {side}",
        "a handwritten {} slanted to the {side}",
        "a photo of a {} that leans {side}",
    ),
    "upright": (
        "an upright {}",
        "the digit {}, upright",
        "a drawing of an upright {}",
    ),
    "weight and side": (
        "a {weight} {} slanted to the {side}",
        "number {} in {weight} strokes, leaning {side}",
        "the digit {}, {weight} and slanted to the {side}",
    ),
    "weight and upright": (
        "an upright {} in {weight} strokes",
        "the number {}, {weight} and upright",
    ),
}
UNSEEN = {
    "plain": (
        "digit {}",
        "the handwritten number {}",
        "a photo of a handwritten {}",
        "an image of the number {}",
        "a drawing of the digit {}",
        "a {} written by hand",
        "the number {} in a photo",
        "a {} drawn by hand in ink",
    ),
    "weight": (
        "a photo of a {weight} {}",
        "the handwritten digit {} with {weight} strokes",
    ),
    "side": (
        "a drawing of the number {} slanted {side}",
        "an image of a {} that leans to the {side}",
    ),
    "upright": ("a photo of an upright handwritten {}",),
    "weight and side": ("an image of a handwritten {}, {weight} and leaning {side}",),
    "weight and upright": ("a drawing of the digit {} with upright {weight} lines",),
}


class Attributes(NamedTuple):
    """What a caption may say of one image; None where nothing is to be said.

    Attributes:
        weight: `thick` or `thin`. slant: `left`, `right` or `upright`.
    """

    weight: str | None = None
    slant: str | None = None


EVERY_ATTRIBUTE = tuple(Attributes(weight, slant) for weight in (None, "thick", "thin")
                        for slant in (None, "left", "right", UPRIGHT))  # fmt: skip


def ink_mass(pixels: np.ndarray) -> np.ndarray:
    """The ink of images [N, H, W] of any real type, white on black: float64 [N], in the pixels' units."""
    return pixels.sum(axis=(1, 2), dtype=np.float64)


def lean(pixels: np.ndarray) -> np.ndarray:
    """How far the ink of images [N, H, W], white on black, leans to the right: float64 [N], columns per row.

    The regression of the ink's column on its height above the centre, from its second moments (the skew that
    "deslanting" of handwriting takes away); 0 is upright, below 0 leans to the left.
    """
    ink = pixels.astype(np.float64)
    rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]]
    total = ink_mass(ink)
    height = (ink * rows).sum((1, 2))[:, None, None] / total[:, None, None] - rows
    across = columns - (ink * columns).sum((1, 2))[:, None, None] / total[:, None, None]
    return (ink * across * height).sum((1, 2)) / (ink * height**2).sum((1, 2))


@functools.cache
def _limits() -> tuple[np.ndarray, np.ndarray]:
    """By digit: the quantiles of ink mass, [10, 2], and of lean, [10, 4], between which nothing is said.

    Of the training images whatever the split, so that one image has one caption; by digit, since a 7 leans to the
    right by its shape and a 1 has little ink.
    """
    train = Digits("train")
    mass, leaning = ink_mass(train.pixels), lean(train.pixels)
    by_digit = [train.labels == digit for digit in range(10)]
    middle = (0.5 - OUTER / 2, 0.5 + OUTER / 2)
    return (
        np.stack([np.quantile(mass[here], (OUTER, 1 - OUTER)) for here in by_digit]),
        np.stack([np.quantile(leaning[here], (OUTER, *middle, 1 - OUTER)) for here in by_digit]),
    )


def attributes_of(digits: Digits) -> list[Attributes]:
    """What is true of each image, measured against training images of the same digit: thick or thin by ink mass,
    leaning or upright by second moments."""
    mass_limits, lean_limits = (limits[digits.labels] for limits in _limits())
    mass, leaning = ink_mass(digits.pixels), lean(digits.pixels)
    weights = np.where(mass < mass_limits[:, 0], "thin", np.where(mass > mass_limits[:, 1], "thick", "")).tolist()
    left, low, high, right = lean_limits.T
    slants = np.select(
        [leaning < left, leaning > right, (leaning > low) & (leaning < high)], ["left", "right", UPRIGHT], ""
    ).tolist()
    return [Attributes(weight or None, slant or None) for weight, slant in zip(weights, slants, strict=True)]


def phrased(template: str, name: str, attributes: Attributes = Attributes()) -> str:  # noqa: B008 (immutable)
    """A template filled with the digit's name and the attributes that it speaks of."""
    text = template.format(name, weight=attributes.weight, side=attributes.slant)
    return re.sub(r"\ba (?=(eight|8)\b)", "an ", text)


def _phrasings(templates: dict[str, tuple[str, ...]], attributes: Attributes) -> list[str]:
    """The templates that say nothing but these attributes, and not more than they hold."""
    kinds = ["plain"]
    slant = None if attributes.slant is None else "upright" if attributes.slant == UPRIGHT else "side"
    kinds += ["weight"] * (attributes.weight is not None) + [slant] * (slant is not None)
    if attributes.weight and slant:
        kinds.append(f"weight and {slant}")
    return [template for kind in kinds for template in templates[kind]]


def _names(digit: int) -> tuple[str, str]:
    return NUMBER_WORDS[digit], str(digit)


def captions_of(digits: Digits) -> list[list[str]]:
    """The captions of each image, all of them true: every phrasing of [`SEEN`] that its attributes allow, with the
    digit as a word and as a numeral; N lists of 16 to 42 different texts."""
    return [
        [phrased(template, name, attributes) for template in _phrasings(SEEN, attributes) for name in _names(digit)]
        for digit, attributes in zip(digits.labels.tolist(), attributes_of(digits), strict=True)
    ]


def digit_prompts(phrasings: Literal["seen", "unseen"]) -> list[tuple[str, int]]:
    """Prompts and the digit that each asks for, the ten digits in turn.

    Args:
        phrasings: `seen`: as captions of training images have them. `unseen`: templates that no training caption
            follows, of words that all occur in training captions.
    """
    templates = {"seen": SEEN, "unseen": UNSEEN}[phrasings]
    asked = _with_attributes(templates)
    return [
        (phrased(template, _names(digit)[(place + digit) % 2], attributes), digit)
        for place, (template, attributes) in enumerate(asked)
        for digit in range(10)
    ]


def _with_attributes(templates: dict[str, tuple[str, ...]]) -> list[tuple[str, Attributes]]:
    """Each template once, with attributes in turn where it speaks of some."""
    weights, sides = ("thick", "thin"), ("right", "left")
    asked = []
    for kind, members in templates.items():
        for place, template in enumerate(members):
            weight = weights[place % 2] if "weight" in kind else None
            slant = UPRIGHT if "upright" in kind else sides[place % 2] if "side" in kind else None
            asked.append((template, Attributes(weight, slant)))
    return asked


def vocabulary() -> list[str]:
    """Every word, numeral and punctuation mark of the captions, sorted; prompts have no others."""
    words: set[str] = set()
    for attributes in EVERY_ATTRIBUTE:
        for template in _phrasings(SEEN, attributes):
            for digit in range(10):
                words.update(word for name in _names(digit) for word in split(phrased(template, name, attributes)))
    return sorted(words)


def split(text: str) -> list[str]:
    """A caption as its words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)
